# the ops (__all__) have the types of toy/ops/reference.py: toy/ops/accelerated.py says so

import numpy as np

FORM: str
FORM_BACKWARD: str

class AttentionCache:
    @property
    def probabilities(self) -> np.ndarray: ...
