"""Folders that are written as a whole: they are either the old one or the new one, and never take away what is not theirs."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path


def check_replaceable(path: Path, names: Collection[str]) -> None:
    """Raise ValueError unless a folder with files of these names may stand at `path`: nothing is there, or an empty folder,
    or one that holds nothing else."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} is no folder, and what is written is one: choose another --out")
    if not path.is_dir():
        return
    if foreign := sorted(entry.name for entry in path.iterdir() if entry.name not in names or entry.is_dir()):
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise ValueError(
            f"{path} holds other files too ({foreign[0]}{more}), which are not overwritten: choose another --out"
        )


@contextlib.contextmanager
def replacing_folder(path: Path, names: Collection[str]) -> Iterator[Path]:
    """Give a new folder beside `path` to write files of these names into; when the block ends well, it takes the name.

    When the block raises, the new folder is removed and `path` is as it was. Errors as `check_replaceable`, and OSError.
    """
    check_replaceable(path, names)
    mark = secrets.token_hex(4)
    temporary, old = path.with_name(f".{path.name}.{mark}.tmp"), path.with_name(f".{path.name}.{mark}.old.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for entry in temporary.iterdir():
            with open(entry, "rb+") as file:
                os.fsync(file.fileno())
        check_replaceable(path, names)  # it may have been written to in the meantime
        if path.is_dir():
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        raise
    finally:
        if old.is_dir() and not path.exists():  # the new one did not come
            os.rename(old, path)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
