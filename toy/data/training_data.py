"""What a training run draws its batches from: a source, encoded and split, as windows of a text or rows of examples.

data = TextData(open_source("books/"), tokenizer, context=64, batch=12, val_fraction=0.1, seed=0)
data.training_batch(step=0)   # Batch(token_ids (B, T), labels (B, T)), a function of (seed, step)
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from toy.data.batches import Batch, Rows, Windows, split
from toy.data.encoding import Encoder
from toy.data.records import Completion, Conversation, CorpusError, Document
from toy.data.sources import Source
from toy.data.splitting import Fingerprints, validation_documents, validation_pieces
from toy.data.store import encode_source
from toy.data.tokenizers import Tokenizer

SPLITS = ("spread", "tail")
_NAMED = 3  # places are named of so many examples


class TextData:
    """Training and validation batches of a source.

    source, valid: `Source`s; with `valid`, all of `source` is trained on, otherwise the share `val_fraction` of the documents
    or examples, spread over the source, is kept for validation. train_on: of completions and conversations, "answers" or
    "all". batch: rows of a step, all of its passes together; validation_batch: rows of a validation batch (None: as many).
    n_widths: how many lengths a batch of examples may have, up to
    the context; 1: always the context. progress: as in `encode_source`.
    split: "spread", or "tail" for runs begun before there were documents: all of the text is joined without beginning and end
    tokens, and its last part is for validation.
    Raises CorpusError and ValueError for a source that cannot be trained on, OSError when the cache cannot be written.

    Attributes: family ("text", "examples" or "tokens"), training and validation (`Windows` or `Rows`), n_train_tokens,
    n_validation_tokens, notices (sentences to be told).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        context: int,
        batch: int,
        val_fraction: float = 0.1,
        seed: int = 0,
        valid: Source | None = None,
        train_on: str = "answers",
        split: str = "spread",
        progress: Callable[[int, int], None] | None = None,
        n_widths: int = 1,
        validation_batch: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if not 0.0 < val_fraction < 1.0:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.source, self.valid, self.encoder = source, valid, Encoder(tokenizer)
        self.validation_batch = validation_batch or batch
        self.context, self.batch, self.seed, self.split, self.train_on = context, batch, seed, split, train_on
        self.widths = sorted({-(-context * k // n_widths) for k in range(1, n_widths + 1)})
        encoded = encode_source(source, self.encoder, train_on, split == "tail", progress)
        self.family, self.digest, self.identity = encoded.family, encoded.sha256, encoded.identity
        self.notices = list(encoded.notices)
        if repeated := len(encoded.hashes) - len(np.unique(encoded.hashes)):
            sides = "" if split == "tail" or valid is not None else "; all copies are on one side of the split"
            self.notices.append(
                f"{repeated:,} of {len(encoded.hashes):,} documents or examples repeat an earlier one{sides}"
            )
        if valid is None:
            divided = self._split_rows if self.family == "examples" else self._split_text
            self.training, self.validation = divided(encoded, val_fraction)
            self.valid_digest = None
        else:
            other = encode_source(valid, self.encoder, train_on, split == "tail", progress)
            self.valid_digest = other.sha256
            self.training, self.validation = self._whole(encoded, source), self._whole(other, valid)
            self.notices += [f"validation text: {notice}" for notice in other.notices]
            self._tell_overlap(encoded, other)
        if self.family == "examples":
            padding = self.training.padding(batch, seed)
            self.notices.append(f"{padding:.0%} of the tokens in batches is padding, which is not learned from")

    # -- batches ------------------------------------------------------------------------------------------------------

    def training_batch(self, step: int) -> Batch:
        """The `Batch` of a step, counted from 0: a function of (seed, step)."""
        return self.training.training_batch(self.batch, self.seed, step)

    def validation_batches(self, n: int) -> list[Batch]:
        """List of the same `n` batches at every evaluation."""
        return self.validation.validation_batches(self.validation_batch, n, self.seed)

    def all_validation(self) -> Iterator[Batch]:
        """Yield batches that ask for everything there is to validate, once; rows that are left over have labels -1."""
        return self.validation.all_batches(self.validation_batch)

    @property
    def n_train_tokens(self) -> int:
        return _n_tokens(self.training)

    @property
    def n_validation_tokens(self) -> int:
        return _n_tokens(self.validation)

    @property
    def steps_per_epoch(self):
        """A float: as many steps see as many tokens, or rows, as there are to train on."""
        if self.family == "examples":
            return len(self.training) / self.batch
        return self.n_train_tokens / (self.batch * self.context)

    # -- which text it is ---------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What config.json says about it."""
        valid = None
        if self.valid is not None:
            valid = {"source": self.valid.words, "path": self.valid.path, "sha256": self.valid_digest}
        return {
            "source": self.source.words, "path": self.source.path, "sha256": self.digest, "identity": self.identity,
            "family": self.family, "train_on": self.train_on, "split": self.split, "valid": valid,
            "train_tokens": self.n_train_tokens, "validation_tokens": self.n_validation_tokens,
        }  # fmt: skip

    def check_same(self, described: dict[str, Any]) -> None:
        """described: what `describe` gave when the run began, or what runs before it wrote (source, path, sha256).

        Raises ValueError when the text, or the validation text, is another one by now.
        """
        same = described["sha256"] == self.digest and described.get("identity", self.identity) == self.identity
        if not same:
            raise ValueError(
                f"{self.source.words} is not the text this run was trained on ({described['source']}): "
                "give that text with --corpus, or start a new run"
            )
        before, now = described.get("valid"), self.valid_digest
        if (before and before["sha256"]) != now:
            was = before["source"] if before else "a part of the text"
            found = self.valid.words if self.valid is not None else "a part of the text"
            raise ValueError(
                f"{found} is not what this run was validated on ({was}): give that with --valid, or start a new run"
            )

    def is_training_text(self, digest):
        """Whether a text with this digest (`Source.digest`) is the one that was trained on."""
        return digest == self.digest

    # -- the two sides ------------------------------------------------------------------------------------------------

    def _split_text(self, encoded, fraction):
        """-> (training, validation) `Windows`."""
        n, least = len(encoded.ids), self.context + 1
        if self.split == "tail" or n < 2 * least:  # of too short a text `split` says so
            train = split(range(n), fraction, self.context).train
            return self._windows(encoded, [_segment(0, len(train))]), self._windows(encoded, [_segment(len(train), n)])
        share = fraction
        while share <= max(fraction, 0.5):
            sides = [self._windows(encoded, runs) for runs in _runs(encoded, share, least, self.seed)]
            if all(map(len, sides)):
                return sides
            share *= 2  # too few short documents for one window
        pieces = validation_pieces(n, fraction, least, self.seed)
        return [self._windows(encoded, list(runs)) for runs in (_between(pieces, 0, n), [_segment(*p) for p in pieces])]

    def _windows(self, encoded, runs):
        frame = (None, None) if self.split == "tail" else (self.encoder.begin, self.encoder.end)
        return Windows(encoded.ids, runs, self.context, *frame)

    def _split_rows(self, encoded, fraction):
        """-> (training, validation) `Rows`."""
        usable = self._usable(encoded, self.source)
        chosen, _ = validation_documents(encoded.sizes, encoded.hashes, fraction, self.seed)
        if not (chosen & usable).any() or not (~chosen & usable).any():
            rows = np.flatnonzero(usable)
            one = encoded.hashes == encoded.hashes[rows[self.seed % len(rows)]]
            if one[rows].all():
                raise CorpusError(
                    f"{self.source.words} has only one example to train on, or only equal ones: "
                    "give more, or others to validate on with --valid"
                )
            chosen = one
        return self._rows(encoded, ~chosen & usable), self._rows(encoded, chosen & usable)

    def _rows(self, encoded, mask):
        return Rows(encoded.ids, encoded.asked, encoded.starts, np.flatnonzero(mask), self.widths)

    def _usable(self, encoded, source):
        """Which examples have something to learn within the context, bool (n,). The others are told."""
        lengths = np.diff(encoded.starts) - 1
        usable = (encoded.first > 0) & (encoded.first <= np.minimum(lengths, self.context))
        if not usable.any():
            raise CorpusError(
                f"{source.words} has nothing to learn: no example has an answer within the context of {self.context} tokens"
            )
        if n_cut := int((usable & (lengths > self.context)).sum()):
            self.notices.append(
                f"{n_cut:,} of {len(lengths):,} examples are longer than the context and cut at its end"
            )
        if len(lost := np.flatnonzero(~usable)):
            places = ", ".join(str(encoded.places[i]) for i in lost[:_NAMED]) + (", ..." if len(lost) > _NAMED else "")
            self.notices.append(
                f"{len(lost):,} of {len(lengths):,} examples left out, nothing to learn within the context: {places}"
            )
        return usable

    def _whole(self, encoded, source):
        if encoded.family == "examples":
            return self._rows(encoded, self._usable(encoded, source))
        n = len(encoded.ids)
        if n <= self.context:
            raise ValueError(
                f"{source.words} has {n:,} tokens, but a context of {self.context} needs at least {self.context + 1:,}: "
                "give a longer text or a smaller context"
            )
        return self._windows(encoded, [_segment(0, n)])

    def _tell_overlap(self, encoded, other):
        if self.valid_digest == self.digest:
            self.notices.append("the validation text is the training text: the validation loss tells nothing new")
        elif n := int(np.isin(other.hashes, encoded.hashes).sum()):
            self.notices.append(f"{n:,} of the {len(other.hashes):,} validation documents are trained on, too")


def training_texts(source: Source, context: int, val_fraction: float = 0.1, seed: int = 0) -> Iterator[str]:
    """Yield the texts (str) of the part that `TextData` with these arguments trains on: for making a vocabulary of them.

    For documents and examples it is exactly that part; in a document so long that it is cut, the validation pieces are
    placed by bytes here and by tokens there, and their edges differ a little.
    """
    prints = Fingerprints()
    for record in source.records():
        if isinstance(record, Document):
            if record.begins:
                prints.begin()
            prints.feed(record.text.encode())
        elif isinstance(record, (Completion, Conversation)):
            prints.example(record)
        else:
            raise CorpusError(f"{record.where} has token ids, and a vocabulary is made of text: name its tokenizer")
    prints.finish()
    chosen, long = validation_documents(prints.sizes, prints.hashes, val_fraction, seed)
    number, at = -1, 0
    for record in source.records():
        begins = not isinstance(record, Document) or record.begins
        number, at = number + begins, 0 if begins else at
        if chosen[number]:
            continue
        if isinstance(record, Completion):
            yield record.prompt + record.completion
        elif isinstance(record, Conversation):
            yield from (message["content"] or "" for message in record.messages)
        elif not long[number] or prints.sizes[number] < 2 * (context + 1):
            yield record.text + record.after
        else:
            data, n = record.text.encode(), int(prints.sizes[number])
            for ((begin, end),) in _between(validation_pieces(n, val_fraction, context + 1, seed), 0, n):
                if part := data[max(begin - at, 0) : max(end - at, 0)]:
                    yield part.decode(errors="ignore")
            at += len(data)


def _n_tokens(side):
    return int(side.lengths.sum()) if isinstance(side, Rows) else side.n_tokens


def _segment(begin, end):
    return np.array([[begin, end]], np.int64)


def _between(pieces, begin, end):
    """What the pieces (n, 2) leave of begin .. end, one run for each part."""
    edges = [begin, *pieces.reshape(-1).tolist(), end]
    return [_segment(a, b) for a, b in zip(edges[::2], edges[1::2]) if b > a]


def _runs(encoded, fraction, least, seed):
    """The runs to train on and to validate on. Whole documents are read one after the other; of one that is cut into pieces
    each piece is a run of its own."""
    chosen, long = validation_documents(encoded.sizes, encoded.hashes, fraction, seed)
    training, validation = [_documents(encoded, ~chosen & ~long)], [_documents(encoded, chosen)]
    for i in np.flatnonzero(long):
        begin, end = int(encoded.starts[i]), int(encoded.starts[i + 1])
        if end - begin < 2 * least:
            training.append(_segment(begin, end))
            continue
        pieces = begin + validation_pieces(end - begin, fraction, least, seed)
        training += _between(pieces, begin, end)
        validation += [_segment(*piece) for piece in pieces]
    return training, validation


def _documents(encoded, mask):
    """The segments (n, 2) of these documents; neighbours are one."""
    begins, ends = encoded.starts[:-1][mask], encoded.starts[1:][mask]
    apart = begins[1:] != ends[:-1]
    first, last = np.concatenate([[True], apart]), np.concatenate([apart, [True]])
    return np.stack([begins[first[: len(begins)]], ends[last[: len(ends)]]], axis=1)
