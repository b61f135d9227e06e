# the ops (__all__) have the types of toy/ops/reference.py: toy/ops/accelerated.py says so

import numpy as np

FORM: str

class CrossEntropyCache:
    logits: np.ndarray
    labels: np.ndarray
    largest: np.ndarray
    share: np.ndarray
    n_counted: int
