"""The slides of the four sessions: docs/slides/session_N.md, each as one HTML file that needs no network.

A line `---` begins a new slide. A picture is an SVG file of docs/, or `lesson N: words`: the picture of the cell of lesson N
in whose code these words stand. `FILE.svg: X Y WIDTH HEIGHT` is a part of a drawing.
"""

import base64
import itertools
import re
from string import Template

from site_pages import lessons
from site_pages.extension import mathml
from site_pages.repository import ROOT

SOURCES = ROOT / "docs" / "slides"
_PICTURE = re.compile(r"^!\[(?P<alt>[^\]]*)\]\((?P<source>.+)\)$", re.M)


def sessions():
    """{number: path} of the slides."""
    return {int(path.stem.rpartition("_")[2]): path for path in sorted(SOURCES.glob("session_*.md"))}


def title(text):
    return re.match(r"# (.+)", text)[1]


def write(folder):
    """Write the slides of every session into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sessions().values():
        (folder / f"{path.stem}.html").write_text(rendered(path), encoding="utf-8")


def rendered(path):
    """The slides of one session as HTML."""
    from markdown_it import MarkdownIt  # here: the list of slides does without
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    text = path.read_text(encoding="utf-8")
    markdown = MarkdownIt("commonmark").use(
        dollarmath_plugin, renderer=lambda content, options: mathml(content.strip(), options["display_mode"])
    )
    shown = []
    for number, slide in enumerate(re.split(r"^---$", text, flags=re.M), 1):
        pictures = list(_PICTURE.finditer(slide))
        numbers = itertools.count()
        body = markdown.render(_PICTURE.sub(lambda found, numbers=numbers: f"PICTURE{next(numbers)}", slide))
        for i, found in enumerate(pictures):
            alone = " alone" if len(slide.strip().splitlines()) <= 3 else ""
            image = f'<p class="picture{alone}"><img alt="{found["alt"]}" src="{picture(found["source"], path)}"></p>'
            body = body.replace(f"<p>PICTURE{i}</p>", image)
        shown.append(f'<section aria-label="slide {number}">\n{body}</section>')
    template = Template((SOURCES / "template.htm").read_text(encoding="utf-8"))
    return template.substitute(title=title(text), slides="\n".join(shown))


def picture(source, path):
    """A picture as an address that holds all of it."""
    if not (wanted := re.fullmatch(r"lesson (\d+): (.+)", source)):
        name, _, part = source.partition(": ")
        data = (ROOT / "docs" / name).read_text(encoding="utf-8")
        if part:
            data = re.sub(r'viewBox="[^"]*"', f'viewBox="{part}"', data, count=1)
        return f"data:image/svg+xml;base64,{base64.b64encode(data.encode()).decode()}"
    notebook = lessons.read(lessons.notebooks()[int(wanted[1])])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and wanted[2] in lessons.source(cell):
            for output in cell["outputs"]:
                for kind in ("image/svg+xml", "image/png"):
                    if kind in output.get("data", {}):
                        data = "".join(output["data"][kind])
                        encoded = base64.b64encode(data.encode()).decode() if "svg" in kind else data.replace("\n", "")
                        return f"data:{kind};base64,{encoded}"
    raise ValueError(f"{path.name}: lesson {wanted[1]} has no picture made by code with {wanted[2]!r} in it")
