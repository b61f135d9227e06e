"""What the tests of ggml_bridge share."""

import importlib.util
import os

import numpy as np
import pytest

import ggml_bridge

PURE = os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0")
HAS_LIBRARY = importlib.util.find_spec("libggml") is not None or bool(os.environ.get("TOY_GGML_DIR"))

# Only a run that is meant to be pure Python, or a machine without libggml, may go without: a bridge that was not built
# although its library is there makes the tests fail.
needs_ggml = pytest.mark.skipif(PURE or not HAS_LIBRARY, reason="libggml is not installed, or TOY_PURE_PYTHON is set")


def relative_error(got, expected):
    """Relative L2 distance."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, f"shapes {got.shape} and {expected.shape}"
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def run_graph(build, *arrays, n_threads=1):
    """build(graph, *inputs) -> tensor or tuple of tensors; returns their values for these input arrays."""
    with ggml_bridge.Backend("cpu", n_threads) as backend:
        g = backend.graph()
        inputs = [
            g.input(a.shape, "i32" if a.dtype.kind in "iu" else "f32", name=f"x{i}") for i, a in enumerate(arrays)
        ]
        out = build(g, *inputs)
        for tensor in out if isinstance(out, tuple) else (out,):
            g.output(tensor)
        g.allocate()
        for tensor, array in zip(inputs, arrays):
            tensor.upload(array)
        g.compute()
        return tuple(t.download() for t in out) if isinstance(out, tuple) else out.download()
