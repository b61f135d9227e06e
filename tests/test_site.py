"""The site: what its pages say is what the code says, its words come in order, its links lead somewhere.

`docs/build.py` builds it strictly, in a section of .ci/run; here is what makes its pages.
"""

import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path

import pytest

import toy
from toy.checks.exercises.tasks import TASKS
from toy.op_table import OpTable
from toy.training import RECIPES

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from site_pages import (  # noqa: E402
    command_line,
    course,
    interface,
    lessons,
    links,
    ops,
    picture,
    recipes,
    repository,
    sources,
    words,
)

every_op = pytest.mark.parametrize("op", sources.ops())


# ----------------------------------------------------------------------------------------------------------------------
# ops, recipes, names, commands
# ----------------------------------------------------------------------------------------------------------------------


def test_every_op_has_a_page_and_a_derivation():
    table = {name for name in vars(OpTable) if not name.startswith("_") and not name.endswith("_backward")}
    assert set(sources.ops()) == table - {"name"}
    assert {path.stem for path in ops.DERIVATIONS.glob("*.md")} == set(sources.ops())


@every_op
def test_the_page_of_an_op_shows_its_code(op):
    from toy.ops import reference

    text = ops.page(op)
    assert inspect.getsource(getattr(reference, op)).rstrip() in text
    if sources.has_backward(op):
        assert inspect.getsource(getattr(reference, f"{op}_backward")).rstrip() in text
        assert "## Is the backward the derivative?" in text
    for part in sources.parts(op):
        assert inspect.getsource(getattr(reference, f"{part}_backward")).rstrip() in text
    for file, kernel in sources.kernels(op):
        assert kernel.rstrip() in text
        assert kernel.splitlines()[0] in (ROOT / file).read_text(encoding="utf-8")
    for _, file, node in sources.graph_sources(op):
        assert node.splitlines()[0].strip() in (ROOT / file).read_text(encoding="utf-8")


def test_kernels_go_to_their_own_op():
    def names(op):
        return {name for _, text in sources.kernels(op) for name, _ in sources.compiled_functions(text)}

    assert names("rms_norm") == {"rms_norm_forward", "rms_norm_backward_"}
    assert names("gelu") == {"gelu_forward", "gelu_backward_"}
    assert "linear_forward" in names("linear")
    assert names("adamw_step") == {"adamw_update"}
    assert names("add") == {"add_forward"}  # and not add_keys of attention
    without = {"masked", "again", "linear_cross_entropy"}  # in Python, around the kernels of others
    assert {op for op in sources.ops() if not sources.kernels(op)} == without


def test_every_op_says_what_it_is():
    meanings = sources.meanings()
    assert set(meanings) == set(sources.ops())
    assert (
        meanings.pop("silu")
        == meanings.pop("swiglu")
        == "SiLU: y = x sigmoid(x), and SwiGLU (Shazeer 2020, eq. 6): y = silu(gate) * up"
    )
    assert len(set(meanings.values())) == len(meanings)
    assert meanings["add"] == "a + b, both (N, D)"


def test_parts_are_shown_where_they_are_used():
    from toy.ops import reference

    assert sources.parts("attention") == ["softmax", "multi_head_attention", "_capped_attention"]
    assert {part for op in sources.ops() for part in sources.parts(op)} == set(reference.PARTS)


def test_a_wrong_backward_gets_no_page(monkeypatch):
    from toy.ops import reference

    monkeypatch.setattr(reference, "silu_backward", lambda d_y, cache: d_y)
    with pytest.raises(AssertionError, match="the gradient check of silu fails"):
        ops.checked("silu")


@pytest.mark.parametrize("name", RECIPES)
def test_the_page_of_a_recipe_has_every_option(name):
    text = recipes.page(name, RECIPES[name])
    for field in dataclasses.fields(RECIPES[name].options_class):
        assert f"| `--{field.name.replace('_', '-')}` |" in text
        assert recipes.help_of(field) in text


def test_every_public_name_is_in_the_reference():
    pages = interface.pages()
    for package in (
        "toy",
        "toy.recipes",
        "toy.engines",
        "toy.training",
        "toy.models",
        "toy.trained",
        "toy.data",
        "toy.files",
    ):
        text = pages[f"reference/{interface.page_name(package)}.md"]
        for name in sys.modules[package].__all__:
            assert f"## `{name}`" in text, f"{package}.{name}"


def test_every_command_is_on_its_page():
    (text,) = command_line.pages().values()
    for words_to_type in ("toy", "toy train", "toy train lora", "toy exercise check", "toy data show", "toy look"):
        assert f" `{words_to_type}`\n" in text
    assert str(Path.home()) not in text


# ----------------------------------------------------------------------------------------------------------------------
# the picture of the architecture
# ----------------------------------------------------------------------------------------------------------------------


def test_the_picture_is_that_of_the_model():
    assert picture.FILE.read_text(encoding="utf-8") == picture.svg(), "cd docs && python -m site_pages.picture"


def test_the_picture_follows_the_model(monkeypatch):
    block_forward = toy.TransformerLM.block_forward

    def without_gelu(self, layer, block, x, batch, kv_cache=None):
        monkeypatch.setattr(self.ops, "gelu", lambda f: (f, None), raising=False)
        return block_forward(self, layer, block, x, batch, kv_cache)

    assert ">GELU<" in picture.svg()
    monkeypatch.setattr(toy.TransformerLM, "block_forward", without_gelu)
    assert ">GELU<" not in picture.svg()


def test_blocks_that_differ_are_not_drawn_as_one(monkeypatch):
    block_forward = toy.TransformerLM.block_forward

    def twice_in_the_second(self, layer, block, x, batch, kv_cache=None):
        x = self.ops.scale(x, 2.0) if layer else x
        return block_forward(self, layer, block, x, batch, kv_cache)

    monkeypatch.setattr(toy.TransformerLM, "block_forward", twice_in_the_second)
    with pytest.raises(ValueError, match="not alike"):
        picture.svg()


# ----------------------------------------------------------------------------------------------------------------------
# words and symbols
# ----------------------------------------------------------------------------------------------------------------------


def test_a_word_is_explained_before_it_is_used():
    """In the list: an explanation uses only words that stand above it. (In the lessons: `by_lesson`.)"""
    known = words.words()
    assert len(known) > 60
    for i, word in enumerate(known):
        for later in known[i + 1 :]:
            found = words.pattern(later).search(word.meaning)
            assert not found, f"{word.term} is explained with {found[0]!r}, which comes later"


def test_every_word_is_used_in_a_lesson():
    """And stands above the first lesson that uses it, so that no lesson uses a word that was not explained."""
    used = words.first_uses()
    listed = {word.term: number for number, found in words.by_lesson().items() for word in found}
    assert listed == used
    unused = {word.term for word in words.words()} - used.keys()
    assert len(unused) <= 15, unused  # words of the course that no lesson needs
    for number, path in lessons.notebooks().items():
        page = lessons.for_the_site(lessons.read(path), number, path, {}, {})
        top = lessons.source(page["cells"][0])
        for word in words.by_lesson().get(number, []):
            assert f"* **{word.term}**: {word.meaning}" in top


def test_a_word_is_found_however_it_is_written():
    word = words.Word("key", ("key",), "")
    assert words.pattern(word).search("queries and keys")
    assert not words.pattern(word).search("`key` keyboard")


def test_one_letter_means_one_thing():
    """Every letter in the shapes of the ops and models stands in the table of symbols, or is named at the top of its file."""
    known = {letter for row in words.symbols() for letter in re.findall(r"\b[A-Z]\b", row.symbol)}
    assert {"B", "T", "N", "V", "D", "F", "H", "G"} <= known
    for folder in ("models", "ops", "ops/graph"):
        for path in sorted((ROOT / "toy" / folder).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            top = ast.get_docstring(ast.parse(text)) or ""
            here = known | set(re.findall(r"\b[A-Z]\b", top))
            for shape in re.findall(r"\(((?:N|B|T|V|D)(?:\*\w+)?, [\w*+/ ,]*)\)", text):
                unknown = set(re.findall(r"\b[A-Z]\b", shape)) - here
                assert not unknown, f"{path.name}: ({shape}) uses {unknown}"


def test_a_d_is_a_gradient_or_one_of_three_widths():
    """No size but d_model, d_ff and d_head has a name that begins with d_, as gradients have."""
    row = next(row for row in words.symbols() if row.symbol == "d_x")
    assert "gradient" in row.meaning
    for path in (ROOT / "toy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in names_of_sizes(node):
                assert name in ("d_model", "d_ff", "d_head"), (
                    f"{path.name}:{node.lineno}: call {name} n_..., it is no gradient"
                )


def names_of_sizes(node):
    """The names with d_ that a piece of syntax gives to whole numbers: annotated so, with such a default, or set to one."""
    named = []
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        arguments = [*node.args.posonlyargs, *node.args.args]
        named = [*zip(arguments[::-1], node.args.defaults[::-1]), *zip(node.args.kwonlyargs, node.args.kw_defaults)]
        named += [(a, a.annotation) for a in [*arguments, *node.args.kwonlyargs]]
        named = [(argument.arg, value) for argument, value in named]
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        named = [(node.target.id, node.annotation)]
    elif isinstance(node, ast.Assign):
        named = [(target.id, node.value) for target in node.targets if isinstance(target, ast.Name)]
    elif isinstance(node, ast.For) and isinstance(node.target, ast.Tuple) and isinstance(node.iter, ast.Tuple):
        rows = [row.elts for row in node.iter.elts if isinstance(row, ast.Tuple)]
        named = [(t.id, v) for row in rows for t, v in zip(node.target.elts, row) if isinstance(t, ast.Name)]
    for name, value in named:
        whole = isinstance(value, ast.Constant) and type(value.value) is int
        if name.startswith("d_") and (whole or (isinstance(value, ast.Name) and value.id == "int")):
            yield name


def test_a_size_with_the_name_of_a_gradient_is_found():
    def found(code):
        return {name for node in ast.walk(ast.parse(code)) for name in names_of_sizes(node)}

    assert found("def f(rows, d_in=4, *, d_out: int): pass") == {"d_in", "d_out"}
    assert found("for n, d_in in ((1, 2), (3, 4)): d_k = 5") == {"d_in", "d_k"}
    assert found("d_x = f(3)\nd_y: Array = x\nfor d, d_q in zip(a, b): pass") == set()


def test_the_symbols_are_those_of_the_configs():
    fields = {field for config in (toy.LlamaConfig, toy.RecipeOptions, toy.ViTConfig) for field in dir(config)}
    fields |= set(toy.LlamaConfig.__dataclass_fields__) | set(toy.RecipeOptions.__dataclass_fields__)
    fields |= set(toy.ViTConfig.__dataclass_fields__) | {"rank", "batch", "d_x"}
    for row in words.symbols():
        for name in filter(None, (name.strip() for name in row.in_code.split(","))):
            assert name in fields, f"{row.symbol}: there is no {name}"


# ----------------------------------------------------------------------------------------------------------------------
# lessons and course
# ----------------------------------------------------------------------------------------------------------------------


def test_the_table_of_lessons_has_every_lesson():
    rows = lessons.table()
    assert rows.keys() == lessons.notebooks().keys()
    for number, row in rows.items():
        assert all(row[column] for column in ("needs", "takes", "with exercises"))
        name = re.search(r"\(notebooks/(\w+)\.ipynb\)", row["lesson"])[1]
        assert lessons.notebooks()[number].stem == name


def test_headings_go_down_one_level_at_a_time():
    above = []
    assert lessons.without_gaps("# a\n```\n# code\n```\n#### b\n#### c", above) == "# a\n```\n# code\n```\n## b\n## c"
    assert lessons.without_gaps("##### d\n## e", above) == "### d\n## e" and above == [1, 2]


def test_a_session_has_90_minutes_and_its_exercises_are_there():
    text = (course.FOLDER / "syllabus.md").read_text(encoding="utf-8")
    sessions = re.split(r"^## Session ", text, flags=re.M)[1:]
    assert len(sessions) == 4
    for session in sessions:
        assert sum(map(int, re.findall(r"^\| (\d+) \|", session, re.M))) == 90
        for names, number in re.findall(r"^\| \d+ \| Exercises? (.*) \| lesson (\d) \|$", session, re.M):
            for name in re.findall(r"`(\w+)`", names):
                assert TASKS[name].lesson == int(number), name


def test_the_list_of_mistakes_has_them_all():
    text = course.mistakes()
    for task in TASKS.values():
        for mistake in task.mistakes:
            assert course.plain(mistake.hint) in text


def test_the_slides_render():
    pytest.importorskip("latex2mathml", reason="the extra site is not installed")
    pytest.importorskip("mdit_py_plugins", reason="the extra site is not installed")
    from site_pages import slides

    assert list(slides.sessions()) == [1, 2, 3, 4]
    for path in slides.sessions().values():
        text = slides.rendered(path)
        assert text.count("<section") == len(re.findall(r"^---$", path.read_text(encoding="utf-8"), re.M)) + 1
        assert "PICTURE" not in text and "$" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S)
        assert not re.findall(r'(?:src|href)="(?!data:|#)', text), "a slide needs no network"
        for alt in re.findall(r'<img alt="([^"]*)"', text):
            assert len(alt) > 20
    with pytest.raises(ValueError, match="lesson 1 has no picture made by code with 'nowhere'"):
        slides.picture("lesson 1: nowhere", path)


# ----------------------------------------------------------------------------------------------------------------------
# links
# ----------------------------------------------------------------------------------------------------------------------


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">b</a> <h1 id="here"></h1> <img src="p.png" alt="a">', "utf-8"
    )
    (tmp_path / "b.html").write_text(
        '<a href="a.html#here">a</a> <p id="there"><a href="https://example.org/">', "utf-8"
    )
    (tmp_path / "p.png").write_bytes(b"")
    assert links.broken_links(tmp_path) == [] and links.images_without_text(tmp_path) == []
    (tmp_path / "p.png").unlink()
    (tmp_path / "b.html").write_text('<a href="a.html#gone">a</a> <img src="a.html"> <a href="../x.html">', "utf-8")
    assert links.broken_links(tmp_path) == [
        "a.html: b.html#there names a place that is not on that page",
        "a.html: p.png leads nowhere",
        "b.html: a.html#gone names a place that is not on that page",
        "b.html: ../x.html leads nowhere",
    ]
    assert links.images_without_text(tmp_path) == ["b.html: a.html has no alternative text"]


def test_links_of_the_repository_lead_to_pages_or_to_the_sources(monkeypatch):
    text = "[a](README.md#x) [b](toy/adamw.py) [c](https://example.org) ![d](docs/a.svg)"
    pages = {"README.md": "index.md", "docs/a.svg": "a.svg"}
    monkeypatch.delenv("TOY_REPOSITORY_URL", raising=False)
    assert repository.relink(text, pages) == "[a](index.md#x) b [c](https://example.org) ![d](a.svg)"
    assert repository.online("notebooks/x.ipynb") == []
    monkeypatch.setenv("TOY_REPOSITORY_URL", "https://github.com/me/toy/")
    assert "[b](https://github.com/me/toy/blob/main/toy/adamw.py)" in repository.relink(text, pages)
    assert [name for name, _ in repository.online("notebooks/x.ipynb")] == ["Colab", "Binder"]
    assert repository.online("notebooks/x.ipynb")[0][1].endswith("/github/me/toy/blob/main/notebooks/x.ipynb")


def test_docstrings_stay_as_they_are():
    pytest.importorskip("latex2mathml", reason="the extra site is not installed")
    docutils = pytest.importorskip("docutils.core", reason="the extra site is not installed")
    from site_pages.extension import as_plain_text

    text = [
        "Adds a*b and *c to `x_y`, the 1_st.", "", "A. Not a list.", "", "    code = [1]", "    more", "Then prose.", "",
        "* one", "  goes on", "* two_", "End.",
    ]  # fmt: skip
    html = docutils.publish_parts(
        "\n".join(as_plain_text(text)), writer="html5", settings_overrides={"report_level": 2}
    )
    shown = re.sub(r"<[^>]+>", "", html["body"]).split()
    assert (
        " ".join(shown)
        == "Adds a*b and *c to x_y, the 1_st. A. Not a list. code = [1] more Then prose. one goes on two_ End."
    )
    assert "problematic" not in html["body"] and html["body"].count("<li>") == 2
