"""The one error of all readers in this package."""

import os
import re

# What a terminal acts on instead of showing it: escape sequences (ECMA-48: colours, titles, the cursor), other control
# characters, and those that turn the direction of writing
_NOT_SHOWN = re.compile(
    r"(?:(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
    "|[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069])+"
)


def printable(text: object) -> str:
    """Text out of a file as one line that is safe to show: white space and everything a terminal would act on is a space."""
    return _NOT_SHOWN.sub(" ", str(text)).strip()


class BadFileError(ValueError):
    """A file is damaged or is not what it should be. path: the file; problem: what is wrong with it."""

    def __init__(self, path: str | os.PathLike[str], problem: object) -> None:
        problem = printable(problem)
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem
