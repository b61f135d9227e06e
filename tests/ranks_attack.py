"""Runs of several ranks that are killed: `python tests/ranks_attack.py --kills 50 --ranks 2 --seed 0`.

One rank, drawn at random, is killed (SIGKILL) at a random moment. The job must end within 30 seconds with one sentence that
names the rank and its host; then the run is gone on with, by the same number of ranks, until it is done. Its weights, moments
and log must be those of the run that was left alone, bit for bit. Prints how many tries ended how, and ends with 1 when one
ended as it must not. A few run in the suite (tests/test_ranks.py).
"""

import argparse
import collections
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import mpi
from runs_attack import EVERY, SIZES, TEXT, state

LONGEST = 30  # seconds


def attack(folder, n_kills, size, rng, steps=60):
    """-> Counter of outcomes."""
    corpus = folder / "text.txt"
    corpus.write_text(TEXT)
    code, _, err = mpi.run(size, *_command(folder / "straight", corpus, size, steps))
    assert code == 0, err
    want, found, number = state(folder / "straight"), collections.Counter(), 0
    while found["killed"] < n_kills and not any(outcome.startswith("WRONG") for outcome in found):
        out = folder / f"killed-{number}"
        number += 1
        while True:
            outcome = _once(out, _command(out, corpus, size, steps), size, rng, found["killed"] < n_kills)
            found[outcome] += 1
            if outcome != "killed":
                break
        if outcome.startswith("WRONG"):
            continue
        right = state(out) == want and not list(out.rglob("*.tmp"))
        found["runs that ended bit-identical" if right else "WRONG: runs with other numbers"] += 1
        shutil.rmtree(out, ignore_errors=True)
    return found


def _once(out, command, size, rng, kill):
    process = mpi.start(mpi.toy(size, *command))
    moment = rng.choice((rng.uniform(0.3, 2.0), rng.uniform(1.5, 5.0)))  # while it begins, and while it trains
    victim, deadline = None, time.monotonic() + moment
    try:
        while kill and process.poll() is None:
            if time.monotonic() > deadline and (there := mpi.ranks_of(str(out))):
                victim = rng.choice(sorted(there))
                os.kill(there[victim], signal.SIGKILL)
                break
            time.sleep(0.01)
        ended = time.monotonic()
        try:
            _, err = process.communicate(timeout=600 if victim is None else LONGEST)
        except mpi.subprocess.TimeoutExpired:
            for pid in mpi.ranks_of(str(out)).values():
                os.kill(pid, signal.SIGABRT)  # says where it is
            time.sleep(2)
            os.killpg(process.pid, signal.SIGKILL)
            return f"WRONG: rank {victim} was killed and the job went on: {process.communicate()[1][-3000:]}"
    finally:
        mpi.end(process)
    if victim is None or process.returncode == 0 or "has done its" in err:
        return (
            "done" if process.returncode == 0 or "has done its" in err else f"WRONG: {process.returncode}: {err[-900:]}"
        )
    told = re.findall(
        rf"^toy: .*rank {victim} on host {re.escape(socket.gethostname())} was ended by SIGKILL.*$", err, re.M
    )
    others = [line for line in err.splitlines() if line.startswith("toy: ")]
    while left := mpi.ranks_of(str(out)):
        if time.monotonic() - ended > LONGEST:
            return f"WRONG: rank {victim} was killed, and {left} are still there"
        time.sleep(0.02)
    return "killed" if len(told) == len(others) == 1 else f"WRONG: rank {victim} was killed, and it said: {err[-900:]}"


def _command(out, corpus, size, steps):
    if (out / "config.json").exists():
        return ["train", "from-scratch", "--resume", out]
    every = {**SIZES, **EVERY, "steps": steps, "batch": 2 * size + 1}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in every.items()]
    return ["train", "from-scratch", f"--corpus={corpus}", "--backend=numpy", *flags, "--out", out]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = attack(Path(folder), arguments.kills, arguments.ranks, random.Random(arguments.seed))
    for outcome, n in found.most_common():
        print(f"{n:>6}  {outcome}")
    sys.exit(any(outcome.startswith("WRONG") for outcome in found))


if __name__ == "__main__":
    main()
