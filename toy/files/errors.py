"""The one error of all readers in this package."""


class BadFileError(ValueError):
    """A file is damaged or is not what it should be. path: the file; problem: what is wrong with it."""

    def __init__(self, path, problem):
        super().__init__(f"{path}: {problem}")
        self.path, self.problem = path, problem
