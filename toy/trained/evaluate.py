"""How well a model predicts a text: the log-probability of every token, and what follows from it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from toy.data.sources import Source, open_source
from toy.data.tokenizers import ANY_TEXT, Tokenizer, UnknownCharacterError
from toy.data.training_data import TextData
from toy.models.base import LanguageModel
from toy.trained.load import text_ids

_ROWS = 2048  # tokens of a batch of windows
LLAMA_PERPLEXITY = "llama-perplexity"
LIKE = (LLAMA_PERPLEXITY,)  # programs whose number can be computed
UNKNOWN = ("error", "skip")  # what is done about characters that the tokenizer does not know
_SHOWN = 5  # of them in a message
_LOGITS = 2**23  # numbers: the logits of a large vocabulary are made so many at a time


@dataclass(frozen=True)
class TextEvaluation:
    """token_ids: the tokens that were predicted, (N,): all of the text but the first, or, like a program, those that it
    counts. log_probabilities: theirs, natural logarithms, (N,) float64. n_bytes: UTF-8 bytes that these tokens stand for.
    context, stride: of the windows, in tokens. n_skipped: characters that were left out of the text."""

    token_ids: np.ndarray
    log_probabilities: np.ndarray
    n_bytes: int
    context: int
    stride: int
    n_skipped: int = 0

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
    def perplexity_error(self) -> float:
        """The standard error of the perplexity, as if the tokens were independent (llama.cpp's +/-). NaN for one token."""
        if self.n_tokens < 2:
            return math.nan
        return self.perplexity * float(self.log_probabilities.std()) / math.sqrt(self.n_tokens - 1)

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
    like: str | None = None,
    unknown: str = "error",
) -> TextEvaluation:
    """Let `model` predict `text` -> `TextEvaluation`. Arguments and errors as `TextEvaluator`."""
    evaluator = TextEvaluator(model, tokenizer, text, context, stride, limit, like, unknown)
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
    like: "llama-perplexity" computes what llama.cpp's program of that name (tools/perplexity) prints for a file with this
    text: windows side by side, the rest that fills none left out, the first token of each window replaced by the beginning
    token where the model wants one, and what stands in the second half of a window, but for its first token, counted. A
    line end at the end of the text is not part of it there.
    unknown: "error", or "skip" to leave out the characters that the tokenizer has no token for; `skipped` has each and how
    often it stood there.
    Raises ValueError for a text of fewer than two tokens (two windows, like llama-perplexity), a context beyond the model's,
    a stride beyond the context or where there is none, UnknownCharacterError for a character without a token; while
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
        like: str | None = None,
        unknown: str = "error",
    ) -> None:
        if like not in (None, *LIKE):
            raise ValueError(f"like must be one of {', '.join(LIKE)}, got {like!r}")
        if unknown not in UNKNOWN:
            raise ValueError(f"unknown must be one of {', '.join(UNKNOWN)}, got {unknown!r}")
        if like is not None and stride is not None:
            raise ValueError(f"{like} has windows side by side: leave out the stride of {stride}")
        largest = model.config.context_length
        context = min(largest, 512) if context is None else context
        if not 1 <= context <= largest:
            raise ValueError(f"context must lie between 1 and the model's {largest}, got {context}")
        if like is not None:
            stride, text = context, text.removesuffix("\n")
        stride = max(1, context // 2) if stride is None else stride
        if not 1 <= stride <= context:
            raise ValueError(f"stride must lie between 1 and the context of {context}, got {stride}")
        if limit is not None and limit < 2:
            raise ValueError(f"limit must be at least 2, because the first token is not predicted; got {limit}")
        self.skipped: dict[str, int] = {}
        if unknown == "skip":
            text, self.skipped = without_unknown(tokenizer, text)
        self.ids = self._ids(tokenizer, text)[:limit]
        if len(self.ids) < 2:
            count = "one token" if len(self.ids) else "no tokens"
            raise ValueError(f"the text has {count}: there is nothing to predict, give at least two")
        self.model, self.tokenizer, self.context, self.stride = model, tokenizer, context, stride
        # (start, end): ids[start + 1 : end + 1] are predicted by a window of `width` ids that ends before ids[end]
        if like is None:
            self._width = min(context, len(self.ids) - 1)
            self._windows = list(pairwise([0, *window_ends(len(self.ids) - 1, context, stride)]))
        else:
            self._width, self._windows = context - 1, self._side_by_side()
        self._log_probabilities = np.full(len(self.ids) - 1, np.nan)  # of ids[1:]

    def _ids(self, tokenizer: Tokenizer, text: str) -> np.ndarray:
        try:
            return text_ids(tokenizer, text)
        except UnknownCharacterError as error:
            if not without_unknown(tokenizer, text)[1]:  # it is another problem
                raise
            advice = f'leave such characters out with --unknown skip (in Python unknown="skip"), or {ANY_TEXT}'
            raise UnknownCharacterError(error.fault, advice) from error

    def _side_by_side(self) -> list[tuple[int, int]]:
        """The windows of llama-perplexity; the beginning token is put where it has it."""
        context, n = self.context, len(self.ids)
        if context < 3:
            raise ValueError(f"like llama-perplexity a context must be at least 3 tokens, got {context}")
        if n < 2 * context:
            raise ValueError(
                f"like llama-perplexity a context of {context} needs a text of at least {2 * context} tokens, this one has "
                f"{n}: give a longer text or a smaller context"
            )
        if self.tokenizer.add_eos:
            raise ValueError("llama-perplexity refuses a model whose tokenizer puts an end token after every text")
        self.ids = self.ids[: n - n % context].copy()
        if self.tokenizer.add_bos:
            self.ids[::context] = self.tokenizer.bos_id
        return [(start + context // 2, start + context - 1) for start in range(0, len(self.ids), context)]

    @property
    def n_tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(end - start for start, end in self._windows)

    def __iter__(self) -> Iterator[int]:
        n_batches, done = -(-len(self._windows) // max(1, _ROWS // self._width)), 0
        for part in np.array_split(np.arange(len(self._windows)), n_batches):  # batches of almost the same size
            batch = [self._windows[i] for i in part]
            _predict(self.model, self.ids, batch, self._width, self._log_probabilities)
            done += sum(end - start for start, end in batch)
            yield done

    def result(self) -> TextEvaluation:
        """-> `TextEvaluation`."""
        rows = np.concatenate([np.arange(start, end) for start, end in self._windows])
        predicted, n_skipped = self.ids[rows + 1], sum(self.skipped.values())
        n_bytes = sum(len(token_bytes(self.tokenizer, i)) for i in predicted.tolist())
        numbers = self._log_probabilities[rows]
        return TextEvaluation(predicted, numbers, n_bytes, self.context, self.stride, n_skipped)


def without_unknown(tokenizer: Tokenizer, text: str) -> tuple[str, dict[str, int]]:
    """The text without the characters that the tokenizer has no token for, and how often each of them stood there."""
    unknown = {}
    for character in sorted(set(text)):
        try:
            tokenizer.encode(character)
        except UnknownCharacterError:
            unknown[character] = text.count(character)
    return text.translate(dict.fromkeys(map(ord, unknown))), unknown


def skipped_in_words(skipped: dict[str, int]) -> str:
    """Which characters were left out, as a sentence."""
    often = sorted(skipped, key=lambda character: -skipped[character])
    shown = ", ".join(
        f"{character!r} (U+{ord(character):04X}) {skipped[character]:,} times" for character in often[:_SHOWN]
    )
    more = f", and {len(often) - _SHOWN} others" if len(often) > _SHOWN else ""
    total = sum(skipped.values())
    return f"{total:,} characters that the model has no token for are left out: {shown}{more}"


def training_text_in_words(config: dict[str, Any], source: Source) -> str | None:
    """A sentence when a run was trained on this text, None otherwise. config: the run's, as `Stored.about` has it."""
    described = config.get("corpus")
    if not isinstance(described, dict) or described.get("sha256") != source.digest():
        return None
    if described.get("valid"):
        return f"the run was trained on all of {source.words}: this says how well it remembers"
    return (
        f"the run was trained on most of {source.words}: without --corpus and other options, toy eval measures the part "
        "that was kept for validation"
    )


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
