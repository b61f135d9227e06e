import ctypes
from collections.abc import Callable
from typing import TypedDict

PRODUCTS: dict[str, int]

class _BlasInfo(TypedDict):
    name: str
    threads_outside_kernels: int | None
    held_to_one_thread: bool
    product: str

def openblas_function(verb: str) -> ctypes._NamedFuncPointer | None: ...
def blas_info() -> _BlasInfo: ...
def set_product(name: str) -> None: ...
def can_be_held(getter: Callable[[], int] | None, setter: Callable[[int], object] | None) -> bool: ...
