"""What a type checker gets: py.typed, stubs that hold what the compiled modules hold, annotations on what is public.

The checker itself (mypy, settings in pyproject.toml) runs in the lint section of .ci/run.
"""

import ast
import inspect
from pathlib import Path

import pytest

import toy

ROOT = Path(toy.__file__).parent.parent
STUBS = sorted(path for package in ("toy", "ggml_bridge") for path in (ROOT / package).rglob("*.pyi"))


def name_of(stub):
    return ".".join(stub.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("package", ["toy", "ggml_bridge"])
def test_packages_are_marked_as_typed(package):
    folder = ROOT / package
    assert (folder / "py.typed").exists() or not folder.exists()


def test_every_compiled_module_has_a_stub():
    sources = {path for package in ("toy", "ggml_bridge") for path in (ROOT / package).rglob("*.pyx")}
    assert sources
    assert {path.with_suffix(".pyi") for path in sources} == set(STUBS)


class Stub:
    """The names of a stub: functions with their parameters (name, has a default), classes with their own stubs, values."""

    def __init__(self, body):
        self.functions, self.classes, self.values = {}, {}, set()
        for node in body:
            if isinstance(node, ast.FunctionDef):
                if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
                    self.values.add(node.name)
                else:
                    self.functions[node.name] = parameters_of(node)
            elif isinstance(node, ast.ClassDef):
                self.classes[node.name] = Stub(node.body)
            elif isinstance(node, ast.AnnAssign):
                self.values.add(node.target.id)
            elif isinstance(node, ast.ImportFrom):  # `from x import y as y` gives y on
                self.values |= {alias.name for alias in node.names if alias.asname == alias.name}

    @property
    def names(self):
        return {name for name in (*self.functions, *self.classes, *self.values) if not name.startswith("_")}


def parameters_of(node):
    arguments = node.args.args
    n_required = len(arguments) - len(node.args.defaults)
    return [(argument.arg, i >= n_required) for i, argument in enumerate(arguments)]


def public_names(thing):
    return {name for name in dir(thing) if not name.startswith("_") and not inspect.ismodule(getattr(thing, name))}


def stub_faults(stub, thing):
    """What a stub says that is not so, or does not say, about a module or a class."""
    # the ops of a table have the types of their twins in toy/ops/reference.py, which toy/ops/accelerated.py takes for them
    found = public_names(thing) - set(getattr(thing, "__all__", ()))
    faults = [f"{name} is missing in the stub" for name in sorted(found - stub.names)]
    faults += [f"{name} is in the stub alone" for name in sorted(stub.names - found)]
    for name, parameters in stub.functions.items():
        function = getattr(thing, name, None)
        if name.startswith("__") or function is None:
            continue
        actual = [(p.name, p.default is not p.empty) for p in inspect.signature(function).parameters.values()]
        if actual != parameters:
            faults.append(f"{name} takes {actual}, in the stub {parameters}")
    for name, inner in stub.classes.items():
        if hasattr(thing, name):
            faults += [f"{name}.{fault}" for fault in stub_faults(inner, getattr(thing, name))]
    return faults


@pytest.mark.parametrize("path", STUBS, ids=name_of)
def test_stubs_hold_what_the_modules_hold(path):
    module = pytest.importorskip(name_of(path), exc_type=ImportError)
    assert stub_faults(Stub(ast.parse(path.read_text(encoding="utf-8")).body), module) == []


def test_a_stale_stub_would_be_found():
    class Thing:
        size = 1

        def upload(self, values, name=None):
            pass

        def renamed(self):
            pass

    text = "class C:\n    size: int\n    def upload(self, values): ...\n    def former(self): ..."
    stub = Stub(ast.parse(text).body[0].body)
    assert stub_faults(stub, Thing) == [
        "renamed is missing in the stub",
        "former is in the stub alone",
        "upload takes [('self', False), ('values', False), ('name', True)], in the stub [('self', False), ('values', False)]",
    ]
