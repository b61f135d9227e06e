"""Runs of several processes under MPI's launcher: the numbers, who writes and who speaks, and how they end."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import mpi
import numpy as np
import pytest
import two_hosts
from conftest import PURE
from processes import finish
from ranks_attack import attack
from runs_attack import TEXT

import toy
from toy.data import make_tokenizer
from toy.files import read_events
from toy.files.gguf_write import write_gguf
from toy.models import model_for
from toy.training import ranks as ranks_of_mpi

needs_mpi = pytest.mark.skipif(not mpi.THERE, reason="no MPI is installed (pip install mpi4py mpich)")
OPEN_MPI = mpi.THERE and "Open MPI" in subprocess.run([mpi.MPIRUN, "--version"], capture_output=True, text=True).stdout
HOST = re.escape(socket.gethostname())
SMALL = {
    "d-model": 16, "layers": 2, "heads": 2, "context": 16, "batch": 5, "sample-every": 0, "eval-batches": 2, "steps": 12,
    "eval-every": 6, "lr": 0.01, "warmup": 2,
}  # fmt: skip
FAST = "numpy" if PURE else "cython"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text, and a small llama with a character tokenizer."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text(TEXT)
    tokenizer = make_tokenizer("char", TEXT)
    config = toy.LlamaConfig(tokenizer.vocab_size, 32, 4, 2, d_ff=64, n_layers=2, context_length=24)
    model = model_for(config)(config, seed=1)
    write_gguf(folder / "llama.gguf", config, model.parameters, tokenizer, type="f32")
    return folder


def command(recipe, out, files, backend=FAST, **changes):
    sizes = SMALL
    if recipe != "from-scratch":
        sizes = {name: SMALL[name] for name in ("batch", "steps", "eval-every", "lr", "warmup")}
    if recipe not in ("from-scratch", "vit-tiny"):
        sizes = {**sizes, "context": 16, "sample-every": 0, "eval-batches": 2, "model": files / "llama.gguf"}
    if recipe != "vit-tiny":
        sizes = {**sizes, "corpus": files / "text.txt"}
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    flags = [f"--{name}={value}" for name, value in {**sizes, "backend": backend, "threads": 1, **changes}.items()]
    return ["train", recipe, "--out", out, *flags]


def alone(*arguments):
    """The same in one process, without a launcher."""
    words = [sys.executable, "-m", "toy", *map(str, arguments)]
    process = subprocess.run(words, capture_output=True, text=True, env=mpi.environment())
    assert process.returncode == 0, process.stderr


def curve(out):
    """Every loss in a run's log, in order."""
    return [event["loss"] for event in read_events(out / "events.jsonl") if event["kind"] in ("step", "eval")]


def config(out):
    return json.loads((out / "config.json").read_text())


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_mpi
def test_two_and_four_ranks_have_the_curve_of_one_process(files, tmp_path):
    many = {"steps": 100, "eval_every": 50, "accumulate": 2}
    alone(*command("from-scratch", tmp_path / "1", files, **many))
    for name, size in (("2", 2), ("4", 4)):
        code, out, err = mpi.run(size, *command("from-scratch", tmp_path / name, files, **many))
        assert code == 0, err
        assert out.count("done: 100 steps") == 1 and f"{size}, which share each batch" in out  # one of them speaks
        assert config(tmp_path / name)["backend"]["ranks"] == size
    straight = curve(tmp_path / "1")
    assert len(straight) == 103 and straight[0] > straight[-1] + 0.5
    for name in ("2", "4"):
        assert np.abs(np.subtract(curve(tmp_path / name), straight)).max() <= 1e-5
    assert curve(tmp_path / "4") != curve(tmp_path / "2")  # the sums are rounded elsewhere


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("recipe", ["vit-tiny", "lora", "full-finetune", "warm-start"])
def test_every_recipe(files, tmp_path, recipe):
    if recipe == "vit-tiny":
        pytest.importorskip("sklearn", reason="its digits are what is trained on")
    else:
        pytest.importorskip("gguf", reason="GGUF files need the gguf package")
    backend = "numpy" if PURE else "ggml"
    alone(*command(recipe, tmp_path / "1", files, backend))
    code, _, err = mpi.run(2, *command(recipe, tmp_path / "2", files, backend))
    assert code == 0, err
    assert np.abs(np.subtract(curve(tmp_path / "2"), curve(tmp_path / "1"))).max() <= 1e-5


@pytest.mark.slow
@needs_mpi
def test_a_run_goes_on_with_any_number_of_ranks(files, tmp_path):
    alone(*command("from-scratch", tmp_path / "straight", files, steps=18))
    run = tmp_path / "run"
    process = mpi.start(
        mpi.toy(2, *command("from-scratch", run, files, steps=18, save_every=3, eval_every=6), "--json")
    )
    for line in process.stdout:  # until it has a checkpoint of step 6
        if json.loads(line)["kind"] == "eval" and json.loads(line)["step"] == 6:
            break
    mpi.end(process)
    code, _, err = mpi.run(3, "train", "from-scratch", "--resume", run, "--threads", 1)
    assert code == 0 and config(run)["backend"]["ranks"] == 3, err
    alone("train", "from-scratch", "--resume", run, "--steps", 20, "--threads", 1)
    assert "ranks" not in config(run)["backend"]
    assert (
        np.abs(np.subtract(curve(run)[: len(curve(tmp_path / "straight"))], curve(tmp_path / "straight"))).max() <= 1e-5
    )


@needs_mpi
def test_one_rank_is_an_ordinary_run(files, tmp_path):
    alone(*command("from-scratch", tmp_path / "alone", files))
    code, out, err = mpi.run(1, *command("from-scratch", tmp_path / "one", files))
    assert code == 0 and "which share each batch" not in out, err
    assert curve(tmp_path / "one") == curve(tmp_path / "alone")
    assert "ranks" not in config(tmp_path / "one")["backend"]


# -- ranks that do not fit ---------------------------------------------------------------------------------------------


def sentence(err):
    """What toy says, which is one sentence."""
    lines = [line for line in err.splitlines() if line.startswith("toy: ")]
    assert len(lines) == 1, err
    return lines[0]


@needs_mpi
@pytest.mark.parametrize(
    "before, flags, what",
    [
        ([], ["--lr=0.5"], "--lr 0.5"),
        (["env", "TOY_NUM_THREADS=3"], [], "TOY_NUM_THREADS 3"),
        (["version"], [], "toy 9.9"),
    ],
    ids=["options", "threads", "version"],
)
def test_a_rank_that_differs_ends_the_job(files, tmp_path, before, flags, what):
    words = command("from-scratch", tmp_path / "run", files)
    program = [sys.executable, "-m", "toy"]
    if before == ["version"]:
        code = "import toy.config; toy.config.VERSION = '9.9'; from toy.cli import main; main()"
        before, program = [], [sys.executable, "-c", code]
    other = ["-n", 1, *before, *program, *words, *flags]
    process = mpi.start(["-n", 1, sys.executable, "-m", "toy", *words, ":", *other])
    _, err = finish(process)
    assert process.returncode == 2, err
    assert re.search(rf"^toy: rank 1 on host {HOST} has {what}, and rank 0 on host {HOST} has ", sentence(err))
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_bad_input_is_one_sentence(files, tmp_path):
    for changes, what in (
        ({"batch": 1}, "a batch of 1 cannot be shared by 2 ranks"),
        ({"corpus": "none.txt"}, "none.txt"),
    ):
        code, out, err = mpi.run(2, *command("from-scratch", tmp_path / "run", files, **changes))
        assert code == 2 and what in sentence(err) and not out
        assert not (tmp_path / "run").exists()


def test_without_mpi4py_no_rank_trains_for_itself(files, tmp_path):
    """The launcher is played: what matters is that no process begins."""
    (tmp_path / "mpi4py.py").write_text("raise ImportError('not here')\n")
    path = os.pathsep.join([str(tmp_path), str(mpi.ROOT)])
    said = []
    for rank in (0, 1):
        place = {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": "2",
        }
        words = [sys.executable, "-m", "toy", *map(str, command("from-scratch", tmp_path / "run", files))]
        process = subprocess.run(
            words, capture_output=True, text=True, env=mpi.environment(**{**place, "PYTHONPATH": path})
        )
        assert process.returncode == 2, process.stderr
        said.append(process.stderr)
    assert "without the package mpi4py each would train the whole run for itself" in sentence(said[0]) and not said[1]
    assert not (tmp_path / "run").exists()


@needs_mpi
def test_the_mpi_of_another_launcher_is_told(files, tmp_path):
    if OPEN_MPI:
        pytest.skip("the launcher that is played is Open MPI's")
    place = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "toy", *map(str, command("from-scratch", tmp_path / "run", files))]
    process = subprocess.run(words, capture_output=True, text=True, env=mpi.environment(**place))
    assert process.returncode == 2 and "2 ranks were started, and mpi4py sees 1" in sentence(process.stderr)
    assert not (tmp_path / "run").exists()


# -- how they end ------------------------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason="looks for the ranks in /proc")


def started(files, out, size, **changes):
    """A job that trains, and has written its first checkpoint."""
    words = command("from-scratch", out, files, steps=100_000, save_every=5, **changes)
    process = mpi.start(mpi.toy(size, *words), **({"TOY_RANKS_SILENCE": "3"}))
    while not (out / "weights" / "latest").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@needs_mpi
@needs_proc
def test_ctrl_c_saves_once(files, tmp_path):
    if OPEN_MPI:
        pytest.skip("Open MPI's launcher ends its processes instead of passing Ctrl-C on")
    process = started(files, tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    out, err = finish(process)
    step = max(event["step"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == "step")
    assert f"stopped after step {step} of 100000, and saved" in out and process.returncode != 0
    assert err.count("stopping after this step") == 1
    assert [
        event["reason"] for event in read_events(tmp_path / "run" / "events.jsonl") if event["kind"] == "run_end"
    ] == ["interrupted"]
    assert (tmp_path / "run" / "weights" / "latest").read_text() == f"step_{step}.safetensors\n"


@needs_mpi
@needs_proc
def test_a_signal_to_any_rank_stops_all_of_them(files, tmp_path):
    process = started(files, tmp_path / "run", 3)
    os.kill(mpi.ranks_of(str(tmp_path / "run"))[2], signal.SIGTERM)
    out, _ = finish(process)
    assert "and saved. To go on" in out
    assert not mpi.ranks_of(str(tmp_path / "run"))


@needs_mpi
@needs_proc
def test_a_rank_that_stands_still_ends_the_job(files, tmp_path):
    process = started(files, tmp_path / "run", 2)
    victim = mpi.ranks_of(str(tmp_path / "run"))[1]
    os.kill(victim, signal.SIGSTOP)
    try:
        _, err = finish(process)
    finally:
        mpi.end(process)
    assert process.returncode != 0
    assert f"toy: rank 1 on host {socket.gethostname()} has given no sign of life for 3 seconds" in sentence(err)
    assert f"--resume {tmp_path / 'run'}" in err


@pytest.mark.slow
@needs_mpi
@needs_proc
def test_killed_ranks_lose_nothing(tmp_path):
    found = attack(tmp_path, 3, 2, random.Random(0), steps=30)
    assert found.pop("killed") == 3 and found.keys() <= {"done", "runs that ended bit-identical"}, found


@pytest.mark.slow
@needs_mpi
@pytest.mark.skipif(OPEN_MPI, reason="its launcher is told of hosts in another way")
def test_two_hosts(files, tmp_path):
    """The curve over a network, with the run on the first host alone; then the cable is pulled."""
    with two_hosts.hosts() as pull:
        if pull is None:
            pytest.skip("network namespaces need root and `ip`")
        program = [sys.executable, "-m", "toy"]
        process = two_hosts.start(tmp_path, [*program, *command("from-scratch", tmp_path / "two", files)])
        out, err = finish(process)
        assert process.returncode == 0 and "1 on toyhosta, 1 on toyhostb" in out, err
        alone(*command("from-scratch", tmp_path / "one", files))
        assert np.abs(np.subtract(curve(tmp_path / "two"), curve(tmp_path / "one"))).max() <= 1e-5

        words = command("from-scratch", tmp_path / "cut", files, steps=100_000, save_every=5)
        process = two_hosts.start(tmp_path, [*program, *words], TOY_RANKS_SILENCE="4")
        try:
            while not (tmp_path / "cut" / "weights" / "latest").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            pull()
            _, err = finish(process)
        finally:
            mpi.end(process)
        assert process.returncode != 0
        assert "toy: rank 1 on host toyhostb has given no sign of life for 4 seconds" in err, err
    alone("train", "from-scratch", "--resume", tmp_path / "cut", "--steps", 100_000, "--threads", 1, "--dry-run")


# -- by themselves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masks, usable, shares",
    [
        ([{0, 1, 2, 3}] * 2, 4, [2, 2]),  # nobody was bound: they share
        ([{0, 1}, {2, 3}], 2, [2, 2]),  # a launcher that binds
        ([{0, 1, 2, 3}] * 8, 4, [1] * 8),  # more ranks than processors
        ([set(range(64))] * 2, 6, [3, 3]),  # a container with a quota
        ([{0}, {1}, {2, 3}, {2, 3}], 4, [1, 1, 1, 1]),
    ],
)
def test_ranks_share_the_processors(masks, usable, shares):
    everyone = [(frozenset(mask), usable) for mask in masks]
    assert [ranks_of_mpi._share(everyone, place) for place in range(len(masks))] == shares


def test_each_rank_of_a_machine_takes_a_device(monkeypatch):
    """Of a machine with two cards, and of those of its other kinds nothing."""
    monkeypatch.setattr(ranks_of_mpi.switch, "devices_like", lambda device: (device.upper(), ["CUDA0", "CUDA1"]))

    def device(name, place, size):
        return ranks_of_mpi.one_device_each(name, SimpleNamespace(local_rank=place, local_size=size))

    assert [device("cuda1", 0, 1), device("cuda0", 0, 2), device("cuda0", 1, 2)] == ["CUDA1", "CUDA0", "CUDA1"]
    assert device("cpu", 5, 9) == "cpu" and ranks_of_mpi.one_device_each("cuda0", None) == "cuda0"
    with pytest.raises(ValueError, match="CUDA0, CUDA1 for 3 ranks: start fewer there"):
        device("cuda0", 2, 3)


@pytest.mark.parametrize(
    "variables, place",
    [
        ({}, None),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, (1, 4)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, (0, 2)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script, which is one process
    ],
)
def test_a_launcher_is_known_by_its_variables(monkeypatch, variables, place):
    for name in ("PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ranks_of_mpi.launched() == place


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_wrong_silence_is_told(monkeypatch, text):
    monkeypatch.setenv("TOY_RANKS_SILENCE", "7.5")
    assert ranks_of_mpi._silence() == 7.5
    monkeypatch.setenv("TOY_RANKS_SILENCE", text)
    with pytest.raises(ValueError, match="TOY_RANKS_SILENCE must be a number of seconds above 0"):
        ranks_of_mpi._silence()
