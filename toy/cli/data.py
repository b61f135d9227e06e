"""The commands about data: toy data show."""

import sys
from pathlib import Path

import click

from toy.cli.base import Phase, as_json, command
from toy.cli.help_text import Group
from toy.cli.progress import printable
from toy.trained.evaluate import token_bytes


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def data(context):
    """Look at what a model would be trained on."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command(data, "show")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Whose tokenizer and chat template: a run, a GGUF file, a fetched model.")
@click.option("--context", type=click.IntRange(min=1), help="Cut examples at so many tokens. [default: not]")
@click.option("--train-on", type=click.Choice(["answers", "all"]), default="answers", show_default=True)
@click.option(
    "--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Documents or examples to show."
)
@click.option(
    "--json", "json_wanted", is_flag=True, help="All of them as JSON, one a line: ids, and labels (-1: not asked)."
)
def show(file, model, context, train_on, limit, json_wanted, debug):
    """Show documents and examples as a model is trained on them.

    What the model is to say is marked: green in a terminal, in brackets elsewhere.
    """
    from toy.data.encoding import Encoder
    from toy.data.open_tokenizer import open_tokenizer
    from toy.data.records import Tokens
    from toy.data.sources import open_source

    with Phase(2, debug):
        tokenizer, source = open_tokenizer(model), open_source(file)
        encoder, n_tokens, n_asked, n = Encoder(tokenizer), 0, 0, 0
        for record in source.records():
            if isinstance(record, Tokens):
                raise ValueError(f"{file} has token ids already: there is nothing to encode")
            encoded = encoder.encode(record, train_on)
            ids, labels = encoded.ids[:context].tolist(), encoded.labels[:context].tolist()
            n, n_tokens, n_asked = n + 1, n_tokens + len(ids), n_asked + sum(label >= 0 for label in labels)
            if json_wanted:
                as_json({"ids": ids, "labels": labels})
            elif n <= limit:
                click.echo(f"--- {n}: {len(ids)} tokens ---")
                click.echo(marked(tokenizer, ids, labels))
    if not json_wanted:
        click.echo(f"{n} documents or examples, {n_tokens} tokens, {n_asked} of them asked for")


def marked(tokenizer, ids, labels):
    """The text of the ids; what is asked for (the token after a label that counts) is green, or in brackets."""
    asked = [False, *(label >= 0 for label in labels[:-1])]
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or asked[end] != asked[start]:
            text = printable(_with_special(tokenizer, ids[start:end]))
            if asked[start]:
                text = click.style(text, fg="green") if sys.stdout.isatty() else f"[[{text}]]"
            pieces.append(text)
            start = end
    return "".join(pieces)


def _with_special(tokenizer, ids):
    """The text of the ids, special tokens written out."""
    parts, run = [], []
    for i in ids:
        if token_bytes(tokenizer, i):
            run.append(i)
        else:
            parts += [tokenizer.decode(run), tokenizer.tokens[i]]
            run = []
    return "".join([*parts, tokenizer.decode(run)])
