"""Programs under MPI's launcher, for tests: `mpirun -n 4 toy ...` of this very checkout, with whatever MPI there is."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from processes import finish

ROOT = Path(__file__).parent.parent
MPIRUN = next(
    (path for name in ("mpirun", "mpiexec") if (path := shutil.which(name, path=str(Path(sys.executable).parent)))),
    None,
) or shutil.which("mpirun")
THERE = MPIRUN is not None and importlib.util.find_spec("mpi4py") is not None


def environment(**changes):
    """Of a launcher: with as few threads as can be, and Open MPI allowed to run as anybody with any number of ranks."""
    open_mpi = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    with_them = {
        **os.environ,
        **open_mpi,
        "PYTHONPATH": str(ROOT),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    return {name: value for name, value in {**with_them, **changes}.items() if value is not None}


def start(command, **changes):
    """A launcher in a session of its own. command: what follows mpirun; changes: of the environment."""
    return subprocess.Popen(
        [MPIRUN, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, env=environment(**changes),
    )  # fmt: skip


def toy(size, *arguments):
    """The words after mpirun for so many ranks of a toy command."""
    return ["-n", size, sys.executable, "-m", "toy", *arguments]


def run(size, *arguments, **changes):
    """`mpirun -n SIZE toy ARGUMENTS` -> (exit code, stdout, stderr)."""
    process = start(toy(size, *arguments), **changes)
    try:
        out, err = finish(process)
    finally:
        end(process)
    return process.returncode, out, err


def ranks_of(word):
    """dict of rank to process id of the ranks (not their watchers) in whose command line this word stands."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word.encode() not in (path / "cmdline").read_bytes().split(b"\0"):
                continue
            variables = dict(line.partition(b"=")[::2] for line in (path / "environ").read_bytes().split(b"\0"))
            rank = variables.get(b"PMI_RANK", variables.get(b"OMPI_COMM_WORLD_RANK"))
            if rank is not None and b"TOY_RANK_WATCHER" in variables:
                found[int(rank)] = int(path.name)
    return found


def end(process):
    """Kill a launcher that is still there."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
