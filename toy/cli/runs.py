"""The commands about runs side by side: toy runs, plot."""

import datetime
import shutil
import sys
import time
from pathlib import Path

import click

from toy.cli.base import PATH, Phase, as_json, command
from toy.cli.progress import compact, printable

runs = click.Group()

# column -> what it is sorted by, None last
SORTED_BY = {
    "run": lambda s: s.name,
    "when": lambda s: s.started,
    "recipe": lambda s: s.recipe,
    "model": lambda s: s.n_parameters,
    "steps": lambda s: s.steps,
    "best": lambda s: s.best_loss,
    "speed": lambda s: s.per_second,
}
_FROM_STEPS = (
    "steps",
    "eval_every",
    "save_every",
    "sample_every",
    "warmup",
)  # in a column, or follow from what is there


@command(runs, "runs")
@click.argument("folders", nargs=-1, type=PATH, metavar="[FOLDER]...")
@click.option(
    "--sort", "column", type=click.Choice(list(SORTED_BY)), default="when", show_default=True, help="Smallest first."
)
@click.option("--reverse", is_flag=True, help="Largest first.")
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object a run, on stdout.")
def list_runs(folders, column, reverse, json_wanted, debug):
    """List runs side by side: when, recipe, model, steps, best validation, speed, and in which options they differ.

    FOLDER is a run, or a folder with runs in it or below it. [default: runs] Damaged runs are listed too.
    """
    from toy.files.summaries import differing, find_runs, summary_of

    with Phase(2, debug):
        found = find_runs(folders or [Path("runs")])
        if not found:
            raise ValueError(f"there are no runs in {', '.join(map(str, folders)) or 'runs'}: toy train makes one")
    with Phase(1, debug):
        summaries = [summary_of(folder) for folder in found]
        by = SORTED_BY[column]
        known = [summary for summary in summaries if by(summary) is not None]
        known.sort(key=lambda summary: (by(summary), summary.name), reverse=reverse)
        summaries = known + [summary for summary in summaries if by(summary) is None]
        different = differing(summaries, _left_out(summaries))
        if json_wanted:
            for summary, options in zip(summaries, different):
                as_json(_record(summary, options))
        else:
            show_table(summaries, different)


def _left_out(summaries):
    """The options that are not told as differences: the steps have a column of their own, and others follow from them."""
    return _FROM_STEPS if len({summary.total_steps for summary in summaries if not summary.problem}) > 1 else ()


def _record(summary, different):
    started = None
    if summary.started is not None:
        started = datetime.datetime.fromtimestamp(summary.started, datetime.timezone.utc).isoformat(timespec="seconds")
    return {
        "run": summary.name,
        "path": str(summary.folder),
        "problem": summary.problem,
        "started": started,
        "state": summary.state,
        "recipe": summary.recipe,
        "arch": summary.arch,
        "n_parameters": summary.n_parameters,
        "steps": summary.steps,
        "total_steps": summary.total_steps,
        "loss": summary.loss,
        "best_loss": summary.best_loss,
        "best_step": summary.best_step,
        "accuracy": summary.accuracy,
        "per_second": summary.per_second,
        "unit": summary.unit,
        "differs": different,
        "options": summary.options,
    }


# ----------------------------------------------------------------------------------------------------------------------
# the table
# ----------------------------------------------------------------------------------------------------------------------

_HEADERS = ("run", "when", "recipe", "model", "steps", "best", "speed", "differs")
_SECOND_LINE = (2, 3, 7)  # columns that go to a line of their own where the terminal is too narrow
_NUMBERS = (4, 5, 6)  # are aligned to the right


def show_table(summaries, different):
    """One line a run where the terminal is wide enough, otherwise two: the second has the recipe, the model, what differs."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    now = time.time()
    rows = [_cells(summary, options, now) for summary, options in zip(summaries, different)]
    columns = range(len(_HEADERS)) if any(row[7] for row in rows if row) else range(len(_HEADERS) - 1)
    widths = [max(len(row[i]) for row in (_HEADERS, *rows) if row) if any(rows) else 0 for i in range(len(_HEADERS))]
    names = max(len(printable(summary.name)) for summary in summaries)
    widths[0] = max(names, len(_HEADERS[0]))
    narrow = sum(widths[i] + 2 for i in columns) - 2 > width
    first = [i for i in columns if not (narrow and i in _SECOND_LINE)]
    if any(rows):
        click.echo(click.style(_line(_HEADERS, first, widths), bold=True))
    for summary, row in zip(summaries, rows):
        if row is None:
            name = printable(summary.name)
            click.echo(f"{name:<{widths[0]}}  {click.style('damaged', fg='red')}: {printable(summary.problem)}")
            continue
        click.echo(_line(row, first, widths))
        if narrow and (more := [row[i] for i in _SECOND_LINE if row[i]]):
            _show_wrapped("  ".join(more[:2]), more[2:], width)


def _show_wrapped(start, differs, width):
    """The second line of a run, indented; what differs goes on under itself where it is too long."""
    import textwrap

    text = ", ".join([start, *differs]) if differs else start
    for line in textwrap.wrap(text, max(20, width - 4), break_long_words=False, break_on_hyphens=False):
        click.echo(click.style(f"    {line}", dim=True))


def _line(cells, columns, widths):
    texts = [f"{cells[i]:>{widths[i]}}" if i in _NUMBERS else f"{cells[i]:<{widths[i]}}" for i in columns]
    return "  ".join(texts).rstrip()


def _cells(summary, different, now):
    """The words of a row, None for a damaged run."""
    if summary.problem is not None:
        return None
    steps = (
        f"{summary.steps:,}/{summary.total_steps:,}" if summary.steps != summary.total_steps else f"{summary.steps:,}"
    )
    if summary.state != "done":
        steps = f"{steps} {summary.state}"
    size = "" if summary.n_parameters is None else f" {compact(summary.n_parameters)}"
    best = "" if summary.best_loss is None else f"{summary.best_loss:.4f} at {summary.best_step:,}"
    unit = {"token": "tok", "image": "img"}[summary.unit]
    speed = "" if summary.per_second is None else f"{compact(summary.per_second)} {unit}/s"
    told = ", ".join(f"{name.replace('_', '-')} {_value(value)}" for name, value in different.items() if name != "arch")
    words = (
        summary.name,
        _ago(now, summary.started),
        summary.recipe,
        f"{summary.arch}{size}",
        steps,
        best,
        speed,
        told,
    )
    return tuple(map(printable, words))


def _value(value):
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "+".join(map(_value, value)) or "none"
    if isinstance(value, str) and ("/" in value or "\\" in value):
        return Path(value).name  # of a file its name is enough
    return "none" if value is None else str(value)


def _ago(now, then):
    """How long ago, in the largest unit that fits; from a week on the date."""
    seconds = now - then
    for unit, size, until in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86400), ("days", 86400, 7 * 86400)):
        if seconds < until:
            n = max(0, int(seconds // size))
            return f"{n} {unit.removesuffix('s') if unit == 'days' and n == 1 else unit} ago"
    return time.strftime("%Y-%m-%d", time.localtime(then))


# ----------------------------------------------------------------------------------------------------------------------
# toy plot
# ----------------------------------------------------------------------------------------------------------------------

_PAUSE = 2.0  # seconds between two looks of --watch


@command(runs, "plot")
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("--out", type=PATH, help="PNG, SVG or PDF file. [default: RUN/loss.png, or loss.png]")
@click.option("--x", type=click.Choice(["steps", "tokens", "seconds"]), default="steps", help="The horizontal axis.")
@click.option(
    "--y", type=click.Choice(["loss", "perplexity", "bits-per-byte"]), default="loss", help="The vertical axis."
)
@click.option("--watch", is_flag=True, help="Draw anew while the runs go on, until they end or Ctrl-C.")
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object, on stdout: the picture and its runs.")
def plot(runs, out, x, y, watch, json_wanted, debug):
    """Draw the loss curves of one or several runs into one picture."""
    from toy.plots import plot_runs

    out = out or (runs[0] / "loss.png" if len(runs) == 1 else Path("loss.png"))
    with Phase(2, debug):
        if not watch:
            _tell(plot_runs(runs, out, x, y), runs, json_wanted)
            return
        told = None
        try:
            for picture in _pictures(runs, lambda: plot_runs(runs, out, x, y)):
                if picture != told and not json_wanted:
                    _tell(picture, runs, json_wanted)
                told = picture
        except KeyboardInterrupt:
            click.echo(err=True)  # after the ^C
        if json_wanted and told is not None:
            _tell(told, runs, json_wanted)


def _pictures(runs, draw):
    """Yield what `draw()` gives whenever something was written to one of the runs, until no process trains in one of them."""
    from toy.files.lock import is_held
    from toy.plots import NoStepsError

    seen = None
    while True:
        going_on = any([is_held(run) for run in runs])  # before it is drawn: the last picture has everything
        now = [(run / "events.jsonl").stat().st_size if (run / "events.jsonl").exists() else 0 for run in runs]
        if now != seen:
            try:
                yield draw()
            except NoStepsError:
                if not going_on:
                    raise
            seen = now
        if not going_on:
            return
        time.sleep(_PAUSE)


def _tell(picture, runs, json_wanted):
    if json_wanted:
        as_json({"picture": str(picture), "runs": [str(run) for run in runs]})
    else:
        click.echo(picture)
