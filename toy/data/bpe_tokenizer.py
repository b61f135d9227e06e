"""A subword vocabulary made from a text: byte-level BPE, trained and run by the `tokenizers` library.

`toy/data/bpe.py` shows in a page how it works, and gives the same ids.
"""

import json
import re

import numpy as np

from toy.data.bpe import LONGEST_TOKEN
from toy.data.gguf_tokenizer import BrokenTokenizerError, GGUFTokenizer, blocks_of
from toy.data.pre_tokenizers import PRE_TOKENIZERS, split_and_encode_bytes
from toy.data.tokenizers import check_unicode
from toy.files.gguf_vocabulary import CHARACTER_OF_BYTE, CONTROL, NORMAL
from toy.optional import optional_package

DEFAULT_VOCAB_SIZE = 2048
SMALLEST_VOCAB_SIZE = 257  # the bytes and the end
LARGEST_VOCAB_SIZE = 2**18
_PRE = "qwen2"  # words, digits one by one; llama.cpp adds no beginning for it and leaves all spaces in the decoded text
_END = "<|endoftext|>"
_BYTES = sorted(CHARACTER_OF_BYTE.values())  # GPT-2's order


class BPETokenizer(GGUFTokenizer):
    """Laid out as GPT-2's: the 256 bytes, the merges in the order in which they were learned, and last the end of a text.

    That end is also what a text may begin with (`bos_id`); `encode` adds neither. A text that has it written out in it keeps
    it as characters, unless `parse_special` asks for the token.
    """

    kind = "bpe"

    def __init__(self, merges):
        """merges: list of str, two tokens in GPT-2's characters with a space between them. Raises ValueError when they make
        no vocabulary: a part that is no token yet, or a token made twice."""
        tokens = list(_BYTES)
        known = set(tokens)
        for merge in merges:
            left, _, right = merge.partition(" ")
            if left not in known or right not in known or left + right in known:
                raise BrokenTokenizerError(f"the merge {merge[:80]!r} does not make a new token of two that there are")
            tokens.append(left + right)
            known.add(left + right)
        tokens.append(_END)
        super().__init__(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": _PRE,
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.token_type": np.array([NORMAL] * (len(tokens) - 1) + [CONTROL], np.int32),
                "tokenizer.ggml.merges": list(merges),
                "tokenizer.ggml.bos_token_id": len(tokens) - 1,
                "tokenizer.ggml.eos_token_id": len(tokens) - 1,
                "tokenizer.ggml.add_bos_token": False,
                "tokenizer.ggml.add_eos_token": False,
            }
        )

    @classmethod
    def train(cls, text, vocab_size=DEFAULT_VOCAB_SIZE):
        """The vocabulary of `vocab_size` tokens that shortens `text` most, one merge at a time.

        text: a str, or an iterable of texts, which is gone through once: none of it is kept but its words and their counts.
        Raises ValueError for a size out of range and for a text that does not have so many pairs that stand there twice (the
        message has the number it has), RuntimeError when the `tokenizers` library is not installed.
        """
        if type(vocab_size) is not int or not SMALLEST_VOCAB_SIZE <= vocab_size <= LARGEST_VOCAB_SIZE:
            raise ValueError(
                f"the vocabulary must have from {SMALLEST_VOCAB_SIZE} (every byte, and the end of a text) to "
                f"{LARGEST_VOCAB_SIZE} tokens, got {vocab_size!r}"
            )
        library = optional_package("tokenizers", "the tokenizer bpe")
        learner = library.Tokenizer(library.models.BPE())
        learner.pre_tokenizer = split_and_encode_bytes(PRE_TOKENIZERS[_PRE])
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=list(_BYTES),
            max_token_length=LONGEST_TOKEN + 1,  # it stays below
            show_progress=False,
        )
        learner.train_from_iterator(_in_blocks([text] if isinstance(text, str) else text), trainer)
        merges = [" ".join(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
        if len(merges) + SMALLEST_VOCAB_SIZE < vocab_size:
            raise ValueError(
                f"the text is too short for a vocabulary of {vocab_size} tokens: its pairs that stand there at least twice "
                f"make one of {len(merges) + SMALLEST_VOCAB_SIZE}; ask for at most so many, or give more text"
            )
        return cls(merges)

    def to_json(self):
        """{"kind", "merges"}: all of it."""
        return {"kind": self.kind, "merges": self.metadata["tokenizer.ggml.merges"]}

    @classmethod
    def from_json(cls, data):
        """The inverse of `to_json`. Raises ValueError for anything that it does not write."""
        merges = data.get("merges")
        if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
            raise ValueError("the tokenizer bpe has no list of merges")
        return cls(merges)


def _in_blocks(texts):
    """Texts in blocks that the library counts side by side; a block ends where the words of the whole text are cut too."""
    rule = PRE_TOKENIZERS[_PRE]
    for text in texts:
        check_unicode(text)
        yield from blocks_of(text, re.compile(rule.blocks), re.compile(rule.stretch))
