"""The commands toy train RECIPE: one run each, with the same loop and display. The flags are the fields of the recipe's
options."""

import contextlib
import dataclasses
import inspect
import os
import signal
import sys
import types
import typing
from pathlib import Path

import click
from click.core import ParameterSource

from toy import switch
from toy.cli.base import Phase, as_json, command, note, program, quoted
from toy.cli.help_text import Command, Group
from toy.cli.progress import EncodingBar, Progress, show_choices
from toy.cli.ranks import as_ranks
from toy.files.runs import DamagedCheckpointError, new_folder
from toy.training import RECIPES, Training
from toy.training.config_file import options_from_file
from toy.training.options import DATA, MACHINE, MODEL, REPORTS, STEPS
from toy.training.ranks import launched

_WIDEST_CHOICES = 40  # characters
SECTIONS = (DATA, MODEL, STEPS, REPORTS, MACHINE)


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def train(context):
    """Train a model: from random weights, or from one that exists."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# ----------------------------------------------------------------------------------------------------------------------
# flags out of the fields of an options dataclass
# ----------------------------------------------------------------------------------------------------------------------


class Names(click.ParamType):
    """Words separated by commas, as a tuple."""

    name = "names"

    def convert(self, value, parameter, context):
        return value if isinstance(value, tuple) else tuple(word.strip() for word in value.split(",") if word.strip())


class RecipeCommand(Command):
    """A command whose help shows its options in the sections of `toy.training.options`."""

    sections: typing.ClassVar[dict[str, str]] = {}  # name of a parameter -> its section

    def format_options(self, context, formatter):
        rows: dict[str, list[tuple[str, str]]] = {section: [] for section in (*SECTIONS, "Run")}
        for parameter in self.get_params(context):
            if (record := parameter.get_help_record(context)) is not None:
                rows[self.sections.get(parameter.name, "Run")].append(record)
        for section, records in rows.items():
            if records:
                with formatter.section(section):
                    formatter.write_dl(records)


def flag_of(field):
    """The click option of one field of an options dataclass."""
    name, kind = f"--{field.name.replace('_', '-')}", _type_of(field)
    help, shown = field.metadata["help"], field.metadata["shown"]
    if kind is bool:
        return click.option(name, is_flag=True, default=field.default, help=help)
    if field.metadata["several"]:
        return click.option(name, type=str, multiple=True, help=f"{help}  [default: {shown}]")
    metavar = None
    if choices := field.metadata["choices"]:
        kind = click.Choice(choices)
        if len("|".join(choices)) > _WIDEST_CHOICES:  # a line of the help has no place for them
            metavar, help = "NAME", f"{help} One of {', '.join(choices)}."
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = shown or default not in (None, "")
    kind = Names() if kind is tuple else kind
    optional = {"is_flag": False, "flag_value": alone} if (alone := field.metadata["alone"]) else {}
    return click.option(name, type=kind, default=default, help=help, show_default=shown, metavar=metavar, **optional)


def _type_of(field):
    """The type of a field without its `| None`; of a tuple, whatever is in it, `tuple`."""
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = next(kind for kind in typing.get_args(kind) if kind is not types.NoneType)
    return typing.get_origin(kind) or kind


def recipe_command(start):
    """The `toy train` command of a recipe, a `toy.training.start.Start`; its docstring is the help."""
    fields = dataclasses.fields(start.options_class)

    def body(out, resume, branch, checkpoint, from_step, config, dry_run, json_wanted, debug, **values):
        where = Where(out, resume, branch, checkpoint, from_step, config)

        def run(ranks=None):
            if not json_wanted:
                return _train(start.options_class, where, dry_run, debug, values, ranks)
            stdout = sys.stdout
            with contextlib.redirect_stdout(sys.stderr):  # everything but the events
                return _train(
                    start.options_class, where, dry_run, debug, values, ranks, lambda e: as_json(e.to_json(), stdout)
                )

        if launched() is None:
            return run()
        given = {name: value for name, value in {**where._asdict(), **values}.items() if _is_given(name)}
        return as_ranks(run, {f"--{name.replace('_', '-')}": value for name, value in given.items()}, debug)

    body.__doc__ = inspect.getdoc(start)
    folder = click.Path(path_type=Path)
    for field in reversed(fields):
        body = flag_of(field)(body)
    body = click.option("--json", "json_wanted", is_flag=True, help="Events as JSON, one a line, alone on stdout.")(
        body
    )
    body = click.option(
        "--dry-run", is_flag=True, help="Show the choices and what they take, train nothing and write nothing."
    )(body)
    body = click.option(
        "--config",
        metavar="FILE",
        type=folder,
        help="Options from a run's config.json or a TOML file; flags go before them.",
    )(body)
    body = click.option(
        "--from-step", type=int, metavar="N", help="With --resume: from this checkpoint, the newer ones being damaged."
    )(body)
    body = click.option(
        "--checkpoint", metavar="best|last|STEP", help="With --branch: which checkpoint of RUN.  [default: last]"
    )(body)
    body = click.option(
        "--branch", is_flag=True, help="With --resume: begin a new run with RUN's checkpoint, with other options."
    )(body)
    body = click.option("--resume", metavar="RUN", type=folder, help="Go on with the run in this directory.")(body)
    body = click.option("--out", type=folder, help="Directory of the run. [default: runs/<time>-<name>-<id>]")(body)
    made = command(train, start.options_class.recipe, RecipeCommand)(body)
    made.sections = {field.name: field.metadata["group"] for field in fields}
    return made


for _start in RECIPES.values():
    recipe_command(_start)


# ----------------------------------------------------------------------------------------------------------------------
# one run
# ----------------------------------------------------------------------------------------------------------------------


class Where(typing.NamedTuple):
    """What a run begins with, and where it is written. All None, and branch False, where nothing is said."""

    out: Path | None
    resume: Path | None
    branch: bool
    checkpoint: str | None
    from_step: int | None
    config: Path | None


def _make_training(kind, where, options, ranks):
    """The `Training` that the flags ask for. options: all of them, with their defaults. ranks: of several processes."""
    given = {name: value for name, value in options.items() if _is_given(name)}
    out, resume, branch, checkpoint, from_step, config = where
    if config is not None:
        if resume is not None:
            raise ValueError("--config cannot be given with --resume: a run that goes on has its own options")
        given = options_from_file(config, kind) | given
    if resume is None and (branch or checkpoint is not None):
        raise ValueError(
            f"--{'branch' if branch else 'checkpoint'} belongs to --resume RUN: name the run to begin with"
        )
    if checkpoint is not None and not branch:
        raise ValueError(
            "--checkpoint belongs to --branch: a run that goes on in its own directory does so from its last"
        )
    if from_step is not None and (resume is None or branch):
        raise ValueError("--from-step belongs to --resume, which names the run to go on with in its own directory")
    if resume is not None and not branch:
        if out is not None:
            raise ValueError("--out cannot be given with --resume: the run goes on in its own directory")
        try:
            return Training.resume(
                resume, recipe=kind.recipe, progress=EncodingBar(), from_step=from_step, ranks=ranks, **given
            )
        except DamagedCheckpointError as error:
            if error.before is None:
                raise
            command = f"{resume_command(kind, resume)} --from-step {error.before}"
            raise ValueError(f"{error}. To go on from step {error.before}, which is whole: {command}") from error
    named = [name for name in ("steps", *kind.budgets) if given.get(name) is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join('--' + name for name in named)} each say how long to train: give one of them")
    out = out or new_folder(given.get("arch") or options.get("arch") or kind.recipe)
    if resume is not None:
        checkpoint = "last" if checkpoint is None else checkpoint
        return Training.branch(
            resume, out, kind.recipe, checkpoint=checkpoint, progress=EncodingBar(), ranks=ranks, **given
        )
    return Training(kind(**given), out=out, progress=EncodingBar(), ranks=ranks)


def _train(kind, where, dry_run, debug, options, ranks=None, on_event=None):
    """One run, shown. ranks: on rank 0 of several processes; on_event: called with every event."""
    with Phase(2, debug):
        job = _make_training(kind, where, options, ranks)
    go_on = resume_command(kind, job.out)

    def hint():
        more = job.step < job.options.steps and job.has_checkpoint()
        return f". To go on from the last checkpoint: {go_on}" if more else ""

    with Phase(1, debug, hint):
        job.measure()
        show_choices(job.choices())
        r = job.recipe
        kernels = switch.missing_kernels_notice(switch.Resolved(r.backend, r.device, r.backend_reason))
        for notice in (*([kernels] if kernels else []), *job.notices()):
            note(notice, err=False)
        if dry_run:
            click.echo("a dry run: nothing was trained and nothing written")
            return 0
        progress = Progress(job.options.steps, job.step, job.start.unit)
        try:
            # closed whatever happens, a standard output that is full or gone too: that saves
            with contextlib.closing(job.run(on_stop=_say_stopping)) as events, progress:
                for event in events:
                    progress.show(event)
                    if on_event is not None:
                        on_event(event)
        except KeyboardInterrupt:
            click.echo(f"toy: stopped at once, without saving{hint()}", err=True)
            return 128 + signal.SIGINT
        if job.step < job.options.steps and not job.out_of_patience:
            click.echo(f"stopped after step {job.step} of {job.options.steps}, and saved. To go on:\n  {go_on}")
            return 128 + (job.stopped_by or 0)
        click.echo(progress.summary(job.step))
        if job.out_of_patience:
            click.echo(
                f"stopped early: no lower validation loss in {job.options.patience} validations. "
                f"To go on all the same: {go_on} --patience {2 * job.options.patience}"
            )
        if (best := best_in_words(job)) is not None:
            click.echo(f"{'best':<10}{best}")
        for name, path in job.written():
            click.echo(f"{name:<10}{path}")
        what, name, *more = job.start.next_command
        click.echo(f"{what:<10}{' '.join([program(), name, quoted(job.out), *more])}")
    return 0


def best_in_words(job):
    """The checkpoint with the lowest validation loss; None where nothing was validated after a step."""
    if job.best is None:
        return None
    loss, step = job.best
    if step == job.step:
        return f"the last step, validation loss {loss:.3f}"
    return f"step {step}, validation loss {loss:.3f}; generate, eval and export take it with --checkpoint best"


def _is_given(name):
    return click.get_current_context().get_parameter_source(name) not in (
        ParameterSource.DEFAULT,
        ParameterSource.DEFAULT_MAP,
    )


def _say_stopping():
    # called from a signal handler: print() could be in the middle of a line
    with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
        os.write(2, b"\nstopping after this step (Ctrl-C again: at once, without saving)\n")


def resume_command(kind, folder):
    return f"{program()} train {kind.recipe} --resume {quoted(folder)}"
