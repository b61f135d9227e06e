"""The commands about the models on this machine: toy list, describe, fetch."""

import click

from toy.cli.base import JSON, Failure, Phase, as_json, command
from toy.cli.progress import printable

places = click.Group()


@command(places, "list")
@click.argument("words", nargs=-1, metavar="[WORD]...")
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object a model, on stdout.")
def list_models(words, json_wanted, debug):
    """List the models on this machine: of toy, Hugging Face, LM Studio, Ollama and llama.cpp.

    WORD: only models with all of these words in their name. The names work wherever a model is named. Only the heads of
    files are read: `toy describe NAME` reads all of one.
    """
    from toy.files.places import caches, head_of, models_in_caches

    with Phase(1, debug):
        found = [model for model in models_in_caches() if all(word.lower() in model.name.lower() for word in words)]
        rows = [(model, None if model.problem else head_of(model.path)) for model in found]
        if json_wanted:
            for model, head in rows:
                as_json(_record(model, head))
        elif rows:
            _show(rows)
        else:
            looked = "\n".join(f"  {place}: {root}" for place, root in caches().items())
            of_that_name = f" with {' and '.join(map(repr, words))} in its name" if words else ""
            click.echo(f"No model{of_that_name} in\n{looked}\n`toy fetch smollm2-135m` gets a small one.")


def _record(model, head):
    record = {"name": model.name, "path": str(model.path), "place": model.place}
    if head is None:
        return record | {"usable": False, "problem": model.problem}
    problem = head.problem
    return record | head._asdict() | {"usable": problem is None and head.kind == "model", "problem": problem}


def _show(rows):
    from rich.console import Console
    from rich.table import Table

    from toy.trained.describe import human_bytes

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("name", "architecture", "type", "size", "run and train", "of"):
        table.add_column(
            name,
            overflow="fold" if name in ("name", "run and train") else "ellipsis",
            justify="right" if name == "size" else "left",
        )
    for model, head in rows:
        if head is None:
            cells = ("", "", "", f"no: {model.problem}")
        else:
            verdict = "yes" if head.problem is None else f"no: {head.problem}"
            verdict = "with --adapter" if head.kind == "adapter" else verdict
            cells = (head.architecture, head.type, human_bytes(head.n_bytes), verdict)
        table.add_row(*map(printable, (model.name, *cells, model.place)))
    Console(highlight=False, markup=False).print(table)


@command(places, "describe")
@click.argument("model", metavar="MODEL")
@JSON
def describe(model, json_wanted, debug):
    """Show what is in a GGUF file: sizes, tensor types, tokenizer, and the algorithm with this model's numbers.

    MODEL: a path, or a name out of `toy list`.
    """
    from rich.console import Console

    from toy.files.places import find_model
    from toy.trained.describe import describe as card
    from toy.trained.describe import facts

    with Phase(2, debug):
        path = find_model(model)
        if json_wanted:
            return as_json(facts(path))
        Console(highlight=False).print(card(path))


@command(places, "fetch")
@click.argument("model")
@click.argument("file", required=False)
@JSON
def fetch(model, file, json_wanted, debug):
    """Download a model into the cache and print its path: a known name (smollm2-135m), or OWNER/REPO and FILE."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from toy.files.fetch import FetchError
    from toy.files.fetch import fetch as download

    columns, console = (BarColumn(), DownloadColumn(), TransferSpeedColumn()), Console(stderr=True)
    bar = Progress(*columns, transient=True, console=console, disable=not console.is_terminal)
    with Phase(2, debug), bar as progress:
        task = progress.add_task(model, total=None)
        try:
            path = download(
                model, file, progress=lambda done, total: progress.update(task, completed=done, total=total)
            )
        except FetchError as error:  # the name was fine, the download was not
            raise Failure(str(error), 1, debug) from error
    if json_wanted:
        return as_json({"model": model, "file": file, "path": str(path), "bytes": path.stat().st_size})
    click.echo(path)
