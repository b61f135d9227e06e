import ctypes
from typing import TypedDict

class BlasInfo(TypedDict):
    name: str
    threads_outside_kernels: int | None
    held_to_one_thread: bool

def openblas_function(verb: str) -> ctypes._NamedFuncPointer | None: ...
def blas_info() -> BlasInfo: ...
