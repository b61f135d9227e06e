"""toy runs: what is told of runs side by side, out of their config and their events alone."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

from toy.cli import runs as cli_runs
from toy.files import Run
from toy.files.events import Evaluation, EventLog, RunEnd, RunStart, Step
from toy.files.lock import only_process
from toy.files.summaries import find_runs, summary_of

NOW = 1_790_000_000.0


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: NOW)


def make(
    name,
    n_steps=4,
    total=4,
    losses=(3.0, 2.5, 2.75),
    reason="completed",
    ago=100.0,
    image=False,
    **options,
):
    """A run whose validations (every other step) have these losses, and 100 tokens a step of 10 ms."""
    training = {"steps": total, "lr": 0.001, "batch": 12, "corpus": None, "eval_every": 2, **options}
    config = {
        "recipe": "vit-tiny" if image else "from-scratch", "arch": "llama", "n_parameters": 12_345, "training": training,
        "model": {"n_classes": 10} if image else {"vocab_size": 65}, "backend": {"name": "cython"},
    }  # fmt: skip
    run = Run.create(Path("runs") / name, config)
    log = EventLog(run.events_path)
    known = dict(arch="llama", n_parameters=1, vocab_size=65, backend="x", device="cpu", seed=0)
    log.write(RunStart(t=NOW - ago, step=0, steps=total, **known))
    validations = iter(losses)
    for step in range(n_steps + 1):
        if step:
            log.write(Step(step=step, loss=5 - step / 10, lr=1e-3, grad_norm=1.0, tokens=100, wall_us=10_000))
        if step % 2 == 0 and (loss := next(validations, None)) is not None:
            log.write(Evaluation(step=step, loss=loss, accuracy=0.5 + step / 10 if image else None))
    if reason:
        log.write(RunEnd(reason=reason, final_step=n_steps, final_loss=1.0))
    log.close()
    return run.folder


def listed(toy_command, *arguments):
    code, out, err = toy_command("runs", *arguments, "--json")
    assert (code, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


def test_one_object_a_run_with_everything(toy_command):
    make("one", lr=0.003)
    make("two", ago=50.0)
    first, second = listed(toy_command)
    assert (first["run"], second["run"]) == ("one", "two")
    options = first.pop("options")
    assert options == {"steps": 4, "lr": 0.003, "batch": 12, "corpus": None, "eval_every": 2, "backend": "cython"}
    assert first == {
        "run": "one", "path": "runs/one", "problem": None, "started": "2026-09-21T14:11:40+00:00", "state": "done",
        "recipe": "from-scratch", "arch": "llama", "n_parameters": 12345, "steps": 4, "total_steps": 4, "loss": 4.6,
        "best_loss": 2.5, "best_step": 2, "accuracy": None, "per_second": 10_000.0, "unit": "token", "differs": {"lr": 0.003},
    }  # fmt: skip
    assert second["differs"] == {"lr": 0.001}


def test_the_state_of_a_run(toy_command):
    make("done")
    make("early", 3, 9, reason="patience")
    make("stopped", 3, 9, reason="interrupted")
    make("diverged", 3, 9, reason="diverged")
    make("killed", 3, 9, reason=None)
    busy = make("running", 3, 9, reason=None)
    Run.create("runs/new", {"training": {"steps": 5}, "model": {"n_classes": 3}})
    with only_process(busy):
        states = {record["run"]: record["state"] for record in listed(toy_command)}
    wanted = {name: name for name in ("done", "stopped", "diverged", "killed", "running")}
    assert states == wanted | {"new": "killed", "early": "done"}
    new = next(record for record in listed(toy_command) if record["run"] == "new")
    assert (new["steps"], new["best_loss"], new["per_second"], new["unit"]) == (0, None, None, "image")


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("when", ["c", "a", "b"]),
        ("run", ["a", "b", "c"]),
        ("best", ["b", "c", "a"]),
        ("steps", ["b", "a", "c"]),
        ("model", ["a", "b", "c"]),
        ("recipe", ["a", "c", "b"]),
        ("speed", ["a", "b", "c"]),
    ],
)
def test_sorting_by_a_column(toy_command, column, order):
    make("a", 4, losses=(3.0,), ago=50.0)
    make("b", 2, 2, losses=(2.0,), ago=10.0, image=True)
    make("c", 6, 6, losses=(2.5,), ago=90.0)
    (make("none", 0, 6, losses=()) / "events.jsonl").unlink()
    names = [record["run"] for record in listed(toy_command, f"--sort={column}") if record["run"] != "none"]
    assert names == order
    turned = [
        record["run"] for record in listed(toy_command, f"--sort={column}", "--reverse") if record["run"] != "none"
    ]
    assert turned == order[::-1]
    if column in ("best", "speed"):  # without one
        for more in ([], ["--reverse"]):
            assert listed(toy_command, f"--sort={column}", *more)[-1]["run"] == "none"


BREAK = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config cut off": (lambda folder: cut(folder / "config.json"), "is not JSON"),
    "config of something else": (
        lambda folder: (folder / "config.json").write_text("{}"),
        "is not the config of a run",
    ),
    "no options": (lambda folder: edit(folder, lambda c: c.pop("training")), "does not say what its options"),
    "options of another kind": (lambda folder: edit(folder, lambda c: c.update(training=[1])), "does not say what"),
    "steps are no number": (
        lambda folder: edit(folder, lambda c: c["training"].update(steps=None)),
        "does not say what",
    ),
    "model gone": (lambda folder: edit(folder, lambda c: c.update(model=None)), "does not say what"),
    "a line in the middle": (lambda folder: garble(folder / "events.jsonl"), "line 3 is not an event"),
    "events are a folder": (
        lambda folder: ((folder / "events.jsonl").unlink(), (folder / "events.jsonl").mkdir()),
        "events",
    ),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def garble(path):
    lines = path.read_bytes().split(b"\n")
    lines[2] = b"garbage"
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize("case", BREAK)
def test_a_damaged_run_is_a_row_and_not_the_end(toy_command, case):
    make("a whole one")
    broken, words = make("broken", lr=0.5), BREAK[case][1]
    assert summary_of(broken).problem is None
    BREAK[case][0](broken)
    whole, damaged = listed(toy_command)
    assert (whole["run"], whole["problem"], whole["differs"]) == ("a whole one", None, {})
    assert damaged["run"] == "broken" and words in damaged["problem"] and "\n" not in damaged["problem"]
    assert damaged["steps"] is damaged["state"] is damaged["best_loss"] is None
    code, out, err = toy_command("runs")
    assert (code, err, len(out.splitlines())) == (0, "", 3)
    assert out.splitlines()[2].startswith("broken       damaged: ") and words in out.splitlines()[2]


def test_a_torn_last_line_is_no_damage(toy_command):
    with open(make("torn", reason=None) / "events.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "st')
    assert [record["problem"] for record in listed(toy_command)] == [None]


@pytest.mark.parametrize("t", ["NaN", "1e300", "-5", '"noon"'])
def test_a_strange_time_is_not_believed(toy_command, t):
    path = make("strange") / "events.jsonl"
    path.write_text(re.sub(r'("t": )[^,}]+', rf"\g<1>{t}", re.sub(r', "crc": "\w+"', "", path.read_text())))
    (record,) = listed(toy_command)
    assert record["problem"] is None and record["started"].startswith("20")
    assert toy_command("runs")[0] == 0


# -- which folders -----------------------------------------------------------------------------------------------------


def test_runs_are_found_where_they_are(toy_command):
    one, two, three = make("one"), make("sweep/a/two"), make(".hidden/three")
    Path("runs/no run").mkdir()
    Path("runs/no run/config.json").write_text('{"model_type": "llama"}')
    Path("runs/notes.txt").write_text("notes")
    Path("runs/link").symlink_to(one.absolute())
    assert find_runs(["runs"]) == [one, two]
    assert find_runs([one, "runs", "runs/../runs/one", two]) == [one, two]  # each once
    assert find_runs([three, "runs/sweep"]) == [three, two]
    assert [record["run"] for record in listed(toy_command, "runs/sweep", one, "--sort=run")] == ["one", "two"]


def test_a_whole_disk_is_not_searched():
    deep, deeper = make("1/2/3/deep"), make("1/2/3/4/deeper")
    assert find_runs(["runs"]) == [deep]
    assert sorted(find_runs(["runs/1"])) == sorted([deep, deeper])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "there is no folder runs: toy train writes runs into runs/"),
        (["nowhere"], "there is no folder nowhere"),
        (["file"], "file is not a folder"),
        (["empty"], "there are no runs in empty"),
        (["--sort=size"], "'size' is not one of"),
    ],
)
def test_no_runs_is_one_sentence(toy_command, arguments, problem):
    Path("file").touch()
    Path("empty").mkdir()
    code, out, err = toy_command("runs", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and problem in err


# -- what differs ------------------------------------------------------------------------------------------------------


def test_only_what_differs_is_told_and_nothing_that_follows_from_it(toy_command):
    make("a", corpus="/long/path/to/poems.txt", lr=0.003)
    make("b", 8, 8, eval_every=3, lr=0.003, targets=["q", "v"], lens=True)
    make("c", image=True, lens=False)
    records = {record["run"]: record["differs"] for record in listed(toy_command)}
    assert records == {
        "a": {"lr": 0.003, "corpus": "/long/path/to/poems.txt"},
        "b": {"lr": 0.003, "corpus": None, "lens": True},
        "c": {"lr": 0.001, "corpus": None, "lens": False},
    }
    lines = toy_command("runs")[1].splitlines()
    assert lines[0].split() == ["run", "when", "recipe", "model", "steps", "best", "speed", "differs"]
    assert [re.split("  +", line)[-1] for line in lines[1:]] == [
        "lr 0.003, corpus poems.txt", "lr 0.003, corpus none, lens yes", "lr 0.001, corpus none, lens no",
    ]  # fmt: skip
    shutil.rmtree("runs")
    make("d", eval_every=3)
    make("e")
    assert [record["differs"] for record in listed(toy_command)] == [{"eval_every": 3}, {"eval_every": 2}]


def test_the_table(toy_command):
    make("one")
    make("two", 2, 9, reason="interrupted", ago=7200.0)
    make("three", image=True, ago=90_000.0)
    code, out, err = toy_command("runs", "--sort=when", "--reverse")
    assert (code, err) == (0, "")
    header, one, two, three = (re.split("  +", line) for line in out.splitlines())
    assert header == ["run", "when", "recipe", "model", "steps", "best", "speed"]  # nothing differs but the steps
    assert one == ["one", "1 min ago", "from-scratch", "llama 12.3k", "4", "2.5000 at 2", "10k tok/s"]
    assert two == ["two", "2 h ago", "from-scratch", "llama 12.3k", "2/9 stopped", "2.5000 at 2", "10k tok/s"]
    assert three == ["three", "1 day ago", "vit-tiny", "llama 12.3k", "4", "2.5000 at 2", "10k img/s"]


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_the_table_fits_a_terminal(toy_command, monkeypatch, columns):
    for i in range(3):
        make(
            f"20261126-20041{i}-from-scratch",
            lr=0.001 * (i + 1),
            corpus=f"/a/text{i}.txt",
            batch=i,
            targets=["q", "up"],
        )
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in toy_command("runs")[1].splitlines()]
    rows = [line for line in lines[1:] if not line.startswith("    ")]
    assert len(rows) == 3
    assert all(len(line) <= max(columns, 80) for line in lines)
    assert all(f"text{i}.txt" in "\n".join(lines) for i in range(3))
    assert ("from-scratch" in lines[1].split("  ")) == (columns == 200)


def test_how_long_ago():
    for seconds, words in (
        (0, "0 s"),
        (-5, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (3600, "1 h"),
        (86400, "1 day"),
        (2e5, "2 days"),
    ):
        assert cli_runs._ago(NOW, NOW - seconds) == f"{words} ago"
    assert re.fullmatch(r"2026-\d\d-\d\d", cli_runs._ago(NOW, NOW - 8 * 86400))


def test_no_weights_are_read(toy_command):
    folder = make("light")
    (folder / "weights" / "step_4.safetensors").write_text("not weights at all")
    (folder / "weights" / "latest").write_text("step_4.safetensors\n")
    assert [record["problem"] for record in listed(toy_command)] == [None]
