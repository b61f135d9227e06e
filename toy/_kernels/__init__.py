"""The compiled kernels behind `toy.ops.accelerated`.

One file a job: `linear`, `attention`, `norms`, `elementwise`, `embedding`, `layout`, `loss`, `optimizer` are ops;
`quantized` (with dequantize.h) has the products with the block types of GGUF files; `threads` (with pool.h) spreads them
over cores, `blas` multiplies matrices, `memory` recycles arrays, `arrays` checks what comes in, `simd_math.h` has the
vectorised functions, and `cpu` is looked at first. Each .pxd documents the C functions in it, which other compiled code
may call.

Importing this package raises ImportError, with what to do, when the kernels are not built or not for this CPU.
"""

_REBUILD = "reinstall toy on this machine, with a C compiler present (pip install --force-reinstall --no-deps .)"

try:
    import toy._kernels.cpu as cpu
except ImportError as error:
    raise ImportError(f"the compiled kernels of toy are not built ({error}): {_REBUILD}") from error

if cpu.missing_features():
    raise ImportError(
        f"the compiled kernels of toy use CPU instructions that this machine lacks ({', '.join(cpu.missing_features())}): "
        f"{_REBUILD}, or build with TOY_MARCH=x86-64-v2"
    )


def build_info():
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
