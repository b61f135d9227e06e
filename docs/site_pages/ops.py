"""A page for each op: what it computes and why its backward is right, beside the code that says so."""

import numpy as np

from site_pages import sources
from site_pages.repository import ROOT, link
from toy.checks import gradcheck
from toy.checks.exercises.engine import LESSONS
from toy.checks.exercises.tasks import TASKS

DERIVATIONS = ROOT / "docs" / "derivations"


def pages():
    """{path: Markdown} of every op, and of the list of them."""
    result = {f"ops/{op}.md": page(op) for op in sources.ops()}
    meanings = sources.meanings()
    backward = {op: "yes" if sources.has_backward(op) else "" for op in sources.ops()}
    lines = [
        "# The ops", "",
        "Everything the models do is made of these. Each page has the formula and its derivation, the textbook version in "
        "numpy beside the compiled kernel, the nodes of the graph, and the check of the derivative, all of it taken from the "
        "sources when this site was built.", "",
        "| op | what it is | backward |", "|---|---|---|",
        *(f"| [`{op}`]({op}.md) | {cell(meanings[op])} | {backward[op]} |" for op in sources.ops()),
        "", "```{toctree}", ":hidden:", "", *sources.ops(), "```", "",
    ]  # fmt: skip
    result["ops/index.md"] = "\n".join(lines)
    return result


def cell(text):
    """A comment of the sources as the cell of a table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("^", "\\^")


def page(op):
    parts = [
        "---",
        "hide-toc: true",
        "---",
        "",
        f"# `{op}`",
        "",
        cell(sources.meanings()[op]),
        "",
        (DERIVATIONS / f"{op}.md").read_text(encoding="utf-8"),
        "",
    ]
    parts += ["## In numpy, and compiled", "", "::::{container} side-by-side", ""]
    parts += panel(f"The textbook: {link('toy/ops/reference.py')}", "python", sources.numpy_source(op))
    compiled = [(f"The kernel: {link(file)}", "cython", text) for file, text in sources.kernels(op)]
    if python := sources.accelerated_source(op):
        compiled.append((f"Around the kernels: {link('toy/ops/accelerated.py')}", "python", python))
    if not compiled:
        compiled = [("No kernel of its own", "text", "The reference op is used on every eager backend.\n")]
    for title, language, text in compiled:
        parts += panel(title, language, text)
    parts += ["::::", ""]
    graphs = sources.graph_sources(op)
    if graphs:
        parts += ["## As nodes of a graph", "", "::::{container} side-by-side", ""]
    titles = {"cpu": "For the CPU", "native": "For Metal and other GPUs"}
    for spelling, file, text in graphs:
        parts += panel(f"{titles[spelling]}: {link(file)}", "python", text)
    parts += ["::::", ""] if graphs else []
    if sources.has_backward(op):
        parts += checked(op)
    parts += exercises(op)
    return "\n".join(parts)


def panel(title, language, text):
    return [":::{container} panel", title, "", f"```{language}", text.rstrip(), "```", ":::", ""]


def checked(op):
    """The gradient check of an op, and what it gave."""
    rng = np.random.default_rng(0)
    rows = [row for case in gradcheck.op_cases(rng) if case.op == op for row in gradcheck.check_op(case, rng)]
    wrong = [row for row in rows if not row.ok]
    if wrong:
        raise AssertionError(f"the gradient check of {op} fails: {wrong}")
    return [
        "## Is the backward the derivative?", "",
        "Asked of the forward itself, by central differences in float64 with a random cotangent "
        f"({link('toy/checks/gradcheck.py')}), when this site was built:", "",
        "| case | gradient of | shape | largest relative error | bar |", "|---|---|---|---|---|",
        *(f"| {row.layer} | `{row.gradient}` | {row.shape} | {row.rel_error:.1e} | {row.bar:.0e} |" for row in rows),
        "", "The same on your machine: `toy gradcheck`, or in Python:", "",
        "```python", "import numpy as np", "from toy.checks import gradcheck", "",
        "rng = np.random.default_rng(0)",
        f'print(*gradcheck.check_op(gradcheck.case_of("{op}", rng), rng), sep="\\n")', "```", "",
    ]  # fmt: skip


def exercises(op):
    """The exercises that ask for this op."""
    names = {name for part in (*sources.parts(op), op) for name in (part, f"{part}_backward")}
    found = [task for name, task in TASKS.items() if name in names]
    if not found:
        return []
    lines = ["## Write it yourself", ""]
    for task in found:
        lines += [f"* `{task.signature}`, in lesson {task.lesson}, {LESSONS[task.lesson]}: {task.statement}", ""]
    return [*lines, "```text", *(f"toy exercise show {task.name} > {task.name}.py" for task in found), "```", ""]
