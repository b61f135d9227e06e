"""Sources of text, tokenizers, encoding, and batches."""

from toy.data.batches import Batch, Split, micro_batches, split, training_batch, validation_batches
from toy.data.corpora import Corpus, load_corpus
from toy.data.encoding import Encoder
from toy.data.open_tokenizer import load_tokenizer, make_tokenizer, tokenizer_from_json
from toy.data.records import CorpusError
from toy.data.sources import open_source
from toy.data.tokenizers import ByteTokenizer, CharTokenizer, UnknownCharacterError
from toy.data.training_data import TextData

__all__ = [
    "Batch",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "CorpusError",
    "Encoder",
    "Split",
    "TextData",
    "UnknownCharacterError",
    "load_corpus",
    "load_tokenizer",
    "make_tokenizer",
    "micro_batches",
    "open_source",
    "split",
    "tokenizer_from_json",
    "training_batch",
    "validation_batches",
]
