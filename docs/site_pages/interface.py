"""The reference: every public name of every package, with its docstring."""

import importlib
import inspect
import types

PACKAGES = {
    "toy": "What most people need.",
    "toy.recipes": "What is trained and what is frozen.",
    "toy.engines": "A model realized on an op table.",
    "toy.training": "Runs: the options of every recipe, and the loop.",
    "toy.models": "One model a file, forward and backward.",
    "toy.trained": "Models that exist: opened, evaluated, exported, described.",
    "toy.data": "Text and images: sources, tokenizers, batches.",
    "toy.files": "GGUF, checkpoints, run directories.",
    "toy.checks.gradcheck": "Central differences.",
    "toy.adamw": "The optimizer as a row of seven numbers.",
    "toy.config": "How a model and a recipe are described.",
    "toy.quantized": "Matrices of a quantised type.",
    "ggml_bridge": "ggml from Python: devices, graphs, sessions.",
}


def public(package):
    """The public names of a module: its `__all__`, or what it defines itself."""
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == package
            and (inspect.isclass(value) or inspect.isfunction(value))
        ]  # fmt: skip
    return module, list(names)


def page_name(package):
    return package.removeprefix("toy.").replace(".", "_") if package != "toy" else "toy"


def pages():
    """{path: Markdown} of every package, and of the list of them."""
    result, known = {}, {}
    lines = [
        "# Reference", "",
        "Every public name. `toy.__all__` is what `import toy` gives; the parts below it may change more often.", "",
        "| module | |", "|---|---|",
    ]  # fmt: skip
    for package, sentence in PACKAGES.items():
        result[f"reference/{page_name(package)}.md"] = page(package, sentence, known)
        lines.append(f"| [`{package}`]({page_name(package)}.md) | {sentence} |")
    lines += ["", "```{toctree}", ":hidden:", "", *(page_name(package) for package in PACKAGES), "```", ""]
    result["reference/index.md"] = "\n".join(lines)
    return result


def page(package, sentence, known):
    """known: {id of a class or function: (package, name) where it was documented first}."""
    module, names = public(package)
    lines = [f"# `{package}`", "", sentence, ""]
    for name in names:
        value = getattr(module, name)
        lines += [f"## `{name}`", ""]
        if isinstance(value, types.ModuleType):
            lines += [f"The module [`{value.__name__}`]({page_name(value.__name__)}.md).", ""]
        elif id(value) in known:
            where, called = known[id(value)]
            lines += [f"See [`{where}.{called}`]({page_name(where)}.md#{called.lower()}).", ""]
        else:
            if callable(value):
                known[id(value)] = (package, name)
            lines += documented(package, name, value)
    return "\n".join(lines)


def documented(package, name, value):
    """The directive that shows a class, a function or a value."""
    if inspect.isclass(value):
        directive, options = (
            "autoclass",
            [":members:", ":inherited-members: ndarray, tuple, Exception, ValueError, RuntimeError, dict"],
        )
        if issubclass(value, (tuple, Exception)):
            options = [":members:"]
    elif callable(value):
        directive, options = "autofunction", []
    else:
        return [f"`{short(value)}`", ""]
    return [
        "```{eval-rst}",
        f".. {directive}:: {package}.{name}",
        *(f"   {option}" for option in options),
        "",
        "```",
        "",
    ]


def short(value):
    text = repr(value)
    return text if len(text) < 200 else type(value).__name__
