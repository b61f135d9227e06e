"""The commands about exercises: toy exercise list, show, check."""

import contextlib
import linecache
import signal
import sys
import textwrap
from pathlib import Path

import click

from toy.cli.base import JSON, Phase, as_json, command, program, quoted
from toy.cli.help_text import Group

WIDTH = 80


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def exercise(context):
    """Exercises that check themselves: write an op, and be told what is wrong.

    \b
    toy exercise list                        what there is, by lesson
    toy exercise show softmax > softmax.py   what is asked for, with blanks
    toy exercise check softmax softmax.py    is it right? if not, where, and why
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command(exercise, "list")
@click.argument("lesson", type=click.IntRange(min=0), required=False)
@JSON
def list_exercises(lesson, json_wanted, debug):
    """List the exercises, of all lessons or of one."""
    from toy.checks.exercises.engine import LESSONS
    from toy.checks.exercises.tasks import TASKS

    with Phase(2, debug):
        if lesson is not None and lesson not in LESSONS:
            raise ValueError(f"there is no lesson {lesson}: they are 0 to {max(LESSONS)}")
    with Phase(1, debug):
        chosen = [task for task in TASKS.values() if lesson in (None, task.lesson)]
        if json_wanted:
            for task in chosen:
                as_json(record(task))
            return
        for number in sorted({task.lesson for task in chosen}):
            click.echo(f"Lesson {number}: {LESSONS[number]}")
            for task in chosen:
                if task.lesson == number:
                    click.echo(textwrap.fill(task.signature, WIDTH - 1, initial_indent="  ", subsequent_indent=" " * 6))
        click.echo(f"{len(chosen)} exercises. {program()} exercise show NAME says what is asked for.")


def record(task):
    """What a notebook or a page is made of."""
    return {
        "exercise": task.name,
        "lesson": task.lesson,
        "signature": task.signature,
        "statement": task.statement,
        "stub": task.stub,
        "solution": task.solution,
    }


@command(exercise, "show")
@click.argument("name", metavar="NAME")
@click.option("--solution", is_flag=True, help="The solution, with nothing left blank.")
@JSON
def show(name, solution, json_wanted, debug):
    """Show what an exercise asks for, as a Python file with blanks (...) to fill in.

    Its output can be kept as it is: toy exercise show softmax > softmax.py
    """
    from toy.checks.exercises.engine import HEADER, LESSONS
    from toy.checks.exercises.tasks import find_task

    with Phase(2, debug):
        task = find_task(name)
        if json_wanted:
            return as_json(record(task))
        of_lesson = f"lesson {task.lesson}, {LESSONS[task.lesson]}"
        click.echo(f"# {task.name} ({of_lesson})\n#")
        click.echo(textwrap.fill(task.statement, WIDTH - 1, initial_indent="# ", subsequent_indent="# "))
        click.echo(f"#\n# Is it right?  toy exercise check {task.name} FILE.py\n\n{HEADER}\n")
        click.echo(task.solution if solution else task.stub, nl=False)


@command(exercise, "check")
@click.argument("name", metavar="NAME")
@click.argument("answer", metavar="FILE.py[:FUNCTION]")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the random inputs.")
@JSON
def check(name, answer, seed, json_wanted, debug):
    """Check the function of a file. Ends with 1 while it is not right.

    FUNCTION: its name in the file, where it is not NAME.
    """
    from toy.checks.exercises.engine import judge_answer
    from toy.checks.exercises.tasks import find_task

    with Phase(2, debug):
        task = find_task(name)
        with contextlib.redirect_stdout(sys.stderr) if json_wanted else contextlib.nullcontext():
            function = function_of(answer, task.name)
    with Phase(1, debug):
        verdict = judge_answer(task, function, seed)
    if json_wanted:
        told = {"exercise": task.name, "right": verdict.right, "hint": verdict.hint, "text": verdict.text}
        as_json(told | {"seed": seed})
    else:
        click.echo(verdict.text)
    if verdict.stopped:
        return 128 + signal.SIGINT
    return 0 if verdict.right else 1


def function_of(answer, name):
    """The function that FILE.py:FUNCTION names; `name` without a function in it. Runs the file, as an import would.

    Raises ValueError for a file that is not there or does not run, and for one without such a function.
    """
    file, colon, function = answer.rpartition(":")
    if not colon or not function.isidentifier():  # none is named; the colon of C:\\answers.py is another one
        file, function = answer, name
    path = Path(file)
    if path.suffix == ".ipynb":
        raise ValueError(f"{path} is a notebook: check inside of it with `toy.check({name!r}, {name})`")
    if not path.is_file():
        make = f"{program()} exercise show {name} > {quoted(path)}"
        raise ValueError(f"there is no file {path}: `{make}` makes one to begin with")
    names = {"__name__": path.stem, "__file__": str(path)}
    linecache.checkcache(str(path))
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside it can be imported, as in `python FILE.py`
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), names)
    except SyntaxError as error:
        where = f"line {error.lineno} of {Path(error.filename or file).name}"
        raise ValueError(f"Python cannot read {where}: {error.msg}: `{(error.text or '').strip()}`") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # exit() too
        kind, words = type(error).__name__, " ".join(str(error).split())
        raise ValueError(f"{path} does not run: {kind} in {_line(error, path)}: {words}") from error
    finally:
        sys.path.pop(0)
    if not callable(names.get(function)):
        own = [n for n, value in names.items() if callable(value) and getattr(value, "__module__", "") == path.stem]
        there = f"it has {', '.join(own)}: name one, {path}:{own[0]}" if own else "it defines none"
        raise ValueError(f"{path} has no function {function}; {there}")
    return names[function]


def _line(error, path):
    """ "line 3": the last one of the file that an error went through."""
    trace, line = error.__traceback__, "a line that is not known"
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            line = f"line {trace.tb_lineno}"
        trace = trace.tb_next
    return line
