"""Which tokenizer is it: for a new run, in a run's config, in a file of somebody else's."""

import re
from collections.abc import Iterable
from typing import Any

from toy.data.bpe_tokenizer import DEFAULT_VOCAB_SIZE, BPETokenizer
from toy.data.gguf_tokenizer import BrokenTokenizerError, GGUFTokenizer, metadata_from_json
from toy.data.tokenizer_json import read_model_tokenizer, read_tokenizer_json
from toy.data.tokenizers import KINDS, ByteTokenizer, CharTokenizer, Tokenizer
from toy.files.atomic import StrPath
from toy.files.errors import BadFileError
from toy.files.fetch import FETCHABLE
from toy.files.gguf import GGUF
from toy.files.gguf_vocabulary import bytes_of_characters
from toy.files.hugging_face import HuggingFaceModel, open_model
from toy.files.places import find_model
from toy.files.runs import Run


def make_tokenizer(kind: str, text: str | Iterable[str], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer for training on `text`, a str or an iterable of texts, which is gone through at most once.

    kind: "char", "bytes", "bpe" (made from the text, with `vocab_size` tokens, None: DEFAULT_VOCAB_SIZE), or what
    `open_tokenizer` opens. Raises ValueError for a vocabulary size that is not a choice there, and the errors of
    `BPETokenizer.train` and `open_tokenizer`.
    """
    if kind == "bpe":
        return BPETokenizer.train(text, DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size)
    if vocab_size is not None:
        raise ValueError(f"a vocabulary size can be chosen for the tokenizer bpe alone, not for {kind}")
    if kind == "char":
        return CharTokenizer.from_text(text)
    return ByteTokenizer() if kind == "bytes" else open_tokenizer(kind)


def open_tokenizer(name: StrPath) -> Tokenizer:
    """A tokenizer that exists: that of a run directory, of a GGUF file, of a fetched model (by its name), or a Hugging Face
    `tokenizer.json` (or the folder it is in).

    Its `to_json` holds all of it: the file is not needed again. Raises FileNotFoundError when there is nothing of that name,
    and the errors of `load_tokenizer`, `tokenizer_from_json` and `read_tokenizer_json`.
    """
    try:
        path = find_model(name)
    except FileNotFoundError as error:
        if str(name) in FETCHABLE:
            raise
        raise FileNotFoundError(
            f"there is no tokenizer {str(name)!r}: it must be {', '.join(KINDS)}, a tokenizer.json, a GGUF file, a run "
            f"directory, or the name of a model on this machine (`toy list`; `toy fetch` gets {', '.join(FETCHABLE)})"
        ) from error
    if path.is_dir() and (path / "config.json").exists() and not (path / "tokenizer.json").exists():
        tokenizer = _tokenizer_of_run(Run.open(path))
    elif path.is_dir() or _begins_like_json(path):
        tokenizer = read_tokenizer_json(path)
    else:
        with GGUF.open(path) as gguf:
            tokenizer = load_tokenizer(gguf)
    if isinstance(tokenizer, GGUFTokenizer):
        tokenizer.path = None
    return tokenizer


def tokenizer_from_json(data: Any) -> Tokenizer:
    """The inverse of `to_json`. Raises ValueError for anything that `to_json` does not write; for the tokenizer of a GGUF
    file also FileNotFoundError when the file is gone, BadFileError when it has another tokenizer by now."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "char" and isinstance(data.get("characters"), str):
        return CharTokenizer(data["characters"])
    if kind == "bpe" and isinstance(data.get("merges"), list):
        return BPETokenizer.from_json(data)
    if kind == "gguf" and isinstance(data.get("sha256"), str):
        if isinstance(data.get("path"), str):
            return _tokenizer_of_file(data)
        if isinstance(data.get("metadata"), dict):
            return _tokenizer_in_json(data)
    raise ValueError(f"not a tokenizer: {str(data)[:80]}")


def has_tokenizer(gguf: GGUF) -> bool:
    """Whether there is one in the file, or in the folder."""
    if isinstance(gguf, HuggingFaceModel):
        return (gguf.path / "tokenizer.json").exists()
    return gguf.metadata.get("tokenizer.ggml.model", "none") != "none"


def load_tokenizer(gguf: GGUF) -> GGUFTokenizer:
    """The tokenizer of an open `toy.GGUF`: a `GGUFTokenizer`, or the Char- or ByteTokenizer it was exported from.

    Raises BadFileError when it contradicts itself, ValueError when there is none or its kind is not supported, and
    RuntimeError (with the command to type) when the `tokenizers` library is needed and missing.
    """
    if isinstance(gguf, HuggingFaceModel):
        return read_model_tokenizer(gguf.path, gguf.config().vocab_size, gguf.ends)
    try:
        return _own_tokenizer(gguf.metadata) or GGUFTokenizer(gguf.metadata, path=gguf.path)
    except BrokenTokenizerError as error:
        raise BadFileError(gguf.path, str(error)) from error
    except ValueError as error:
        raise ValueError(f"{gguf.path}: {error}") from error


def _tokenizer_of_file(data):
    """The `GGUFTokenizer` that this `to_json` describes.

    Raises BadFileError when the file there has another tokenizer by now, FileNotFoundError when it is gone.
    """
    try:
        with open_model(data["path"]) as gguf:
            tokenizer = load_tokenizer(gguf)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the tokenizer is in {data['path']}, which is not there any more: put the file back"
        ) from error
    if not isinstance(tokenizer, GGUFTokenizer) or tokenizer.sha256 != data["sha256"]:
        raise BadFileError(data["path"], "its tokenizer is not the one that this run was trained with")
    return tokenizer


def _tokenizer_of_run(run):
    try:
        return tokenizer_from_json(run.config.get("tokenizer"))
    except BadFileError:
        raise
    except ValueError as error:
        raise BadFileError(run.config_path, str(error)) from error


def _tokenizer_in_json(data):
    tokenizer = GGUFTokenizer(metadata_from_json(data["metadata"]))
    if tokenizer.sha256 != data["sha256"]:
        raise ValueError("the tokenizer was changed: its digest is another")
    return tokenizer


def _begins_like_json(path):
    if not path.is_file():  # a pipe would be waited for; the reader of GGUF files says what it is
        return False
    with open(path, "rb") as file:
        return file.read(64).lstrip()[:1] == b"{"


def _own_tokenizer(metadata):
    """The Char- or ByteTokenizer that `tokenizer_metadata` wrote, or None."""
    tokens, model = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.model")
    if not isinstance(tokens, list) or model not in ("rwkv", "gpt2") or max(map(len, tokens), default=5) > 4:
        return None  # the longest that it writes: \x0a, and the four bytes of a character
    data = [_unescape(token) if model == "rwkv" else bytes_of_characters(token) for token in tokens]
    if model == "rwkv" and data == [bytes((b,)) for b in range(256)]:
        return ByteTokenizer()
    try:
        characters = [token.decode() for token in data]
    except (UnicodeDecodeError, AttributeError):
        return None
    if characters and all(len(c) == 1 for c in characters) and len(set(characters)) == len(characters):
        return CharTokenizer(characters)
    return None


def _unescape(token):
    match = re.fullmatch(r"\\x([0-9a-f]{2})|[!-\[\]-~]", token)
    return None if match is None else bytes((int(match[1], 16),)) if match[1] else token.encode()
