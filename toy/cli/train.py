"""The commands toy train RECIPE: one run each, with the same loop and display. The flags are the fields of the recipe's
options."""

import contextlib
import dataclasses
import inspect
import os
import signal
import types
import typing
from pathlib import Path

import click
from click.core import ParameterSource

from toy import switch
from toy.cli.base import Phase, command, program, quoted
from toy.cli.progress import EncodingBar, Progress, show_choices
from toy.files.runs import DamagedCheckpointError, new_folder
from toy.training import RECIPES, Training
from toy.training.options import DATA, MACHINE, MODEL, REPORTS, STEPS

SECTIONS = (DATA, MODEL, STEPS, REPORTS, MACHINE)


@click.group(invoke_without_command=True)
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


class RecipeCommand(click.Command):
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
    if field.metadata["choices"]:
        kind = click.Choice(field.metadata["choices"])
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = shown or default not in (None, "")
    return click.option(name, type=Names() if kind is tuple else kind, default=default, help=help, show_default=shown)


def _type_of(field):
    """The type of a field without its `| None`; of a tuple, whatever is in it, `tuple`."""
    kind = field.type
    if isinstance(kind, types.UnionType):
        kind = next(kind for kind in typing.get_args(kind) if kind is not types.NoneType)
    return typing.get_origin(kind) or kind


def recipe_command(start):
    """The `toy train` command of a recipe, a `toy.training.start.Start`; its docstring is the help."""
    fields = dataclasses.fields(start.options_class)

    def body(out, resume, from_step, debug, **values):
        return _train(start.options_class, out, resume, from_step, debug, values)

    body.__doc__ = inspect.getdoc(start)
    folder = click.Path(path_type=Path)
    for field in reversed(fields):
        body = flag_of(field)(body)
    body = click.option(
        "--from-step", type=int, metavar="N", help="With --resume: from this checkpoint, the newer ones being damaged."
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


def _train(kind, out, resume, from_step, debug, options):
    given = {name: value for name, value in options.items() if _is_given(name)}
    with Phase(2, debug):
        if resume is not None:
            if out is not None:
                raise ValueError("--out cannot be given with --resume: the run goes on in its own directory")
            try:
                job = Training.resume(resume, recipe=kind.recipe, progress=EncodingBar(), from_step=from_step, **given)
            except DamagedCheckpointError as error:
                if error.before is None:
                    raise
                command = f"{resume_command(kind, resume)} --from-step {error.before}"
                raise ValueError(f"{error}. To go on from step {error.before}, which is whole: {command}") from error
        elif from_step is not None:
            raise ValueError("--from-step belongs to --resume, which names the run to go on with")
        else:
            if out is None:
                out = new_folder(options.get("arch") or kind.recipe)
            job = Training(kind(**options), out=out, progress=EncodingBar())
    go_on = resume_command(kind, job.out)

    def hint():
        more = job.step < job.options.steps and job.has_checkpoint()
        return f". To go on from the last checkpoint: {go_on}" if more else ""

    with Phase(1, debug, hint):
        show_choices(job.choices())
        r = job.recipe
        kernels = switch.missing_kernels_notice(switch.Resolved(r.backend, r.device, r.backend_reason))
        for notice in (*([kernels] if kernels else []), *job.notices()):
            click.echo(f"note: {notice}")
        progress = Progress(job.options.steps, job.step, job.start.unit)
        try:
            # closed whatever happens, a standard output that is full or gone too: that saves
            with contextlib.closing(job.run(on_stop=_say_stopping)) as events, progress:
                for event in events:
                    progress.show(event)
        except KeyboardInterrupt:
            click.echo(f"toy: stopped at once, without saving{hint()}", err=True)
            return 128 + signal.SIGINT
        if job.step < job.options.steps:
            click.echo(f"stopped after step {job.step} of {job.options.steps}, and saved. To go on:\n  {go_on}")
            return 128 + (job.stopped_by or 0)
        click.echo(progress.summary())
        for name, path in job.written():
            click.echo(f"{name:<10}{path}")
        what, name, *more = job.start.next_command
        click.echo(f"{what:<10}{' '.join([program(), name, quoted(job.out), *more])}")
    return 0


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
