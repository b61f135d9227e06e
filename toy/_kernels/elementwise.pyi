# the ops (__all__) have the types of toy/ops/reference.py: toy/ops/accelerated.py says so

import numpy as np

class ElementwiseCache: ...

def exp(x: np.ndarray) -> np.ndarray: ...
