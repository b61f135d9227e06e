"""Writing a tokenizer as Hugging Face's `tokenizer.json` and `tokenizer_config.json`: `toy.data.tokenizer_json` backwards.

What such a file cannot say the same way is refused. The cut of byte-level BPE is written as the pattern of the model's own
file where it is known, else as the pattern that llama.cpp applies.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from toy.data.pre_tokenizers import PRE_TOKENIZERS
from toy.data.sentencepiece import SPACE
from toy.data.tokenizer_json import patterns_of
from toy.data.tokenizers import ByteTokenizer, CharTokenizer
from toy.files.gguf_vocabulary import BYTE, CHARACTER_OF_BYTE, CONTROL, UNKNOWN, USER_DEFINED
from toy.files.hugging_face_write import TOKENIZER_FILES
from toy.files.regular import read_regular

_LARGEST = 48 * 2**20  # bytes of a file that is copied
_SIDES = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """dict of the names of files to their bytes: those of the folder that the tokenizer was read from, if it was one, else
    the two that say the same. Empty for None. Raises ValueError for a tokenizer that cannot be said the same way."""
    if tokenizer is None:
        return {}
    folder = getattr(tokenizer, "path", None)
    if folder is not None and Path(folder).is_dir():
        return {
            name: read_regular(Path(folder) / name, _LARGEST)
            for name in TOKENIZER_FILES
            if (Path(folder) / name).exists()
        }
    described, beside = _description(tokenizer), _config(tokenizer)
    files = {"tokenizer.json": described, "tokenizer_config.json": beside}
    return {name: (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode() for name, data in files.items()}


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """bos_token_id, and eos_token_id: those that end an answer, for the model's own config."""
    ends = sorted(getattr(tokenizer, "stop_ids", ()))
    if (end := getattr(tokenizer, "eos_id", None)) in ends:
        ends = [end, *(i for i in ends if i != end)]
    found = {
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _description(tokenizer):
    data: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": None,
    }  # fmt: skip
    if isinstance(tokenizer, CharTokenizer):
        vocabulary = {character: i for i, character in enumerate(tokenizer.characters)}
        return data | {
            "pre_tokenizer": _split(r"[\s\S]"), "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "\0\0"},
        }  # fmt: skip
    if isinstance(tokenizer, ByteTokenizer):
        return data | _byte_level({CHARACTER_OF_BYTE[b]: b for b in range(256)}, [], "qwen2")
    data["added_tokens"] = _added(tokenizer)
    data["post_processor"] = _around(tokenizer)
    vocabulary = {token: i for i, token in enumerate(tokenizer.tokens)}
    if tokenizer.model == "gpt2":
        merges = [merge.split(" ") for merge in tokenizer.metadata["tokenizer.ggml.merges"]]
        return data | _byte_level(vocabulary, merges, tokenizer.pre)
    return data | _sentencepiece(tokenizer, vocabulary)


def _added(tokenizer):
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    return [
        {"id": i, "content": token, **_SIDES, "special": kinds[kind]}
        for i, (token, kind) in enumerate(zip(tokenizer.tokens, tokenizer.types.tolist()))
        if kind in kinds
    ]


def _around(tokenizer):
    """What is put before and after a text."""
    before, after = tokenizer.bos_id if tokenizer.add_bos else None, tokenizer.eos_id if tokenizer.add_eos else None
    names = {tokenizer.tokens[i]: i for i in (before, after) if i is not None}
    if not names:
        return None

    def around(name, kind):
        special = {i: {"SpecialToken": {"id": tokenizer.tokens[i], "type_id": kind}} for i in names.values()}
        sequence = {"Sequence": {"id": name, "type_id": kind}}
        return [*([] if before is None else [special[before]]), sequence, *([] if after is None else [special[after]])]

    return {
        "type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1),
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for token, i in names.items()},
    }  # fmt: skip


def _byte_level(vocabulary, merges, pre):
    patterns, whole = patterns_of(pre), PRE_TOKENIZERS[pre].whole_pieces
    if patterns is None:
        if PRE_TOKENIZERS[pre].digits is not None:
            raise ValueError(
                f"tokenizer.json has no cut of digits as the pre-tokenizer {pre} has it: export the model as GGUF"
            )
        patterns = PRE_TOKENIZERS[pre].patterns
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(_split, patterns), bytes_]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": _bpe(vocabulary, merges, ignore_merges=whole),
    }


def _split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bpe(vocabulary, merges, **changes):
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocabulary, "merges": merges, **changes,
    }  # fmt: skip


def _sentencepiece(tokenizer, vocabulary):
    prefix = tokenizer.metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = None if tokenizer.unk_id is None else tokenizer.tokens[tokenizer.unk_id]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "decoder": {"type": "Sequence", "decoders": back + strip},
        "model": _bpe(
            vocabulary,
            _merges(tokenizer),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool((tokenizer.types == BYTE).any()),
        ),
    }


def _merges(tokenizer):
    """Every way to make a token of two others, the best score first."""
    scores = tokenizer.metadata["tokenizer.ggml.scores"]
    usable = np.isin(tokenizer.types, (UNKNOWN, CONTROL, BYTE), invert=True)
    known = {token: i for i, token in enumerate(tokenizer.tokens) if usable[i]}
    made: dict[str, list[tuple[str, str]]] = {}
    for token in known:
        ways = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in known and token[n:] in known]
        if ways:
            made[token] = sorted(ways, key=lambda way: (known[way[0]], known[way[1]]))
    order = sorted(made, key=lambda token: (-scores[known[token]], known[token]))
    for one, other in itertools.pairwise(order):
        # runs of spaces come out alike in either order
        if scores[known[one]] == scores[known[other]] and {*one, *other} != {SPACE}:
            raise ValueError(
                f"tokenizer.json has an order of merges, and the tokens {one!r} and {other!r} have one score: export the "
                "model as GGUF"
            )
    return [list(way) for token in order for way in made[token]]


def _config(tokenizer):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "unk"):
        if (i := getattr(tokenizer, f"{name}_id", None)) is not None:
            config[f"{name}_token"] = tokenizer.tokens[i]
    if hasattr(tokenizer, "metadata"):
        padding = tokenizer.metadata.get("tokenizer.ggml.padding_token_id")
        if type(padding) is int and 0 <= padding < len(tokenizer.tokens):
            config["pad_token"] = tokenizer.tokens[padding]
        config |= {"add_bos_token": tokenizer.add_bos, "add_eos_token": tokenizer.add_eos}
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config
