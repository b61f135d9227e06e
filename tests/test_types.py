"""What a type checker gets: py.typed, stubs that hold what the compiled modules hold, annotations on what is public.

The checker itself (mypy, its settings are in pyproject.toml) runs in the lint section of .ci/run.
"""

import ast
import inspect
from pathlib import Path

import pytest

import ggml_bridge
import toy
from ggml_bridge.session import Session
from toy.op_table import OpTable
from toy.ops import reference
from toy.training import Training

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


# ----------------------------------------------------------------------------------------------------------------------
# annotations
# ----------------------------------------------------------------------------------------------------------------------


def public_objects():
    """(name, object) of what the packages offer by name."""
    for package in (toy, toy.recipes, toy.engines):
        for name in package.__all__:
            yield f"{package.__name__}.{name}", getattr(package, name)
    yield from (
        (f"ggml_bridge.{name}", getattr(ggml_bridge, name)) for name in ("available", "devices", "find_device", "load")
    )
    yield from (("ggml_bridge.Session", Session), ("toy.training.Training", Training))


def functions_of(name, thing):
    """(name, function) of a function, or of the public methods of a class of this library."""
    if inspect.isfunction(thing):
        yield name, inspect.unwrap(thing)
    elif inspect.isclass(thing):
        for base in thing.__mro__:
            for attribute, member in (
                vars(base).items() if base.__module__.split(".")[0] in ("toy", "ggml_bridge") else ()
            ):
                member = getattr(member, "fget", None) or getattr(member, "__func__", member)
                if inspect.isfunction(member) and (not attribute.startswith("_") or attribute == "__init__"):
                    yield f"{name}.{attribute}", inspect.unwrap(member)


def unannotated(function):
    """The parameters (and "return") of a function that no annotation says anything about."""
    parameters = list(inspect.signature(function).parameters)
    named = [name for name in parameters if name not in ("self", "cls", "_cls")]
    return [name for name in (*named, "return") if name not in function.__annotations__]


def made_by_the_standard_library(function):
    """The methods that NamedTuple and dataclass write: their fields are annotated, not they."""
    return "<string>" in function.__code__.co_filename or "collections" in function.__code__.co_filename


def test_what_is_public_is_annotated():
    functions = {n: f for name, thing in public_objects() for n, f in functions_of(name, thing)}
    functions = {name: function for name, function in functions.items() if not made_by_the_standard_library(function)}
    assert len(functions) > 150
    bare = {name: missing for name, function in functions.items() if (missing := unannotated(function))}
    assert bare == {}


def test_a_bare_function_would_be_found():
    def step(self, token_ids: int, hp=None):
        pass

    assert unannotated(step) == ["hp", "return"]


def own_parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.name != "self"]


def test_the_type_of_an_op_table_has_every_op():
    """A model may call what is in the type, and the reference has nothing else but the parts of attention."""
    typed = {name: own_parameters(f) for name, f in vars(OpTable).items() if inspect.isfunction(f) and name[0] != "_"}
    ops = {
        name: own_parameters(f)
        for name, f in vars(reference).items()
        if inspect.isfunction(f) and f.__module__ == reference.__name__ and name[0] != "_"
    }
    assert len(ops) > 20
    assert typed == {
        n: parameters for n, parameters in ops.items() if n.removesuffix("_backward") not in reference.PARTS
    }


# strict for the checker, each one by name or with its package: what is imported from outside
PUBLIC = {
    "toy", "toy.adamw", "toy.config", "toy.switch", "toy.quantized", "toy.optional", "toy.engines.handle",
    "toy.engines.named", "toy.recipes.*", "toy.models.*", "toy.training.*", "toy.trained.load",
    "toy.trained.loaded", "toy.trained.classify", "toy.trained.evaluate", "toy.trained.export",
    "toy.files.errors", "toy.files.runs", "toy.files.events", "toy.files.checkpoints", "ggml_bridge.*",
}  # fmt: skip


def test_the_public_modules_are_checked_strictly():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (strict,) = (row["module"] for row in settings["tool"]["mypy"]["overrides"] if row.get("disallow_untyped_defs"))
    assert PUBLIC - set(strict) == set()
    for name in strict:
        place = ROOT.joinpath(*name.removesuffix(".*").split("."))
        assert place.with_suffix(".py").exists() or (place / "__init__.py").exists(), f"there is no module {name}"
