"""What a run draws: windows and rows, epochs and micro-batches, and the split into training and validation."""

import hashlib
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_gguf_tokenizer import bpe_metadata

from toy.data import store
from toy.data.batches import Batch, Rows, Windows, micro_batches, split, training_batch, validation_batches
from toy.data.corpora import load_corpus
from toy.data.encoding import Encoder
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.records import CorpusError
from toy.data.sources import open_source
from toy.data.splitting import validation_documents, validation_pieces
from toy.data.tokenizers import ByteTokenizer, CharTokenizer
from toy.data.training_data import TextData, training_texts

BYTES = ByteTokenizer()


def segments(*pairs):
    return np.array(pairs, np.int64).reshape(-1, 2)


def same_batch(a, b):
    assert a.token_ids.dtype == b.token_ids.dtype == a.labels.dtype == np.int32
    assert np.array_equal(a.token_ids, b.token_ids)
    assert np.array_equal(a.labels, b.labels)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_CACHE", str(tmp_path / "cache"))


# ----------------------------------------------------------------------------------------------------------------------
# windows
# ----------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 3), st.integers(0, 50), st.integers(1, 7), st.integers(1, 30))
def test_windows_of_a_text_in_one_piece_are_those_that_runs_always_had(seed, step, batch, context):
    ids = np.random.default_rng(0).integers(0, 90, 300).astype(np.int32)
    windows = Windows(ids, [segments((0, 300))], context)
    same_batch(windows.training_batch(batch, seed, step), training_batch(ids, batch, context, seed, step))
    for ours, before in zip(
        windows.validation_batches(batch, 3, seed), validation_batches(ids, batch, context, 3, seed), strict=True
    ):
        same_batch(ours, before)


def test_the_windows_of_a_seed_and_step_stay_what_they_are():
    """Fixed in numbers: a run of an older version goes on with the same ones."""
    ids = np.arange(10_000, dtype=np.int32)
    batch = Windows(ids, [segments((0, 10_000))], 4).training_batch(3, 7, 11)
    assert (
        batch.token_ids[:, 0].tolist()
        == training_batch(ids, 3, 4, 7, 11).token_ids[:, 0].tolist()
        == [1077, 5062, 8116]
    )


def test_windows_read_over_segments_and_never_from_run_to_run():
    ids = np.arange(100, dtype=np.int32)
    windows = Windows(ids, [segments((0, 5), (20, 23), (40, 50)), segments((60, 66)), segments((70, 73))], 4)
    runs = [[*range(5), *range(20, 23), *range(40, 50)], [*range(60, 66)]]  # the third has no room for a window
    assert windows.n_tokens == 18 + 6 + 3
    assert len(windows) == 14 + 2
    allowed = {tuple(run[i : i + 5]) for run in runs for i in range(len(run) - 4)}
    seen = set()
    for step in range(200):
        token_ids, labels = windows.training_batch(4, 0, step)
        seen |= {(*row.tolist(), int(last)) for row, last in zip(token_ids, labels[:, -1])}
        assert np.array_equal(token_ids[:, 1:], labels[:, :-1])
    assert seen == allowed


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 5))
def test_all_batches_ask_for_every_token_once(lengths, context, batch):
    runs, at = [], 0
    for n in lengths:
        runs.append(segments((at, at + n)))
        at += n
    windows = Windows(np.arange(at, dtype=np.int32), runs, context)
    asked = Counter()
    for token_ids, labels in windows.all_batches(batch):
        assert token_ids.shape == labels.shape == (batch, context)
        asked.update(labels[labels >= 0].tolist())
        assert np.array_equal(labels[labels >= 0], token_ids[labels >= 0] + 1)
    wanted = [i for run in runs if run[0, 1] - run[0, 0] > context for i in range(run[0, 0] + 1, run[0, 1])]
    assert asked == Counter(wanted)


def test_nobody_is_to_say_a_beginning_after_an_end():
    ids = np.array([1, 5, 2, 1, 6, 7, 2, 1, 8, 2], np.int32)
    batch = next(Windows(ids, [segments((0, 10))], 9, begin=1, end=2).all_batches(1))
    assert batch.labels.tolist() == [[5, 2, -1, 6, 7, 2, -1, 8, 2]]
    batch = next(Windows(ids, [segments((0, 10))], 9, begin=None, end=2).all_batches(1))
    assert batch.labels.tolist() == [[5, 2, 1, 6, 7, 2, 1, 8, 2]]


# ----------------------------------------------------------------------------------------------------------------------
# rows
# ----------------------------------------------------------------------------------------------------------------------


def examples(lengths, asked_from=1):
    """ids that tell their example: 100 * i + position."""
    ids = np.concatenate([100 * i + np.arange(n) for i, n in enumerate(lengths)]).astype(np.int32)
    asked = np.concatenate([np.arange(n) >= asked_from for n in lengths]).astype(np.uint8)
    return ids, asked, np.concatenate([[0], np.cumsum(lengths)])


def test_rows_hold_one_example_each():
    ids, asked, starts = examples([4, 9, 6], asked_from=2)
    rows = Rows(ids, asked, starts, np.array([0, 1, 2]), [5])
    batch = rows._batch(np.array([0, 1, 2]), 4)
    assert batch.token_ids.tolist() == [[0, 1, 2, 0, 0], [100, 101, 102, 103, 104], [200, 201, 202, 203, 204], [0] * 5]
    assert batch.labels.tolist() == [[-1, 2, 3, -1, -1], [-1, 102, 103, 104, 105], [-1, 202, 203, 204, 205], [-1] * 5]


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2))
def test_an_epoch_sees_every_row_once(n, batch, seed):
    rows = Rows(*examples(np.random.default_rng(n).integers(2, 50, n)), np.arange(n), [64])
    n_steps = 3 * n  # three epochs and more, whatever the batch
    stream = np.concatenate([rows.rows_of_step(batch, seed, step) for step in range(n_steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
    for step in (0, n_steps // 2, n_steps - 1):  # no state: any step comes first
        fresh = Rows(*examples(np.random.default_rng(n).integers(2, 50, n)), np.arange(n), [64])
        assert np.array_equal(fresh.rows_of_step(batch, seed, step), stream[step * batch : (step + 1) * batch])


def test_epochs_and_seeds_have_orders_of_their_own():
    rows = Rows(*examples([5] * 100), np.arange(100), [8])
    orders = {rows._order(5, seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    first = rows._order(5, 0, 0)
    assert abs(np.corrcoef(first, np.arange(100))[0, 1]) < 0.4


def test_rows_of_like_length_stand_together_and_padding_is_small():
    lengths = np.random.default_rng(0).geometric(0.01, 4000) + 2
    data = examples(np.minimum(lengths, 600))
    fitting = Rows(*data, np.arange(4000), range(16, 513, 16))
    assert fitting.padding(16, 0) < 0.12
    alone = Rows(*data, np.arange(4000), [512])
    assert alone.padding(16, 0) > 0.7
    widths = [fitting.training_batch(16, 0, step).token_ids.shape[1] for step in range(250)]
    assert len(set(widths)) > 8
    assert abs(np.corrcoef(widths, np.arange(250))[0, 1]) < 0.25  # long ones do not come last
    wanted = 1 - np.minimum(np.minimum(lengths, 600) - 1, 512).sum() / sum(16 * width for width in widths)
    assert fitting.padding(16, 0) == pytest.approx(wanted)
    odd = Rows(*data, np.arange(3989), range(16, 513, 16))  # epochs begin within a batch
    rows = [odd.rows_of_step(16, 0, step) for step in range(1000)]
    assert 1 - sum(odd.lengths[row].sum() for row in rows) / sum(16 * odd._width(row) for row in rows) < 0.12


def test_micro_batches_are_the_rows_of_the_step():
    ids = np.arange(1000, dtype=np.int32)
    whole = training_batch(ids, 12, 8, 0, 3)
    parts = micro_batches(whole, 4)
    assert [part.token_ids.shape for part in parts] == [(3, 8)] * 4
    same_batch(Batch(*(np.concatenate(arrays) for arrays in zip(*parts))), whole)
    assert micro_batches(whole, 1)[0].labels.shape == (12, 8)
    for n in (0, 5, -1):
        with pytest.raises(ValueError, match="12 rows cannot be cut"):
            micro_batches(whole, n)


# ----------------------------------------------------------------------------------------------------------------------
# the split
# ----------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 400), min_size=2, max_size=200), st.floats(0.02, 0.5), st.integers(0, 5))
def test_documents_are_on_one_side_and_equal_ones_together(sizes, fraction, seed):
    sizes = np.array(sizes)
    hashes = np.random.default_rng(seed).integers(0, max(2, len(sizes)), len(sizes)).astype(np.uint64)
    sizes = sizes[np.unique(hashes, return_inverse=True)[1] % len(sizes)]  # equal ones are of one size
    chosen, long = validation_documents(sizes, hashes, fraction, seed)
    assert not (chosen & long).any()
    assert set(hashes[chosen]).isdisjoint(hashes[~chosen & ~long])
    again, _ = validation_documents(sizes, hashes, fraction, seed)
    assert np.array_equal(chosen, again)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.3])
def test_the_share_is_right_and_spread_over_the_text(fraction):
    sizes = np.random.default_rng(0).geometric(0.002, 3000)
    shares, first_tenths, means = [], [], []
    for seed in range(20):
        chosen, long = validation_documents(sizes, np.arange(3000).astype(np.uint64), fraction, seed)
        assert not long.any()
        shares.append(sizes[chosen].sum() / sizes.sum())
        first_tenths.append([chosen[i : i + 300].sum() for i in range(0, 3000, 300)])
        means.append(sizes[chosen].mean())
    assert np.allclose(shares, fraction, rtol=0.15)
    assert (np.array(first_tenths) > 0).all()
    assert abs(np.mean(means) / sizes.mean() - 1) < 0.1  # neither short ones nor long ones are preferred
    assert len({tuple(tenth) for tenth in first_tenths}) > 10  # the seed chooses


@given(st.integers(2, 200_000), st.floats(0.01, 0.9), st.integers(1, 300), st.integers(0, 3))
def test_pieces_of_a_long_document(n, fraction, least, seed):
    if n < 2 * least:
        return
    pieces = validation_pieces(n, fraction, least, seed)
    assert (pieces[:, 1] - pieces[:, 0] >= least).all()
    assert (pieces[1:, 0] >= pieces[:-1, 1]).all()
    assert pieces[0, 0] >= 0
    assert pieces[-1, 1] <= n
    total = (pieces[:, 1] - pieces[:, 0]).sum()
    assert total <= max(n * fraction + 1, least)
    assert total >= min(n * fraction, n - least) - len(pieces) - 1
    between = np.diff([0, *pieces.reshape(-1), n])[::2]
    assert between.max() >= least  # there is something left to train on


def texts_of(data, side):
    """The texts of the runs of one side of a TextData of bytes."""
    return [BYTES.decode(side.ids[run.places(np.arange(run.n))]) for run in side.runs]


def test_one_long_document_is_validated_in_pieces_spread_over_it():
    text = "".join(f"{i:05d}\n" for i in range(5000))  # 30,000 bytes
    data = TextData(open_source(text), BYTES, context=16, batch=4)
    pieces, rest = texts_of(data, data.validation), texts_of(data, data.training)
    assert len(pieces) == 10
    assert data.n_validation_tokens == sum(map(len, pieces)) == 3000
    assert data.n_train_tokens == 27_000
    assert all(piece in text for piece in (*pieces, *rest))
    starts = [text.index(piece) for piece in pieces]
    assert [start // 3000 for start in starts] == list(range(10))  # one in each tenth
    numbers = {int(number) for piece in rest for number in piece.split("\n")[1:-1]}
    assert numbers.isdisjoint(int(number) for piece in pieces for number in piece.split("\n")[1:-1])


def test_documents_are_validated_whole_and_copies_are_told():
    texts = [f"document {i % 90}: " + "abc " * (i % 90) + "\n" for i in range(100)]
    data = TextData(open_source([{"text": text} for text in texts]), BYTES, context=16, batch=4)
    (validation,), (training,) = texts_of(data, data.validation), texts_of(data, data.training)
    kept = [line + "\n" for line in validation.splitlines()]
    assert 4 < len(kept) < 20
    assert sorted([*kept, *(line + "\n" for line in training.splitlines())]) == sorted(texts)
    assert set(kept).isdisjoint(line + "\n" for line in training.splitlines())
    assert (
        "10 of 100 documents or examples repeat an earlier one; all copies are on one side of the split" in data.notices
    )


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 40), st.floats(0.01, 0.6))
def test_any_corpus_that_is_long_enough_has_a_window_on_each_side(sizes, context, fraction):
    source = open_source([{"text": chr(97 + i % 26) * (n - 1) + "\n"} for i, n in enumerate(sizes)])
    n = sum(sizes)
    if n < 2 * (context + 1):
        with pytest.raises(ValueError, match=f"{n:,} tokens"):
            TextData(source, BYTES, context, 2, fraction)
        return
    data = TextData(source, BYTES, context, 2, fraction)
    assert data.n_train_tokens + data.n_validation_tokens == n
    assert data.training_batch(0).token_ids.shape == (2, context)
    assert len(data.validation_batches(2)) == 2


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(1, 40))
def test_the_tail_is_the_split_that_runs_had_before(n, fraction, context):
    text = "".join(chr(97 + i % 20) for i in range(n - 1)) + "\n"
    if n < 2 * (context + 1):
        return
    sides = split(BYTES.encode(text), fraction, context)
    data = TextData(open_source(text), BYTES, context, 3, fraction, seed=5, split="tail")
    assert (data.n_train_tokens, data.n_validation_tokens) == tuple(map(len, sides))
    same_batch(data.training_batch(8), training_batch(sides.train, 3, context, 5, 8))
    same_batch(data.validation_batches(2)[1], validation_batches(sides.validation, 3, context, 2, 5)[1])


def test_an_old_run_of_the_documentation_draws_what_it_drew():
    text = load_corpus().text
    for tokenizer in (
        BYTES,
        CharTokenizer.from_text(text),
        GGUFTokenizer(bpe_metadata(**{"tokenizer.ggml.add_bos_token": True})),
    ):
        sides = split(tokenizer.encode(text), 0.1, 64)
        data = TextData(open_source(), tokenizer, 64, 12, 0.1, 3, split="tail")
        for step in (0, 999):
            same_batch(data.training_batch(step), training_batch(sides.train, 12, 64, 3, step))
        for ours, before in zip(
            data.validation_batches(16), validation_batches(sides.validation, 12, 64, 16, 3), strict=True
        ):
            same_batch(ours, before)
    data.check_same({"sha256": hashlib.sha256(text.encode()).hexdigest(), "source": "as it was"})


@pytest.mark.parametrize("split", ["spread", "tail"])
def test_batches_from_the_disk_are_those_from_memory(tmp_path, monkeypatch, split):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"hello {i} " * (i % 40)}) + "\n" for i in range(600)))
    tokenizer = GGUFTokenizer(bpe_metadata())
    in_memory = TextData(open_source(path), tokenizer, 32, 6, split=split)
    monkeypatch.setattr(store, "IN_MEMORY", 0)
    on_disk = TextData(open_source(path), tokenizer, 32, 6, split=split)
    assert (tmp_path / "cache").exists()
    for step in range(5):
        same_batch(in_memory.training_batch(step), on_disk.training_batch(step))
    for a, b in zip(in_memory.all_validation(), on_disk.all_validation(), strict=True):
        same_batch(a, b)
    assert in_memory.describe() == on_disk.describe()


# ----------------------------------------------------------------------------------------------------------------------
# examples
# ----------------------------------------------------------------------------------------------------------------------


def pairs(n, length=lambda i: i % 17):
    return [{"prompt": f"{i}: ", "completion": f"{i} " * (1 + length(i))} for i in range(n)]


def rows_of(batch):
    """(prompt and completion, completion) of each row."""
    rows = []
    for ids, labels in zip(*batch):
        if (labels >= 0).any():
            said = labels[labels >= 0]
            rows.append((bytes(ids.tolist()).rstrip(b"\0") + bytes([said[-1]]), bytes(said.tolist())))
    return rows


def test_examples_are_trained_on_once_an_epoch():
    data = TextData(open_source(pairs(100)), BYTES, context=128, batch=6, val_fraction=0.2)
    n = len(data.training)
    assert n + len(data.validation) == 100
    assert 10 < len(data.validation) < 30
    assert data.steps_per_epoch == n / 6
    seen = Counter(row for step in range(n) for row in rows_of(data.training_batch(step)))
    assert set(seen.values()) == {6}  # n steps of 6 rows are 6 epochs
    validated = [row for batch in data.all_validation() for row in rows_of(batch)]
    assert len(validated) == len(set(validated)) == len(data.validation)
    assert set(validated).isdisjoint(seen)
    written = {(f"{p['prompt']}{p['completion']}".encode(), p["completion"].encode()) for p in pairs(100)}
    assert {*seen, *validated} == written
    assert data.n_train_tokens == sum(len(whole) - 1 for whole, _ in seen)


def test_long_examples_are_cut_and_counted_and_hopeless_ones_named(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        *pairs(20),
        {"prompt": "x" * 40, "completion": "y"},
        {"prompt": "z", "completion": "w" * 80},
        {"prompt": "q", "completion": ""},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = TextData(open_source(path), BYTES, context=32, batch=4)
    notices = " | ".join(data.notices)
    assert f"2 of 23 examples left out, nothing to learn within the context: {path} line 21, {path} line 23" in notices
    cut = sum(len(p["prompt"] + p["completion"]) - 1 > 32 for p in pairs(20)) + 1
    assert f"{cut} of 23 examples are longer than the context" in notices
    assert len(data.training) + len(data.validation) == 21
    with pytest.raises(CorpusError, match="nothing to learn: no example has an answer within the context of 2 tokens"):
        TextData(open_source([{"prompt": "long", "completion": "x"}] * 3), BYTES, 2, 1)


def test_conversations_end_to_end():
    tokenizer = GGUFTokenizer(bpe_metadata())
    chats = [
        {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": f"he {i}"}] * 2}
        for i in range(30)
    ]
    data = TextData(open_source(chats), tokenizer, context=128, batch=5, n_widths=8)
    encoder = Encoder(tokenizer)
    wanted = {tuple(encoder.conversation(chat["messages"]).labels) for chat in chats}
    found = set()
    for batch in [*(data.training_batch(step) for step in range(10)), *data.all_validation()]:
        assert batch.token_ids.shape[1] in data.widths
        for ids, labels in zip(*batch):
            n = len(ids) - int((ids[::-1] == 0).argmin())
            if (labels >= 0).any():
                found.add((*labels[:n].tolist(), -1))
    assert found == {(*labels[: len(labels)],) for labels in wanted}
    assert any("is padding" in notice for notice in data.notices)
    everything = TextData(open_source(chats), tokenizer, context=128, batch=5, train_on="all")
    assert (everything.training_batch(0).labels >= 0).sum() > 2 * (data.training_batch(0).labels >= 0).sum()


def test_accumulated_rows_are_those_of_the_large_batch():
    data = TextData(open_source(pairs(100)), BYTES, context=64, batch=12)
    for step in range(3):
        parts = micro_batches(data.training_batch(step), 3)
        assert all((part.labels >= 0).any(axis=1).all() for part in parts)
        assert sorted(row for part in parts for row in rows_of(part)) == sorted(rows_of(data.training_batch(step)))


def test_few_or_equal_examples():
    data = TextData(open_source(pairs(2)), BYTES, 64, 1)
    assert (len(data.training), len(data.validation)) == (1, 1)
    with pytest.raises(CorpusError, match=r"only one example.*--valid"):
        TextData(open_source(pairs(1)), BYTES, 64, 1)
    with pytest.raises(CorpusError, match="only equal ones"):
        TextData(open_source(pairs(1) * 5), BYTES, 64, 1)
    data = TextData(open_source([*(pairs(1) * 5), *pairs(2)[1:]]), BYTES, 64, 2)
    assert {len(data.training), len(data.validation)} == {5, 1}


# ----------------------------------------------------------------------------------------------------------------------
# a text to validate on, and which text it was
# ----------------------------------------------------------------------------------------------------------------------


def test_a_validation_text_leaves_all_of_the_other_to_train_on():
    text, other = "abc def\n" * 100, "xyz uvw\n" * 50
    data = TextData(open_source(text), BYTES, 16, 4, valid=open_source(other))
    assert (data.n_train_tokens, data.n_validation_tokens) == (800, 400)
    assert texts_of(data, data.validation) == [other]
    assert not any("valid" in notice for notice in data.notices)
    same = TextData(open_source(text), BYTES, 16, 4, valid=open_source(text))
    assert any("is the training text" in notice for notice in same.notices)
    some = TextData(open_source(pairs(20)), BYTES, 64, 4, valid=open_source([*pairs(2), *pairs(30)[25:]]))
    assert "2 of the 7 validation documents are trained on, too" in some.notices
    with pytest.raises(
        ValueError, match=r"a text given in Python has 10 tokens, but a context of 16 needs at least 17"
    ):
        TextData(open_source(text), BYTES, 16, 4, valid=open_source("too short\n"))
    with pytest.raises(ValueError, match="c"):
        TextData(open_source("abab\n" * 99), CharTokenizer("ab\n"), 4, 4, valid=open_source("abc\n" * 9))


def test_a_run_knows_its_text_again(tmp_path):
    path, moved = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("abc def\n" * 100)
    moved.write_text("abc def\n" * 100)
    data = TextData(open_source(path), BYTES, 16, 4)
    described = json.loads(json.dumps(data.describe()))
    assert described["path"] == str(path)
    assert described["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (described["split"], described["valid"], described["train_tokens"]) == ("spread", None, data.n_train_tokens)
    assert data.is_training_text(open_source(moved).digest())
    assert not data.is_training_text(open_source().digest())
    TextData(open_source(moved), BYTES, 16, 4).check_same(described)
    moved.write_text("abc DEF\n" * 100)
    with pytest.raises(
        ValueError, match=r"b\.txt is not the text this run was trained on \(file .*a\.txt\): give that text"
    ):
        TextData(open_source(moved), BYTES, 16, 4).check_same(described)
    valid = TextData(open_source(path), BYTES, 16, 4, valid=open_source(moved))
    with pytest.raises(ValueError, match=r"b\.txt is not what this run was validated on \(a part of the text\)"):
        valid.check_same(described)
    with pytest.raises(ValueError, match=r"a part of the text is not what this run was validated on \(file .*b\.txt\)"):
        data.check_same(valid.describe())
    old = {"sha256": described["sha256"], "source": "x", "path": str(path), "train_tokens": 1, "validation_tokens": 1}
    data.check_same(old)


def test_documents_that_end_elsewhere_are_another_text(tmp_path):
    for name, texts in (("one", ["a\nb\n" * 20]), ("two", ["a\n", "b\n" + "a\nb\n" * 19])):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(text)
    one, two = (TextData(open_source(tmp_path / name), BYTES, 4, 1) for name in ("one", "two"))
    assert one.digest == two.digest
    with pytest.raises(ValueError, match="not the text"):
        two.check_same(one.describe())


@pytest.mark.parametrize(
    "options", [{"split": "head"}, {"val_fraction": 0.0}, {"val_fraction": float("nan")}, {"train_on": "some"}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TextData(open_source(pairs(9)), BYTES, 16, 4, **options)


def test_ids_are_a_text_of_one_piece():
    ids = np.random.default_rng(0).integers(0, 256, 5000)
    data = TextData(open_source(ids), BYTES, 16, 4)
    assert data.family == "tokens"
    assert data.n_train_tokens + data.n_validation_tokens == 5000
    assert len(data.validation.runs) > 1


@pytest.mark.parametrize("name", ["documents", "examples", "long"])
def test_a_vocabulary_can_be_made_of_the_training_part_alone(name):
    if name == "documents":
        source = open_source([{"text": f"document {i}: " + "word " * (i % 50) + "\n"} for i in range(200)])
    elif name == "examples":
        source = open_source(pairs(200))
    else:
        source = open_source("".join(f"{i:05d}\n" for i in range(5000)))
    data = TextData(source, BYTES, context=128, batch=4, seed=1)
    made_of = "".join(training_texts(source, 128, seed=1))
    if name == "examples":
        rows = {row for step in range(len(data.training)) for row in rows_of(data.training_batch(step))}
        assert sorted(made_of) == sorted("".join(whole.decode() for whole, _ in rows))
    else:
        assert made_of == "".join(texts_of(data, data.training))
    with pytest.raises(CorpusError, match="name its tokenizer"):
        list(training_texts(open_source([1, 2, 3]), 4))
