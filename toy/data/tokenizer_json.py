"""Hugging Face's `tokenizer.json`: byte-level BPE, and BPE in the manner of SentencePiece, as the keys of a GGUF file.

Such a file can describe far more than GGUF and llama.cpp know. What they would do otherwise is refused by name, so that a run
means the same ids here, in its exported file and in the library the file comes from. Two habits of transformers that change
texts are left out and told in `notices`.

Source: the file's keys are those of the `tokenizers` library, https://huggingface.co/docs/tokenizers
"""

import contextlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np

from toy.data.gguf_tokenizer import BrokenTokenizerError, GGUFTokenizer
from toy.data.pre_tokenizers import PRE_TOKENIZERS
from toy.data.sentencepiece import SPACE
from toy.data.tokenizers import CharTokenizer
from toy.files.errors import BadFileError
from toy.files.gguf_models import short
from toy.files.gguf_vocabulary import BYTE, CHARACTER_OF_BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

_MAX_FILE = 48 * 2**20  # bytes: Gemma's, the largest in use, takes two thirds of it
_MAX_CONTAINERS, _MAX_ITEMS = (
    2**21,
    2**23,
)  # lists and objects in it, and what is in them: some hundred bytes of memory each
_MAX_TOKENS = 2**20
_MAX_SPLITS = 2**28  # of all tokens in two, counted with the characters that each looks at

# bytes that texts of every script are made of, and those that UTF-8 never has
_EVERYWHERE = {*b"\t\n", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF0)}
_IN_NO_TEXT = {0xC0, 0xC1, *range(0xF5, 0x100)}

# The patterns of models' own files, as one string in which they are separated, to the names that llama.cpp gives them, by
# whether a piece that is a token is not built from merges. Left out are those that llama.cpp only comes near to (gpt-4o).
_NUL = "\0"
_I = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _I + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    _GPT2: {False: "gpt-2"},
    _NUL.join((r"\p{N}", _GPT2)): {False: "smollm"},
    _LLAMA3: {True: "llama-bpe", False: "dbrx"},
    _I + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST: {False: "qwen2"},
    _I + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": {
        False: "qwen35"
    },
    _I + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}" + "\r\n" + r"]+|\s*[" + "\r\n" + r"]+|\s+(?!\S)|\s+": {
        False: "seed-coder"
    },
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+": {
        False: "bailingmoe"
    },
    _NUL.join((r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK3)): {False: "deepseek-v3"},
    _NUL.join((r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+"))): {True: "minicpm5"},
}


def patterns_of(pre):
    """The patterns of models' own files that llama.cpp calls by this name, or by one that means the same; None: not known."""
    rule = PRE_TOKENIZERS[pre]._replace(adds_bos=False)
    for patterns, names in _PATTERNS.items():
        for whole, name in names.items():
            if whole == rule.whole_pieces and PRE_TOKENIZERS[name]._replace(adds_bos=False) == rule:
                return patterns.split(_NUL)
    return None


def read_tokenizer_json(path):
    """The `GGUFTokenizer` of a `tokenizer.json`, or of the folder it is in.

    `tokenizer_config.json` and `chat_template.jinja` beside it say which tokens begin and end a text, and how a conversation
    is written; without them the file's own post-processor says it, or a single special token that is known to end texts.
    Raises FileNotFoundError, BadFileError for a file that is damaged or contradicts itself, and ValueError for one that
    describes something that cannot be done the same way here.
    """
    with _named(path) as file:
        data = _read_json(file)
        if (own := own_characters(data)) is not None:
            return own
        metadata, notices = _metadata(file, data)
        return GGUFTokenizer(metadata, notices=notices)


def read_model_tokenizer(folder, vocab_size, ends=()):
    """The tokenizer in the folder of a Hugging Face model with `vocab_size` rows in its embedding: the rows beyond the last
    token are unused tokens, as llama.cpp's converter has it.

    ends: the ids that end an answer by the model's own config, beside those that the tokenizer knows. Errors as
    `read_tokenizer_json`.
    """
    folder = Path(folder)
    with _named(folder) as file:
        data = _read_json(file)
        if (own := own_characters(data)) is not None and own.vocab_size == vocab_size:
            return own
        metadata, notices = _metadata(file, data)
        tokens = metadata["tokenizer.ggml.tokens"]
        missing = vocab_size - len(tokens)
        if missing < 0:
            raise BrokenTokenizerError(f"has {len(tokens)} tokens, and the model's embedding {vocab_size} rows")
        metadata["tokenizer.ggml.tokens"] = tokens + [f"[PAD{len(tokens) + i}]" for i in range(missing)]
        padding = {"tokenizer.ggml.token_type": UNUSED, "tokenizer.ggml.scores": -1e6}
        for key in padding.keys() & metadata.keys():
            array = metadata[key]
            metadata[key] = np.concatenate([array, np.full(missing, padding[key], array.dtype)])
        tokenizer = GGUFTokenizer(metadata, path=folder, notices=notices)
        ends = [i for i in ends if 0 <= i < vocab_size and i not in tokenizer.stop_ids]
        if not ends:
            return tokenizer
        free = [name for name in ("eos", "eot", "eom") if f"tokenizer.ggml.{name}_token_id" not in metadata]
        metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in zip(free, ends)}
        if len(ends) > len(free):
            notices = [*notices, f"{folder}: {len(ends) - len(free)} of the tokens that end an answer are left out"]
        return GGUFTokenizer(metadata, path=folder, notices=notices)


def _metadata(path, data):
    """The keys of a GGUF file that say what a `tokenizer.json` says, and a list of sentences about what is left out. data:
    what is in the file."""
    config = _read_json(path.with_name("tokenizer_config.json"), {})
    notices: list[str] = []
    metadata = _Description(data, notices).metadata()
    metadata |= _roles(data, config, metadata["tokenizer.ggml.tokens"])
    metadata |= _chat_templates(path, config)
    return metadata, [f"{path}: {notice}" for notice in notices]


@contextlib.contextmanager
def _named(path):
    """Gives the path of the file, which is `path` or in the folder `path`; errors name it."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        yield path
    except BadFileError:
        raise
    except BrokenTokenizerError as error:
        raise BadFileError(path, str(error)) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def own_characters(data):
    """The `CharTokenizer` that `toy.data.tokenizer_json_write` wrote, or None."""
    model = data.get("model")
    tokens = model.get("vocab") if isinstance(model, dict) and model.get("type") == "WordLevel" else None
    if not isinstance(tokens, dict) or not tokens or any(len(token) != 1 for token in tokens):
        return None
    if sorted(tokens.values(), key=str) != sorted(range(len(tokens)), key=str) or data.get("normalizer") is not None:
        return None
    return CharTokenizer(sorted(tokens, key=tokens.__getitem__))


class _Description:
    """The parts of the file that say how text becomes ids."""

    def __init__(self, data, notices):
        self.notices = notices
        self.model = _object(data.get("model"), "model")
        kind = self.model.get("type", "BPE" if "merges" in self.model else None)
        if kind != "BPE":
            raise ValueError(f"its tokenizer is of the kind {short(kind)}; BPE alone can be used")
        self.normalizers = _flat(data.get("normalizer"), "normalizers", "normalizer")
        self.pre_tokenizers = _flat(data.get("pre_tokenizer"), "pretokenizers", "pre_tokenizer")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if self.model.get(name):
                raise ValueError(f"its model has {name} {short(self.model[name])}, which cannot be done the same way")
        self.merges = self._merges()
        self.tokens, self.types = self._vocabulary(data.get("added_tokens") or [])

    def metadata(self):
        byte_level = any(part.get("type") == "ByteLevel" for part in self.pre_tokenizers)
        return self._byte_level() if byte_level else self._sentencepiece()

    # -- tokens and merges --------------------------------------------------------------------------------------------

    def _merges(self):
        """list of (left, right), in order, each once."""
        merges = self.model.get("merges")
        if not isinstance(merges, list):
            raise BrokenTokenizerError("has no list of merges")
        pairs: dict[Any, None] = {}
        for merge in merges:
            pair = (
                tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
            )
            if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
                raise BrokenTokenizerError(f"has the merge {short(merge)}, expected two parts")
            pairs[pair] = None
        return list(pairs)

    def _vocabulary(self, added):
        """-> tokens by id, and their GGUF types."""
        vocabulary = self.model.get("vocab")
        if not isinstance(vocabulary, dict) or not vocabulary or not isinstance(added, list):
            raise BrokenTokenizerError("has no vocabulary")
        ids, types = dict(vocabulary), {}
        for token in added:
            content, i = _object(token, "added_tokens").get("content"), token.get("id")
            if not isinstance(content, str) or not content or ids.setdefault(content, i) != i:
                raise BrokenTokenizerError(
                    f"has the added token {short(content)} with the id {short(i)}, and another one"
                )
            for name in ("lstrip", "rstrip", "single_word"):
                if token.get(name):
                    raise ValueError(f"its token {short(content)} has {name}, which cannot be done the same way")
            types[content] = CONTROL if token.get("special") else USER_DEFINED
        if not all(type(i) is int and 0 <= i < _MAX_TOKENS for i in ids.values()):
            raise BrokenTokenizerError(f"has token ids that are no whole numbers from 0 to {_MAX_TOKENS}")
        tokens = [f"[UNUSED_{i}]" for i in range(1 + max(ids.values()))]
        kinds = np.full(len(tokens), UNUSED, np.int32)
        unknown = self.model.get("unk_token")
        for token, i in ids.items():
            if kinds[i] != UNUSED:
                raise BrokenTokenizerError(f"has the tokens {short(tokens[i])} and {short(token)} with one id {i}")
            tokens[i] = token
            byte = self.model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token)
            kinds[i] = UNKNOWN if token == unknown else types.get(token, BYTE if byte else NORMAL)
        return tokens, kinds

    # -- byte-level BPE -----------------------------------------------------------------------------------------------

    def _byte_level(self):
        for part in self.normalizers:
            if part.get("type") != "NFC":
                raise ValueError(f"its normalizer {_name(part)} cannot be done the same way")
            self.notices.append(
                "its normalizer NFC is left out, as in llama.cpp: accents that stand as characters of their own stay so"
            )
        if self.model.get("byte_fallback"):
            raise ValueError("it is byte-level and has byte_fallback, which cannot be done the same way")
        known = set(self.tokens)
        missing = {byte for byte, character in CHARACTER_OF_BYTE.items() if character not in known}
        if missing & _EVERYWHERE:
            raise BrokenTokenizerError(f"is byte-level BPE and has no token for {len(missing)} of the 256 bytes")
        if rare := sorted(missing - _IN_NO_TEXT):  # SmolLM2's has none for some control characters
            named = " ".join(f"{byte:02x}" for byte in rare)
            self.notices.append(
                f"it has no token for the bytes {named}: they are left out of a text, as in llama.cpp and transformers"
            )
        whole = bool(self.model.get("ignore_merges"))
        pre = _PATTERNS.get(_NUL.join(self._patterns()), {}).get(whole)
        if pre is None:
            shown = " then ".join(repr(pattern[:200]) for pattern in self._patterns())
            raise ValueError(
                f"it cuts words by {shown}{' with ignore_merges' * whole}, which llama.cpp has no name for: "
                "take the tokenizer of a GGUF file"
            )
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in self.merges],
        }

    def _patterns(self):
        """list of str: the patterns that cut words."""
        patterns = []
        for part in self.pre_tokenizers:
            kind, behavior = part.get("type"), (part.get("behavior"), bool(part.get("invert")))
            pattern = part.get("pattern")
            if kind == "ByteLevel" and not part.get("add_prefix_space", True):
                patterns += [_GPT2] if part.get("use_regex", True) else []
            elif kind == "Digits" and part.get("individual_digits"):
                patterns.append(r"\p{N}")
            elif (
                kind == "Split"
                and behavior in (("Isolated", False), ("Removed", True))
                and isinstance(pattern, dict)
                and isinstance(pattern.get("Regex"), str)
            ):
                patterns.append(pattern["Regex"])
            else:
                raise ValueError(f"its pre_tokenizer {_name(part)} cannot be done the same way")
        return patterns

    # -- BPE in the manner of SentencePiece -----------------------------------------------------------------------------

    def _sentencepiece(self):
        if not self.model.get("byte_fallback") and self.model.get("unk_token") is None:
            raise ValueError("it is neither byte-level nor has it byte_fallback or an unknown token")
        if self.model.get("ignore_merges"):
            raise ValueError("its model has ignore_merges, which cannot be done the same way")
        space = self._space_before()
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.scores": self._scores(),
            "tokenizer.ggml.token_type": self.types,
            "tokenizer.ggml.add_space_prefix": space,
        }

    def _space_before(self):
        """Whether a space is put before a text. Raises ValueError unless spaces become SPACE and nothing else happens."""
        space, replaced = False, False
        for part in (*self.normalizers, *self.pre_tokenizers):
            kind, pattern = part.get("type"), part.get("pattern")
            if kind == "Prepend" and part.get("prepend") == SPACE and not replaced:
                space = True
            elif kind == "Replace" and pattern == {"String": " "} and part.get("content") == SPACE:
                replaced = True
            elif kind == "Metaspace" and part.get("replacement") == SPACE and not part.get("split", True):
                scheme = part.get("prepend_scheme", "always")
                space, replaced = scheme != "never", True
                if scheme == "first":
                    self.notices.append(
                        "a space is put before the text behind each special token, as in llama.cpp; transformers puts one "
                        "before the first text alone (prepend_scheme first)"
                    )
            elif not (
                kind == "Split" and pattern == {"String": " "} and replaced
            ):  # there are no spaces left to split at
                raise ValueError(f"its {_name(part)} cannot be done the same way")
        if not replaced:
            raise ValueError(f"it does not write spaces as {SPACE}, which cannot be done the same way")
        return space

    def _scores(self):
        """float32 (V,): a token's rank among all products of merges, negative, so that joining by score is merging by rank.

        That is so when every way to make a token from two others is a merge, and the ways to make one token stand together.
        """
        known = {token: i for i, token in enumerate(self.tokens) if self.types[i] in (NORMAL, USER_DEFINED, UNUSED)}
        if sum(len(token) ** 2 for token in known) > _MAX_SPLITS:
            raise BrokenTokenizerError("has tokens that are longer than any tokenizer's")
        ranks: dict[Any, Any] = {}
        last = None
        for left, right in self.merges:
            token = left + right
            if not {left, right, token} <= known.keys():
                raise BrokenTokenizerError(
                    f"has the merge {short(f'{left} {right}')}, of which not all is in its vocabulary"
                )
            if token != last and token in ranks:
                raise ValueError(
                    f"it makes {short(token)} at two places among its merges, which cannot be done the same way"
                )
            last, ranks[token] = token, ranks.get(token, len(ranks))
        merges = set(self.merges)
        scores = np.full(len(self.tokens), -len(ranks) - 1, np.float32)
        for token, i in known.items():
            for n in range(1, len(token)):
                if token[:n] in known and token[n:] in known and (token[:n], token[n:]) not in merges:
                    raise ValueError(
                        f"it does not merge {short(token[:n])} and {short(token[n:])} to {short(token)}, which is a token: "
                        "that cannot be done the same way"
                    )
            scores[i] = -ranks.get(token, len(ranks) + 1)
        scores[np.isin(self.types, (UNKNOWN, CONTROL, BYTE))] = 0
        return scores


def _roles(data, config, tokens):
    """The metadata keys that say which token begins a text, ends it, and so on."""
    places = {token: i for i, token in enumerate(tokens)}
    before, after = _template(data.get("post_processor"))
    names = {"bos": before, "eos": after, "unk": None, "pad": None}
    for name in names:
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        names[name] = token if isinstance(token, str) else names[name]
    special = [
        token["content"] for token in data.get("added_tokens") or [] if isinstance(token, dict) and token.get("special")
    ]
    if names["eos"] is None and len(special) == 1 and special[0] in ("<|endoftext|>", "</s>", "<|end_of_text|>"):
        names["eos"] = special[0]
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    metadata = {
        f"tokenizer.ggml.{keys[name]}_token_id": places[token] for name, token in names.items() if token in places
    }
    for name, token in (("bos", before), ("eos", after)):
        chosen = config.get(f"add_{name}_token")
        metadata[f"tokenizer.ggml.add_{name}_token"] = chosen if isinstance(chosen, bool) else token is not None
    return metadata


def _template(processor):
    """The special tokens (or None) that a post-processor puts before and after a text."""
    for part in _flat(processor, "processors", "post_processor"):
        if part.get("type") != "TemplateProcessing":
            continue
        single = [_object(piece, "post_processor") for piece in part.get("single") or []]
        kinds = ["Sequence" in piece for piece in single]
        names = [_object(piece.get("SpecialToken") or {}, "post_processor").get("id") for piece in single]
        if kinds.count(True) != 1 or len(kinds) > 3 or kinds.index(True) > 1:
            raise ValueError("its post_processor puts more around a text than one token on each side")
        at = kinds.index(True)
        return (names[0] if at else None), (names[at + 1] if len(names) > at + 1 else None)
    return None, None


def _chat_templates(path, config):
    found = config.get("chat_template")
    named = {
        part["name"]: part["template"]
        for part in (found if isinstance(found, list) else [])
        if isinstance(part, dict) and isinstance(part.get("name"), str) and isinstance(part.get("template"), str)
    }
    if isinstance(found, str):
        named["default"] = found
    own = path.with_name("chat_template.jinja")
    if own.exists():
        named["default"] = _read(own).decode(errors="replace")
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    return {key: named[name] for name, key in keys.items() if name in named}


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_json(path, missing=None):
    """The JSON object in a file; `missing` when there is no file, if it is not None."""
    if missing is not None and not path.exists():
        return missing
    text = _read(path)
    if text.count(b"[") + text.count(b"{") > _MAX_CONTAINERS or text.count(b",") > _MAX_ITEMS:
        raise BadFileError(path, "has more in it than any tokenizer")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadFileError):
            raise
        raise BadFileError(path, f"is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise BadFileError(path, "is not a JSON object")
    return data


def _read(path):
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise BadFileError(path, "is not a regular file")
        if status.st_size > _MAX_FILE:
            raise BadFileError(path, f"has {status.st_size} bytes, more than any tokenizer ({_MAX_FILE})")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise BadFileError(path, f"cannot be read: {error.strerror or error}") from error


def _object(value, name):
    if not isinstance(value, dict):
        raise BrokenTokenizerError(f"has no object where {name} should have one")
    return value


def _flat(part, names, what):
    """list of the parts of a Sequence, or of the single one there is; empty for None."""
    if part is None:
        return []
    part = _object(part, what)
    if part.get("type") != "Sequence":
        return [part]
    parts = part.get(names)
    if not isinstance(parts, list):
        raise BrokenTokenizerError(f"has a Sequence without {names}")
    return [_object(inner, what) for inner in parts]


def _name(part):
    return short({key: value for key, value in part.items() if value is not None})
