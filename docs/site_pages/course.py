"""The pages of the course: those of docs/course, the list of slides, and every mistake that the exercises know."""

from site_pages import lessons, slides
from site_pages.repository import ROOT, relink
from toy.checks.exercises.engine import LESSONS
from toy.checks.exercises.tasks import TASKS

FOLDER = ROOT / "docs" / "course"


def pages():
    """{path: Markdown} of the course."""
    here = {path.name: path.name for path in FOLDER.glob("*.md")} | {"mistakes.md": "mistakes.md"}
    here |= {f"{page}": f"../{page}" for page in ("index.md", "architecture.md", "command_line.md", "contributing.md",
                                                   "lessons/index.md", "ops/attention.md")}  # fmt: skip
    result = {f"course/{path.name}": relink(path.read_text(encoding="utf-8"), here) for path in FOLDER.glob("*.md")}
    place = "<!-- the list of slides -->"
    listed = [
        f'* <a href="../slides/{path.stem}.html">Session {number}: {slides.title(path.read_text(encoding="utf-8"))}</a>'
        for number, path in slides.sessions().items()
    ]
    result["course/slides.md"] = result["course/slides.md"].replace(place, "\n".join(listed))
    result["course/mistakes.md"] = mistakes()
    result["course/teaching.md"] += "\n```{toctree}\n:hidden:\n\nmistakes\n```\n"
    return result


def mistakes():
    """Every planted mistake of every exercise: what was written in place of what, and the hint."""
    total = sum(len(task.mistakes) for task in TASKS.values())
    lines = ["# What goes wrong", "",
             f"{len(TASKS)} exercises and {total} mistakes in them that are recognised: whoever makes one gets its hint. "
             "The code of the first column is what the solution has, that of the second what was written.", ""]  # fmt: skip
    numbers = lessons.notebooks()
    for number, name in LESSONS.items():
        tasks = [task for task in TASKS.values() if task.lesson == number]
        if not tasks:
            continue
        lesson = f"[{name}](../lessons/lesson_{number}.ipynb)" if number in numbers else name
        lines += [f"## Lesson {number}: {name}", "", f"The lesson: {lesson}.", ""]
        for task in tasks:
            lines += [f"### `{task.name}`", "", task.statement, "", "| right | written | the hint |", "|---|---|---|"]
            lines += [f"| {code(m.old)} | {code(m.new)} | {plain(m.hint)} |" for m in task.mistakes]
            lines.append("")
    return "\n".join(lines)


def code(text):
    """A piece of code in a cell of a table; nothing where it is empty."""
    text = " ".join(text.split()).replace("|", "\\|")
    return f"`{text}`" if text else "(nothing)"


def plain(text):
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("[", "\\[").replace("<", "&lt;")
