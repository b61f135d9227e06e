"""Encoded corpora: token ids in memory or, of more than a megabyte, in files of the cache directory, made once.

A corpus in the cache is a folder: meta.json and a file for each column. It is written under a temporary name and renamed, so
it is there whole or not at all; one whose files did not change since is found without reading any text.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from toy.data.cutting import BlockEncoder
from toy.data.reading import is_gz
from toy.data.records import CorpusError, Document, Place, Tokens
from toy.data.sources import TokenFile
from toy.data.splitting import Fingerprints
from toy.data.survey import Survey
from toy.files.atomic import write_text
from toy.files.fetch import cache_dir

IN_MEMORY = 2**20  # bytes on the disk: less is encoded anew each time
_FOLDER = "encoded-1"  # in the cache directory; the number counts the formats of what is in it
_OLD = 3600  # seconds: a temporary folder without a lock is a leftover when it is so old
_COLUMNS = {  # a number for each document or example, but ids and asked; joined documents are one for `starts`
    "ids": None,  # uint16 or uint32, all of them one after the other
    "starts": np.int64,  # where it begins among the ids
    "sizes": np.int64,  # UTF-8 bytes of its text; of token files: ids
    "hashes": np.uint64,  # of its text: equal ones have the same
    # only of examples:
    "asked": np.uint8,  # for each id: whether it is to be said
    "first": np.int32,  # the first id that is, from the beginning of the example; -1: none
    "n_asked": np.int32,
    "file": np.int32,
    "line": np.int32,
}


class IdArray:
    """Integers on the disk or in memory. Indexing gives a copy, int32.

    The file is mapped anew for every access: what was read does not add up in this process' memory.
    """

    def __init__(self, array=None, path=None, kind=None):
        self._array, self._file, self._kind = array, None, kind
        if path is not None:
            self._file = open(path, "rb")  # noqa: SIM115 (stays open: the file may be renamed or deleted meanwhile)
            self._n = os.fstat(self._file.fileno()).st_size // np.dtype(kind).itemsize
            if not self._n:  # nothing cannot be mapped
                self._array = np.zeros(0, kind)
        else:
            self._n = len(array)

    def __len__(self):
        return self._n

    def __getitem__(self, where):
        if self._array is not None:
            return self._array[where].astype(np.int32)
        return np.memmap(self._file, self._kind, "r", shape=(self._n,))[where].astype(np.int32)


class Encoded(NamedTuple):
    """A corpus as token ids.

    family: "text", "examples" or "tokens". ids: `IdArray`, all of them. starts: (n + 1,), where each document or example
    begins, and the end. sizes, hashes: (n,) as in `_COLUMNS`. sha256, identity: of the source. asked: `IdArray` or None;
    first, n_asked, places: of examples, (n,). notices: sentences.
    """

    family: str
    ids: IdArray
    starts: np.ndarray
    sizes: np.ndarray
    hashes: np.ndarray
    sha256: str
    identity: str
    notices: list
    asked: IdArray | None = None
    first: np.ndarray | None = None
    n_asked: np.ndarray | None = None
    places: object = None

    def __len__(self):
        return len(self.starts) - 1


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
        return _as_encoded(*job.run(_Memory()))
    cache = _Cache(f"{_digest_of(encoder.tokenizer)}-{'joined' if joined else train_on}-{source.n_bytes}")
    if (found := cache.find_by_signature(signature)) is not None:
        source.remember((found.sha256, found.identity))
        return found
    if cache.has_any() and (found := cache.find(source.identity())) is not None:
        cache.write_index(signature, source.identity())
        return found
    with cache.new_folder() as folder:
        with contextlib.closing(_Files(folder, job.borrowed_ids())) as columns:
            meta, _ = job.run(columns)
        if source.signature() != signature:
            raise CorpusError(f"{source.words} changed while it was read: try again when nothing writes to it any more")
        found = cache.keep(folder, meta)
    cache.write_index(signature, meta["identity"])
    return found


class _Job:
    """One pass over a source, from records to columns."""

    def __init__(self, source, encoder, train_on, joined, progress):
        self.source, self.encoder, self.train_on, self.joined, self.progress = (
            source,
            encoder,
            train_on,
            joined,
            progress,
        )

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
        self._n, self._files, self._place, digest = 0, {}, None, source.new_digest()
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


# ----------------------------------------------------------------------------------------------------------------------
# columns
# ----------------------------------------------------------------------------------------------------------------------


class _Memory:
    borrowed = None

    def __init__(self):
        self._data, self._kinds = {}, dict(_COLUMNS)

    def open(self, name, kind):
        self._kinds[name] = np.dtype(kind)

    def put(self, name, values):
        self._data.setdefault(name, bytearray()).extend(np.asarray(values, self._kinds[name]).tobytes())

    def close(self):
        pass

    def get(self, name):
        return np.frombuffer(self._data[name], self._kinds[name]) if name in self._data else None

    def array(self, name):
        return IdArray(self.get(name)) if name in self._data else None

    def lengths(self):
        return {name: len(self.get(name)) for name in self._data}


class _Files:
    """Columns in the files of a folder. borrowed: the path of the file that has the ids already, None without one."""

    def __init__(self, folder, borrowed=None, meta=None):
        self.folder, self.borrowed, self._open, self._n = Path(folder), borrowed, {}, {}
        self._kinds = dict(_COLUMNS)
        if meta is not None:
            self._n, self.borrowed = meta["n"], meta["borrowed"]
            self._kinds["ids"] = np.dtype(meta["kind"])

    def open(self, name, kind):
        self._kinds[name] = np.dtype(kind)

    def put(self, name, values):
        values = np.asarray(values, self._kinds[name])
        self._n[name] = self._n.get(name, 0) + len(values)
        if name == "ids" and self.borrowed:
            return
        with _writing(self._path(name)) as path:
            if name not in self._open:
                self._open[name] = open(path, "wb")  # noqa: SIM115 (until `close`)
            self._open[name].write(values.tobytes())

    def close(self):
        """Put everything on the disk."""
        while self._open:
            name, file = self._open.popitem()
            with _writing(self._path(name)), file:
                file.flush()
                os.fsync(file.fileno())

    def get(self, name):
        if name not in self._n:
            return None
        return np.fromfile(self._path(name), self._kinds[name])

    def array(self, name):
        return IdArray(path=self._path(name), kind=self._kinds[name]) if name in self._n else None

    def lengths(self):
        return dict(self._n)

    def is_whole(self):
        """Whether every file is there in its full length."""
        try:
            return all(
                self._path(name).stat().st_size == n * np.dtype(self._kinds[name]).itemsize
                for name, n in self._n.items()
            )
        except OSError:
            return False

    def _path(self, name):
        return Path(self.borrowed) if name == "ids" and self.borrowed else self.folder / f"{name}.bin"


@contextlib.contextmanager
def _writing(path):
    """Errors of the disk say which path could not be written, and what to do."""
    try:
        yield path
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror or error}; encoded texts go to the cache directory, "
            "the variable TOY_CACHE names another one"
        ) from error


def _as_encoded(meta, columns):
    get = columns.get
    places = None
    if meta["family"] == "examples":
        places = _Places(meta["files"], get("file"), get("line"))
    return Encoded(
        meta["family"], columns.array("ids"), get("starts"), get("sizes"), get("hashes"), meta["sha256"], meta["identity"],
        meta["notices"], columns.array("asked"), get("first"), get("n_asked"), places,
    )  # fmt: skip


class _Places:
    """The `Place` of each example."""

    def __init__(self, files, file, line):
        self._files, self._file, self._line = files, file, line

    def __getitem__(self, i):
        name, line = self._files[self._file[i]], int(self._line[i])
        return Place(name, line) if name else Place(f"record {line}")


# ----------------------------------------------------------------------------------------------------------------------
# the cache
# ----------------------------------------------------------------------------------------------------------------------


class _Cache:
    """The folders of one tokenizer, one way to encode and one size of the source."""

    def __init__(self, name):
        self.root, self.name = cache_dir() / _FOLDER, name

    def find(self, identity):
        """The `Encoded` of this identity, or None. A damaged one is deleted."""
        folder = self._folder(identity)
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            columns = _Files(folder, meta=meta)
            if meta["identity"] == identity and columns.is_whole():
                return _as_encoded(meta, columns)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def has_any(self):
        return next(self.root.glob(f"{self.name}-*"), None) is not None

    def find_by_signature(self, signature):
        try:
            entry = json.loads(self._index(signature).read_bytes())
            return self.find(entry["identity"]) if entry["signature"] == signature else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_index(self, signature, identity):
        path = self._index(signature)
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps({"signature": signature, "identity": identity}))

    @contextlib.contextmanager
    def new_folder(self):
        """A temporary folder to write to, deleted at the end unless `keep` renamed it; locked while this process lives."""
        with _writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        folder = self.root / f".{self.name}.{secrets.token_hex(4)}.tmp"
        with contextlib.ExitStack() as stack:
            with _locked(self.root / ".lock"):
                self._remove_leftovers()
                with _writing(folder):
                    folder.mkdir()
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                stack.enter_context(_locked(folder / ".lock"))
            yield folder

    def keep(self, folder, meta):
        """Give a finished folder its name, unless another process was faster -> `Encoded`."""
        with _writing(folder / "meta.json") as path:
            write_text(path, json.dumps(meta))
        (folder / ".lock").unlink(missing_ok=True)
        place = self._folder(meta["identity"])
        try:
            os.rename(folder, place)
        except OSError as error:
            if not place.is_dir():
                raise OSError(f"cannot write {place}: {error.strerror or error}") from error
        found = self.find(meta["identity"])
        if found is None:
            raise OSError(f"cannot read {place}, which was just written")
        return found

    def _folder(self, identity):
        return self.root / f"{self.name}-{identity[:24]}"

    def _index(self, signature):
        key = hashlib.sha256(f"{self.name} {json.dumps(signature)}".encode()).hexdigest()
        return self.root / "index" / f"{key[:40]}.json"

    def _remove_leftovers(self):
        """What killed processes left behind: the lock of a folder ends with the process that made it."""
        for folder in self.root.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                lock = folder / ".lock"
                if not _is_free(lock) and time.time() - folder.stat().st_mtime < _OLD:
                    continue
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(path):
    """Hold a lock on a file, where the system has locks. It ends with the process, however that ends."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with _writing(path):
        file = open(path, "wb")  # noqa: SIM115 (closed by the next line)
    with file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_free(path):
    """Whether nobody holds the lock; False where that cannot be known."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
