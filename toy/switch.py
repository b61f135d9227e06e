"""The one switch: which backend runs the models, what is available here, and why not.

A backend is chosen, in this order, by the argument (`FromScratch(backend="numpy")`), by `with use_backend(name):`, by
`set_backend(name)`, by the variable TOY_BACKEND, and otherwise ("auto") it is the fastest one that is there.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple, cast

import numpy as np

from toy.config import check_positive_int
from toy.op_table import OpTable


class BackendUnavailableError(RuntimeError):
    """A backend or device was asked for that is not there; the message says how to get it."""


class BackendInfo(NamedTuple):
    """One row of `toy.backends()`. reason: why it is not available, empty when it is. threads: None where unknown."""

    name: str
    available: bool
    reason: str
    threads: int | None
    version: str
    description: str


class Resolved(NamedTuple):
    """A resolved backend. reason: why this one, in words fit for a log line."""

    backend: str
    device: str
    reason: str


F32 = 0  # among the numbers of `kernel_precision`
_TABLES = ("numpy", "cython")  # the backends with an eager op table
_FASTEST_FIRST = ("ggml", "cython", "numpy")
MOST_THREADS = 1024  # what the kernels' pool can hold
BACKEND_NAMES = ("auto", "numpy", "cython", "ggml")
_DESCRIPTIONS = {
    "numpy": "the textbook: readable numpy",
    "cython": "numpy arrays, compiled kernels",
    "ggml": "one ggml graph per step: the same kernels on the CPU, ggml's own operations on other devices",
}

_global_choice = "auto"
_n_threads: int | None = None
_local_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("toy_backend", default=None)


def set_backend(name: str) -> None:
    """Choose the backend of everything made from now on. Raises ValueError / BackendUnavailableError like `resolve`."""
    global _global_choice
    _check_available(name)
    _global_choice = name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of everything made inside the `with` block (in this thread or task only)."""
    _check_available(name)
    token = _local_choice.set(name)
    try:
        yield
    finally:
        _local_choice.reset(token)


def backends() -> list[BackendInfo]:
    """A `BackendInfo` row for every backend, the fastest first: available or not, and why not."""
    return [_describe(name) for name in _FASTEST_FIRST]


def resolve(backend: str = "auto", device: str = "auto") -> Resolved:
    """The backend and device to use -> `Resolved`.

    Raises ValueError for an unknown name or a device the backend does not have, and BackendUnavailableError for a backend
    that is not there.
    """
    _follow_environment_threads()
    chosen, origin = backend, "as asked for"
    if chosen == "auto":
        chosen, origin = _ambient_choice()
    _check_available(chosen, origin)
    if chosen == "auto":
        rows = backends()
        chosen = next(row.name for row in rows if row.available)
        missing: dict[str, list[str]] = {}  # reason -> names: the missing kernels are one reason for two
        for row in rows[: [row.name for row in rows].index(chosen)]:
            missing.setdefault(row.reason, []).append(row.name)
        reasons = "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in missing.items())
        origin = "auto: the fastest available" + (f" ({reasons})" if reasons else "")
    if chosen == "ggml":
        return Resolved(chosen, _ggml_device(device), origin)
    if device not in ("auto", "cpu"):
        raise ValueError(
            f"device {device!r} is not a device of backend {chosen!r}, which runs on 'cpu' only: backend='ggml' has others"
        )
    return Resolved(chosen, "cpu", origin)


def missing_kernels_notice(choice: Resolved) -> str:
    """One line for whoever got numpy without asking for it: the kernels are missing, why, and what to type; else "".

    choice: the `Resolved` of `resolve`.
    """
    row = _describe("cython")
    if choice.backend != "numpy" or not choice.reason.startswith("auto") or row.available:
        return ""
    return f"this runs on numpy, several times slower than it could: {row.reason}"


def set_num_threads(n: int) -> None:
    """Use n threads on every backend: numpy's BLAS and the compiled kernels at once, ggml graphs realized from now on.

    Raises ValueError unless n is a whole number of at least 1. Without this call it is TOY_NUM_THREADS or the processors
    there are.
    """
    global _n_threads
    n = check_positive_int("the number of threads", n)
    if n > MOST_THREADS:
        raise ValueError(f"the number of threads must be at most {MOST_THREADS}, got a number of {len(str(n))} digits")
    from threadpoolctl import threadpool_limits

    threadpool_limits(n, user_api="blas")
    if (kernels := _kernel_threads()) is not None:
        kernels.set_num_threads(n)
    _n_threads = n


def _kernel_threads() -> ModuleType | None:
    """The module that says how many threads the compiled kernels use, None where they are not built."""
    try:
        ops_for("cython")
    except ImportError:
        return None
    from toy._kernels import threads

    return threads


@contextlib.contextmanager
def use_num_threads(n: int | None) -> Iterator[None]:
    """`set_num_threads(n)` inside the `with` block, what was before it afterwards. None: nothing is changed."""
    if n is None:
        yield
        return
    global _n_threads
    from threadpoolctl import threadpool_limits

    before, kernels = _n_threads, _kernel_threads()
    kernels_before = kernels and kernels.get_num_threads()
    with threadpool_limits(user_api="blas"):  # remembers the limits there are, and puts them back
        try:
            set_num_threads(n)
            yield
        finally:
            _n_threads = before
            if kernels is not None:
                kernels.set_num_threads(kernels_before)


def _follow_environment_threads() -> None:
    """TOY_NUM_THREADS, which the kernels and ggml read themselves, holds for numpy's BLAS as well."""
    setting = os.environ.get("TOY_NUM_THREADS", "").strip()
    if setting and _n_threads is None:
        if not setting.isdigit():
            raise ValueError(f"TOY_NUM_THREADS must be a whole number of at least 1, got {setting!r}")
        set_num_threads(int(setting))


def usable_processors() -> int:
    """How many processors this process may use: its affinity, and where the kernels are built its control group's quota."""
    if (kernels := _kernel_threads()) is not None:
        return int(kernels._usable_cpus())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads() -> int | None:
    """What `set_num_threads` was told, None before it was."""
    return _n_threads


def ops_for(backend: str, precision: int = F32) -> OpTable:
    """The op table of an eager backend name ("numpy", "cython"). precision: from `kernel_precision`."""
    if backend == "cython" and precision != F32:
        from toy.ops.precision import with_precision

        return with_precision(precision)
    if backend == "cython":
        from toy.ops import accelerated

        return accelerated
    from toy.ops import reference

    return reference


def bf16_products() -> str | None:
    """How this processor multiplies bfloat16 faster than float32, "AMX" or "AVX512-BF16"; None where it does not, or where
    the kernels are not built."""
    try:
        ops_for("cython")
    except ImportError:
        return None
    from toy._kernels import products

    return products.bf16_name()


def kernel_precision(precision: str, choice: Resolved) -> int:
    """What the kernels call a precision of `RecipeOptions` -> `F32` or another number.

    Raises ValueError where the backend or its device has no such precision, BackendUnavailableError where the processor has
    none.
    """
    if precision == "f32":
        return F32
    if choice.backend == "numpy":
        raise ValueError(
            f"backend 'numpy' has no precision {precision!r}: choose backend cython or ggml, or precision f32 (float32)"
        )
    if choice.device != "cpu":
        raise ValueError(
            f"device {choice.device!r} has no precision {precision!r}: choose device cpu, or precision f32 (float32)"
        )
    if bf16_products() is None:
        raise BackendUnavailableError(
            f"precision {precision!r}: this processor has no bf16 products that are faster than float32's (AMX, or "
            "AVX512-BF16 of AMD's): choose precision f32 (float32)"
        )
    from toy._kernels import products

    return cast(int, products.bf16())


def eager_ops(backend: str = "auto") -> OpTable:
    """The op table for models that run op by op: the chosen backend's, or the fastest eager one where ggml is chosen."""
    chosen = resolve(backend).backend
    if chosen not in _TABLES:
        chosen = next(row.name for row in backends() if row.available and row.name in _TABLES)
    return ops_for(chosen)


def _ambient_choice() -> tuple[str, str]:
    local = _local_choice.get()
    if local is not None and local != "auto":
        return local, "chosen by use_backend()"
    if local is None and _global_choice != "auto":
        return _global_choice, "chosen by set_backend()"
    variable = os.environ.get("TOY_BACKEND", "")
    if local is None and variable not in ("", "auto"):
        return variable, "chosen by TOY_BACKEND"
    return "auto", ""


def _check_available(name: str, origin: str = "") -> None:
    if name not in BACKEND_NAMES:
        by = f" ({origin})" if origin.startswith("chosen") else ""
        raise ValueError(f"unknown backend {name!r}{by}: choose one of {', '.join(BACKEND_NAMES)}")
    if name != "auto":
        row = _describe(name)
        if not row.available:
            raise BackendUnavailableError(f"backend {name!r} is not available: {row.reason}")


def _describe(name: str) -> BackendInfo:
    facts = {"numpy": _numpy_facts, "cython": _cython_facts, "ggml": _ggml_facts}[name]
    try:
        threads, version = facts()
    except (ImportError, BackendUnavailableError) as error:
        return BackendInfo(name, False, str(error), None, "", _DESCRIPTIONS[name])
    return BackendInfo(name, True, "", threads, version, _DESCRIPTIONS[name])


def _numpy_facts() -> tuple[int | None, str]:
    return _blas_threads(), f"numpy {np.__version__}"


def _cython_facts() -> tuple[int | None, str]:
    ops_for("cython")
    from toy import _kernels

    facts = _kernels.build_info()
    blas = " ".join(str(facts["blas"].get("name", "BLAS")).split()[:2])
    if not facts["blas"]["held_to_one_thread"]:
        blas += " (it cannot be held to one thread: each product runs on its own threads)"
    elif facts["blas"]["product"] != "sgemm":
        blas = f"products of its own ({facts['blas']['product'].upper()}) and of {blas}"
    return facts["threads"], f"{blas}, {facts['simd_bits']}-bit SIMD"


def _ggml_facts() -> tuple[int | None, str]:
    import ggml_bridge

    threads, _ = _cython_facts()  # its CPU spelling runs the compiled kernels
    available, reason = ggml_bridge.available()
    if not available:
        raise BackendUnavailableError(reason)
    import ggml_bridge.kernels

    return threads, f"ggml {ggml_bridge.version()}"


def _ggml_device(device: str) -> str:
    """The device name that the engine takes. Raises BackendUnavailableError, with the devices found, for one not there."""
    if device in ("auto", "cpu", "cpu-native"):
        return "cpu" if device == "auto" else device
    import ggml_bridge

    try:
        return ggml_bridge.find_device(device).name
    except (ValueError, RuntimeError) as error:
        raise BackendUnavailableError(str(error)) from error


def devices_like(device: str) -> tuple[str, list[str]]:
    """The name of a ggml device, and the names of all that the machine has of its kind, it among them. Raises
    BackendUnavailableError for one that is not there."""
    name = _ggml_device(device)
    import ggml_bridge

    found = ggml_bridge.find_device(name)
    alike = [other for other in ggml_bridge.devices() if (other.kind, other.backend) == (found.kind, found.backend)]
    return name, [other.name for other in alike]


def _blas_threads() -> int | None:
    from threadpoolctl import threadpool_info

    counts = [
        pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas" and "numpy" in pool["filepath"]
    ]
    return max(counts, default=None)
