"""The command toy look: what a model computes on its way through a prompt, as a page to open in a browser."""

from pathlib import Path

import click

from toy.cli.base import ADAPTER, BACKEND, CHECKPOINT, JSON, MODEL, PATH, Phase, as_json, command, tell_checkpoint
from toy.cli.models import text_of

look = click.Group()


@command(look, "look")
@MODEL
@ADAPTER
@click.option("--prompt", required=True, help="Text that the model reads; @FILE reads it from a file, - from stdin.")
@click.option("--chat", is_flag=True, help="The prompt is a message, and the model is about to answer it.")
@click.option(
    "--out", type=PATH, default="look.html", show_default=True, metavar="FILE.html", help="The file to write."
)
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
@JSON
@CHECKPOINT
@BACKEND
def look_command(model, adapter, prompt, chat, out, force, json_wanted, checkpoint, backend, debug):
    """Look inside a model while it reads a prompt: one page for a browser.

    MODEL is as in toy generate. The page has the attention of every layer and head, what each layer would say next (the
    logit lens), the probabilities of the next token with a slider for the temperature, and a map of the embedding. It is
    one file and needs no network.
    """
    from toy.files.atomic import write_text
    from toy.trained import load as trained
    from toy.trained.look import check_prompt, look_inside, page, token_text

    with Phase(2, debug):
        _check_out(out, force)
        prompt = text_of(prompt, "--prompt")
        if not prompt:
            raise ValueError('the prompt is empty: give a text to read with --prompt "..."')
        loaded = trained.load_trained(model, adapter, backend, checkpoint)
        context = loaded.model.config.context_length
        if chat:
            ids = trained.chat_prompt(loaded.tokenizer, prompt, context)
        else:
            ids = trained.text_ids(loaded.tokenizer, prompt, "prompt")
        check_prompt(loaded.model, ids)
    with Phase(1, debug):
        tell_checkpoint(model, loaded.step, checkpoint)
        inside = look_inside(loaded.model, loaded.tokenizer, ids)
        write_text(out, page(inside, loaded.tokenizer, _name(model, loaded.step, adapter)))
        n_bytes = out.stat().st_size
        if not json_wanted:
            return click.echo(f"{out} ({n_bytes / 1e6:.2f} MB)")
        tokens = [{"id": int(i), "text": token_text(loaded.tokenizer, int(i))} for i in ids]
        likeliest = zip(inside.likeliest[-1, -1].tolist(), inside.likeliest_probabilities[-1, -1].tolist())
        following = [{"id": i, "text": token_text(loaded.tokenizer, i), "probability": p} for i, p in likeliest]
        return as_json(
            {"path": str(out), "bytes": n_bytes, "tokens": tokens, "next": following, "checkpoint": loaded.step}
        )


def _check_out(out, force):
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"what is written is an HTML page, and {out} does not end with .html: give it that ending")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out} cannot be written: {'it is' if out.is_dir() else f'{out.parent} is not'} a directory")
    if out.exists() and not force:
        raise ValueError(f"{out} is there already: choose another --out, or overwrite it with --force")


def _name(model, step, adapter):
    """What the page calls the model: its name, the step of a run's checkpoint, the adapters (dict of paths to scales)."""
    path = Path(model)
    name = (path.resolve().name if path.is_dir() else path.name) or str(model)
    step = f", step {step}" if step is not None else ""
    scaled = (file.name + ("" if scale == 1 else f" times {scale:g}") for file, scale in (adapter or {}).items())
    return f"{name}{step}" + (f" with {' and '.join(scaled)}" if adapter else "")
