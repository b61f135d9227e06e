"""Do the tests bite? Breaks the library in one place at a time and sees whether a test fails. Not part of the suite or of CI:

    python tests/mutants.py --sample 40 --seed 1           forty mutants of all modules, chosen by the seed
    python tests/mutants.py --only toy/files --sample 100  of some modules
    python tests/mutants.py --only toy/adamw.py            all of them
    python tests/mutants.py --list                         what there is, without running anything

A mutant is the library with one comparison turned, one number changed by 1, one sign or operator exchanged, one condition
negated, two arguments swapped, or one statement left out. It is made in a copy of the tree in a temporary folder, and the
tests that belong to its module run there until the first failure. A mutant that no test notices ("survived") is a missing
test, or a change that means nothing; the latter are listed in MEANINGLESS. Limits are in processor time, so that a busy
machine kills no mutant that lives.
"""

import argparse
import ast
import copy
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# module (or folder, or beginning of names) -> the tests that are to notice, the quickest first, as arguments of pytest. The
# longest matching name counts.
TESTS = {
    "toy/adamw.py": [
        "test_models_behaviour.py -k 'adamw or hp or row or mode or step'", "test_published_curves.py", "test_recipes.py",
    ],
    "toy/arrays.py": ["test_kernels_safety.py -k 'masked or integers'", "test_ops.py"],
    "toy/ops/reference.py": [
        "test_ops.py -k reference", "test_engine_numbers.py -k 'many_rows and numpy or reference'",
        "test_kernels_safety.py -k reference", "test_quantized.py",
    ],
    "toy/ops/accelerated.py": ["test_quantized.py", "test_kernels_safety.py", "test_ops.py -k accelerated"],
    "toy/op_table.py": ["test_long_contexts.py -k 'bands or reference'"],
    "toy/ops/graph": [
        "test_graph_ops.py", "test_long_contexts.py -k 'graph or ggml'", "test_engine_numbers.py -k ggml",
        "test_finetuning.py -k ggml", "test_graph.py",
    ],
    "toy/quantized.py": ["test_quantized.py", "test_gguf.py"],
    "toy/models": ["test_models_gradients.py", "test_models_behaviour.py", "test_draws.py", "test_recipes.py"],
    "toy/models/base.py": [
        "test_models_behaviour.py", "test_long_contexts.py -k numpy", "test_kernels_safety.py -k model", "test_recipes.py",
    ],
    "toy/models/generation.py": ["test_draws.py", "test_models_behaviour.py"],
    "toy/models/inputs.py": ["test_recipes.py -k numpy", "test_kernels_safety.py -k masked", "test_batches.py"],
    "toy/models/lens.py": ["test_engine_numbers.py -k lens", "test_published_curves.py", "test_finetuning.py -k numpy"],
    "toy/models/llama.py": ["test_models_gradients.py", "test_llama_relatives.py", "test_recipes.py"],
    "toy/models/lora.py": ["test_adapters.py", "test_finetuning.py -k numpy"],
    "toy/models/rotation.py": ["test_llama_relatives.py"],
    "toy/models/parameters.py": ["test_models_behaviour.py", "test_recipes.py -k numpy"],
    "toy/models/vit.py": ["test_vit.py -k numpy"],
    "toy/training": ["test_run_order.py", "test_training.py -k 'not ggml'", "test_runs_from_models.py -k numpy"],
    "toy/training/config_file.py": ["test_keeping.py -k config"],
    "toy/training/estimate.py": ["test_keeping.py -k 'estimate or takes or dry or minutes'"],
    "toy/training/high_loss.py": ["test_run_damage.py -k 'loss or diverged'", "test_run_order.py"],
    "toy/training/lora.py": ["test_runs_from_models.py -k numpy", "test_adapters.py"],
    "toy/training/options.py": [
        "test_help.py", "test_run_order.py", "test_training.py -k 'not ggml'", "test_runs_from_models.py -k numpy",
    ],
    "toy/training/ranks.py": ["test_ranks.py"],
    "toy/training/warm_start.py": ["test_runs_from_models.py -k 'numpy or warm or donor'"],
    "toy/training/schedules.py": ["test_keeping.py -k 'wsd or schedule'", "test_run_order.py", "test_training.py -k numpy"],
    "toy/training/vit_tiny.py": ["test_vit.py -k numpy"],
    "toy/files": ["test_files.py", "test_run_order.py", "test_training.py -k numpy"],
    "toy/files/events.py": ["test_run_damage.py", "test_files.py", "test_runs_attack.py"],
    "toy/files/runs.py": ["test_run_damage.py", "test_keeping.py -k numpy", "test_files.py", "test_runs_attack.py"],
    "toy/files/gguf_types.py": ["test_export_types.py"],
    "toy/files/gguf": ["test_gguf.py", "test_split_gguf.py", "test_places.py", "test_gguf_tokenizer.py", "test_trained.py"],
    "toy/files/gguf_models.py": ["test_gguf.py", "test_llama_relatives.py", "test_trained.py"],
    "toy/files/places.py": ["test_places.py"],
    "toy/files/fetch": ["test_fetch.py"],
    "toy/files/folders.py": ["test_hugging_face_files.py -k 'folder or overwritten or left or renames'"],
    "toy/files/hugging_face": ["test_hugging_face_files.py -k 'not ollama'", "test_hugging_face.py -k 'not peft'"],
    "toy/files/peft.py": ["test_hugging_face_files.py -k 'adapter or setting or pattern'",
        "test_hugging_face.py -k 'peft or adapter'"],
    "toy/files/summaries.py": ["test_runs_side_by_side.py", "test_json_output.py"],
    "toy/files/safetensors_file.py": ["test_hugging_face_files.py -k 'header or damaged or package or pickle or file'"],
    "toy/files/store": ["test_store.py"],
    "toy/engines": ["test_recipes.py", "test_engine_numbers.py", "test_finetuning.py", "test_graph.py"],
    "toy/engines/decoding.py": ["test_decoding.py"],
    "toy/engines/shared.py": ["test_accumulate.py", "test_shared_engine.py", "test_ranks.py"],
    "toy/engines/memory.py": [
        "test_run_damage.py -k 'memory or large'", "test_long_contexts.py -k 'estimate or free or need_be'",
    ],
    "toy/data": ["test_data.py", "test_draws.py", "test_encoding.py", "test_sources.py"],
}  # fmt: skip
PARTS = ["toy/ops", "toy/models", "toy/adamw.py", "toy/training", "toy/files", "toy/engines"]

# what may change without changing what is promised: sizes of pieces, waits, and what only pays or not
MEANINGLESS = {
    "LOGITS_AT_ONCE",
    "LEAST_ROWS",
    "_SHARE_OF_MEMORY",
    "_CHUNK",
    "_BAND",
    "_ROWS",
    "_ALIGNMENT",
    "_MAPPED_ALIGNMENT",
    "WORTH_TWO_THREADS",
    "WORTH_COMPUTING_AGAIN",
    "LARGE_VALUE",
    "_MAX_HEADER",
}

SYMMETRIC = {"add", "mul", "max", "min", "maximum", "minimum", "isclose", "array_equal", "shares_memory", "isinstance"}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


class Mutant(NamedTuple):
    path: str  # of the module, from the root
    line: int
    kind: str
    before: str
    after: str
    number: int  # which of the module's changes, in the order of `changes`

    def __str__(self):
        return f"{self.path}:{self.line}: {self.kind}: {self.before}  ->  {self.after}"


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_guard(node):
    """An `if` that does nothing but raise."""
    return isinstance(node, ast.If) and not node.orelse and isinstance(node.body[-1], ast.Raise)


def removable(node):
    if isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise, ast.Delete)):
        return not is_docstring(node)
    if isinstance(node, ast.Assign):
        return any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
    return is_guard(node)


def changes(tree):
    """(line, kind, function that makes the change in the tree and returns (before, after)) for every change there is.

    Types, messages of errors and what is assigned to a name in MEANINGLESS are left alone.
    """
    found = []

    def add(node, kind, change):
        found.append((node.lineno, kind, change))

    def replace(owner, field, index, new, kind):
        values = getattr(owner, field)
        old = values if index is None else values[index]

        def change():
            if index is None:
                setattr(owner, field, new)
            else:
                values[index] = new
            return old, new

        return kind, change

    def visit(node, in_raise=False):
        if isinstance(node, (ast.JoinedStr, ast.arguments)) or is_meaningless(node):
            if isinstance(node, ast.arguments):
                for default in (*node.defaults, *(d for d in node.kw_defaults if d is not None)):
                    visit(default)
            return
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                visit(node.value)
            return
        for field, value in ast.iter_fields(node):
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or field in ("annotation", "returns"):
                    continue
                if isinstance(child, ast.stmt) and removable(child) and not (is_guard(node) and len(node.body) == 1):
                    add(child, *replace(node, field, index, ast.copy_location(ast.Pass(), child), "left out"))
                if not in_raise and isinstance(child, ast.expr):
                    for new, kind in expressions(child):
                        add(child, *replace(node, field, index, ast.copy_location(new, child), kind))
                visit(child, in_raise or (isinstance(node, ast.Raise) and field == "exc"))

    visit(tree)
    return found


def is_meaningless(node):
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id in MEANINGLESS for target in targets)


def expressions(node):
    """What an expression may be changed to: (new node, kind)."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            new = copy.deepcopy(node)
            new.ops[i] = COMPARISONS[type(operator)]()
            yield new, "comparison"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not is_text(node):
        new = copy.deepcopy(node)
        new.op = OPERATORS[type(node.op)]()
        yield new, "operator"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield copy.deepcopy(node.operand), "sign" if isinstance(node.op, ast.USub) else "negation"
    elif isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield new, "and/or"
    elif isinstance(node, ast.IfExp):
        new = copy.deepcopy(node)
        new.body, new.orelse = new.orelse, new.body
        yield new, "branches"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        for step in (1, -1):
            yield ast.Constant(node.value + step), "number"
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield ast.Constant(not node.value), "truth value"
    elif isinstance(node, ast.Call):
        plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        differ = len(plain) == len(node.args) >= 2 and ast.dump(node.args[0]) != ast.dump(node.args[1])
        if differ and name not in SYMMETRIC:
            new = copy.deepcopy(node)
            new.args[:2] = reversed(new.args[:2])
            yield new, "swapped arguments"


def is_text(node):
    return any(
        isinstance(part, ast.JoinedStr) or isinstance(getattr(part, "value", None), str) for part in ast.walk(node)
    )


def short(node):
    if isinstance(node, ast.Pass):
        return "(nothing)"
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 70 else f"{text[:67]}..."


def mutants_of(path):
    source = (ROOT / path).read_text(encoding="utf-8")
    result = []
    for number, (line, kind, change) in enumerate(changes(ast.parse(source))):
        before, after = change()
        result.append(Mutant(str(path), line, kind, short(before), short(after), number))
        # the tree is changed now, but `before` and `after` are of this place alone; `mutated` starts from a fresh one
    return result


def mutated(mutant):
    """The source of the module with that one change."""
    tree = ast.parse((ROOT / mutant.path).read_text(encoding="utf-8"))
    changes(tree)[mutant.number][2]()
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def modules(only):
    for part in only:
        path = ROOT / part
        files = (
            sorted(path.rglob("*.py"))
            if path.is_dir()
            else sorted(path.parent.glob(path.name + ("" if path.suffix else "*.py")))
        )
        if not files:
            raise SystemExit(f"{part}: there is no such module")
        yield from (file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py")


def tests_for(path):
    names = [name for name in TESTS if path.startswith(name)]
    if not names:
        raise SystemExit(f"{path} has no tests: name some in TESTS")
    return TESTS[max(names, key=len)]


def run_tests(folder, test, seconds=None):
    """-> (exit status, processor seconds, output). seconds: the most processor time that it may take."""

    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))

    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    name, *options = shlex.split(test)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{name}", *options]
    before = os.times()
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, preexec_fn=limit if seconds else None
    )
    after = os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return result.returncode, used, result.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--only", nargs="+", default=PARTS, metavar="PATH", help="folders, modules, or the beginnings of their names"
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    arguments = parser.parse_args()

    mutants = [mutant for path in modules(arguments.only) for mutant in mutants_of(path)]
    total = len(mutants)
    if arguments.sample is not None and arguments.sample < total:
        mutants = sorted(random.Random(arguments.seed).sample(mutants, arguments.sample))
    if arguments.list:
        print(*mutants, sep="\n")
        return
    print(f"{len(mutants)} of {total} mutants", flush=True)
    survivors, killed, limits = [], {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "tree"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "build", "__pycache__", "*.c", "*.ipynb"))
        for mutant in mutants:
            module = folder / mutant.path
            original, start, verdict = module.read_text(encoding="utf-8"), time.monotonic(), "SURVIVED"
            for test in tests_for(mutant.path):
                if test not in limits:
                    status, used, output = run_tests(folder, test)
                    if status != 0:
                        raise SystemExit(f"{test} fails without any mutant:\n{output[-2000:]}")
                    limits[test] = int(3 * used) + 30
                module.write_text(mutated(mutant), encoding="utf-8")
                status, _, _ = run_tests(folder, test, limits[test])
                module.write_text(original, encoding="utf-8")
                if status != 0:  # a failure, or ended by the limit
                    verdict = "killed"
                    break
            print(f"{verdict:<8} {mutant}  [{time.monotonic() - start:.0f} s, {test}]", flush=True)
            part = "/".join(mutant.path.split("/")[:2])
            counts = killed.setdefault(part, [0, 0])
            counts[1] += 1
            counts[0] += verdict == "killed"
            if verdict != "killed":
                survivors.append(mutant)
    print()
    for part, (dead, count) in sorted(killed.items()):
        print(f"{part:<20} {dead:>4} of {count:>4} killed")
    n = len(mutants)
    print(f"score: {n - len(survivors)} of {n} killed" + (f", {(n - len(survivors)) / n:.0%}" if n else ""))
    for mutant in survivors:
        print(f"survived: {mutant}")


if __name__ == "__main__":
    main()
