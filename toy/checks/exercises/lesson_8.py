"""Lesson 8: what a Llama has beside the earlier ops, its tokens, its key/value cache, and the blocks its weights lie in."""

import numpy as np

from toy.checks.exercises.engine import GRADIENT_BAR, Mistake, Task, derivatives
from toy.checks.exercises.lesson_1 import NO_SCALE, attention_on_four_axes
from toy.checks.exercises.lesson_2 import elementwise_backward_cases, softmax_of
from toy.ops import reference


def _activations(rng):
    for shape in ((4, 5), (1, 3), (2, 2)):
        yield {"x": 2 * rng.normal(size=shape)}
    yield {"x": np.array([[-1000.0, 0.0, 1000.0]])}


def _gate_and_up(rng):
    for shape in ((4, 5), (1, 3), (2, 2)):
        yield {"gate": 2 * rng.normal(size=shape), "up": rng.normal(size=shape)}


def _swiglu_backward(rng):
    for shape in ((4, 5), (1, 3), (2, 2)):
        _, cache = reference.swiglu(2 * rng.normal(size=shape), rng.normal(size=shape))
        yield {"d_y": rng.normal(size=shape), "cache": cache}


def _rope(rng):
    for n, n_heads, d_head in ((5, 2, 4), (3, 1, 6), (1, 3, 2)):
        positions = rng.integers(1, 50, n)
        yield {"x": rng.normal(size=(n, n_heads * d_head)), "positions": positions, "n_heads": n_heads, "base": 100.0}


def _rope_backward_cases(rng):
    for n, n_heads, d_head in ((5, 2, 4), (3, 1, 6), (1, 3, 2)):
        x = rng.normal(size=(n, n_heads * d_head))
        _, cache = reference.rope(x, rng.integers(1, 50, n), n_heads, base=100.0)
        yield {"d_y": rng.normal(size=x.shape), "cache": cache}


def _rope_backward(d_y, cache):
    def forward(x):
        pairs = x.reshape(len(x), -1, cache.cos.shape[2], 2)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cache.cos + 1j * cache.sin)
        return np.stack([turned.real, turned.imag], axis=3).reshape(x.shape)

    return derivatives(forward, d_y, np.zeros_like(d_y))[0]


def _groups(rng, backward=False):
    for batch, n_heads, n_kv_heads, t, d_head in ((2, 4, 2, 3, 4), (1, 3, 1, 4, 2), (1, 6, 2, 2, 3)):
        q, d_out = (rng.normal(size=(batch, n_heads, t, d_head)) for _ in range(2))
        k, v = (rng.normal(size=(batch, n_kv_heads, t, d_head)) for _ in range(2))
        if not backward:
            yield {"q": q, "k": k, "v": v}
            continue
        scores = q @ np.repeat(k, n_heads // n_kv_heads, axis=1).swapaxes(2, 3) / np.sqrt(d_head)
        hidden = np.triu(np.ones((t, t), bool), k=1)
        probabilities = softmax_of(np.where(hidden, -np.inf, scores))
        yield {"d_out": d_out, "q": q, "k": k, "v": v, "probabilities": probabilities}


def _cache(rng):
    for n, room, n_heads, d_head in ((3, 6, 2, 4), (0, 3, 1, 2), (4, 5, 3, 3)):
        new = {name: rng.normal(size=(n_heads, d_head)) for name in "qkv"}
        full = {name: rng.normal(size=(room, n_heads, d_head)) for name in ("keys", "values")}  # old numbers beyond n
        yield new | full | {"n": n}


def _blocks(rng):
    for size in (1.0, 300.0, 1e-3):
        yield {"x": size * rng.normal(size=32)}
    yield {"x": -np.abs(rng.normal(size=32))}
    yield {"x": np.zeros(32)}


def _stored(rng):
    for n in (3, 1):
        scales = rng.uniform(0.01, 0.1, (n, 1)).astype("<f2").view(np.uint8)
        yield {"raw": np.concatenate([scales, rng.integers(0, 256, (n, 32)).astype(np.uint8)], axis=1).ravel()}


def _ids(rng):
    for ids in ([1, 2, 1, 2, 3, 1, 2], [5, 5, 5, 5, 7, 5], [3, 1, 2, 0, 5, 1, 2], [2, 5, 1, 3, 9, 4, 2, 5, 1, 3, 9, 4]):
        yield {"ids": ids}


def _ids_and_pair(rng):
    for ids, pair in (
        ([1, 2, 1, 2, 3, 1, 2], (1, 2)),
        ([5, 5, 5, 7, 5, 5], (5, 5)),
        ([4, 9, 1, 9, 4], (9, 4)),
        ([3], (3, 3)),
    ):
        yield {"ids": ids, "pair": pair, "new": 10}


TASKS = (
    Task(
        name="silu",
        lesson=8,
        statement="SiLU, element by element: y = x * sigmoid(x) = x / (1 + exp(-x)). x may have any shape.",
        source='''
def silu(x):
    """x: (N, F) -> (N, F)."""
    sigmoid = 1 / (1 + np.exp(-x))  #?
    return x * sigmoid  #?
''',
        cases=_activations,
        returns=("y",),
        judge=lambda x: reference.silu(x)[0],
        mistakes=(
            Mistake("x * sigmoid", "sigmoid", "This is the sigmoid alone: multiply it with x."),
            Mistake(
                "np.exp(-x)", "np.exp(x)",
                "The sign in the exponent is wrong: sigmoid(x) = 1 / (1 + exp(-x)), near 1 for large x.",
            ),
            Mistake(
                "1 / (1 + np.exp(-x))", "np.exp(x) / (1 + np.exp(x))",
                "exp(x) is infinite for x = 1000, and infinity through infinity is not a number: write it with exp(-x).",
            ),
            Mistake(
                "x * sigmoid", "sigmoid * (1 - sigmoid)",
                "This is the derivative of the sigmoid: SiLU is x times the sigmoid.",
            ),
        ),
    ),
    Task(
        name="silu_backward",
        lesson=8,
        statement=(
            "The backward of y = x * s with s = sigmoid(x): the product rule and s' = s (1 - s) give dy/dx = s * (1 + x"
            " (1 - s)). d_y (N, F) and cache.x (N, F) give d_x."
        ),
        source='''
def silu_backward(d_y, cache):
    """d_y: (N, F) -> d_x (N, F)."""
    x = cache.x
    sigmoid = 1 / (1 + np.exp(-x))
    return d_y * sigmoid * (1 + x * (1 - sigmoid))  #?
''',
        cases=elementwise_backward_cases("silu"),
        returns=("d_x",),
        judge=lambda d_y, cache: derivatives(lambda x: reference.silu(x)[0], d_y, cache.x)[0],
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "(1 + x * (1 - sigmoid))", "x * (1 - sigmoid)",
                "The first term of the product rule is missing: x itself has derivative 1, which adds sigmoid(x).",
            ),
            Mistake(
                " * (1 + x * (1 - sigmoid))", "",
                "The second term of the product rule is missing: the sigmoid depends on x too, x s (1 - s).",
            ),
            Mistake("1 + x * (1 - sigmoid)", "1 + (1 - sigmoid)", "x is missing in the second term: x * s * (1 - s)."),
            Mistake("d_y * sigmoid", "sigmoid", "d_y is missing: this is dy/dx, and the gradient is d_y times it."),
        ),
    ),
    Task(
        name="swiglu",
        lesson=8,
        statement=(
            "SwiGLU (Shazeer 2020): the gate goes through SiLU and multiplies the other branch, y = silu(gate) * up. "
            "gate and up are (N, F)."
        ),
        source='''
def swiglu(gate, up):
    """gate, up: (N, F) -> (N, F)."""
    return gate / (1 + np.exp(-gate)) * up  #?
''',
        cases=_gate_and_up,
        returns=("y",),
        judge=lambda gate, up: reference.swiglu(gate, up)[0],
        mistakes=(
            Mistake(
                "gate / (1 + np.exp(-gate)) * up", "up / (1 + np.exp(-up)) * gate",
                "The branches are exchanged: SiLU acts on the gate, not on up.",
            ),
            Mistake(
                "gate / (1", "1 / (1",
                "The gate goes through the sigmoid alone (that is GLU): silu(gate) = gate * sigmoid(gate).",
            ),
            Mistake(" * up", " + up", "The branches are added: the gate *multiplies* up."),
            Mistake(" * up", "", "up is missing: this is silu(gate) alone."),
        ),
    ),
    Task(
        name="swiglu_backward",
        lesson=8,
        statement=(
            "The backward of y = silu(gate) * up. Each factor gets d_y times the other: d_up = d_y * silu(gate), and "
            "d_gate = d_y * up * silu'(gate) with silu'(g) = s (1 + g (1 - s)). d_y is (N, F); the cache has gate and "
            "up, (N, F) each."
        ),
        source='''
def swiglu_backward(d_y, cache):
    """d_y: (N, F) -> d_gate, d_up, both (N, F)."""
    gate, up = cache
    sigmoid = 1 / (1 + np.exp(-gate))
    d_up = d_y * gate * sigmoid  #?
    d_gate = d_y * up * sigmoid * (1 + gate * (1 - sigmoid))  #?
    return d_gate, d_up
''',
        cases=_swiglu_backward,
        returns=("d_gate", "d_up"),
        judge=lambda d_y, cache: derivatives(lambda gate, up: reference.swiglu(gate, up)[0], d_y, *cache),
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "return d_gate, d_up", "return d_up, d_gate",
                "The two gradients are exchanged: d_gate comes first.",
            ),
            Mistake(
                "d_y * up * sigmoid", "d_y * sigmoid",
                "up is missing in d_gate: silu(gate) was multiplied with it.",
            ),
            Mistake(
                "d_y * gate * sigmoid", "d_y * sigmoid",
                "gate is missing in d_up: silu(gate) = gate * sigmoid(gate).",
            ),
            Mistake(
                " * (1 + gate * (1 - sigmoid))", "",
                "d_gate treats the sigmoid as a constant: silu'(g) = s (1 + g (1 - s)).",
            ),
            Mistake(
                "(1 + gate * (1 - sigmoid))", "(1 - sigmoid)",
                "d_gate has the derivative of the sigmoid, s (1 - s): silu'(g) = s (1 + g (1 - s)).",
            ),
        ),
    ),
    Task(
        name="rope",
        lesson=8,
        statement=(
            "RoPE (Su et al. 2021) turns pairs of numbers: in every head pair i, which is (x[2i], x[2i+1]), is turned "
            "by the angle position * base^(-2i/d_head): (a, b) becomes (a cos - b sin, a sin + b cos). x and the result"
            " are (N, n_heads*d_head), positions int (N,)."
        ),
        source='''
def rope(x, positions, n_heads, base):
    """x: (N, n_heads*d_head), positions: int (N,) -> (N, n_heads*d_head)."""
    d_head = x.shape[1] // n_heads
    frequencies = base ** (-np.arange(0, d_head, 2) / d_head)  #? (d_head/2,)
    angles = positions[:, None] * frequencies  #? (N, d_head/2)
    cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]  # (N, 1, d_head/2): the same for all heads
    pairs = x.reshape(len(x), n_heads, d_head // 2, 2)  #?
    a, b = pairs[..., 0], pairs[..., 1]  # (N, n_heads, d_head/2)
    turned = np.stack([a * cos - b * sin, a * sin + b * cos], axis=3)  #? (N, n_heads, d_head/2, 2)
    return turned.reshape(x.shape)
''',
        cases=_rope,
        returns=("y",),
        judge=lambda x, positions, n_heads, base: reference.rope(x, positions, n_heads, base)[0],
        mistakes=(
            Mistake(
                "a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, b * cos - a * sin",
                "The pairs are turned backwards, by minus the angle: (a cos - b sin, a sin + b cos).",
            ),
            Mistake(
                "x.reshape(len(x), n_heads, d_head // 2, 2)",
                "x.reshape(len(x), n_heads, 2, d_head // 2).swapaxes(2, 3)",
                "The halves of a head are paired, x[i] with x[i + d_head/2] (as in Qwen files): here neighbours are, "
                "x[2i] with x[2i+1].",
            ),
            Mistake(
                "-np.arange(0, d_head, 2) / d_head", "-np.arange(d_head // 2) / d_head",
                "The frequencies fall half as fast as they should: the exponent is -2i/d_head for pair i.",
            ),
            Mistake(
                "-np.arange(0, d_head, 2) / d_head", "-2 * np.arange(0, d_head, 2) / d_head",
                "The frequencies fall twice as fast as they should: arange(0, d_head, 2) is 2i already.",
            ),
            Mistake(
                "base ** (-np", "base ** (np",
                "The frequencies grow with i: the exponent is negative, later pairs turn more slowly.",
            ),
            Mistake(
                "a * cos - b * sin, a * sin + b * cos", "a * cos - b * sin, a * sin - b * cos",
                "The second number of a pair has a wrong sign: a rotation is (a cos - b sin, a sin + b cos).",
            ),
        ),
    ),
    Task(
        name="rope_backward",
        lesson=8,
        statement=(
            "A rotation's transpose is the rotation back, so the gradient of RoPE turns d_y by minus the angles. d_y is"
            " (N, n_heads*d_head); cache.cos and cache.sin are (N, 1, d_head/2), with neighbours as pairs."
        ),
        source='''
def rope_backward(d_y, cache):
    """d_y: (N, n_heads*d_head) -> d_x (N, n_heads*d_head)."""
    cos, sin = cache.cos, cache.sin  # (N, 1, d_head/2)
    pairs = d_y.reshape(len(d_y), -1, cos.shape[2], 2)  # (N, n_heads, d_head/2, 2)
    d_a, d_b = pairs[..., 0], pairs[..., 1]
    turned = np.stack([d_a * cos + d_b * sin, d_b * cos - d_a * sin], axis=3)  #?
    return turned.reshape(d_y.shape)
''',
        cases=_rope_backward_cases,
        returns=("d_x",),
        judge=_rope_backward,
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "d_a * cos + d_b * sin, d_b * cos - d_a * sin", "d_a * cos - d_b * sin, d_b * cos + d_a * sin",
                "The gradient is turned forwards, as x was: it has to be turned back, with -sin in place of sin.",
            ),
            Mistake(
                "d_b * cos - d_a * sin", "d_b * cos + d_a * sin",
                "The second number of a pair has a wrong sign: d_b cos - d_a sin.",
            ),
            Mistake(
                "turned = np.stack([d_a * cos + d_b * sin, d_b * cos - d_a * sin], axis=3)", "turned = pairs",
                "The gradient is not turned at all: x was, so d_y is turned back.",
            ),
            Mistake(
                "np.stack([d_a * cos + d_b * sin, d_b * cos - d_a * sin], axis=3)",
                "np.concatenate([d_a * cos + d_b * sin, d_b * cos - d_a * sin], axis=2)",
                "The results lie in halves, all first numbers and then all second ones: they go back as neighbours "
                "(stack on the last axis).",
            ),
        ),
    ),
    Task(
        name="grouped_attention",
        lesson=8,
        statement=(
            "Grouped-query attention (Ainslie et al. 2023), causal: there are fewer key and value heads than query "
            "heads, and query head h reads number h // (H/G). q and the result are (B, H, T, d_head), k and v (B, G, T,"
            " d_head), H a multiple of G."
        ),
        source='''
def grouped_attention(q, k, v):
    """q: (B, H, T, d_head), k, v: (B, G, T, d_head) -> (B, H, T, d_head)."""
    group, t = q.shape[1] // k.shape[1], q.shape[2]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  #? (B, H, T, d_head)
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[3])  #? (B, H, T, T)
    scores = np.where(np.triu(np.ones((t, t), bool), k=1), -np.inf, scores)
    exponentials = np.exp(scores - scores.max(axis=3, keepdims=True))
    return exponentials / exponentials.sum(axis=3, keepdims=True) @ v  #?
''',
        cases=_groups,
        returns=("out",),
        judge=attention_on_four_axes,
        mistakes=(
            Mistake(
                "np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)",
                "np.tile(k, (1, group, 1, 1)), np.tile(v, (1, group, 1, 1))",
                "The heads of k and v come in turn, h % G: neighbouring query heads share one, h // (H/G), which is "
                "np.repeat.",
            ),
            Mistake(" / np.sqrt(q.shape[3])", "", NO_SCALE),
            Mistake(
                "np.where(np.triu(np.ones((t, t), bool), k=1), -np.inf, scores)", "scores",
                "The causal mask is forgotten: every query reads the keys after it.",
            ),
            Mistake(
                "np.repeat(v, group, axis=1)", "np.tile(v, (1, group, 1, 1))",
                "The values come from another head than the keys: both are number h // (H/G).",
            ),
            Mistake(
                "np.sqrt(q.shape[3])", "np.sqrt(q.shape[3] * group)",
                "The scores are divided by the width of a whole group: d_head is that of one head.",
            ),
        ),
    ),
    Task(
        name="grouped_attention_backward",
        lesson=8,
        statement=(
            "Its backward: as in plain attention, and where several query heads read one key and value head, their "
            "gradients add up. d_out, q and d_q are (B, H, T, d_head); k, v, d_k and d_v (B, G, T, d_head); "
            "probabilities (B, H, T, T), 0 where masked."
        ),
        source='''
def grouped_attention_backward(d_out, q, k, v, probabilities):
    """d_out, q: (B, H, T, d), k, v: (B, G, T, d), probabilities: (B, H, T, T) -> d_q (B, H, T, d), d_k, d_v (B, G, T, d)."""
    batch, groups, t, d_head = k.shape
    group = q.shape[1] // groups
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)  # (B, H, T, d_head)
    d_probabilities = d_out @ v.swapaxes(2, 3)  # (B, H, T, T)
    weighted = (d_probabilities * probabilities).sum(axis=3, keepdims=True)
    d_scores = probabilities * (d_probabilities - weighted) / np.sqrt(d_head)  #? (B, H, T, T)
    d_q = d_scores @ k
    d_k = d_scores.swapaxes(2, 3) @ q  # (B, H, T, d_head), a gradient for each query head
    d_v = probabilities.swapaxes(2, 3) @ d_out
    d_k = d_k.reshape(batch, groups, group, t, d_head).sum(axis=2)  #? (B, G, T, d_head)
    d_v = d_v.reshape(batch, groups, group, t, d_head).sum(axis=2)  #? (B, G, T, d_head)
    return d_q, d_k, d_v
''',
        cases=lambda rng: _groups(rng, backward=True),
        returns=("d_q", "d_k", "d_v"),
        judge=lambda d_out, q, k, v, probabilities: derivatives(attention_on_four_axes, d_out, q, k, v),
        bar=GRADIENT_BAR,
        mistakes=(
            Mistake(
                "d_k.reshape(batch, groups, group, t, d_head).sum(axis=2)",
                "d_k.reshape(batch, group, groups, t, d_head).sum(axis=1)",
                "d_k adds up the wrong query heads: those of one group are neighbours, so the axes are (B, G, H/G, T, "
                "d_head), summed over the third.",
            ),
            Mistake(
                "d_v.reshape(batch, groups, group, t, d_head).sum",
                "d_v.reshape(batch, groups, group, t, d_head).mean",
                "d_v is the mean over the query heads of a group: each used the value, so their gradients add up.",
            ),
            Mistake(
                " / np.sqrt(d_head)", "",
                "1/sqrt(d_head) is missing in d_q and d_k: the scores were divided by it.",
            ),
            Mistake(
                "d_probabilities - weighted", "d_probabilities + weighted",
                "The softmax term has the wrong sign: d_s = p * (d_p - sum(d_p * p)).",
            ),
            Mistake(
                "d_k.reshape(batch, groups, group, t, d_head).sum(axis=2)", "d_k[:, ::group]",
                "d_k has the gradient of one query head of each group: those of the others have to be added.",
            ),
            Mistake(
                "    d_v = d_v.reshape(batch, groups, group, t, d_head).sum(axis=2)  # (B, G, T, d_head)\n", "",
                "d_v has a head for each query head: those of a group are summed, (B, G, T, d_head).",
            ),
        ),
    ),
    Task(
        name="kv_cache_step",
        lesson=8,
        statement=(
            "Generating one token with a key/value cache: the first n places of keys and values hold the earlier "
            "tokens. Write the new token's k and v into place n, and let its query attend to places 0 to n. q, k, v and"
            " the result are (H, d_head); keys and values (room, H, d_head), with old numbers beyond n."
        ),
        source='''
def kv_cache_step(q, k, v, keys, values, n):
    """q, k, v: (H, d_head) -> (H, d_head). Writes into place n of keys and values (room, H, d_head)."""
    keys[n], values[n] = k, v
    scores = np.einsum("hd,thd->ht", q, keys[: n + 1]) / np.sqrt(q.shape[1])  #? (H, n+1)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)  #?
    return np.einsum("ht,thd->hd", probabilities, values[: n + 1])  #?
''',
        cases=_cache,
        returns=("out",),
        changes=("keys", "values"),
        mistakes=(
            Mistake(
                "keys[: n + 1]) / np.sqrt(q.shape[1])",
                "keys) / np.sqrt(q.shape[1])\n    n = len(keys) - 1",
                "The old numbers beyond n take part: only places 0 to n hold tokens of this text, keys[: n + 1] and "
                "values[: n + 1].",
            ),
            Mistake(
                "    keys[n], values[n] = k, v\n",
                "    keys, values = keys.copy(), values.copy()\n    keys[n], values[n] = k, v\n",
                "The caches are not changed: the next token will need this one's k and v. Write into keys[n] and "
                "values[n] themselves.",
            ),
            Mistake(" / np.sqrt(q.shape[1])", "", NO_SCALE),
            Mistake("keys[n], values[n] = k, v", "keys[n], values[n] = v, k", "k and v are exchanged in the caches."),
            Mistake(
                "    keys[n], values[n] = k, v\n",
                "    keys[n + 1 :][:1], values[n + 1 :][:1] = k, v\n    keys[n], values[n] = keys[n], values[n]\n",
                "The new token is written one place too far: the n earlier ones are in 0 to n-1, so its place is n.",
            ),
        ),
    ),
    Task(
        name="quantise_q8_0",
        lesson=8,
        statement=(
            "A Q8_0 block holds 32 numbers as whole numbers from -127 to 127 and one scale: scale = max|x| / 127, "
            "integers = x / scale, rounded to the nearest. A block of zeros has scale 0 and zeros. x: (32,); return the"
            " scale, a number, and the integers, int8 (32,)."
        ),
        source='''
def quantise_q8_0(x):
    """x: (32,) -> scale, integers: int8 (32,)."""
    scale = np.abs(x).max() / 127  #?
    if scale == 0:
        return scale, np.zeros(32, np.int8)
    integers = np.round(x / scale).astype(np.int8)  #?
    return scale, integers
''',
        cases=_blocks,
        returns=("scale", "integers"),
        mistakes=(
            Mistake(
                "np.round(x / scale)", "(x / scale)",
                "The integers are cut off towards 0: round to the nearest (np.round), which halves the error.",
            ),
            Mistake(
                "/ 127", "/ 128",
                "The scale is max|x| / 128, and the largest number would become 128, which int8 does not have: divide "
                "by 127.",
            ),
            Mistake(
                "np.abs(x).max()", "x.max()",
                "The largest number is taken and not the largest |x|: a block of negative numbers needs a scale too.",
            ),
            Mistake(
                ".astype(np.int8)", "",
                "The integers are whole but of a float's type, eight bytes each: a Q8_0 block has one byte for each, "
                ".astype(np.int8).",
            ),
            Mistake(
                "np.round(x / scale)", "np.round(x * scale)",
                "x is multiplied with the scale: the integers are x / scale, and integers * scale is x again.",
            ),
        ),
    ),
    Task(
        name="dequantise_q8_0",
        lesson=8,
        statement=(
            "Read Q8_0 blocks out of a file's bytes: a block is 34 bytes, first its scale as a 16-bit float (little-"
            "endian), then 32 signed 8-bit integers; a number is scale * integer. raw: uint8 (34 n,); return float64 "
            "(32 n,)."
        ),
        source='''
def dequantise_q8_0(raw):
    """raw: uint8 (34 n,) -> float64 (32 n,)."""
    blocks = raw.reshape(-1, 34)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float64)  #? (n, 1)
    integers = blocks[:, 2:].view(np.int8)  #? (n, 32)
    return (scales * integers).ravel()  #?
''',
        cases=_stored,
        returns=("x",),
        mistakes=(
            Mistake(
                "blocks[:, 2:].view(np.int8)", "blocks[:, 2:]",
                "The integers are read without sign, 0 to 255: they are signed, view(np.int8).",
            ),
            Mistake(
                '"<f2"', '">f2"',
                "The two bytes of the scale are read in the wrong order: GGUF files are little-endian, \"<f2\".",
            ),
            Mistake(
                "blocks[:, :2].copy()", "blocks[:, -2:].copy()",
                "The scale is read from the block's end: it stands in its first two bytes.",
            ),
            Mistake(
                '.view("<f2")', '.view("<i2")',
                "The scale is read as a whole number: its 16 bits are those of a float, \"<f2\".",
            ),
        ),
    ),
    Task(
        name="most_frequent_pair",
        lesson=8,
        statement=(
            "Byte-pair encoding learns tokens by merging the pair that stands side by side most often. Find it: of "
            "pairs that are equally frequent the one with the lowest ids. ids: a list of at least two whole numbers; "
            "return the pair as two numbers, left and right."
        ),
        source='''
def most_frequent_pair(ids):
    """ids: list of int -> left, right."""
    counts = {}
    for pair in zip(ids, ids[1:]):
        counts[pair] = counts.get(pair, 0) + 1  #?
    return min(counts, key=lambda pair: (-counts[pair], pair))  #? most frequent first, then the lowest ids
''',
        cases=_ids,
        returns=("left", "right"),
        mistakes=(
            Mistake(
                "zip(ids, ids[1:])", "zip(ids[::2], ids[1::2])",
                "Only every second pair is counted: the pairs overlap.",
            ),
            Mistake(
                "(-counts[pair], pair)", "(counts[pair], pair)",
                "This is the rarest pair: the most frequent is looked for.",
            ),
            Mistake(
                "min(counts, key=lambda pair: (-counts[pair], pair))", "max(counts, key=counts.get)",
                "Of equally frequent pairs the first in the text is taken: it is to be the one with the lowest ids.",
            ),
            Mistake(
                "min(counts, key=lambda pair: (-counts[pair], pair))",
                "max(counts, key=lambda pair: (counts[pair], pair))",
                "Of equally frequent pairs the one with the highest ids is taken: the lowest are asked for.",
            ),
        ),
    ),
    Task(
        name="merge_pair",
        lesson=8,
        statement=(
            "Replace a pair by its new token wherever it stands, from the left: in a a a only the first two become one."
            " ids: a list of whole numbers, pair: two ids, new: the id that takes their place; return the new list."
        ),
        source='''
def merge_pair(ids, pair, new):
    """ids: list of int, pair: (left, right), new: int -> list of int."""
    merged, i = [], 0
    while i < len(ids):
        hit = tuple(ids[i : i + 2]) == pair  #?
        merged.append(new if hit else ids[i])
        i += 2 if hit else 1  #?
    return merged
''',
        cases=_ids_and_pair,
        returns=("merged",),
        mistakes=(
            Mistake(
                "2 if hit else 1", "1",
                "The right half of a merged pair stays in the list: after a hit go on two places further.",
            ),
            Mistake(
                "tuple(ids[i : i + 2]) == pair", "set(ids[i : i + 2]) == set(pair) and len(ids[i : i + 2]) == 2",
                "The pair is merged in either order: left and right are not the same.",
            ),
            Mistake(
                "new if hit else ids[i]", "new if hit else -1",
                "The tokens that are no part of a pair are lost: they stay as they are.",
            ),
            Mistake(
                "    while i < len(ids):", "    while i < len(ids) - 1:",
                "The last token is lost when it is not part of a pair: go on to the end of the list.",
            ),
        ),
    ),
)  # fmt: skip
