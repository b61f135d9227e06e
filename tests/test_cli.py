"""The command line, as a user meets it."""

import dataclasses
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import finish, wait
from single_thread import single_thread  # noqa: F401 (autouse)

import toy
from toy import training
from toy.checks import gradcheck
from toy.cli import progress as cli_progress
from toy.cli.base import quoted, say
from toy.files import events, read_checkpoint, read_events

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{i} squared is {i * i}, and then comes {i + 1}.\n" for i in range(300))
SMALL = [
    "--batch=3", "--context=8", "--d-model=8", "--layers=1", "--heads=2", "--eval-batches=2", "--sample-tokens=9",
    "--arch=transformer", "--schedule=constant", "--lr=0.001",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)


@pytest.fixture
def train(toy_command, backend):
    """Trains the small model on each backend."""

    def run(*arguments):
        return toy_command(*TRAIN, "--corpus=text.txt", *SMALL, f"--backend={backend.name}", *arguments)

    return run


@pytest.fixture
def train_numpy(toy_command):
    def run(*arguments):
        return toy_command(*TRAIN, "--corpus=text.txt", *SMALL, "--backend=numpy", *arguments)

    return run


@pytest.fixture
def run_folder(train_numpy):
    assert train_numpy("--steps=10", "--out=trained")[0] == 0
    return Path("trained")


TRAIN = ("train", "from-scratch")


def checkpoint_bytes(folder):
    weights = Path(folder, "weights")
    return (weights / (weights / "latest").read_text().strip()).read_bytes()


def one_sentence(text):
    """An error is one line that names the program, and no traceback."""
    return text.startswith("toy: ") and text.count("\n") == 1 and "Traceback" not in text


# ----------------------------------------------------------------------------------------------------------------------
# train from-scratch
# ----------------------------------------------------------------------------------------------------------------------


def test_training_prints_its_choices_and_its_progress_and_what_to_do_next(train, backend):
    code, out, err = train("--steps=40", "--out=run", "--eval-every=20", "--lr=0.01")
    assert (code, err) == (0, "")
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert f"{backend.name} (as asked for)" in lines["backend"]
    assert "text.txt" in lines["corpus"]
    assert f"{len(set(TEXT))} (distinct characters" in lines["vocabulary"]
    assert f"{np.log(len(set(TEXT))):.3f}" in lines["ln(V)"]
    assert {"device", "threads", "tokens", "parameters", "steps", "learning rate", "directory"} <= lines.keys()
    assert re.search(
        r"^step 20/40  smoothed loss \d\.\d{3}  val \d\.\d{3}  \S+ tok/s  \d:\d\d left$", out, re.MULTILINE
    )
    done = r"^done: 40 steps in 0:\d\d\nloss      smoothed \d\.\d{3}, validation \d\.\d{3} nats per token$"
    assert re.search(done, out, re.MULTILINE)
    assert "    | " in out
    for name in ("loss.png", "samples.txt", "weights", "config.json", "events.jsonl"):
        assert Path("run", name).exists()
    evals = [event["loss"] for event in read_events(Path("run/events.jsonl")) if event["kind"] == "eval"]
    assert evals[-1] < evals[0] - 0.1


def test_without_out_every_run_gets_a_directory_of_its_own(train_numpy):
    for _ in range(2):
        assert train_numpy("--steps=1")[0] == 0
    assert len(list(Path("runs").iterdir())) == 2
    assert all(re.fullmatch(r"\d{8}-\d{6}-transformer-[0-9a-f]{4}", path.name) for path in Path("runs").iterdir())


@pytest.mark.parametrize("arch", ["transformer", "gpt2"])
@pytest.mark.parametrize("tokenizer", ["char", "bytes"])
def test_every_model_and_tokenizer_trains_and_generates(train_numpy, toy_command, arch, tokenizer):
    assert train_numpy("--steps=2", f"--arch={arch}", f"--tokenizer={tokenizer}", "--out=run")[0] == 0
    code, out, _ = toy_command("generate", "run", "--prompt=12 squared", "--tokens=7")
    assert code == 0
    assert out.startswith("12 squared")


def test_twenty_steps_equal_ten_and_resume_and_ten(train, toy_command):
    train("--steps=20", "--out=straight")
    train("--steps=10", "--out=halves")
    code, out, _ = toy_command(*TRAIN, "--resume=halves", "--steps=20")
    assert code == 0
    assert "after step 10" in out

    def steps(folder):
        events = [event for event in read_events(Path(folder, "events.jsonl")) if event["kind"] == "step"]
        return [(event["step"], event["loss"], event["grad_norm"]) for event in events]

    assert steps("halves") == steps("straight")
    halves, straight = (read_checkpoint(Path(run, "weights/step_20.safetensors")) for run in ("halves", "straight"))
    for a, b in zip((halves.parameters, *halves.moments.values()), (straight.parameters, *straight.moments.values())):
        assert all(a[name].tobytes() == b[name].tobytes() for name in b)


BAD_INPUT = {
    "missing corpus": (["--corpus=nowhere.txt"], "nowhere.txt' does not exist"),
    "empty corpus": (["--corpus=empty.txt"], "is empty"),
    "corpus not UTF-8": (["--corpus=binary.txt"], "byte 0xff at offset 3"),
    "short corpus": (["--context=20000"], "context of 20000 needs at least 40,002"),
    "heads": (["--heads=3"], "n_heads must divide d_model"),
    "unknown backend": (["--backend=cuda"], "unknown backend 'cuda': choose one of"),
    "unknown device": (["--device=moon"], "device 'moon'"),
    "unknown arch": (["--arch=rnn"], "'rnn' is not one of"),
    "unknown option": (["--layer=3"], "No such option"),
    "no steps": (["--steps=0"], "steps must be at least 1"),
    "no batch": (["--batch=0"], "batch must be at least 1"),
    "negative context": (["--context=-4"], "context must be at least 1"),
    "not a number": (["--steps=many"], "'many' is not a valid integer"),
    "infinite lr": (["--lr=inf"], "lr must be a positive number, got inf"),
    "lr not a number": (["--lr=nan"], "lr must be a positive number, got nan"),
    "negative lr": (["--lr=-1"], "lr must be a positive number"),
    "negative clip": (["--clip=-1"], "clip must be"),
    "negative warmup": (["--warmup=-1"], "warmup must be"),
    "warmup and cosine": (["--schedule=cosine", "--steps=10", "--warmup=10"], "leaves none of 10 steps"),
    "no validation": (["--val-fraction=0"], "val_fraction must lie between 0 and 1"),
    "negative seed": (["--seed=-1"], "seed must be"),
    "no threads": (["--threads=0"], "threads must be at least 1"),
    "out is not empty": (["--out=full"], "'full' exists and is not empty"),
    "out is a file": (["--out=text.txt"], "exists and is not a directory"),
    "out below a file": (["--out=text.txt/run"], "cannot be"),
    "resume nothing": (["--resume=nowhere"], "there is no such run directory"),
    "resume no run": (["--resume=full"], "is not a run directory"),
    "resume and out": (["--resume=full", "--out=run"], "--out cannot be given with --resume"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_bad_input_is_one_sentence_and_exit_code_2_and_leaves_nothing_behind(train_numpy, tmp_path, case, debug):
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"abc\xff")
    Path("full").mkdir()
    Path("full/file").touch()
    before = sorted(tmp_path.rglob("*"))
    arguments, problem = BAD_INPUT[case]
    code, out, err = train_numpy(*arguments, *(["--debug"] if debug else []))
    assert (code, out) == (2, "")
    assert problem in err
    if debug:
        assert err.splitlines()[-1].startswith("toy: ")
    else:
        assert one_sentence(err)
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(train_numpy):
    assert "Traceback" in train_numpy("--corpus=nowhere.txt", "--debug")[2]


def test_too_big_a_model_is_refused(train_numpy):
    code, _, err = train_numpy("--d-model=200000000", "--out=run")
    assert code == 2
    assert one_sentence(err)
    assert "memory" in err
    assert not Path("run").exists()


def test_resume_refuses_what_contradicts_the_run_and_takes_what_agrees(train_numpy, toy_command):
    train_numpy("--steps=4", "--out=run")
    code, _, err = toy_command(*TRAIN, "--resume=run", "--steps=6", "--d-model=16")
    assert (code, one_sentence(err)) == (2, True)
    assert "begun with d_model 8 and cannot go on with 16" in err
    code, _, err = toy_command(*TRAIN, "--resume=run")
    assert (code, "has done its 4 steps" in err) == (2, True)
    assert toy_command(*TRAIN, "--resume=run", "--steps=6", "--d-model=8", "--corpus=text.txt")[0] == 0


def test_a_damaged_checkpoint_is_named(train_numpy, toy_command):
    train_numpy("--steps=4", "--out=run")
    path = Path("run/weights/step_4.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 16
    path.write_bytes(data)
    for arguments in ([*TRAIN, "--resume=run", "--steps=9"], ["generate", "run"]):
        code, _, err = toy_command(*arguments)
        assert (code, one_sentence(err)) == (2, True)
        assert "run/weights/step_4.safetensors: the checksum does not match" in err
        assert "step_3.safetensors" in err


def test_divergence_is_a_failure_while_running(train_numpy, toy_command):
    code, _, err = train_numpy("--steps=40", "--lr=1e30", "--clip=0", "--out=run", "--warmup=0", "--save-every=1")
    assert (code, one_sentence(err)) == (1, True)
    assert "the training diverged" in err
    assert read_events(Path("run/events.jsonl"))[-1]["reason"] == "diverged"


# ----------------------------------------------------------------------------------------------------------------------
# processes: signals, full disks, terminals
# ----------------------------------------------------------------------------------------------------------------------


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "toy", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


LONG_RUN = [
    *TRAIN,
    "--corpus=text.txt",
    *SMALL,
    "--backend=numpy",
    "--steps=1000000",
    "--save-every=500",
    "--eval-every=50",
]


@pytest.mark.skipif(sys.platform == "win32", reason="signals work otherwise there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_stopped_run_is_saved_and_the_command_it_prints_goes_on(toy_command, number):
    process = start(*LONG_RUN, "--out=my run")
    for line in process.stdout:
        if line.startswith("step      50/"):
            break
    process.send_signal(number)
    out, err = finish(process)
    assert process.returncode == 128 + number
    assert "stopping after this step" in err
    step = int(re.search(r"stopped after step (\d+) of 1000000, and saved", out)[1])
    assert step >= 50
    end = read_events(Path("my run/events.jsonl"))[-1]
    assert (end["kind"], end["reason"], end["final_step"]) == ("run_end", "interrupted", step)
    assert Path("my run/loss.png").exists()
    command = shlex.split(out.splitlines()[-1])
    assert command[:3] == ["python", "-m", "toy"]
    process = start(*command[3:])
    assert any(line.startswith(f"resumed        after step {step}") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    finish(process)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(train_numpy):
    """SIGKILL at random moments of a run that saves after every step: it can always be resumed, and nothing is lost."""
    options = ["--steps=60", "--save-every=1", "--eval-every=7", "--sample-every=20"]
    train_numpy(*options, "--out=straight")
    begin = [*TRAIN, "--corpus=text.txt", *SMALL, "--backend=numpy", *options, "--out=killed"]

    def saved_step():
        latest = Path("killed/weights/latest")
        return int(re.search(r"\d+", latest.read_text())[0]) if latest.exists() else 0

    rng, kills = random.Random(0), 0
    for step in (0, 5, 14, 22, 35, None):  # killed soon after the checkpoint of this step; the last one is left alone
        resume = Path("killed/config.json").exists()
        process = start(*([*TRAIN, "--resume=killed"] if resume else begin))
        process.stdout.readline()  # it is about to begin
        if step is not None:
            while process.poll() is None and saved_step() < step:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            process.kill()
        _, err = finish(process)
        kills += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), err
        if saved_step() == 60:  # everything was done, perhaps just before the kill
            break
    assert kills >= 2 and saved_step() == 60

    def history(folder):
        events = [
            event for event in read_events(Path(folder, "events.jsonl")) if event["kind"] in ("step", "eval", "sample")
        ]
        return [(e["kind"], e["step"], e.get("loss"), e.get("grad_norm"), e.get("text")) for e in events]

    assert history("killed") == history("straight")
    killed, straight = (read_checkpoint(Path(f, "weights/step_60.safetensors")) for f in ("killed", "straight"))
    for a, b in zip((killed.parameters, *killed.moments.values()), (straight.parameters, *straight.moments.values())):
        assert all(a[name].tobytes() == b[name].tobytes() for name in b)
    assert not [path for path in Path("killed").rglob("*.tmp")]


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_full_disk_is_a_clear_failure_and_the_last_checkpoint_stays(run_folder):
    """A limit on the size of files stands in for the full disk: writing fails in the middle of a checkpoint."""
    import resource

    before = checkpoint_bytes(run_folder)
    limit = len(before) - 100

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(*TRAIN, "--resume=trained", "--steps=20", preexec_fn=small_disk)
    _, err = finish(process)
    assert process.returncode == 1
    assert one_sentence(err)
    assert "cannot write trained/weights/step_" in err
    assert "File too large" in err
    assert "--resume trained" in err
    assert checkpoint_bytes(run_folder) == before
    assert not list(Path("trained/weights").glob(".*"))
    process = start(*TRAIN, "--resume=trained", "--steps=20")
    finish(process)
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
@pytest.mark.parametrize("columns", [80, 140])
def test_the_live_line_fits_the_terminal(columns):
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "OPENBLAS_NUM_THREADS": "1"}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    options = ["--steps=400", "--out=run", "--backend=numpy", "--corpus=text.txt", "--sample-tokens=300"]
    command = [sys.executable, "-m", "toy", *TRAIN, *SMALL, *options]
    process = subprocess.Popen(command, env=environment, stdin=slave, stdout=slave, stderr=slave, close_fds=True)
    os.close(slave)
    output = b""
    try:
        while chunk := os.read(master, 65536):
            output += chunk
    except OSError:  # how Linux says that the other side has been closed
        pass
    os.close(master)
    assert wait(process) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode())
    lines = [line for part in text.split("\n") for line in part.split("\r")]
    live = [line for line in lines if "━" in line]
    assert len(live) >= 2
    assert all(len(line) <= columns for line in lines if not line.startswith(("write", "directory")))
    assert re.search(r"step 400/400 ━+ smoothed loss \d\.\d{3}  val \d\.\d{3}  \S+ tok/s  0:00 left", live[-1])
    assert any("│" in line or "    | " in line for line in lines)


def test_in_a_narrow_terminal_the_speed_is_left_out():
    progress = cli_progress.Progress(1200, 0, "image")
    for event in (
        events.Step(step=1200, loss=0.25, lr=1e-3, grad_norm=1.0, tokens=64, wall_us=2000),
        events.Evaluation(step=1200, loss=0.3125, accuracy=0.991),
    ):
        progress.show(event)
    numbers = progress._numbers()
    assert numbers.startswith("smoothed loss 0.250  val 0.312  99.1 % right  32k img/s  0:0")
    assert progress._numbers(len(numbers)) == numbers
    assert progress._numbers(len(numbers) - 1) == numbers.replace("  32k img/s", "")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_nobody_reading_on_is_no_error(run_folder):
    process = start("generate", "trained", "--tokens=100000")
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert wait(process) == 1


# ----------------------------------------------------------------------------------------------------------------------
# generate, plot, backends, gradcheck
# ----------------------------------------------------------------------------------------------------------------------


def test_generate_is_reproducible_and_the_settings_matter(run_folder, toy_command):
    def text(*arguments):
        code, out, err = toy_command("generate", run_folder, "--prompt=12", "--tokens=60", *arguments)
        assert (code, err) == (0, "")
        assert len(out) == len("12") + 60 + 1
        return out

    assert text() == text()
    assert text() != text("--seed=1")
    assert text("--temperature=0") == text("--temperature=0", "--seed=1") == text("--top-k=1")
    assert text("--top-p=1e-9") == text("--temperature=0")
    assert text("--backend=numpy") == text("--backend=numpy", "--top-p=1")


def test_generate_without_a_prompt_and_from_a_checkpoint_file(run_folder, toy_command):
    code, out, _ = toy_command("generate", run_folder / "weights" / "step_10.safetensors", "--tokens=5")
    assert (code, len(out)) == (0, 6)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["trained", "--prompt=Größe"], "the prompt has the character 'G' (U+0047) at offset 0"),
        (["trained", "--prompt="], "prompt is empty"),
        (["trained", "--top-p=0"], "top_p must be in (0, 1], got 0"),
        (["trained", "--top-p=1.5"], "top_p must be"),
        (["trained", "--top-p=nan"], "top_p must be"),
        (["trained", "--top-k=0"], "top_k must be at least 1"),
        (["trained", "--temperature=-1"], "temperature must be"),
        (["trained", "--temperature=inf"], "temperature must be"),
        (["trained", "--tokens=0"], "'--tokens'"),
        (["trained", "--seed=-1"], "'--seed'"),
        (["trained", "--backend=cuda"], "unknown backend"),
        (["nowhere"], "there is no run directory, checkpoint or GGUF file 'nowhere'"),
        (["text.txt"], "text.txt: is not"),
        (["."], "is not a run directory"),
        ([], "Missing argument 'MODEL'"),
    ],
)
def test_generate_refuses_bad_input(run_folder, toy_command, arguments, problem):
    code, out, err = toy_command("generate", *arguments)
    assert (code, out, one_sentence(err)) == (2, "", True)
    assert problem in err


def test_plot_draws_one_or_several_runs(run_folder, train_numpy, toy_command):
    train_numpy("--steps=3", "--out=second")
    for path in (run_folder / "loss.png", Path("second/loss.png")):
        path.unlink()
    assert toy_command("plot", run_folder) == (0, "trained/loss.png\n", "")
    assert toy_command("plot", run_folder, "second", "--x=tokens") == (0, "loss.png\n", "")
    assert toy_command("plot", run_folder, "second", "--x=seconds", "--out=both.svg") == (0, "both.svg\n", "")
    assert all(path.exists() for path in (run_folder / "loss.png", Path("loss.png"), Path("both.svg")))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "Missing argument 'RUN...'"),
        (["nowhere"], "nowhere: there is no such run directory"),
        (["trained", "."], "is not a run directory"),
        (["trained", "--out=picture.gif"], ".png, .svg or .pdf"),
        (["trained", "--out=nowhere/loss.png"], "cannot write nowhere/loss.png"),
        (["trained", "--x=hours"], "'hours' is not one of"),
    ],
)
def test_plot_refuses_bad_input(run_folder, toy_command, arguments, problem):
    code, out, err = toy_command("plot", *arguments)
    assert (code, out, one_sentence(err)) == (2, "", True)
    assert problem in err


def test_backends_lists_them_with_their_speed(toy_command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, err = toy_command("backends")
    assert (code, err) == (0, "")
    for row in toy.backends():
        (line,) = [line for line in out.splitlines() if f" {row.name} " in line and "│" in line]
        assert (" yes " if row.available else " no ") in line
        if row.available:
            assert float(line.split("│")[4]) > 0
    assert "--backend auto means" in out


def test_backends_says_when_toy_backend_is_wrong(toy_command, monkeypatch):
    monkeypatch.setenv("TOY_BACKEND", "cuda")
    code, _, err = toy_command("backends")
    assert (code, one_sentence(err)) == (2, True)
    assert "TOY_BACKEND" in err


def test_gradcheck_shows_a_row_per_gradient_and_fails_when_one_is_wrong(toy_command, monkeypatch):
    rows = gradcheck.check_all(seed=0)
    monkeypatch.setattr(gradcheck, "chosen_checks", lambda seed, layers: [lambda: rows])
    code, out, _ = toy_command("gradcheck", "--all")
    assert code == 0
    assert f"{len(rows)} gradients checked, none wrong" in out
    assert "central differences" in out
    assert out.count(" ok ") == len(rows)
    wrong = rows[0]._replace(rel_error=0.5, ok=False)
    monkeypatch.setattr(gradcheck, "chosen_checks", lambda seed, layers: [lambda: [wrong, *rows[1:]]])
    code, out, _ = toy_command("gradcheck", "--all")
    assert code == 1
    assert "WRONG" in out
    assert "1 wrong" in out


def test_gradcheck_shows_a_line_a_layer_with_its_worst_error(toy_command, monkeypatch):
    row = gradcheck.Row("linear", "x", (5, 4), 1e-12, 1e-7, True)
    rows = [row, row._replace(gradient="bias", rel_error=3e-9), row._replace(layer="gelu", rel_error=2e-11)]
    twin = row._replace(layer="linear, compiled", gradient="weight", rel_error=4e-8, bar=2e-6)
    shown = {"rows": [*rows, twin]}
    monkeypatch.setattr(gradcheck, "chosen_checks", lambda seed, layers: [lambda: shown["rows"]])
    code, out, _ = toy_command("gradcheck")
    heading, linear, gelu, *_ = (line.split() for line in out.splitlines())
    assert code == 0 and heading == ["layer", "error", "compiled", "worst", "in"]
    assert linear == ["linear", "3.0e-09", "4.0e-08", "ok", "bias"] and gelu == ["gelu", "2.0e-11", "ok", "x"]
    # what is wrong is named whatever else is large: a derivative, the compiled op, and a number that is none
    for wrong, at in ((rows[0]._replace(rel_error=2e-7, ok=False), 0), (twin._replace(rel_error=1e-5, ok=False), 3)):
        shown["rows"] = [wrong if i == at else kept for i, kept in enumerate([*rows, twin])]
        code, out, _ = toy_command("gradcheck")
        assert code == 1 and out.splitlines()[1].split()[-2:] == ["WRONG", wrong.gradient], out
        assert f"gradcheck --layer {quoted(wrong.layer)};" in out
    shown["rows"] = [row._replace(rel_error=math.nan, ok=False), *rows[1:]]
    assert toy_command("gradcheck")[1].splitlines()[1].split() == ["linear", "nan", "WRONG", "x"]


def test_gradcheck_fits_a_terminal_of_80_columns(toy_command):
    code, out, _ = toy_command("gradcheck")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert len(out.splitlines()) < 40


def test_gradcheck_of_some_layers(toy_command):
    code, out, _ = toy_command("gradcheck", "--layer", "RMS_norm", "--layer", "swiglu")
    layers = {line.split("  ")[0] for line in out.splitlines()[1:-4]}
    twins = {"rms_norm, compiled", "swiglu, compiled"} if kernels_are_there() else set()
    assert code == 0 and layers == {"rms_norm", "swiglu"} | twins
    alone, among_others = (gradcheck.check_all(0, layers) for layers in (["linear, no bias"], ["linear"]))
    assert alone == [row for row in among_others if row.layer.startswith("linear, no bias")]  # the same numbers
    code, _, err = toy_command("gradcheck", "--layer", "convolution")
    assert code == 2 and one_sentence(err) and "'convolution'" in err and "rms_norm" in err


def kernels_are_there():
    try:
        import toy._kernels.norms  # noqa: F401
    except ImportError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------------
# help, version, start-up
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["train"], ["train", "--help"], [*TRAIN, "--help"], ["plot", "-h"]]
)
def test_help(toy_command, arguments):
    code, out, err = toy_command(*arguments)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: toy")


def test_every_training_option_is_on_the_command_line(toy_command):
    _, out, _ = toy_command(*TRAIN, "--help")
    for field in dataclasses.fields(training.FromScratchOptions):
        assert f"--{field.name.replace('_', '-')} " in out


def test_version(toy_command):
    assert toy_command("--version") == (0, f"toy, version {toy.__version__}\n", "")


def test_in_a_terminal_a_sentence_is_broken_between_words_and_a_command_is_not(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    sentence, command = "toy: a b c d e f g h no-such-file.txt", "toy: go on with toy train lora --resume runs/a"
    say(sentence)
    assert capsys.readouterr().err == sentence + "\n"  # in a file it stays one line
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    say(sentence)
    say(command)
    assert capsys.readouterr().err == f"toy: a b c d e f g h\nno-such-file.txt\n{command}\n"


def test_an_unknown_command_is_named(toy_command):
    code, _, err = toy_command("trian")
    assert (code, one_sentence(err)) == (2, True)
    assert "trian" in err


def test_help_does_not_wait_for_what_it_does_not_need():
    program = (
        "import sys; from toy import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*(name for name in ('matplotlib', 'rich', 'safetensors', 'scipy', 'torch') if name in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == ""


def test_control_characters_of_a_model_do_not_reach_the_terminal():
    sign = "\N{REPLACEMENT CHARACTER}"
    assert cli_progress.printable("a\x1b[31mb\r\n\tc\x07ä\xa0€\u202e😀") == f"a{sign}[31mb\n\tc{sign}ä\xa0€{sign}😀"


def test_words_for_numbers():
    assert [cli_progress.clock(seconds) for seconds in (0, 59.4, 60, 3599.6, 7384)] == [
        "0:00",
        "0:59",
        "1:00",
        "1:00:00",
        "2:03:04",
    ]
    assert [cli_progress.compact(number) for number in (3, 950, 45_210, 1_230_000)] == ["3", "950", "45.2k", "1.23M"]
    text = cli_progress.indented("abcdef\n\ng", width=7)
    assert text == "    | a\n    | b\n    | c\n    | d\n    | e\n    | f\n    | \n    | g"


def test_the_config_of_a_run_made_here_names_all_options(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    assert config["training"].keys() == {field.name for field in dataclasses.fields(training.FromScratchOptions)}


def test_describe_and_fetch_say_what_is_wrong(toy_command, tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"GGUF but not really")
    for arguments, words in (
        (["describe", str(tmp_path / "missing.gguf")], "no model of that name"),
        (["describe", str(tmp_path / "no.gguf")], "no.gguf"),
        (["fetch", "no-such-model"], "smollm2-135m"),
    ):
        code, _, error = toy_command(*arguments)
        assert code == 2 and words in error and one_sentence(error)


def test_selftest_refuses_a_device_that_is_not_there(toy_command):
    code, _, error = toy_command("selftest", "--device", "no-such-device")
    assert code == 2 and one_sentence(error)
