"""A repeated attack on run directories: `python tests/runs_attack.py --kills 200 --corruptions 5000 --seed 0`.

Kills: a training that saves often is killed at a random moment (SIGKILL), gone on with, killed again, at most MOST_KILLS
times, and then let come to its end. Its weights, moments and log must be those of the run that was left alone, bit for bit.
Corruptions: one file of a finished run is changed at random (bits, a run of zeros, a cut, bytes of another place, lines
swapped, digits), then it is gone on with, used, and its curve is read: one sentence or the right numbers, nothing else. A run
that ended with other numbers is kept, and the line says where. Prints how many tries ended how, and ends
with 1 when one ended as it must not. A few of both run in the suite (tests/test_runs_attack.py).
"""

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from toy.files import BadFileError, RunWarning, read_checkpoint, read_events
from toy.plots import load_curve
from toy.trained.load import read_trained
from toy.training import FromScratchOptions, Training

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{i} squared is {i * i}, and then comes {i + 1}.\n" for i in range(300))
SIZES = {"batch": 3, "context": 8, "d_model": 8, "layers": 1, "heads": 2, "eval_batches": 2, "sample_tokens": 5}
MOST_KILLS = 8  # of one run
EVERY = {"save_every": 1, "eval_every": 3, "sample_every": 5}
FILES = (
    "config.json",
    "events.jsonl",
    "samples.txt",
    "weights/latest",
    "weights/step_7.safetensors",
    "weights/step_8.safetensors",
)


def options(corpus, **changes):
    return FromScratchOptions(corpus=str(corpus), backend="numpy", **{**SIZES, **EVERY, **changes})


def state(folder):
    """Everything a run has found out: its newest checkpoint, and its log without times."""
    folder = Path(folder)
    checkpoint = read_checkpoint(folder / "weights" / (folder / "weights/latest").read_text().strip())
    arrays = {"p": checkpoint.parameters, **checkpoint.moments}
    weights = {(kind, name): a.tobytes() for kind, some in arrays.items() for name, a in some.items()}
    kinds = ("step", "eval", "sample")
    history = [
        {k: v for k, v in e.items() if k not in ("t", "wall_us")}
        for e in read_events(folder / "events.jsonl")
        if e["kind"] in kinds
    ]
    return checkpoint.step, weights, history, (folder / "samples.txt").read_bytes()


# -- kills -------------------------------------------------------------------------------------------------------------


def attack_by_kills(folder, n_kills, rng, steps=60):
    """-> Counter of outcomes. Runs are begun and killed until there were `n_kills` kills."""
    corpus = folder / "text.txt"
    corpus.write_text(TEXT)
    began = time.monotonic()
    _start(folder / "straight", corpus, steps).communicate()
    whole = time.monotonic() - began  # on this machine, as busy as it is
    want, found, number = state(folder / "straight"), collections.Counter(), 0
    while found["killed"] < n_kills:
        out = folder / f"killed-{number}"
        number += 1
        kills_left = rng.randint(1, MOST_KILLS)
        while True:
            process = _start(out, corpus, steps)
            moment = whole * rng.uniform(0.1, 1.1)  # while it begins, while it trains, and when it is done
            if kills_left and found["killed"] < n_kills:
                deadline = time.monotonic() + moment
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.005)
                process.kill()
            _, err = process.communicate()
            if process.returncode == -signal.SIGKILL:
                found["killed"] += 1
                kills_left -= 1
            elif process.returncode == 0 or "has done its" in err:
                break
            else:
                found[f"WRONG: exit code {process.returncode}: {err[-300:]}"] += 1
                break
        try:
            right = state(out) == want and not list(out.rglob("*.tmp"))
        except (BadFileError, OSError) as error:
            right = False
            found[f"WRONG: {error}"] += 1
        outcome = "runs that ended bit-identical"
        if not right:
            outcome = f"WRONG: a run with other numbers, kept at {shutil.copytree(out, tempfile.mkdtemp() + '/run')}"
        found[outcome] += 1
        shutil.rmtree(out, ignore_errors=True)
    return found


def _start(out, corpus, steps):
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in {**SIZES, **EVERY, "steps": steps}.items()]
    begin = (
        ["--resume", out]
        if (out / "config.json").exists()
        else [f"--corpus={corpus}", "--backend=numpy", *sizes, f"--out={out}"]
    )
    command = [sys.executable, "-m", "toy", "train", "from-scratch", *map(str, begin)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


# -- corruptions -------------------------------------------------------------------------------------------------------


def damage(data, rng):
    """Other bytes than `data`, in one of many ways."""
    data, n = bytearray(data), len(data)
    kind, place = (
        rng.choice(("bit", "byte", "zeros", "tail", "cut", "move", "lines", "digit", "insert", "empty")),
        rng.randrange(max(n, 1)),
    )
    if kind == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        data[place] = rng.randrange(256)
    elif kind == "zeros":
        data[place : place + rng.choice((1, 8, 512, 4096))] = bytes(len(data[place : place + rng.choice((1, 8, 512))]))
    elif kind == "tail":
        data[place:] = bytes(n - place)
    elif kind == "cut":
        del data[place:]
    elif kind == "move":
        size, other = rng.choice((4, 64, 512)), rng.randrange(max(n, 1))
        data[place : place + size] = data[other : other + size]
    elif kind == "lines":
        lines = bytes(data).splitlines(keepends=True)
        if len(lines) > 1:
            i, j = rng.sample(range(len(lines)), 2)
            lines[i], lines[j] = lines[j], lines[i]
        data = bytearray(b"".join(lines))
    elif kind == "digit":
        places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
        if places:
            data[rng.choice(places)] = rng.choice(b"0123456789")
    elif kind == "insert":
        data[place:place] = rng.randbytes(rng.choice((1, 7, 300)))
    else:
        data.clear()
    return kind, bytes(data)


def attack_by_corruptions(folder, n, rng):
    """-> Counter of outcomes of `n` damaged files: what resume, load and plot made of each."""
    corpus, run = folder / "text.txt", folder / "run"
    corpus.write_text(TEXT)
    for _ in Training(options(corpus, steps=8), out=run).run():
        pass
    want = {7: None, 8: None}
    for step in want:
        checkpoint = read_checkpoint(run / f"weights/step_{step}.safetensors")
        want[step] = {name: array.tobytes() for name, array in checkpoint.parameters.items()}
    curve = _numbers(load_curve(run))
    found = collections.Counter()
    for number in range(n):
        name = rng.choice(FILES)
        sound = (run / name).read_bytes()
        kind, changed = damage(sound, rng)
        (run / name).write_bytes(changed)
        for use in (_use_weights, _use_resume, _use_curve):
            try:
                with warnings.catch_warnings(record=True):
                    warnings.simplefilter("always", RunWarning)
                    step, numbers = use(run)
            except (ValueError, OSError) as error:  # what a command makes one sentence of
                outcome = (
                    "refused in a sentence" if str(error).strip() and len(str(error)) < 2000 else f"WRONG: {error!r}"
                )
            except Exception as error:
                outcome = f"WRONG: try {number}, {kind} of {name}, {use.__name__}: {type(error).__name__}: {error}"
            else:
                right = _same_curve(numbers, curve) if use is _use_curve else numbers == want[step]
                outcome = (
                    "the right numbers"
                    if right
                    else f"WRONG: other numbers after {kind} of {name}, {use.__name__}, try {number}"
                )
            found[outcome] += 1
        (run / name).write_bytes(sound)
    return found


def _use_weights(run):
    stored = read_trained(run)
    return stored.step, {name: array.tobytes() for name, array in stored.parameters.items()}


def _use_resume(run):
    training = Training.resume(run, steps=9)
    return training.step, {name: array.tobytes() for name, array in training.recipe.parameters().items()}


def _use_curve(run):
    return None, _numbers(load_curve(run))


def _numbers(curve):
    return {name: value.tolist() if hasattr(value, "tolist") else value for name, value in curve.items()}


def _same_curve(found, want):
    """Whether every number is right. A log cut behind its last step is that of a run killed before it was validated."""
    if len(found["val_steps"]) == len(want["val_steps"]) - 1 and want["val_steps"][-1] == want["steps"][-1]:
        want = want | {name: want[name][:-1] for name in want if name.startswith("val_")}
    return found == want


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--corruptions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    wrong = 0
    for attack, n in ((attack_by_kills, given.kills), (attack_by_corruptions, given.corruptions)):
        with tempfile.TemporaryDirectory() as folder:
            found = attack(Path(folder), n, random.Random(given.seed)) if n else {}
        for outcome, count in sorted(found.items()):
            print(f"{attack.__name__}: {count:6} {outcome}", flush=True)
            wrong += outcome.startswith("WRONG")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
