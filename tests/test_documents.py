"""README.md and CONTRIBUTING.md are right: the files and tests they name are there, the commands parse, the code runs."""

import ast
import importlib
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from test_structure import MAY_IMPORT, SETTINGS

import toy
from toy.cli.main import cli

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
PAGES = ("SEVERAL_MACHINES.md",)  # about one thing each
# what a path in a document may begin with; anything else is an example's
TREE = ("toy/", "ggml_bridge/", "tests/", "notebooks/", "examples/", "benchmarks/", ".ci/")


def text_of(name):
    if not (ROOT / "CONTRIBUTING.md").exists() or not (ROOT / "toy").is_dir():
        pytest.skip("these tests read the documents of a checkout")
    return (ROOT / name).read_text(encoding="utf-8")


def without_blocks(text):
    """The text without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def code_spans(text):
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without_blocks(text))]


def command_lines(text):
    """The lines of the blocks that call the program, as lists of words."""
    for line in text.splitlines():
        if line.startswith("    "):
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                if words[0] == "mpirun" and "toy" in words:
                    yield words[words.index("toy") : end]
                elif words[0] == "toy":
                    yield words[:end]
                words = words[end + 1 :]


def parse(words):
    """Let click parse a command line as far as the command's own body. Raises click.UsageError for one that is wrong."""
    command, rest = cli, words[1:]
    while isinstance(command, click.Group):
        if not rest or rest[0] not in command.commands:
            raise click.UsageError(f"{' '.join(words)}: there is no such command")
        command, rest = command.commands[rest[0]], rest[1:]
    # with a parent: the flags of help are its, and click keeps what it finds first for every later call
    parent = click.Context(cli, info_name="toy", **cli.context_settings)
    command.make_context(words[-1], list(rest), parent=parent)


def anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", (*DOCUMENTS, *PAGES))
def test_the_files_it_names_are_there(name):
    text = text_of(name)
    words = text.split() if name in PAGES else code_spans(text)  # of a page those in commands too
    paths = {word.strip("`") for word in words if word.strip("`").startswith(TREE) and " " not in word}
    assert len(paths) >= (1 if name in PAGES else 10)
    missing = {path for path in paths if "NAME" not in path and not list(ROOT.glob(path.rstrip("/")))}
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_its_links_lead_somewhere(name):
    text = text_of(name)
    links = re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))
    assert links
    for link in links:
        path, _, place = link.partition("#")
        assert not path or (ROOT / path).exists(), link
        if place:
            headings = re.findall(r"^#+ (.+)$", text_of(path or name), flags=re.M)
            assert place in map(anchor, headings), link


@pytest.mark.parametrize("name", (*DOCUMENTS, *PAGES))
def test_its_command_lines_parse(name):
    lines = list(command_lines(text_of(name)))
    assert lines
    for words in lines:
        parse(words)


@pytest.mark.parametrize("words", [["toy", "trian"], ["toy", "eval"], ["toy", "generate", "x", "--promt", "y"]])
def test_a_stale_command_line_would_be_found(words):
    with pytest.raises(click.UsageError):
        parse(words)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_commands_it_mentions_are_there(name):
    spans = [span.split() for span in code_spans(text_of(name)) if re.match(r"toy [a-z]", span)]
    assert spans
    for words in spans:
        command = cli
        for word in words[1:]:
            if not isinstance(command, click.Group) or word.isupper():  # NAME: any of them
                break
            assert word in command.commands, " ".join(words)
            command = command.commands[word]


def test_the_names_of_the_library_in_readme_are_there():
    spans = [span for span in code_spans(text_of("README.md")) if re.match(r"toy\.\w", span)]
    assert len(spans) > 8
    for span in spans:
        thing = toy
        for part in re.match(r"toy((?:\.\w+)+)", span)[1].split(".")[1:]:
            assert hasattr(thing, part), span
            thing = getattr(thing, part)
            if isinstance(thing, type) and "()" in span:  # of an object, which is made first
                break


def test_the_tests_that_contributing_names_are_there():
    text = text_of("CONTRIBUTING.md")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = {span for span in code_spans(text) if re.fullmatch(r"test_\w+", span)}
    assert len(named) > 4
    assert not {name for name in named if f"def {name}(" not in tests}


def test_the_map_is_the_one_that_is_tested():
    """The table of the parts, and what each may import, is MAY_IMPORT of tests/test_structure.py."""
    section = text_of("CONTRIBUTING.md").partition("## What is where")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ?([^|]*)\|$", section, flags=re.M)
    said = {}
    for part, what, imports in rows:
        assert len(what.split()) > 2, part
        said[part] = set(re.findall(r"`(\w+)`", imports)) | (SETTINGS if "*settings*" in imports else set())
    assert said.pop("cli") == set()
    assert said == MAY_IMPORT


def test_the_code_in_readme_runs(tmp_path, monkeypatch, capsys):
    """One block after the other, as a reader types them; with three steps in place of a hundred."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), flags=re.M | re.S)
    assert len(blocks) >= 2 and "range(100)" in blocks[0]
    names = {}
    for block in blocks:
        exec(block.replace("range(100)", "range(3)"), names)
    assert 3 < names["loss"] < 5 and capsys.readouterr().out == "(64, 65)\n"


@pytest.mark.parametrize("name", (*DOCUMENTS, *PAGES, "CHANGELOG.md"))
def test_no_merge_is_left_half_done(name):
    assert not re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", text_of(name), re.M)


def imported_names(path):
    """(module, name) of everything that a script or a notebook takes out of this library."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(source)["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        source = re.sub(r"^[%!].*$", "", source, flags=re.M)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("toy", "ggml_bridge"):
            yield from ((node.module, alias.name) for alias in node.names)


FOLDERS = ("benchmarks", "examples", "notebooks", "notebooks/lessons", "notebooks/solutions")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.[pi]*"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_scripts_and_notebooks_import_is_there(path):
    """Also inside of functions, where a benchmark that nobody runs would not notice."""
    for module, name in imported_names(path):
        try:
            found = importlib.import_module(module)
        except (ImportError, RuntimeError):
            if not module.startswith(("toy._kernels", "ggml_bridge.")):  # which may not be built
                raise
            continue
        assert hasattr(found, name) or find_spec(f"{module}.{name}") is not None, f"{module} has no {name}"
