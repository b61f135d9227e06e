"""llama.cpp as the judge of tokenizers, and texts that are hard to cut."""

import json
import random
import sys
import unicodedata
import urllib.request

import numpy as np
import pytest

import toy
from toy.files import gguf_write
from toy.files.gguf_models import metadata_of
from toy.models import model_for

# Every kind of character, and what stands in the patterns of the pre-tokenizers
_PIECES = [
    *"aaAbBzZ's'tT'RE'll  \t\n\r/.,!?-_(){}<>=+|~`$^\"\\0123456789éßñÀǅʼªº日本語カなㄱ가ㄅ།ำ्ा़́ٱب😀👍🏽…“”‘’—：；，、〿︰।۔،",  # noqa: RUF001
    *"IMGZ²½Ⅷ٣\u09eaΩωﬁ\u200c\u200d\u00a0\u2028\u2029\u3000\u0085\u00ad\ufeff\x00\x07\x1c$€©\ue000\U00013460\u1c89\U0001cc00",
    *("IMGIMGABZ", "<sentinel:12>", "    ", "\n\n", "'S", "'Ve", " a", " A", "12345", "hello", " world", "HelloWorld"),
]  # fmt: skip


def hard_texts(n, seed=1, length=40):
    """list of n random texts."""
    generator = random.Random(seed)
    return ["".join(generator.choices(_PIECES, k=generator.randint(1, length))) for _ in range(n)]


def every_character(step=1):
    """list of texts, one for a code point, in which it stands beside letters, digits, spaces and signs.

    Dense blocks (Chinese, Hangul, private use) are sampled. step: of the others only every so many-th.
    """
    texts, k = [], 0
    for code in range(1, sys.maxunicode + 1):
        dense = 0x3400 <= code < 0xA000 or 0xAC00 <= code < 0xD7A4 or 0xE000 <= code < 0xF900 or code >= 0x20000
        if unicodedata.category(chr(code)) == "Cs" or (dense and code % 197):
            continue
        k += 1
        if k % step == 0:
            c = chr(code)
            texts.append(f"a{c}a 1{c}1 {c} b {c}b.{c}. {c}.\n{c}\n {c}\n'{c} A{c}A{c}{c}  {c}x")
    return texts


class LlamaCppVocabulary:
    """The tokenizer of some GGUF metadata in llama.cpp, for the length of a `with` block."""

    def __init__(self, folder, metadata, name="tokenizer"):
        self.path = folder / f"{name}.gguf"
        config = toy.LlamaConfig(len(metadata["tokenizer.ggml.tokens"]), 32, 1, 1, 32, 1, 32)
        tensors = [
            (name, np.zeros(shape, np.float32), "Q8_0" if len(shape) == 2 else "F32")
            for name, shape in model_for(config).parameter_shapes(config).items()
        ]
        entries = {"general.type": "model", "general.name": name, **metadata_of(config), **metadata}
        gguf_write._write(self.path, entries, tensors)

    def __enter__(self):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.n_ctx, settings.n_parallel = str(self.path), 64, 1
        settings.warmup, settings.fit_params, settings.verbosity = False, False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self._server = xllamacpp.Server(settings)
        return self

    def __exit__(self, *error):
        del self._server
        self.path.unlink()

    def encode(self, text, *, add_special=False, parse_special=False):
        """list of ids."""
        return self._post("/tokenize", content=text, add_special=add_special, parse_special=parse_special)["tokens"]

    def decode(self, ids):
        return self._post("/detokenize", tokens=[int(i) for i in ids])["content"]

    def render(self, messages, **variables):
        """The conversation as its chat template writes it."""
        return self._post("/apply-template", messages=messages, **variables)["prompt"]

    def _post(self, path, **content):
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def differing(texts, ours, theirs, joint="\n\nZ"):
    """The texts for which the two functions (str -> list) differ, many asked at once and the search narrowed down."""
    if not texts or ours(joint.join(texts)) == theirs(joint.join(texts)):
        return []
    if len(texts) == 1:
        return list(texts)
    half = len(texts) // 2
    return differing(texts[:half], ours, theirs, joint) + differing(texts[half:], ours, theirs, joint)
