import numpy as np

FORM: str
FORM_BACKWARD: str

class LinearCache: ...

def linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, precision: int = 0
) -> tuple[np.ndarray, LinearCache]: ...
def linear_backward(
    d_y: np.ndarray, cache: LinearCache, d_weight: np.ndarray | None, d_bias: np.ndarray | None = None
) -> np.ndarray: ...
