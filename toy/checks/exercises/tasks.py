"""All exercises, by name."""

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
from toy.checks.exercises.engine import Task, find

TASKS: dict[str, Task] = {
    task.name: task
    for lesson in (lesson_0, lesson_1, lesson_2, lesson_3, lesson_4, lesson_5, lesson_6, lesson_7, lesson_8, lesson_9)
    for task in lesson.TASKS
}


def find_task(name: str) -> Task:
    """The exercise of this name. Raises ValueError, with those of a similar name, where there is none."""
    return find(TASKS, name)
