"""One process at a time in a folder."""

import contextlib
import os
import time
from collections.abc import Iterator

from toy.files.atomic import StrPath

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt


_TRIES, _WAIT = 10, 0.02  # seconds: `is_held` of another process holds a lock for less


@contextlib.contextmanager
def only_process(folder: StrPath) -> Iterator[None]:
    """Hold the lock of a folder inside the block. Raises BlockingIOError when another process holds it.

    The lock ends with the process, however that ends. On Windows, which cannot lock a folder, it is on a file `.lock` in it.
    """
    if fcntl is None:
        handle = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT)
    else:
        handle = os.open(folder, os.O_RDONLY)
    try:
        for left in reversed(range(_TRIES)):
            try:
                _lock(handle)
                break
            except BlockingIOError:
                if not left:
                    raise
            time.sleep(_WAIT)
        yield
    finally:
        os.close(handle)


def is_held(folder: StrPath) -> bool:
    """Whether a process holds the lock of a folder."""
    try:
        with only_process(folder):
            return False
    except BlockingIOError:
        return True
    except OSError:  # a folder that cannot be written to, on Windows
        return False


def _lock(handle: int) -> None:
    if fcntl is None:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # a file system without locks
