"""nbgrader grades the exercises of the notebooks without a human: a perfect copy gets all points, an empty one none."""

import copy
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

import toy
from toy.checks.exercises.tasks import TASKS

pytest.importorskip("nbgrader", reason="nbgrader is not installed (pip install nbgrader)")

FOLDER = Path(__file__).parents[1] / "notebooks"


def all_exercises(solved):
    """One notebook with the exercises of all lessons, to start one kernel and not ten."""
    paths = sorted(FOLDER.glob("solutions/*.ipynb" if solved else "*.ipynb"))
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    cells = [cell for notebook in notebooks for cell in notebook.cells if "nbgrader" in cell.metadata]
    whole = copy.copy(notebooks[0])
    imports = new_code_cell("import numpy as np\n\nimport toy", id="imports")
    whole.cells = [imports, *({**cell, "outputs": [], "execution_count": None} for cell in cells)]
    return nbformat.from_dict(whole)


@pytest.fixture
def course(tmp_path, monkeypatch):
    """nbgrader's interface to an empty course that has the settings of notebooks/nbgrader_config.py."""
    from nbgrader.apps import NbGraderAPI
    from traitlets.config import Config, PyFileConfigLoader

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(toy.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    )
    # nbgrader calls alembic, a program that stands beside this Python
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    config = PyFileConfigLoader("nbgrader_config.py", str(FOLDER)).load_config()
    config.merge(Config({"CourseDirectory": {"root": str(tmp_path / "course"), "course_id": "toy"}}))
    monkeypatch.chdir(tmp_path)
    return NbGraderAPI(config=config)


def write(course, notebook, *folders):
    path = Path(course.coursedir.root, *folders, "exercises.ipynb")
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)


@pytest.mark.slow
def test_a_perfect_copy_gets_all_points_and_an_empty_one_none(course):
    write(course, all_exercises(solved=False), "source", "toy")
    result = course.generate_assignment("toy")
    assert result["success"], result["log"]
    released = nbformat.read(Path(course.coursedir.root, "release", "toy", "exercises.ipynb"), as_version=4)
    wanted = [cell.source for cell in all_exercises(solved=False).cells]
    assert [cell.source for cell in released.cells] == wanted, "what students get is what is in notebooks/"

    write(course, all_exercises(solved=True), "submitted", "perfect", "toy")
    write(course, released, "submitted", "empty", "toy")
    points = {}
    for student in ("perfect", "empty"):
        result = course.autograde("toy", student)
        assert result["success"], result["log"]
        with course.gradebook as gradebook:
            submission = gradebook.find_submission("toy", student)
            points[student] = submission.score
            assert not submission.needs_manual_grade
            assert submission.max_score == sum(task.source.count("#?") for task in TASKS.values())
            assert len(submission.notebooks[0].grades) == len(TASKS)
    assert points == {"perfect": submission.max_score, "empty": 0}
