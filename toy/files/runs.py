"""The directory of a run: config.json, events.jsonl, samples.txt, loss.png, weights/step_<N>.safetensors, weights/latest and
weights/best, which name one of them, and weights/step_<N>.gguf where llama.cpp has the architecture."""

import contextlib
import json
import os
import re
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from toy.files import checkpoints, events
from toy.files.atomic import StrPath, remove_leftovers, unless_in_use, write_text
from toy.files.errors import BadFileError
from toy.files.lock import is_held, only_process
from toy.files.regular import open_regular, read_regular

FORMAT = "toy-run-1"
_LARGEST_CONFIG = 2**28  # bytes: vocabularies of some million tokens
_TRIES = 100  # to read a run that is saving
_CHECKPOINT_NAME = re.compile(r"step_(\d{1,15})\.safetensors")
_GGUF_NAME = re.compile(r"step_(\d{1,15})\.gguf")


class DamagedCheckpointError(BadFileError):
    """The newest checkpoint of a run cannot be read. before: the step of the newest one before it that can, None: of none."""

    def __init__(self, path: StrPath, problem: object, before: int | None) -> None:
        super().__init__(path, problem)
        self.before = before


class RunWarning(UserWarning):
    """Something about a run directory that is not as it should be, and that a reader can live with."""


class Run:
    """The files of one run. `Run.create` makes the directory, `Run.open` takes one that is there."""

    def __init__(self, folder: StrPath, config: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.config = config
        self._latest: str | None = None  # what weights/latest said last; None: not looked at yet, "" without one

    @classmethod
    def create(cls, folder: StrPath, config: dict[str, Any]) -> "Run":
        """Make the directory and write its config.json. Raises as `begin`."""
        with cls.begin(folder, config) as run:
            return run

    @classmethod
    @contextlib.contextmanager
    def begin(cls, folder: StrPath, config: dict[str, Any]) -> Iterator["Run"]:
        """`create`, and inside the block the lock of the run: of two processes that begin in one directory one does.

        Raises ValueError as `check_new_folder` does, BlockingIOError when another process begins there, and OSError.
        """
        check_new_folder(folder)
        run = cls(folder, {"format": FORMAT, **config})
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make directory {run.folder}: {error.strerror or error}") from error
        with run.lock():
            check_new_folder(folder)  # nobody was quicker
            remove_leftovers(run.folder)
            try:
                run.write_config()  # the first file: from here on the run can be resumed
            except OSError:
                with contextlib.suppress(OSError):
                    run.folder.rmdir()
                raise
            run.weights.mkdir()
            run._latest = ""
            yield run

    @classmethod
    def open(cls, folder: StrPath) -> "Run":
        """Raises BadFileError when the directory or its config.json is not that of a run."""
        folder = Path(folder)
        if not folder.is_dir():
            raise BadFileError(folder, "there is no such run directory")
        path = folder / "config.json"
        try:
            data = read_regular(path, _LARGEST_CONFIG)
        except FileNotFoundError:
            begin = f"; nothing is in it yet: --out {folder} begins one there" if not _has_anything(folder) else ""
            raise BadFileError(folder, f"is not a run directory: it has no config.json{begin}") from None
        try:
            config = json.loads(data)
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
        path = self._named("latest")
        self._latest = "" if path is None else path.name
        return path or max(self._checkpoints(), default=(0, None))[1]

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
            with open_regular(file) as opened:
                name = opened.read(100).decode("ascii", errors="replace").strip()
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
        """A `Checkpoint`, see `find_checkpoint`; or None before the first one. Raises as `read_found`."""
        found = self.read_found(which)
        return None if found is None else found[1]

    def read_found(self, which: str | int = "last") -> tuple[Path, checkpoints.Checkpoint] | None:
        """A `Checkpoint` and its path, see `find_checkpoint`; or None before the first one. The run may be saving just then.

        Raises DamagedCheckpointError when it is damaged or gone (the message names the others there are), BadFileError when
        it is not of this run. A RunWarning when weights/latest names an older one than there is.
        """
        for _ in range(_TRIES):
            path = self.find_checkpoint(which)
            if path is None:
                return None
            try:
                checkpoint = checkpoints.read_checkpoint(path)
            except (BadFileError, FileNotFoundError) as error:
                pointer = "best" if which == "best" else "latest"
                problem = (
                    error.problem if isinstance(error, BadFileError) else f"is missing, but weights/{pointer} names it"
                )
                if self.find_checkpoint(which) == path:  # else it was saved meanwhile, and the older one deleted
                    raise DamagedCheckpointError(
                        path, f"{problem}{self._others(path)}", self._whole_before(_step_of(path))
                    ) from error
            else:
                self._check_own(path, checkpoint)
                if which == "last":
                    self._warn_of_newer(path)
                return path, checkpoint
        raise BadFileError(self.weights, f"was saved to {_TRIES} times while it was read: try again")

    def read_step(self, step: int) -> tuple[Path, checkpoints.Checkpoint, str]:
        """The `Checkpoint` of a step, its path, and why the newer ones are left out, in words ("" without any).

        Raises BadFileError when it is damaged, ValueError when there is none of that step and when a newer one is whole.
        """
        there = dict(sorted(self._checkpoints()))
        if step not in there:
            steps = ", ".join(map(str, there)) or "none"
            raise ValueError(f"the run in {self.folder} has no checkpoint of step {step}: there are {steps}")
        self.latest_checkpoint()
        left_out = []
        for path in (path for other, path in there.items() if other > step):
            try:
                checkpoints.read_checkpoint(path)
            except BadFileError as error:
                left_out.append(f"{path.name} is left out: {error.problem}")
            else:
                raise ValueError(f"{path} is newer and whole, going on from step {step} would lose it: go on from that")
        checkpoint = checkpoints.read_checkpoint(there[step])
        self._check_own(there[step], checkpoint)
        return there[step], checkpoint, "; ".join(left_out)

    def _check_own(self, path: Path, checkpoint: checkpoints.Checkpoint) -> None:
        """Raise BadFileError unless config.json says of the run what the checkpoint, which is protected, says.

        The options and what may change when a run goes on are not compared: who goes on looks at those.
        """
        for name, then in checkpoint.config.items():
            now = self.config.get(name)
            if name not in _MAY_CHANGE and not (_agree(then, now) and (name in _PLACES or _keys(then) == _keys(now))):
                raise BadFileError(
                    path,
                    f"is not of this run: its {name} is not the one in config.json. If that was changed by hand, or "
                    "damaged, put it back",
                )

    def _warn_of_newer(self, path: Path) -> None:
        newer = [other for step, other in sorted(self._checkpoints()) if step > _step_of(path)]
        if newer and not is_held(self.folder):  # a run that is saving writes the checkpoint first
            latest = self.weights / "latest"
            message = f"{latest} names {path.name}, and {newer[-1].name} is newer: the older one is taken"
            warnings.warn(message, RunWarning, stacklevel=3)

    def _whole_before(self, step: int) -> int | None:
        """The step of the newest checkpoint before `step` that can be read."""
        for other, path in sorted(self._checkpoints(), reverse=True):
            with contextlib.suppress(BadFileError, FileNotFoundError):
                if other < step and checkpoints.read_checkpoint(path):
                    return other
        return None

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
        self._write_latest(path)
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

    def _write_latest(self, path: Path) -> None:
        write_text(self.weights / "latest", path.name + "\n")
        self._latest = path.name

    def _checkpoints(self) -> list[tuple[int, Path]]:
        found = ((_CHECKPOINT_NAME.fullmatch(path.name), path) for path in self.weights.glob("step_*.safetensors"))
        return [(int(match[1]), path) for match, path in found if match]

    def _others(self, path: Path | None) -> str:
        names = [other.name for _, other in sorted(self._checkpoints()) if other != path]
        return f"; to go on from {' or '.join(names)} write that name into {self.weights / 'latest'}" if names else ""

    # -- going on -----------------------------------------------------------------------------------------------------

    def remove_leftovers(self) -> None:
        """Delete the temporary files that a killed process left. Hold the lock: another process may be writing its own."""
        for folder in (self.folder, self.weights):
            remove_leftovers(folder)

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Make the directory what it was when the checkpoint of `step` was written (0: before the first step).

        Later events, samples and checkpoints go, and so do leftovers of a killed process. Returns the events kept. Raises
        RuntimeError when another process has gone on with the run since its checkpoint was read.
        """
        before = self._latest
        path = self.latest_checkpoint()
        if before is not None and self._latest != before:
            raise RuntimeError(f"another process went on with the run in {self.folder} meanwhile: resume it again")
        self.remove_leftovers()
        self.weights.mkdir(exist_ok=True)
        if path is not None and _step_of(path) > step and (own := self.weights / f"step_{step}.safetensors").exists():
            self._write_latest(own)
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


_MAY_CHANGE = {"training", "backend", "versions"}  # of config.json's entries, when a run goes on
_PLACES = {"corpus", "data", "base"}  # what they name may have moved; newer versions say more about them


def _agree(then: Any, now: Any) -> bool:
    """Whether two entries of a config.json say the same, but for where files are."""
    if isinstance(then, dict) and isinstance(now, dict):
        return all(_agree(then[key], now[key]) for key in then.keys() & now.keys() - {"path", "source"})
    return bool(then == now)


def _keys(entry: Any) -> Any:
    return entry.keys() if isinstance(entry, dict) else None


def _step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.stem.removeprefix("step_"))


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint and, first, the GGUF file beside it: one alone would never be found again."""
    checkpoint.with_suffix(".gguf").unlink(missing_ok=True)
    checkpoint.unlink(missing_ok=True)


def _has_anything(folder: Path) -> bool:
    """Whether a folder holds more than what a process leaves that was killed before it had written config.json."""
    return any(
        path.name != ".lock" and not re.fullmatch(r"\.config\.json\..*\.tmp", path.name) for path in folder.iterdir()
    )


def check_new_folder(folder: StrPath) -> None:
    """Raise ValueError unless a run can be started in `folder`: it is not there yet or empty, and can be made.

    What a process left that was killed while it began a run there counts as nothing.
    """
    folder = Path(folder)
    try:
        if folder.is_dir():
            if _has_anything(folder):
                raise ValueError(f"output directory {str(folder)!r} exists and is not empty: choose another one")
        elif (folder.exists() or folder.is_symlink()) and not folder.is_dir():  # another process may just have made it
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
