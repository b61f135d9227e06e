"""Opening files to read them: a pipe would never answer, and a device never end."""

import os
import stat
from pathlib import Path
from typing import IO

from toy.files.atomic import StrPath
from toy.files.errors import BadFileError

_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def open_regular(path: StrPath) -> IO[bytes]:
    """The file `path`, open to be read.

    Raises FileNotFoundError where nothing is, BadFileError for what is no file (it would hang: nobody may ever write to a
    named pipe) and for a file that the system does not let be opened.
    """
    try:
        # O_NONBLOCK: to open a pipe would wait for a writer
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        if Path(path).is_dir():  # Windows opens none
            raise BadFileError(path, "is a directory, expected a file") from error
        raise BadFileError(path, f"cannot be read: {error.strerror or error}") from error
    kind = stat.S_IFMT(os.fstat(handle).st_mode)
    if kind != stat.S_IFREG:
        os.close(handle)
        raise BadFileError(path, f"is {_KINDS.get(kind, 'something else')}, expected a file")
    return os.fdopen(handle, "rb")


def read_regular(path: StrPath, at_most: int) -> bytes:
    """The bytes of a file of at most so many. Raises as `open_regular`, and BadFileError for a larger file."""
    with open_regular(path) as file:
        try:
            data = file.read(at_most + 1)
        except OSError as error:
            raise BadFileError(path, f"cannot be read: {error.strerror or error}") from error
    if len(data) > at_most:
        raise BadFileError(path, f"has more than {at_most:,} bytes, so it is not what its name says")
    return data
