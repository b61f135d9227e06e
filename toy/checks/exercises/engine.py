"""Exercises that check themselves: call a student's function, and say exactly what is wrong with what it did.

A task holds its solution as text. Everything else that is code is made from that text: the stub (marked expressions become
`...`) and every *planted mistake* (one piece of the text exchanged for another). An answer is compared with what is
right, and where it is wrong with what each planted mistake gives: whoever made one of them gets its hint. Any other
mistake gets a report of the first thing that is wrong.

What is right is said by the `judge` of a task: the function of toy/ops/reference.py where there is one, central
differences of the forward for a backward, and otherwise the solution.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import io
import linecache
import os
import re
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toy.checks.gradcheck import DERIVATIVE_BAR, central_difference, relative_errors

VALUE_BAR = 1e-8  # per element, for what is computed in float64 by another formula
GRADIENT_BAR = DERIVATIVE_BAR  # against central differences
WIDTH = 80
HEADER = "import numpy as np\n"  # what the code of every task may use
LESSONS = {
    0: "From counting to training",
    1: "The forward pass by hand",
    2: "The backward pass by hand",
    3: "AdamW and its seven numbers",
    4: "Train and plot",
    5: "The same recipe, three engines",
    6: "Inside a ggml graph",
    7: "LoRA on a real model",
    8: "From numpy to llama.cpp",
    9: "A vision transformer",
}

Arguments = dict[str, Any]  # by name, in the order of the signature; float arrays are float64
_BLANK = re.compile(r"^(?P<before>\s*(?:.*?\s[-+*]?=\s|return\s)?)(?P<code>.*?)  #\?(?P<comment>.*)$")
_WHOLE = re.compile(
    r"(\w+(\.\w+)? )?\([\d, ]+\)|\[[\d, ]+\]|`[^`]{,40}`"
)  # a shape, an index, a piece of code: on one line
_LEFT_BLANK = re.compile(r"(^|=|\breturn)\s*\.\.\.\s*(#.*)?$")
_OWN_FOLDERS = tuple(
    f"{folder}{os.sep}" for folder in (Path(__file__).parents[2], Path(np.__file__).parent)
)  # toy, numpy


# ----------------------------------------------------------------------------------------------------------------------
# what a task is
# ----------------------------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """The solution with `old`, which stands in it once, exchanged for `new`, and what to tell whoever wrote that."""

    old: str
    new: str
    hint: str


@dataclasses.dataclass(frozen=True)
class Task:
    """One exercise. A new one is an entry in the list of its lesson."""

    name: str  # of the function that is to be written
    lesson: int
    statement: str  # two or three sentences
    source: str  # the solution; an expression with `  #?` behind it is a blank of the stub, what follows is its comment
    cases: Callable[
        [np.random.Generator], Iterator[Arguments]
    ]  # inputs to try it on: odd shapes, one row, large numbers
    returns: tuple[str, ...]  # the names of what is returned
    mistakes: tuple[Mistake, ...]
    changes: tuple[str, ...] = ()  # the arguments that are to be changed in place
    judge: Callable[..., Any] | None = None  # does what is right, called like the solution; None: the solution
    bar: float = VALUE_BAR  # the largest relative error of an element

    @property
    def signature(self) -> str:
        """ "linear(x, weight, bias) -> y"; without an arrow where nothing is returned."""
        (line,) = re.findall(rf"^def ({self.name}\(.*?\)).*:$", self.source, re.MULTILINE)
        return " -> ".join([line, ", ".join(self.returns)] if self.returns else [line])

    @property
    def solution(self) -> str:
        """The source of the solution, as it is shown."""
        lines = [line.replace("#?", "#").removesuffix("  #") for line in self.source.strip().splitlines()]
        return "\n".join(lines) + "\n"

    @property
    def stub(self) -> str:
        """The source with `...` in place of what is to be written."""
        lines = []
        for line in self.source.strip().splitlines():
            if found := _BLANK.match(line):
                before, comment = found["before"], found["comment"]
                line = f"{before}...{'  #' + comment if comment else ''}"
            lines.append(line)
        return "\n".join(lines) + "\n"

    def wrong_source(self, mistake: Mistake) -> str:
        """The source of the solution with a mistake in it. Raises ValueError when there is not one place for it."""
        if self.solution.count(mistake.old) != 1:
            raise ValueError(
                f"task {self.name}: the solution has {mistake.old!r} {self.solution.count(mistake.old)} times"
            )
        return self.solution.replace(mistake.old, mistake.new)

    def function(self, source: str | None = None) -> Callable[..., Any]:
        """The function that a source defines, the solution's if none is given."""
        source = HEADER + (self.solution if source is None else source)
        file = f"<exercise {self.name} {hash(source)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
        names: dict[str, Any] = {}
        exec(compile(source, file, "exec"), names)
        return names[self.name]


def derivatives(forward, cotangent, *inputs):
    """The gradients of sum(cotangent * forward(*inputs)) with respect to each input, from values of the forward alone."""
    inputs = [np.array(x, np.float64) for x in inputs]
    return tuple(central_difference(lambda _: forward(*inputs), x, cotangent) for x in inputs)


# ----------------------------------------------------------------------------------------------------------------------
# one call of a function
# ----------------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """What came of calling a function with copies of the arguments of a case."""

    returned: Any
    after: dict[str, Any]  # what the arguments hold after the call, by name: "weight", "cache.x", "gradients[0]"
    error: BaseException | None = None
    printed: str = ""
    seconds: float = 0.0


def _call(function, arguments):
    given, out, started, returned, error = copy.deepcopy(arguments), _Start(), time.monotonic(), None, None
    try:
        with np.errstate(all="ignore"), contextlib.redirect_stdout(out):
            returned = function(*given.values())
    except BaseException as raised:  # also sys.exit(), and Ctrl-C in a loop that does not end
        error = raised
    return Call(returned, _held(given), error, out.text, time.monotonic() - started)


class _Start(io.TextIOBase):
    """Keeps the first characters that are printed into it."""

    text = ""

    def write(self, text):
        self.text += text[: 1000 - len(self.text)]
        return len(text)


def _held(arguments):
    """{name: value} of everything that the arguments hold."""
    held: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            held |= _held({f"{name}.{field}": item for field, item in value._asdict().items()})
        elif isinstance(value, (list, tuple)) and any(isinstance(item, np.ndarray) for item in value):
            held |= _held({f"{name}[{i}]": item for i, item in enumerate(value)})
        else:
            held[name] = value
    return held


def _is_number(value):
    """Whether this is what a task computes with: a number or an array of numbers, or a list that numpy makes one of."""
    if isinstance(value, (list, tuple)):
        try:
            value = np.asarray(value)
        except ValueError:
            return False
    return (
        isinstance(value, (bool, int, float, complex, np.generic, np.ndarray))
        and np.asarray(value).dtype.kind in "biufc"
    )


def _same(a, b, bar=0.0):
    """Whether two values are the same, up to relative errors of `bar`; NaN is NaN here."""
    if not (_is_number(a) and _is_number(b)):
        try:
            return type(a) is type(b) and (isinstance(a, np.ndarray) or bool(a == b))
        except Exception:  # what a student returns may be anything
            return False
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or "c" in (a.dtype.kind, b.dtype.kind):
        return False
    finite = np.isfinite(a) & np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=a.dtype.kind == b.dtype.kind == "f"):
        return False
    return bool(relative_errors(a[finite], b[finite]).max(initial=0.0) <= bar)


class Part(NamedTuple):
    """One thing that a call was to leave behind: what is returned, an argument changed in place, one left as it was."""

    name: str
    got: Any
    expected: Any
    before: Any  # of an argument: what it held; None for what is returned
    to_change: bool = False


def _parts(task, call, right, arguments):
    """The parts of a call beside those of the right one, in the order in which they are reported."""
    before = _held(arguments)
    if len(task.returns) < 2:
        returned = [(name, call.returned, right.returned) for name in task.returns]
    elif isinstance(call.returned, (tuple, list)) and len(call.returned) == len(task.returns):
        returned = list(zip(task.returns, call.returned, right.returned))
    else:
        returned = [("the returned value", call.returned, right.returned)]
    parts = [Part(name, got, expected, None) for name, got, expected in returned]
    for name, expected in right.after.items():
        to_change = re.split(r"[.[]", name)[0] in task.changes
        parts.append(Part(name, call.after.get(name), expected, before[name], to_change))
    return sorted(parts, key=lambda part: (part.before is not None) + (part.before is not None and not part.to_change))


# ----------------------------------------------------------------------------------------------------------------------
# what is wrong with a part
# ----------------------------------------------------------------------------------------------------------------------


def _fault(task, part):
    """(None or what is wrong in words, the largest relative error)"""
    name, got, expected = part.name, part.got, part.expected
    if part.before is not None and not part.to_change:
        return (None if _same(got, expected) else _changed(part)), 0.0
    if name == "the returned value":
        wanted = f"{len(task.returns)} values, {', '.join(task.returns)}"
        return f"It returns {_in_words(got)}, expected {wanted}: end with `return {', '.join(task.returns)}`.", 0.0
    if got is None and part.before is None:
        end = "the last line must be a `return`"
        return f"It returns None{_for(task, name)}, expected {_in_words(expected)}: {end}.", 0.0
    a_list, plain = isinstance(expected, list), not isinstance(expected, (np.ndarray, list))
    if not _is_number(got) or (not a_list and isinstance(got, (list, tuple))):
        return f"{name} is {_in_words(got)}, expected {_in_words(expected)}.", 0.0
    array, right = np.asarray(got), np.asarray(expected)
    if array.shape != right.shape:
        transposed = array.shape == right.shape[::-1] and _same(array.T, right, task.bar)
        why = ": every element is right, but rows and columns are exchanged" if transposed else ""
        return f"{name} has shape {array.shape}, expected {right.shape}{why}.", 0.0
    if not _fits(array.dtype, right.dtype, plain) and not (plain and array.dtype.kind == "i" and _same(array, right)):
        real = "the arithmetic is done in the dtype of the inputs"
        why = real if right.dtype.kind == "f" else "these are whole numbers"
        return f"{name} has dtype {array.dtype}, expected {right.dtype}: {why}.", 0.0
    with np.errstate(all="ignore"):
        errors = np.where(array == right, 0.0, relative_errors(array, right))  # equal: also two infinities
    wrong = ~(errors <= task.bar)  # not a number is wrong too
    if not wrong.any():
        return None, float(errors.max(initial=0.0))
    return _wrong_elements(part, array, right, wrong), float("inf")


def _fits(given, expected, plain):
    """Whether a dtype is what is expected: the same, or for whole numbers, and for what is no array, one of its kind."""
    return given == expected or (given.kind == expected.kind and (plain or expected.kind == "i"))


def _wrong_elements(part, array, right, wrong):
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    element = part.name + (f"[{', '.join(map(str, place))}]" if place else "")
    got, expected = _two_numbers(array[place], right[place])
    if not place:
        sentence = f"{part.name} is {got}, expected {expected}."
    else:
        sentence = (
            f"{part.name}, shape {array.shape}, is wrong in {wrong.sum()} of {wrong.size} elements. "
            f"The first: {element} is {got}, expected {expected}."
        )
    return sentence + _pattern(part, array, right)


def _pattern(part, array, right):
    """What all of the wrong elements have in common, as a sentence."""
    if not np.isfinite(array).all():
        n = int((~np.isfinite(array)).sum())
        which = f"{n} of its elements {'are' if n > 1 else 'is'}" if array.ndim else "That is"
        return f" {which} not finite: a division by zero, a logarithm of 0, or an exp of a large number."
    if part.to_change and _same(array, part.before):
        return (
            f" {part.name} was not changed at all: write into it ({part.name} += ...; `a = a + b` makes a new array)."
        )
    if part.to_change and array.dtype.kind == "f" and _same(array, right - part.before, 1e-6):
        return f" What {part.name} held is lost: add to it (+=)."
    change, wanted = (array - part.before, right - part.before) if part.to_change else (array, right)
    large = np.abs(wanted) > 1e-3 * np.abs(wanted).max(initial=0.0)
    if array.dtype.kind == "f" and large.any():
        factor = float(np.median(change[large] / wanted[large]))
        what = "The change of every element" if part.to_change else "Every element" if array.ndim else "It"
        opposite = abs(factor + 1) < 1e-6
        if (opposite or (array.size > 1 and abs(factor) > 1e-6)) and _same(change, factor * wanted, 1e-6):
            known = "the sign is wrong" if opposite else "a factor is missing or one too many"
            return f" {what} is {factor:.6g} times the expected: {known}."
    if array.ndim >= 2 and array.shape[-1] == array.shape[-2] and _same(array.swapaxes(-1, -2), right, 1e-6):
        return " Every element is right, but rows and columns are exchanged."
    return ""


def _changed(part):
    if not (_is_number(part.got) and np.shape(part.got) == np.shape(part.before)):
        return (
            f"It changes its input {part.name}: {_in_words(part.before)} before, {_in_words(part.got)} after the call."
        )
    got, before = np.asarray(part.got), np.asarray(part.before)
    place = tuple(int(i) for i in np.argwhere(got != before)[0])
    element = part.name + (f"[{', '.join(map(str, place))}]" if place else "")
    numbers = " and is now ".join(reversed(_two_numbers(got[place], before[place])))
    return f"It changes its input {part.name}, shape {got.shape}: {element} was {numbers}. Compute with a copy (no += on it)."


def _two_numbers(got, expected):
    """Both with as many digits as tell them apart."""
    for digits in (6, 10, 17):
        texts = tuple(f"{x:.{digits}g}" if isinstance(x, (float, np.floating)) else str(x) for x in (got, expected))
        if texts[0] != texts[1]:
            break
    return texts


def _for(task, name):
    return f" for {name}" if len(task.returns) > 1 else ""


def _in_words(value):
    """A value for a sentence: what it is, and its shape."""
    if value is None or value is Ellipsis:
        return {None: "None", Ellipsis: "a blank (...)"}[value]
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}" + (
            f" and dtype {value.dtype}" if value.dtype.kind not in "fi" else ""
        )
    if isinstance(value, np.generic):
        return f"the number {value:.6g}" if value.dtype.kind in "iuf" else f"a {type(value).__name__}"
    if isinstance(value, (bool, int, float)):
        return f"the number {value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


# ----------------------------------------------------------------------------------------------------------------------
# the verdict
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class Verdict:
    """True when the answer is right. `text` is what `toy.check` printed."""

    task: str
    right: bool
    text: str
    hint: str | None = None  # of the planted mistake that was made, where it is a known one
    stopped: bool = False  # by Ctrl-C

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return f"<{self.task}: {'right' if self.right else 'not yet'}>"

    def _ipython_display_(self) -> None:
        """The text stands there already: a notebook shows nothing more."""


class _Prepared(NamedTuple):
    """One case, with what is right and what the planted mistakes give."""

    arguments: Arguments
    right: Call
    mistaken: tuple[Call, ...]


@functools.lru_cache(maxsize=256)
def _prepared(task, seed):
    functions = [task.function(task.wrong_source(mistake)) for mistake in task.mistakes]
    judge = task.judge or task.function()
    prepared = []
    for arguments in task.cases(np.random.default_rng([seed, *task.name.encode()])):
        right = _call(judge, arguments)
        if right.error is not None:
            raise right.error
        prepared.append(_Prepared(arguments, right, tuple(_call(function, arguments) for function in functions)))
    return prepared


def judge_answer(task: Task, function: Callable[..., Any], seed: int = 0) -> Verdict:
    """The verdict on a function, for every case of the task."""
    if not callable(function):
        words = f"{_in_words(function)} is no function: give the function itself, without parentheses or arguments."
        return _verdict(task, words)
    prepared = _prepared(task, seed)
    if misfit := _misfit(task, function, prepared[0].arguments):
        return _verdict(task, misfit)
    calls, worst, where, first, others = [], 0.0, "", None, []
    for i, case in enumerate(prepared):
        call = _call(function, case.arguments)
        calls.append(call)
        if isinstance(call.error, KeyboardInterrupt):
            where = _line_of(function, call.error)
            words = f"It was stopped after {call.seconds:.0f} s{where}. Does this loop come to its end?"
            return _verdict(task, words, case=case, stopped=True)
        if call.error is not None:
            first = first or (i, None, _error_in_words(function, call))
            continue
        for part in _parts(task, call, case.right, case.arguments):
            fault, error = _fault(task, part)
            if fault is not None and first is None:
                first = (i, part, fault)
            elif fault is not None and first[0] == i:
                others.append(part.name)
            if fault is None and error > worst:
                worst, where = error, f" (of {part.name}; allowed {task.bar:.0e})"
    if first is None:
        n = len(prepared)
        text = f"{task.name}: right, in {n} cases; the worst error is {worst:.1e}{where}."
        return Verdict(task.name, True, text + _printed(calls[0]))
    i, part, fault = first
    if blank := _blank(function):
        return _verdict(task, f"There is still a blank (...) to fill in, {blank}.")
    if others:
        fault += f" Also wrong: {', '.join(others)}."
    hint = _hint(task, prepared, calls, part)
    return _verdict(task, fault, hint, prepared[i], f"{i + 1} of {len(prepared)}", _printed(calls[i]))


def _hint(task, prepared, calls, part):
    """The hint of the planted mistake that gives the same as this function in all cases, or None.

    Where none gives the same altogether, that which gives the same for the first wrong part, if it is one alone.
    """
    for m, mistake in enumerate(task.mistakes):
        pairs = [(call, case.mistaken[m], case) for call, case in zip(calls, prepared)]
        if all(_same_call(task, call, mistaken, case) for call, mistaken, case in pairs):
            return mistake.hint
    if part is None:
        return None
    alike = []
    for m, mistake in enumerate(task.mistakes):
        pairs = [(call, case.mistaken[m], case) for call, case in zip(calls, prepared)]
        if all(_same_part(task, part.name, *pair) for pair in pairs):
            alike.append(mistake.hint)
    return alike[0] if len(alike) == 1 else None


def _same_call(task, call, mistaken, case):
    if call.error is not None or mistaken.error is not None:
        return type(call.error) is type(mistaken.error) and str(call.error) == str(mistaken.error)
    ours, theirs = (_parts(task, c, case.right, case.arguments) for c in (call, mistaken))
    return len(ours) == len(theirs) and all(_same(a.got, b.got, task.bar) for a, b in zip(ours, theirs))


def _same_part(task, name, call, mistaken, case):
    if call.error is not None or mistaken.error is not None:
        return False
    ours, theirs = (
        [p.got for p in _parts(task, c, case.right, case.arguments) if p.name == name] for c in (call, mistaken)
    )
    return len(ours) == len(theirs) == 1 and _same(ours[0], theirs[0], task.bar)


def _misfit(task, function, arguments):
    """What is wrong with the parameters of a function, or None."""
    try:
        inspect.signature(function).bind(*arguments.values())
    except TypeError as error:
        n = f"{len(arguments)} argument{'s' * (len(arguments) > 1)}"
        return f"It cannot be called with {n} ({error}). The signature is {task.signature}."
    except ValueError:  # a function that does not tell its parameters
        return None
    return None


def _frames(function, error):
    """(file, line) of the places in the student's own code that an error went through, the innermost last."""
    own = getattr(getattr(function, "__code__", None), "co_filename", None)
    found, trace = [], error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file == own or not file.startswith(_OWN_FOLDERS):
            found.append((file, trace.tb_lineno))
        trace = trace.tb_next
    in_own_file = [frame for frame in found if frame[0] == own]
    return in_own_file or found


def _line_of(function, error):
    """ " in line 12 of answers.py: `y = x @ weight`", as far as it is known."""
    frames = _frames(function, error)
    if not frames:
        return ""
    file, line = frames[-1]
    text = linecache.getline(file, line).strip()
    code = getattr(function, "__code__", None)
    if os.path.exists(file) or code is None or code.co_filename != file:
        where = f"line {line} of {Path(file).name}"
    else:
        where = f"line {line - code.co_firstlineno + 1} of the function"
    return f" in {where}" + (f": `{text}`" if text else "")


def _error_in_words(function, call):
    name, message = type(call.error).__name__, " ".join(str(call.error).split())
    if isinstance(call.error, SystemExit):
        return f"It ends the whole program (exit){_line_of(function, call.error)}. Return a value."
    if isinstance(call.error, NotImplementedError):
        return f"It is not written yet{_line_of(function, call.error)}."
    return f"It raises {name}{_line_of(function, call.error)}. Python says: {message or 'nothing more'}."


def _blank(function):
    """Where the first blank of a stub stands in a function, or None."""
    try:
        lines, _ = inspect.getsourcelines(function)
    except (OSError, TypeError):
        return None
    for i, line in enumerate(lines):
        if _LEFT_BLANK.search(line):
            return f"in line {i + 1} of the function: `{line.split('#')[0].strip()}`"
    return None


def _printed(call):
    lines = call.printed.rstrip().splitlines()
    return "".join(f"\n  It printed: {line}" for line in lines[:10])


def _verdict(task, words, hint=None, case=None, which="", printed="", stopped=False):
    """The verdict on a wrong answer: its name, then paragraphs of at most WIDTH columns."""
    paragraphs = [words]
    if hint is not None:
        paragraphs.append(f"Hint: {hint}")
    if case is not None and not stopped:
        paragraphs.append(f"Case {which}: {', '.join(_shape(*item) for item in _held(case.arguments).items())}.")
    options = {"width": WIDTH, "initial_indent": "  ", "subsequent_indent": "    "}
    whole = [_WHOLE.sub(lambda found: found[0].replace(" ", "\u00a0"), paragraph) for paragraph in paragraphs]
    filled = [textwrap.fill(text, **options, break_long_words=False, break_on_hyphens=False) for text in whole]
    text = "\n".join([f"{task.name}: not yet.", *filled]).replace("\u00a0", " ")
    return Verdict(task.name, False, text + printed, hint, stopped)


def _shape(name, value):
    """ "x (5, 4)" for an array, "k = 3" for a number."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"{name} {value.shape}"
    text = f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)
    return f"{name} = {text if len(text) <= 40 else text[:37] + '...'}"


def find(tasks: dict[str, Task], name: str) -> Task:
    """The task of this name. Raises ValueError, with those of a similar name, where there is none."""
    if name in tasks:
        return tasks[name]
    near = difflib.get_close_matches(str(name), tasks, n=3) or [task for task in tasks if str(name) in task][:3]
    like = f" (like it: {', '.join(near)})" if near else ""
    raise ValueError(f"there is no exercise {name!r}{like}: `toy exercise list` names all {len(tasks)}")
