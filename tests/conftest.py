"""Fixtures and switches of the whole suite.

TOY_PURE_PYTHON=1     the run is meant for pure Python: tests of the compiled kernels are skipped. Without it a run in which
                      the kernels were not built fails at once, instead of testing half of the library in silence.
TOY_REQUIRE_TORCH=1   a missing PyTorch (an optional reference) is a failure too; CI sets it.
TOY_REQUIRE_MPI=1     so is a missing MPI (mpi4py and an mpirun), which the tests of several processes need; CI sets it.

`--hypothesis-profile=thorough` draws new examples, and many, in place of the fixed few.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import signal
from typing import NamedTuple

import hypothesis
import mpi
import pytest

PURE = os.environ.get("TOY_PURE_PYTHON", "") not in ("", "0")
MPI_REQUIRED = os.environ.get("TOY_REQUIRE_MPI", "") not in ("", "0")
TORCH_REQUIRED = os.environ.get("TOY_REQUIRE_TORCH", "") not in ("", "0")

needs_kernels = pytest.mark.skipif(PURE, reason="TOY_PURE_PYTHON is set: the compiled kernels are not tested")

# derandomize: the same examples in every run, so that a run turns red because of a change and of nothing else
hypothesis.settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None)
hypothesis.settings.load_profile("default")


class Backend(NamedTuple):
    """Pass it on as `FromScratch(*backend)`."""

    name: str
    device: str


OPS = {
    "reference": [],
    "accelerated": [needs_kernels],
}
BACKENDS = {
    "numpy": (Backend("numpy", "cpu"), []),
    "cython": (Backend("cython", "cpu"), [needs_kernels]),
    "ggml-cpu": (Backend("ggml", "cpu"), [needs_kernels]),
    "ggml-native": (Backend("ggml", "cpu-native"), [needs_kernels]),
}


@pytest.fixture(scope="session", params=[pytest.param(name, marks=marks, id=name) for name, marks in OPS.items()])
def ops(request):
    """Each op table."""
    return importlib.import_module(f"toy.ops.{request.param}")


@pytest.fixture(
    scope="session", params=[pytest.param(row, marks=marks, id=name) for name, (row, marks) in BACKENDS.items()]
)
def backend(request):
    """Each backend and device that a recipe can be realized on, as a `Backend`."""
    return request.param


@pytest.fixture(scope="session")
def kernels():
    """For tests that need the compiled kernels, or ggml (whose CPU graphs run them): skipped in a pure Python run."""
    if PURE:
        pytest.skip("TOY_PURE_PYTHON is set: the compiled kernels are not tested")


@pytest.fixture(scope="session")
def torch_models():
    """The PyTorch twins (tests/torch_models.py); the test is skipped where PyTorch is not installed."""
    pytest.importorskip("torch", reason="PyTorch, the outside reference, is not installed (pip install torch)")
    return importlib.import_module("torch_models")


@pytest.fixture
def toy_command(capsys):
    """Runs a command line in this process -> (exit code, stdout, stderr)."""

    from toy import cli

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return exit.value.code, output.out, output.err

    return run


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it puts into the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # some tests press Ctrl-C
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if not PURE:
        try:
            importlib.import_module("toy.ops.accelerated")
        except ImportError as error:
            raise pytest.UsageError(
                f"the compiled kernels are not built ({error}). Build them with `pip install -e .` or "
                "`python setup.py build_ext --inplace`, or set TOY_PURE_PYTHON=1 to test the pure Python library alone"
            ) from error
    if TORCH_REQUIRED and importlib.util.find_spec("torch") is None:
        raise pytest.UsageError("TOY_REQUIRE_TORCH is set but PyTorch is not installed: pip install torch")

    if MPI_REQUIRED and not mpi.THERE:
        raise pytest.UsageError("TOY_REQUIRE_MPI is set but there is no MPI: pip install mpi4py mpich")


def pytest_report_header(config):
    import toy

    rows = [
        f"{row.name} ({row.version}, threads: {row.threads or 'unknown'})"
        if row.available
        else f"{row.name} (not available: {row.reason})"
        for row in toy.backends()
    ]
    if importlib.util.find_spec("torch") is None:
        torch = "torch not installed"
    else:
        torch = f"torch {importlib.metadata.version('torch')}"
    pure = "; TOY_PURE_PYTHON is set" if PURE else ""
    return f"toy {toy.__version__}: backends {', '.join(rows)}; {torch}{pure}"
