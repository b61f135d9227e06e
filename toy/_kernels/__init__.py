"""The compiled kernels behind `toy.ops.accelerated`.

One file a job: `linear`, `attention`, `norms`, `elementwise`, `embedding`, `layout`, `loss`, `optimizer` are ops;
`quantized` (with dequantize.h) has the products with the block types of GGUF files; `threads` (with pool.h) spreads them
over cores, `blas` (with product.h) multiplies matrices, `products` (with product_bf16.h) in bfloat16 too, `memory` recycles
arrays, `arrays` checks what comes in, `simd_math.h` has the vectorised functions, attention_lanes.h the products and the
softmax of a block of queries, and `cpu` is looked at first.
Each .pxd documents the C functions in it, which other compiled code may call.

Importing this package raises ImportError, with what to do, when the kernels are not built or not for this CPU.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any


def rebuild_command() -> str:
    """What to type to compile this installation of toy again, from where it came: its checkout, a folder, the index."""
    root = Path(__file__).resolve().parents[2]
    if (root / "setup.py").exists():
        source = f"-e {root.as_uri()}"
    else:
        source = _installed_from() or "--no-binary toy toy"
    # without the cache: pip would install what it compiled before, perhaps on another machine
    return f"pip install --force-reinstall --no-cache-dir --no-deps {source}"


def _installed_from() -> str | None:
    """The address that toy was installed from, for pip; None for an index or a wheel, which is compiled already."""
    try:
        record = json.loads(importlib.metadata.distribution("toy").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return None
    if "vcs_info" in record:
        return f"{record['vcs_info']['vcs']}+{record['url']}@{record['vcs_info']['commit_id']}"
    return None if record.get("url", ".whl").endswith(".whl") else record["url"]


try:
    import toy._kernels.cpu as cpu
except ImportError as error:
    raise ImportError(
        f"the compiled kernels of toy are not built ({error}): install a C compiler, then {rebuild_command()}"
    ) from error

if cpu.missing_features():
    raise ImportError(
        f"the compiled kernels of toy use CPU instructions that this machine lacks ({', '.join(cpu.missing_features())}): "
        f"with a C compiler here, reinstall toy: {rebuild_command()}; "
        "with the variable TOY_MARCH empty it is compiled for any CPU of this family"
    )


def build_info() -> dict[str, Any]:
    """How the kernels were built and what they run with: compiler, flags, SIMD width in bits, threads, BLAS."""
    from toy._kernels import blas, threads

    return {
        "compiler": threads.compiler(),
        "flags": cpu.compile_flags(),
        "cpu_features": cpu.target_features(),
        "simd_bits": threads.simd_bits(),
        "threads": threads.get_num_threads(),
        "default_threads": threads.default_num_threads(),
        "blas": blas.blas_info(),
    }
