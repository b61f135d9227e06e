# the ops (__all__) have the types of toy/ops/reference.py: toy/ops/accelerated.py says so

import numpy as np

class NormCache:
    x: np.ndarray
    gamma: np.ndarray
    mean: np.ndarray | None
    rstd: np.ndarray
