"""Inside a language model on its way through a prompt: the numbers behind the page of `toy look`, and the page.

`look_inside` runs the model once and computes what there is to see; `page` writes that into `look.htm`, a template whose
script draws it. Letters in the shapes: T tokens, L blocks, H heads of a block, V = vocab_size, D = d_model.
"""

import base64
import copy
import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from toy.data.tokenizers import Tokenizer
from toy.models.base import LanguageModel
from toy.models.lens import embed
from toy.switch import ops_for

N_LIKELIEST = 8  # tokens of a layer and a position in the logit lens
N_FOLLOWED = 24  # tokens of a position whose probability is known in every layer
N_NEXT = 50  # tokens of a position whose logits are kept
TEMPERATURES = tuple(round(0.05 * i, 2) for i in range(1, 41))  # the places of the slider, but for 0
N_NEAREST = 6  # neighbours of a token in the map
N_FREQUENT = 40  # tokens of the map that are there for orientation
WHOLE_VOCABULARY = 512  # no larger a vocabulary is in the map as a whole
MOST_TOKENS = 128  # on a page; and
MOST_WEIGHTS = 2_000_000  # of attention, a byte each, a third more when written as text
MOST_BYTES = 5_000_000  # of a page
_EMBEDDING_ROWS = 4096  # compared at a time


class MapPoint(NamedTuple):
    """A token in the map. kind: "prompt", "next" (likely after the prompt), "nearest" (a neighbour of a token of the prompt),
    "frequent", or "other" (the rest of a small vocabulary)."""

    token_id: int
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Inside:
    """What `look_inside` found.

    ids: (T,). attention: (L, H, T, T), the weight that query t gives to key u; rows sum to 1.
    likeliest: (L+1, T, N_LIKELIEST) token ids, and likeliest_probabilities: what the head says of the residual stream as it
    comes out of the embedding and of each block (nostalgebraist 2020, "interpreting GPT: the logit lens").
    followed: (T, at most N_FOLLOWED) token ids, and followed_probabilities (T, the same, L+1): single tokens over the layers.
    next_ids: (T, at most N_NEXT), the likeliest at the end, next_logits, and rest: (T, len(TEMPERATURES)), the logarithm of
    the sum of exp(logit / temperature) over all others, -inf where there are none.
    points: of the map, the two main axes of the embedding rows in it; shares: the part of their variance on each.
    nearest: dict of each token id of the prompt to (token id, cosine) of its neighbours.
    """

    ids: np.ndarray
    attention: np.ndarray
    likeliest: np.ndarray
    likeliest_probabilities: np.ndarray
    followed: np.ndarray
    followed_probabilities: np.ndarray
    next_ids: np.ndarray
    next_logits: np.ndarray
    rest: np.ndarray
    points: list[MapPoint]
    shares: tuple[float, float]
    nearest: dict[int, list[tuple[int, float]]]


def look_inside(model: LanguageModel, tokenizer: Tokenizer, token_ids: npt.ArrayLike) -> Inside:
    """What `model` computes for token_ids, int (T,) -> `Inside`.

    Raises ValueError as `check_prompt`, and for ids outside the vocabulary; RuntimeError when the model's numbers are not
    finite.
    """
    ids = check_prompt(model, token_ids)
    attention, states = _watched(model, ids)
    likeliest, followed, after = _lens(model, ids, states)
    points, shares, nearest = _map(model, tokenizer, ids, after[0][-1])
    return Inside(ids, attention, *likeliest, *followed, *after, points, shares, nearest)


def check_prompt(model: LanguageModel, token_ids: npt.ArrayLike) -> np.ndarray:
    """token_ids as an array (T,). Raises ValueError for none, and for more than fit the context or the page."""
    ids, config = np.asarray(token_ids), model.config
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"the prompt must be one sequence of a token or more, got {ids.shape}")
    most = most_tokens(config.n_layers, config.n_heads)
    if len(ids) > config.context_length:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and the model's context is {config.context_length}: shorten it"
        )
    if len(ids) > most:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and the page shows at most {most} of a model with {config.n_layers} layers "
            f"of {config.n_heads} heads: shorten it"
        )
    return ids


def most_tokens(n_layers: int, n_heads: int) -> int:
    """The longest prompt of a page: a head has T (T + 1) / 2 weights."""
    return min(MOST_TOKENS, (math.isqrt(1 + 8 * (MOST_WEIGHTS // (n_layers * n_heads))) - 1) // 2)


# -- the forward pass, watched -----------------------------------------------------------------------------------------


class _Watching:
    """The op table `ops`, keeping the weights of every attention: the textbook's op has them, the compiled one never does."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.textbook = ops, ops_for("numpy")
        self.weights: list[np.ndarray] = []  # (H, T, T) of each block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ops, name)

    def attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, batch: int, n_heads: int, *more: Any, **named: Any
    ) -> tuple[np.ndarray, Any]:
        _, kept = self.textbook.attention(q, k, v, batch, n_heads, *more, **named)
        self.weights.append(kept.probabilities.reshape(n_heads, *kept.probabilities.shape[-2:]))
        return self.ops.attention(q, k, v, batch, n_heads, *more, **named)


def _watched(model: LanguageModel, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """attention (L, H, T, T), and the residual stream before the first block and after each, (L+1, T, D)."""
    seen = cast(Any, copy.copy(model))  # another object with the same parameters: the model is left as it is
    seen.ops = watching = _Watching(model.ops)
    block_forward, states = seen.block_forward, []

    def keep(layer: int, block: Any, x: np.ndarray, *more: Any) -> tuple[np.ndarray, Any]:
        if not states:
            states.append(np.array(x))
        x, cache = block_forward(layer, block, x, *more)
        states.append(np.array(x))
        return x, cache

    seen.block_forward = keep
    seen.forward(ids, last_only=True)
    return np.stack(watching.weights), np.stack(states)


# -- the logit lens ----------------------------------------------------------------------------------------------------


def _lens(
    model: LanguageModel, ids: np.ndarray, states: np.ndarray
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """(likeliest, probabilities), (followed, probabilities), (next_ids, next_logits, rest) of `Inside`."""
    likeliest, followed, after = [], [], []
    for position in range(len(ids)):
        logits = np.asarray(model.unembed_rows(np.ascontiguousarray(states[:, position]))[0], np.float64)  # (L+1, V)
        if not np.isfinite(logits).all():
            raise RuntimeError(
                "the model's numbers are not finite: its weights may be damaged, or its training diverged"
            )
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities = shifted / shifted.sum(axis=1, keepdims=True)  # (L+1, V)
        best = _largest(logits, N_LIKELIEST)
        likeliest.append((best, np.take_along_axis(probabilities, best, axis=1)))
        actual = ids[position + 1 : position + 2]
        wanted = _worth_following(best, actual, _largest(logits[-1:], N_FOLLOWED)[0])
        followed.append((wanted, probabilities[:, wanted].T))
        after.append(_after(logits[-1]))
    return (
        tuple(np.stack(part, axis=1) for part in zip(*likeliest)),
        tuple(np.stack(part) for part in zip(*followed)),
        tuple(np.stack(part) for part in zip(*after)),
    )


def _largest(rows: np.ndarray, n: int) -> np.ndarray:
    """The places of the n largest of each row, (N, V) -> (N, n), the largest first."""
    n = min(n, rows.shape[1])
    some = np.argpartition(-rows, n - 1, axis=1)[:, :n]
    return np.take_along_axis(some, np.argsort(-np.take_along_axis(rows, some, axis=1), axis=1, kind="stable"), axis=1)


def _worth_following(best: np.ndarray, actual: np.ndarray, at_the_end: np.ndarray) -> np.ndarray:
    """At most N_FOLLOWED ids: what stands there in the prompt, half of what is likeliest at the end, what was likeliest in
    the layers before, the last of them first, and the other half."""
    half = N_FOLLOWED // 2
    order = [*actual, *at_the_end[:half], *best[::-1, 0], *at_the_end[half:]]
    return np.array(list(dict.fromkeys(int(i) for i in order))[: len(at_the_end)])


def _after(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """logits: (V,) -> the N_NEXT likeliest ids, their logits, and what `Inside.rest` has of the others."""
    ids = _largest(logits[None], N_NEXT)[0]
    others = np.delete(logits, ids)
    if not others.size:
        return ids, logits[ids], np.full(len(TEMPERATURES), -np.inf)
    rest = [others.max() / t + math.log(np.exp((others - others.max()) / t).sum()) for t in TEMPERATURES]
    return ids, logits[ids], np.array(rest)


# -- the map of the embedding ------------------------------------------------------------------------------------------


def _map(
    model: LanguageModel, tokenizer: Tokenizer, ids: np.ndarray, next_ids: np.ndarray
) -> tuple[list[MapPoint], tuple[float, float], dict[int, list[tuple[int, float]]]]:
    """points, shares and nearest of `Inside`."""
    vocab_size = model.config.vocab_size
    prompt = np.unique(ids)
    nearest = _nearest(model, prompt)
    kinds = {int(i): "prompt" for i in ids}
    groups: list[tuple[str, Iterable[int]]] = [
        ("next", (int(i) for i in next_ids[:N_LIKELIEST])),
        ("nearest", (i for row in nearest.values() for i, _ in row)),
        ("frequent", _frequent(tokenizer, vocab_size)),
    ]
    if vocab_size <= WHOLE_VOCABULARY:
        groups[1:] = [("other", range(vocab_size))]
    for kind, members in groups:
        for i in members:
            kinds.setdefault(i, kind)
    shown = np.array(list(kinds))
    rows = _embedding(model, shown).astype(np.float64)  # (M, D)
    places, shares = _main_axes(rows)
    points = [MapPoint(int(i), float(x), float(y), kinds[int(i)]) for i, (x, y) in zip(shown, places)]
    return points, shares, nearest


def _embedding(model: LanguageModel, ids: np.ndarray) -> np.ndarray:
    """Rows of the token embedding as the model looks them up, (M, D)."""
    tree = model.parameters
    if hasattr(tree, "token_embd"):
        return embed(model.ops, ids, tree.token_embd)[0]
    return model.ops.embedding(ids, tree.token_embed)[0]


def _nearest(model: LanguageModel, ids: np.ndarray) -> dict[int, list[tuple[int, float]]]:
    """The N_NEAREST tokens of the whole vocabulary for each id, by the cosine of the embedding rows."""

    def directions(of: np.ndarray) -> np.ndarray:
        rows = _embedding(model, of)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(rows.dtype).tiny)

    wanted, vocab_size = directions(ids), model.config.vocab_size  # (M, D)
    found_ids, found = np.empty((len(ids), 0), np.int64), np.empty((len(ids), 0))
    for start in range(0, vocab_size, _EMBEDDING_ROWS):
        some = np.arange(start, min(start + _EMBEDDING_ROWS, vocab_size))
        cosines = wanted @ directions(some).T  # (M, rows)
        cosines[ids[:, None] == some[None]] = -np.inf  # itself
        found = np.concatenate([found, cosines], axis=1)
        found_ids = np.concatenate([found_ids, np.broadcast_to(some, cosines.shape)], axis=1)
        best = _largest(found, N_NEAREST)
        found, found_ids = (np.take_along_axis(a, best, axis=1) for a in (found, found_ids))
    return {
        int(i): [(int(j), float(c)) for j, c in zip(row, cosines) if np.isfinite(c)]
        for i, row, cosines in zip(ids, found_ids, found)
    }


def _frequent(tokenizer: Tokenizer, vocab_size: int) -> Iterable[int]:
    """The first tokens of a vocabulary that are more than a byte: merges are learned in the order of their frequency."""
    found = 0
    for i in range(min(vocab_size, tokenizer.vocab_size)):
        if len(tokenizer.token_bytes(i)) > 1:
            found += 1
            yield i
        if found == N_FREQUENT:
            return


def _main_axes(rows: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Principal components: (M, D) -> (M, 2) on the two directions of most variance, and their shares of it."""
    centred = rows - rows.mean(axis=0)
    left, sizes, right = np.linalg.svd(centred, full_matrices=False)
    # the sign of a direction is open: its largest component is made positive, so that the same model gives the same map
    signs = np.sign(np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1))[:, 0]
    places = np.zeros((len(rows), 2))
    n = min(2, len(sizes))
    places[:, :n] = (left * sizes * signs)[:, :n]
    variances = np.append(sizes**2, [0.0, 0.0])
    total = variances.sum() or 1.0
    return places, (float(variances[0] / total), float(variances[1] / total))


# -- the page ----------------------------------------------------------------------------------------------------------


def page(inside: Inside, tokenizer: Tokenizer, name: str) -> str:
    """One HTML document that needs nothing else. name: what the model is called.

    Raises ValueError when it would have more than MOST_BYTES.
    """
    text = resources.files("toy.trained").joinpath("look.htm").read_text(encoding="utf-8")
    # "<" in a string of the data would be able to end the script element that holds them
    data = json.dumps(_data(inside, tokenizer, name), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    parts = {"@NAME@": html.escape(name), "@DATA@": data.replace("<", "\\u003c")}
    text = re.sub("@NAME@|@DATA@", lambda place: parts[place[0]], text)  # in one pass: a prompt may have such a word
    text = text.encode("utf-8", errors="replace").decode("utf-8")  # a path may have bytes that are no text
    if len(text.encode()) > MOST_BYTES:
        raise ValueError(
            f"the page of {len(inside.ids)} tokens has {len(text.encode()) / 1e6:.1f} MB, and {MOST_BYTES / 1e6:g} is the "
            "most: shorten the prompt"
        )
    return text


def _data(inside: Inside, tokenizer: Tokenizer, name: str) -> dict[str, Any]:
    """What the script of the template reads, rounded to what can be seen. Arrays over (L+1, T) are nested lists."""
    n_layers, n_heads, t = inside.attention.shape[:3]
    seen = np.tril_indices(t)
    weights = np.rint(255 * inside.attention[:, :, seen[0], seen[1]]).astype(np.uint8)  # (L, H, T (T + 1) / 2)
    used = {
        *inside.ids.tolist(), *inside.likeliest.ravel().tolist(), *inside.followed.ravel().tolist(),
        *inside.next_ids.ravel().tolist(), *(point.token_id for point in inside.points),
        *(i for row in inside.nearest.values() for i, _ in row),
    }  # fmt: skip
    scale = max((max(abs(point.x), abs(point.y)) for point in inside.points), default=1.0) or 1.0
    return {
        "name": name,
        "ids": inside.ids.tolist(),
        "layers": n_layers,
        "heads": n_heads,
        "texts": {i: token_text(tokenizer, i) for i in sorted(used)},
        "attention": base64.b64encode(weights.tobytes()).decode(),
        "likeliest": inside.likeliest.tolist(),
        "likeliestProbabilities": _rounded(inside.likeliest_probabilities, 5),
        "followed": inside.followed.tolist(),
        "followedProbabilities": _rounded(inside.followed_probabilities, 5),
        "nextIds": inside.next_ids.tolist(),
        "nextLogits": _rounded(inside.next_logits, 4),
        "rest": None if np.isinf(inside.rest).any() else _rounded(inside.rest, 4),
        "temperatures": TEMPERATURES,
        "points": [
            [point.token_id, round(point.x / scale, 4), round(point.y / scale, 4), point.kind]
            for point in inside.points
        ],
        "shares": _rounded(np.array(inside.shares), 4),
        "nearest": {i: [[j, round(cosine, 3)] for j, cosine in row] for i, row in inside.nearest.items()},
    }


def _rounded(array: np.ndarray, decimals: int) -> Any:
    """Nested lists of numbers with so many decimals; whole ones without a point, which is shorter."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(item) for item in value]
        return int(value) if value == int(value) else value

    return short(np.round(array.astype(np.float64), decimals).tolist())


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """What a token is called where it stands alone: its text, \\xE2\\x80 for bytes that are none, #7 for one without any."""
    if not 0 <= token_id < tokenizer.vocab_size:
        return f"#{token_id}"  # rows that only fill the matrix up
    data = tokenizer.token_bytes(token_id, special=True)
    try:
        return data.decode("utf-8") or f"#{token_id}"
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02X}" for byte in data)
