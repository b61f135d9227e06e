"""Which tokenizer is it: for a new run, in a run's config, inside a GGUF file."""

import re

from toy.data.gguf_tokenizer import BrokenTokenizerError, GGUFTokenizer
from toy.data.tokenizers import KINDS, ByteTokenizer, CharTokenizer
from toy.files.errors import BadFileError
from toy.files.gguf import GGUF
from toy.files.gguf_vocabulary import bytes_of_characters


def make_tokenizer(kind, text):
    """The tokenizer of this kind ("char" or "bytes") for training on `text`."""
    if kind == "char":
        return CharTokenizer.from_text(text)
    if kind == "bytes":
        return ByteTokenizer()
    raise ValueError(f"tokenizer must be one of {', '.join(KINDS)}, got {kind!r}")


def tokenizer_from_json(data):
    """The inverse of `to_json`. Raises ValueError for anything that `to_json` does not write; for the tokenizer of a GGUF
    file also FileNotFoundError when the file is gone, BadFileError when it has another tokenizer by now."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "char" and isinstance(data.get("characters"), str):
        return CharTokenizer(data["characters"])
    if kind == "gguf" and isinstance(data.get("path"), str) and isinstance(data.get("sha256"), str):
        return _tokenizer_of_file(data)
    raise ValueError(f"not a tokenizer: {str(data)[:80]}")


def load_tokenizer(gguf):
    """The tokenizer of an open `toy.GGUF`: a `GGUFTokenizer`, or the Char- or ByteTokenizer it was exported from.

    Raises BadFileError when it contradicts itself, ValueError when there is none or its kind is not supported, and
    RuntimeError (with the command to type) when the `tokenizers` library is needed and missing.
    """
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
        with GGUF.open(data["path"]) as gguf:
            tokenizer = load_tokenizer(gguf)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the tokenizer is in {data['path']}, which is not there any more: put the file back"
        ) from error
    if not isinstance(tokenizer, GGUFTokenizer) or tokenizer.sha256 != data["sha256"]:
        raise BadFileError(data["path"], "its tokenizer is not the one that this run was trained with")
    return tokenizer


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
