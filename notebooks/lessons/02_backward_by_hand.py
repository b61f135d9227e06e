# %% [markdown]
# # 2. The backward pass by hand
#
# Training changes every weight a little in the direction that lowers the loss. That direction is the gradient: for each
# weight, how fast the loss changes when this weight changes. The *backward pass* computes all of them at once.
#
# Nothing here is automatic. For each layer you see the formula, the forward, the backward, and a check that asks the
# forward itself whether the backward is right. Then the layers are chained into the backward of a whole model, and the
# result is compared with `model.backward`.
#
# Everything is computed in float64, because a check needs more digits than training does.
#
# **You will be able to**
#
# * derive the backward of a layer and write it down with the right shapes;
# * measure a derivative, and say from the error whether a backward is right;
# * chain the layers into the backward of a whole model.
#
# **Before**: [lesson 1](01_forward_by_hand.ipynb), and the chain rule of
# [lesson 0](00_from_counting_to_training.ipynb). **Time**: 60 minutes to read, 4 hours with the eight exercises. Nobody
# has to do all of them.

# %%
import inspect
from pydoc_data.topics import topics
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

import toy
from toy.checks.gradcheck import central_difference, check_model, relative_error
from toy.data import CharTokenizer
from toy.ops import reference as ops  # the textbook operations: plain numpy, one small function each
from toy.plots import lesson_style, smooth

lesson_style()
np.set_printoptions(precision=3, suppress=True, linewidth=110)
rng = np.random.default_rng(0)


# %% [markdown]
# ## Two rules
#
# Write $\mathrm{d\_x}$ for the gradient of the loss with respect to $x$. It has the shape of $x$. Two rules are enough
# for a whole transformer:
#
# 1. **Chain rule.** A layer $y = f(x)$ receives $\mathrm{d\_y}$ from above and hands down
#    $\mathrm{d\_x}_i = \sum_j \mathrm{d\_y}_j \, \partial y_j / \partial x_i$.
# 2. **Sum rule.** A value that is used twice gets a gradient from each use, and they are added.
#
# So each forward function returns `(out, cache)`, and its backward takes `d_out` and the cache. The cache holds
# what the backward needs to know about the forward.
#
# ## How to check a derivative
#
# A derivative can be measured: move $x$ a little to both sides and look at the difference,
# $f'(x) \approx \frac{f(x+h) - f(x-h)}{2h}$. How small should $h$ be? If it is large, the curve bends in between. If it
# is tiny, the two values agree in nearly all their digits, and the difference is made of rounding errors.


# %% alt="Error of a measured slope over the step h from 1e-12 to 1: the one-sided difference is best near 1e-8, the central one near 1e-5 with an error of about 1e-11; to the left of that both get worse by rounding"
def slope_errors(x, steps):
    """Errors of the measured slope of tanh at x, for two ways to measure it."""
    exact = 1 - np.tanh(x) ** 2
    one_sided = (np.tanh(x + steps) - np.tanh(x)) / steps
    central = (np.tanh(x + steps) - np.tanh(x - steps)) / (2 * steps)
    return abs(one_sided - exact), abs(central - exact)


steps = np.logspace(-12, 0, 80)
one_sided, central = slope_errors(0.7, steps)

fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
ax.loglog(steps, one_sided, "--", label="one-sided: (f(x+h) - f(x)) / h")
ax.loglog(steps, central, label="central: (f(x+h) - f(x-h)) / 2h")
ax.set(
    xlabel="step h",
    ylabel="error of the slope",
    title="Measuring the slope of tanh at 0.7 in float64",
)
ax.legend()
plt.show()

for name, errors in (("one-sided", one_sided), ("central", central)):
    exact = 1 - np.tanh(0.7) ** 2
    print(f"{name:9} best at h = {steps[errors.argmin()]:.0e}: {-np.log10(errors.min() / exact):.0f} digits")


# %% [markdown]
# At its best point, which is printed, the central difference has several digits more. `toy.checks.gradcheck.central_difference` takes three
# values of $h$ and combines them so that the bending cancels, which gives a few digits more.
#
# A layer has many outputs, but a slope needs one number. So the check draws random weights $c$, one per output, and
# measures the gradient of $L = \sum_j c_j\,y_j$. The backward should give the same when it is handed `d_y = c`.


# %%
def check(name, given, f, x, c):
    """Compare `given`, the gradient from a backward, with the measured gradient of sum(c * f(x)) at x."""
    measured = central_difference(f, x, c)  # varies the elements of x one by one
    error = relative_error(given, measured)
    print(f"{name:8} {x.shape!s:9} relative error {error:.0e}   {'ok' if error < 1e-7 else 'WRONG'}")


# %% [markdown]
# Each layer below has its derivation, folded away: click on it. A derivation ends in a line of `toy/ops/reference.py`, which
# is the code that trains. The cell after it looks whether that line stands there, and whether its number is the measured one.


# %%
def ends_in(function, *lines):
    """Show lines of a function of the library, with their numbers in its file; fails where one is not there."""
    source, first = inspect.getsourcelines(function)
    stripped = [line.strip() for line in source]
    for line in lines:
        assert line in stripped, f"{function.__name__} has no line {line!r}"
        print(f"toy/ops/reference.py, line {first + stripped.index(line)}:  {line}")


def assert_same(given, expected):
    """Two computations of one thing, which differ by rounding at most."""
    assert np.abs(given - expected).max() < 1e-12 * max(1, np.abs(expected).max())


def jacobian(f, x):
    """dy_j / dx_i of a function of a vector, measured: (outputs, inputs)"""
    outputs = f(x).size
    return np.stack([central_difference(f, x, c) for c in np.eye(outputs)])


# %% [markdown]
# ## Linear
#
# $$y = x W^\top \qquad\Rightarrow\qquad \mathrm{d\_x} = \mathrm{d\_y}\, W, \qquad \mathrm{d\_W} = \mathrm{d\_y}^\top x$$
#
# The shapes leave hardly any choice: `d_x` must be `(N, in)`, and `d_y` is `(N, out)`, `W` is `(out, in)`. For `d_W`,
# each row of `x` contributes one outer product, and the matrix product adds them over the rows.


# %% [markdown] exercise="linear_backward"
# Each shape fits in one way only. The gradients of weight and bias are *added* to `d_weight` and `d_bias`, with `+=`.
# The bias is added to every row, so its gradient is a sum over rows.


# %%
def linear(x, w):
    """x (N, in), w (out, in) -> (N, out)"""
    return x @ w.T, (x, w)


def linear_backward(d_y, cache):
    x, w = cache
    d_x = d_y @ w  # (N, out) @ (out, in) -> (N, in)
    d_w = d_y.T @ x  # (out, N) @ (N, in) -> (out, in)
    return d_x, d_w


x, w = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
y, cache = linear(x, w)
c = rng.normal(size=y.shape)
d_x, d_w = linear_backward(c, cache)

check("d_x", d_x, lambda x: linear(x, w)[0], x, c)
check("d_w", d_w, lambda w: linear(x, w)[0], w, c)


# %% [markdown]
# <details>
# <summary>Derivation: linear</summary>
#
# Write out one output: $y_{no} = \sum_i x_{ni} W_{oi}$. Then
#
# $$\frac{\partial y_{no}}{\partial x_{mi}} = \delta_{nm} W_{oi}, \qquad \frac{\partial y_{no}}{\partial W_{pi}} = \delta_{op}\, x_{ni},$$
#
# where $\delta$ is 1 for equal indices and 0 otherwise. The chain rule sums over all outputs, and each $\delta$ ends one of the
# two sums:
#
# $$\mathrm{d\_x}_{mi} = \sum_{n,o} \mathrm{d\_y}_{no}\, \delta_{nm} W_{oi} = \sum_o \mathrm{d\_y}_{mo} W_{oi},
# \qquad
# \mathrm{d\_W}_{pi} = \sum_{n,o} \mathrm{d\_y}_{no}\, \delta_{op}\, x_{ni} = \sum_n \mathrm{d\_y}_{np}\, x_{ni}.$$
#
# A sum over a shared index is a matrix product: over $o$ it is $\mathrm{d\_y}\,W$, over the rows $n$ it is
# $\mathrm{d\_y}^\top x$. A bias is added to every row, so its gradient is the sum of $\mathrm{d\_y}$ over the rows.
#
#     d_weight += d_y.T @ cache.x
#     return d_y @ cache.weight
#
# </details>

# %%
ends_in(
    ops.linear_backward,
    "d_weight += d_y.T @ cache.x  # (out, N) @ (N, in)",
    "return d_y @ cache.weight  # (N, out) @ (out, in)",
)
measured = jacobian(lambda row: row @ w.T, x[0])  # of one row: W itself
assert_same(measured.round(9), w.round(9))
in_the_library = np.zeros_like(w)
assert_same(ops.linear_backward(c, ops.linear(x, w)[1], in_the_library), d_x)
assert_same(in_the_library, d_w)


# %% [markdown]
# ## Embedding
#
# The forward copies rows of a table, so the backward adds the gradients of the copies to the rows they came from. A
# token that occurs twice collects two gradients (the sum rule); a token that does not occur gets zero. Note
# `np.add.at`: the shorter `d_table[ids] += d_out` would count a repeated token only once.


# %% [markdown] exercise="embedding_backward"
# `np.add.at(d_table, ids, d_out)` adds every row, also where an id occurs twice.


# %%
def embedding(ids, table):
    """ids (N,), table (V, D) -> (N, D)"""
    return table[ids], (ids, table.shape)


def embedding_backward(d_out, cache):
    ids, shape = cache
    d_table = np.zeros(shape)
    np.add.at(d_table, ids, d_out)
    return d_table


ids = np.array([2, 0, 2, 4])
table = rng.normal(size=(5, 3))
out, cache = embedding(ids, table)
c = rng.normal(size=out.shape)
d_table = embedding_backward(c, cache)

check("d_table", d_table, lambda table: embedding(ids, table)[0], table, c)
print(d_table)


# %% [markdown]
# ## RMSNorm
#
# With $\hat x = x / \mathrm{rms}(x)$ and $y = \gamma \odot \hat x$, row by row:
#
# $$\mathrm{d\_\gamma} = \sum_{\text{rows}} \mathrm{d\_y} \odot \hat x, \qquad
# \mathrm{d\_\hat x} = \gamma \odot \mathrm{d\_y}, \qquad
# \mathrm{d\_x} = \frac{1}{\mathrm{rms}(x)} \Big(\mathrm{d\_\hat x} - \hat x \cdot \tfrac{1}{D}\textstyle\sum_i \mathrm{d\_\hat x}_i\, \hat x_i\Big)$$
#
# The second term is there because every $x_i$ also changes the rms of its whole row. It removes the part of the
# gradient that points along $\hat x$: making a row longer does not change a normalised row.


# %% [markdown] exercise="rms_norm_backward"
# The mean in the bracket is one number for each row, so `keepdims=True`. `d_gamma` sums over the rows.


# %%
def rms_norm(x, gamma, eps=1e-5):
    """x (N, D), gamma (D,) -> (N, D)"""
    rms = np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)  # (N, 1)
    x_hat = x / rms
    return x_hat * gamma, (x_hat, rms, gamma)


def rms_norm_backward(d_y, cache):
    x_hat, rms, gamma = cache
    d_gamma = (d_y * x_hat).sum(axis=0)  # (D,)
    d_x_hat = d_y * gamma
    along = (d_x_hat * x_hat).mean(axis=1, keepdims=True)  # (N, 1)
    d_x = (d_x_hat - x_hat * along) / rms
    return d_x, d_gamma


x, gamma = rng.normal(size=(4, 6)), rng.normal(size=6)
y, cache = rms_norm(x, gamma)
c = rng.normal(size=y.shape)
d_x, d_gamma = rms_norm_backward(c, cache)

check("d_x", d_x, lambda x: rms_norm(x, gamma)[0], x, c)
check("d_gamma", d_gamma, lambda gamma: rms_norm(x, gamma)[0], gamma, c)
print(f"part of d_x along x (not quite zero, because of eps): {np.abs((d_x * x).sum(axis=1)).max():.0e}")

# %% [markdown]
# <details>
# <summary>Derivation: RMSNorm</summary>
#
# One row at a time. Let $r = (\tfrac1D\sum_j x_j^2 + \epsilon)^{-1/2}$ be one over the rms, so that $\hat x_j = r\,x_j$. Every
# element of the row is in $r$:
#
# $$\frac{\partial r}{\partial x_i} = -\tfrac12\, r^3 \cdot \tfrac{2}{D}\, x_i = -\tfrac{1}{D}\, r^2\, \hat x_i .$$
#
# The product rule gives $\partial \hat x_j / \partial x_i = r\,\delta_{ij} + x_j\,\partial r/\partial x_i
# = r\,(\delta_{ij} - \tfrac1D\, \hat x_j\, \hat x_i)$, because $r\,x_j = \hat x_j$. With
# $\mathrm{d\_\hat x} = \gamma \odot \mathrm{d\_y}$ the chain rule is
#
# $$\mathrm{d\_x}_i = \sum_j \mathrm{d\_\hat x}_j\, r\,(\delta_{ij} - \tfrac1D\, \hat x_j \hat x_i)
# = r\,\Big(\mathrm{d\_\hat x}_i - \hat x_i \cdot \tfrac1D \sum_j \mathrm{d\_\hat x}_j\, \hat x_j\Big).$$
#
#     return rstd * (d_x_hat - x_hat * np.mean(d_x_hat * x_hat, axis=1, keepdims=True))
#
# </details>

# %%
ends_in(ops.rms_norm_backward, "return rstd * (d_x_hat - x_hat * np.mean(d_x_hat * x_hat, axis=1, keepdims=True))")
r = 1 / np.sqrt(np.mean(x[0] ** 2) + 1e-5)
x_hat = r * x[0]
measured = jacobian(lambda row: rms_norm(row[None], np.ones(6))[0][0], x[0])
assert np.abs(measured - r * (np.eye(6) - np.outer(x_hat, x_hat) / 6)).max() < 1e-9
assert_same(ops.rms_norm_backward(c, ops.rms_norm(x, gamma)[1], None), d_x)

# %% [markdown]
# ### LayerNorm
#
# LayerNorm also takes the mean out of each row. So there is a second direction in which a row can be moved without a
# change of the result, that of all ones, and the gradient along it is taken out too:
#
# $$\mathrm{d\_x} = \frac{1}{\sigma} \Big(\mathrm{d\_\hat x} - \tfrac{1}{D}\textstyle\sum_i \mathrm{d\_\hat x}_i - \hat x \cdot \tfrac{1}{D}\textstyle\sum_i \mathrm{d\_\hat x}_i\, \hat x_i\Big), \qquad \mathrm{d\_\beta} = \sum_{\text{rows}} \mathrm{d\_y}$$

# %% [markdown] exercise="layer_norm_backward"
# Begin with the backward of RMSNorm. One more mean is subtracted, and there is one more parameter.

# %% [markdown]
# ## GELU
#
# An elementwise function has the simplest backward of all: multiply by its derivative. With
# $u = \sqrt{2/\pi}\,(x + 0.044715\,x^3)$ and $y = \frac{x}{2}(1 + \tanh u)$ the product rule gives
#
# $$\frac{\mathrm{d}y}{\mathrm{d}x} = \tfrac12 (1 + \tanh u) + \tfrac{x}{2}\,(1 - \tanh^2 u)\,\sqrt{2/\pi}\,(1 + 3 \cdot 0.044715\,x^2)$$

# %% [markdown] exercise="gelu_backward"
# A product rule: $y = \frac{x}{2} (1 + \tanh u)$ has `x` in two places. The derivative of tanh is $1 - \tanh^2$, and
# that of $u$ is the last bracket of the formula.

# %%
SCALE, CUBIC = np.sqrt(2 / np.pi), 0.044715


def gelu(x):
    """x (N, F) -> (N, F)"""
    return 0.5 * x * (1 + np.tanh(SCALE * (x + CUBIC * x**3))), x


def gelu_backward(d_y, cache):
    x = cache
    tanh = np.tanh(SCALE * (x + CUBIC * x**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * SCALE * (1 + 3 * CUBIC * x**2)
    return d_y * slope


x = 2 * rng.normal(size=(4, 6))
y, cache = gelu(x)
c = rng.normal(size=y.shape)
check("d_x", gelu_backward(c, cache), lambda x: gelu(x)[0], x, c)


# %% [markdown]
# <details>
# <summary>Derivation: GELU</summary>
#
# $y = \tfrac{x}{2}(1 + \tanh u)$ is a product of $\tfrac x2$ and $1 + \tanh u$. The product rule takes each factor's slope once:
#
# $$\frac{\mathrm{d}y}{\mathrm{d}x} = \tfrac12(1 + \tanh u) + \tfrac{x}{2}\,\frac{\mathrm{d}\tanh u}{\mathrm{d}u}\,\frac{\mathrm{d}u}{\mathrm{d}x}.$$
#
# The slope of the tanh is $1 - \tanh^2 u$, and that of $u = \sqrt{2/\pi}\,(x + 0.044715\,x^3)$ is
# $\sqrt{2/\pi}\,(1 + 3\cdot 0.044715\,x^2)$, which the code calls `d_inner`. An output depends on its own input alone, so the
# chain rule has a single term: $\mathrm{d\_x} = \mathrm{d\_y}\cdot \mathrm{d}y/\mathrm{d}x$.
#
#     d_inner = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * x * x)
#     return d_y * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * d_inner)
#
# </details>

# %%
ends_in(
    ops.gelu_backward,
    "d_inner = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * x * x)",
    "return d_y * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * d_inner)",
)
measured = jacobian(lambda row: gelu(row)[0], x[0])
assert np.abs(measured - np.diag(np.diag(measured))).max() < 1e-9  # an output depends on its own input alone
assert_same(ops.gelu_backward(c, ops.gelu(x)[1]), gelu_backward(c, x))


# %% [markdown]
# ## Softmax
#
# $$p_i = \frac{e^{s_i}}{\sum_j e^{s_j}} \qquad\Rightarrow\qquad \mathrm{d\_s}_i = p_i \Big(\mathrm{d\_p}_i - \textstyle\sum_j \mathrm{d\_p}_j\, p_j\Big)$$
#
# As in the norm, one input changes all outputs of its row, and as in the norm, something is subtracted: a constant
# added to all scores changes nothing, so the gradient of a row always sums to zero.


# %% [markdown] exercise="softmax_backward"
# The sum over `j` is one number for each row: sum over the last axis, and keep it.


# %%
def softmax(s):
    """s (..., n) -> (..., n); each row sums to 1"""
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_backward(d_p, p):
    return p * (d_p - (d_p * p).sum(axis=-1, keepdims=True))


s = rng.normal(size=(3, 5))
c = rng.normal(size=s.shape)
d_s = softmax_backward(c, softmax(s))
check("d_s", d_s, softmax, s, c)
print(f"largest sum of a row of d_s: {np.abs(d_s.sum(axis=1)).max():.0e}")

# %% [markdown]
# <details>
# <summary>Derivation: softmax</summary>
#
# With $Z = \sum_k e^{s_k}$ and $p_j = e^{s_j}/Z$: moving $s_i$ changes the numerator of $p_i$ alone, and the $Z$ of every $p_j$,
# where $\partial Z/\partial s_i = e^{s_i}$. So
#
# $$\frac{\partial p_j}{\partial s_i} = \frac{\delta_{ij}\, e^{s_i}}{Z} - \frac{e^{s_j} e^{s_i}}{Z^2} = p_i\,(\delta_{ij} - p_j).$$
#
# The chain rule, with $p_i$ taken out of the sum:
#
# $$\mathrm{d\_s}_i = \sum_j \mathrm{d\_p}_j\, p_i\,(\delta_{ij} - p_j) = p_i\,\Big(\mathrm{d\_p}_i - \sum_j \mathrm{d\_p}_j\, p_j\Big).$$
#
#     return probabilities * (d_probabilities - (d_probabilities * probabilities).sum(axis=-1, keepdims=True))
#
# </details>

# %%
ends_in(
    ops.softmax_backward,
    "return probabilities * (d_probabilities - (d_probabilities * probabilities).sum(axis=-1, keepdims=True))",
)
one = softmax(s[0])
assert np.abs(jacobian(softmax, s[0]) - (np.diag(one) - np.outer(one, one))).max() < 1e-9
assert_same(ops.softmax_backward(c, softmax(s)), d_s)

# %% [markdown]
# Here one sees why the check needs *random* weights $c$. With all ones, $L$ is the sum of the probabilities. That is 1,
# whatever the scores are, so the measured gradient is zero, and a backward that always returns zero would pass.

# %%
for name, weights in [("random", c), ("all ones", np.ones_like(c))]:
    print(f"c {name:9} largest measured gradient: {np.abs(central_difference(softmax, s, weights)).max():.6f}")


# %% [markdown]
# ## Attention
#
# For each head, with $d$ columns per head:
#
# $$s = \frac{q k^\top}{\sqrt d} + \text{mask}, \qquad p = \mathrm{softmax}(s), \qquad \mathrm{out} = p\, v$$
#
# The backward takes these three steps in reverse order. The first and the last are matrix products, so they follow the
# rule of the linear layer, and the middle one is the softmax. A masked pair has $p = 0$ and therefore gets no gradient
# by itself.
#
# $$\mathrm{d\_p} = \mathrm{d\_out}\, v^\top, \quad \mathrm{d\_v} = p^\top \mathrm{d\_out}, \quad
# \mathrm{d\_q} = \frac{\mathrm{d\_s}\, k}{\sqrt d}, \quad \mathrm{d\_k} = \frac{\mathrm{d\_s}^\top q}{\sqrt d}$$


# %%
def split_heads(x, n_heads):
    """(T, n_heads * d) -> (n_heads, T, d)"""
    return x.reshape(len(x), n_heads, -1).transpose(1, 0, 2)


def join_heads(x):
    """(n_heads, T, d) -> (T, n_heads * d)"""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def attention(q, k, v, n_heads):
    """q, k, v (T, n_heads * d) -> (T, n_heads * d), causal"""
    q, k, v = (split_heads(x, n_heads) for x in (q, k, v))
    T, d = q.shape[1:]
    s = q @ k.swapaxes(1, 2) / np.sqrt(d)  # (n_heads, T, T)
    s = np.where(np.triu(np.ones((T, T), dtype=bool), k=1), -np.inf, s)
    p = softmax(s)
    return join_heads(p @ v), (q, k, v, p)


# %% [markdown] exercise="attention_backward"
# From the bottom up: through the product with `v`, through the softmax, through the scaled product of `q` and `k`. The
# scale $1/\sqrt d$ of the forward comes again. `swapaxes(-1, -2)` transposes the last two axes.

# %% [markdown]
# Compare the backward with the forward above, line by line and from the bottom up. The shapes stand beside each line.


# %%
def attention_backward(d_out, cache):
    q, k, v, p = cache
    n_heads, _, d = q.shape
    d_out = split_heads(d_out, n_heads)  # (n_heads, T, d)
    d_p = d_out @ v.swapaxes(1, 2)  # (n_heads, T, T)
    d_v = p.swapaxes(1, 2) @ d_out  # (n_heads, T, d)
    d_s = softmax_backward(d_p, p) / np.sqrt(d)  # (n_heads, T, T)
    d_q = d_s @ k  # (n_heads, T, d)
    d_k = d_s.swapaxes(1, 2) @ q  # (n_heads, T, d)
    return join_heads(d_q), join_heads(d_k), join_heads(d_v)


q, k, v = (rng.normal(size=(5, 8)) for _ in range(3))
out, cache = attention(q, k, v, n_heads=2)
c = rng.normal(size=out.shape)
d_q, d_k, d_v = attention_backward(c, cache)

check("d_q", d_q, lambda q: attention(q, k, v, 2)[0], q, c)
check("d_k", d_k, lambda k: attention(q, k, v, 2)[0], k, c)
check("d_v", d_v, lambda v: attention(q, k, v, 2)[0], v, c)


# %% [markdown]
# <details>
# <summary>Derivation: attention</summary>
#
# Nothing new is needed. One head is three steps, and each has its rule already.
#
# 1. $\mathrm{out} = p\,v$ is a matrix product. By the rule of the linear layer (there $y = xW^\top$; here $x = p$, $W = v^\top$):
#    $\mathrm{d\_p} = \mathrm{d\_out}\,v^\top$ and $\mathrm{d\_v} = p^\top\,\mathrm{d\_out}$.
# 2. $p = \mathrm{softmax}(s)$, row by row: $\mathrm{d\_s} = p \odot (\mathrm{d\_p} - \sum_j \mathrm{d\_p}_j\,p_j)$. Where the
#    mask put $-\infty$ there is $p = 0$, so the factor in front makes $\mathrm{d\_s} = 0$.
# 3. $s = q\,k^\top \cdot d^{-1/2}$ (with $d$ columns in a head): first the number in front, then the product. With
#    $\mathrm{d\_s}$ multiplied by $d^{-1/2}$, the rule of the linear layer ($x = q$, $W = k$) gives
#    $\mathrm{d\_q} = \mathrm{d\_s}\,k$ and $\mathrm{d\_k} = \mathrm{d\_s}^\top q$.
#
# `swapaxes(-1, -2)` is the transpose of every matrix in a stack of them.
#
#     d_scores = softmax_backward(d_probabilities, probabilities)
#     d_scores *= q.shape[-1] ** -0.5
#     return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, d_v
#
# </details>

# %%
ends_in(
    ops.multi_head_attention_backward,
    "d_probabilities = d_out @ v.swapaxes(-1, -2)  # (B, H, Tq, Tk)",
    "d_v = probabilities.swapaxes(-1, -2) @ d_out  # (B, H, Tk, d_head)",
    "d_scores = softmax_backward(d_probabilities, probabilities)  # (B, H, Tq, Tk)",
    "d_scores *= q.shape[-1] ** -0.5",
    "return d_scores @ k, d_scores.swapaxes(-1, -2) @ q, d_v",
)
in_the_library = ops.attention_backward(c, ops.attention(q, k, v, 1, 2)[1])
for theirs, ours in zip(in_the_library, (d_q, d_k, d_v)):
    assert_same(theirs, ours)


# %% [markdown]
# ## Cross-entropy
#
# $$\mathrm{loss} = -\frac1N \sum_{n} \ln p_{n,\,\mathrm{label}_n} \qquad\Rightarrow\qquad
# \mathrm{d\_logits} = \frac{p - \mathrm{onehot}(\mathrm{label})}{N}$$
#
# All the exponentials and logarithms cancel, and what is left says something simple: the gradient of a logit is the
# probability that was given, minus the probability that would have been right.


# %% [markdown] exercise="cross_entropy_backward"
# Softmax minus one-hot, divided by the number of rows. Do not change the arrays of the cache: take a copy.


# %%
def cross_entropy(logits, labels):
    """logits (N, V), labels (N,) -> mean loss in nats"""
    p = softmax(logits)
    return -np.log(p[np.arange(len(labels)), labels]).mean(), (p, labels)


def cross_entropy_backward(cache):
    p, labels = cache
    d_logits = p.copy()
    d_logits[np.arange(len(labels)), labels] -= 1
    return d_logits / len(labels)


logits, labels = 2 * rng.normal(size=(4, 6)), np.array([1, 5, 0, 1])
loss, cache = cross_entropy(logits, labels)
d_logits = cross_entropy_backward(cache)
check("d_logits", d_logits, lambda logits: cross_entropy(logits, labels)[0], logits, 1.0)

# %% [markdown]
# <details>
# <summary>Derivation: cross-entropy</summary>
#
# One row with the label $l$. The logarithm of the softmax takes its fraction apart:
#
# $$-\ln p_l = \ln Z - s_l, \qquad Z = \sum_k e^{s_k}.$$
#
# So $\dfrac{\partial(-\ln p_l)}{\partial s_i} = \dfrac{e^{s_i}}{Z} - \delta_{il} = p_i - \delta_{il}$: the probability, less
# one at the label. The loss is the mean over the $N$ rows that count, so every row's gradient is divided by $N$. A row with the
# label $-1$ does not count, and its gradient is 0.
#
#     d_logits[counted, labels[counted]] -= 1.0
#     return d_logits / probabilities.dtype.type(max(n_counted, 1))
#
# </details>

# %%
ends_in(
    ops.cross_entropy_backward,
    "d_logits[counted, labels[counted]] -= 1.0",
    "return d_logits / probabilities.dtype.type(max(n_counted, 1))",
)
assert_same(ops.cross_entropy_backward(ops.cross_entropy(logits, labels)[1]), d_logits)
with_one_less = np.where(np.arange(4) == 2, -1, labels)  # row 2 does not count
theirs = ops.cross_entropy_backward(ops.cross_entropy(logits, with_one_less)[1])
assert not theirs[2].any()
assert_same(theirs[0], d_logits[0] * 4 / 3)

# %% [markdown]
# In the picture, a step *against* the gradient raises the logit of the label (negative gradient) and lowers all others,
# most of all those that the model wrongly believed in.

# %% alt="On the left the model's probabilities of six tokens beside the label's, which is 1 for token 1; on the right the gradient, their difference: negative for token 1, positive for the others"
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
row, V = 0, logits.shape[1]
left.bar(np.arange(V) - 0.2, softmax(logits)[row], width=0.4, label="given by the model")
left.bar(
    np.arange(V) + 0.2,
    np.eye(V)[labels[row]],
    width=0.4,
    label="label",
    hatch="//",
    edgecolor="white",
)
left.set(xlabel="token id", ylabel="probability", title="One row of the batch")
left.legend(loc="upper right")
right.bar(range(V), d_logits[row] * len(labels), color="#009E73")
right.axhline(0, color="black", lw=1)
right.set(xlabel="token id", ylabel="N x d_logits", title="Its gradient: the difference")
plt.show()

# %% [markdown]
# ## What other models have instead
#
# GPT-2 has a norm with a mean, Llama turns its queries and keys and has a gate in its MLP. Three more backwards, and nearly
# every language model of today is covered. Here are the library's own, checked in the same way.
#
# **LayerNorm**: $y = \gamma \odot \hat x + \beta$ with $\hat x = (x - \mathrm{mean}(x)) / \mathrm{std}(x)$.

# %%
x, gamma, beta = rng.normal(size=(4, 6)), rng.normal(size=6), rng.normal(size=6)
y, cache = ops.layer_norm(x, gamma, beta)
c = rng.normal(size=y.shape)
check("d_x", ops.layer_norm_backward(c, cache, None, None), lambda x: ops.layer_norm(x, gamma, beta)[0], x, c)

# %% [markdown]
# <details>
# <summary>Derivation: LayerNorm</summary>
#
# One row at a time. Centre it first: $z_j = x_j - \mu$ with $\mu = \tfrac1D\sum_k x_k$, so that
# $\partial z_j/\partial x_i = \delta_{ij} - \tfrac1D$. Then $\hat x$ is the RMSNorm of $z$, because the variance of $x$ is the
# mean square of $z$. From the derivation of RMSNorm
#
# $$\mathrm{d\_z}_j = r\,\Big(\mathrm{d\_\hat x}_j - \hat x_j \cdot \tfrac1D \sum_k \mathrm{d\_\hat x}_k\,\hat x_k\Big),$$
#
# and the chain rule through the centring subtracts the mean of $\mathrm{d\_z}$:
#
# $$\mathrm{d\_x}_i = \sum_j \mathrm{d\_z}_j\,(\delta_{ij} - \tfrac1D) = \mathrm{d\_z}_i - \tfrac1D \sum_j \mathrm{d\_z}_j .$$
#
# The second part of $\mathrm{d\_z}$ has mean 0, since $\sum_j \hat x_j = 0$. Only the mean of $\mathrm{d\_\hat x}$ is left to
# subtract. So there are two projections, one for the mean and one for the length:
#
#     d_x_hat - d_x_hat.mean(axis=1, keepdims=True) - x_hat * np.mean(d_x_hat * x_hat, axis=1, keepdims=True)
#
# </details>

# %%
ends_in(
    ops.layer_norm_backward,
    "d_x_hat - d_x_hat.mean(axis=1, keepdims=True) - x_hat * np.mean(d_x_hat * x_hat, axis=1, keepdims=True)",
)
centred = x[0] - x[0].mean()
r = 1 / np.sqrt(np.mean(centred**2) + 1e-5)
measured = jacobian(lambda row: ops.layer_norm(row[None], np.ones(6), np.zeros(6))[0][0], x[0])
derived = r * (np.eye(6) - 1 / 6 - r * r * np.outer(centred, centred) / 6)
assert np.abs(measured - derived).max() < 1e-9

# %% [markdown]
# **RoPE** turns each pair of numbers of a query or key by an angle $\theta$, which is its position times the pair's frequency:
# $y_1 = x_1\cos\theta - x_2\sin\theta$ and $y_2 = x_1\sin\theta + x_2\cos\theta$.

# %%
x, positions = rng.normal(size=(5, 8)), np.arange(5)
y, cache = ops.rope(x, positions, n_heads=2)
c = rng.normal(size=y.shape)
check("d_x", ops.rope_backward(c, cache), lambda x: ops.rope(x, positions, 2)[0], x, c)

# %% [markdown]
# <details>
# <summary>Derivation: RoPE</summary>
#
# A pair goes through a matrix that does not depend on it, $y = R\,x$ with
# $R = \begin{pmatrix}\cos\theta & -\sin\theta\\ \sin\theta & \cos\theta\end{pmatrix}$. So $\partial y_j/\partial x_i = R_{ji}$ and
#
# $$\mathrm{d\_x}_i = \sum_j \mathrm{d\_y}_j\,R_{ji} = (R^\top\,\mathrm{d\_y})_i .$$
#
# The transpose of $R$ is $R$ with the sign of the sine changed: a turn back by the same angle. Nothing is trained here, so there is no
# other gradient. The length of a pair's gradient stays what it was.
#
#     return _rotate_pairs(d_y, cache.cos, -cache.sin, cache.halves)
#
# </details>

# %%
ends_in(ops.rope_backward, "return _rotate_pairs(d_y, cache.cos, -cache.sin, cache.halves)")
theta = 3.0  # position 3, and the first pair of a head has frequency 1
turn = np.array([[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]])
assert_same(y[3, :2], turn @ x[3, :2])
assert_same(ops.rope_backward(c, cache)[3, :2], turn.T @ c[3, :2])
assert_same(np.linalg.norm(ops.rope_backward(c, cache)), np.linalg.norm(c))

# %% [markdown]
# **SwiGLU** multiplies one linear layer's output by a bent gate: $y = \mathrm{silu}(g) \odot u$ with
# $\mathrm{silu}(g) = g\,\sigma(g)$ and $\sigma(g) = 1/(1 + e^{-g})$.

# %%
gate, up = 2 * rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
y, cache = ops.swiglu(gate, up)
c = rng.normal(size=y.shape)
d_gate, d_up = ops.swiglu_backward(c, cache)
check("d_gate", d_gate, lambda gate: ops.swiglu(gate, up)[0], gate, c)
check("d_up", d_up, lambda up: ops.swiglu(gate, up)[0], up, c)

# %% [markdown]
# <details>
# <summary>Derivation: SwiGLU</summary>
#
# $y = g\,\sigma\,u$ with $\sigma = \sigma(g)$, element by element. For $u$ the rest is a constant:
# $\mathrm{d\_u} = \mathrm{d\_y}\; g\,\sigma$. For $g$, first the slope of the sigmoid:
#
# $$\sigma'(g) = \frac{e^{-g}}{(1 + e^{-g})^2} = \sigma\,\frac{e^{-g}}{1 + e^{-g}} = \sigma\,(1 - \sigma).$$
#
# The product rule for $g\,\sigma$ gives $\sigma + g\,\sigma(1-\sigma) = \sigma\,\big(1 + g\,(1 - \sigma)\big)$, and so
#
# $$\mathrm{d\_g} = \mathrm{d\_y}\; u\; \sigma\,\big(1 + g\,(1-\sigma)\big).$$
#
#     d_gate = d_y * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
#     return d_gate, d_y * gate * sigmoid
#
# </details>

# %%
ends_in(
    ops.swiglu_backward,
    "d_gate = d_y * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))",
    "return d_gate, d_y * gate * sigmoid",
)
sigmoid = 1 / (1 + np.exp(-gate))
assert_same(d_gate, c * up * sigmoid * (1 + gate * (1 - sigmoid)))
assert_same(d_up, c * gate * sigmoid)

# %% [markdown]
# ## The residual stream
#
# The last piece is the addition $y = x + f(x)$ around each half block. The gradient of a sum goes unchanged to both
# summands. But $x$ was used twice, once directly and once through $f$, so its two gradients are added:
# `d_x = d_y + f_backward(d_y)`. The direct part is why deep models can be trained: it reaches the lowest block
# undamped.

# %%
x, w = rng.normal(size=(5, 4)), rng.normal(size=(4, 4))
branch, cache = linear(x, w)
y = x + branch
c = rng.normal(size=y.shape)

d_branch, _ = linear_backward(c, cache)
d_x = c + d_branch
check("d_x", d_x, lambda x: x + linear(x, w)[0], x, c)

# %% [markdown]
# ## A whole backward
#
# Now the pieces are chained. First the forward of notebook 1 with our own functions, this time keeping all the caches.
# The model has two blocks.

# %%
text = "the cat sat on the mat"
tokenizer = CharTokenizer.from_text(text)
ids = tokenizer.encode(text)
token_ids, labels = ids[:-1], ids[1:]
T, V = len(token_ids), tokenizer.vocab_size
n_heads = 2

model = toy.TransformerLM(
    V,
    d_model=16,
    d_ff=32,
    n_heads=n_heads,
    n_layers=2,
    context_length=24,
    seed=0,
    init_scale=10,
    ops=ops,
    dtype=np.float64,
)
p = model.parameters


# %%
def block_forward(x, block):
    """x (T, D) -> x (T, D), caches"""
    h, norm1 = rms_norm(x, block.norm1_gamma)
    q, to_q = linear(h, block.w_q)
    k, to_k = linear(h, block.w_k)
    v, to_v = linear(h, block.w_v)
    a, attend = attention(q, k, v, n_heads)
    a, to_out = linear(a, block.w_o)
    x = x + a
    h, norm2 = rms_norm(x, block.norm2_gamma)
    f, ff1 = linear(h, block.w_ff1)
    f, bend = gelu(f)
    f, ff2 = linear(f, block.w_ff2)
    return x + f, (norm1, to_q, to_k, to_v, attend, to_out, norm2, ff1, bend, ff2)


token, token_cache = embedding(token_ids, p.token_embed)
position, position_cache = embedding(np.arange(T), p.pos_embed)
x = token + position
x, cache0 = block_forward(x, p.blocks[0])
x, cache1 = block_forward(x, p.blocks[1])
x, norm_cache = rms_norm(x, p.norm_final_gamma)
logits, unembed_cache = linear(x, p.token_embed)
loss, loss_cache = cross_entropy(logits, labels)
print(f"loss {loss:.6f}")


# %% [markdown]
# The backward of a block is its forward read from the bottom to the top. Look for the three places where the sum rule
# applies: twice around a half block, and once where `h` was read by three linear layers.


# %%
def block_backward(d_x, caches, name, grads):
    """d_x: gradient of the block's output (T, D) -> gradient of its input (T, D). Fills grads."""
    norm1, to_q, to_k, to_v, attend, to_out, norm2, ff1, bend, ff2 = caches

    d_f, grads[name + "w_ff2"] = linear_backward(d_x, ff2)
    d_f = gelu_backward(d_f, bend)
    d_h, grads[name + "w_ff1"] = linear_backward(d_f, ff1)
    d_h, grads[name + "norm2_gamma"] = rms_norm_backward(d_h, norm2)
    d_x = d_x + d_h

    d_a, grads[name + "w_o"] = linear_backward(d_x, to_out)
    d_q, d_k, d_v = attention_backward(d_a, attend)
    d_h_q, grads[name + "w_q"] = linear_backward(d_q, to_q)
    d_h_k, grads[name + "w_k"] = linear_backward(d_k, to_k)
    d_h_v, grads[name + "w_v"] = linear_backward(d_v, to_v)
    d_h, grads[name + "norm1_gamma"] = rms_norm_backward(d_h_q + d_h_k + d_h_v, norm1)
    return d_x + d_h


# %% [markdown]
# And the chain from the loss down to the embeddings. The table `token_embed` was used at both ends, so it has two
# gradients, and the last line adds them.

# %%
by_hand = {}
d_logits = cross_entropy_backward(loss_cache)
d_x, d_embed_as_output = linear_backward(d_logits, unembed_cache)
d_x, by_hand["norm_final_gamma"] = rms_norm_backward(d_x, norm_cache)
d_x = block_backward(d_x, cache1, "blocks.1.", by_hand)
d_x = block_backward(d_x, cache0, "blocks.0.", by_hand)
by_hand["pos_embed"] = embedding_backward(d_x, position_cache)
d_embed_as_input = embedding_backward(d_x, token_cache)
by_hand["token_embed"] = d_embed_as_input + d_embed_as_output  # one table, used twice

# %% [markdown]
# `model.backward` puts its gradients into a `Gradients` object, which has the same names and shapes as the parameters.
# In float64, two correct computations of the same thing should agree to about fifteen digits.

# %%
_, cache = model.forward(token_ids)
grads = model.new_gradients()
loss_of_model = model.backward(cache, labels, grads)

print(f"loss by hand {loss:.12f}\nloss of model {loss_of_model:.11f}\n")
for name, gradient in grads.items():
    difference = np.abs(by_hand[name] - gradient).max() / np.abs(gradient).max()
    print(f"{name:22} {gradient.shape!s:9} {'same' if difference < 1e-12 else 'DIFFERENT'}")


# %% [markdown]
# That two computations agree does not prove that both are right. The measured derivative of the *loss* does: we move a
# few weights of every parameter and compare. This is the last word on a backward pass, and it needs nothing but the
# forward.


# %%
def loss_of(_):
    return ops.cross_entropy(model.forward(token_ids)[0], labels)[0]


for name, weight in p.items():
    some = rng.choice(weight.size, size=3, replace=False)
    measured = central_difference(
        loss_of, weight, 1.0, indices=some
    )  # varies the model's own weights, and restores them
    error = relative_error(grads[name].ravel()[some], measured, scale=np.abs(grads[name]).max())
    print(f"{name:22} relative error {error:.0e}   {'ok' if error < 1e-7 else 'WRONG'}")

# %% [markdown]
# ## How large are the gradients?
#
# The norm of a gradient, $\lVert g \rVert = \sqrt{\sum_i g_i^2}$, says how strongly the loss pulls at a parameter. Here
# is a deeper model of eight blocks with the usual small initial weights.

# %% alt="Gradient norms of six matrices over eight blocks on a logarithmic axis: all curves are nearly flat; w_q and w_k lie two orders of magnitude below the rest"
deep = toy.TransformerLM(
    V,
    d_model=32,
    d_ff=128,
    n_heads=4,
    n_layers=8,
    context_length=24,
    seed=0,
    ops=ops,
    dtype=np.float64,
)
deep_grads = deep.new_gradients()
deep.backward(deep.forward(token_ids)[1], labels, deep_grads)

fig, ax = plt.subplots(figsize=(9, 4.8), layout="constrained")
for name, marker in zip(["w_ff1", "w_ff2", "w_v", "w_o", "w_q", "w_k"], "os^vDP"):
    norms = [np.linalg.norm(getattr(block, name)) for block in deep_grads.blocks]
    ax.plot(range(8), norms, marker=marker, markersize=8, label=name)
ax.set(
    xlabel="block (0 reads the embedding)",
    ylabel="gradient norm (nats per unit of weight)",
    yscale="log",
)
ax.set_title("Gradient norms at initialisation")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()


def norms_of(name):
    return np.array([np.linalg.norm(getattr(block, name)) for block in deep_grads.blocks])


for small, large in (("w_q", "w_v"), ("w_k", "w_v"), ("w_q", "w_ff2"), ("w_k", "w_ff2")):
    ratios = norms_of(large) / norms_of(small)
    print(f"{large:5} is pulled {ratios.min():.0f} to {ratios.max():.0f} times as strongly as {small}")
flat = max(norms_of(name).max() / norms_of(name).min() for name in ("w_ff1", "w_ff2", "w_v", "w_o"))
print(f"from block to block the norms of the other four differ by a factor of {flat:.1f} at most")

# %% [markdown]
# Two things to see. The curves are nearly flat: through the residual stream the lowest block is pulled about as strongly as
# the highest. And the queries and keys are pulled far less than the values, and less still than `w_ff2`: the factors are
# printed. Attention is nearly uniform at first, and the gradient of `w_q` is a product with the keys, which are small
# (and the other way round).
#
# One step size for all would hardly move `w_q` and `w_k`. AdamW, the subject of notebook 3, divides each gradient by
# its own size.
#
# ## Weight tying: one gradient, two contributions
#
# The table `token_embed` is used at the bottom (to look up the tokens) and at the top (to score them), so two gradients
# are added. They look quite different. The look-up touches only the characters that occur in the input, while the
# scores compare every position with *all* characters.
#
# We add two characters to the vocabulary that are not in the text, to see this.

# %%
wide_tokenizer = CharTokenizer.from_text(text + "xz")
wide_ids = wide_tokenizer.encode(text)
wide = toy.TransformerLM(
    wide_tokenizer.vocab_size,
    d_model=16,
    d_ff=32,
    n_heads=2,
    n_layers=2,
    context_length=24,
    seed=0,
    init_scale=10,
    ops=ops,
    dtype=np.float64,
)


def two_contributions(model, token_ids, labels):
    """The gradient of token_embed from its use as output layer, and the one from its use as look-up table."""
    (logits, cache) = model.forward(token_ids)[1]
    _, loss_cache = ops.cross_entropy(logits, labels)
    as_output = model.new_gradients()
    ops.linear_backward(ops.cross_entropy_backward(loss_cache), cache.unembed.linear, as_output.token_embed)
    both = model.new_gradients()
    model.backward((logits, cache), labels, both)
    return as_output.token_embed, both.token_embed - as_output.token_embed


as_output, as_input = two_contributions(wide, wide_ids[:-1], wide_ids[1:])

# %% [markdown]
# Here is the size of both parts for every row of the table.

# %% alt="Norm of the gradient of each row of the embedding table from its use as input and as output; x and z have a bar as output only"
fig, ax = plt.subplots(figsize=(10, 4), layout="constrained")
at = np.arange(wide_tokenizer.vocab_size)
ax.bar(at - 0.2, np.linalg.norm(as_input, axis=1), width=0.4, label="as input (look-up)")
ax.bar(
    at + 0.2,
    np.linalg.norm(as_output, axis=1),
    width=0.4,
    label="as output (scores)",
    hatch="//",
    edgecolor="white",
)
ax.set_xticks(at, ["␣" if c == " " else c for c in wide_tokenizer.characters])
ax.set(xlabel="character (row of token_embed)", ylabel="norm of the row's gradient")
ax.set_title("x and z do not occur: no gradient as input, a small one as output")
ax.legend()
plt.show()

# %% [markdown]
# For the small model above we already have both parts by hand. Their sum is what `model.backward` gave.

# %%
difference = np.abs(d_embed_as_input + d_embed_as_output - grads.token_embed).max()
print("sum of both parts equals grads.token_embed:", difference < 1e-15)
print("either part alone does:                    ", np.allclose(d_embed_as_input, grads.token_embed))

# %% [markdown]
# ## Gradients are added, not set
#
# `model.backward` *adds* to the arrays in `grads`. Two calls give exactly twice the gradient. This is useful: a batch
# that is too large for the memory can be computed in parts. It also means that one has to start from zero at every
# step.

# %%
once = {name: gradient.copy() for name, gradient in grads.items()}
_, cache = model.forward(token_ids)
model.backward(cache, labels, grads)  # a second time, into the same arrays
deviations = [np.abs(grads[name] - 2 * once[name]).max() / np.abs(once[name]).max() for name in once]
print(f"largest relative deviation from twice the gradient: {max(deviations):.0e}")

grads.fill_zero()
print("after fill_zero:", max(np.abs(gradient).max() for _, gradient in grads.items()))


# %% [markdown]
# ## A deliberate mistake
#
# How would one notice a wrong sign? We put one into the backward of attention: a plus instead of the minus in the
# softmax. The op table is an ordinary collection of functions, so we can make a copy and replace one entry.


# %%
def broken_attention_backward(d_out, cache):
    q, k, v, p = (array[:, :, 0] for array in cache[:4])  # no groups: (B, H, T, d) and (B, H, T, T)
    B, H, T, d = q.shape
    d_out = d_out.reshape(B, T, H, d).swapaxes(1, 2)
    d_p = d_out @ v.swapaxes(2, 3)
    d_v = p.swapaxes(2, 3) @ d_out
    d_s = p * (d_p + (d_p * p).sum(axis=-1, keepdims=True)) * d**-0.5  # <- plus, should be minus
    return tuple(x.swapaxes(1, 2).reshape(B * T, H * d) for x in (d_s @ k, d_s.swapaxes(2, 3) @ q, d_v))


broken_ops = SimpleNamespace(**vars(ops))
broken_ops.attention_backward = broken_attention_backward

q, k, v, c = (rng.normal(size=(5, 8)) for _ in range(4))
_, cache = ops.attention(q, k, v, 1, 2)
d_q, d_k, d_v = broken_attention_backward(c, cache)
check("d_q", d_q, lambda q: ops.attention(q, k, v, 1, 2)[0], q, c)
check("d_k", d_k, lambda k: ops.attention(q, k, v, 1, 2)[0], k, c)
check("d_v", d_v, lambda v: ops.attention(q, k, v, 1, 2)[0], v, c)

# %% [markdown]
# The check of the single layer names the culprit. And in a whole model? `toy.checks.gradcheck.check_model` measures a
# few elements of every parameter. The error of a broken layer travels downwards with the gradient, so everything
# *above* it is still right. Reading from the output down, the first wrong parameters are next to the mistake.

# %% alt="Two tables of errors of eight parameters in three blocks: on the right backward all are near 1e-10; with the wrong sign all parameters below the attention of the top block are wrong"
names = [
    "w_ff2",
    "w_ff1",
    "norm2_gamma",
    "w_o",
    "w_v",
    "w_q",
    "w_k",
    "norm1_gamma",
]  # from the output down


def error_table(ops):
    """Parameters x blocks: log10 of the relative error."""
    model = toy.TransformerLM(11, 16, 32, 2, 3, 6, ops=ops, dtype=np.float64)
    errors = {row.gradient: row.rel_error for row in check_model(model, np.random.default_rng(1), batch=1)}
    table = [[errors[f"blocks.{i}.{name}"] for i in range(3)] for name in names]
    return np.log10(np.maximum(table, 1e-16))


fig, axes = plt.subplots(1, 2, figsize=(10.5, 4.8), layout="constrained", sharey=True)
for ax, (title, table) in zip(axes, [("right", ops), ("wrong sign in attention", broken_ops)]):
    errors = error_table(table)[:, ::-1]
    image = ax.imshow(errors, cmap="cividis", vmin=-14, vmax=0, aspect="auto")
    for (i, j), error in np.ndenumerate(errors):
        ax.text(
            j,
            i,
            f"{round(error)}",
            ha="center",
            va="center",
            color="black" if error > -7 else "white",
        )
    ax.set_xticks(range(3), ["block 2\n(top)", "block 1", "block 0"])
    ax.set_yticks(range(len(names)), names)
    ax.set_title(title)
fig.colorbar(image, ax=axes, label="log10 of the relative error")
plt.show()


# %% [markdown]
# Would one have noticed in training? We train the same small model twice on our sentence, by plain gradient descent: once
# with the right backward and once with the broken one. And then a model on real text, the documentation that comes with
# Python, with AdamW, the optimizer of notebook 3.


# %%
def losses_with(ops, steps=400, lr=0.05):
    model = toy.TransformerLM(V, 16, 32, 2, 2, 24, seed=0, init_scale=10, ops=ops, dtype=np.float64)
    grads = model.new_gradients()
    losses = []
    for _ in range(steps):
        grads.fill_zero()
        _, cache = model.forward(token_ids)
        losses.append(model.backward(cache, labels, grads))
        model.parameters.flat[:] -= lr * grads.flat
    return losses


real_text = "".join(topics[name] for name in sorted(topics))
real_tokenizer = CharTokenizer.from_text(real_text)
real_ids = real_tokenizer.encode(real_text)


def losses_on_real_text(ops, steps=400, batch=8, context=32):
    model = toy.TransformerLM(real_tokenizer.vocab_size, 32, 128, 4, 2, context, seed=0, ops=ops)
    grads, adamw = model.new_gradients(), toy.AdamW.bias_corrected(lr=3e-3)
    m, v = np.zeros_like(grads.flat), np.zeros_like(grads.flat)
    rng, losses = np.random.default_rng(0), []
    for step in range(steps):
        starts = rng.integers(0, len(real_ids) - context, batch)
        windows = np.stack([real_ids[start : start + context + 1] for start in starts])
        grads.fill_zero()
        _, cache = model.forward(windows[:, :-1])
        losses.append(model.backward(cache, windows[:, 1:], grads))
        ops.adamw_step(model.parameters.flat, grads.flat, m, v, adamw.hp_for_step(step))
    return losses


# %% alt="Two panels of loss curves. Left, one sentence: both curves coincide. Right, real text: the broken one stays above."
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
curves = {"right backward": losses_with(ops), "wrong sign in attention": losses_with(broken_ops)}
for style, (label, losses) in zip(("-", "--"), curves.items()):
    left.plot(losses, style, label=label)
left.axhline(np.log(V), color="black", ls=":", lw=1.5, label="uniform guess, ln V")
left.set(xlabel="step", ylabel="training loss (nats)", yscale="log", title="One sentence: nobody would notice")
left.legend()
real = {"right backward": losses_on_real_text(ops), "wrong sign in attention": losses_on_real_text(broken_ops)}
for style, (label, losses) in zip(("-", "--"), real.items()):
    right.plot(smooth(losses, span=20), style, label=label)
right.axhline(np.log(real_tokenizer.vocab_size), color="black", ls=":", lw=1.5)
right.set(
    xlabel="step", ylabel="training loss, smoothed (nats per character)", title="Real text: it learns, only worse"
)
plt.show()

for label, losses in real.items():
    print(f"{label:24} real text, mean of the last 50 steps: {np.mean(losses[-50:]):.2f} nats per character")
last = [np.mean(losses[-50:]) for losses in real.values()]
assert last[0] < last[1] < np.log(real_tokenizer.vocab_size)  # the broken one has learned too
assert max(abs(a - b) for a, b in zip(*curves.values())) < 0.2  # on the sentence nobody sees a difference

# %% [markdown]
# On the left the two curves lie nearly on top of each other. That sentence can be learned by heart from the positions alone,
# and the optimizer finds its way around the wrong part. On the right the broken model learns as well, which characters are
# frequent, and then falls behind. Without the other curve beside it, who could have said so? A falling loss does not prove a
# backward. The check does, and `toy gradcheck` on the command line runs it for every layer.
#
# ## Exercises
#
# 1. Without looking back: write `layer_norm` and its backward (subtract the mean, divide by the standard deviation, `gamma`
#    and `beta`). What is subtracted in `d_x` that RMSNorm does not need? Compare with `ops.layer_norm_backward`.
# 2. In `embedding_backward`, replace `np.add.at` by `d_table[ids] += d_out`. Which rows of `d_table` does the check
#    complain about?
# 3. Add `w_k` biases to the attention: `k + b`. Show with `check` that the gradient of `b` is zero, and explain it with
#    the softmax.
