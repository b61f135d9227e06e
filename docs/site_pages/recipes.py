"""A page for each recipe: what it trains, and every option, from the fields of its options."""

import dataclasses
import inspect
import re

from site_pages.repository import link
from toy.training import RECIPES
from toy.training.options import DATA, MACHINE, MODEL, REPORTS, STEPS


def pages():
    """{path: Markdown} of every recipe, and of the list of them."""
    result = {f"recipes/{name}.md": page(name, start) for name, start in RECIPES.items()}
    lines = ["# The recipes", "", "A recipe says what is trained and what is frozen. Each is a command, `toy train NAME`, "
             "and a class for Python.", "", "| recipe | | in Python |", "|---|---|---|"]  # fmt: skip
    for name, start in RECIPES.items():
        first = " ".join(inspect.getdoc(start).split("\n\n")[0].split())
        lines.append(f"| [`{name}`]({name}.md) | {first} | `toy.recipes.{start.recipe_class.__name__}` |")
    lines += ["", "```{toctree}", ":hidden:", "", *RECIPES, "```", ""]
    result["recipes/index.md"] = "\n".join(lines)
    return result


def page(name, start):
    paragraphs = inspect.getdoc(start).split("\n\n")
    parts = [f"# `toy train {name}`", ""]
    for paragraph in paragraphs:
        if paragraph.startswith("\b"):  # for click: lines that stay as they are
            parts += ["```text", paragraph.removeprefix("\b").strip(), "```", ""]
        else:
            parts += [as_markdown(" ".join(paragraph.split())), ""]
    recipe = start.recipe_class
    parts += ["## In Python", "", f"{text_of(recipe)}", ""]
    method = inspect.signature(recipe.realize)
    arguments = [plain(str(argument)) for key, argument in method.parameters.items() if key != "self"]
    parts += [
        "```python",
        f"recipe = toy.recipes.{recipe.__name__}()",
        "recipe.realize(",
        *(f"    {argument}," for argument in arguments),
        ")",
        "```",
        "",
    ]
    if described := inspect.getdoc(recipe.realize):
        parts += [as_markdown(described), ""]
    source = inspect.getsourcefile(recipe)
    file = f"toy/recipes/{source.replace(chr(92), '/').rsplit('/', 1)[1]}"
    parts += [f"The whole recipe is {link(file)}; its class on [the reference's page](../reference/recipes.md).", ""]
    parts += ["## Options", "", f"The fields of `toy.training.{start.options_class.__name__}`, which are the flags of the "
              "command.", ""]  # fmt: skip
    fields = dataclasses.fields(start.options_class)
    for section in (DATA, MODEL, STEPS, REPORTS, MACHINE):
        chosen = [field for field in fields if field.metadata["group"] == section]
        if chosen:
            parts += [f"### {section}", "", "| flag | | default |", "|---|---|---|"]
            parts += [
                f"| `--{field.name.replace('_', '-')}` | {help_of(field)} | {default(field)} |" for field in chosen
            ]
            parts.append("")
    resumable = [f"`--{field.name.replace('_', '-')}`" for field in fields if field.metadata["resumable"]]
    parts += [f"A run may go on (`--resume RUN`) with another value of {', '.join(resumable)}; with other values of the rest "
              "it is a new run (`--branch`).", ""]  # fmt: skip
    return "\n".join(parts)


def help_of(field):
    text = as_markdown(field.metadata["help"])
    if field.metadata["choices"]:
        text += " One of " + ", ".join(f"`{choice}`" for choice in field.metadata["choices"]) + "."
    return text.replace("|", "\\|")


def default(field):
    if field.metadata["shown"]:
        return as_markdown(field.metadata["shown"])
    if field.default in (None, "", ()):
        return "none"
    return f"`{','.join(field.default) if isinstance(field.default, tuple) else field.default}`"


def text_of(thing):
    return as_markdown(inspect.getdoc(thing) or "")


def as_markdown(text):
    """Plain text of a docstring as Markdown: names of options as code, nothing taken for markup."""
    text = re.sub(r"(?<![`\w-])(--[a-z][\w-]+)", r"`\1`", text)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([*_<\[\]])", r"\\\1", piece)
        for piece in re.split(r"(`[^`]*`)", text)
    )


def plain(arguments):
    """Arguments of a signature without the modules of their types."""
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", arguments).replace("'", "")
