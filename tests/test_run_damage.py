"""Run directories that were damaged, killed while they began, or are used by two at once: one sentence, and never another
number. Kinds, not cases: every option, every digit, every file."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from processes import finish
from single_thread import single_thread  # noqa: F401 (autouse)

from ggml_bridge import machine
from toy import plots
from toy.config import GPT2Config, LlamaConfig, RecipeOptions, ViTConfig
from toy.engines import memory
from toy.files import BadFileError, Run, RunWarning, read_checkpoint, read_events, write_checkpoint
from toy.files.events import Evaluation, EventLog, Notice, RunEnd, RunStart, Step
from toy.files.regular import open_regular, read_regular
from toy.models import model_for
from toy.models.base import KeyValueCache
from toy.recipes import FromScratch
from toy.training import FromScratchOptions, Training
from toy.training.high_loss import HighLoss

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{i} squared is {i * i}, and then comes {i + 1}.\n" for i in range(300))
SIZES = {"batch": 3, "context": 8, "d_model": 8, "layers": 1, "heads": 2, "eval_batches": 2, "sample_tokens": 5} | {
    "arch": "transformer", "schedule": "constant", "lr_floor": 0.1,
}  # fmt: skip
TRAIN = ("train", "from-scratch")
OPTIONS = ["--corpus=text.txt", "--backend=numpy", *(f"--{name.replace('_', '-')}={n}" for name, n in SIZES.items())]
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files, limits or signals")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a text and the run "run", of 8 steps in all, saved after every one; the last three are kept."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    with _chdir(folder):
        options = FromScratchOptions(
            corpus="text.txt", backend="numpy", steps=8, warmup=0, save_every=1, keep=3, **SIZES
        )
        for _ in Training(options, out="run").run():
            pass
    return folder


@contextlib.contextmanager
def _chdir(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of that run, in the present directory."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return Path("run")


def one_sentence(text):
    return text.startswith("toy: ") and text.count("\n") == 1 and "Traceback" not in text and "report it" not in text


def weights_of(folder):
    path = Path(folder, "weights", Path(folder, "weights", "latest").read_text().strip())
    checkpoint = read_checkpoint(path)
    arrays = {"p": checkpoint.parameters, **checkpoint.moments}
    return checkpoint.step, {(kind, n): a.tobytes() for kind, some in arrays.items() for n, a in some.items()}


def change_config(folder, change):
    path = Path(folder, "config.json")
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=2))


# ----------------------------------------------------------------------------------------------------------------------
# config.json against the checkpoint
# ----------------------------------------------------------------------------------------------------------------------

FIELDS = dataclasses.fields(FromScratchOptions)


def changed(value):
    """Another value of the same type that the options take."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 2
    return value * 0.5 + 0.05 if isinstance(value, float) else value


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_an_option_changed_in_config_json_is_never_taken_without_a_word(run, field):
    """The checkpoint holds a protected copy. What a run may go on with is told, everything else is refused."""
    assert Training.resume(run, steps=9).notices() == []
    words = {
        "schedule": "cosine",
        "split": "tail",
        "train_on": "all",
        "weight_dtype": "bf16",
        "arch": "gpt2",
        "recompute": "on",
    }

    def change(config):
        old = config["training"][field.name]
        config["training"][field.name] = words.get(field.name) or changed(old)
        return config["training"][field.name] != old

    changes = []
    change_config(run, lambda config: changes.append(change(config)))
    if changes == [False]:
        pytest.skip("a path, a name or None: nothing to change a digit of")
    if field.metadata["resumable"]:
        more = {} if field.name == "steps" else {"steps": 9}
        (notice,) = Training.resume(run, **more).notices()
        assert notice.startswith(f"config.json says {field.name} ") and "when step 8 was saved it was" in notice
        return
    with pytest.raises((BadFileError, ValueError), match=r"config\.json"):
        Training.resume(run, steps=9)


@pytest.mark.parametrize("name", ["arch", "model", "tokenizer", "corpus", "n_parameters", "recipe"])
def test_the_rest_of_config_json_is_compared_too(run, toy_command, name):
    def other(entry):
        if isinstance(entry, dict):
            key = next(key for key, value in entry.items() if key not in ("path", "source") and value)
            return entry | {key: other(entry[key])}
        if isinstance(entry, str):
            return {"transformer": "gpt2", "from-scratch": "warm-start"}.get(entry, entry[1:])
        return entry + 1

    assert toy_command("generate", "run", "--tokens=2")[0] == 0
    change_config(run, lambda config: config.update({name: other(config[name])}))
    for command in ([*TRAIN, "--resume=run", "--steps=9"], ["generate", "run", "--tokens=2"]):
        code, out, err = toy_command(*command)
        assert (code, out, one_sentence(err)) == (2, "", True), (command, err)
        assert "run" in err


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run, toy_command):
    os.replace("run/weights/step_7.safetensors", "run/weights/step_8.safetensors")
    for command in (
        [*TRAIN, "--resume=run", "--steps=9"],
        ["generate", "run"],
        ["generate", "run/weights/step_8.safetensors"],
    ):
        code, _, err = toy_command(*command)
        assert (code, one_sentence(err)) == (2, True)
        assert "step_8.safetensors: holds step 7, its name says 8" in err
    shutil.copy("run/weights/step_8.safetensors", "mine.safetensors")
    assert read_checkpoint("mine.safetensors").step == 7  # a name of one's own says no step


def test_a_latest_that_names_an_older_one_than_there_is_says_so(run, toy_command):
    Path("run/weights/latest").write_text("step_7.safetensors\n")
    with pytest.warns(RunWarning, match=r"latest names step_7\.safetensors, and step_8\.safetensors is newer"):
        assert Run.open(run).read_checkpoint().step == 7
    code, _, err = toy_command("generate", "run", "--tokens=2")
    assert code == 0 and err.startswith("note: ") and "step_8.safetensors is newer: the older one is taken" in err
    with Run.open(run).lock():  # a run that is saving has written the checkpoint and not yet latest
        assert "note" not in toy_command("generate", "run", "--tokens=2")[2]


def test_a_damaged_newest_checkpoint_is_left_out_when_that_is_asked_for(run, made, toy_command):
    path = Path("run/weights/step_8.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    Path("run/weights/step_7.safetensors").write_bytes(b"")
    code, _, err = toy_command(*TRAIN, "--resume=run", "--steps=12")
    assert (code, one_sentence(err)) == (2, True)
    command = re.search(r"To go on from step 6, which is whole: (.*)", err)[1]
    assert "the checksum does not match" in err
    for wrong, problem in (("5", "has no checkpoint of step 5: there are 6, 7, 8"), ("7", "step_7.safetensors")):
        code, _, err = toy_command(*TRAIN, "--resume=run", "--steps=12", f"--from-step={wrong}")
        assert (code, one_sentence(err)) == (2, True) and problem in err
    code, out, err = toy_command(*shlex.split(command)[1 if command.startswith("toy") else 3 :], "--steps=12")
    assert code == 0, err
    (resumed,) = [line for line in out.splitlines() if line.startswith("resumed")]
    assert resumed.startswith(
        "resumed        after step 6 (step_7.safetensors is left out: is not a whole safetensors file"
    )
    assert "step_8.safetensors is left out: the checksum" in resumed
    shutil.copytree(made / "run", "straight")
    assert toy_command(*TRAIN, "--resume=straight", "--steps=12")[0] == 0
    assert weights_of("run") == weights_of("straight")


def test_a_whole_newer_checkpoint_is_not_lost_to_from_step(run, toy_command):
    code, _, err = toy_command(*TRAIN, "--resume=run", "--steps=12", "--from-step=7")
    assert (code, one_sentence(err)) == (2, True)
    assert "step_8.safetensors is newer and whole" in err
    code, _, err = toy_command(*TRAIN, *OPTIONS, "--from-step=7")
    assert (code, one_sentence(err)) == (2, True) and "--from-step belongs to --resume" in err
    assert toy_command(*TRAIN, "--resume=run", "--steps=9", "--from-step=8")[0] == 0


def test_a_kill_right_after_going_on_from_an_older_one_leaves_a_run_that_goes_on(run):
    """`latest` names the older checkpoint before the newer ones are deleted."""
    Path("run/weights/step_8.safetensors").write_bytes(b"damaged")
    training = Training.resume(run, from_step=7, steps=12)
    for event in training.run():
        if event.kind == "run_start":
            assert Path("run/weights/latest").read_text() == "step_7.safetensors\n"
            assert not Path("run/weights/step_8.safetensors").exists()
            break


def save_for_ever(folder, step):
    run = Run.open(folder)
    checkpoint = run.read_checkpoint()
    with run.lock():
        while True:
            step += 1
            run.write_checkpoint(checkpoint._replace(step=step), keep=1)


def test_latest_is_read_again_when_the_run_saved_in_between(run, monkeypatch):
    """Between the reading of `latest` and of the checkpoint, and that twice; a checkpoint that is only gone is an error."""
    from toy.files import checkpoints

    Path("run/weights/best").unlink()  # what it names is not deleted
    real, saver, saves = checkpoints.read_checkpoint, Run.open(run), [10, 9]
    newest = saver.read_checkpoint()

    def read(path):
        if saves:
            saver.write_checkpoint(newest._replace(step=saves.pop()), keep=1)
        return real(path)

    monkeypatch.setattr(checkpoints, "read_checkpoint", read)
    assert Run.open(run).read_checkpoint().step == 10 and not saves
    Path("run/weights/step_10.safetensors").unlink()
    with pytest.raises(BadFileError, match=r"step_10\.safetensors: is missing, but weights/latest names it"):
        Run.open(run).read_checkpoint()


@posix
def test_a_run_that_saves_at_the_moment_can_be_read(run):
    """With --keep 1 the checkpoint that `latest` named is gone a moment later."""
    Path("run/weights/best").unlink()  # what it names is not deleted
    saver = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(run, 8), daemon=True)
    saver.start()
    try:
        steps = [Run.open(run).read_checkpoint().step for _ in range(300)]
    finally:
        saver.kill()
        saver.join()
    assert steps == sorted(steps) and steps[-1] > steps[0]


# ----------------------------------------------------------------------------------------------------------------------
# events.jsonl
# ----------------------------------------------------------------------------------------------------------------------


def numbers(folder):
    curve = plots.load_curve(folder)
    return {name: value.tolist() for name, value in curve.items() if isinstance(value, np.ndarray)}


def test_a_changed_digit_anywhere_in_the_log_never_plots_another_number(run):
    path = Path("run/events.jsonl")
    data, right = path.read_bytes(), numbers(run)
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    rng, refused = random.Random(0), 0
    for place in rng.sample(places, 400):
        changed = bytearray(data)
        changed[place] = ord(rng.choice([d for d in "0123456789" if ord(d) != data[place]]))
        path.write_bytes(changed)
        try:
            assert numbers(run) == right  # the last line, run_end, is left out as one that was torn
        except BadFileError as error:
            assert "events.jsonl: line" in str(error)
            refused += 1
    assert refused > 300


@pytest.mark.parametrize("crc", [True, False], ids=["with crc", "of an older version"])
def test_lines_in_another_order_twice_or_missing_are_refused(run, crc):
    path = Path("run/events.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    if not crc:
        lines = [re.sub(rb', "crc": "[0-9a-f]+"', b"", line) for line in lines]
    path.write_bytes(b"".join(lines))
    assert len(read_events(path)) == len(lines)
    kinds = [json.loads(line)["kind"] for line in lines]
    steps = [i for i, kind in enumerate(kinds) if kind == "step"]
    for a, b in itertools.pairwise(steps):
        for wrong in (
            [*lines[:a], lines[b], *lines[a + 1 : b], lines[a], *lines[b + 1 :]],
            [*lines[:a], *lines[a + 1 :]],
            [*lines[:a], lines[a], *lines[a:]],
        ):
            path.write_bytes(b"".join(wrong))
            with pytest.raises(BadFileError, match=r"events\.jsonl: line \d+ is "):
                read_events(path)
    first = kinds.index("eval")
    path.write_bytes(b"".join([*lines[: first + 1], *lines[first:]]))
    with pytest.raises(BadFileError, match="is a second validation of step"):
        read_events(path)


def test_a_plot_of_another_vocabulary_than_the_logs_is_refused(run, toy_command):
    assert toy_command("plot", "run")[0] == 0
    change_config(run, lambda config: config["model"].update(vocab_size=config["model"]["vocab_size"] + 1))
    code, _, err = toy_command("plot", "run")
    assert (code, one_sentence(err)) == (2, True) and "for the size of the vocabulary, events.jsonl says" in err


def test_a_log_that_lost_its_end_is_not_the_curve_of_the_run(run, toy_command):
    """A tail of zeros, of any length: all there is must reach the checkpoint."""
    path = Path("run/events.jsonl")
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    last_step = max(end for end, line in zip(ends, data.splitlines()) if b'"kind": "step"' in line)
    for kept in (ends[2], ends[5], last_step - 1, last_step - 40, 0):
        for tail in (b"", b"\0" * (len(data) - kept), b"\0" * 100 + b"\n"):
            path.write_bytes(data[:kept] + tail)
            for command in ([*TRAIN, "--resume=run", "--steps=9"], ["plot", "run"]):
                code, _, err = toy_command(*command)
                assert (code, one_sentence(err)) == (2, True)
                assert "events.jsonl: ends at step" in err and "there is a checkpoint of step 8" in err
    os.replace(path, "run/lost.jsonl")  # as the sentence says
    training = Training.resume(run, steps=9)
    assert training.notices() == ["run/events.jsonl is gone: the curve begins at step 8"]
    list(training.run())
    assert numbers(run)["steps"] == [9]


HUGE = ["1" * 400, "1" * 5000, "-1", "1e308", "-1e39", "true", '"1"', "null", "1.5e400", "9" * 30]


@pytest.mark.parametrize("number", HUGE, ids=lambda number: number[:8])
@pytest.mark.parametrize("name", ["step", "loss", "tokens", "wall_us"])
def test_huge_and_strange_numbers_in_a_log_are_refused(run, toy_command, name, number):
    fields = {"step": "1", "loss": "4.0", "tokens": "24", "wall_us": "100"}
    start = '{"kind": "run_start", "step": 0}\n'

    def write(fields):
        line = '{"kind": "step", ' + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}\n"
        Path("run/events.jsonl").write_text(start + line + line.replace('"step": 1,', '"step": 2,'))

    shutil.rmtree("run/weights")
    write(fields)
    assert toy_command("plot", "run")[0] == 0
    write(fields | {name: number})
    code, _, err = toy_command("plot", "run")
    if name == "loss" and number in ("-1", "9" * 30):
        assert code == 0
        return  # a loss may be anything that float32 holds
    assert (code, one_sentence(err)) == (2, True), err
    assert "events.jsonl: line 2 is" in err and len(err) < 400


# ----------------------------------------------------------------------------------------------------------------------
# files that are none
# ----------------------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys
from pathlib import Path
from toy import cli

def exit_code(*arguments):
    try:
        cli.main(list(arguments))
    except SystemExit as end:
        return end.code

def fifo(path): os.mkfifo(path)
def device(path): os.symlink("/dev/zero", path)
def folder(path): os.mkdir(path)

for name in ("config.json", "events.jsonl", "weights/latest", "weights/step_8.safetensors"):
    path = Path("run", name)
    for kind in (fifo, device, folder):
        os.replace(path, "aside")
        kind(path)
        train = ["train", "from-scratch", "--resume=run", "--steps=9"]
        for command in (train, ["generate", "run", "--tokens=1"], ["plot", "run"]):
            print(name, kind.__name__, command[0], file=sys.stderr)
            print(name, kind.__name__, command[0], exit_code(*command))
        path.rmdir() if kind is folder else path.unlink()
        os.replace("aside", path)
print("end", exit_code("generate", "run", "--tokens=1"))
"""


@posix
def test_pipes_devices_and_folders_in_the_place_of_files_never_hang(run):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    out, err = finish(process)
    lines = [
        line.split()
        for line in out.splitlines()
        if line.split()[0] in ("config.json", "events.jsonl", "end") or line.startswith("weights/")
    ]
    assert lines[-1] == ["end", "0"], (out, err)
    assert len(lines) == 4 * 3 * 3 + 1 and "Traceback" not in err and "report" not in err
    read_by = {
        "config.json": ("train", "generate", "plot"), "weights/latest": ("train", "generate", "plot"),
        "events.jsonl": ("train", "plot"), "weights/step_8.safetensors": ("train", "generate"),
    }  # fmt: skip
    for name, kind, command, code in lines[:-1]:
        assert code == ("2" if command in read_by[name] else "0"), (name, kind, command, err)


def test_only_files_are_read_and_only_so_much_of_them(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(BadFileError, match="more than 4 bytes"):
        read_regular(tmp_path / "file", 4)
    with pytest.raises(BadFileError, match="is a directory, expected a file"):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


# ----------------------------------------------------------------------------------------------------------------------
# two at once, and kills while it begins
# ----------------------------------------------------------------------------------------------------------------------


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([sys.executable, "-m", "toy", *arguments], env=environment, **{**streams, **options})


def test_of_two_starts_in_one_directory_one_begins(tmp_path):
    """Threads that begin at once, again and again: one has the directory, with its own config, the other is told."""
    for attempt in range(40):
        folder, barrier, found = tmp_path / str(attempt), threading.Barrier(2), {}

        def begin(number, folder=folder, barrier=barrier, found=found):
            barrier.wait()
            try:
                with Run.begin(folder, {"number": number}) as run:
                    found[number] = run.config["number"]
                    barrier.wait()
            except (ValueError, BlockingIOError) as error:
                found[number] = str(error)
                barrier.wait()

        threads = [threading.Thread(target=begin, args=(number,)) for number in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [number for number, what in found.items() if what == number]
        assert Run.open(folder).config["number"] == winner
        assert re.search("another process|exists and is not empty", found[3 - winner])


@posix
def test_of_two_commands_in_one_directory_one_trains(run):
    both = [start(*TRAIN, *OPTIONS, "--steps=30", f"--lr=0.00{i}", "--out=new") for i in (1, 2)]
    ends = [(*finish(process), process.returncode) for process in both]
    (i,) = [i for i, (_, _, code) in enumerate(ends) if code == 0]
    assert json.loads(Path("new/config.json").read_text())["training"]["lr"] == (i + 1) / 1000
    _, err, code = ends[1 - i]
    assert code in (1, 2) and one_sentence(err)


def test_what_was_read_before_another_process_went_on_is_not_gone_on_from(run):
    """Two resumes read one checkpoint; the second gets the lock when the first has done its steps."""
    first, second = Training.resume(run, steps=12), Training.resume(run, steps=12)
    list(first.run())
    with pytest.raises(RuntimeError, match="another process went on with the run in run meanwhile: resume it again"):
        list(second.run())
    assert weights_of(run)[0] == 12


def test_a_start_that_was_killed_before_config_json_can_be_begun_again(made, tmp_path, monkeypatch, toy_command):
    monkeypatch.chdir(made)
    out = tmp_path / "out"
    out.mkdir()
    for leftover in ((), (".config.json.0a1b2c3d.tmp",), (".lock",)):
        for name in leftover:
            (out / name).write_text("{")
        code, _, err = toy_command(*TRAIN, f"--resume={out}")
        assert (code, one_sentence(err)) == (2, True)
        assert f"it has no config.json; nothing is in it yet: --out {out} begins one there" in err
        assert toy_command(*TRAIN, *OPTIONS, "--steps=1", f"--out={out}")[0] == 0
        assert not list(out.glob(".config*"))
        shutil.rmtree(out)
        out.mkdir()
    (out / "mine.txt").touch()
    code, _, err = toy_command(*TRAIN, *OPTIONS, "--steps=1", f"--out={out}")
    assert code == 2 and "exists and is not empty" in err


class Killed(BaseException):
    pass


@pytest.mark.parametrize("call", range(8))
def test_a_kill_at_any_call_while_a_run_begins_leaves_it_new_or_resumable(run, monkeypatch, call):
    """Every call that changes the disk, one after the other, is the last one."""
    calls, real = [], {name: getattr(os, name) for name in ("mkdir", "replace", "fsync", "unlink")}

    def watched(name):
        def function(*arguments, **keywords):
            calls.append(name)
            if len(calls) > call:
                raise Killed
            return real[name](*arguments, **keywords)

        return function

    options = FromScratchOptions(corpus="text.txt", backend="numpy", steps=2, **SIZES)
    training = Training(options, out="new")
    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, watched(name))
        with pytest.raises(Killed):
            list(training.run())
    if Path("new/config.json").exists():
        again = Training.resume("new")
    else:
        again = Training(options, out="new")
    assert list(again.run())[-1].reason == "completed"
    list(Training(options, out="straight").run())
    assert weights_of("new") == weights_of("straight")


# ----------------------------------------------------------------------------------------------------------------------
# the end of a run
# ----------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_draws_its_picture_again(run, toy_command):
    for damage in (Path.unlink, lambda path: path.write_bytes(b"half")):
        whole = Path("run/loss.png").read_bytes()[:8]
        damage(Path("run/loss.png"))
        Path("run/.loss.png.0123abcd.tmp").write_bytes(b"of a process that was killed while it drew")
        code, _, err = toy_command(*TRAIN, "--resume=run")
        assert (code, one_sentence(err)) == (2, True)
        assert "has done its 8 steps: give it more steps to go on; its picture was drawn again: run/loss.png" in err
        assert Path("run/loss.png").read_bytes()[:8] == whole == b"\x89PNG\r\n\x1a\n"
        assert not list(Path("run").rglob("*.tmp"))
    Path("run/.loss.png.0123abcd.tmp").write_bytes(b"of a process that draws")
    with Run.open("run").lock():  # another process has the run: what it writes is left alone
        code, _, err = toy_command(*TRAIN, "--resume=run")
    assert code == 2 and "another process is training" in err and list(Path("run").rglob("*.tmp"))


def test_bits_per_byte_are_of_the_text_that_was_trained_on(run):
    """Where the lines of config.json were moved it may still be JSON, and say another number of bytes, or none."""
    sound = plots.load_curve("run")
    assert sound["bytes_per_token"] == 1.0
    config = json.loads(Path("run/config.json").read_text())
    for bytes_per_token in (2.0, None):
        Path("run/config.json").write_text(
            json.dumps(config | {"corpus": {"bytes_per_token": bytes_per_token}, "tokenizer": {}})
        )
        with pytest.raises(BadFileError, match=r"says .* for the bytes of a token, events.jsonl says 1\.0"):
            plots.load_curve("run")


@pytest.mark.parametrize(("clip", "advice"), [(1.0, "or a clip below 1"), (0.0, "or a clip, of 1 say")])
def test_the_advice_fits_the_clip(run, clip, advice):
    training = Training(FromScratchOptions(corpus="text.txt", backend="numpy", steps=8, clip=clip, **SIZES))
    assert str(training._diverged("the loss became nan")).endswith(advice)


def test_a_high_loss_is_told_once_and_counted_in_a_row():
    watch = HighLoss(n_classes=8)
    limit = 10 * np.log(8)
    assert not any(watch.see(limit * 1.01) for _ in range(49)) and not watch.lasts
    assert not watch.see(limit) and not watch.lasts  # in a row: it begins anew
    assert [watch.see(limit * 2) for _ in range(60)] == [False] * 49 + [True] + [False] * 10
    assert watch.lasts and "for 60 steps" in watch.words()
    watch.see(1.0)
    assert not watch.lasts
    assert not any(watch.see(limit * 2) for _ in range(60)) and watch.lasts  # told once
    assert HighLoss(8, [limit * 2] * 50).lasts and not HighLoss(8, [limit * 2] * 50).see(limit * 2)


def high_from(training, step, until=10**9):
    real = training.recipe.step

    def high(*arguments, **keywords):
        loss = real(*arguments, **keywords)
        return 800.0 if step <= training.step < until else loss

    training.recipe.step = high
    return training


def test_a_run_that_ends_at_a_loss_of_800_is_no_success(run, toy_command, monkeypatch):
    """It is told once, all steps are done and saved, and it ends as diverged, stopped in the middle or not."""
    init = Training.__init__

    def with_high_loss(training, *arguments, **keywords):
        init(training, *arguments, **keywords)
        high_from(training, 5)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "__init__", with_high_loss)
        code, out, err = toy_command(*TRAIN, *OPTIONS, "--steps=70", "--eval-every=50", "--out=high")
        assert (code, one_sentence(err)) == (1, True)
        assert "for 65 steps: the training diverged; try an lr below 0.002" in err and "To go on" not in err
        assert out.count("note: the loss was above") == 1 and "(step 55)" in out
        assert not re.search("^done", out, re.M)
        training = Training(FromScratchOptions(corpus="text.txt", backend="numpy", steps=70, **SIZES), out="stopped")
        for event in training.run():
            if event.kind == "step" and event.step == 60:
                break
        events = []
        with pytest.raises(RuntimeError, match="for 65 steps"):
            events.extend(iter(Training.resume("stopped").run()))
    for folder in ("high", "stopped"):
        events = read_events(f"{folder}/events.jsonl")
        assert [event["step"] for event in events if event["kind"] == "notice"] == [55]
        assert (events[-1]["reason"], events[-1]["final_step"]) == ("diverged", 70)
    assert weights_of("high") == weights_of("stopped")
    events = list(
        high_from(Training(FromScratchOptions(corpus="text.txt", backend="numpy", steps=70, **SIZES)), 5, 60).run()
    )
    assert events[-1].reason == "completed"  # it came back
    assert sum(isinstance(event, Notice) for event in events) == 1


# ----------------------------------------------------------------------------------------------------------------------
# the process and its surroundings
# ----------------------------------------------------------------------------------------------------------------------


@posix
def test_sighup_saves_as_sigterm_does(run):
    training = Training(FromScratchOptions(corpus="text.txt", backend="numpy", steps=30, **SIZES), out="new")
    for event in training.run():
        if event.kind == "step" and event.step == 4:
            signal.raise_signal(signal.SIGHUP)
    assert (event.kind, event.reason, training.stopped_by) == ("run_end", "interrupted", signal.SIGHUP)
    assert weights_of("new")[0] == 4


@posix
def test_a_terminal_that_is_closed_leaves_a_saved_run(run):
    """The hang-up comes as a signal, and from then on nothing can be printed."""
    import pty

    pid, master = pty.fork()
    if pid == 0:
        os.environ.update(PYTHONPATH=str(ROOT), OPENBLAS_NUM_THREADS="1")
        command = [
            sys.executable,
            "-m",
            "toy",
            *TRAIN,
            *OPTIONS,
            "--steps=1000000",
            "--save-every=1000000",
            "--out=new",
        ]
        os.execv(command[0], command)
    seen = b""
    while b"tok/s" not in seen:
        seen = seen[-1000:] + os.read(master, 1000)
    os.close(master)
    os.waitpid(pid, 0)
    step, _ = weights_of("new")
    events = read_events("new/events.jsonl")
    assert step > 0 and (events[-1]["kind"], events[-1]["final_step"]) == ("run_end", step)


@posix
@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_on_stdout_names_it_and_saves(run, buffered):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "" if buffered else "1"}
    for command in (["generate", "run", "--tokens=3"], ["--help"], ["plot", "run"]):
        with open("/dev/full", "w") as full:
            process = subprocess.Popen(
                [sys.executable, "-m", "toy", *command], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
            )
            _, err = finish(process)
        assert process.returncode in (1, 2)
        assert err == "toy: the standard output cannot be written: No space left on device\n"


@posix
def test_a_run_whose_stdout_fills_up_is_saved(run, monkeypatch, capsys):
    from toy import cli
    from toy.cli.progress import Progress

    show = Progress.show

    def full(progress, event):
        if event.kind == "step" and event.step == 5:
            raise OSError(28, "No space left on device", "the standard output cannot be written")
        show(progress, event)

    monkeypatch.setattr(Progress, "show", full)
    with pytest.raises(SystemExit) as end:
        cli.main([*TRAIN, *OPTIONS, "--steps=9", "--save-every=9", "--out=new"])
    err = capsys.readouterr().err
    assert end.value.code == 1 and one_sentence(err) and "--resume new" in err and "standard output" in err
    assert weights_of("new")[0] == 5


@posix
def test_an_out_that_is_not_utf_8_gets_its_picture(run):
    out = os.fsdecode(b"not \xff\xfe utf-8")
    process = start(*TRAIN, *OPTIONS, "--steps=2", b"--out=" + os.fsencode(out))
    _, err = finish(process)
    assert process.returncode == 0, err
    assert Path(out, "loss.png").stat().st_size > 1000
    for suffix in ("svg", "pdf"):
        plots.plot_runs([out], f"picture.{suffix}")
        assert Path(f"picture.{suffix}").stat().st_size > 1000


@posix
@pytest.mark.parametrize("n", [5, 6, 7, 9])
def test_few_file_descriptors_are_a_sentence_or_no_matter(run, n):
    import resource

    for command in ([*TRAIN, *OPTIONS, "--steps=2", "--out=new"], ["generate", "run", "--tokens=2"]):
        process = start(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (n, n)))
        _, err = finish(process)
        if "Fatal Python error" in err or "No module named 'toy'" in err or "init_import_site" in err:
            pytest.skip("Python itself does not begin with so few")
        assert process.returncode == 0 or one_sentence(err), (command, err)
        if process.returncode:
            assert "Too many open files" in err


# ----------------------------------------------------------------------------------------------------------------------
# sizes
# ----------------------------------------------------------------------------------------------------------------------

TOO_LARGE = {
    "layers": (["--layers=1000000"], "layers must be at most 10,000"),
    "threads": (["--threads=" + "9" * 31], "threads must be at most 1,024, got a number of 31 digits"),
    "sample": (["--sample-tokens=2000000000"], "sample_tokens must be at most 1,000,000"),
    "batch": (["--batch=2000000000"], "there is not enough memory"),
    "validation": (["--eval-batches=2000000000"], "there is not enough memory"),
    "context": (["--context=2000000000"], "there is not enough memory"),
    "width": (["--d-model=400000000"], "there is not enough memory"),
    "hidden width": (["--d-ff=2000000000"], "there is not enough memory"),
    **{
        f"{name} of 31 digits": ([f"--{name}={'9' * 31}"], "must be at most")
        for name in ("steps", "batch", "d-model", "d-ff", "layers", "heads", "context", "seed", "keep", "warmup")
    },
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_sizes_that_cannot_be_are_told_before_anything_is_allocated(run, toy_command, case):
    before = sorted(Path().rglob("*"))
    arguments, problem = TOO_LARGE[case]
    code, out, err = toy_command(*TRAIN, *OPTIONS, "--out=new", *arguments)
    assert (code, out, one_sentence(err)) == (2, "", True)
    assert problem in err
    assert sorted(Path().rglob("*")) == before


def test_a_model_is_measured_against_the_memory_there_is(monkeypatch):
    config, options = GPT2Config(65, 16, 2, 32, 1, 8), RecipeOptions(t_seq=8)
    n = sum(int(np.prod(shape)) for shape in model_for(config).parameter_shapes(config).values())
    needed = 16 * n + 4 * 8 * 1 * 16  # moments and gradients too; the input of the block
    monkeypatch.setattr(memory, "machine_memory", lambda: needed)
    FromScratch("numpy").realize(config, options)
    monkeypatch.setattr(memory, "machine_memory", lambda: needed - 1)
    with pytest.raises(MemoryError, match=f"training {n:,} parameters on 8 rows takes at least"):
        FromScratch("numpy").realize(config, options)
    monkeypatch.setattr(memory, "machine_memory", lambda: None)  # a system that does not say
    FromScratch("numpy").realize(config, options)


def test_the_memory_is_the_machines_or_the_control_groups(monkeypatch, tmp_path):
    total = memory.machine_memory()
    assert total is None or total > 2**28
    for text, want in (("max\n", None), ("4096\n", 4096), ("9" * 25, None)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(machine, "LIMITS", (str(tmp_path / "gone"), str(tmp_path / "limit")))
        assert memory.machine_memory() == (want or memory.machine_memory())
        if want and total is not None:
            assert memory.machine_memory() == want


@pytest.mark.parametrize(
    "make",
    [
        lambda n: GPT2Config(3, 4, 2, 4, n, 4),
        lambda n: LlamaConfig(3, 4, 2, 2, 4, n, 4),
        lambda n: ViTConfig(4, 1, 2, 4, 2, 4, n, 2),
    ],
)
def test_no_model_has_more_layers_than_its_bound(make):
    assert make(10_000).n_layers == 10_000
    with pytest.raises(ValueError, match="n_layers must be at most 10,000, got a number of 7 digits"):
        make(1_000_000)


def test_a_cache_of_keys_and_values_grows_with_the_sequence():
    """A file may claim any context: memory follows what was read, and the numbers are those of one pass."""
    config = LlamaConfig(11, 8, 2, 1, 12, 2, context_length=2**40)
    model = model_for(config)(config, seed=1)
    ids = np.random.default_rng(0).integers(0, 11, 300)
    want = model.forward(ids)[0]
    for sizes in ([300], [1] * 300, [63, 1, 1, 135, 100], [64, 64, 172]):
        cache, got, at = model.new_kv_cache(), [], 0
        for size in sizes:
            got.append(model.forward(ids[at : at + size], kv_cache=cache)[0])
            at += size
        np.testing.assert_allclose(np.concatenate(got), want, atol=2e-6)
        assert all(len(store) <= 2 * 300 for layer in cache.layers for store in layer)
    short = KeyValueCache(1, 100)
    short.extend(0, np.zeros((70, 2)), np.zeros((70, 2)))
    assert len(short.layers[0][0]) == 100  # never more than the context


# ----------------------------------------------------------------------------------------------------------------------
# what is shown
# ----------------------------------------------------------------------------------------------------------------------


def test_training_says_that_the_kernels_are_missing(run, toy_command, monkeypatch):
    from toy import switch

    assert "note:" not in toy_command(*TRAIN, *OPTIONS, "--steps=1", "--out=with")[1]
    monkeypatch.setattr(switch, "missing_kernels_notice", lambda choice: f"no kernels for {choice.backend}")
    assert "note: no kernels for numpy\n" in toy_command(*TRAIN, *OPTIONS, "--steps=1", "--out=without")[1]


def test_the_table_of_backends_cuts_nothing(toy_command, monkeypatch):
    from toy import switch

    reason = "because of " + "/a/very/long/path" * 30 + " it is not there"
    rows = [row._replace(available=False, version="", reason=reason) for row in switch.backends() if row.name == "ggml"]
    monkeypatch.setattr(switch, "backends", lambda: rows)
    monkeypatch.setattr(switch, "resolve", lambda: switch.Resolved("numpy", "cpu", "as asked for"))
    monkeypatch.setenv("COLUMNS", "80")
    out = toy_command("backends")[1]
    words = re.sub(r"[^a-z]+", "", out)
    assert re.sub(r"[^a-z]+", "", reason) in words and "…" not in out


def test_every_kind_of_event_is_read_back_with_its_crc(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    events = [
        RunStart(step=0, steps=2, arch="gpt2", n_parameters=1, vocab_size=3, backend="numpy", device="cpu", seed=0),
        Evaluation(step=0, loss=3.5),
        Step(step=1, loss=4.0, lr=1e-3, grad_norm=1.0, tokens=64, wall_us=1000),
        Notice(step=1, text='a "note"'),
        RunEnd(reason="completed", final_step=1, final_loss=3.9),
    ]
    for event in events:
        log.write(event)
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert all(re.search(r', "crc": "[0-9a-f]{8}"\}$', line) and json.loads(line)["crc"] for line in lines)
    assert read_events(tmp_path / "events.jsonl") == [event.to_json() for event in events]


def test_a_checkpoint_is_refused_whose_name_was_never_its_own(tmp_path, made):
    checkpoint = read_checkpoint(made / "run/weights/step_8.safetensors")
    write_checkpoint(tmp_path / "step_9.safetensors", checkpoint)
    with pytest.raises(BadFileError, match="holds step 8, its name says 9"):
        read_checkpoint(tmp_path / "step_9.safetensors")
