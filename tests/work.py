"""How much a piece of Python does, counted: a bound on its time that no other program on the machine can move."""

import sys


class Counted:
    """A `with` block whose calls are counted: `calls`, of Python functions and of built-in ones, in this thread.

    A built-in function counts once, however long it takes: where that could be long, bound the size of what it is given too.
    """

    def __enter__(self):
        self.calls = 0
        self._before = sys.getprofile()
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error):
        sys.setprofile(self._before)

    def _count(self, frame, event, argument):
        if event in ("call", "c_call"):
            self.calls += 1
