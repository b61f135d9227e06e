"""Files that are either the old one or the new one, never something between, whatever happens while they are written."""

import contextlib
import os
import secrets
from pathlib import Path

_SUFFIX = ".tmp"


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside `path` to write to; when the block ends well, it is on the disk and takes the name.

    The data are flushed to the disk before the rename: after a power cut the name leads to a whole file. When the block
    raises, the temporary file is removed and `path` is as it was. An OSError says which path could not be written and why.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_text(path, text):
    """Replace `path` by a file with this text, UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode())


def remove_leftovers(folder):
    """Delete the temporary files that a killed process left in `folder`."""
    for path in Path(folder).glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _sync_folder(folder):
    """Put the rename itself on the disk. Windows cannot open a folder, and its renames need no such call."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
