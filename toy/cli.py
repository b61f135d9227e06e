"""The command line: toy train, generate, plot, describe, fetch, backends, gradcheck, selftest.

Bad input ends with one sentence on stderr and exit code 2, before anything is written; a failure while running with exit
code 1; --debug shows the traceback too. A run stopped by Ctrl-C is saved and ends with 130, the shell's code for it.
"""

import dataclasses
import functools
import math
import os
import shlex
import shutil
import signal
import sys
import textwrap
import time
import traceback
import unicodedata
from pathlib import Path

import click
from click.core import ParameterSource

from toy import __version__, schedules, switch, trained, training
from toy.data import tokenizers


def main(arguments=None):
    """Run the command line and exit the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character gets a ? instead of a crash
    try:
        sys.exit(cli.main(arguments, prog_name="toy", standalone_mode=False) or 0)
    except Failure as failure:
        if failure.debug and failure.__cause__ is not None:
            traceback.print_exception(failure.__cause__)
        click.echo(f"toy: {failure.message}", err=True)
        sys.exit(failure.exit_code)
    except click.ClickException as error:
        click.echo(f"toy: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(128 + signal.SIGINT)


class Failure(click.ClickException):
    """What ends a command: one sentence and an exit code."""

    def __init__(self, message, exit_code, debug=False):
        super().__init__(" ".join(message.split()))
        self.exit_code, self.debug = exit_code, debug


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
            message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        elif isinstance(error, (ValueError, RuntimeError)):
            message = str(error)
        elif isinstance(error, MemoryError):
            message = f"out of memory ({error})"
        else:
            message = f"unexpected {type(error).__name__}: {error} (please report it, with the output of --debug)"
            raise Failure(message, 1, self.debug) from error
        raise Failure(message + self.hint(), self.exit_code, self.debug) from error


def command(group, name):
    """A click command with --debug, whose body gets `debug` and ends quietly when nobody reads its output any more."""

    def decorate(function):
        @functools.wraps(function)
        def body(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the last flush would fail again
                return 1

        # click reads the parameters backwards: the first one is shown last
        debug = click.Option(["--debug"], is_flag=True, help="Show the traceback of an error.")
        body.__dict__.setdefault("__click_params__", []).insert(0, debug)
        return group.command(name)(body)

    return decorate


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="toy")
@click.pass_context
def cli(context):
    """Learn how a transformer is trained, then train one fast.

    \b
    toy train from-scratch            train on the Python documentation, about a minute
    toy generate runs/NAME            let the trained model write
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.group(invoke_without_command=True)
@click.pass_context
def train(context):
    """Train a model."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# ----------------------------------------------------------------------------------------------------------------------
# toy train from-scratch
# ----------------------------------------------------------------------------------------------------------------------

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(training.TrainingOptions)}


def training_option(flag, type, help, shown=None):
    """An option of TrainingOptions, with its default. shown: words for a default that depends on other options."""
    default = _DEFAULTS[flag.strip("-").replace("-", "_")]
    return click.option(flag, type=type, default=default, help=help, show_default=shown or default is not None)


@command(train, "from-scratch")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the run. [default: runs/<time>-<arch>-<id>]")
@click.option("--resume", metavar="RUN", type=click.Path(path_type=Path), help="Go on with the run in this directory.")
@training_option("--corpus", str, "UTF-8 text file, or a folder of them.", "the documentation inside Python")
@training_option("--tokenizer", click.Choice(tokenizers.KINDS), "What a token is.")
@training_option("--val-fraction", float, "Share of the text, at its end, to validate on.")
@training_option("--arch", click.Choice(sorted(training.CONFIGS, reverse=True)), "The model.")
@training_option("--d-model", int, "Width of the residual stream.")
@training_option("--layers", int, "Blocks.")
@training_option("--heads", int, "Attention heads in a block; they divide the width.")
@training_option("--kv-heads", int, "Key/value heads of a llama; they divide the heads.", "as --heads")
@training_option("--d-ff", int, "Hidden width of the MLP.", "4 x d-model")
@training_option("--context", int, "Tokens in a sequence.")
@training_option("--batch", int, "Sequences in a step.")
@training_option("--steps", int, "Training steps in all.")
@training_option("--lr", float, "Learning rate.")
@training_option("--schedule", click.Choice(schedules.NAMES), "Learning rate after the warm-up.")
@training_option("--warmup", int, "Steps of linear warm-up.", "20")
@training_option("--lr-floor", float, "Where the cosine ends, as a fraction of --lr.")
@training_option("--weight-decay", float, "AdamW's weight decay.")
@training_option("--clip", float, "Largest gradient norm, 0 = no clipping.")
@training_option("--eval-every", int, "Steps between validations.", "a tenth of the steps, at most 500")
@training_option("--eval-batches", int, "Batches in a validation.")
@training_option("--sample-every", int, "Steps between samples.", "a quarter of the steps, at most 2000")
@training_option("--sample-tokens", int, "Tokens in a sample.")
@training_option("--save-every", int, "Steps between checkpoints.", "as --eval-every")
@training_option("--keep", int, "Checkpoints to keep.")
@training_option("--seed", int, "Of the weights, the batches and the samples.")
@training_option("--backend", str, f"One of {', '.join(switch.BACKEND_NAMES)}.")
@training_option("--device", str, "Device of the backend.")
@training_option("--threads", int, "Threads of BLAS and the kernels.", "the backend's own choice")
def from_scratch(out, resume, debug, **options):
    """Train a model from random weights.

    Without options: a small transformer on the documentation inside Python, in about a minute. With --resume, options
    may be left out; --steps may be larger than before.
    """
    given = {name: value for name, value in options.items() if _is_given(name)}
    with Phase(2, debug):
        if resume is not None:
            if out is not None:
                raise ValueError("--out cannot be given with --resume: the run goes on in its own directory")
            job = training.Training.resume(resume, **given)
        else:
            if out is None:
                from toy.files.runs import new_folder

                out = new_folder(options["arch"])
            job = training.Training(training.TrainingOptions(**options), out=out)
    go_on = resume_command(job.out)

    def hint():
        return f". To go on from the last checkpoint: {go_on}" if job.has_checkpoint() else ""

    with Phase(1, debug, hint):
        show_choices(job.choices())
        progress = Progress(job.options.steps, job.step)
        try:
            with progress:
                for event in job.run(on_stop=_say_stopping):
                    progress.show(event)
        except KeyboardInterrupt:
            click.echo(f"toy: stopped at once, without saving{hint()}", err=True)
            return 128 + signal.SIGINT
        if job.step < job.options.steps:
            click.echo(f"stopped after step {job.step} of {job.options.steps}, and saved. To go on:\n  {go_on}")
            return 128 + (job.stopped_by or 0)
        click.echo(progress.summary())
        for name, file in (("picture", "loss.png"), ("samples", "samples.txt"), ("weights", "weights")):
            click.echo(f"{name:<10}{job.out / file}")
        click.echo(f"{'write':<10}{program()} generate {shlex.quote(str(job.out))}")
    return 0


def _is_given(name):
    return click.get_current_context().get_parameter_source(name) not in (
        ParameterSource.DEFAULT,
        ParameterSource.DEFAULT_MAP,
    )


def _say_stopping():
    # called from a signal handler: print() could be in the middle of a line
    os.write(2, b"\nstopping after this step (Ctrl-C again: at once, without saving)\n")


def show_choices(choices):
    """The automatic choices and their reasons, one a line."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    for name, value, reason in choices:
        text = f"{value} ({reason})" if reason else value
        lines = textwrap.wrap(text, max(20, width - 15), break_on_hyphens=False, break_long_words=False)
        click.echo(f"{name:<15}" + ("\n" + " " * 15).join(lines))


class Progress:
    """Shows the events of a run: a live line in a terminal, otherwise a line per validation or at least every 10 seconds."""

    def __init__(self, steps, first_step):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.steps, self.first_step = steps, first_step
        self.step, self.validation = first_step, None
        self.losses, self.rates = Recent(), Recent()  # of the last steps
        self.started = self.last_line = time.monotonic()
        self.console = Console(highlight=False)
        self.bar = None
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            step, numbers = TextColumn("step {task.completed}/{task.total}"), TextColumn("{task.fields[line]}")
            # refreshed by `show`, not by a thread that would take time from the training
            self.bar = Bar(
                step, BarColumn(bar_width=None), numbers, console=self.console, auto_refresh=False, expand=True
            )
            self.task = self.bar.add_task("", total=steps, completed=first_step, line="")

    def __enter__(self):
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self._refresh()
            self.bar.stop()

    def show(self, event):
        """Take one event of `Training.run`."""
        now = time.monotonic()
        if self.bar is None and event.kind == "step" and now - self.last_line > 10:
            self._print(self.line())  # of the step before this one: had it been validated, its line would be there
        if event.kind == "step":
            self.step = event.step
            self.losses.add(event.loss)
            self.rates.add(event.wall_us / event.tokens)
        elif event.kind == "eval":
            self.validation = event.loss
            self._print(self.line())
        elif event.kind == "sample":
            self._print(indented(printable(event.text), self.console.width if self.bar is not None else None))
        if self.bar is not None and now - self.last_line > 0.1:
            self._refresh()
            self.last_line = now

    def line(self):
        return f"step {self.step:>{len(str(self.steps))}}/{self.steps}  {self._numbers()}"

    def summary(self):
        numbers = [f"loss {self.losses.mean():.3f}"] if self.losses.count else []
        numbers += [f"validation loss {self.validation:.3f}"] if self.validation is not None else []
        seconds = time.monotonic() - self.started
        return f"done: {self.steps} steps in {clock(seconds)}, {', '.join(numbers)} nats per token"

    def _numbers(self):
        numbers = []
        if self.losses.count:
            numbers.append(f"loss {self.losses.mean():.3f}")
        if self.validation is not None:
            numbers.append(f"val {self.validation:.3f}")
        if self.rates.count:
            numbers.append(f"{compact(1e6 / self.rates.mean())} tok/s")
            seconds = (time.monotonic() - self.started) / (self.step - self.first_step)
            numbers.append(f"{clock(seconds * (self.steps - self.step))} left")
        return "  ".join(numbers)

    def _print(self, text):
        self.console.print(text, markup=False, soft_wrap=True)
        if self.bar is None:
            self.last_line = time.monotonic()
            self.console.file.flush()

    def _refresh(self):
        self.bar.update(self.task, completed=self.step, line=self._numbers())
        self.bar.refresh()


class Recent:
    """The mean of the last numbers, older ones fading away."""

    def __init__(self, span=30):
        self.keep = 1 - 1 / span
        self.total = self.weight = 0.0
        self.count = 0

    def add(self, value):
        self.total = self.keep * self.total + value
        self.weight = self.keep * self.weight + 1
        self.count += 1

    def mean(self):
        return self.total / self.weight


def clock(seconds):
    """75 -> "1:15", 7200 -> "2:00:00"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def compact(number):
    """45210 -> "45.2k"."""
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:.3g}"


def printable(text):
    """`text` without characters that would steer the terminal."""
    steering = ("Cc", "Cf", "Cs")  # control, format (writing direction), surrogate
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in steering and c not in "\n\t" else c
        for c in text.replace("\r\n", "\n")
    )


def indented(text, width=None, indent="    | "):
    """`text` with `indent` before every line; lines are cut at `width` when there is one."""
    lines, room = text.split("\n"), (width or 0) - len(indent)
    if room > 0:
        lines = [line[i : i + room] for line in lines for i in range(0, max(1, len(line)), room)]
    return "\n".join(indent + line for line in lines)


def program():
    """How the user called this program, for commands to type."""
    return "python -m toy" if Path(sys.argv[0]).name == "__main__.py" else "toy"


def resume_command(folder):
    return f"{program()} train from-scratch --resume {shlex.quote(str(folder))}"


# ----------------------------------------------------------------------------------------------------------------------
# toy generate, plot, backends, gradcheck
# ----------------------------------------------------------------------------------------------------------------------


@command(cli, "generate")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to go on from. [default: a new line]")
@click.option("--tokens", type=click.IntRange(min=1), default=500, show_default=True, help="Tokens to write.")
@click.option(
    "--temperature", type=float, default=0.8, show_default=True, help="Below 1: safer, 0: always the likeliest."
)
@click.option("--top-k", type=int, help="Draw from the k likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw from the fewest tokens whose probability reaches p.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draws.")
@click.option("--backend", default="auto", help=f"One of {', '.join(switch.BACKEND_NAMES)}.")
def generate(run, prompt, tokens, temperature, top_k, top_p, seed, backend, debug):
    """Let a trained model write. RUN is a run directory or a checkpoint file."""
    from toy.generation import generate as generate_ids

    with Phase(2, debug):
        loaded = trained.load_trained(run, backend=backend)
        tokenizer = loaded.tokenizer
        ids = trained.first_prompt(tokenizer, [0]) if prompt is None else tokenizer.encode(prompt, what="prompt")
        stream = tokenizer.stream(generate_ids(loaded.model, ids, tokens, temperature, top_k, top_p, seed))
    with Phase(1, debug):
        clean = printable if sys.stdout.isatty() else str
        click.echo(clean(prompt or ""), nl=False)
        for text in stream:
            click.echo(clean(text), nl=False)
        click.echo()


@command(cli, "plot")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out", type=click.Path(path_type=Path), help="PNG, SVG or PDF file. [default: RUN/loss.png, or loss.png]"
)
@click.option("--x", type=click.Choice(["steps", "tokens", "seconds"]), default="steps", help="The horizontal axis.")
def plot(runs, out, x, debug):
    """Draw the loss curves of one or several runs into one picture."""
    from toy.plots import plot_runs

    out = out or (runs[0] / "loss.png" if len(runs) == 1 else Path("loss.png"))
    with Phase(2, debug):
        click.echo(plot_runs(runs, out, x))


@command(cli, "backends")
def backends(debug):
    """List the backends: available or not, threads, versions, speed."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with Phase(1, debug):
        table = Table("backend", "available", "threads", "GFLOP/s", "version, or why it is not there")
        for row in switch.backends():
            speed = f"{matmul_gflops(row.name):.0f}" if row.available else ""
            available, threads = "yes" if row.available else "no", str(row.threads or "")
            table.add_row(row.name, available, threads, speed, escape(row.version or row.reason))
        console = Console(highlight=False)
        console.print(table)
        console.print("GFLOP/s: one matrix product of 512 x 512 by 512 x 512 in float32, the best of some.")
        for device in ggml_devices():
            console.print(f"ggml device {device.name} ({device.kind}): {device.description}", markup=False)
    with Phase(2, debug):  # TOY_BACKEND may name one that is not there
        choice = switch.resolve()
        console.print(f"--backend auto means {choice.backend} here ({choice.reason})", markup=False)


def ggml_devices():
    """The devices of ggml, none where it is not available."""
    import ggml_bridge

    return ggml_bridge.devices() if ggml_bridge.available()[0] else []


def matmul_gflops(backend, n=512, seconds=0.2):
    """Billions of multiplications and additions a second of `linear` on this backend's eager op table, at its best."""
    import numpy as np

    linear = switch.eager_ops(backend).linear
    x, weight = (np.random.default_rng(i).standard_normal((n, n), dtype=np.float32) for i in range(2))
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best / 1e9


@command(cli, "gradcheck")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the random inputs.")
def gradcheck(seed, debug):
    """Compare every hand-written backward with central differences. Ends with 1 when one is wrong."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from toy import gradcheck as checks

    with Phase(1, debug):
        rows = checks.check_all(seed=seed)
        table = Table("layer", "gradient", "error", "bar", "")
        for row, following in zip(rows, [*rows[1:], None]):
            verdict = "ok" if row.ok else "[bold red]WRONG[/]"
            last_of_its_kind = following is not None and following.bar != row.bar
            error, bar = f"{row.rel_error:.1e}", f"{row.bar:.0e}"
            table.add_row(escape(row.layer), escape(row.gradient), error, bar, verdict, end_section=last_of_its_kind)
        console = Console(highlight=False)
        console.print(table)
        console.print(f"bar {checks.DERIVATIVE_BAR:.0e}: against central differences of the forward, in float64")
        if rows[-1].bar == checks.TWIN_BAR:
            console.print(f"bar {checks.TWIN_BAR:.0e}: the compiled op against the reference op, in float32")
        wrong = sum(not row.ok for row in rows)
        console.print(f"{len(rows)} gradients checked, {wrong or 'none'} wrong")
    return 1 if wrong else 0


@command(cli, "selftest")
@click.option(
    "--device", default="cpu", show_default=True, help="cpu, cpu-native, metal, vulkan or another ggml device."
)
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of each loss curve.")
def selftest(device, steps, debug):
    """Train on a ggml device and on numpy and compare: a report to paste. Ends with 1 when they differ too much."""
    from toy import selftest as tests

    with Phase(2, debug):
        switch.resolve("ggml", device)
    with Phase(1, debug):
        report = tests.run(device, steps)
        click.echo(str(report))
    return 0 if report.ok else 1


@command(cli, "describe")
@click.argument("file", type=click.Path(path_type=Path))
def describe(file, debug):
    """Show what is in a GGUF file: sizes, tensor types, tokenizer, and the algorithm with this model's numbers."""
    from rich.console import Console

    from toy.describe import describe as card

    with Phase(2, debug):
        Console(highlight=False).print(card(file))


@command(cli, "fetch")
@click.argument("model")
@click.argument("file", required=False)
def fetch(model, file, debug):
    """Download a model into the cache and print its path: a known name (smollm2-135m), or OWNER/REPO and FILE."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from toy.files.fetch import FetchError
    from toy.files.fetch import fetch as download

    with Phase(2, debug), Progress(BarColumn(), DownloadColumn(), TransferSpeedColumn(), transient=True) as progress:
        task = progress.add_task(model, total=None)
        try:
            path = download(
                model, file, progress=lambda done, total: progress.update(task, completed=done, total=total)
            )
        except FetchError as error:  # the name was fine, the download was not
            raise Failure(str(error), 1, debug) from error
    click.echo(path)
