"""How well a model predicts a text: the log-probability of every token, and what follows from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from toy.data.sources import open_source
from toy.data.tokenizers import Tokenizer
from toy.data.training_data import TextData
from toy.models.base import LanguageModel
from toy.trained.load import text_ids

_ROWS = 2048  # tokens of a batch of windows
_LOGITS = 2**23  # numbers: the logits of a large vocabulary are made so many at a time


@dataclass(frozen=True)
class TextEvaluation:
    """token_ids: the tokens that were predicted, (N,): all of the text but the first. log_probabilities: theirs, natural
    logarithms, (N,) float64. n_bytes: UTF-8 bytes that these tokens stand for. context, stride: of the windows, in tokens."""

    token_ids: np.ndarray
    log_probabilities: np.ndarray
    n_bytes: int
    context: int
    stride: int

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return -float(self.log_probabilities.mean())

    @property
    def perplexity(self) -> float:
        """exp(loss): as uncertain as a choice among so many equally likely tokens."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits for each UTF-8 byte of the text: comparable between tokenizers. NaN for tokens that stand for no text."""
        return -float(self.log_probabilities.sum()) / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def evaluate_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    context: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
) -> TextEvaluation:
    """Let `model` predict `text` -> `TextEvaluation`. Arguments and errors as `TextEvaluator`."""
    evaluator = TextEvaluator(model, tokenizer, text, context, stride, limit)
    for _ in evaluator:
        pass
    return evaluator.result()


class TextEvaluator:
    """A model and a text that it is to predict: iterate over it (it yields the number of tokens done), then `result()`.

    Every token but the first is predicted exactly once. The first window predicts `context` tokens; each further one ends
    `stride` tokens later, predicts these, and reads the `context` tokens before its end, so that every token sees at least
    context - stride earlier ones (the beginning of the text aside). A small stride is slower and gives the lower loss.

    context: None = the model's, at most 512. stride: None = half the context. limit: read only so many tokens, from the
    beginning of the text.
    Raises ValueError for a text of fewer than two tokens, a context beyond the model's, a stride beyond the context; while
    iterating, RuntimeError when the model's numbers are not finite.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        text: str,
        context: int | None = None,
        stride: int | None = None,
        limit: int | None = None,
    ) -> None:
        largest = model.config.context_length
        context = min(largest, 512) if context is None else context
        if not 1 <= context <= largest:
            raise ValueError(f"context must lie between 1 and the model's {largest}, got {context}")
        stride = max(1, context // 2) if stride is None else stride
        if not 1 <= stride <= context:
            raise ValueError(f"stride must lie between 1 and the context of {context}, got {stride}")
        if limit is not None and limit < 2:
            raise ValueError(f"limit must be at least 2, because the first token is not predicted; got {limit}")
        self.ids = text_ids(tokenizer, text)[:limit]
        if len(self.ids) < 2:
            count = "one token" if len(self.ids) else "no tokens"
            raise ValueError(f"the text has {count}: there is nothing to predict, give at least two")
        self.model, self.tokenizer, self.context, self.stride = model, tokenizer, context, stride
        self.log_probabilities = np.full(self.n_tokens, np.nan)

    @property
    def n_tokens(self) -> int:
        """How many tokens are predicted."""
        return len(self.ids) - 1

    def __iter__(self) -> Iterator[int]:
        width = min(self.context, self.n_tokens)
        windows = list(pairwise([0, *window_ends(self.n_tokens, self.context, self.stride)]))
        n_batches = -(-len(windows) // max(1, _ROWS // width))
        for part in np.array_split(np.arange(len(windows)), n_batches):  # batches of almost the same size
            batch = [windows[i] for i in part]
            _predict(self.model, self.ids, batch, width, self.log_probabilities)
            yield batch[-1][1]

    def result(self) -> TextEvaluation:
        """-> `TextEvaluation`."""
        predicted = self.ids[1:]
        n_bytes = sum(len(token_bytes(self.tokenizer, i)) for i in predicted.tolist())
        return TextEvaluation(predicted, self.log_probabilities, n_bytes, self.context, self.stride)


@dataclass(frozen=True)
class ValidationResult:
    """How well a run predicts its own validation part. n_tokens: what was asked for. n_bytes: UTF-8 bytes of these tokens."""

    loss: float
    n_tokens: int
    n_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits for each UTF-8 byte of what was predicted."""
        return self.loss * self.n_tokens / math.log(2) / self.n_bytes if self.n_bytes else math.nan


def evaluate_run(model: LanguageModel, tokenizer: Tokenizer, config: dict[str, Any]) -> ValidationResult:
    """All of the validation part of a run, as it validates while it trains -> `ValidationResult`.

    config: the run's, as `Stored.about` has it. Raises ValueError when its text is gone or another one by now.
    """
    options, described = config["training"], config["corpus"]
    paths = described["path"]
    source = open_source(
        None if paths is None else [Path(path) for path in ([paths] if isinstance(paths, str) else paths)]
    )
    valid = (described.get("valid") or {}).get("path")
    data = TextData(
        source,
        tokenizer,
        context=options["context"],
        batch=options["batch"],
        val_fraction=options["val_fraction"],
        seed=options["seed"],
        valid=None if valid is None else open_source(Path(valid)),
        train_on=options.get("train_on", "answers"),
        split=options.get("split", "tail"),
    )
    data.check_same(described)
    total, n_tokens, n_bytes = 0.0, 0, 0
    for batch in data.all_validation():
        token_ids = np.asarray(batch.token_ids, np.int64)
        positions = np.tile(np.arange(token_ids.shape[1]), len(token_ids))
        x, *_ = model.hidden_rows(token_ids.reshape(-1), positions, len(token_ids), keep_cache=False)
        labels = batch.labels.reshape(-1)
        rows = np.flatnonzero(labels >= 0)
        step = max(1, _LOGITS // model.config.vocab_size)
        for first in range(0, len(rows), step):
            chunk = rows[first : first + step]
            logits, *_ = model.unembed_rows(x[chunk])
            total -= float(log_probability_of(logits, labels[chunk]).sum())
        n_tokens += len(rows)
        n_bytes += sum(len(token_bytes(tokenizer, i)) for i in labels[rows].tolist())
    if not math.isfinite(total):
        raise RuntimeError("the model gives numbers that are not finite: its weights are damaged or too large")
    return ValidationResult(total / n_tokens, n_tokens, n_bytes)


def window_ends(n_predicted: int, context: int, stride: int) -> list[int]:
    """Where each window ends: the first predicts `context` tokens, the others the next `stride`, the last what is left."""
    ends = [min(context, n_predicted)]
    while ends[-1] < n_predicted:
        ends.append(min(ends[-1] + stride, n_predicted))
    return ends


def _predict(
    model: LanguageModel, ids: np.ndarray, windows: list[tuple[int, int]], width: int, result: np.ndarray
) -> None:
    """Fill in result[start:end] for each (start, end) of the windows; all are read as one batch of shape (B, width)."""
    token_ids = np.concatenate([ids[end - width : end] for _, end in windows]).astype(np.int64)  # (B*width,)
    positions = np.tile(np.arange(width), len(windows))
    x, *_ = model.hidden_rows(token_ids, positions, len(windows), keep_cache=False)  # (B*width, D)
    read_to = [(b + 1) * width for b in range(len(windows))]  # the row after each window's last
    rows = np.concatenate([np.arange(to - end + start, to) for to, (start, end) in zip(read_to, windows)])
    targets = np.concatenate([np.arange(start, end) for start, end in windows])  # of these rows, in `result`
    step = max(1, _LOGITS // model.config.vocab_size)
    for first in range(0, len(rows), step):
        chunk, target = rows[first : first + step], targets[first : first + step]
        logits, *_ = model.unembed_rows(x[chunk])  # (n, V)
        result[target] = log_probability_of(logits, ids[target + 1])
    if not np.isfinite(result[targets]).all():
        raise RuntimeError("the model gives numbers that are not finite: its weights are damaged or too large")


def log_probability_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """log softmax(logits)[label]: logits (N, V), labels int (N,) -> (N,) float64."""
    with np.errstate(all="ignore"):  # numbers that are not finite are reported by the caller
        largest = logits.max(axis=1, keepdims=True)
        total = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
        chosen = logits[np.arange(len(labels)), labels].astype(np.float64)
        return chosen - largest[:, 0] - np.log(total)


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The UTF-8 bytes that a token stands for; of a special token none."""
    return tokenizer.token_bytes(token_id)
