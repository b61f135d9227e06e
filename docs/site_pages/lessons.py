"""The lessons: the notebooks as they are committed, with their outputs, and what one wants to know before opening one."""

import json
import re

from site_pages import words
from site_pages.repository import ROOT, online, relink
from toy.checks.exercises.engine import LESSONS
from toy.checks.exercises.tasks import TASKS

NOTEBOOKS = ROOT / "notebooks"
_NUMBERED = re.compile(r"(\d\d)_\w+\.ipynb")


def notebooks():
    """{number: path} of the lessons, those with solutions where there are such; in order."""
    found = {}
    for folder in (NOTEBOOKS, NOTEBOOKS / "solutions"):
        for path in sorted(folder.glob("*.ipynb")):
            if name := _NUMBERED.fullmatch(path.name):
                found[int(name[1])] = path
    return dict(sorted(found.items()))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def title(notebook):
    """The heading of a notebook, without its number."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown" and (heading := re.search(r"^# (.*)$", source(cell), re.M)):
            return re.sub(r"^\d+\.\s*", "", heading[1]).strip()
    raise ValueError("the notebook has no heading")


def table():
    """{number: {column: text}} of the table of lessons in README.md: what each needs and how long it takes."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| lesson |"))
    columns, rows = cells(lines[start]), {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        row = dict(zip(columns, cells(line)))
        rows[int(re.match(r"\[(\d+)", row["lesson"])[1])] = row
    return rows


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def pages(where):
    """{path: text} of every lesson and of the list of them. where: {path in the repository: page}, as for `relink`."""
    result, rows, listed = {}, table(), []
    lines = ["# The lessons", "", "Each is a notebook. Here they are as they were run, with all outputs; to work in one, "
             "open it ([how](../index.md#the-lessons)).", "",
             "| lesson | what it needs | reading and running | with the exercises |", "|---|---|---|---|"]  # fmt: skip
    for number, path in notebooks().items():
        notebook, row = read(path), rows.get(number, {})
        name = f"lesson_{number}"
        result[f"lessons/{name}.ipynb"] = json.dumps(for_the_site(notebook, number, path, row, where))
        lines.append(f"| [{number}. {title(notebook)}]({name}.ipynb) | {row.get('needs', '')} | {row.get('takes', '')} | "
                     f"{row.get('with exercises', '')} |")  # fmt: skip
        listed.append(name)
    lines += ["", "The terms in the order in which they come are in [the words](../words.md).", "",
              "```{toctree}", ":hidden:", "", *listed, "```", ""]  # fmt: skip
    result["lessons/index.md"] = "\n".join(lines)
    return result


def for_the_site(notebook, number, path, row, where):
    """A notebook as a page: its links lead to pages, below its heading stands what it needs, at its end its exercises."""
    pages, headings = [], []
    for cell in notebook["cells"]:
        cell = {**cell, "metadata": {}}
        if cell["cell_type"] == "markdown":
            text = without_gaps(source(cell), headings)
            cell.pop("attachments", None)  # they lie beside the pages
            linked = relink(text, {name: f"../{page}" for name, page in where.items()})
            cell["source"] = linked.replace("(attachment:", "(../")
        else:
            cell["metadata"] = {"mystnb": {"image": of_picture(cell["outputs"], number)}}
        pages.append(cell)
    head = next(i for i, cell in enumerate(pages) if cell["cell_type"] == "markdown")
    pages[head]["source"] = below_heading(source(pages[head]), preface(number, path, row))
    tasks = [task for task in TASKS.values() if task.lesson == number]
    if tasks:
        listed = "\n".join(f"* `{task.signature}`: {task.statement}" for task in tasks)
        text = f"## All its exercises\n\n`toy exercise show NAME` writes a file with blanks, " \
               f"`toy exercise check NAME FILE` says what is right.\n\n{listed}\n"  # fmt: skip
        pages.append({"cell_type": "markdown", "metadata": {}, "source": text})
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in pages:
        cell.pop("id", None)
    return {"cells": pages, "metadata": metadata, "nbformat": 4, "nbformat_minor": 4}


def without_gaps(text, above):
    """Markdown whose headings go down one level at a time, as those who hear a page want it.

    above: the levels of the headings that it stands below, in the notebook; it is changed to what follows stands below.
    """
    lines, fenced = [], False
    for line in text.split("\n"):
        fenced ^= line.startswith("```")
        if not fenced and (heading := re.match(r"(#+) ", line)):
            level = len(heading[1])
            above[:] = [*(other for other in above if other < level), level]
            line = "#" * len(above) + line[level:]
        lines.append(line)
    return "\n".join(lines)


def of_picture(outputs, number):
    """How the picture of a cell is shown: its text for those who do not see it, and its width; empty without a picture."""
    for output in outputs:
        for kind in ("image/png", "image/svg+xml"):
            if kind in output.get("data", {}):
                said = output.get("metadata", {}).get(kind, {})
                name = f"Picture of lesson {number}, {LESSONS.get(number, '')}; the text beside it says what it shows"
                return {"alt": said.get("alt", name)} | ({"width": f"{said['width']}px"} if "width" in said else {})
    return {}


def below_heading(text, addition):
    heading, _, rest = text.partition("\n")
    return f"{heading}\n\n{addition}\n{rest}"


def preface(number, path, row):
    """What one wants to know before the lesson: time, needs, where to open it, and its new words."""
    lines = []
    if row:
        lines.append(f"**Needs** {row['needs']}. **Takes** {row['takes']}; with the exercises {row['with exercises']}.")
    relative = path.relative_to(ROOT).as_posix().replace("solutions/", "")
    if links := online(relative):
        lines.append("Open it in " + " or ".join(f"[{name}]({address})" for name, address in links) + ".")
    new = words.by_lesson().get(number, [])
    if new:
        listed = "\n".join(f"* **{word.term}**: {word.meaning}" for word in new)
        summary = f'<details class="words">\n<summary>Words that are new here ({len(new)})</summary>'
        lines.append(f"{summary}\n\n{listed}\n\n</details>")
    return "\n\n".join(lines) + "\n"
