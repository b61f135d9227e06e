"""Exercises that check themselves: `toy.check("softmax", my_softmax)`, and `toy exercise` on the command line.

`engine.py` runs an answer and says what is wrong with it; the tasks stand in one file a lesson. A new task is an entry in
such a file: its statement, its solution as text with the blanks marked, the inputs it is tried on, and the mistakes that
people make in it, each with its own hint. The stub and the wrong functions are made from the solution.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from toy.checks.exercises.engine import Verdict

__all__ = ["check"]


def check(exercise: str, answer: "Callable[..., Any]", seed: int = 0) -> "Verdict":
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
    # here, because `import toy` should not take longer for those who do no exercises
    from toy.checks.exercises.engine import judge_answer
    from toy.checks.exercises.tasks import find_task

    verdict = judge_answer(find_task(exercise), answer, seed)
    print(verdict.text)
    return verdict
