"""Where the documents come from: text files, folders, JSON lines, .gz, token files, and in Python also texts, ids, dicts.

    for record in open_source("books/").records():
        ...                       # Document, Completion, Conversation, Tokens (toy.data.records)

Every pass reads anew and in constant memory. What cannot be read is refused by name; nothing is read as what it is not.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toy.data.parts import Dicts, Ids, LinesFile, PythonDocumentation, TextFile, Texts, TokenFile
from toy.data.reading import inner_suffix
from toy.data.records import Completion, Conversation, CorpusError, Document, Place, Tokens

TOKEN_TYPES = ("uint16", "uint32")


def open_source(what: Any = None, token_type: str | None = None) -> "Source":
    """A `Source` of what is named.

    what: None, the documentation inside Python, one document a topic; a path (str or Path) of a file or a folder; a str with
    a newline, a text; an int array, token ids; an iterable of dicts, records as in a .jsonl file; or a list of these.
    A folder gives its files, subfolders too and hidden ones (.name) not, in the sorted order of their paths. By their names,
    .jsonl files have an object a line, {"text"}, {"prompt", "completion"} or {"messages"}, .bin files have token ids as
    nanoGPT writes them, and all others are UTF-8 text; each of them may be packed as .gz.
    token_type: of .bin files, "uint16" or "uint32"; None: uint16, but uint32 for a vocabulary beyond 65,536.
    Raises CorpusError for a path where nothing is, an empty or unreadable file, and anything that is none of these.
    """
    if token_type not in (None, *TOKEN_TYPES):
        raise CorpusError(f"token_type must be one of {', '.join(TOKEN_TYPES)}, got {token_type!r}")
    parts, words, paths, skipped = _open(what, token_type)
    return Source(parts, words, paths, skipped)


class Source:
    """Parts (files, texts, ...) that are read one after the other.

    words: where it comes from, in words. path: absolute, a list of them for several, None for what is not on the disk.
    n_bytes: on the disk, of all files.
    """

    def __init__(self, parts, words, paths, skipped=()):
        self.parts, self.words, self.skipped = parts, words, list(skipped)
        self.path = None if not paths else paths[0] if len(paths) == 1 else paths
        self.n_bytes = sum(part.n_bytes for part in parts)
        self.family = None  # of the records: "text", "examples" or "tokens", known after the first
        self.n_empty = 0
        self.ignored_keys: Counter[str] = Counter()
        self._digests = None
        if len(parts) > 1:
            for part in parts:
                part.alone = False

    @property
    def n_files(self) -> int:
        return sum(part.n_files for part in self.parts)

    def records(self, progress: Callable[[int, int], None] | None = None, on_bytes: Any = None) -> Iterator[Any]:
        """Yield `Document`, or `Completion` and `Conversation`, or `Tokens`; empty documents are left out and counted.

        progress: called with (bytes done, bytes in all). on_bytes: called with the kind and the bytes that are read.
        Raises CorpusError for what cannot be read, for kinds that cannot be trained on together, and when there is nothing.
        """
        self.n_empty, self.ignored_keys = 0, Counter()
        first, done, told = None, 0, 0
        for part in self.parts:
            for record in part.records(self.ignored_keys, on_bytes):
                if isinstance(record, Document) and not record.text and record.begins and record.ends:
                    self.n_empty += 1
                    continue
                family = _family(record)
                if first is None:
                    first, self.family = (family, record.where), family
                if family != first[0]:
                    raise CorpusError(
                        f"{first[1]} has {_FAMILIES[first[0]]} and {record.where} has {_FAMILIES[family]}: "
                        "they cannot be trained on together, make a corpus of each"
                    )
                yield record
                if progress is not None and part.done != told:
                    told = part.done
                    progress(min(done + told, self.n_bytes), self.n_bytes)
            done, told = done + part.n_bytes, 0
        if first is None:
            raise CorpusError(self._nothing())

    def texts(self) -> Iterator[str]:
        """Yield everything a character vocabulary must know, as str: the texts, prompts, completions and contents."""
        for record in self.records():
            if isinstance(record, Document):
                yield record.text
                yield record.after
            elif isinstance(record, Completion):
                yield record.prompt
                yield record.completion
            elif isinstance(record, Conversation):
                yield from (message["content"] or "" for message in record.messages)
            else:
                raise CorpusError(f"{record.where} has token ids, and a vocabulary is made of text: name its tokenizer")

    def characters(self) -> str:
        """The distinct characters, sorted, as one str."""
        found: set[str] = set()
        for text in self.texts():
            found.update(text)
        return "".join(sorted(found))

    def digest(self) -> str:
        """SHA-256 of what is read, hexadecimal: of the UTF-8 text for one text file, a folder of them, the documentation."""
        return self._both_digests()[0]

    def identity(self):
        """SHA-256 of what is read and of where documents end."""
        return self._both_digests()[1]

    def signature(self):
        """What tells without reading that nothing changed: a list for each file, None when some part is not a file."""
        found = [part.signature() for part in self.parts]
        return None if None in found else found

    def new_digest(self):
        """A `Digest` to be given the bytes that `records` reads, in place of reading them once more."""
        return Digest(self)

    def remember(self, digests):
        """digests: the pair of a finished `Digest`."""
        self._digests = digests

    def _both_digests(self):
        if self._digests is None:
            digest = self.new_digest()
            for part in self.parts:
                part.read_bytes(digest)
            self._digests = digest.finish()
        return self._digests

    def _nothing(self):
        if self.words.startswith("folder") and not self.n_empty > len(self.parts):
            return f"corpus {self.words} has only empty files"
        if self.n_empty > 1 or len(self.parts) > 1:
            return f"corpus {self.words} has only empty documents"
        return f"corpus {self.words} is empty"


class Digest:
    """Two digests in one pass: of the bytes, and of the bytes with what tells one document from the next."""

    def __init__(self, source):
        self.content, self._structure = hashlib.sha256(), []

    def __call__(self, kind, data, last=False):
        """kind: of the part, "text" and so on. data: bytes. last: the part or document ends here."""
        self.content.update(data)
        if not self._structure or self._structure[-1][2]:
            self._structure.append([kind, 0, False])
        self._structure[-1][1] += len(data)
        self._structure[-1][2] = last

    def finish(self):
        """-> (digest of the bytes, digest of both), hexadecimal."""
        content = self.content.hexdigest()
        return content, hashlib.sha256(f"{content} {json.dumps(self._structure)}".encode()).hexdigest()


_FAMILIES = {"text": "text", "examples": "prompts or conversations", "tokens": "token ids"}


def _family(record):
    if isinstance(record, (Completion, Conversation)):
        return "examples"
    return "tokens" if isinstance(record, Tokens) else "text"


# ----------------------------------------------------------------------------------------------------------------------
# what was named
# ----------------------------------------------------------------------------------------------------------------------


def _open(what, token_type):
    """-> (parts, words, absolute paths, what a folder has besides files)."""
    if what is None:
        part = PythonDocumentation()
        return [part], part.words, [], []
    if isinstance(what, str) and "\n" in what:
        return [Texts([(what, Place("the text"))], "text")], "a text given in Python", [], []
    if isinstance(what, (str, os.PathLike)):
        return _open_path(what, token_type)
    if isinstance(what, Mapping):
        raise CorpusError('the corpus is one dict: give a list of them, [{"text": ...}, ...]')
    if isinstance(what, (bytes, bytearray)):
        raise CorpusError("the corpus is bytes: give a str, or the path of a file")
    if isinstance(what, np.ndarray) or (isinstance(what, (list, tuple)) and what and all(map(_is_id, what))):
        return [Ids(what)], "token ids given in Python", [], []
    if not isinstance(what, Iterable):
        raise CorpusError(f"the corpus is {what!r}: give a path, a text, token ids, dicts, or a list of these")
    if isinstance(what, Iterator):
        what = list(what)  # several passes are made
    if not isinstance(what, (list, tuple)) or (what and all(isinstance(item, Mapping) for item in what)):
        return [Dicts(what)], "records given in Python", [], []
    if not what:
        raise CorpusError("the corpus is an empty list: give at least one file, folder or text")
    parts: list[Any] = []
    words: list[str] = []
    paths: list[str] = []
    skipped: list[Path] = []
    for item in what:
        if isinstance(item, Mapping):
            item = [item]
        more, name, where, left = _open(item, token_type)
        parts, words, paths, skipped = [*parts, *more], [*words, name], [*paths, *where], [*skipped, *left]
    return parts, words[0] if len(words) == 1 else " and ".join(words), paths, skipped


def _is_id(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _open_path(what, token_type):
    path = Path(what)
    try:
        if path.is_dir():
            return _open_folder(path, token_type)
        if path.is_file():
            return [_file(path, token_type)], f"file {path}", [str(path.resolve())], []
        exists = path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:
        if isinstance(error, CorpusError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(f"corpus {_shown(what)} cannot be read: {reason}") from error
    if exists:
        reason = "neither a regular file nor a folder" if path.exists() else "a symbolic link that leads nowhere"
        raise CorpusError(f"corpus {_shown(what)} is {reason}")
    advice = "give a UTF-8 text file or a folder of text files"
    if isinstance(what, str):
        advice += " (a str without a newline is a path; a text to train on has at least one)"
    raise CorpusError(f"corpus {_shown(what)} does not exist: {advice}")


def _shown(path):
    text = repr(str(path))
    return text if len(text) <= 300 else text[:297] + "...'"


def _open_folder(root, token_type):
    paths: list[Path] = []
    skipped: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        visible = [Path(folder, name) for name in subfolders if not name.startswith(".")]
        skipped += [path for path in visible if path.is_symlink()]  # not followed: they may lead in a circle
        subfolders[:] = [path.name for path in visible if not path.is_symlink()]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            (paths if _is_file(path) else skipped).append(path)
    if not paths:
        raise CorpusError(f"corpus folder {str(root)!r} has no files")
    paths.sort(key=lambda path: path.relative_to(root).parts)
    parts = [_file(path, token_type, in_folder=True) for path in paths]
    return parts, f"folder {root} ({len(paths)} files)", [str(root.resolve())], skipped


def _is_file(path):
    try:
        return path.is_file()
    except OSError:  # a circle of links
        return False


def _raise(error):
    raise error


def _file(path, token_type, in_folder=False):
    kind = {".jsonl": LinesFile, ".ndjson": LinesFile, ".bin": TokenFile}.get(inner_suffix(path), TextFile)
    if not in_folder and path.stat().st_size == 0:
        raise CorpusError(f"corpus {str(path)!r} is empty")
    part = kind(path, token_type)
    part.alone = not in_folder
    return part
