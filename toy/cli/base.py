"""What every command needs: errors that end it with one sentence and an exit code, and the `command` decorator."""

import contextlib
import errno
import functools
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import click

from toy.cli.help_text import Command, wrapped
from toy.files import Run
from toy.switch import BACKEND_NAMES

# what several commands take
PATH = click.Path(path_type=Path)
MODEL = click.argument("model", metavar="MODEL")
CHECKPOINT = click.option(
    "--checkpoint",
    metavar="best|last|STEP",
    default="last",
    show_default=True,
    help="Of a run: which of its checkpoints.",
)
JSON = click.option("--json", "json_wanted", is_flag=True, help="One JSON object, on stdout.")


class WithScale(click.ParamType):
    """FILE or FILE=SCALE, as the path and a number."""

    name = "file"

    def convert(self, value, parameter, context):
        if isinstance(value, tuple):
            return value
        path, equals, scale = value.rpartition("=")
        if not equals or Path(value).exists():
            return Path(value), 1.0
        try:
            return Path(path), float(scale)
        except ValueError:
            self.fail(f"{value!r} must be FILE or FILE=SCALE with a number for SCALE", parameter, context)


def _by_path(context, parameter, pairs):
    adapters = dict(pairs)
    if len(adapters) < len(pairs):
        raise click.BadParameter("the same file was given twice: give it once, with a scale", context, parameter)
    return adapters or None


def adapter_option(name, help):
    """An option that takes several adapters, each maybe with a scale: a dict of paths to scales, None without one."""
    return click.option(
        name, type=WithScale(), multiple=True, callback=_by_path, metavar="FILE.gguf[=SCALE]",
        help=f"{help} (default scale 1); may be given several times.",
    )  # fmt: skip


ADAPTER = adapter_option("--adapter", "LoRA adapter (GGUF, or a PEFT folder) to put on the model, times SCALE")
BACKEND = click.option("--backend", default="auto", help=f"One of {', '.join(BACKEND_NAMES)}.")
DEVICE = click.option(
    "--device", default="auto", help="Of backend ggml: cpu, metal, vulkan, cuda or another ggml device."
)
PRECISION = click.option(
    "--precision",
    default="auto",
    help="f32: products in float32, as in toy eval. auto: on backend ggml its own, which are faster and round the "
    "activations beside quantised weights, as llama.cpp does.",
)


class Failure(click.ClickException):
    """What ends a command: one sentence and an exit code."""

    def __init__(self, message, exit_code, debug=False):
        super().__init__(" ".join(message.split()))
        self.exit_code, self.debug = exit_code, debug  # type: ignore[misc]  # click declares it of the class


class Phase:
    """Turns the errors inside a `with` block into a Failure: exit code 2 while input is checked, 1 while running."""

    def __init__(self, exit_code, debug, hint=lambda: ""):
        self.exit_code, self.debug, self.hint = exit_code, debug, hint

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or isinstance(error, (click.exceptions.Exit, click.ClickException, click.Abort)):
            return
        if not isinstance(error, Exception) or isinstance(error, BrokenPipeError):
            return
        if isinstance(error, OSError):
            message = in_words(error)
        elif isinstance(error, (ValueError, RuntimeError)):
            message = str(error)
        elif isinstance(error, MemoryError):
            message = f"out of memory ({error})"
        else:
            message = f"unexpected {type(error).__name__}: {error} (please report it, with the output of --debug)"
            raise Failure(message, 1, self.debug) from error
        raise Failure(message + self.hint(), self.exit_code, self.debug) from error


def in_words(error):
    """An OSError as a sentence that names the file."""
    more = " (ulimit -n says how many)" if error.errno == errno.EMFILE else ""
    return (f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)) + more


class _Output(io.FileIO):
    """A file descriptor to write to whose errors name it: "No space left on device" alone would be of any file."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "the standard output cannot be written") from error


@contextlib.contextmanager
def named_stdout():
    """Inside the block the errors of writing to stdout say that it is stdout, and without one (it was closed) what is printed
    is thrown away. Where it is no file (a console of Windows), nothing changes."""
    before = out = sys.stdout
    if out is None:
        sys.stdout = open(os.devnull, "w", newline="\n", encoding="utf-8")  # noqa: SIM115 (as long as the process)
    elif isinstance(out, io.TextIOWrapper):
        unbuffered = isinstance(out.buffer, io.FileIO)  # PYTHONUNBUFFERED, python -u
        if unbuffered or isinstance(getattr(out.buffer, "raw", None), io.FileIO):
            out.flush()
            raw = _Output(out.fileno(), "w", closefd=False)
            buffer = raw if unbuffered else io.BufferedWriter(raw)
            sys.stdout = io.TextIOWrapper(
                buffer, out.encoding, out.errors, line_buffering=out.line_buffering, write_through=unbuffered
            )
    try:
        yield
    finally:
        sys.stdout = before


def drop_stdout():
    """Nobody reads stdout any more, or it is full: what is written from now on is thrown away, the last flush too."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def command(group, name, kind=Command):
    """A click command (of class `kind`) with --debug, whose body gets `debug` and ends quietly when nobody reads its output
    any more."""

    def decorate(function):
        @functools.wraps(function)
        def body(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except BrokenPipeError:
                drop_stdout()
                return 1

        # click reads the parameters backwards: the first one is shown last
        debug = click.Option(["--debug"], is_flag=True, help="Show the traceback of an error.")
        body.__dict__.setdefault("__click_params__", []).insert(0, debug)
        return group.command(name, cls=kind)(body)

    return decorate


def tell_checkpoint(model, step, wanted="last"):
    """Say on stderr which checkpoint of a run is taken: in a terminal, when one was chosen, and when a better one is there.

    model: what the user named; step: of the checkpoint; wanted: the value of --checkpoint.
    """
    if step is None or not Path(model).is_dir():
        return
    best = Run.open(model).best_checkpoint()
    name, words = f"step_{step}", "the best on validation"
    if best is None or best.stem != name:
        words = "the last" if wanted == "last" else "as asked for"
    if best is not None and best.stem != name:
        words += f"; the best on validation is {best.stem.replace('_', ' ')}, --checkpoint best takes it"
    elif wanted == "last" and not sys.stderr.isatty():
        return
    click.echo(f"checkpoint: step {step}, {words}", err=True)


def note(sentence, err=True):
    """Tell what a user should know, on stderr where stdout has the answer alone."""
    say(f"note: {sentence}", err)


def say(text, err=True):
    """Print a paragraph; in a terminal in whole words, but for one with a command in it, which is to be copied."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None and stream.isatty() and not _COMMAND.search(text):
        text = "\n".join(wrapped(text, shutil.get_terminal_size().columns))
    click.echo(text, err=err)


_COMMAND = re.compile(r"(?<!^)\b(toy|pip|python3?) \w")


def as_json(record, file=None):
    """Print one JSON object, on a line of its own, into an open file (None: stdout)."""
    click.echo(json.dumps(_without_nan(record), ensure_ascii=False, allow_nan=False), file=file)


def _without_nan(value):
    """The same with None for the numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def program():
    """How the user called this program, for commands to type."""
    return "python -m toy" if Path(sys.argv[0]).name == "__main__.py" else "toy"


def quoted(word):
    """A word of a command to type, a path say, quoted where this system's shell would take it apart.

    On Windows in double quotes, which cmd and PowerShell both know; a % inside is theirs all the same.
    """
    word = str(word)
    if os.name != "nt":
        return shlex.quote(word)
    return word if re.fullmatch(r"[\w@+:.,/\\~-]+", word) else f'"{word}"'
