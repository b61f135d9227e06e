"""Puts the sources of the site together: what is made from the code, and the hand-written pages of this folder."""

import re
import shutil

from site_pages import command_line, course, interface, lessons, ops, picture, recipes, words
from site_pages.repository import ROOT, relink

DOCS = ROOT / "docs"
WHOLE = {  # files of the repository that are pages as they are
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SEVERAL_MACHINES.md": "several_machines.md",
    "CHANGELOG.md": "changes.md",
}


def where():
    """{path in the repository: page} of what is a page of the site."""
    known = dict(WHOLE)
    for number, path in lessons.notebooks().items():
        for name in {path.name, path.relative_to(lessons.NOTEBOOKS).as_posix()}:
            known[f"notebooks/{name}"] = known[name] = f"lessons/lesson_{number}.ipynb"
    known["docs/architecture.svg"] = "architecture.svg"
    return known


def write_sources(folder):
    """Write every page into the folder, as Markdown and notebooks that Sphinx reads."""
    known = where()
    pages = {}
    for path, page in WHOLE.items():
        pages[page] = relink(wide_code((ROOT / path).read_text(encoding="utf-8")), known)
    pages["index.md"] = start_page(pages["index.md"])
    for module in (ops, recipes, interface, command_line, words, course, picture):
        pages |= module.pages()
    pages |= lessons.pages(known)
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copy(DOCS / "architecture.svg", folder / "architecture.svg")


def wide_code(text):
    """The indented commands of a page as blocks in the language of a terminal, which are not taken for Python."""
    return re.sub(
        r"(?:(?<=\n\n)|\A)((?: {4}.*\n|\n(?= {4}))+)", lambda found: f"```bash\n{dedented(found[1])}```\n", text
    )


def dedented(text):
    return "".join(line[4:] if line.startswith("    ") else line for line in text.splitlines(keepends=True))


def start_page(text):
    """README as the start page: the ways into the site stand after its first paragraph."""
    heading, first, rest = text.split("\n\n", 2)
    ways = (DOCS / "start.md").read_text(encoding="utf-8")
    return "\n\n".join([heading, first, ways.strip(), rest])
