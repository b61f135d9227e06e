"""The kinds of things a source is made of: each gives its records, and its bytes to a digest, as often as one likes."""

import json
import platform
from collections import Counter
from collections.abc import Mapping

import numpy as np

from toy.data.reading import BLOCK, Bytes, lines, text_blocks
from toy.data.records import CorpusError, Document, Place, Tokens, check_unicode, parse_line, record_of


class Part:
    """n_bytes: on the disk. done: how many of them were read. alone: whether it is the whole source."""

    n_files, n_bytes, done, alone = 0, 0, 0, True

    def records(self, ignored_keys, on_bytes=None):
        """Yield records. ignored_keys: a Counter of the keys of JSON objects that nothing is made of."""
        raise NotImplementedError

    def read_bytes(self, digest):
        """Give everything to a `Digest`."""
        for _ in self.records(Counter(), digest):
            pass

    def signature(self):
        return None


class File(Part):
    n_files = 1

    def __init__(self, path, token_type):
        self.path, self.n_bytes = path, path.stat().st_size
        self.token_type = token_type
        self._bytes = Bytes(path)

    @property
    def done(self):  # type: ignore[override]
        return self._bytes.done

    def signature(self):
        state = self.path.stat()
        place = str(self.path.resolve())
        return [place, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, self.token_type]


class TextFile(File):
    def records(self, ignored_keys, on_bytes=None):
        self._bytes = Bytes(self.path)
        where, text, begins = Place(str(self.path)), "", True
        for block in text_blocks(self._bytes):
            if text:
                yield self._document(text, where, begins, False, on_bytes)
                begins = False
            text = block
        yield self._document(text, where, begins, True, on_bytes)

    def _document(self, text, where, begins, ends, on_bytes):
        after = "" if self.alone or not ends or not text or text.endswith("\n") else "\n"
        if on_bytes is not None:
            on_bytes("text", (text + after).encode(), last=ends)
        return Document(text, where, after, begins, ends)


class LinesFile(File):
    def records(self, ignored_keys, on_bytes=None):
        self._bytes, name = Bytes(self.path), str(self.path)
        for number, line in lines(self._bytes):
            if on_bytes is not None:
                on_bytes("jsonl", line + b"\n")
            where = Place(name, number)
            record, ignored = record_of(parse_line(line, where), where)
            if ignored:
                ignored_keys.update(ignored)
            yield _with_newline(record)
        if on_bytes is not None:
            on_bytes("jsonl", b"", last=True)


class TokenFile(File):
    """Token ids without a header, little-endian, as nanoGPT's prepare.py writes them."""

    def records(self, ignored_keys, on_bytes=None):
        self._bytes = Bytes(self.path)
        kind, where, pending, first = (
            np.dtype(self.token_type or "uint16").newbyteorder("<"),
            Place(str(self.path)),
            b"",
            True,
        )
        for block in self._bytes.blocks():
            if on_bytes is not None:
                on_bytes(kind.name, block)
            data = pending + block
            n = len(data) // kind.itemsize
            ids, pending = np.frombuffer(data, kind, count=n), data[n * kind.itemsize :]
            if first:
                self._check_start(block, ids)
            first = False
            yield Tokens(ids, where)
        if pending:
            raise CorpusError(
                f"token file {str(self.path)!r} does not hold whole {kind.name} ids ({self._bytes.done} bytes): "
                "is it of another type, or no file of token ids?"
            )
        if on_bytes is not None:
            on_bytes(kind.name, b"", last=True)

    def _check_start(self, block, ids):
        if int.from_bytes(block[:4], "little") in (20240520, 20240801):  # llm.c's magic numbers
            raise CorpusError(
                f"token file {str(self.path)!r} has the 1024-byte header of llm.c: take it off first, "
                f"tail -c +1025 {self.path.name} > ids.bin"
            )
        if ids.dtype.itemsize == 2 and len(ids) >= 64 and ids[:65536:2].any() and not ids[1:65536:2].any():
            raise CorpusError(
                f"token file {str(self.path)!r} looks like uint32 ids (every second uint16 is 0): say token_type uint32"
            )

    def use_type(self, vocab_size):
        """Fix the type of the ids by the size of the vocabulary, where nobody said one."""
        self.token_type = self.token_type or ("uint32" if vocab_size > 2**16 else "uint16")


class Texts(Part):
    """texts: list of (text, place)."""

    def __init__(self, texts, kind):
        self.texts, self.kind = texts, kind

    def records(self, ignored_keys, on_bytes=None):
        for text, where in self.texts:
            after = "" if self.alone or not text or text.endswith("\n") else "\n"
            check_unicode(text, where)
            if on_bytes is not None:
                on_bytes(self.kind, (text + after).encode(), last=True)
            yield Document(text, where, after)


class PythonDocumentation(Part):
    """The topics of Python's own help(), about 465,000 characters. They differ a little by version."""

    def __init__(self):
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise CorpusError(
                "this Python comes without pydoc_data.topics, the default corpus: name a text file with --corpus FILE"
            ) from error
        self.topics, self.n_files = topics, len(topics)
        self.words = f"the documentation inside Python {platform.python_version()} (pydoc_data.topics)"

    def records(self, ignored_keys, on_bytes=None):
        names = sorted(self.topics)
        for name in names:
            text, after = self.topics[name].strip("\n"), "\n" if name == names[-1] else "\n\n"
            if on_bytes is not None:
                on_bytes("text", (text + after).encode(), last=True)
            yield Document(text, Place(f"topic {name}"), after)


class Ids(Part):
    def __init__(self, ids):
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise CorpusError(f"token ids must be integers of shape (n,), got {ids.dtype} {ids.shape}")
        if not len(ids):
            raise CorpusError("the corpus is an array without token ids")
        if ids.min() < 0 or ids.max() >= 2**31:
            raise CorpusError(f"token ids must lie between 0 and 2**31 - 1, got {ids.min()} to {ids.max()}")
        self.ids = ids

    def records(self, ignored_keys, on_bytes=None):
        for start in range(0, len(self.ids), BLOCK):
            block = self.ids[start : start + BLOCK]
            if on_bytes is not None:
                on_bytes("ids", block.astype("<u4").tobytes(), last=start + BLOCK >= len(self.ids))
            yield Tokens(block, Place("the token ids"))


class Dicts(Part):
    """items: dicts, to be iterated over as often as one likes."""

    def __init__(self, items):
        self.items = items

    def records(self, ignored_keys, on_bytes=None):
        for number, item in enumerate(self.items, 1):
            where = Place(f"record {number}")
            if not isinstance(item, Mapping):
                raise CorpusError(f"{where} is {type(item).__name__}, expected a dict as in a .jsonl file")
            record, ignored = record_of(dict(item), where)
            ignored_keys.update(ignored)
            if on_bytes is not None:
                on_bytes("dicts", _canonical(record, where))
            yield _with_newline(record)
        if on_bytes is not None:
            on_bytes("dicts", b"", last=True)


def _canonical(record, where):
    try:
        return (json.dumps(record._replace(where=None), ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CorpusError(f"{where} is not JSON ({error})") from error


def _with_newline(record):
    """Two documents never share a line, where the model has no end token to tell them apart."""
    if isinstance(record, Document) and record.text and not record.text.endswith("\n"):
        return record._replace(after="\n")
    return record
