"""The shape of the package: which part imports which (DESIGN section 2), read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import toy
from toy.models import ARCHITECTURES
from toy.training import RECIPES

ROOT = Path(toy.__file__).parent.parent
PACKAGES = [folder for folder in ("toy", "ggml_bridge") if (ROOT / folder / "__init__.py").exists()]

# Part of the package -> what it may import besides itself, in the order of DESIGN:
# cli -> (training, trained, checks) -> recipes -> engines -> (models, ops) -> (_kernels | ggml_bridge).
SETTINGS = {"config", "adamw", "switch"}
MAY_IMPORT = {
    "arrays": set(),
    "config": set(),
    "adamw": set(),
    "optional": set(),
    "op_table": {"quantized"},  # the type of an op table
    "switch": {"config", "op_table", "_kernels", "ops", "ggml_bridge"},  # it looks for the backends
    "_kernels": set(),
    "quantized": {"_kernels", "arrays", "optional"},
    "models": {"arrays", "config", "adamw", "op_table", "quantized"},
    "ops": {"op_table", "_kernels", "arrays", "ggml_bridge", "quantized"},
    "files": SETTINGS | {"models", "optional", "quantized"},
    "data": {"files", "optional"},
    "engines": SETTINGS | {"op_table", "models", "ops", "files", "ggml_bridge", "quantized"},
    "recipes": SETTINGS | {"models", "engines", "files", "quantized"},
    "trained": SETTINGS | {"data", "engines", "files", "models", "quantized", "ggml_bridge"},
    "training": SETTINGS | {"data", "engines", "files", "models", "plots", "recipes", "trained"},
    "checks": SETTINGS | {"engines", "files", "models", "ops", "recipes", "ggml_bridge"},
    "plots": {"files", "optional"},
}
MOST_MODULES_AT_THE_TOP = 12


def sources():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in (".py", ".pyx", ".pxd", ".pxi"):
                yield path


def module_name(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """The absolute names of the modules of this project that a source file imports."""
    name = module_name(path)
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    if path.suffix != ".py":
        return {target for target in cython_imports(path, package) if target.split(".")[0] in PACKAGES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for (
                alias
            ) in node.names:  # `from toy.ops import reference` imports a module, `from toy.config import X` does not
                target = f"{module}.{alias.name}"
                found.add(target if target in MODULES else module)
    return {target for target in found if target.split(".")[0] in PACKAGES}


def cython_imports(path, package):
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].split()
        if words[:1] in (["cimport"], ["import"]):
            yield words[1].rstrip(",")
        elif words[:1] == ["from"] and len(words) > 3 and words[2] in ("cimport", "import"):
            yield words[1] if not words[1].startswith(".") else f"{package}.{words[1].lstrip('.')}".rstrip(".")


MODULES = {module_name(path) for path in sources() if path.suffix in (".py", ".pyx")}


def part_of(module):
    """toy.engines.eager -> engines, ggml_bridge.session -> ggml_bridge; `toy` itself -> "toy"."""
    return module.split(".")[1] if module.startswith("toy.") else module.split(".")[0]


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_parts_import_only_what_is_below_them(part):
    files = [path for path in sources() if part_of(module_name(path)) == part]
    assert files, f"toy.{part} is gone: mend MAY_IMPORT"
    for path in files:
        wrong = {target for target in imports_of(path) if part_of(target) not in MAY_IMPORT[part] | {part}}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_models_are_handed_their_op_table():
    """No model file names a table or an engine: not even inside a function."""
    for path in (ROOT / "toy" / "models").glob("*.py"):
        for target in imports_of(path):
            assert part_of(target) not in ("ops", "engines", "recipes", "_kernels"), f"{path.name} imports {target}"
            assert not target.startswith("ggml_bridge"), f"{path.name} imports {target}"


def test_the_bridge_knows_nothing_of_the_models():
    for path in sources():
        if path.relative_to(ROOT).parts[0] != "ggml_bridge":
            continue
        for target in imports_of(path):
            allowed = target.startswith(("ggml_bridge", "toy._kernels"))
            assert allowed, f"{path.relative_to(ROOT)} imports {target}"


def test_every_part_is_in_the_table():
    """A new part is given its place here first; only the command line stands above all."""
    parts = {part_of(module_name(path)) for path in sources() if path.relative_to(ROOT).parts[0] == "toy"}
    assert parts - {"toy", "cli", "__main__"} == MAY_IMPORT.keys()


def test_few_modules_stand_loose():
    loose = [path.name for path in (ROOT / "toy").glob("*.py")]
    assert len(loose) <= MOST_MODULES_AT_THE_TOP, loose


def import_graph():
    """dict of modules to the modules they import, inside functions too."""
    graph = {}
    for path in sources():
        if path.suffix in (".py", ".pyx"):
            name = module_name(path)
            graph[name] = {target for target in imports_of(path) if target in MODULES and target != name}
    return graph


def circle_in(graph):
    """A list of names that import each other in turn, or None."""
    done, active = set(), []

    def visit(name):
        if name in active:
            return [*active[active.index(name) :], name]
        if name in done:
            return None
        active.append(name)
        for target in sorted(graph[name]):
            if circle := visit(target):
                return circle
        active.pop()
        done.add(name)
        return None

    for name in sorted(graph):
        if circle := visit(name):
            return circle
    return None


def test_no_import_circle():
    """Nowhere, and imports inside functions count: they are where circles hide."""
    circle = circle_in(import_graph())
    assert circle is None, "import circle: " + " -> ".join(circle)


def test_a_circle_would_be_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]


def test_the_package_file_holds_names_only():
    tree = ast.parse((ROOT / "toy" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        dunder = isinstance(node, ast.Assign) and all(t.id in ("__version__", "__all__") for t in node.targets)
        assert docstring or dunder or isinstance(node, (ast.Import, ast.ImportFrom)), ast.unparse(node)
    for name in toy.__all__:
        assert hasattr(toy, name), name
    imported = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert imported == set(toy.__all__)
    assert len(toy.__all__) == len(set(toy.__all__))


PUBLIC_NAMES = {"AdamW", "RecipeOptions", "TransformerConfig", "GPT2Config", "TransformerLM", "Gradients"} | {
    "recipes",
    "engines",
    "backends",
    "set_backend",
    "use_backend",
}


def test_the_contract_names_are_there():
    assert PUBLIC_NAMES - set(toy.__all__) == set()
    assert toy.recipes.FromScratch is not None
    assert toy.engines.GPT2SeqEngine is not None


def test_every_model_and_its_config_are_public():
    for row in ARCHITECTURES.values():
        assert {row.model.__name__, row.config.__name__} <= set(toy.__all__), (
            f"toy/__init__.py lacks those of {row.name}"
        )


def test_every_recipe_and_its_options_are_public():
    for name, start in RECIPES.items():
        assert getattr(toy.recipes, start.recipe_class.__name__) is start.recipe_class, name
        assert getattr(toy.training, start.options_class.__name__) is start.options_class, name
        assert {start.recipe_class.__name__} <= set(toy.recipes.__all__), (
            f"toy/recipes/__init__.py lacks that of {name}"
        )
        assert {start.options_class.__name__} <= set(toy.training.__all__), (
            f"toy/training/table.py lacks that of {name}"
        )


def test_importing_toy_is_light():
    """No plotting, terminal, PyTorch or notebook package comes along with `import toy`."""
    code = "import sys, toy; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.split()
    assert not {"torch", "matplotlib", "rich", "click", "IPython", "safetensors"} & set(loaded)
