"""Corpora, tokenizers, the split and the batches."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toy.data import (
    ByteTokenizer,
    CharTokenizer,
    CorpusError,
    UnknownCharacterError,
    load_corpus,
    make_tokenizer,
    split,
    tokenizer_from_json,
    training_batch,
    validation_batches,
)

TEXTS = st.text(min_size=1, max_size=60)  # hypothesis leaves out surrogates: what a UTF-8 file can hold

# ----------------------------------------------------------------------------------------------------------------------
# corpora
# ----------------------------------------------------------------------------------------------------------------------


def test_the_default_corpus_is_long_english_text_and_always_the_same():
    corpus = load_corpus()
    assert len(corpus.text) > 300_000
    assert 60 < len(set(corpus.text)) < 300
    assert " the " in corpus.text
    assert corpus.path is None
    assert load_corpus().sha256 == corpus.sha256


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("zwei\r\nÄpfel\n".encode())
    corpus = load_corpus(path)
    assert corpus.text == "zwei\r\nÄpfel\n"
    assert corpus.path == str(path.resolve())


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert load_corpus(tmp_path / "text.txt").text == "hello"


def test_a_folder_is_read_in_sorted_order_with_subfolders_and_without_hidden_files(tmp_path):
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "deep.md").write_text("third\n")
    (tmp_path / ".hidden").write_text("never")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("never")
    corpus = load_corpus(tmp_path)
    assert corpus.text == "first\nsecond\nthird\n"
    assert corpus.n_files == 4


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(CorpusError, match=r"nowhere\.txt.*does not exist"):
        load_corpus(tmp_path / "nowhere.txt")


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(CorpusError, match=r"text\.txt.*is empty"):
        load_corpus(tmp_path / "text.txt")
    with pytest.raises(CorpusError, match="only empty files"):
        load_corpus(tmp_path)
    (tmp_path / "text.txt").unlink()
    with pytest.raises(CorpusError, match="has no files"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
def test_text_that_is_not_utf8_is_refused_with_the_offset(tmp_path, start):
    data = start + b"abc\xffdef"
    (tmp_path / "latin1.txt").write_bytes(data)
    for path in (tmp_path, tmp_path / "latin1.txt"):
        with pytest.raises(CorpusError, match=rf"latin1\.txt.*not UTF-8.*0xff at offset {data.index(0xFF)} "):
            load_corpus(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="neither a regular file nor a folder"):
        load_corpus(tmp_path / "pipe")


def test_a_path_with_a_nul_is_refused():
    with pytest.raises(CorpusError):
        load_corpus("a\0b")


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers
# ----------------------------------------------------------------------------------------------------------------------


@given(TEXTS)
def test_tokenizers_give_the_text_back(text):
    for kind in ("char", "bytes"):
        tokenizer = make_tokenizer(kind, text)
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.stream(ids)) == text
        same = tokenizer_from_json(tokenizer.to_json())
        assert np.array_equal(same.encode(text), ids)


def test_the_character_vocabulary_is_sorted_and_one_id_is_one_character():
    tokenizer = CharTokenizer.from_text("banana 😀")
    assert tokenizer.characters == " abn😀"
    assert tokenizer.encode("nab😀").tolist() == [3, 1, 2, 4]


def test_a_vocabulary_in_another_order_keeps_its_ids():
    tokenizer = CharTokenizer("zxa")
    assert tokenizer.encode("axz").tolist() == [2, 1, 0]


def test_an_unknown_character_is_named_with_its_offset():
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(UnknownCharacterError, match=r"the prompt has the character 'é' \(U\+00E9\) at offset 2"):
        tokenizer.encode("abéd", what="prompt")
    with pytest.raises(UnknownCharacterError):  # above the largest code point, too
        tokenizer.encode("\U0010ffff")


def test_bytes_take_any_text_and_stream_whole_characters():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a€")
    assert ids.tolist() == [0x61, 0xE2, 0x82, 0xAC]
    assert list(tokenizer.stream(ids)) == ["a", "€"]
    assert tokenizer.decode([0xE2, 0x61]) == "\N{REPLACEMENT CHARACTER}a"
    assert "".join(tokenizer.stream([0x61, 0xE2])) == "a\N{REPLACEMENT CHARACTER}"


def test_a_lone_surrogate_in_a_prompt_is_an_error_and_no_crash():
    with pytest.raises(UnknownCharacterError):
        ByteTokenizer().encode("a\udcff")
    with pytest.raises(UnknownCharacterError):
        CharTokenizer("ab").encode("a\udcff")


@pytest.mark.parametrize("data", [None, {}, {"kind": "bpe"}, {"kind": "char"}, {"kind": "char", "characters": "aa"}])
def test_a_wrong_tokenizer_record_is_refused(data):
    with pytest.raises(ValueError, match="tokenizer"):
        tokenizer_from_json(data)


# ----------------------------------------------------------------------------------------------------------------------
# split and batches
# ----------------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 200), st.floats(0.001, 0.999), st.integers(1, 99))
def test_the_split_cuts_the_text_in_two_and_leaves_a_window_on_each_side(n_tokens, val_fraction, context):
    ids = np.arange(n_tokens, dtype=np.int32)
    if n_tokens < 2 * (context + 1):
        with pytest.raises(ValueError, match=f"{n_tokens} tokens"):
            split(ids, val_fraction, context)
        return
    train, validation = split(ids, val_fraction, context)
    assert np.array_equal(np.concatenate([train, validation]), ids)
    assert min(len(train), len(validation)) >= context + 1
    assert abs(len(validation) - n_tokens * val_fraction) <= max(1, context + 1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_validation_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(ValueError, match="val_fraction"):
        split(np.arange(100), fraction, 4)


def test_labels_are_the_next_ids():
    ids = np.random.default_rng(0).integers(0, 50, 300).astype(np.int32)
    for token_ids, labels in (training_batch(ids, 5, 7, 0, 0), *validation_batches(ids, 5, 7, 3, 0)):
        assert token_ids.shape == labels.shape == (5, 7)
        assert np.array_equal(token_ids[:, 1:], labels[:, :-1])
    counting = np.arange(300, dtype=np.int32)
    batch = training_batch(counting, 5, 7, 0, 0)
    assert np.array_equal(batch.labels, batch.token_ids + 1)


def test_a_batch_is_a_function_of_seed_and_step():
    ids = np.arange(10_000, dtype=np.int32)
    drawn = {(seed, step): training_batch(ids, 4, 8, seed, step).token_ids for seed in range(3) for step in range(20)}
    assert np.array_equal(training_batch(ids, 4, 8, 1, 7).token_ids, drawn[1, 7])
    assert len({array.tobytes() for array in drawn.values()}) == len(drawn)


def test_every_window_is_drawn_and_none_leaves_the_text():
    ids = np.arange(12, dtype=np.int32)  # windows of 4 + 1: starts 0 .. 7
    starts = {int(row[0]) for step in range(100) for row in training_batch(ids, 4, 4, 0, step).token_ids}
    assert starts == set(range(8))


def test_a_text_of_one_window_gives_that_window():
    ids = np.arange(5, dtype=np.int32)
    assert training_batch(ids, 2, 4, 0, 0).labels.tolist() == [[1, 2, 3, 4]] * 2
    assert validation_batches(ids, 2, 4, 2, 0)[1].labels.tolist() == [[1, 2, 3, 4]] * 2


def test_validation_batches_are_fixed_by_the_seed_and_do_not_repeat_a_window():
    ids = np.arange(1000, dtype=np.int32)
    batches = validation_batches(ids, 8, 16, 4, seed=3)
    again = validation_batches(ids, 8, 16, 4, seed=3)
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(batches, again))
    starts = [int(row[0]) for batch in batches for row in batch.token_ids]
    assert len(set(starts)) == len(starts) == 32
    other = validation_batches(ids, 8, 16, 4, seed=4)
    assert not np.array_equal(batches[0].token_ids, other[0].token_ids)
    assert not np.array_equal(batches[0].token_ids, training_batch(ids, 8, 16, 3, 0).token_ids)
