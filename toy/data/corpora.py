"""A whole text at once: what `toy.data.sources` reads, in memory, for texts that fit there."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from toy.data.records import CorpusError, Document
from toy.data.sources import open_source
from toy.files.atomic import StrPath


@dataclass(frozen=True)
class Corpus:
    """text: everything, as one string. source: where it came from, as words. path: absolute, None for the default corpus."""

    text: str
    source: str
    path: str | list[str] | None
    n_files: int

    @cached_property
    def sha256(self) -> str:
        """Of the UTF-8 text: a resumed run must find the same one."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_corpus(path: StrPath | Sequence[StrPath] | None = None) -> Corpus:
    """The text at `path` (a file or a folder, or several, as `open_source` reads them), or the default corpus: None.

    Documents that do not end their last line get a newline, so that two never share a line. Raises CorpusError as
    `open_source` does, and for prompts, conversations and token ids, which are no text.
    """
    if path is None or isinstance(path, (str, os.PathLike)):
        source = open_source(None if path is None else Path(path))
    else:
        source = open_source([Path(one) for one in path])
    parts = []
    for record in source.records():
        if not isinstance(record, Document):
            raise CorpusError(
                f"{record.where} is not text: {source.words} is to be trained on, and cannot be joined to a text"
            )
        parts.append(record.text + record.after)
    return Corpus("".join(parts), source.words, source.path, source.n_files)


def python_documentation() -> Corpus:
    """The default corpus: the topics of Python's own help(), about 465,000 characters. It differs a little by version."""
    return load_corpus(None)
