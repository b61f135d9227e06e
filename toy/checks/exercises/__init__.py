"""Exercises that check themselves: `toy.check("softmax", my_softmax)`, and `toy exercise` on the command line.

`engine.py` runs an answer and says what is wrong with it; the tasks stand in one file a lesson. A new task is an entry in
such a file: its statement, its solution as text with the blanks marked, the inputs it is tried on, and the mistakes that
people make in it, each with its own hint. The stub and the wrong functions are made from the solution.
"""

from collections.abc import Callable
from typing import Any

from toy.checks.exercises import (
    lesson_0,
    lesson_1,
    lesson_2,
    lesson_3,
    lesson_4,
    lesson_5,
    lesson_6,
    lesson_7,
    lesson_8,
    lesson_9,
)
from toy.checks.exercises.engine import HEADER, LESSONS, Mistake, Task, Verdict, find, judge_answer

__all__ = ["HEADER", "LESSONS", "TASKS", "Mistake", "Task", "Verdict", "check", "find_task", "judge_answer"]

TASKS: dict[str, Task] = {
    task.name: task
    for lesson in (lesson_0, lesson_1, lesson_2, lesson_3, lesson_4, lesson_5, lesson_6, lesson_7, lesson_8, lesson_9)
    for task in lesson.TASKS
}


def find_task(name: str) -> Task:
    """The exercise of this name. Raises ValueError, with those of a similar name, where there is none."""
    return find(TASKS, name)


def check(exercise: str, answer: Callable[..., Any], seed: int = 0) -> Verdict:
    """Check a function that you wrote for an exercise, and print what was found.

        toy.check("softmax", my_softmax)

    exercise: its name; `toy exercise list` has them all, and
    `toy exercise show NAME` what is asked for.
    answer: your function. It is called with random inputs of odd shapes.
    seed: of these inputs.

    A right answer is told in one line. A wrong one gets the first element
    that is wrong, and a hint where the mistake is a known one. An error in
    your function is told with its line; Ctrl-C leaves a loop without end.

    Returns a verdict that is true when the answer is right, for
    `assert toy.check(...)`, with the fields right, hint and text.
    Raises ValueError for an exercise that there is not.
    """
    verdict = judge_answer(find_task(exercise), answer, seed)
    print(verdict.text)
    return verdict
