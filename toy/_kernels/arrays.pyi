import numpy as np

CONTIGUOUS_ROWS: str
MASKED: str

def check_matrix(array: np.ndarray, name: str, rows: int | None, columns: int | None, form: str) -> None: ...
