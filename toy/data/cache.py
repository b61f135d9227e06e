"""Where encoded corpora lie: columns of numbers in memory, or in files of the cache directory.

A corpus in the cache is a folder: meta.json and a file for each column. It is written under a temporary name and renamed, so
it is there whole or not at all; a small index finds one whose source files did not change, without reading any of them.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toy.data.records import Place
from toy.files.atomic import write_text
from toy.files.fetch import cache_dir

_FOLDER = "encoded-1"  # in the cache directory; the number counts the formats of what is in it
_BUFFER = 2**18  # bytes of a column that are kept before they are written
_OLD = 3600  # seconds: a temporary folder without a lock is a leftover when it is so old
# a number for each document or example, but ids and asked; joined documents are one for `starts`
COLUMNS: dict[str, Any] = {
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
        self._array, self._kind = array, kind
        self._file: Any = None
        if path is not None:
            self._file = open(path, "rb")  # noqa: SIM115 (stays open: the file may be renamed or deleted meanwhile)
            weakref.finalize(self, self._file.close)
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
    begins, and the end. sizes, hashes: (n,) as in `COLUMNS`. sha256, identity: of the source. asked: `IdArray` or None;
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


def as_encoded(meta, columns):
    """The `Encoded` of finished columns (`Memory` or `Files`). meta: what meta.json says."""
    get, places = columns.get, None
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
# columns
# ----------------------------------------------------------------------------------------------------------------------


class Memory:
    """Columns in memory."""

    borrowed = None

    def __init__(self):
        self._kinds = {name: kind and np.dtype(kind) for name, kind in COLUMNS.items()}
        self._data, self._n = {}, {}  # by name: a bytearray, and how many numbers there are in all

    def open(self, name, kind):
        """Say which kind of numbers a column holds, before the first of them."""
        self._kinds[name] = np.dtype(kind)

    def put(self, name, values):
        """Add numbers to the end of a column."""
        if name not in self._data:
            self._data[name], self._n[name] = bytearray(), 0
        self._data[name] += np.asarray(values, self._kinds[name]).tobytes()
        self._n[name] += len(values)

    def close(self):
        """Nothing more comes."""

    def get(self, name):
        """The column as an array, None for one that nothing was put into."""
        return np.frombuffer(self._data[name], self._kinds[name]) if name in self._data else None

    def array(self, name):
        """The column as an `IdArray`, or None."""
        return IdArray(self.get(name)) if name in self._data else None

    def lengths(self):
        """dict of the columns to their numbers of numbers."""
        return dict(self._n)


class Files(Memory):
    """Columns in the files of a folder. borrowed: the path of the file that has the ids already, None without one."""

    def __init__(self, folder, borrowed=None, meta=None):
        super().__init__()
        self.folder, self.borrowed, self._open = Path(folder), borrowed, {}
        if meta is not None:
            self._n, self.borrowed = meta["n"], meta["borrowed"]
            self._kinds["ids"] = np.dtype(meta["kind"])

    def put(self, name, values):
        super().put(name, values)
        if len(self._data[name]) > _BUFFER:
            self._write(name)

    def _write(self, name):
        """What is buffered, to the file."""
        if name != "ids" or not self.borrowed:
            with _writing(self._path(name)) as path:
                if name not in self._open:
                    self._open[name] = open(path, "wb", buffering=0)  # noqa: SIM115 (until `close`)
                view = memoryview(self._data[name])
                while len(view):  # a write may be a short one
                    view = view[self._open[name].write(view) :]
        self._data[name] = bytearray()

    def close(self):
        """Put everything on the disk."""
        for name in self._data:
            self._write(name)
        for name, file in self._open.items():
            with _writing(self._path(name)):
                os.fsync(file.fileno())
        self.release()

    def release(self):
        """Close the files, whatever is in them."""
        for file in self._open.values():
            file.close()
        self._open = {}

    def get(self, name):
        if name not in self._n:
            return None
        return np.fromfile(self._path(name), self._kinds[name])

    def array(self, name):
        return IdArray(path=self._path(name), kind=self._kinds[name]) if name in self._n else None

    def is_whole(self):
        """Whether every file is there in its full length."""
        try:
            return all(self._path(name).stat().st_size == n * self._kinds[name].itemsize for name, n in self._n.items())
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


# ----------------------------------------------------------------------------------------------------------------------
# the cache
# ----------------------------------------------------------------------------------------------------------------------


class Cache:
    """The folders of one tokenizer, one way to encode and one size of the source."""

    def __init__(self, name):
        self.root, self.name = cache_dir() / _FOLDER, name

    def find(self, identity):
        """The `Encoded` of this identity, or None. A damaged one is deleted."""
        folder = self._folder(identity)
        try:
            meta = json.loads((folder / "meta.json").read_bytes())
            columns = Files(folder, meta=meta)
            if meta["identity"] == identity and columns.is_whole():
                return as_encoded(meta, columns)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def has_any(self):
        """Whether it is worth while to ask for an identity, for which the text must be read."""
        return next(self.root.glob(f"{self.name}-*"), None) is not None

    def find_by_signature(self, signature):
        """The `Encoded` of files that look as they did then (`Source.signature`), or None."""
        try:
            entry = json.loads(self._index(signature).read_bytes())
            return self.find(entry["identity"]) if entry["signature"] == signature else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_index(self, signature, identity):
        path = self._index(signature)
        with contextlib.suppress(OSError):  # it only saves reading the text
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
        write_text(folder / "meta.json", json.dumps(meta))
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
                held = _is_held(folder / ".lock")
                if held is None:
                    held = time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir())) < _OLD
                if not held:
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


def _is_held(path):
    """Whether a process holds the lock; None where that cannot be known."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return None
