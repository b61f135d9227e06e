"""Corpora, tokenizers and batches."""

from toy.data.batches import Batch, Split, split, training_batch, validation_batches
from toy.data.corpora import Corpus, CorpusError, load_corpus
from toy.data.tokenizers import ByteTokenizer, CharTokenizer, UnknownCharacterError, make_tokenizer, tokenizer_from_json

__all__ = [
    "Batch",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "CorpusError",
    "Split",
    "UnknownCharacterError",
    "load_corpus",
    "make_tokenizer",
    "split",
    "tokenizer_from_json",
    "training_batch",
    "validation_batches",
]
