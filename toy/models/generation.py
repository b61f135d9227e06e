"""Sampling: one token at a time from a model with a key/value cache."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

Seed = int | Sequence[int]


class GeneratingModel(Protocol):
    """What of a `toy.models.base.LanguageModel` is used here."""

    config: Any

    def new_kv_cache(self) -> Any: ...
    def forward(self, token_ids: np.ndarray, *, kv_cache: Any, last_only: bool) -> tuple[np.ndarray, Any]: ...


def generate(
    model: GeneratingModel,
    prompt_ids: Iterable[int],
    n_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: Seed = 0,
    stop_ids: Iterable[int] = (),
) -> Iterator[int]:
    """Yield `n_tokens` token ids that continue `prompt_ids`, one by one.

    The prompt is read in one batch; every further token costs one row. When the context is full the window moves: the last
    half of it is read again and generation goes on from there (learned positions cannot slide). Of a prompt longer than the
    context its end is read.

    temperature: divides the logits, 0 = always the most likely token. top_k: keep the k most likely. top_p: keep the
    smallest set whose probability reaches p (Holtzman et al. 2020). seed: of the draws. stop_ids: ids that end the text
    early; they are not yielded.
    Raises ValueError for an empty prompt, ids outside the vocabulary, and settings out of range.
    """
    ids = [int(i) for i in prompt_ids]
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    if n_tokens < 0:
        raise ValueError(f"n_tokens must be at least 0, got {n_tokens}")
    check_sampling(temperature, top_k, top_p)
    rng, cache = np.random.default_rng(seed), model.new_kv_cache()
    unread = ids[-model.config.context_length :]
    return _generate(model, ids, cache, unread, n_tokens, temperature, top_k, top_p, rng, frozenset(stop_ids))


def go_on(
    model: GeneratingModel,
    ids: list[int],
    kv_cache: Any,
    n_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: np.random.Generator | None = None,
    stop_ids: Iterable[int] = (),
) -> Iterator[int]:
    """As `generate`, with a key/value cache that has read the first `kv_cache.length` of `ids` (fewer than all of them).

    ids: every token that is yielded is appended to it. Raises ValueError as `generate`, and for ids that do not go beyond the
    cache or do not fit the context.
    """
    check_sampling(temperature, top_k, top_p)
    if not kv_cache.length < len(ids) <= model.config.context_length:
        raise ValueError(
            f"{len(ids)} ids cannot be gone on from: they must be more than the {kv_cache.length} in the cache and at most "
            f"the context of {model.config.context_length}"
        )
    rng = np.random.default_rng() if rng is None else rng
    unread = ids[kv_cache.length :]
    return _generate(model, ids, kv_cache, unread, n_tokens, temperature, top_k, top_p, rng, frozenset(stop_ids))


def _generate(
    model: GeneratingModel,
    ids: list[int],
    cache: Any,
    unread: list[int],
    n_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: np.random.Generator,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    context = model.config.context_length
    for _ in range(n_tokens):
        if cache.length + len(unread) > context:
            cache, unread = model.new_kv_cache(), ids[-max(context // 2, 1) :]
        logits, _ = model.forward(np.array(unread), kv_cache=cache, last_only=True)
        token = sample(logits[-1], rng, temperature, top_k, top_p)
        if token in stop_ids:
            return
        ids.append(token)
        unread = [token]
        yield token


def sample(
    logits: np.ndarray,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """One token id drawn from logits (V,). The settings are those of `generate`."""
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k is not None and top_k < len(logits):
        logits = np.where(logits >= np.partition(logits, -top_k)[-top_k], logits, -np.inf)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    if top_p is not None and top_p < 1:
        # tokens below this are at most 1 - p together, so the others reach p: only these few need sorting
        least = min((1 - top_p) / len(probabilities), probabilities.max())  # min: equal ones, and a p of almost 0
        candidates = np.flatnonzero(probabilities >= least)
        order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
        reached_before = np.cumsum(probabilities[order]) - probabilities[order]
        kept = order[reached_before < top_p]  # the most likely token always stays
        nucleus = np.zeros_like(probabilities)
        nucleus[kept] = probabilities[kept] / probabilities[kept].sum()
        probabilities = nucleus
    return int(rng.choice(len(probabilities), p=probabilities))


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for sampling settings out of range."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a number of at least 0 (0 = greedy), got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
