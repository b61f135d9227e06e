"""What happens in a run, as small records, and events.jsonl: one of them a line, as a JSON object with `kind` and `t`."""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from toy.files.atomic import StrPath, write_text
from toy.files.errors import BadFileError


@dataclass(frozen=True, kw_only=True)
class Event:
    """t: seconds since 1970 (UTC)."""

    kind: ClassVar[str]
    t: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class RunStart(Event):
    """The run begins, or goes on after `step` steps. The choices that were made, for a reader of the log."""

    kind = "run_start"
    step: int
    steps: int
    arch: str
    n_parameters: int
    vocab_size: int
    backend: str
    device: str
    seed: int
    resumed: bool = False


@dataclass(frozen=True, kw_only=True)
class Step(Event):
    """After update number `step` (counted from 1).

    loss: of the batch before the update, nats per token. lr: the rate of the update. grad_norm: before clipping.
    tokens, wall_us: of this step alone, so sums of them are the totals.
    """

    kind = "step"
    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    wall_us: int


@dataclass(frozen=True, kw_only=True)
class Evaluation(Event):
    """loss: mean over the validation part after `step` updates, nats per token or image. accuracy: of a classifier, the share
    of the validation part that it gets right."""

    kind = "eval"
    step: int
    loss: float
    accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        fields = super().to_json()
        if self.accuracy is None:
            del fields["accuracy"]
        return fields


@dataclass(frozen=True, kw_only=True)
class Sample(Event):
    """text: what the model writes after `step` updates."""

    kind = "sample"
    step: int
    text: str


@dataclass(frozen=True, kw_only=True)
class RunEnd(Event):
    """reason: "completed", "interrupted", "patience" (no better validation loss for so long) or "diverged". final_loss: of
    the last step, None without a finite one."""

    kind = "run_end"
    reason: str
    final_step: int
    final_loss: float | None


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would write every newline as two bytes


class EventLog:
    """Appends events to a file, one line each. Every line reaches the operating system at once; `sync` reaches the disk."""

    def __init__(self, path: StrPath) -> None:
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o666)

    def write(self, event: Event) -> None:
        """Raises OSError, naming the file, when the line cannot be written whole; readers leave out what is torn then."""
        line = (json.dumps(event.to_json(), allow_nan=False) + "\n").encode()
        try:
            while line:
                line = line[os.write(self._handle, line) :]
        except OSError as error:
            raise OSError(f"cannot write {self._path}: {error.strerror}") from error

    def sync(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def read_events(path: StrPath) -> list[dict[str, Any]]:
    """The events of a file, as a list of dicts. A torn last line (the run was killed while writing it) is left out.

    Raises BadFileError for any other line that is not an event.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BadFileError(path, f"cannot be read: {error.strerror or error}") from error
    lines.pop()  # after the last newline: nothing, or a line that was not finished
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(_checked(json.loads(line)))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise BadFileError(path, f"line {number} is not an event ({error})") from error
    return events


def keep_until(path: StrPath, step: int) -> list[dict[str, Any]]:
    """Rewrite the log so that it ends at `step`: what a resumed run will do again is dropped, and so is a torn line.

    The log then reads as if the run had been stopped right after the checkpoint of that step. Returns the events kept.
    """
    events = [event for event in read_events(path) if event.get("final_step", event.get("step", 0)) <= step]
    write_text(path, "".join(json.dumps(event, allow_nan=False) + "\n" for event in events))
    return events


_FIELDS: dict[str, dict[str, Any]] = {  # what a reader may rely on, by kind
    "run_start": {},
    "step": {"step": int, "loss": float, "tokens": int, "wall_us": int},
    "eval": {"step": int, "loss": float},
    "sample": {"step": int, "text": str},
    "run_end": {"reason": str, "final_step": int},
}


def _checked(event: Any) -> dict[str, Any]:
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        raise ValueError("no JSON object with a kind")
    for name, kind in _FIELDS.get(event["kind"], {}).items():
        value = event.get(name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = event[name] = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{event['kind']} event with {name} = {value!r}")
    return event
