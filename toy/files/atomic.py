"""Files that are either the old one or the new one, never something between, whatever happens while they are written."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

StrPath = str | os.PathLike[str]  # of a file or a folder

_SUFFIX = ".tmp"

# Windows refuses to rename onto a file, or to delete one, while another program has it open: a viewer shows the picture, a
# virus scanner looks at what was just written. ERROR_ACCESS_DENIED and ERROR_SHARING_VIOLATION; no other system has them.
_IN_USE = (5, 32)
_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds between the tries: a scanner or a reader is done by then, a viewer is not


class FileInUseError(OSError):
    """A file cannot be replaced because another program has it open (on Windows)."""


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; when the block ends well, it is on the disk and takes the name.

    The data are flushed to the disk before the rename: after a power cut the name leads to a whole file. When the block
    raises, the temporary file is removed and `path` is as it was. An OSError says which path could not be written and why;
    it is a FileInUseError where another program had the file open all the while (Windows).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        _rename(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, FileInUseError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        raise


@contextlib.contextmanager
def unless_in_use() -> Iterator[None]:
    """Inside the block a file that Windows does not let go, because another program has it open, is left where it is."""
    try:
        yield
    except PermissionError as error:
        if getattr(error, "winerror", None) not in _IN_USE:
            raise


def write_text(path: StrPath, text: str) -> None:
    """Replace `path` by a file with this text, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def remove_leftovers(folder: StrPath) -> None:
    """Delete the temporary files that a killed process left in `folder`."""
    for path in Path(folder).glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _rename(temporary: Path, path: Path) -> None:
    for wait in (*_WAITS, None):
        try:
            return os.replace(temporary, path)
        except PermissionError as error:
            if getattr(error, "winerror", None) not in _IN_USE:
                raise
            if wait is None:
                raise FileInUseError(f"cannot write {path}: another program has it open; close it there") from error
        time.sleep(wait)


def _sync_folder(folder: Path) -> None:
    """Put the rename itself on the disk. Windows cannot open a folder, and its renames need no such call."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
