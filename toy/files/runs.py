"""The directory of a run: config.json, events.jsonl, samples.txt, loss.png, weights/step_<N>.safetensors, weights/latest and
weights/best, which name one of them, and weights/step_<N>.gguf where llama.cpp has the architecture."""

import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from toy.files import checkpoints, events
from toy.files.atomic import StrPath, remove_leftovers, unless_in_use, write_text
from toy.files.errors import BadFileError
from toy.files.lock import only_process

FORMAT = "toy-run-1"
_CHECKPOINT_NAME = re.compile(r"step_(\d{1,15})\.safetensors")
_GGUF_NAME = re.compile(r"step_(\d{1,15})\.gguf")


class Run:
    """The files of one run. `Run.create` makes the directory, `Run.open` takes one that is there."""

    def __init__(self, folder: StrPath, config: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.config = config

    @classmethod
    def create(cls, folder: StrPath, config: dict[str, Any]) -> "Run":
        """Make the directory and write its config.json. Raises ValueError as `check_new_folder` does, and OSError."""
        check_new_folder(folder)
        run = cls(folder, {"format": FORMAT, **config})
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make directory {run.folder}: {error.strerror or error}") from error
        try:
            run.write_config()  # the first file: from here on the run can be resumed
        except OSError:
            run.folder.rmdir()
            raise
        run.weights.mkdir()
        return run

    @classmethod
    def open(cls, folder: StrPath) -> "Run":
        """Raises BadFileError when the directory or its config.json is not that of a run."""
        folder = Path(folder)
        if not folder.is_dir():
            raise BadFileError(folder, "there is no such run directory")
        path = folder / "config.json"
        try:
            config = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise BadFileError(folder, "is not a run directory: it has no config.json") from None
        except OSError as error:
            raise BadFileError(path, f"cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise BadFileError(path, f"is not JSON ({error})") from error
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise BadFileError(path, f"is not the config of a run (format {FORMAT!r} expected)")
        return cls(folder, config)

    @property
    def config_path(self) -> Path:
        return self.folder / "config.json"

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.folder / "samples.txt"

    @property
    def picture_path(self) -> Path:
        return self.folder / "loss.png"

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    def write_config(self) -> None:
        write_text(self.config_path, json.dumps(self.config, indent=2) + "\n")

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def latest_checkpoint(self) -> Path | None:
        """The path that weights/latest names, None before the first checkpoint. Raises BadFileError for a strange name.

        Without weights/latest (killed before it was first written) it is the newest one there is.
        """
        return self._named("latest") or max(self._checkpoints(), default=(0, None))[1]

    def best_checkpoint(self) -> Path | None:
        """The path that weights/best names, the one with the lowest validation loss; None where there is none. Raises as
        `latest_checkpoint`."""
        return self._named("best")

    def find_checkpoint(self, which: str | int = "last") -> Path | None:
        """The path of a checkpoint. which: "last", "best", or a step (a number, or its digits).

        None before the first checkpoint. Raises ValueError for one that is not there, naming those there are.
        """
        if which == "last":
            return self.latest_checkpoint()
        there = {step: path for step, path in self._checkpoints()}
        if not there:
            return None
        steps = ", ".join(map(str, sorted(there)))
        if which == "best":
            if (path := self.best_checkpoint()) is None:
                raise ValueError(
                    f"the run in {self.folder} has no best checkpoint, because nothing was validated after a step: "
                    f"choose last or one of the steps {steps}"
                )
            return path
        if not str(which).isascii() or not str(which).isdigit():
            raise ValueError(f"checkpoint must be best, last or a step, got {which!r}; there are the steps {steps}")
        if int(which) not in there:
            raise ValueError(f"the run in {self.folder} has no checkpoint of step {which}, there are {steps}")
        return there[int(which)]

    def _named(self, pointer: str) -> Path | None:
        """The checkpoint that the file weights/<pointer> names, None where there is no such file."""
        file = self.weights / pointer
        try:
            name = file.read_bytes()[:100].decode("ascii", errors="replace").strip()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadFileError(file, f"cannot be read: {error.strerror or error}") from error
        if not _CHECKPOINT_NAME.fullmatch(name):
            raise BadFileError(file, f"names {name!r}, expected step_<N>.safetensors{self._others(None)}")
        return self.weights / name

    def mark_best(self, step: int, keep: int) -> None:
        """Let weights/best name the checkpoint of this step, which is there, then delete all but it and the newest `keep`."""
        write_text(self.weights / "best", f"step_{step}.safetensors\n")
        self._delete_old(keep)

    def read_checkpoint(self, which: str | int = "last") -> checkpoints.Checkpoint | None:
        """A `Checkpoint`, see `find_checkpoint`; or None before the first one.

        Raises BadFileError when it is damaged or gone (the message names the others there are), or is not of this run.
        """
        path = self.find_checkpoint(which)
        if path is None:
            return None
        try:
            checkpoint = checkpoints.read_checkpoint(path)
        except FileNotFoundError:
            pointer = "best" if which == "best" else "latest"
            raise BadFileError(path, f"is missing, but weights/{pointer} names it{self._others(path)}") from None
        except BadFileError as error:
            raise BadFileError(path, f"{error.problem}{self._others(path)}") from error
        for name in ("arch", "model", "tokenizer"):
            if checkpoint.config.get(name) != self.config.get(name):
                raise BadFileError(path, f"is not of this run: its {name} is not the one in config.json")
        return checkpoint

    def write_checkpoint(
        self, checkpoint: checkpoints.Checkpoint, keep: int, write_gguf: Callable[[Path], None] | None = None
    ) -> Path:
        """Write the checkpoint, then let weights/latest name it, then delete all but the newest `keep` and the best one.

        In this order a kill at any moment leaves `latest` naming a whole file. write_gguf: function of a path that writes the
        same weights as a GGUF file; it gets the checkpoint's name with .gguf, and goes when the checkpoint does.
        """
        path = self.weights / f"step_{checkpoint.step}.safetensors"
        if write_gguf is not None:
            write_gguf(path.with_suffix(".gguf"))
        checkpoints.write_checkpoint(path, checkpoint)
        write_text(self.weights / "latest", path.name + "\n")
        self._delete_old(keep)
        return path

    def _delete_old(self, keep: int) -> None:
        wanted = {self.latest_checkpoint(), self.best_checkpoint()}
        for _, old in sorted(self._checkpoints(), reverse=True)[keep:]:
            if old not in wanted:
                with unless_in_use():
                    _remove(old)

    def has_checkpoint(self, step: int) -> bool:
        """Whether there is a checkpoint of this step."""
        return (self.weights / f"step_{step}.safetensors").exists()

    def _checkpoints(self) -> list[tuple[int, Path]]:
        found = ((_CHECKPOINT_NAME.fullmatch(path.name), path) for path in self.weights.glob("step_*.safetensors"))
        return [(int(match[1]), path) for match, path in found if match]

    def _others(self, path: Path | None) -> str:
        names = [other.name for _, other in sorted(self._checkpoints()) if other != path]
        return f"; to go on from {' or '.join(names)} write that name into {self.weights / 'latest'}" if names else ""

    # -- going on -----------------------------------------------------------------------------------------------------

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Make the directory what it was when the checkpoint of `step` was written (0: before the first step).

        Later events, samples and checkpoints go, and so do leftovers of a killed process. Returns the events kept.
        """
        for folder in (self.folder, self.weights):
            remove_leftovers(folder)
        self.weights.mkdir(exist_ok=True)
        best = self.best_checkpoint()
        for later, path in self._checkpoints():
            if later > step:
                if path == best:
                    (self.weights / "best").unlink()  # the loop finds another one among the events that are kept
                _remove(path)
        for path in self.weights.glob("step_*.gguf"):  # killed, or the disk full, before its checkpoint was written
            match = _GGUF_NAME.fullmatch(path.name)
            if match and int(match[1]) > step:
                path.unlink()
        kept = events.keep_until(self.events_path, step if step > 0 else -1) if self.events_path.exists() else []
        write_text(self.samples_path, "".join(sample_text(e["step"], e["text"]) for e in kept if e["kind"] == "sample"))
        return kept

    def append_sample(self, step: int, text: str) -> None:
        try:
            with open(self.samples_path, "a", encoding="utf-8", newline="\n") as file:
                file.write(sample_text(step, text))
        except OSError as error:
            raise OSError(f"cannot write {self.samples_path}: {error.strerror or error}") from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from training in this directory. Raises BlockingIOError when one already does."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(only_process(self.folder))
            except BlockingIOError:
                raise BlockingIOError(f"another process is training in {self.folder}: wait for it or stop it") from None
            yield


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint and, first, the GGUF file beside it: one alone would never be found again."""
    checkpoint.with_suffix(".gguf").unlink(missing_ok=True)
    checkpoint.unlink(missing_ok=True)


def check_new_folder(folder: StrPath) -> None:
    """Raise ValueError unless a run can be started in `folder`: it is not there yet or empty, and can be made."""
    folder = Path(folder)
    try:
        if folder.is_dir():
            if any(folder.iterdir()):
                raise ValueError(f"output directory {str(folder)!r} exists and is not empty: choose another one")
        elif folder.exists() or folder.is_symlink():
            raise ValueError(f"output directory {str(folder)!r} exists and is not a directory: choose another one")
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    except OSError as error:
        raise ValueError(f"output directory {str(folder)!r} cannot be used: {error.strerror or error}") from error
    if not parent.is_dir():
        raise ValueError(f"output directory {str(folder)!r} cannot be made: {str(parent)!r} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"output directory {str(folder)!r} cannot be made: no permission to write in {str(parent)!r}")


def new_folder(name: str, parent: StrPath = "runs") -> Path:
    """A path for a new run: runs/<date>-<time>-<name>-<four random digits>, so that two never meet."""
    return Path(parent) / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(2)}"


def sample_text(step: int, text: str) -> str:
    """One entry of samples.txt."""
    return f"--- step {step} ---\n{text}\n\n"
