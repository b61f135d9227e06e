"""Files as blocks of text or lines, in constant memory: UTF-8 or a refusal that names what the file is and what to do."""

import gzip
import io
import json
import re
import zlib

from toy.data.records import CorpusError, is_known_shape

BLOCK = 2**20  # bytes read at a time
LONGEST_LINE = 2**24  # bytes of one line of a .jsonl file: its JSON may take twenty times as much memory
_BOMB = (2**26, 250)  # a .gz that gives more bytes than the first, and more than the second times its own size
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_CONVERT = "convert it first, for example with iconv"
_UNPACK = "unpack it first"
_FORMATS = (  # how it begins, what it is, what to do
    (b"\xff\xfe\x00\x00", "UTF-32 text", _CONVERT),
    (b"\x00\x00\xfe\xff", "UTF-32 text", _CONVERT),
    (b"\xff\xfe", "UTF-16 text", _CONVERT),
    (b"\xfe\xff", "UTF-16 text", _CONVERT),
    (b"\x1f\x8b", "gzip data", "give it a name that ends with .gz (.jsonl.gz for JSON lines)"),
    (b"BZh", "bzip2 data", _UNPACK),
    (b"\xfd7zXZ\x00", "xz data", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "zstandard data", _UNPACK),
    (b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (b"PK\x03\x04", "a zip archive (so are .docx, .xlsx, .epub, .npz and PyTorch files)", _UNPACK),
    (b"PAR1", "a Parquet file", "write its text column as .jsonl, one object a line"),
    (b"ARROW1", "an Arrow file", "write its text column as .jsonl, one object a line"),
    (b"%PDF", "a PDF document", "take its text out first, for example with pdftotext"),
    (b"\x89PNG", "a PNG image", "a language model is trained on text"),
    (b"\xff\xd8\xff", "a JPEG image", "a language model is trained on text"),
    (b"GIF8", "a GIF image", "a language model is trained on text"),
    (b"GGUF", "a GGUF model", "give it as the model, and text as the corpus"),
    (b"\x93NUMPY", "a numpy array", "give the array itself in Python, or write it as .bin with array.tofile"),
    (b"\x89HDF", "an HDF5 file", "write its text as .jsonl, one object a line"),
    (b"SQLite format 3\x00", "an SQLite database", "write its text as .jsonl, one object a line"),
    (b"\x7fELF", "a program", "a language model is trained on text"),
    *((b"\x80" + bytes((version,)), "a pickle", "pickles are not opened: write the text out") for version in range(2, 6)),
)  # fmt: skip


class Bytes:
    """A file's bytes, those in a .gz unpacked.

    done: how many of the file on the disk were read. skipped: the length of the byte order mark, 0 without one.
    """

    def __init__(self, path):
        self.path, self.done, self.skipped = path, 0, 0
        self._unpacked = 0

    def blocks(self, size=BLOCK):
        """Yield bytes of at most `size`, without a byte order mark. Raises CorpusError for a .gz that is none or a bomb."""
        try:
            with open(self.path, "rb") as raw:
                file = gzip.GzipFile(fileobj=raw) if is_gz(self.path) else raw
                n = raw.seek(0, io.SEEK_END)
                raw.seek(0)
                while block := file.read(size):
                    if not self._unpacked and block.startswith(_BYTE_ORDER_MARK):
                        self.skipped = len(_BYTE_ORDER_MARK)
                    self.done = raw.tell()
                    self._unpacked += len(block)
                    if file is not raw and self._unpacked > max(_BOMB[0], _BOMB[1] * n):
                        raise CorpusError(
                            f"corpus file {str(self.path)!r} unpacks to more than {_BOMB[1]} times its size: "
                            "unpack it yourself and look at it first"
                        )
                    yield block[self.skipped :] if self._unpacked == len(block) else block
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise CorpusError(
                f"corpus file {str(self.path)!r} is not sound gzip data ({error}): pack it again, or take off the .gz"
            ) from error
        except OSError as error:
            reason = error.strerror or error
            raise CorpusError(f"corpus {str(self.path)!r} cannot be read: {reason}") from error


def text_blocks(bytes_of):
    """The text of a `Bytes`, as str blocks of about a megabyte; none ends between \\r and \\n.

    Raises CorpusError for anything but UTF-8 text without NUL characters, with the offset and, where it is known, what the
    file is; and for JSON lines under another name, which are not text to train on.
    """
    path, base, pending = bytes_of.path, None, b""
    for block in bytes_of.blocks():
        if base is None:
            base = bytes_of.skipped  # offsets are told as they are in the file
            _refuse_formats(path, block)
            _refuse_json(path, block)
        data = pending + block
        text, pending = _decode(path, data, base, final=False)
        base += len(data) - len(pending)
        if text:
            yield text
    if pending:
        yield _decode(path, pending, base, final=True)[0]


def lines(bytes_of):
    """The lines of a `Bytes` -> (number, bytes), blank ones left out. Raises CorpusError for one beyond LONGEST_LINE."""
    path, number, held = bytes_of.path, 1, 0
    pending: list[bytes] = []
    for block in bytes_of.blocks():
        if number == 1 and not pending:
            _refuse_formats(path, block)
        *whole, rest = block.split(b"\n")
        for part in whole:
            if line := _line(path, number, [*pending, part], held + len(part)):
                yield number, line
            pending, held = [], 0
            number += 1
        pending.append(rest)
        held += len(rest)
        _line(path, number, [], held)
    if line := _line(path, number, pending, held):
        yield number, line


def _line(path, number, parts, n):
    if n > LONGEST_LINE:
        raise CorpusError(
            f"corpus file {str(path)!r} line {number} has more than {LONGEST_LINE >> 20} MB: "
            "cut the record into several, or write a long text as a file of its own"
        )
    line = b"".join(parts)
    return line if line.strip() else b""


def _decode(path, data, base, final):
    """bytes -> (str, the bytes of a character or line end that is not complete yet). base: of the data in the file."""
    zero = data.find(b"\0")
    try:
        text, rest = data.decode("utf-8"), b""
    except UnicodeDecodeError as error:
        incomplete = error.reason == "unexpected end of data" and error.end == len(data) and not final
        if zero < 0 and not incomplete:
            raise CorpusError(
                f"corpus file {str(path)!r} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
                f"{base + error.start} ({error.reason}); {_CONVERT}"
            ) from error
        text, rest = data[: error.start].decode("utf-8"), data[error.start :]
    if zero >= 0:
        raise CorpusError(
            f"corpus file {str(path)!r} is not text: byte 0x00 at offset {base + zero}; "
            "if it is UTF-16 convert it first, for example with iconv, otherwise take it out of the corpus"
        )
    if text.endswith("\r") and not rest and not final:
        return text[:-1], b"\r"
    return text, rest


def _refuse_formats(path, start):
    for magic, name, advice in _FORMATS:
        if start.startswith(magic):
            raise CorpusError(
                f"corpus file {str(path)!r} is not UTF-8 text: it is {name} (byte 0x{start[0]:02x} at offset 0); {advice}"
            )


def _refuse_json(path, start):
    """JSON that holds records, under a name that says text: to train on its braces is never what is wanted."""
    begin = start[:65536].lstrip()
    if not begin.startswith((b"{", b"[")):
        return
    line, newline, _ = begin.partition(b"\n")
    try:
        value = json.loads(line) if newline or len(start) < 65536 else None
    except (ValueError, RecursionError):
        value = None
    records = is_known_shape(value) or re.match(
        rb'[\[\s]*\{\s*"(text|prompt|messages|conversations|instruction)"\s*:', begin
    )
    if begin.startswith(b"[") and (records or (inner_suffix(path) == ".json" and re.match(rb"\[\s*\{", begin))):
        raise CorpusError(
            f"corpus file {str(path)!r} is a JSON list of objects: write one object a line as .jsonl, "
            f"for example with jq -c '.[]' {path.name} > {path.stem}.jsonl"
        )
    if records:
        raise CorpusError(
            f"corpus file {str(path)!r} holds JSON records: write one object a line and give it a name that ends with .jsonl"
        )


def inner_suffix(path):
    """What the name ends with, lower case, without .gz."""
    return (path.with_suffix("") if is_gz(path) else path).suffix.lower()


def is_gz(path):
    return path.suffix.lower() == ".gz"
