from typing_extensions import CapsuleType

from ggml_bridge.core import Graph

# kernels, for Graph.custom
WIDEN: CapsuleType
EMBEDDING: CapsuleType
EMBEDDING_BACKWARD: CapsuleType
LINEAR: CapsuleType
LINEAR_BACKWARD_INPUT: CapsuleType
LINEAR_BACKWARD_WEIGHT: CapsuleType
QUANTIZED_EMBEDDING: CapsuleType
QUANTIZED_LINEAR: CapsuleType
QUANTIZED_LINEAR_BACKWARD_INPUT: CapsuleType
RMS_NORM: CapsuleType
LAYER_NORM: CapsuleType
RMS_NORM_BACKWARD: CapsuleType
LAYER_NORM_BACKWARD: CapsuleType
ADD_PARTIALS: CapsuleType
ELEMENTWISE: CapsuleType
ROPE: CapsuleType
ATTENTION: CapsuleType
ATTENTION_BACKWARD: CapsuleType
CROSS_ENTROPY: CapsuleType
COUNTED: CapsuleType
ADD_LOSSES: CapsuleType
MEAN_LOSS: CapsuleType
CROSS_ENTROPY_BACKWARD: CapsuleType
ADAMW: CapsuleType
SQUARES: CapsuleType
NORM_AND_FACTOR: CapsuleType
SCALED: CapsuleType

POOL: CapsuleType  # a runner, for Backend
NAMES: dict[int, str]
QUANTIZED_TYPES: dict[str, int]

def attention_scratch_floats(t_q: int, t_k: int, d_head: int, softcap: float = 0.0) -> int: ...
def elementwise(name: str, factor: float = 0.0) -> bytes: ...
def quantized_floats(n_in: int, n_out: int) -> int: ...
def quantized_type(name: str) -> bytes | None: ...
def compute(graph: Graph) -> None: ...
