"""The command line: toy train, generate, chat, eval, look, export, list, describe, fetch, runs, plot, backends and others.

Bad input ends with one sentence on stderr and exit code 2, before anything is written; a failure while running with exit
code 1; --debug shows the traceback too. A run stopped by Ctrl-C is saved and ends with 130, the shell's code for it.
"""

import math
import signal
import sys
import time
import traceback
import warnings

import click

from toy import switch
from toy.cli import chat as cli_chat
from toy.cli import data as cli_data
from toy.cli import exercises as cli_exercises
from toy.cli import images as cli_images
from toy.cli import look as cli_look
from toy.cli import models as cli_models
from toy.cli import places as cli_places
from toy.cli import runs as cli_runs
from toy.cli import train as cli_train
from toy.cli.base import (
    JSON,
    Failure,
    Phase,
    as_json,
    command,
    drop_stdout,
    in_words,
    named_stdout,
    note,
    program,
    quoted,
    say,
)
from toy.cli.help_text import Group
from toy.config import VERSION
from toy.files import RunWarning
from toy.trained.adapters import AdapterWarning

_NOTES = (RunWarning, AdapterWarning)  # shown as notes


def main(arguments=None):
    """Run the command line and exit the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character gets a ? instead of a crash
    with warnings.catch_warnings(), named_stdout():
        for category in _NOTES:
            warnings.simplefilter("always", category)
        warnings.showwarning = _showing(warnings.showwarning)
        code = _run(arguments)
        try:
            sys.stdout.flush()
        except OSError:  # said already
            drop_stdout()
        sys.exit(code)


def _run(arguments):
    """The exit code of a command line; what went wrong is said on stderr."""
    try:
        code = cli.main(arguments, prog_name="toy", standalone_mode=False) or 0
        sys.stdout.flush()  # here a full disk can still be told
        return code
    except Failure as failure:
        if failure.debug and failure.__cause__ is not None:
            traceback.print_exception(failure.__cause__)
        say(f"toy: {failure.message}")
        return failure.exit_code
    except click.ClickException as error:
        say(f"toy: {error.format_message()}")
        return error.exit_code
    except click.Abort:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        drop_stdout()
        return 1
    except OSError as error:  # of printing, and of a process that may not open a file any more
        click.echo(f"toy: {in_words(error)}", err=True)
        return 1


def _showing(show_other):
    """What shows a warning: one about a run directory or an adapter as a note, another as before."""

    def show(message, category, *more, **named):
        if issubclass(category, _NOTES):
            note(message)
        else:
            show_other(message, category, *more, **named)

    return show


@click.group(cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="toy")
@click.pass_context
def cli(context):
    """Learn how a transformer is trained, then train one fast.

    \b
    toy train from-scratch    train on Python's documentation, a minute or so
    toy generate runs/NAME    let the trained model write
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(cli_train.train)
cli.add_command(cli_data.data)
cli.add_command(cli_exercises.exercise)
for _group in (cli_models.models, cli_chat.chats, cli_places.places, cli_look.look, cli_runs.runs, cli_images.images):
    for _command in _group.commands.values():
        cli.add_command(_command)


# ----------------------------------------------------------------------------------------------------------------------
# toy backends, gradcheck, selftest
# ----------------------------------------------------------------------------------------------------------------------


@command(cli, "backends")
@JSON
def backends(json_wanted, debug):
    """List the backends: available or not, threads, versions, speed."""
    if json_wanted:
        with Phase(2, debug):  # TOY_BACKEND may name one that is not there
            choice = switch.resolve()
        with Phase(1, debug):
            rows = [row._asdict() | {"gflops": _gflops(row)} for row in switch.backends()]
            names = ("name", "kind", "description", "memory_total", "memory_free")
            devices = [{name: getattr(device, name) for name in names} for device in ggml_devices()]
            auto = {"backend": choice.backend, "reason": choice.reason}
            bf16 = switch.bf16_products()
            return as_json(
                {"backends": rows, "devices": devices, "notices": ggml_notices(), "bf16_products": bf16, "auto": auto}
            )
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    with Phase(1, debug):
        table = Table("backend", "available", "threads", "GFLOP/s")
        table.add_column("version, or why it is not there", overflow="fold")
        for row in switch.backends():
            speed = f"{_gflops(row):.0f}" if row.available else ""
            available, threads = "yes" if row.available else "no", str(row.threads or "")
            table.add_row(row.name, available, threads, speed, escape(row.version or row.reason))
        console = Console(highlight=False)
        console.print(table)
        console.print("GFLOP/s: one matrix product of 512 x 512 by 512 x 512 in float32, the best of some.")
        bf16 = switch.bf16_products() or "none here that are faster than float32's"
        console.print(f"bf16 products (--precision bf16 of toy train, on cython and ggml's cpu): {bf16}", markup=False)
        for device in ggml_devices():
            console.print(f"ggml device {device.name} ({device.kind}): {described(device)}", markup=False)
        for notice in ggml_notices():
            console.print(notice, markup=False)
    with Phase(2, debug):  # TOY_BACKEND may name one that is not there
        choice = switch.resolve()
        console.print(f"--backend auto means {choice.backend} here ({choice.reason})", markup=False)


def _gflops(row):
    return matmul_gflops(row.name) if row.available else None


def ggml_devices():
    """The devices of ggml, none where it is not available."""
    import ggml_bridge

    return ggml_bridge.devices() if ggml_bridge.available()[0] else []


def ggml_notices():
    """Sentences about what ggml has and found no device for, none where it is not available."""
    import ggml_bridge

    return ggml_bridge.notices() if ggml_bridge.available()[0] else []


def described(device):
    """A ggml device in words, with its memory where it tells that (what is free of a CPU's it does not tell)."""
    total, free = (f"{size / 2**30:.1f} GiB" for size in (device.memory_total, device.memory_free))
    if device.kind == "cpu" or not device.memory_total:
        return f"{device.description}, {total}" if device.memory_total else device.description
    return f"{device.description}, {total}, {free} of it free"


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
@click.option("--all", "every", is_flag=True, help="A line for every gradient, not for every layer.")
@click.option(
    "--layer",
    "layers",
    metavar="NAME",
    multiple=True,
    help="Only layers with NAME in their name, and a line for every gradient; may be given several times.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the random inputs.")
@JSON
def gradcheck(every, layers, seed, json_wanted, debug):
    """Compare every hand-written backward with central differences. Ends with 1 when one is wrong.

    A line is a layer with its worst error: an op, a whole model, or an op of the compiled kernels. The error is relative, and
    right where it is below the bar.

    \b
    toy gradcheck                    all layers, in seconds
    toy gradcheck --layer attention  each of its gradients
    """
    from toy.checks import gradcheck as checks

    with Phase(2, debug):
        chosen = checks.chosen_checks(seed, layers)
    with Phase(1, debug):
        rows = [row for check in chosen for row in check()]
        wrong = sum(not row.ok for row in rows)
        if json_wanted:
            as_json({"ok": not wrong, "seed": seed, "gradients": [_plain_row(row) for row in rows]})
        else:
            _show_gradients(rows, every or layers)
    return 1 if wrong else 0


def _show_gradients(rows, every):
    """every: a line for each row, otherwise for each layer."""
    from toy.checks import gradcheck as checks

    verdicts = {True: "ok", False: "WRONG"}
    if every:
        lines = [("layer", "error", "bar", "", "gradient")]
        lines += [(r.layer, f"{r.rel_error:.1e}", f"{r.bar:.0e}", verdicts[bool(r.ok)], r.gradient) for r in rows]
    else:
        lines = [("layer", "error", "compiled", "", "worst in")]
        for layer, worst, compiled, n_wrong in checks.by_layer(rows):
            errors = (f"{row.rel_error:.1e}" if row else "" for row in (worst, compiled))
            worst_in = max((row for row in (worst, compiled) if row), key=lambda row: (not row.ok, row is worst))
            lines.append((layer, *errors, verdicts[n_wrong == 0], worst_in.gradient))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        text = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip()
        click.secho(text, fg="red" if verdicts[False] in line else None)
    against = f"central differences of the forward in float64, right below {checks.DERIVATIVE_BAR:.0e}"
    twins = f"the compiled op against that of numpy in float32, right below {checks.TWIN_BAR:.0e}"
    click.echo(f"\nerror: against {against}")
    if any(row.bar == checks.TWIN_BAR for row in rows):
        click.echo(f"compiled: {twins}")
    wrong = [row for row in rows if not row.ok]
    click.echo(f"{len(rows)} gradients checked, {len(wrong) or 'none'} wrong")
    if not every:
        layer = wrong[0].layer if wrong else "attention"
        click.echo(f"each of a layer: {program()} gradcheck --layer {quoted(layer)}; every one: --all")


def _plain_row(row):
    """A row of the check in types that JSON has."""
    return row._asdict() | {"rel_error": float(row.rel_error), "bar": float(row.bar), "ok": bool(row.ok)}


@command(cli, "selftest")
@click.option(
    "--device", default="cpu", show_default=True, help="cpu, cpu-native, cuda, metal, vulkan or another ggml device."
)
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="Of each loss curve.")
@JSON
def selftest(device, steps, json_wanted, debug):
    """Train on a ggml device and on numpy and compare: a report to paste. Ends with 1 when they differ too much."""
    from toy.checks import selftest as tests

    with Phase(2, debug):
        switch.resolve("ggml", device)
    with Phase(1, debug):
        report = tests.run(device, steps)
        if json_wanted:
            checks = [check._asdict() | {"value": float(check.value), "ok": bool(check.ok)} for check in report.checks]
            as_json(report._asdict() | {"checks": checks})
        else:
            click.echo(str(report))
    return 0 if report.ok else 1
