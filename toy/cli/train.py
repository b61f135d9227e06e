"""The commands toy train from-scratch, lora, full-finetune and warm-start: one run each, with the same loop and display."""

import dataclasses
import os
import shlex
import signal
from pathlib import Path

import click
from click.core import ParameterSource

from toy import switch, training
from toy.cli.base import Phase, command, program
from toy.cli.progress import Progress, show_choices
from toy.data import tokenizers
from toy.models import ARCHITECTURES
from toy.training import schedules
from toy.training.options import FullFinetuneOptions, LoRAOptions, TrainingOptions, WarmStartOptions


@click.group(invoke_without_command=True)
@click.pass_context
def train(context):
    """Train a model: from random weights, or from one that exists."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# ----------------------------------------------------------------------------------------------------------------------
# the options of the commands: (flag, type, help, words for a default that depends on others)
# ----------------------------------------------------------------------------------------------------------------------


class Names(click.ParamType):
    """Words separated by commas, as a tuple."""

    name = "names"

    def convert(self, value, parameter, context):
        return value if isinstance(value, tuple) else tuple(word.strip() for word in value.split(",") if word.strip())


_ARCHITECTURES = click.Choice(sorted(ARCHITECTURES, reverse=True))
_MODEL = ("--model", str, "GGUF file, or the name of a fetched model (toy fetch).")
_TEXT = [
    ("--corpus", str, "UTF-8 text file, or a folder of them.", "the documentation inside Python"),
    ("--val-fraction", float, "Share of the text, at its end, to validate on."),
]
_SIZES = [
    ("--arch", _ARCHITECTURES, "The model."),
    ("--d-model", int, "Width of the residual stream."),
    ("--layers", int, "Blocks."),
    ("--heads", int, "Attention heads in a block; they divide the width."),
    ("--kv-heads", int, "Key/value heads of a llama; they divide the heads.", "as --heads"),
    ("--d-ff", int, "Hidden width of the MLP.", "4 x d-model"),
]
_LOOP = [
    ("--context", int, "Tokens in a sequence."),
    ("--batch", int, "Sequences in a step."),
    ("--steps", int, "Training steps in all."),
    ("--lr", float, "Learning rate."),
    ("--schedule", click.Choice(schedules.NAMES), "Learning rate after the warm-up."),
    ("--warmup", int, "Steps of linear warm-up.", "20"),
    ("--lr-floor", float, "Where the cosine ends, as a fraction of --lr."),
    ("--weight-decay", float, "AdamW's weight decay."),
    ("--clip", float, "Largest gradient norm, 0 = no clipping."),
    ("--eval-every", int, "Steps between validations.", "a tenth of the steps, at most 500"),
    ("--eval-batches", int, "Batches in a validation."),
    ("--sample-every", int, "Steps between samples.", "a quarter of the steps, at most 2000"),
    ("--sample-tokens", int, "Tokens in a sample."),
    ("--save-every", int, "Steps between checkpoints.", "as --eval-every"),
    ("--keep", int, "Checkpoints to keep."),
    ("--seed", int, "Of the weights, the batches and the samples."),
    ("--backend", str, f"One of {', '.join(switch.BACKEND_NAMES)}."),
    ("--device", str, "Device of the backend."),
    ("--threads", int, "Threads of BLAS and the kernels.", "the backend's own choice"),
]


def recipe_command(kind, *options):
    """A `toy train` command for a kind of `RunOptions`, with these options and the defaults of its fields."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}

    def option(flag, type, help, shown=None):
        default = defaults[flag.strip("-").replace("-", "_")]
        if type is bool:
            return click.option(flag, is_flag=True, help=help)
        words = ",".join(default) if isinstance(default, tuple) else default
        shown = shown or words not in (None, "")
        return click.option(flag, type=type, default=words, help=help, show_default=shown)

    def decorate(function):
        def body(out, resume, debug, **values):
            return _train(kind, out, resume, debug, values)

        body.__doc__ = function.__doc__
        for row in reversed(options):
            body = option(*row)(body)
        folder = click.Path(path_type=Path)
        body = click.option("--resume", metavar="RUN", type=folder, help="Go on with the run in this directory.")(body)
        body = click.option("--out", type=folder, help="Directory of the run. [default: runs/<time>-<name>-<id>]")(body)
        return command(train, kind.recipe)(body)

    return decorate


@recipe_command(
    TrainingOptions, *_TEXT, ("--tokenizer", click.Choice(tokenizers.KINDS), "What a token is."), *_SIZES, *_LOOP
)
def from_scratch():
    """Train a model from random weights.

    Without options: a small transformer on the documentation inside Python, in about a minute. With --resume, options
    may be left out; --steps may be larger than before.
    """


@recipe_command(
    LoRAOptions,
    _MODEL,
    *_TEXT,
    ("--rank", int, "Rank of the adapters."),
    ("--alpha", float, "The adapters' product is scaled by alpha / rank.", "as --rank"),
    ("--targets", Names(), "Which matrices get adapters: some of q,k,v,o,gate,up,down."),
    *_LOOP,
)
def lora():
    """Train LoRA adapters on a llama in a GGUF file.

    The file stays as it is and is used in place, in its own tensor types; the run directory gets the adapters, also as a
    GGUF file that llama.cpp takes with --lora.

    \b
    toy fetch smollm2-135m
    toy train lora --model smollm2-135m --corpus FILE
    """


@recipe_command(
    FullFinetuneOptions,
    _MODEL,
    *_TEXT,
    ("--freeze-embeddings", bool, "Leave the embedding tables as they are."),
    *_LOOP,
)
def full_finetune():
    """Train every weight of the model in a GGUF file further, in float32.

    A weight takes 16 bytes of memory, and about 30 while a checkpoint is written.
    """


@recipe_command(
    WarmStartOptions,
    ("--model", str, "The donor: a run directory, a checkpoint, a GGUF file, or the name of a fetched model."),
    ("--take", Names(), "Shell patterns of the names of the parameters to take, separated by commas."),
    ("--lens", bool, "See the donor's token embedding, frozen, through a trained projection (llama)."),
    *_TEXT,
    ("--tokenizer", click.Choice(("donor", *tokenizers.KINDS)), "What a token is."),
    *((*row[:3], "the donor's") for row in _SIZES),
    (*_LOOP[0], "the donor's, at most 64"),
    *_LOOP[1:],
)
def warm_start():
    """Train a model that begins with some or all weights of another one; the others start random."""


# ----------------------------------------------------------------------------------------------------------------------
# one run
# ----------------------------------------------------------------------------------------------------------------------


def _train(kind, out, resume, debug, options):
    given = {name: value for name, value in options.items() if _is_given(name)}
    with Phase(2, debug):
        if resume is not None:
            if out is not None:
                raise ValueError("--out cannot be given with --resume: the run goes on in its own directory")
            job = training.Training.resume(resume, recipe=kind.recipe, **given)
        else:
            if out is None:
                from toy.files.runs import new_folder

                out = new_folder(options["arch"] if kind is TrainingOptions else kind.recipe)
            job = training.Training(kind(**options), out=out)
    go_on = resume_command(kind, job.out)

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


def resume_command(kind, folder):
    return f"{program()} train {kind.recipe} --resume {shlex.quote(str(folder))}"
