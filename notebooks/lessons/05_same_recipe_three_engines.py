# %% [markdown]
# # 5. The same recipe, three engines
#
# A recipe says *what* is trained. Who does the arithmetic is another question, and one word answers it:
# `backend="numpy"` runs the textbook operations, `backend="cython"` the same operations compiled, and `backend="ggml"`
# writes the whole training step down once, as a *graph*, and lets the ggml library run it. This notebook shows that all
# of them train the same model, and in what they differ.
#
# It needs the package `libggml-python`. Without it the first cell ends with an error that says what to type.
#
# **You will be able to**
#
# * say what an op table, an eager engine and a graph are, and what each is good for;
# * tell rounding from an error when two engines do not agree bit by bit;
# * find out where the time of a training step goes.
#
# **Before**: [lessons 1](01_forward_by_hand.ipynb) to [4](04_train_and_plot.ipynb). **Time**: 30 minutes to read, 1
# hour with the three exercises.

# %%
import os
import time
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

import ggml_bridge
import toy
from toy.data import CharTokenizer, load_corpus, training_batch
from toy.models.parameters import GradientTree, ParameterTree
from toy.ops import accelerated, reference
from toy.ops.graph import CpuGraphOps, NativeGraphOps, Slot
from toy.plots import lesson_style

ggml_bridge.load()  # raises an error with the command to type when ggml is missing
# the matrices here are small: more threads would only wait for each other
N_THREADS = int(os.environ.get("TOY_NUM_THREADS", 1))
toy.set_num_threads(N_THREADS)
lesson_style()
BLUE, RED, GREEN, PINK, ORANGE, SKY = plt.rcParams["axes.prop_cycle"].by_key()["color"]

for row in toy.backends():
    print(f"{row.name:7} {row.description}")

# %% [markdown]
# ## One recipe, four times
#
# ggml appears twice. On device `"cpu"` its graph is made of the compiled operations of this library. On `"cpu-native"`
# it is made of ggml's own operations, the ones that graphics processors have too. On a computer with one of those,
# `device="metal"` or `device="vulkan"` runs the same native graph there.
#
# The data are the documentation texts inside Python. Seed, batches and learning rate are the same in all four runs.

# %%
text = load_corpus().text
tokenizer = CharTokenizer.from_text(text)
ids = tokenizer.encode(text)
config = toy.TransformerConfig(
    vocab_size=tokenizer.vocab_size, d_model=48, n_heads=4, d_ff=192, n_layers=2, context_length=32
)
options = toy.RecipeOptions(t_seq=32, t_batch=8, seed=0)
ENGINES = {  # name -> (backend, device)
    "numpy": ("numpy", "cpu"),
    "cython": ("cython", "cpu"),
    "ggml": ("ggml", "cpu"),
    "ggml native": ("ggml", "cpu-native"),
}
COLOURS = {"numpy": BLUE, "cython": RED, "ggml": GREEN, "ggml native": PINK}


def realize(name):
    backend, device = ENGINES[name]
    return toy.recipes.FromScratch(backend=backend, device=device).realize(config, options)


def train(recipe, n_steps=150):
    """The loss of every step."""
    adamw = recipe.adamw(lr=0.003)
    losses = []
    for k in range(n_steps):
        batch = training_batch(ids, batch=options.t_batch, context=options.t_seq, seed=0, step=k)
        losses.append(recipe.step(batch.token_ids, labels=batch.labels, hp=adamw.hp_for_step(k), is_first=k == 0))
    return np.array(losses)


losses = {name: train(realize(name)) for name in ENGINES}
for name, curve in losses.items():
    print(f"{name:12} first {curve[0]:.6f}   last {curve[-1]:.6f}")

# %% alt="Training losses of four engines over 150 steps, drawn with lines of different width: they lie on each other"
fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
for width, (name, curve) in zip([11, 7.5, 4.5, 1.5], losses.items()):
    ax.plot(curve, lw=width, color=COLOURS[name], label=name, solid_capstyle="round")
ax.set(xlabel="step", ylabel="training loss (nats per character)", title="Four curves, one line")
ax.legend()
plt.show()

# %% [markdown]
# ## How equal is equal?
#
# Not bit by bit. Float32 has about seven digits, and $(a+b)+c$ is not always $a+(b+c)$. Every engine adds in another
# order, so the last digit differs; AdamW carries the difference into the weights, and the next step starts from there.
#
# For comparison, a fifth run: it is the cython engine once more, and before the first step every weight is moved to the
# next larger float32 number. That is the smallest change there is.

# %% [markdown] exercise="error_of_max"
# The largest difference, divided by the largest expected number: two maxima of absolute values.

# %% alt="Differences between the loss curves of pairs of engines on a logarithmic axis, from 1e-7 and less at first to at most 1e-5 later; a run with nudged weights mostly differs more"
nudged = realize("cython")
nudged.load_parameters({name: np.nextafter(w, np.float32(np.inf)) for name, w in nudged.parameters().items()})
differences = {
    f"{name} and numpy": np.abs(losses[name] - losses["numpy"]) for name in ["cython", "ggml", "ggml native"]
}
differences["cython nudged and cython"] = np.abs(train(nudged) - losses["cython"])

fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
for size, (name, difference) in zip([11, 5, 7, 4], differences.items()):
    # a difference of exactly zero has no place on a log scale: it is left out
    shown = np.where(difference > 0, difference, np.nan)
    colour = COLOURS.get(name.split(" and ")[0], "black")
    ax.semilogy(shown, ".", ms=size, color=colour, label=name)
ax.set(
    xlabel="step",
    ylabel="difference (nats)",
    ylim=(1e-9, 1e-3),
    title="Difference between two loss curves",
)
ax.legend(fontsize=11, ncols=2, loc="upper left")
plt.show()
for name, difference in differences.items():
    print(f"{name:26} largest difference {difference.max():.0e}")
again = train(realize("ggml"), n_steps=50)
print("ggml twice, bit for bit the same:", np.array_equal(again, losses["ggml"][:50]))


# %% [markdown]
# The engines differ from numpy no more than a run differs from itself when its weights change in their last digit.
# So no engine is the right one and the others wrong. (The points of cython and ggml often lie on each other, because
# they run the same compiled operations.) One engine with the same seed and the same number of threads gives the same
# bits again: the last line says so for ggml.

# %% [markdown]
# ## Why the order of a sum changes
#
# Nobody changes the order for fun. A matrix product is a sum over `K` for each of its elements, and a processor is fast
# only with what lies in its cache, a small memory beside it. So a fast product takes a piece of the `K` axis at a time,
# and adds up the products of the pieces.

# %% [markdown] exercise="matmul_in_blocks"
# Begin with zeros `(N, M)` and add, for each piece, the columns of `a` times the rows of `b` that belong to it. A slice
# that goes past the end is simply shorter.

# %% [markdown]
# The same happens one floor up. A batch that does not fit into memory is computed in parts, and the engine adds up what
# they give. That must be the loss of the whole batch, also where the parts have different numbers of tokens that count.

# %% [markdown] exercise="loss_of_micro_batches"
# A mean of means is right only where all parts have the same size. Go back to sums: mean times count.

# %% [markdown]
# ## Where the time goes
#
# The models know nothing about engines. They call operations by name, `ops.linear(...)`, `ops.attention_backward(...)`,
# on whatever *op table* they were given. So we can hand them a table that stands in between: it notes every call, with
# its time, and passes it on.


# %%
class Call(NamedTuple):
    name: str
    arguments: tuple
    result: object
    seconds: float


class Watched:
    """An op table that notes every call to another op table."""

    def __init__(self, table):
        self.table, self.calls = table, []

    def __getattr__(self, name):
        function = getattr(self.table, name)

        def noted(*arguments, **options):
            start = time.perf_counter()
            result = function(*arguments, **options)
            seconds = time.perf_counter() - start
            self.calls.append(Call(name, arguments, result, seconds))
            return result

        return noted


def watched_step(table, config, batch):
    """The calls of one training step on an eager op table."""
    ops = Watched(table)
    model = toy.TransformerLM.from_config(config, seed=0, ops=ops)
    grads = model.new_gradients()
    m, v = (ParameterTree.zeros(model.parameters.shapes) for _ in range(2))
    _, cache = model.forward(batch.token_ids)
    model.backward(cache, batch.labels, grads)
    hp = toy.AdamW.constant_slots(lr=0.003).hp()
    ops.adamw_step(model.parameters.flat, grads.flat, m.flat, v.flat, hp)
    return ops.calls


batch = training_batch(ids, batch=options.t_batch, context=options.t_seq, seed=0, step=0)
STEPS = 20
times = {}  # table -> {op: (seconds forward, seconds backward)} of a step, the median of some steps
for name, table in [("numpy", reference), ("cython", accelerated)]:
    rows = []
    for _ in range(STEPS):
        row = {}
        for call in watched_step(table, config, batch):
            pair = row.setdefault(call.name.removesuffix("_backward"), np.zeros(2))
            pair[int(call.name.endswith("_backward"))] += call.seconds
        rows.append(row)
    times[name] = {kind: np.median([row[kind] for row in rows], axis=0) for kind in rows[0]}

# %% alt="Milliseconds for each op, forward and backward, with numpy and with cython: attention, linear, gelu and rms_norm take most of the time in numpy; in cython attention, gelu and rms_norm take much less, and linear has the largest share"
order = sorted(times["numpy"], key=lambda kind: times["numpy"][kind].sum())
fig, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharex=True, sharey=True)
for ax, (name, seconds) in zip(axes, times.items()):
    forward, backward = 1000 * np.array([seconds[kind] for kind in order]).T
    ax.barh(order, forward, color=SKY, label="forward")
    ax.barh(order, backward, left=forward, color=ORANGE, label="backward")
    ax.set(xlabel="milliseconds per step, this run", title=name)
axes[1].legend(loc="lower right")
plt.show()
for name, seconds in times.items():
    whole = {kind: pair.sum() for kind, pair in seconds.items()}
    top = sorted(whole, key=whole.get, reverse=True)[:3]
    shares = ", ".join(f"{kind} {whole[kind] / sum(whole.values()):.0%}" for kind in top)
    print(f"{name:7} {shares}")

# %% [markdown]
# The matrix products (`linear`) are in good hands already in numpy, which gives them to a BLAS library. The compiled
# table wins where numpy makes many small steps, each of them with a new array: `gelu`, `attention`, the norms, AdamW.
# So there the matrix products have the larger share. The backward of a matrix product is two products, one for the
# gradient of the input and one for that of the weight.
#
# The numbers of your machine will be others, and on a busy machine they will be others tomorrow.
#
# ## What a graph is
#
# The notes contain more than times: which call made which array, and which calls read it. That is a graph. Here is the
# one of a model with a single block, one training step. It is not drawn by hand. Every box is a call and every line is
# an array.

# %%
small = toy.TransformerConfig(
    vocab_size=tokenizer.vocab_size, d_model=16, n_heads=2, d_ff=64, n_layers=1, context_length=32
)
calls = watched_step(reference, small, batch)


def arrays(values):
    """The identities of the arrays among some values."""
    values = values if isinstance(values, tuple) else (values,)
    return [id(value) for value in values if isinstance(value, np.ndarray)]


maker, cache_of = {}, {}  # identity of an array, of a cache -> number of the call that made it
level, edges, saved, parts = [], [], [], []
for i, call in enumerate(calls):
    sources = sorted({maker[a] for a in arrays(call.arguments) if a in maker})
    cached = [cache_of[id(a)] for a in call.arguments if id(a) in cache_of]
    edges += [(source, i) for source in sources]
    saved += [(source, i) for source in cached]
    backward = any(parts[source] == "backward" for source in sources) or bool(cached)
    if call.name == "adamw_step":
        parts.append("AdamW")
    elif call.name.startswith("cross_entropy"):
        parts.append("loss" if not cached else "backward")
    else:
        parts.append("backward" if backward else "forward")
    if cached:  # a backward stands beside its forward
        level.append(level[cached[0]])
    elif backward:  # where gradients are summed: just above the lowest of its sources
        level.append(min(level[source] for source in sources) - 0.3)
    else:
        level.append(1 + max((level[source] for source in sources), default=-1))
    maker.update((a, i) for a in arrays(call.result))
    if isinstance(call.result, tuple):
        cache_of.update((id(part), i) for part in call.result if isinstance(part, tuple))

for part in ["forward", "loss", "backward", "AdamW"]:
    print(f"{part:9} {parts.count(part)} calls")

# %% alt="The graph of a training step: on the left the forward from the embeddings down to the loss, on the right the backward up again, dotted lines for caches, thin green lines from each weight's gradient to AdamW"
PART_COLOURS = {"forward": SKY, "loss": PINK, "backward": ORANGE, "AdamW": GREEN}
rank = {value: i for i, value in enumerate(sorted(set(level)))}
y = [rank[value] for value in level]
x = []
for i, part in enumerate(parts):  # calls of the same part and level stand side by side
    beside = [j for j in range(len(calls)) if (parts[j], y[j]) == (part, y[i])]
    middle = {"forward": 0, "loss": 0, "backward": 5.0, "AdamW": 9.2}[part]
    x.append(middle + 1.35 * (beside.index(i) - (len(beside) - 1) / 2))
last = len(calls) - 1
x[last], y[last] = 9.2, max(y) / 2

fig, ax = plt.subplots(figsize=(13, 10.5), layout="constrained")
for a, b in saved:
    ax.plot([x[a], x[b]], [y[a], y[b]], color="0.8", ls=":", lw=1.5, zorder=0)
for a, b in edges:
    bent = abs(level[a] - level[b]) > 2.1 and x[a] == x[b]
    arrow = dict(arrowstyle="-|>", color="0.35", lw=1.3, shrinkA=9, shrinkB=9)
    arrow["connectionstyle"] = "arc3,rad=0.32" if bent else "arc3"
    ax.annotate("", (x[b], y[b]), (x[a], y[a]), arrowprops=arrow, zorder=1)
for i, call in enumerate(calls):
    adds_to_a_gradient = call.name.endswith("_backward") and len(call.arguments) > 2
    if adds_to_a_gradient:
        arrow = dict(arrowstyle="-", color=GREEN, lw=1, alpha=0.6, shrinkA=20, shrinkB=0)
        ax.annotate("", (x[last] - 0.5, y[i]), (x[i], y[i]), arrowprops=arrow, zorder=0)
for i, call in enumerate(calls[:-1]):
    label = call.name.removesuffix("_backward").replace("cross_entropy", "loss")
    box = dict(boxstyle="round,pad=0.25", fc=PART_COLOURS[parts[i]], ec="none")
    ax.text(x[i], y[i], label, ha="center", va="center", fontsize=10.5, bbox=box, zorder=2)
ax.bar(x[last], max(y) + 1, bottom=-0.5, width=1, color=PART_COLOURS["AdamW"])
ax.text(x[last], y[last], "adamw_step", rotation=90, ha="center", va="center", zorder=3)
for place, title in [(0, "forward, read down"), (5, "backward, read up"), (9.2, "AdamW")]:
    ax.text(place, -1.4, title, ha="center", fontsize=14)
ax.set(xlim=(-2.2, 10), ylim=(max(y) + 0.8, -2))
ax.axis("off")
plt.show()


# %% [markdown]
# Follow the dark arrows. Down on the left: two embeddings are summed, the norm feeds three matrix products (queries,
# keys, values), attention, and back into the sum around them; then the same with `gelu` in the middle. At the bottom is
# the loss. On the right the gradient goes the same way up. Where an array on the left was read by several calls, an
# `add` on the right collects their gradients. The dotted lines are what a backward needs from its forward, the caches.
# The thin green lines are the gradients of weights.
#
# An *eager* engine, numpy or cython here, walks through this picture call by call, and forgets it. An engine with a
# *graph* writes it down first. We do this now, with the same model and an op table that computes nothing: each call of
# `ops.linear` only appends a node, and its result is a tensor that has a shape but no values yet.


# %%
def record(table):
    """The training graph of the small model: its nodes, and for each of them the part it belongs to."""
    with ggml_bridge.Backend("cpu", n_threads=1) as backend:
        shapes = toy.TransformerLM.parameter_shapes(small)
        weights, m, v = ({n: backend.persistent(s) for n, s in shapes.items()} for _ in range(3))
        graph = backend.graph()
        parts = []

        def mark(part):
            """What was recorded since the last mark."""
            parts.extend([part] * (graph.n_recorded - len(parts)))

        def finished(slot):
            """Called as soon as a gradient is complete: the weight can be updated right away."""
            mark("backward")
            gradient = ops.finish_gradient(slot.tensor)
            name = slot.name
            ops.adamw_step(weights[name], gradient, m[name], v[name], hp)
            mark("AdamW")

        slots = {name: Slot(name, weight) for name, weight in weights.items()}
        ops = table(graph, {id(slot.parameter): slot for slot in slots.values()}, finished)
        rows = options.t_batch * options.t_seq
        token_ids = ops.integers("token_ids", rows, small.vocab_size)
        positions = ops.integers("positions", rows, small.context_length)
        labels = ops.integers("labels", rows, small.vocab_size)
        hp = ops.feed((1, 7), "f32", None)

        # from here on it is what an eager engine does, too
        model = toy.TransformerLM.from_config(small, ops=ops, parameters=ParameterTree(weights))
        logits, cache = model.forward_rows(token_ids, positions, options.t_batch)
        mark("forward")
        _, loss_cache = ops.cross_entropy(logits, labels)
        mark("loss")
        d_logits = ops.cross_entropy_backward(loss_cache)
        model.backward_rows(d_logits, cache, GradientTree(slots))
        mark("backward")
        return graph.describe(), parts


graphs = {"ggml": record(CpuGraphOps), "ggml native": record(NativeGraphOps)}
for name, (nodes, parts) in graphs.items():
    counts = ", ".join(f"{part} {parts.count(part)}" for part in PART_COLOURS)
    print(f"{name:12} {len(nodes)} nodes: {counts}")

# %% [markdown]
# Every node is one square, in the order in which they run, line by line.

# %% alt="The nodes of two graphs of the same step as coloured squares in running order, forward, loss, backward and AdamW: the graph of ggml's own operations has about three times as many"
WIDTH = 36
fig, ax = plt.subplots(figsize=(11, 4.4), layout="constrained")
top = 0
for name, (nodes, parts) in graphs.items():
    ax.text(0, top - 0.25, f"{name}: {len(nodes)} nodes")
    for i, part in enumerate(parts):
        corner = (i % WIDTH, top + i // WIDTH)
        ax.add_patch(plt.Rectangle(corner, 0.88, 0.88, color=PART_COLOURS[part], lw=0))
    top += len(parts) // WIDTH + 3
for part, colour in PART_COLOURS.items():
    ax.bar(0, 0, color=colour, label=part)
ax.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, frameon=False, borderpad=0)
ax.set(xlim=(0, WIDTH), ylim=(top - 1.8, -1), aspect="equal")
ax.axis("off")
plt.show()

# %% [markdown]
# The green squares are between the orange ones. AdamW of a matrix runs as soon as the gradient of this matrix is
# complete, and then the memory of the gradient can be used for the next one. An eager engine keeps all gradients to the
# end of the step.
#
# The native graph has several times as many nodes: a norm, a GELU or an attention is one node in the one spelling and a
# composition of simple operations in the other. A realized recipe tells all about its graph with `explain()`: the
# counts here, and with `print(recipe.explain())` the whole table. These graphs are longer than ours, because the model
# has two blocks, and because the engine also records the norm of the gradient.

# %%
for name in ["ggml", "ggml native"]:
    explanation = realize(name).explain()
    counts = list(explanation.counts().items())
    print(f"{name}: {len(explanation.nodes)} nodes on {explanation.device}, two blocks")
    print("   " + ", ".join(f"{n} {kind}" for kind, n in counts[:8]) + ", ...")
    print("   " + ", ".join(f"{what} {size:,} bytes" for what, size in explanation.bytes.items()))

# %% [markdown]
# `CUSTOM` is a node that calls one of this library's compiled operations, the ones that the cython engine calls from
# Python.
#
# ## How fast?
#
# Now a step of each engine, in turns, so that a machine whose speed drifts treats them alike. If PyTorch is
# installed, it takes part, with the same model, written out here and trained with its own fused AdamW.

# %%
try:
    import torch
except ImportError:
    torch = None


def torch_step():
    """A function that makes one training step of the same model in PyTorch."""
    from torch.nn import Linear, Module, ModuleList, Parameter, RMSNorm
    from torch.nn import functional as F

    torch.set_num_threads(N_THREADS)
    torch.manual_seed(0)
    D, H, FF = config.d_model, config.n_heads, config.d_ff

    def matrix(n_in, n_out):
        return Linear(n_in, n_out, bias=False)

    class Block(Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = RMSNorm(D, eps=1e-5), RMSNorm(D, eps=1e-5)
            self.q, self.k, self.v, self.o = (matrix(D, D) for _ in range(4))
            self.ff1, self.ff2 = matrix(D, FF), matrix(FF, D)

        def forward(self, x):
            B, T, _ = x.shape
            h = self.norm1(x)
            q, k, v = (p(h).view(B, T, H, D // H).transpose(1, 2) for p in (self.q, self.k, self.v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(a.transpose(1, 2).reshape(B, T, D))
            return x + self.ff2(F.gelu(self.ff1(self.norm2(x)), approximate="tanh"))

    class Model(Module):
        def __init__(self):
            super().__init__()
            self.token = Parameter(0.02 * torch.randn(config.vocab_size, D))
            self.position = Parameter(0.02 * torch.randn(config.context_length, D))
            self.blocks = ModuleList(Block() for _ in range(config.n_layers))
            self.norm = RMSNorm(D, eps=1e-5)

        def forward(self, token_ids):
            x = self.token[token_ids] + self.position
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.token.T

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.0, fused=True)
    token_ids, labels = torch.from_numpy(batch.token_ids), torch.from_numpy(batch.labels).long()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(token_ids).flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def toy_step(recipe):
    hp = recipe.adamw(lr=0.003).hp_for_step(0)
    return lambda: recipe.step(batch.token_ids, labels=batch.labels, hp=hp)


steps = {name: toy_step(realize(name)) for name in ENGINES}
if torch is not None:
    steps["PyTorch"] = torch_step()
seconds = {name: [] for name in steps}
for turn in range(33):
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        if turn >= 3:  # the first ones warm up
            seconds[name].append(time.perf_counter() - start)
medians = {name: 1000 * np.median(values) for name, values in seconds.items()}
fastest = min(medians, key=medians.get)
print("fastest in this run:", fastest)

# %% alt="Median milliseconds of a step on this machine for five engines as bars, the fastest above"
fig, ax = plt.subplots(figsize=(9, 3.6), layout="constrained")
names = sorted(medians, key=medians.get)
bars = ax.barh(names, [medians[name] for name in names], color=[COLOURS.get(name, "0.6") for name in names])
ax.bar_label(bars, fmt="%.1f", padding=4)
ax.invert_yaxis()
ax.set(
    xlabel=f"median milliseconds per step, threads: {N_THREADS}",
    title="Time per step: one run on one machine",
)
plt.show()

# %% [markdown]
# Take the picture for what it is: a tiny model, one run, on a machine that may have had other things to do. The ratios
# change with the size of the model. In a tiny one much of the time goes into getting from one operation to the next. In
# a large one nearly all of it is matrix products, and the engines come closer to each other. The native graph is not
# made for this race: it has several times as many nodes, and each of them reads and writes memory. Its place is on
# other devices.
#
# `python benchmarks/train_step.py` measures larger models, and memory too.
#
# ## Which one, when?
#
# | You want to | Take | Because |
# |---|---|---|
# | read, step through, change a formula | `numpy` | every operation is a few lines of numpy, and every array can be printed |
# | check a gradient in float64 | `numpy` | the textbook table is the only one that computes in any precision |
# | look inside while training at speed | `cython` | eager: weights and gradients are arrays in Python, at any time |
# | train | `ggml` | one call per step, memory that is planned beforehand, the same compiled operations as cython |
# | train on a graphics processor | `ggml`, `device="metal"` or `"vulkan"` | the native graph, on the device's own memory |
# | know whether such a device will do | `ggml`, `device="cpu-native"` | the same graph, node for node, on the processor you have |
#
# `backend="auto"` takes the fastest that is there, and `recipe.backend_reason` says why. As the curves are the same,
# you can begin on one engine and go on with another: every engine continues the checkpoints of every other.
#
# ## Exercises
#
# 1. Train 100 steps on numpy, carry `parameters()` and `optimizer_state()` over to a ggml recipe with `load_parameters`
#    and `load_optimizer_state`, and train 100 more. Is the curve the one of 200 steps on either engine? What happens
#    without the optimizer's state?
# 2. Double `d_model` and `d_ff` a few times and draw the speed bars again. Which operation's share grows, and at which
#    size do the engines come close to each other?
# 3. Draw the graph of `toy.GPT2Config` by giving `watched_step` and `record` a `toy.GPT2` model. Which calls are new,
#    and how many nodes does the native spelling of LayerNorm need compared with RMSNorm?
