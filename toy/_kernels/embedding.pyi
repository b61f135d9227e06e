# the ops (__all__) have the types of toy/ops/reference.py: toy/ops/accelerated.py says so

import numpy as np

FORM: str
FORM_BACKWARD: str
FORM_ROPE: str
FORM_ROPE_BACKWARD: str

class EmbeddingCache: ...
class RopeCache: ...

def embedding(token_ids: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, EmbeddingCache]: ...
def embedding_backward(d_out: np.ndarray, cache: EmbeddingCache, d_table: np.ndarray | None) -> None: ...
