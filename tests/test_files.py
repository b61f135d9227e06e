"""Checkpoints, events, run directories: whatever happens to a file, a reader says so and a run can go on."""

import inspect
import json
import os
import random
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from toy.files import BadFileError, Checkpoint, Run, atomic, lock, read_checkpoint, read_events, write_checkpoint
from toy.files.atomic import replacing, write_text
from toy.files.events import Evaluation, EventLog, RunEnd, RunStart, Sample, Step, keep_until
from toy.files.runs import check_new_folder

ROOT = Path(__file__).parent.parent

# ----------------------------------------------------------------------------------------------------------------------
# atomic files
# ----------------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*nowhere/file: No such file or directory"):
        write_text(tmp_path / "nowhere" / "file", "text")


def in_use(code=32):
    """What Windows raises for a file that another program has open."""
    error = PermissionError(13, "Permission denied")
    error.winerror = code
    return error


def refuse(monkeypatch, name, times, error):
    """Let os.`name` raise `error` the first `times` times. Returns the list of its calls."""
    calls, real = [], getattr(os, name)

    def refusing(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) <= times:
            raise error
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, name, refusing)
    monkeypatch.setattr(atomic.time, "sleep", lambda seconds: None)
    return calls


@pytest.mark.parametrize("code", [5, 32])
def test_a_file_that_is_read_at_the_moment_is_replaced_a_little_later(tmp_path, monkeypatch, code):
    path = tmp_path / "file"
    write_text(path, "old")
    calls = refuse(monkeypatch, "replace", 3, in_use(code))
    write_text(path, "new")
    assert path.read_text() == "new" and len(calls) == 4
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_stays_open_elsewhere_is_an_error_that_says_so(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")
    calls = refuse(monkeypatch, "replace", 99, in_use())
    with pytest.raises(atomic.FileInUseError, match=r"cannot write .*file: another program has it open"):
        write_text(path, "new")
    assert path.read_text() == "old" and 2 <= len(calls) <= 10
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_without_permission_is_not_waited_for(tmp_path, monkeypatch):
    calls = refuse(monkeypatch, "replace", 99, PermissionError(13, "Permission denied"))
    with pytest.raises(OSError, match=r"cannot write .*: Permission denied") as caught:
        write_text(tmp_path / "file", "new")
    assert len(calls) == 1 and not isinstance(caught.value, atomic.FileInUseError)


# ----------------------------------------------------------------------------------------------------------------------
# one process at a time
# ----------------------------------------------------------------------------------------------------------------------


class WindowsLocks:
    """The module msvcrt, as far as lock.py uses it: a byte of a file belongs to one handle until that is closed."""

    LK_NBLCK = 2

    def __init__(self):
        self.held = {}  # file -> handle

    def locking(self, handle, mode, size):
        assert mode == self.LK_NBLCK and size == 1
        file = os.fstat(handle).st_ino
        if (
            self.held.get(file, handle) != handle and os.fstat(self.held[file]).st_ino == file
        ):  # the same number: closed
            raise PermissionError(13, "Permission denied")
        self.held[file] = handle


@pytest.mark.parametrize("system", ["this one", "Windows"])
def test_one_process_at_a_time(tmp_path, monkeypatch, system):
    if system == "Windows":
        monkeypatch.setattr(lock, "fcntl", None)
        monkeypatch.setattr(lock, "msvcrt", WindowsLocks(), raising=False)
    run = Run.create(tmp_path / "run", {})
    with run.lock():
        with pytest.raises(BlockingIOError, match="another process is training in"), run.lock():
            pytest.fail("the lock was given twice")
        if system == "Windows":
            lock.msvcrt.held.clear()  # closing the handle did
    with run.lock():
        assert Run.open(run.folder).config == run.config


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints
# ----------------------------------------------------------------------------------------------------------------------

CONFIG = {"arch": "transformer", "model": {"vocab_size": 3}, "tokenizer": {"kind": "char", "characters": "ab€"}}


def make_checkpoint(step=7, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"token_embed": (3, 2), "blocks.0.w_q": (2, 2), "norm_final_gamma": (2,)}
    parameters, m, v = ({n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(3))
    return Checkpoint(step, CONFIG, parameters, {"m": m, "v": {name: np.abs(array) for name, array in v.items()}})


def assert_same(a, b):
    assert (a.step, a.config) == (b.step, b.config)
    for left, right in (
        (a.parameters, b.parameters),
        (a.moments["m"], b.moments["m"]),
        (a.moments["v"], b.moments["v"]),
    ):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == np.float32
            assert left[name].shape == right[name].shape
            assert left[name].tobytes() == right[name].tobytes()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "step_7.safetensors"
    write_checkpoint(path, make_checkpoint())
    return path


def test_a_checkpoint_comes_back_bit_for_bit(saved):
    assert_same(read_checkpoint(saved), make_checkpoint())


def test_a_checkpoint_is_an_ordinary_safetensors_file_with_ordinary_permissions(saved, tmp_path):
    tensors = load_file(saved)
    assert set(tensors) == {
        f"{prefix}{name}"
        for name in ("token_embed", "blocks.0.w_q", "norm_final_gamma")
        for prefix in ("", "adamw.m.", "adamw.v.")
    }
    (tmp_path / "other").touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


def test_transposed_arrays_are_saved_as_they_look(tmp_path):
    checkpoint = make_checkpoint()
    for arrays in (checkpoint.parameters, *checkpoint.moments.values()):
        arrays["token_embed"] = np.asfortranarray(arrays["token_embed"])
    write_checkpoint(tmp_path / "c", checkpoint)
    assert_same(read_checkpoint(tmp_path / "c"), make_checkpoint())


def load_or_bad_file(path, data):
    """What a reader must do with any bytes: load the same checkpoint, or raise BadFileError that names the file."""
    path.write_bytes(data)
    try:
        loaded = read_checkpoint(path)
    except BadFileError as error:
        assert str(path) in str(error)
        return False
    assert_same(loaded, make_checkpoint())
    return True


def test_every_truncation_is_noticed(saved):
    data = saved.read_bytes()
    lengths = {*range(0, len(data), 5), *range(20), *range(len(data) - 20, len(data))}
    assert not any(load_or_bad_file(saved, data[:length]) for length in sorted(lengths))
    assert not load_or_bad_file(saved, data + b"\0")
    assert load_or_bad_file(saved, data)


def test_every_flipped_bit_is_noticed_or_harmless(saved):
    data = saved.read_bytes()
    bits = sorted(random.Random(0).sample(range(8 * len(data)), 1200)) + list(range(64))
    noticed = 0
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        noticed += not load_or_bad_file(saved, bytes(flipped))
    assert noticed > 0.9 * len(bits)  # harmless are only the blanks and the escapes of the JSON header


@given(st.binary(max_size=300))
@settings(max_examples=200)
def test_any_bytes_are_an_error_and_no_crash(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(data)
    with pytest.raises(BadFileError):
        read_checkpoint(path)


def test_a_header_that_claims_gigabytes_is_refused_at_once(tmp_path):
    path = tmp_path / "file"
    for length in (2**63, 2**40, 100):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(BadFileError, match="header"):
            read_checkpoint(path)
    header = b'{"a":{"dtype":"F32","shape":[1073741824,1073741824],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(BadFileError):
        read_checkpoint(path)


def rewritten(path, change_tensors=lambda tensors: None, change_metadata=lambda metadata: None):
    """Write a checkpoint that somebody has edited, with a checksum that fits it."""
    from safetensors import safe_open

    from toy.files.checkpoints import _checksum

    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change_tensors(tensors)
    change_metadata(metadata)
    if {"format", "step", "config"} <= metadata.keys() and "sha256" in metadata:
        metadata["sha256"] = _checksum(metadata, {n: a.shape for n, a in tensors.items()}, tensors.__getitem__)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("adamw.m.token_embed"), "adamw.m.token_embed has shape None"),
        (lambda t: t.pop("token_embed"), "token_embed"),
        (lambda t: t.update({"adamw.x.token_embed": t["token_embed"]}), "adamw.x.token_embed"),
        (lambda t: t.update({"adamw.v.token_embed": t["token_embed"].T.copy()}), r"shape \(2, 3\), expected \(3, 2\)"),
        (lambda t: t.update(token_embed=t["token_embed"].astype(np.float64)), "F64, expected F32"),
        (lambda t: t["token_embed"].fill(np.nan), "token_embed holds numbers that are not finite"),
        (lambda t: t["adamw.v.token_embed"].fill(-1), "negative"),
        (lambda t: t.clear(), "no parameters"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, change, problem):
    rewritten(saved, change_tensors=change)
    with pytest.raises(BadFileError, match=problem):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.clear(), "not a checkpoint of toy"),
        (lambda m: m.update(format="other"), "not a checkpoint of toy"),
        (lambda m: m.pop("sha256"), "no sha256"),
        (lambda m: m.update(step="-1"), "step is '-1'"),
        (lambda m: m.update(step="9" * 99), "step is"),
        (lambda m: m.update(config="{"), "config is not JSON"),
        (lambda m: m.update(config="[" * 100_000), "config is not JSON"),
        (lambda m: m.update(config="[]"), "config is not a JSON object"),
    ],
)
def test_metadata_that_does_not_fit_is_named(saved, change, problem):
    rewritten(saved, change_metadata=change)
    with pytest.raises(BadFileError, match=problem):
        read_checkpoint(saved)


def test_a_checkpoint_that_is_not_there_and_one_that_is_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(BadFileError):
        read_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# events
# ----------------------------------------------------------------------------------------------------------------------


def step_event(step):
    return Step(step=step, loss=4.0 - 0.1 * step, lr=1e-3, grad_norm=1.0, tokens=64, wall_us=1000)


def write_events(path, *events):
    log = EventLog(path)
    for event in events:
        log.write(event)
    log.sync()
    log.close()


def test_events_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "events.jsonl"
    events = [
        RunStart(step=0, steps=2, arch="gpt2", n_parameters=1, vocab_size=3, backend="numpy", device="cpu", seed=0),
        step_event(1),
        Evaluation(step=1, loss=3.5),
        Sample(step=1, text='ä "quoted"\n\x1b[0m'),
        RunEnd(reason="completed", final_step=1, final_loss=3.9),
    ]
    write_events(path, *events)
    assert read_events(path) == [event.to_json() for event in events]
    assert [event["kind"] for event in read_events(path)] == ["run_start", "step", "eval", "sample", "run_end"]
    assert all(event["t"] > 1.7e9 for event in read_events(path))


def test_a_torn_last_line_is_left_out_wherever_it_was_torn(tmp_path):
    path = tmp_path / "events.jsonl"
    write_events(path, step_event(1), step_event(2))
    data = path.read_bytes()
    start_of_last = data.index(b"\n") + 1
    for end in range(start_of_last, len(data)):
        path.write_bytes(data[:end])
        assert [event["step"] for event in read_events(path)] == [1]
    path.write_bytes(data[:start_of_last] + b"\0" * 50 + b"\n")  # what some file systems leave after a power cut
    assert [event["step"] for event in read_events(path)] == [1]


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"kind": 1}', b'{"kind":"step","step":1}', b"\xff", b"", b"[" * 100_000]
)
def test_any_other_bad_line_is_an_error_with_its_number(tmp_path, line):
    path = tmp_path / "events.jsonl"
    write_events(path, step_event(1))
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(BadFileError, match=r"events\.jsonl: line 2 is not an event"):
        read_events(path)


def test_numbers_that_are_not_finite_are_refused_when_read_and_when_written(tmp_path):
    path = tmp_path / "events.jsonl"
    with pytest.raises(ValueError):
        write_events(path, Evaluation(step=1, loss=float("nan")))
    path.write_text('{"kind":"eval","step":1,"loss":NaN}\n{"kind":"eval","step":1,"loss":1}\n')
    with pytest.raises(BadFileError, match="line 1"):
        read_events(path)


def test_a_log_is_cut_back_to_a_step(tmp_path):
    path = tmp_path / "events.jsonl"
    end = RunEnd(reason="interrupted", final_step=3, final_loss=1.0)
    write_events(path, step_event(1), Evaluation(step=1, loss=1), step_event(2), step_event(3), end)
    path.write_bytes(path.read_bytes() + b'{"kind": "st')
    kept = keep_until(path, 2)
    assert [(event["kind"], event["step"]) for event in kept] == [("step", 1), ("eval", 1), ("step", 2)]
    assert read_events(path) == kept


# ----------------------------------------------------------------------------------------------------------------------
# run directories
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_newest_checkpoints(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    assert run.read_checkpoint() is None
    for step in (2, 10, 9, 11):
        run.write_checkpoint(make_checkpoint(step), keep=2)
    assert sorted(os.listdir(run.weights)) == ["latest", "step_10.safetensors", "step_11.safetensors"]
    again = Run.open(tmp_path / "run")
    assert again.config == run.config
    assert again.latest_checkpoint().name == "step_11.safetensors"
    assert_same(again.read_checkpoint(), make_checkpoint(11))


def test_a_checkpoint_in_use_elsewhere_stays_until_the_next_save(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", CONFIG)
    run.write_checkpoint(make_checkpoint(1), keep=1)
    with monkeypatch.context() as patch:
        refused = []

        def unlink(path, missing_ok=False):
            refused.append(path.name)
            raise in_use()

        patch.setattr(Path, "unlink", unlink)
        run.write_checkpoint(make_checkpoint(2), keep=1)
        assert refused and run.latest_checkpoint().name == "step_2.safetensors"
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: (_ for _ in ()).throw(PermissionError(13, "no")))
        with pytest.raises(PermissionError):  # not Windows' word for a file in use
            run.write_checkpoint(make_checkpoint(3), keep=1)
    run.write_checkpoint(make_checkpoint(4), keep=1)
    assert sorted(os.listdir(run.weights)) == ["latest", "step_4.safetensors"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    other = make_checkpoint(3)._replace(config={**CONFIG, "model": {"vocab_size": 4}})
    run.write_checkpoint(other, keep=2)
    with pytest.raises(BadFileError, match="not of this run: its model"):
        run.read_checkpoint()


@pytest.mark.filterwarnings("ignore::toy.files.RunWarning")
def test_a_damaged_checkpoint_is_named_together_with_the_way_out(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    run.write_checkpoint(make_checkpoint(1), keep=2)
    newest = run.write_checkpoint(make_checkpoint(2), keep=2)
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(BadFileError, match=r"step_2\.safetensors.*step_1\.safetensors write that name into.*latest"):
        run.read_checkpoint()
    (run.weights / "latest").write_text("step_1.safetensors\n")
    assert_same(run.read_checkpoint(), make_checkpoint(1))
    newest.unlink()
    (run.weights / "latest").write_text("step_2.safetensors\n")
    with pytest.raises(BadFileError, match="is missing"):
        run.read_checkpoint()


def test_latest_can_only_name_a_checkpoint_of_the_run(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    run.write_checkpoint(make_checkpoint(1), keep=2)
    (run.weights / "latest").write_text("../../elsewhere.safetensors")
    with pytest.raises(BadFileError, match="latest"):
        run.read_checkpoint()
    (run.weights / "latest").unlink()
    assert_same(run.read_checkpoint(), make_checkpoint(1))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "toy-run-9"}', "[" * 100_000])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadFileError, match=r"config\.json"):
        Run.open(tmp_path)


def test_what_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(BadFileError, match="no such run directory"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(BadFileError, match=r"no config\.json"):
        Run.open(tmp_path)


def test_a_new_run_takes_a_new_or_an_empty_directory_only(tmp_path):
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not empty"):
        check_new_folder(tmp_path)
    with pytest.raises(ValueError, match="not a directory"):
        check_new_folder(tmp_path / "file")
    with pytest.raises(ValueError, match=r"cannot be (made|used)"):
        check_new_folder(tmp_path / "file" / "run")


def test_rewinding_forgets_what_came_later_and_what_a_killed_process_left(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    run.write_checkpoint(make_checkpoint(1), keep=5)
    run.write_checkpoint(make_checkpoint(2), keep=5)
    write_events(run.events_path, step_event(1), Sample(step=1, text="one"), step_event(2), Sample(step=2, text="two"))
    run.append_sample(2, "two")
    (run.weights / ".step_3.safetensors.0a1b2c3d.tmp").write_text("half")
    run.rewind(1)
    assert sorted(os.listdir(run.weights)) == ["latest", "step_1.safetensors"]
    assert run.samples_path.read_text() == "--- step 1 ---\none\n\n"
    assert [event["kind"] for event in read_events(run.events_path)] == ["step", "sample"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_processes_cannot_train_in_one_directory(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    with run.lock(), pytest.raises(BlockingIOError, match="another process"), Run.open(tmp_path / "run").lock():
        pass
    with run.lock():
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.filterwarnings("ignore::toy.files.RunWarning")
def test_sigkill_while_saving_leaves_the_old_or_the_new_checkpoint(tmp_path):
    """A process saves as fast as it can and is killed at random moments: what `latest` names is always whole."""
    run = Run.create(tmp_path / "run", CONFIG)
    program = "\n".join(
        (
            "import sys, numpy as np",
            "from toy.files import Checkpoint, Run",
            f"CONFIG = {CONFIG!r}",
            inspect.getsource(make_checkpoint),
            "run = Run.open(sys.argv[1])",
            "start = (run.read_checkpoint() or make_checkpoint(0)).step",
            "for step in range(start + 1, 10**9):",
            "    run.write_checkpoint(make_checkpoint(step), keep=2)",
            "    print(step, flush=True)",
        )
    )
    rng, last = random.Random(0), 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", program, run.folder], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        try:
            seen = int(process.stdout.readline())
            killer = threading.Timer(rng.uniform(0, 0.1), process.kill)
            killer.start()
            for line in process.stdout:
                seen = int(line) if line.endswith("\n") else seen
            killer.join()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        checkpoint = run.read_checkpoint()
        assert seen - 1 <= checkpoint.step - 1 <= seen  # the one that was told last, or the one after it
        assert checkpoint.step > last
        assert_same(checkpoint, make_checkpoint(checkpoint.step))
        last = checkpoint.step
    run.rewind(last)
    assert not [name for name in os.listdir(run.weights) if name.endswith(".tmp")]


def test_config_json_is_json_and_says_its_format(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    assert json.loads(run.config_path.read_text()) == {"format": "toy-run-1", **CONFIG}
