"""What there is to say about runs side by side, out of config.json and events.jsonl alone: no weights are read."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy.files.atomic import StrPath
from toy.files.errors import BadFileError
from toy.files.events import read_events
from toy.files.lock import is_held
from toy.files.runs import FORMAT, Run

STATES = ("done", "stopped", "diverged", "running", "killed")
_LATEST = 253402300800  # seconds: the year 10000, beyond which no calendar here goes
_DEEPEST = 4  # folders below the one that was named
_REASONS = {"completed": "done", "patience": "done", "interrupted": "stopped", "diverged": "diverged"}


@dataclass
class Summary:
    """One run. problem: what is damaged, in words, and everything else is None or empty then; None of a sound run.

    name: of its folder. started: of the run, seconds since 1970 (UTC). state: one of STATES; killed: it has no end and no
    process trains in it. steps: done; total_steps: asked for. loss: of the last step. best_loss, best_step: of the validation
    with the lowest loss; accuracy: there, of a classifier. per_second: tokens (images: `unit`) a second of training steps.
    options: the run's, with the backend that it really ran on.
    """

    folder: Path
    problem: str | None = None
    recipe: str | None = None
    arch: str | None = None
    n_parameters: int | None = None
    state: str | None = None
    started: float | None = None
    steps: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    accuracy: float | None = None
    per_second: float | None = None
    unit: str = "token"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.resolve().name


def summary_of(folder: StrPath) -> Summary:
    """The `Summary` of a run directory. A damaged one is no error: its `problem` says what is wrong."""
    folder = Path(folder)
    try:
        run = Run.open(folder)
        events = read_events(run.events_path) if run.events_path.exists() else []
        return _summary(run, events)
    except BadFileError as error:
        return Summary(folder, problem=str(error))
    except OSError as error:
        return Summary(folder, problem=f"{folder} cannot be read: {error.strerror or error}")


def _summary(run: Run, events: list[dict[str, Any]]) -> Summary:
    steps = [event for event in events if event["kind"] == "step"]
    best = min((event for event in events if event["kind"] == "eval"), key=lambda e: e["loss"], default=None)
    starts = [event for event in events if event["kind"] == "run_start"]
    try:
        options, config = dict(run.config["training"]), run.config
        total_steps, model = int(options["steps"]), dict(config["model"])
        options["backend"] = dict(config.get("backend") or {}).get("name", options.get("backend"))
    except (KeyError, TypeError, ValueError) as error:
        raise BadFileError(run.config_path, f"does not say what its options and its model are ({error!r})") from error
    n_parameters, started = config.get("n_parameters"), starts[0].get("t") if starts else None
    if not (isinstance(started, (int, float)) and 0 <= started < _LATEST):
        started = run.config_path.stat().st_mtime
    seconds = sum(event["wall_us"] for event in steps) / 1e6
    return Summary(
        run.folder,
        recipe=str(config.get("recipe", "from-scratch")),
        arch=str(config.get("arch")),
        n_parameters=n_parameters if isinstance(n_parameters, int) else None,
        state=state_of(run.folder, events),
        started=started,
        steps=steps[-1]["step"] if steps else 0,
        total_steps=total_steps,
        loss=steps[-1]["loss"] if steps else None,
        best_loss=best["loss"] if best else None,
        best_step=best["step"] if best else None,
        accuracy=best.get("accuracy") if best else None,
        per_second=sum(event["tokens"] for event in steps) / seconds if seconds > 0 else None,
        unit="token" if "vocab_size" in model else "image",
        options=options,
    )


def state_of(folder: StrPath, events: list[dict[str, Any]]) -> str:
    """One of STATES: how the run in this folder with these events stands."""
    ends = [event for event in events if event["kind"] in ("run_start", "run_end")]
    if ends and ends[-1]["kind"] == "run_end":
        return _REASONS.get(ends[-1]["reason"], "stopped")
    return "running" if is_held(folder) else "killed"


def find_runs(folders: Iterable[StrPath]) -> list[Path]:
    """The run directories among the folders and below them, damaged ones too, each once, in the order of their paths.

    Raises FileNotFoundError for a folder that is not there, NotADirectoryError for a file.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.exists():
            raise FileNotFoundError(f"there is no folder {folder}: toy train writes runs into runs/")
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder: name a run, or a folder with runs in it")
        for path in _runs_in(folder, _DEEPEST):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _runs_in(folder: Path, deep: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif deep:
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
        except OSError:
            return
        for name in names:
            if not name.startswith("."):
                yield from _runs_in(folder / name, deep - 1)


def _is_run(folder: Path) -> bool:
    """Whether a folder is, or was, a run: one that lost its config.json or has a broken one is told by its log."""
    if (folder / "events.jsonl").exists():
        return True
    config = folder / "config.json"
    if not config.is_file():
        return False
    try:
        with open(config, "rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(4096)
    except OSError:
        return (folder / "weights").is_dir()


def differing(summaries: Iterable[Summary], leave_out: Iterable[str] = ()) -> list[dict[str, Any]]:
    """For each summary the options that are not the same in all of them that have them, a dict of names to values."""
    sound = [summary.options for summary in summaries]
    names = dict.fromkeys(name for options in sound for name in options)
    told = [
        name
        for name in names
        if name not in set(leave_out) and len({repr(options[name]) for options in sound if name in options}) > 1
    ]
    return [{name: options[name] for name in told if name in options} for options in sound]
