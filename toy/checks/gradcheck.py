"""Is a hand-written backward the derivative of its forward? Ask the forward itself.

The backward of an op takes the gradient of the loss with respect to the op's output, d_out, and returns the gradient
with respect to an input x. Any d_out will do, so a check draws a random one, the *cotangent* c. What the backward has
to return is then the derivative of the number L(x) = sum(c * op(x)), and a derivative can be measured from two values
of the forward (central difference):

    D(h) = sum(c * (op(x + h e_i) - op(x - h e_i))) / (2 h)  =  dL/dx_i + a h^2 + b h^4 + O(h^6)

Only even powers of h appear. So (4 D(h/2) - D(h)) / 3 has no h^2 term any more, and one more such step removes h^4
(Richardson extrapolation). With h near 1/100 in float64 that leaves a truncation error of about h^6 = 1e-12, and a
rounding error of about 1e-16 / h = 1e-14 of the outputs. A backward that is right agrees to 1e-7 in every element; one
with a forgotten term does not agree at all.

Why the cotangent is random and never all ones: a plain sum is blind. The probabilities of a softmax sum to 1 and a
normalised row sums to 0 whatever x is, so the sum of the outputs has gradient zero, and a backward that returns zeros
would pass.
"""

import dataclasses
import inspect
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np

from toy.config import LlamaConfig
from toy.models import ARCHITECTURES, Llama, ParameterTree
from toy.ops import reference

DERIVATIVE_BAR = 1e-7  # per element, against central differences in float64
TWIN_BAR = 2e-6  # of the largest element, compiled op against reference op in float32

_TWIN = ", compiled"  # what the name of a layer ends with where the compiled op is compared

# Below this fraction of the largest element of a gradient an error is measured in absolute terms: an element that is
# small because large terms cancel in it carries the rounding error of those terms, in both numbers that are compared.
# (The extreme case is a key bias: it moves all scores of a query alike, so its gradient is 0, but computed as 1e-16.)
RELATIVE_FLOOR = 1e-4


class Row(NamedTuple):
    """One line of the table: one gradient of one layer."""

    layer: str
    gradient: str  # the argument or parameter it belongs to
    shape: tuple[int, ...]
    rel_error: float
    bar: float
    ok: bool


class Case(NamedTuple):
    """One op with random inputs. `op` and the keys of `inputs` and `settings` are the names in the op tables."""

    layer: str
    op: str
    inputs: dict[str, np.ndarray]  # the differentiable arguments, parameters last; float64
    settings: dict[str, object] = {}  # noqa: RUF012 (never written to): every other argument
    parameters: tuple[str, ...] = ()  # the inputs whose gradients are added into an array, not returned


# ----------------------------------------------------------------------------------------------------------------------
# derivatives by central differences
# ----------------------------------------------------------------------------------------------------------------------


def central_difference(f, x, cotangent, indices=None, step=2**-7):
    """The gradient of sum(cotangent * f(x)) with respect to x, from values of f alone.

    f: a function of one float64 array. cotangent: an array (or number) of the shape of f(x). indices: positions in
    x.ravel() (default: all of them). step: the largest h, to be small against the distance over which f changes its
    shape (inputs of size 1: the default). Returns the derivatives in the shape of x, or (len(indices),) for indices.

    x itself is varied, in place, and restored: f may therefore ignore its argument and look at an array it knows.
    """
    if x.dtype != np.float64:
        raise ValueError(f"central differences need float64, x is {x.dtype}: float32 leaves 3 digits of a derivative")
    if not x.flags.c_contiguous:
        raise ValueError("x must be C-contiguous, because it is varied in place")
    flat = x.reshape(-1)
    chosen = np.arange(flat.size) if indices is None else np.asarray(indices)
    derivatives = np.empty(chosen.size)
    for n, i in enumerate(chosen):
        kept = flat[i]

        def slope(h, i=i, kept=kept):
            flat[i] = kept + h
            above = np.array(f(x))
            flat[i] = kept - h
            below = np.array(f(x))
            # subtract before summing: outputs that do not depend on x_i then add no rounding error
            return float(np.sum(cotangent * (above - below))) / (2 * h)

        try:
            coarse, middle, fine = slope(step), slope(step / 2), slope(step / 4)
        finally:
            flat[i] = kept
        derivatives[n] = _extrapolate(_extrapolate(coarse, middle, 4), _extrapolate(middle, fine, 4), 16)
    return derivatives.reshape(x.shape) if indices is None else derivatives


def _extrapolate(coarse, fine, ratio):
    """Remove the error term that is `ratio` times larger in `coarse` than in `fine`."""
    return (ratio * fine - coarse) / (ratio - 1)


def relative_error(given, expected, scale=None):
    """The largest |given - expected| / max(|given|, |expected|, RELATIVE_FLOOR * scale) of all elements.

    scale: the size of a large element, by default the largest of `expected`.
    """
    return float(relative_errors(given, expected, scale).max(initial=0.0))


def relative_errors(given, expected, scale=None):
    """That of every element, in the shape of `expected`."""
    given, expected = np.asarray(given, np.float64), np.asarray(expected, np.float64)
    if given.shape != expected.shape:
        raise ValueError(f"gradients of different shapes: {given.shape} and {expected.shape}")
    scale = np.abs(expected).max(initial=0.0) if scale is None else scale
    floor = max(RELATIVE_FLOOR * scale, np.finfo(np.float64).tiny)
    return np.abs(given - expected) / np.maximum(np.maximum(np.abs(given), np.abs(expected)), floor)


def error_of_max(given, expected):
    """The largest |given - expected| as a fraction of the largest |expected|."""
    difference = np.abs(np.asarray(given, np.float64) - np.asarray(expected, np.float64)).max(initial=0.0)
    return float(difference / max(np.abs(expected).max(initial=0.0), np.finfo(np.float64).tiny))


# ----------------------------------------------------------------------------------------------------------------------
# the ops: what is random in each
# ----------------------------------------------------------------------------------------------------------------------


def embedding_case(rng, rows=6, vocab=5, d=4):
    token_ids = rng.integers(0, vocab, rows)  # with repeats
    inputs = {"table": rng.normal(size=(vocab, d))}
    return Case("embedding", "embedding", inputs, {"token_ids": token_ids}, parameters=("table",))


def linear_case(rng, rows=5, n_in=4, n_out=3, bias=True):
    inputs = {"x": rng.normal(size=(rows, n_in)), "weight": rng.normal(size=(n_out, n_in)) / np.sqrt(n_in)}
    if not bias:
        return Case("linear, no bias", "linear", inputs, parameters=("weight",))
    return Case("linear", "linear", inputs | {"bias": rng.normal(size=n_out)}, parameters=("weight", "bias"))


def rms_norm_case(rng, rows=4, d=6, eps=1e-5):
    inputs = {"x": rng.normal(size=(rows, d)), "gamma": rng.normal(size=d)}
    return Case("rms_norm", "rms_norm", inputs, {"eps": eps}, parameters=("gamma",))


def layer_norm_case(rng, rows=4, d=6, eps=1e-5):
    inputs = {"x": rng.normal(size=(rows, d)), "gamma": rng.normal(size=d), "beta": rng.normal(size=d)}
    return Case("layer_norm", "layer_norm", inputs, {"eps": eps}, parameters=("gamma", "beta"))


def rope_case(rng, rows=5, n_heads=2, d_head=4, base=10000.0, halves=False, scaled=False):
    settings = {"positions": rng.integers(0, 1000, rows), "n_heads": n_heads, "base": base}
    if halves:
        settings["halves"] = True
    if scaled:  # as YaRN does
        settings |= {"factors": tuple(rng.uniform(1, 8, d_head // 2).tolist()), "magnitude": 1.25}
    kind = (" (halves)" if halves else "") + (", scaled" if scaled else "")
    return Case(f"rope{kind}", "rope", {"x": rng.normal(size=(rows, n_heads * d_head))}, settings)


def attention_case(
    rng, batch=2, t_q=3, t_k=None, n_heads=2, n_kv_heads=None, d_head=4, causal=True, window=None, softcap=None
):
    t_k, kv = t_k or t_q, n_kv_heads or n_heads
    kind = ("causal" if causal else "full") + (", grouped" if kv < n_heads else "") + (", Tq < Tk" if t_k > t_q else "")
    inputs = {
        "q": rng.normal(size=(batch * t_q, n_heads * d_head)),
        "k": rng.normal(size=(batch * t_k, kv * d_head)),
        "v": rng.normal(size=(batch * t_k, kv * d_head)),
    }
    settings = {"batch": batch, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "causal": causal}
    for name, value, word in (("window", window, "window"), ("softcap", softcap, "cap")):
        if value is not None:
            settings[name] = value
            kind += f", {word}"
    return Case(f"attention ({kind})", "attention", inputs, settings)


def cross_entropy_case(rng, rows=5, vocab=7, dense=False, scale=2.0):
    if dense:
        labels = rng.dirichlet(np.ones(vocab), rows) * rng.uniform(0.5, 2, (rows, 1))  # rows need not sum to 1
        labels[rows // 2 + 1 :][:1] = 0  # a row that is not counted
    else:
        labels = rng.integers(0, vocab, rows)
        labels[rows // 2 + 1 :][:1] = -1
    layer = "cross_entropy (dense rows)" if dense else "cross_entropy"
    return Case(layer, "cross_entropy", {"logits": scale * rng.normal(size=(rows, vocab))}, {"labels": labels})


def elementwise_case(op, rng, rows=4, d=6):
    """The case of an op that has no function of its own here: every argument without a default is a matrix (rows, d)."""
    arguments = inspect.signature(getattr(reference, op)).parameters.values()
    inputs = {a.name: 2 * rng.normal(size=(rows, d)) for a in arguments if a.default is a.empty}
    return Case(op, op, inputs)


def case_of(op, rng, **sizes):
    """A case of any op; sizes: of its `..._case` function."""
    own = globals().get(f"{op}_case")
    return own(rng, **sizes) if own is not None else elementwise_case(op, rng, **sizes)


def differentiable_ops():
    """The names of the ops that have a backward, in the order of the reference table."""
    names = [name.removesuffix("_backward") for name in vars(reference) if name.endswith("_backward")]
    return [name for name in names if name not in reference.PARTS]


def op_cases(rng):
    """At least one case of every differentiable op."""
    variants: dict[str, list[dict[str, Any]]] = {
        "linear": [{}, {"bias": False}],
        "rope": [{}, {"halves": True, "scaled": True}],
        "attention": [
            {},
            {"causal": False},
            {"n_heads": 4, "n_kv_heads": 2},
            {"t_q": 2, "t_k": 5},
            {"t_q": 5, "window": 3, "softcap": 1.5},
        ],
        "cross_entropy": [{}, {"dense": True}],
    }
    for op in differentiable_ops():
        for sizes in variants.get(op, [{}]):
            yield case_of(op, rng, **sizes)


# ----------------------------------------------------------------------------------------------------------------------
# running and checking them
# ----------------------------------------------------------------------------------------------------------------------


def in_dtype(case, dtype):
    """The case with every float array in dtype."""
    inputs = {name: array.astype(dtype) for name, array in case.inputs.items()}
    settings = {
        name: value.astype(dtype) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        for name, value in case.settings.items()
    }
    return case._replace(inputs=inputs, settings=settings)


def forward(case, ops):
    """-> (out, cache)"""
    return getattr(ops, case.op)(**case.inputs, **case.settings)


def backward(case, ops, d_out, cache, gradients=None):
    """-> {input: gradient}. gradients: the arrays that the parameters' gradients are added into; default: zeros."""
    gradients = gradients or {name: np.zeros_like(case.inputs[name]) for name in case.parameters}
    op_backward = getattr(ops, f"{case.op}_backward")
    if case.op == "cross_entropy":  # the loss is where d_out begins, so its backward takes none
        returned = (d_out * op_backward(cache),)
    else:
        returned = op_backward(d_out, cache, *(gradients[name] for name in case.parameters))
        returned = returned if isinstance(returned, tuple) else (returned,)
    activations = [name for name in case.inputs if name not in case.parameters]
    return dict(zip(activations, returned)) | gradients


def random_cotangent(case, rng):
    """A random gradient of the loss with respect to the output of a case; a float when the output is a loss."""
    out, _ = forward(case, reference)
    return rng.normal(size=out.shape) if isinstance(out, np.ndarray) else float(rng.uniform(0.5, 2))


def check_op(case, rng):
    """Rows for the reference op, in float64, against central differences."""
    cotangent = random_cotangent(case, rng)
    _, cache = forward(case, reference)
    gradients = backward(case, reference, cotangent, cache)
    for name, x in case.inputs.items():
        measured = central_difference(lambda _: forward(case, reference)[0], x, cotangent)
        yield _row(case.layer, name, x.shape, relative_error(gradients[name], measured), DERIVATIVE_BAR)


def check_twin(case, rng, ops):
    """Rows for another float32 op table against the reference op: the output first, then every gradient."""
    cotangent = random_cotangent(case, rng)
    case = in_dtype(case, np.float32)
    if isinstance(cotangent, np.ndarray):
        cotangent = cotangent.astype(np.float32)
    expected_out, expected_cache = forward(case, reference)
    given_out, given_cache = forward(case, ops)
    expected = backward(case, reference, cotangent, expected_cache)
    given = backward(case, ops, cotangent, given_cache)
    layer = case.layer + _TWIN
    yield _row(layer, "(output)", np.shape(expected_out), error_of_max(given_out, expected_out), TWIN_BAR)
    for name, gradient in expected.items():
        yield _row(layer, name, gradient.shape, error_of_max(given[name], gradient), TWIN_BAR)


# ----------------------------------------------------------------------------------------------------------------------
# whole models
# ----------------------------------------------------------------------------------------------------------------------


def random_parameters(tree, rng):
    """Overwrite a parameter tree with numbers that make every path matter.

    At the usual initialisation (std 0.02, biases 0, gains 1) attention is almost uniform and a forgotten bias or gain
    changes nothing. Here embeddings and vectors have std 1 and matrices 1/sqrt(in), so that all activations have size 1.
    """
    for name, array in tree.items():
        std = array.shape[1] ** -0.5 if array.ndim == 2 and "embed" not in name and "embd" not in name else 1.0
        array[...] = std * rng.normal(size=array.shape)


def check_model(model, rng, batch=2, entries=4, layer=None):
    """Rows for `entries` random elements of every parameter of a float64 model; the gradient of the logits is random.

    layer: the model's name in the rows, None = that of its class.
    """
    random_parameters(model.parameters, rng)
    shape = model.batch_type(model.config, batch, model.config.context_length)
    first, _ = shape.random(rng)
    inputs = {
        role: array.astype(np.float64) if array.dtype.kind == "f" else array
        for role, array in shape.check(first).items()
    }
    inputs["batch"] = batch
    cotangent = rng.normal(size=(shape.n_rows, shape.n_classes))
    gradients = model.new_gradients()
    _, cache = model.forward_rows(**inputs)
    model.backward_rows(cotangent, cache, gradients)
    for name, weight in model.parameters.items():
        chosen = rng.choice(weight.size, min(entries, weight.size), replace=False)
        measured = central_difference(lambda _: model.forward_rows(**inputs)[0], weight, cotangent, chosen)
        error = relative_error(gradients[name].ravel()[chosen], measured, scale=np.abs(gradients[name]).max())
        yield _row(layer or type(model).__name__, name, weight.shape, error, DERIVATIVE_BAR)


def small_models():
    """(name, model): one small model of every kind, in float64 on the reference ops."""
    options: dict[str, Any] = {"ops": reference, "dtype": np.float64}
    for row in ARCHITECTURES.values():
        yield row.model.__name__, row.model(row.tiny, **options)
    llama = cast(LlamaConfig, ARCHITECTURES["llama"].tiny)
    untied = dataclasses.replace(llama, head_dim=6, untied=True, qkv_bias=True)
    adapters = {"blk.0.attn_q.lora_a": (2, 8), "blk.0.attn_q.lora_b": (8, 2)}
    with_adapters = ParameterTree.zeros(Llama.parameter_shapes(llama) | adapters, np.float64)
    yield "Llama (untied, biases)", Llama(untied, **options)
    yield "Llama (LoRA on q)", Llama(llama, parameters=with_adapters, lora_scale=0.5, ops=reference)


def check_all(seed=0, layers=()):
    """Every op, every model, and the compiled ops when they are built -> list of `Row`. layers: as `chosen_checks`."""
    return [row for check in chosen_checks(seed, layers) for row in check()]


def chosen_checks(seed=0, layers=()):
    """A list of functions, each of which checks a layer and gives its rows.

    layers: parts of the names of the layers to check, in capitals or not; none = all. Every layer has random numbers of its
    own, so its rows are the same whichever others are checked. Raises ValueError for a part that is in no name.
    """
    checks = list(_checks(seed))
    for part in layers:
        if not any(part.lower() in name.lower() for name, _ in checks):
            raise ValueError(f"no layer has {part!r} in its name; there are {', '.join(name for name, _ in checks)}")
    return [check for name, check in checks if not layers or any(part.lower() in name.lower() for part in layers)]


def _checks(seed):
    """(name of a layer, function that gives its rows), in the order of the table."""
    cases = list(op_cases(np.random.default_rng(seed)))

    def of(name, check, *arguments, **named):
        return name, partial(check, *arguments, rng=np.random.default_rng([seed, *name.encode()]), **named)

    yield from (of(case.layer, check_op, case) for case in cases)
    yield from (of(name, check_model, model, layer=name) for name, model in small_models())
    try:
        from toy.ops import accelerated
    except ImportError:
        return
    yield from (of(case.layer + _TWIN, check_twin, case, ops=accelerated) for case in cases)


class Summary(NamedTuple):
    """What is said of a layer on one line."""

    layer: str
    worst: Row | None  # against central differences; None: not among the rows
    compiled: Row | None  # the worst of the compiled op against the reference op, None: there is none
    n_wrong: int

    @property
    def ok(self):
        return self.n_wrong == 0


def by_layer(rows):
    """A `Summary` of each layer, its compiled twin in the same one, in the order of the rows. NaN is the worst error."""
    layers: dict[str, list[Row]] = {}
    for row in rows:
        layers.setdefault(row.layer.removesuffix(_TWIN), []).append(row)

    def worst(of_layer, twin):
        those = [row for row in of_layer if row.layer.endswith(_TWIN) == twin]
        return max(those, key=lambda row: (not row.ok, np.nan_to_num(row.rel_error, nan=np.inf)), default=None)

    return [
        Summary(layer, worst(of_layer, False), worst(of_layer, True), sum(not row.ok for row in of_layer))
        for layer, of_layer in layers.items()
    ]


def _row(layer, gradient, shape, error, bar):
    return Row(layer, gradient, tuple(shape), error, bar, bool(error <= bar))  # NaN is not ok
