"""Corpora, tokenizers and batches."""

from toy.data.batches import Batch, Split, split, training_batch, validation_batches
from toy.data.corpora import Corpus, CorpusError, load_corpus
from toy.data.open_tokenizer import load_tokenizer, make_tokenizer, tokenizer_from_json
from toy.data.tokenizers import ByteTokenizer, CharTokenizer, UnknownCharacterError

__all__ = [
    "Batch",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "CorpusError",
    "Split",
    "UnknownCharacterError",
    "load_corpus",
    "load_tokenizer",
    "make_tokenizer",
    "split",
    "tokenizer_from_json",
    "training_batch",
    "validation_batches",
]
