"""Pieces of the sources, found by name: what a page shows of the code is the code."""

import ast
import inspect
import re
from pathlib import Path

from site_pages.repository import ROOT
from toy.ops import reference

_RULE = re.compile(r"^# -{60,}$")
_COMPILED = re.compile(r"^(?:cdef|cpdef|def)\s.*?(\w+)\(", re.M)


def ops():
    """The names of the ops, in the order of the reference table; a backward belongs to its forward."""
    return [
        name
        for name, value in vars(reference).items()
        if inspect.isfunction(value)
        and value.__module__ == reference.__name__
        and not name.startswith("_")
        and not name.endswith("_backward")
        and name not in reference.PARTS
    ]


def parts(op):
    """The parts that an op is made of, each after those that it is made of itself: attention has two."""
    text = inspect.getsource(getattr(reference, op))
    found = [name for name in reference.PARTS if name != op and re.search(rf"\b{name}\(", text)]
    return list(dict.fromkeys(other for name in found for other in (*parts(name), name)))


def has_backward(op):
    return hasattr(reference, f"{op}_backward")


def headings():
    """{op: the comment of the section of reference.py that it stands in}: its formula and where it is from."""
    lines = inspect.getsource(reference).splitlines()
    found, heading = {}, ""
    for i, line in enumerate(lines):
        if _RULE.match(line) and i and lines[i - 1].startswith("# ") and not _RULE.match(lines[i - 1]):
            first = max(k for k in range(i) if _RULE.match(lines[k]))
            heading = " ".join(text.removeprefix("# ") for text in lines[first + 1 : i])
        elif line.startswith("def "):
            found[line[4 : line.index("(")]] = heading
    return found


def meanings():
    """{op: what it is}: the heading of its section, or where that names several ops by what they share, its docstring's
    beginning."""
    of = {op: heading for op, heading in headings().items() if op in ops()}
    headed = list(of.values())
    return {
        op: heading[:1].upper() + heading[1:]
        if headed.count(heading) == 1 or op in heading.lower()
        else first_sentence(inspect.getdoc(getattr(reference, op)))
        for op, heading in of.items()
    }


def first_sentence(text):
    """Of a docstring: the first sentence of its first line."""
    return re.split(r"(?<!et al)\.(?: (?=[A-Z])|$)", text.splitlines()[0])[0]


def caches():
    """{op: the name of its cache class}, by what its forward is said to return."""
    found = {}
    for op in ops():
        returned = str(inspect.signature(getattr(reference, op)).return_annotation)
        names = re.findall(r"\b(\w+Cache)\b", returned)
        if names and hasattr(reference, names[0]):
            found[op] = names[0]
    return found


def numpy_source(op):
    """The cache, the forward and the backward of an op, after those of its parts, as they stand in toy/ops/reference.py."""
    names = [name for part in parts(op) for name in (part, f"{part}_backward")]
    names += [caches().get(op), op, f"{op}_backward"]
    return "\n\n".join(
        inspect.getsource(getattr(reference, name)) for name in names if name and hasattr(reference, name)
    )


def kernels(op):
    """[(file, source)]: the compiled functions of an op that do its arithmetic, from toy/_kernels."""
    root = op.removesuffix("_step")  # adamw_step: adamw_update
    others = [name for name in ops() if name != op and name.startswith(op + "_")]
    arithmetic, others_there = [], []  # functions of C; those of Python count where there are none, as for `split`
    for path in sorted((ROOT / "toy" / "_kernels").glob("*.pyx")):
        file, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        functions = dict(compiled_functions(text))
        wanted = {
            name
            for name, body in functions.items()
            if (name == op or (name.startswith(root + "_") and is_job(body))) and not name.startswith(tuple(others))
        }
        pieces = [functions[name] for name in functions if name in wanted]
        in_c = {name: body for name, body in functions.items() if body.startswith("cdef void")}
        # with those that one of them hands its work over to
        called = {name for name in in_c for own in wanted & in_c.keys() if f" {name}(a, ith, nth)" in in_c[own]}
        computing = [body for name, body in in_c.items() if name in wanted | called]
        if computing:
            arithmetic.append((file, "\n\n".join(computing)))
        elif pieces:
            others_there.append((file, "\n\n".join(pieces)))
    return arithmetic or others_there


def is_job(body):
    """Whether a compiled function is one that the threads are handed: it makes slice ith of nth. Others may have a name that
    begins like an op's: attention's `add_keys` is no addition."""
    return "(void* args, int ith, int nth)" in body.partition(":\n")[0]


def compiled_functions(text):
    """[(name, source)] of the functions of a Cython file, each up to the next line that is not indented."""
    found = []
    for start in _COMPILED.finditer(text):
        lines = text[start.start() :].splitlines()
        end = next(
            (i for i, line in enumerate(lines[1:], 1) if line and not line[0].isspace() and line[0] != ")"), len(lines)
        )
        body = "\n".join(lines[:end]).rstrip()
        if ":\n" in body + "\n":
            found.append((start[1], body + "\n"))
    return found


def accelerated_source(op):
    """The op where toy/ops/accelerated.py defines it in Python, an empty string where it takes a kernel as it is."""
    text = (ROOT / "toy" / "ops" / "accelerated.py").read_text(encoding="utf-8")
    wanted = (op, f"{op}_backward")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    return "\n\n".join(ast.get_source_segment(text, node) + "\n" for node in nodes)


def graph_sources(op):
    """[(spelling, file, source)]: how an op is recorded for the CPU and for other devices."""
    from toy.ops.graph import cpu, native

    result = []
    for spelling, table in (("cpu", cpu.CpuGraphOps), ("native", native.NativeGraphOps)):
        methods = [getattr(table, name) for name in (op, f"{op}_backward") if hasattr(table, name)]
        if methods:
            file = Path(inspect.getsourcefile(methods[0])).resolve()
            text = "\n".join(inspect.cleandoc("\n" + inspect.getsource(method)) + "\n" for method in methods)
            result.append((spelling, file.relative_to(Path(cpu.__file__).resolve().parents[3]).as_posix(), text))
    return result
