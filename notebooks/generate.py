"""Make the notebooks of the lessons from their sources: python notebooks/generate.py [--run] [LESSON ...]

A source, notebooks/lessons/NN_name.py, is a notebook as Python with `# %%` between the cells (jupytext's percent format:
Jupyter opens it too, once jupytext is installed). Out of it come two notebooks:

    notebooks/NN_name.ipynb             for students: every exercise is a blank, nothing has been run
    notebooks/solutions/NN_name.ipynb   with the solutions and all outputs

Three things in a source are this project's own:

    # %% [markdown] exercise="softmax"  an exercise of toy.check: its statement, the stub (or the solution), and the check.
                                        The text of the cell is a hint, folded away. nbgrader's metadata is added.
    # %% alt="What the picture shows"   a code cell that draws: the text for those who do not see the picture
    ![What it shows](attachment:NAME)  a picture of docs/, which goes into the notebook, so that it is seen everywhere

A number on the command line is a lesson ("3"); without one all are made. Without --run the outputs in a notebook of
solutions stay where no code was changed; with it the notebook is executed.
"""

import argparse
import base64
import hashlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
import numpy as np
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from toy.checks.exercises.tasks import find_task

FOLDER = Path(__file__).parent
SOURCES = sorted(FOLDER.glob("lessons/*.py"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
VISIBLE = 16  # of 255: a difference between two colours
_BLANK = re.compile(r"  #\?", re.MULTILINE)
_ATTACHED = re.compile(r"\(attachment:([\w-]+\.svg)\)")


def paths(source):
    """(the notebook with blanks, the notebook with solutions) of a source."""
    return FOLDER / f"{source.stem}.ipynb", FOLDER / "solutions" / f"{source.stem}.ipynb"


def build(source, solved):
    """The notebook of a source, without outputs: with the solutions, or with blanks. Raises ValueError for a bad cell."""
    cells, names = [], set()
    for cell in jupytext.read(source, fmt="py:percent").cells:
        name, alt = cell.metadata.pop("exercise", None), cell.metadata.pop("alt", None)
        others = [key for key in cell.metadata if not key.startswith("lines_to_")]  # blank lines, to jupytext
        if others:
            raise ValueError(f"{source.name}: a cell has {others[0]}=, only exercise= and alt= are known")
        if name is not None:
            if name in names:
                raise ValueError(f"{source.name}: the exercise {name!r} stands there twice, place it once")
            names.add(name)
            cells += _exercise(name, cell.source, solved)
        elif cell.cell_type == "code":
            cells.append(new_code_cell(cell.source, metadata={} if alt is None else {"alt": alt}))
        else:
            cells.append(new_markdown_cell(cell.source))
            if attached := _attachments(cell.source):
                cells[-1].attachments = attached
    counts: dict[str, int] = {}
    for cell in cells:  # the same cells have the same names at every run
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        counts[digest] = counts.get(digest, 0) + 1
        cell.id = digest if counts[digest] == 1 else f"{digest}-{counts[digest]}"
    return new_notebook(cells=cells, metadata=METADATA)


def _attachments(text):
    """The pictures that a text shows, as a notebook keeps them: {file name: {media type: base64}}."""
    pictures = {
        name: (FOLDER.parent / "docs" / name).read_text(encoding="utf-8").encode() for name in _ATTACHED.findall(text)
    }
    return {name: {"image/svg+xml": base64.b64encode(picture).decode()} for name, picture in pictures.items()}


def _exercise(name, hint, solved):
    """The three cells of an exercise: what is asked for, the place for the answer, the check."""
    task = find_task(name)
    text = f"#### Exercise: `{name}`\n\n{task.statement}"
    if hint.strip():
        text += f"\n\n<details>\n<summary>A hint</summary>\n\n{hint.strip()}\n\n</details>"
    answer = new_code_cell((task.solution if solved else task.stub).strip())
    answer.metadata["nbgrader"] = _nbgrader(name, solution=True)
    check = new_code_cell(f'assert toy.check("{name}", {name})')
    check.metadata["nbgrader"] = _nbgrader(f"{name}_check", grade=True, locked=True)
    check.metadata["nbgrader"]["points"] = len(_BLANK.findall(task.source))  # one for each blank
    check.metadata["tags"] = ["raises-exception"]  # "Run all" does not end at the first exercise that is not done
    return [new_markdown_cell(text), answer, check]


def _nbgrader(grade_id, grade=False, solution=False, locked=False):
    return {
        "grade_id": grade_id,
        "grade": grade,
        "solution": solution,
        "locked": locked,
        "task": False,
        "schema_version": 3,
        "cell_type": "code",
    }


def run(notebook):
    """Execute a notebook, in a folder that is gone afterwards. Raises what a cell raises, RuntimeError for a failed check."""
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    os.environ.pop("MPLBACKEND", None)  # pictures belong into the notebook
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:  # a check that says no does not stop the others
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                raise RuntimeError(f"{cell.source}\n{output.ename}: {output.evalue}")
    finish(notebook)


def finish(notebook):
    """Make the outputs the same whatever the kernel's timing was, pictures small, and give them their text."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        joined = []
        for output in cell.outputs:
            last = joined[-1] if joined else None
            if last and output.output_type == last.output_type == "stream" and output.name == last.name:
                last.text += output.text  # a kernel sends what is printed in pieces
            else:
                joined.append(output)
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _in_few_colours(output.data["image/png"])
                if "alt" in cell.metadata:
                    output.metadata.setdefault("image/png", {})["alt"] = cell.metadata["alt"]
        cell.outputs = joined


def _in_few_colours(png):
    """A picture in base64, mostly a third as large: with a palette, unless more than a few pixels would change visibly."""
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":
        return png
    kept = whole = image.convert("RGB")
    for n in (128, 256):
        few = whole.quantize(n, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        change = np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(whole, int)).max(axis=-1)
        if np.mean(change > VISIBLE) < 0.001:
            kept = few
            break
    out = io.BytesIO()
    kept.save(out, "PNG", optimize=True, dpi=image.info.get("dpi"))
    return base64.b64encode(out.getvalue()).decode()


def keep_outputs(notebook, before):
    """Take the outputs of an earlier notebook with the same code. Returns whether there are such."""
    new, old = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (notebook, before))
    if [cell.source for cell in new] != [cell.source for cell in old]:
        return False
    for cell, earlier in zip(new, old):
        cell.outputs, cell.execution_count = earlier.outputs, earlier.execution_count
    finish(notebook)
    return all(cell.execution_count for cell in new)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lessons", nargs="*", type=int, metavar="LESSON", help="the number of a lesson")
    parser.add_argument("--run", action="store_true", help="execute the notebooks with solutions")
    given = parser.parse_args(arguments)
    numbers = [int(source.name[:2]) for source in SOURCES]
    if unknown := sorted(set(given.lessons) - set(numbers)):
        parser.error(f"there is no lesson {unknown[0]}: there are {', '.join(map(str, numbers))}")
    stale = []
    for number, source in zip(numbers, SOURCES):
        if given.lessons and number not in given.lessons:
            continue
        blank, solution = paths(source)
        nbformat.write(build(source, solved=False), blank)
        solved = build(source, solved=True)
        if given.run:
            print(f"running {source.stem} ...", flush=True)
            run(solved)
        elif not (solution.exists() and keep_outputs(solved, nbformat.read(solution, as_version=4))):
            stale.append(source.stem)
        solution.parent.mkdir(exist_ok=True)
        nbformat.write(solved, solution)
    if stale:
        print(f"without outputs, since the code was changed (--run makes them): {', '.join(stale)}", file=sys.stderr)


if __name__ == "__main__":
    main()
