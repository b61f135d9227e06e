"""Text to train on: the Python documentation of the standard library, a UTF-8 text file, or a folder of them."""

import hashlib
import os
import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class CorpusError(ValueError):
    """The corpus cannot be trained on; the message says why."""


@dataclass(frozen=True)
class Corpus:
    """text: everything, as one string. source: where it came from, as words. path: absolute, None for the default corpus."""

    text: str
    source: str
    path: str | None
    n_files: int

    @cached_property
    def sha256(self):
        """Of the UTF-8 text: a resumed run must find the same one."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_corpus(path=None):
    """The corpus at `path` (a UTF-8 text file or a folder of them), or the default corpus when it is None.

    A folder gives all its files, subfolders too and hidden ones (.name) not, in the sorted order of their paths; a file
    that does not end its last line gets a newline so that two files never share a line.
    Raises CorpusError for a path that is missing, unreadable, empty, or not UTF-8 (with the offset of the first bad byte).
    """
    if path is None:
        return python_documentation()
    root = Path(path)
    try:
        if root.is_dir():
            return _load_folder(root)
        if root.is_file():
            text = _read_text(root)
            if not text:
                raise CorpusError(f"corpus {str(root)!r} is empty")
            return Corpus(text, f"file {root}", str(root.resolve()), 1)
        exists = root.exists()
    except (OSError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(f"corpus {str(root)!r} cannot be read: {reason}") from error
    raise CorpusError(
        f"corpus {str(root)!r} is neither a regular file nor a folder"
        if exists
        else f"corpus {str(root)!r} does not exist: give a UTF-8 text file or a folder of text files"
    )


def python_documentation():
    """The default corpus: the topics of Python's own help(), about 465,000 characters. It differs a little by version."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CorpusError(
            "this Python comes without pydoc_data.topics, the default corpus: name a text file with --corpus FILE"
        ) from error
    text = "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"
    source = f"the documentation inside Python {platform.python_version()} (pydoc_data.topics)"
    return Corpus(text, source, None, len(topics))


def _load_folder(root):
    paths = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths += [Path(folder, name) for name in names if not name.startswith(".")]
    paths = sorted((path for path in paths if path.is_file()), key=lambda path: path.relative_to(root).parts)
    if not paths:
        raise CorpusError(f"corpus folder {str(root)!r} has no files")
    texts = [_read_text(path) for path in paths]
    text = "".join(part if part.endswith("\n") or not part else part + "\n" for part in texts)
    if not text:
        raise CorpusError(f"corpus folder {str(root)!r} has only empty files")
    return Corpus(text, f"folder {root} ({len(paths)} files)", str(root.resolve()), len(paths))


def _read_text(path):
    data = path.read_bytes()
    skipped = len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0
    try:
        return data[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + skipped
        raise CorpusError(
            f"corpus file {str(path)!r} is not UTF-8 text: byte 0x{data[offset]:02x} at offset {offset} ({error.reason}); "
            "convert it first, for example with iconv"
        ) from error


def _raise(error):
    raise error
