"""A source through an encoder: token ids in memory or, of more than a megabyte, in the cache directory, made once."""

import hashlib
import json
from typing import Any

import numpy as np

from toy.data.cache import Cache, Files, Memory, as_encoded
from toy.data.cutting import BlockEncoder
from toy.data.parts import TokenFile
from toy.data.reading import is_gz
from toy.data.records import CorpusError, Document, Tokens
from toy.data.splitting import Fingerprints
from toy.data.survey import Survey

IN_MEMORY = 2**20  # bytes on the disk: less is encoded anew each time


def encode_source(source, encoder, train_on="answers", joined=False, progress=None):
    """A `Source` through an `Encoder` -> `Encoded`.

    train_on: of completions and conversations. joined: all documents as one text, without beginning and end tokens.
    progress: called with (bytes done, bytes in all) while text is encoded.
    Raises CorpusError (and the tokenizer's UnknownCharacterError) for what cannot be encoded, naming the place; OSError,
    naming the file, when the cache cannot be written.
    """
    for part in source.parts:
        if isinstance(part, TokenFile):
            part.use_type(encoder.tokenizer.vocab_size)
    job = _Job(source, encoder, train_on, joined, progress)
    signature = source.signature()
    if signature is None or source.n_bytes <= IN_MEMORY:
        return as_encoded(*job.run(Memory()))
    way = "joined" if joined else train_on
    if borrowed := job.borrowed_ids():
        way = hashlib.sha256(borrowed.encode()).hexdigest()[:12]  # the same ids in another file are another file's
    cache = Cache(f"{_digest_of(encoder.tokenizer)}-{way}-{source.n_bytes}")
    if (found := cache.find_by_signature(signature)) is not None:
        source.remember((found.sha256, found.identity))
        return found
    if cache.has_any() and (found := cache.find(source.identity())) is not None:
        cache.write_index(signature, source.identity())
        return found
    with cache.new_folder() as folder:
        columns = Files(folder, borrowed)
        try:
            meta, _ = job.run(columns)
        finally:
            columns.release()
        if source.signature() != signature:
            raise CorpusError(f"{source.words} changed while it was read: try again when nothing writes to it any more")
        found = cache.keep(folder, meta)
    cache.write_index(signature, meta["identity"])
    return found


class _Job:
    """One pass over a source, from records to columns."""

    def __init__(self, source, encoder, train_on, joined, progress):
        self.source, self.encoder, self.progress = source, encoder, progress
        self.train_on, self.joined = train_on, joined

    def borrowed_ids(self):
        """The path of the token file that can be used as it is, None when there is none."""
        part = self.source.parts[0]
        alone = len(self.source.parts) == 1 and isinstance(part, TokenFile) and not is_gz(part.path)
        return str(part.path.resolve()) if alone and np.little_endian else None

    def run(self, columns):
        """-> (meta, columns): everything is encoded."""
        source, tokenizer = self.source, self.encoder.tokenizer
        kind = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        if columns.borrowed:
            kind = source.parts[0].token_type
        self.columns, self.survey, self.blocks = columns, Survey(tokenizer), BlockEncoder(self.encoder)
        self.prints = Fingerprints()
        columns.open("ids", kind)
        self._n, self._place, digest = 0, None, source.new_digest()
        self._files: dict[Any, Any] = {}
        for record in source.records(self.progress, digest):
            if isinstance(record, Document):
                self._document(record)
            elif isinstance(record, Tokens):
                self._tokens(record)
            else:
                self._example(record)
        if self.joined and source.family == "text":
            self._write_all(self.blocks.finish())
        self.prints.finish()
        columns.put("starts", [self._n])
        columns.put("sizes", self.prints.sizes)
        columns.put("hashes", self.prints.hashes)
        columns.close()
        sha256, identity = source_digests = digest.finish()
        source.remember(source_digests)
        notices = self.survey.sentences(source)
        if self.blocks.n_forced:
            notices.append(
                f"{self.blocks.n_forced} times a text of more than two million characters without words was cut "
                "where a token may lie"
            )
        return {
            "family": source.family, "kind": kind, "sha256": sha256, "identity": identity,
            "notices": notices, "files": list(self._files), "borrowed": columns.borrowed, "n": columns.lengths(),
        }, columns  # fmt: skip

    def _document(self, record):
        encoder = self.encoder
        if record.begins:
            self.prints.begin()
        self.prints.feed(record.text.encode())
        self.survey.see(record.text)
        if self.joined:
            if self._place is None:
                self._begin_document(record.where)
            self._write_all(self.blocks.feed(record.text + record.after))
            return
        if record.begins:
            self._begin_document(record.where)
            if encoder.begin is not None:
                self._write(np.array([encoder.begin]))
        self._write_all(self.blocks.feed(record.text + (record.after if encoder.end is None else "")))
        if record.ends:
            self._write_all(self.blocks.finish())
            if encoder.end is not None:
                self._write(np.array([encoder.end]))

    def _begin_document(self, place):
        self._place = place
        self.columns.put("starts", [self._n])
        self.blocks.begin(place)

    def _tokens(self, record):
        ids, vocab_size = record.ids, self.encoder.tokenizer.vocab_size
        if record.where != self._place:
            self.prints.begin()
            self._begin_document(record.where)
            self._first_of_file = self._n
        if len(ids) and ids.max() >= vocab_size:
            at = int((ids >= vocab_size).argmax())
            raise CorpusError(
                f"{record.where} has the token id {ids[at]} at position {self._n - self._first_of_file + at}, beyond the "
                f"vocabulary of {vocab_size}: is it of another tokenizer, or of another type than {ids.dtype}?"
            )
        self.prints.feed(ids.tobytes(), size=len(ids))
        self._write(ids)

    def _example(self, record):
        where, put = record.where, self.columns.put
        try:
            ids, labels = self.encoder.encode(record, self.train_on)
        except ValueError as error:
            raise CorpusError(f"{where}: {error}") from error
        self.survey.see_record(record)
        self.prints.example(record)
        asked = np.zeros(len(ids), np.uint8)
        asked[1:] = labels[:-1] >= 0
        put("starts", [self._n])
        put("asked", asked)
        put("first", [int(asked.argmax()) if asked.any() else -1])
        put("n_asked", [int(asked.sum())])
        put("file", [self._files.setdefault(where.name if where.line else "", len(self._files))])
        put("line", [where.line or int(where.name.rpartition(" ")[2])])
        self._write(ids)

    def _write_all(self, arrays):
        for ids in arrays:
            self._write(ids)

    def _write(self, ids):
        self.columns.put("ids", ids)
        self._n += len(ids)


def _digest_of(tokenizer):
    """Of all that decides which ids a text gets."""
    record = {key: value for key, value in tokenizer.to_json().items() if key != "path"}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:24]
