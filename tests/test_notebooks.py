"""The notebooks run from top to bottom, and what is committed is what they gave.

The lesson on LoRA needs SmolLM2-135M in the cache. The one on llama.cpp runs without it too, and then shows less.
"""

import copy
import importlib.util
import json
import re
import threading
from pathlib import Path

import nbformat
import pytest
from conftest import PURE
from fetch_test_data import COMMAND, smollm2
from nbclient import NotebookClient
from processes import HOUR, kill_if_it_hangs

import toy

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))
EXPECTED = {
    "01_forward_by_hand",
    "02_backward_by_hand",
    "03_adamw_and_its_seven_numbers",
    "04_train_and_plot",
    "05_same_recipe_three_engines",
    "06_inside_a_ggml_graph",
    "07_lora_on_a_real_model",
    "08_from_numpy_to_llama_cpp",
    "09_vision_transformer",
}
MAX_BYTES = 500_000

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def skip_what_cannot_run(lesson):
    if lesson == "07_lora_on_a_real_model":
        if smollm2() is None:
            pytest.skip(f"SmolLM2-135M is not in the cache ({COMMAND})")
        pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
        if PURE:
            pytest.skip("TOY_PURE_PYTHON is set: numpy would dequantise SmolLM2 anew in every step, for many minutes")
    if lesson == "08_from_numpy_to_llama_cpp":
        pytest.importorskip("gguf", reason="the gguf package, which quantises, is not installed (pip install gguf)")
    if lesson == "09_vision_transformer":
        pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")


def shows_less_here(source):
    """Whether a cell asks llama.cpp, and it is not installed."""
    return "xllamacpp" in source and importlib.util.find_spec("xllamacpp") is None


def outputs(notebook):
    """[(source of the cell, its outputs)] of the code cells."""
    return [(cell.source, cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell_outputs):
    """What a cell shows: the sorted names of its streams and media types."""
    shown = set()
    for output in cell_outputs:
        shown |= {output.name} if output.output_type == "stream" else set(output.get("data", {output.output_type: 0}))
    return sorted(shown)


def errors(notebook):
    return [output for _, cell_outputs in outputs(notebook) for output in cell_outputs if output.output_type == "error"]


def test_the_lessons_are_there():
    assert {path.stem for path in NOTEBOOKS} >= EXPECTED


@every_notebook
def test_is_committed_with_its_results(path):
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run it from top to bottom"
    shown = [kinds(cell_outputs) for _, cell_outputs in outputs(notebook)]
    assert sum("image/png" in cell for cell in shown) >= 3
    assert sum("stdout" in cell for cell in shown) >= 3
    assert not any("stderr" in cell for cell in shown), "warnings do not belong into a lesson"
    assert not errors(notebook)


@every_notebook
def test_says_nothing_about_the_machine_it_ran_on(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata.language_info) == {"name"}
    assert not any(cell.metadata for cell in notebook.cells)
    text = re.sub(r'"image/png": "[^"]*"', "", json.dumps(notebook))
    assert not re.findall(r"/(?:home|root|Users|tmp|work|var|private|opt|usr)/\S*|[A-Z]:\\\\\S*", text)


@every_notebook
def test_ends_with_exercises(path):
    last = nbformat.read(path, as_version=4).cells[-1]
    assert last.cell_type == "markdown"
    questions = last.source.partition("## Exercises")[2]
    assert len(re.findall(r"^\d\. ", questions, flags=re.M)) in (2, 3)


@every_notebook
def test_runs(path, tmp_path, monkeypatch):
    """Every cell runs without an error and shows what it showed when it was committed: text, a picture, both or nothing.

    The numbers are not compared: they depend on the backend and on the text inside this Python.
    """
    skip_what_cannot_run(path.stem)
    monkeypatch.setenv("PYTHONPATH", str(Path(toy.__file__).parents[1]))  # the toy that is tested, from any directory
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    committed = nbformat.read(path, as_version=4)
    notebook = copy.deepcopy(committed)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    folder = tmp_path / "work"
    folder.mkdir()

    done = threading.Event()
    client = NotebookClient(
        notebook, kernel_name="python3", startup_timeout=HOUR, resources={"metadata": {"path": str(folder)}}
    )
    client.on_notebook_start = lambda notebook: kill_if_it_hangs(client.km.provisioner.pid, done)
    try:
        client.execute()
    finally:
        done.set()

    assert not errors(notebook)
    for (source, before), (_, after) in zip(outputs(committed), outputs(notebook), strict=True):
        assert shows_less_here(source) or kinds(after) == kinds(before), source
    assert not list(folder.iterdir()), "a lesson leaves no files beside the notebook"
