"""What happens in a run, as small records, and events.jsonl: one of them a line, as a JSON object with `kind` and `t`.

Every line ends with the CRC-32 of what stands before it (`"crc": "0a1b2c3d"`), because a changed digit is still a number.
Lines without one are read too: logs of older runs, and lines written by hand.
"""

import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from toy.files.atomic import StrPath, write_text
from toy.files.errors import BadFileError
from toy.files.regular import open_regular


@dataclass(frozen=True, kw_only=True)
class Event:
    """t: seconds since 1970 (UTC)."""

    kind: ClassVar[str]
    t: float = field(default_factory=time.time)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class RunStart(Event):
    """The run begins, or goes on after `step` steps. The choices that were made, for a reader of the log.

    bytes_per_token: of text, what a token of the validation stands for on average; None for images.
    """

    kind = "run_start"
    step: int
    steps: int
    arch: str
    n_parameters: int
    vocab_size: int
    backend: str
    device: str
    seed: int
    bytes_per_token: float | None = None
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


@dataclass(frozen=True, kw_only=True)
class Notice(Event):
    """text: a sentence about the training after `step` updates that a user should know."""

    kind = "notice"
    step: int
    text: str


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would write every newline as two bytes


class EventLog:
    """Appends events to a file, one line each. Every line reaches the operating system at once; `sync` reaches the disk."""

    def __init__(self, path: StrPath) -> None:
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _BINARY, 0o666)

    def write(self, event: Event) -> None:
        """Raises OSError, naming the file, when the line cannot be written whole; readers leave out what is torn then."""
        line = _line(event.to_json()).encode()
        try:
            while line:
                line = line[os.write(self._handle, line) :]
        except OSError as error:
            raise OSError(f"cannot write {self._path}: {error.strerror}") from error

    def sync(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


def read_events(path: StrPath, reach: int = 0) -> list[dict[str, Any]]:
    """The events of a file, as a list of dicts. A torn last line (the run was killed while writing it) is left out.

    reach: the step that the log must have come to, the checkpoint's. Raises BadFileError for any other line that is not an
    event or was changed after it was written, for steps that do not follow each other, and for a log that ends too early.
    """
    path = Path(path)
    events: list[dict[str, Any]] = []
    order, checked = _Order(), None  # checked: whether the lines have a CRC, None before the first
    for number, line, is_last in _lines(path):
        try:
            event, has_crc = _read_line(line)
        except (ValueError, OverflowError, RecursionError) as error:
            if is_last:
                break
            raise BadFileError(path, f"line {number} is not an event ({error})") from error
        if checked is not None and checked != has_crc:
            raise BadFileError(path, f"line {number} {'has' if has_crc else 'lacks'} a crc, unlike the lines before it")
        if problem := order.problem(event):
            raise BadFileError(path, f"line {number} {problem}")
        checked = has_crc
        events.append(event)
    if (last := order.step or 0) < reach:
        raise BadFileError(
            path,
            f"ends at step {last}, and there is a checkpoint of step {reach}: its end was lost. To go on without the "
            "curve so far, give the file another name",
        )
    return events


def keep_until(path: StrPath, step: int) -> list[dict[str, Any]]:
    """Rewrite the log so that it ends at `step`: what a resumed run will do again is dropped, and so is a torn line.

    The log then reads as if the run had been stopped right after the checkpoint of that step. Returns the events kept.
    """
    events = [event for event in read_events(path) if event.get("final_step", event.get("step", 0)) <= step]
    write_text(path, "".join(map(_line, events)))
    return events


_LONGEST_LINE = 2**26  # bytes: a sample of millions of characters
_CRC = re.compile(rb', "crc": "([0-9a-f]{8})"\}')


def _line(event: dict[str, Any]) -> str:
    text = json.dumps(event, allow_nan=False)
    return f'{text[:-1]}, "crc": "{zlib.crc32(text.encode()):08x}"}}\n'


def _lines(path: Path) -> Iterable[tuple[int, bytes, bool]]:
    """(number from 1, line without its newline, whether nothing but an unfinished line follows) of every finished line."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise BadFileError(path, "cannot be read: No such file or directory") from None
    with file:
        try:
            number, line = 1, file.readline(_LONGEST_LINE)
            while line.endswith(b"\n"):
                following = file.readline(_LONGEST_LINE)
                yield number, line[:-1], not following.endswith(b"\n")
                number, line = number + 1, following
        except OSError as error:
            raise BadFileError(path, f"cannot be read: {error.strerror or error}") from error
    if len(line) == _LONGEST_LINE:
        raise BadFileError(path, f"line {number} is not an event (it has more than {_LONGEST_LINE:,} bytes)")


_FIELDS: dict[str, dict[str, Any]] = {  # what a reader may rely on, by kind
    "run_start": {"step": int},
    "step": {"step": int, "loss": float, "tokens": int, "wall_us": int},
    "eval": {"step": int, "loss": float},
    "sample": {"step": int, "text": str},
    "notice": {"step": int, "text": str},
    "run_end": {"reason": str, "final_step": int},
}
_LARGEST = {int: 2**40, float: 3.5e38}  # more no step has taken, and float32 does not hold


def _read_line(line: bytes) -> tuple[dict[str, Any], bool]:
    """-> the event, and whether its line has a CRC. Raises ValueError (OverflowError, RecursionError) for what is none."""
    crc = None
    if found := _CRC.fullmatch(line, max(len(line) - 20, 0)):
        line, crc = line[: found.start()] + b"}", int(found[1], 16)
        if crc != zlib.crc32(line):
            raise ValueError("it was changed after it was written: the crc does not match")
    event = _checked(json.loads(line))
    if "crc" in event:
        raise ValueError("its crc is not at its end")
    return event, crc is not None


def _checked(event: Any) -> dict[str, Any]:
    if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
        raise ValueError("no JSON object with a kind")
    for name, kind in _FIELDS.get(event["kind"], {}).items():
        value = event.get(name)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = event[name] = float(value)
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is float and not math.isfinite(value)):
            raise ValueError(f"{event['kind']} event with {name} = {value!r:.60}")
        if (kind is not str and abs(value) > _LARGEST[kind]) or (kind is int and value < 0):
            raise ValueError(f"{event['kind']} event with {name} = {value!r:.60}")
    return event


class _Order:
    """The order of the events of a run: every step follows the one before it, what is found at a step stands after it.

    step: the last one, None before anything. A log may begin at any step: its older part may have been given up.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._evaluated = -1

    def problem(self, event: dict[str, Any]) -> str | None:
        """What is wrong with the next event's place, None when nothing is."""
        kind = event["kind"]
        if kind not in _FIELDS:
            return None
        step: int = event["final_step" if kind == "run_end" else "step"]
        if kind == "step":
            before, self.step = self.step, step
            if (before is not None and step != before + 1) or step < 1:
                return f"is step {step} after step {before or 0}: lines are missing, twice there, or in another order"
            return None
        before, self.step = self.step, step
        if before is not None and step != before:
            return f"is of step {step}, but stands after step {before}: lines are missing, or in another order"
        if kind == "eval":
            if step == self._evaluated:
                return f"is a second validation of step {step}"
            self._evaluated = step
        return None
