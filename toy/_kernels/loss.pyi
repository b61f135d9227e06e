# the ops (__all__) have the types of toy/ops/reference.py: toy/ops/accelerated.py says so

import numpy as np

FORM: str

def cross_entropy_gradient(logits: np.ndarray, labels: np.ndarray, scale: float, backward: bool = True) -> float: ...

class CrossEntropyCache: ...
