# %% [markdown]
# # 6. Inside a ggml graph
#
# In notebook 5 the engine wrote the graph. Here we write one ourselves, tensor by tensor, with `ggml_bridge.Session`:
# first a linear layer, then its backward pass, then a small network that learns. We look at every node, check the
# gradients by hand, and see where in memory each result lives and for how long.
#
# It needs the package `libggml-python`. Without it the first cell ends with an error that says what to type.
#
# **You will be able to**
#
# * record a graph with `Session`, run it, and read its nodes;
# * follow what `build_backward` adds, and check a gradient of the graph by hand;
# * say why training needs more memory than a forward pass, and where.
#
# **Before**: [lesson 2](02_backward_by_hand.ipynb); [lesson 5](05_same_recipe_three_engines.ipynb) says why there are
# graphs. **Time**: 40 minutes to read, 1 hour with the three exercises.

# %%
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

import ggml_bridge
import toy
from ggml_bridge import Session
from toy.plots import lesson_style

ggml_bridge.load()  # raises an error with the command to type when ggml is missing
lesson_style()
BLUE, RED, GREEN, PINK, ORANGE, SKY = plt.rcParams["axes.prop_cycle"].by_key()["color"]
np.set_printoptions(precision=4, suppress=True, linewidth=110)
rng = np.random.default_rng(0)

print("ggml", ggml_bridge.version())

# %% [markdown]
# ## Record, then compute
#
# The smallest useful graph is a linear layer with a softmax: six rows of four numbers, three classes.
#
# `s.matmul(w, x)` computes nothing. It appends a node to the graph and returns a tensor with a shape and no values.
# Only `compute()` runs the nodes, all of them, in the order in which they were recorded. Before that `realize()` gives
# each of them memory.
#
# Weights are *persistent*: they have memory of their own, which stays as it is from one computation to the next.

# %% [markdown]
# One more thing before we begin: ggml's own product, the node `MUL_MAT`, multiplies *rows with rows*. That is why a
# weight of shape (out, in) goes into it as it is, and no linear layer has to transpose anything. `s.matmul(w, x)` is
# that node.

# %% [markdown] exercise="mul_mat"
# Rows of `b` with rows of `a`: in numpy that is a product with a transpose, and the rows of the result are those of
# `b`.

# %%
N, D, C = 6, 4, 3  # rows, inputs, classes
weight = rng.normal(size=(C, D)).astype(np.float32)
rows = rng.normal(size=(N, D)).astype(np.float32)

with Session(device="cpu", n_threads=1) as s:
    w = s.input_2d_f32_persistent(C, D)
    s.finalize_weights()  # memory for the weights
    s.upload_row_major(w, weight)

    x = s.input_2d_f32(N, D)
    p = s.softmax(s.matmul(w, x))  # softmax(x @ w.T): (N, C)
    print("recorded, not computed:", p)
    s.build_forward_only(p)
    s.realize()  # memory for everything else

    s.upload_row_major(x, rows)
    s.compute()
    probabilities = s.download(p)
    print(s.explain())

logits = rows @ weight.T
by_hand = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
print("\nlike numpy:", np.allclose(probabilities, by_hand, atol=1e-6))

# %% [markdown]
# Two nodes, and a table that says of each which tensors it reads. The shapes are numpy's, the weights are (out, in), as
# everywhere in this library.

# %% [markdown]
# On stacks of matrices `MUL_MAT` has one more rule: where the second stack is higher, each matrix of the first is used
# several times in a row. Attention with fewer key heads than query heads (lesson 8) needs no copies, for this reason.

# %% [markdown] exercise="mul_mat_of_groups"
# `np.repeat(a, H // G, axis=0)` repeats each matrix as often as it is used, in the right order (`np.tile` would not).

# %% [markdown]
# ## A loss, and its backward
#
# Now the same layer is trained. The cross-entropy takes one label per row; a label of -1 does not count.
# `build_backward` goes through the recorded operations from the last to the first and records, for each, the nodes that
# compute its gradient. So after it the graph is longer, and still nothing has been computed. We count the nodes on the
# way, to know which part each belongs to.

# %%
labels = np.array([0, 2, 1, 1, -1, 0])
PARTS = {"forward": SKY, "loss": PINK, "backward": ORANGE, "AdamW": GREEN}


def parts_of(nodes, n_forward, n_with_loss):
    """The part each node belongs to: after the loss comes the backward, with the AdamW nodes at its end."""
    names = ["forward"] * n_forward + ["loss"] * (n_with_loss - n_forward)
    for node in nodes[n_with_loss:]:
        names.append("AdamW" if node.op == "OPT_STEP_ADAMW" else "backward")
    return names


s = Session(device="cpu", n_threads=1)
w = s.input_2d_f32_persistent(C, D)
s.set_param(w)  # this one is trained
s.finalize_weights()
s.upload_row_major(w, weight)

x = s.input_2d_f32(N, D)
z = s.matmul(w, x)  # the logits
n_forward = len(s.describe())
y = s.input_1d_i32(N)
loss = s.cross_entropy_loss(z, y)
s.set_loss(loss)
n_with_loss = len(s.describe())
s.build_backward()
d_w = s.tensor_grad(w)  # we want to see the gradient
hp = s.input_2d_f32(1, 7)
s.opt_step_adamw(w, hp)
recorded = len(s.describe())
s.realize_backward()

nodes = s.describe()
parts = parts_of(nodes, n_forward, n_with_loss)
for part in PARTS:
    print(f"{part:9}", *[node.op for node, name in zip(nodes, parts) if name == part])
print(f"recorded {recorded} nodes, kept {len(nodes)}")

# %% [markdown]
# The forward is one node. The loss takes more: a softmax, and then the logarithm of the right probability, computed
# from the largest logit so that it cannot overflow. `RESHAPE`, `VIEW` and `PERMUTE` move nothing. They are *views*,
# other shapes for the same memory. Some recorded nodes are missing: they were to compute the gradient of `x`, which
# nobody asked for, and `realize_backward` drops nodes that lead to nothing.
#
# The picture shows the nodes in the order in which they run, without the views. Every arc is a tensor: from the node
# that computes it to the node that reads it. A long arc is a result that has to be kept for long.

# %% alt="The nodes of the graph in running order, with arcs from each node to those that read it; the longest goes from the softmax of the loss to the backward"
VIEWS = {"RESHAPE", "VIEW", "PERMUTE"}


def link(nodes):
    """For every node, its sources: the number of the node that made it, or the name of an input or a weight.

    `describe()` names the sources, and names are not unique. Taken is the latest node with the same name, shape and type.
    """
    latest, links = {}, []
    for node in nodes:
        keys = [(source.name, source.shape, source.dtype) for source in node.sources]
        links.append([latest.get(key, key[0]) for key in keys])
        latest[node.name, node.shape, node.dtype] = node.index
    return links


def memory_of(nodes, links):
    """For every node, whose memory holds its result: its own number, for a view what it is a view of."""
    home = []
    for node, sources in zip(nodes, links):
        if not node.is_view:
            home.append(node.index)
            continue
        # SET_ROWS writes into its last source; the others are views of the first, or write into it
        source = sources[-1] if node.op == "SET_ROWS" else sources[0]
        home.append(home[source] if isinstance(source, int) else source)
    return home


def draw_arcs(nodes, part_names):
    """The nodes on a line, an arc for every tensor that is read."""
    links = link(nodes)
    real = [node.index for node in nodes if node.op not in VIEWS]
    place = {index: i for i, index in enumerate(real)}

    def through_views(source):
        while isinstance(source, int) and nodes[source].op in VIEWS:
            source = links[source][0]
        return source

    _, ax = plt.subplots(figsize=(12, 5), layout="constrained")
    for index in real:
        for source in {through_views(source) for source in links[index]}:
            if isinstance(source, int):
                a, b = place[source], place[index]
                angle = np.linspace(0, np.pi, 50)
                height = 0.5 * (b - a)
                ax.plot(
                    (a + b) / 2 - (b - a) / 2 * np.cos(angle),
                    height * np.sin(angle),
                    color=PARTS[part_names[source]],
                    lw=1.8,
                    zorder=0,
                )
    colours = [PARTS[part_names[index]] for index in real]
    ax.scatter(range(len(real)), np.zeros(len(real)), s=110, c=colours)
    for part, colour in PARTS.items():
        ax.scatter([], [], s=110, c=colour, label=part)
    ax.set_xticks(range(len(real)), [nodes[index].op for index in real], rotation=90, fontsize=11)
    ax.tick_params(length=0)
    ax.set(yticks=[], ylim=(-0.6, None), title="Who reads what, in running order")
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.legend(fontsize=11, loc="upper right")
    plt.show()


draw_arcs(nodes, parts)

# %% [markdown]
# The longest arc leads from the loss to the backward. There the softmax is read again, because the gradient of the
# logits is $p - \text{onehot}$. The subtraction is the chain of `GET_ROWS`, `SUB` and `SET_ROWS`: one number is taken
# out of each row, made smaller by one, and put back. The gradient of the weight is a `MUL_MAT` again, of transposed
# copies of its two inputs (`CONT` after a view).
#
# ## The gradient by hand
#
# For the linear layer the gradient fits on one line. With $p = \mathrm{softmax}(x w^\top)$, and $n$ rows that count,
#
# $$\frac{\partial L}{\partial w} = \frac1n\,(p - \text{onehot})^\top x ,$$
#
# where the row with the label -1 is left out. We run the graph once and compare, in float64.

# %% [markdown]
# The optimizer is a node too. What it has to know besides the gradient is uploaded before every step, as the row of
# seven numbers of lesson 3.

# %% [markdown] exercise="adamw_row"
# The last two are what the moments are multiplied with, so they are $1/(1-\beta^t)$. Return one array of seven numbers.

# %%
adamw = toy.AdamW.bias_corrected(lr=0.01)
s.graph_reset()  # gradients and the moments of AdamW start at zero
s.upload_row_major(x, rows)
s.upload_int_array(y, labels)
s.upload_row_major(hp, adamw.hp_for_step(0))
s.compute_backward()  # forward, loss, backward and AdamW in one go

counted = labels >= 0
p = by_hand.astype(np.float64)
d_z = (p - np.eye(C)[labels]) * counted[:, None]
d_w_by_hand = d_z.T @ rows / counted.sum()
loss_by_hand = -np.log(p[counted, labels[counted]]).mean()
w_by_hand = weight - 0.01 * d_w_by_hand / (np.abs(d_w_by_hand) + 1e-8)  # AdamW's first step

print("loss      graph", s.download(loss)[0], "  by hand", loss_by_hand)
print("gradient  graph")
print(s.download(d_w))
print("difference of the gradient", f"{np.abs(s.download(d_w) - d_w_by_hand).max():.0e}")
print("difference of the weight after AdamW", f"{np.abs(s.download(w) - w_by_hand).max():.0e}")
s.close()


# %% [markdown]
# The weight has changed as well: the AdamW node writes into the weight's own memory. Notebook 3 explains the seven
# numbers in `hp`.
#
# ## A network that learns
#
# One hidden layer more, and the graph can learn something that a linear layer cannot: three arms of a spiral, to be
# told apart by their coordinates. The activation is SiLU, $\mathrm{silu}(a) = a\,\sigma(a)$.


# %%
def spiral(n_per_arm=100):
    """Points (N, 2) on three arms, and the number of the arm."""
    radius = np.linspace(0.1, 1, n_per_arm)
    points, arms = [], []
    for arm in range(3):
        angle = 4 * radius + 2 * np.pi * arm / 3 + rng.normal(0, 0.12, n_per_arm)
        points.append(np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1))
        arms.append(np.full(n_per_arm, arm))
    return 2 * np.concatenate(points).astype(np.float32), np.concatenate(arms)


class Network:
    """x (N, 2) -> linear, silu, linear -> logits (N, 3), with its loss, backward and AdamW."""

    def __init__(self, n, hidden):
        shapes = {"w1": (hidden, 2), "b1": (hidden,), "w2": (3, hidden), "b2": (3,)}
        s = self.session = Session(device="cpu", n_threads=1)
        vector, matrix = s.input_1d_f32_persistent, s.input_2d_f32_persistent
        self.w = {name: (vector if len(shape) == 1 else matrix)(*shape) for name, shape in shapes.items()}
        for weight in self.w.values():
            s.set_param(weight)
        s.finalize_weights()
        for name, shape in shapes.items():
            # biases start at zero, matrices at random
            std = 0 if len(shape) == 1 else shape[1] ** -0.5
            s.upload_row_major(self.w[name], rng.normal(0, std, shape).astype(np.float32))

        self.x = s.input_2d_f32(n, 2)
        h = s.silu(s.add(s.matmul(self.w["w1"], self.x), self.w["b1"]))  # (N, hidden)
        self.logits = s.add(s.matmul(self.w["w2"], h), self.w["b2"])  # (N, 3)
        s.set_output(self.logits)
        n_forward = len(s.describe())
        self.labels = s.input_1d_i32(n)
        self.loss = s.cross_entropy_loss(self.logits, self.labels)
        s.set_loss(self.loss)
        n_with_loss = len(s.describe())
        s.build_backward()
        self.gradients = {name: s.tensor_grad(weight) for name, weight in self.w.items()}
        self.hp = s.input_2d_f32(1, 7)
        for weight in self.w.values():
            s.opt_step_adamw(weight, self.hp)
        s.realize_backward()
        self.parts = parts_of(s.describe(), n_forward, n_with_loss)

    def step(self, x, labels, hp, is_first):
        """One training step; returns the loss."""
        s = self.session
        if is_first:
            s.graph_reset()  # gradients and moments
        else:
            s.graph_reset_grads_only()  # the moments go on
        s.upload_row_major(self.x, x)
        s.upload_int_array(self.labels, labels)
        s.upload_row_major(self.hp, hp)
        s.compute_backward()
        return s.download(self.loss)[0]


points, arms = spiral()
network = Network(n=len(points), hidden=32)
weights = {name: network.session.download(w) for name, w in network.w.items()}
first_loss = network.step(points, arms, adamw.hp_for_step(0), is_first=True)
gradients = {name: network.session.download(g) for name, g in network.gradients.items()}
print("nodes:", ", ".join(f"{part} {network.parts.count(part)}" for part in PARTS))
print("loss before training:", first_loss, "  ln 3 =", np.log(3))


# %% [markdown]
# Again the gradient by hand, now through two layers. This is notebook 2 in two short functions.


# %%
def forward_by_hand(w, x):
    """Logits (N, 3), and what the backward needs."""
    a = x @ w["w1"].T + w["b1"]  # (N, hidden)
    sigmoid = 1 / (1 + np.exp(-a))
    h = a * sigmoid
    return h @ w["w2"].T + w["b2"], (a, sigmoid, h)


def gradients_by_hand(w, x, labels):
    logits, (a, sigmoid, h) = forward_by_hand(w, x)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    d_logits = (p - np.eye(3)[labels]) / len(x)  # (N, 3)
    d_h = d_logits @ w["w2"]  # (N, hidden)
    d_a = d_h * sigmoid * (1 + a * (1 - sigmoid))
    return {"w1": d_a.T @ x, "b1": d_a.sum(0), "w2": d_logits.T @ h, "b2": d_logits.sum(0)}


exact = gradients_by_hand({name: w.astype(np.float64) for name, w in weights.items()}, points, arms)
for name, gradient in gradients.items():
    error = np.linalg.norm(gradient - exact[name]) / np.linalg.norm(exact[name])
    print(f"{name}  relative error {error:.0e}")

# %% alt="On the left the training loss over 1000 steps on a logarithmic axis, from a little above ln 3 to about 0.001; on the right three arms of a spiral, each in a region of its own colour"
losses = [first_loss]
for k in range(1, 1000):
    losses.append(network.step(points, arms, adamw.hp_for_step(k), is_first=False))
trained = {name: network.session.download(w) for name, w in network.w.items()}

fig, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=[1.25, 1])
axes[0].semilogy(losses)
axes[0].axhline(np.log(3), color="black", ls="-.", lw=1, label="uniform guess, ln 3")
axes[0].set(xlabel="step", ylabel="training loss (nats)", title="AdamW inside the graph")
axes[0].legend()
side = np.linspace(-2.4, 2.4, 200)
grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
regions = forward_by_hand(trained, grid)[0].argmax(axis=1).reshape(200, 200)
colours = [BLUE, RED, GREEN]
axes[1].contourf(side, side, regions, levels=[-0.5, 0.5, 1.5, 2.5], colors=colours, alpha=0.25)
for arm, (colour, marker) in enumerate(zip(colours, "os^")):
    axes[1].scatter(*points[arms == arm].T, s=18, color=colour, marker=marker)
axes[1].set(aspect="equal", xticks=[], yticks=[], title="What it has learned")
plt.show()
right = (forward_by_hand(trained, points)[0].argmax(axis=1) == arms).mean()
print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}, right: {right:.1%}")

# %% [markdown]
# Each of these steps was one call. Python uploaded three arrays, the points, the labels and the seven numbers, and
# downloaded the loss; the weights and moments never left their memory.
#
# ## The memory plan
#
# As all nodes and their order are known in advance, it is also known when each result is read for the last time. After
# that its memory is free for another. `realize_backward` makes this plan, once, and no memory is asked for while the
# graph runs.
#
# The rules are few:
#
# * inputs and outputs (what `set_output` or `tensor_grad` keeps) live for the whole run, everything else until its last
#   reader;
# * an elementwise node whose input ends there writes over it;
# * otherwise the smallest free gap is taken that is large enough;
# * a place is given away only two nodes after its last reader: two neighbouring nodes may be computed as one, which
#   reads what the first one reads while it writes what the second one writes.
#
# With the node list we can make the plan ourselves.

# %%
# elementwise nodes, and over how many of their sources they may write
OVERWRITES = {"ADD": 2, "SUB": 2, "MUL": 2, "DIV": 2, "SILU": 1, "LOG": 1, "SOFT_MAX": 1}
DELAY = 2  # nodes
ALIGNMENT = 64  # bytes: every place begins at a multiple


class Place(NamedTuple):
    """A tensor's place: bytes `offset` to `offset + size`, from node `first` to node `last`."""

    offset: int
    size: int
    first: int
    last: int
    owner: object  # number of the node, name of the input


def bytes_of(shape):
    size = 4 * int(np.prod(shape))  # float32 and int32 both have four bytes
    return -(-size // ALIGNMENT) * ALIGNMENT


def best_fit(size, occupied, end):
    """The offset of the smallest gap between the occupied places that is large enough, or of the end."""
    best, position = None, 0
    for place in sorted(occupied):
        gap = place.offset - position
        if gap >= size and (best is None or gap < best[0]):
            best = (gap, position)
        position = place.offset + place.size
    if end - position >= size and (best is None or end - position < best[0]):
        best = (end - position, position)
    return best[1] if best else position


def plan_memory(nodes, inputs, outputs):
    """The places of all results. inputs: {name: shape}. outputs: names of nodes that are kept."""
    links = link(nodes)
    home = memory_of(nodes, links)

    def root(source):
        """Whose memory a source is in."""
        return home[source] if isinstance(source, int) else source

    last = {}  # the last node that touches a memory
    for node, sources in zip(nodes, links):
        last[home[node.index]] = node.index
        last.update((root(source), node.index) for source in sources)
    for node in nodes:
        if node.name in outputs:
            last[home[node.index]] = len(nodes) + DELAY

    places, occupied, end = [], [], 0
    for name, shape in inputs.items():
        occupied.append(Place(end, bytes_of(shape), -1, len(nodes) + DELAY, name))
        end += bytes_of(shape)
    for node, sources in zip(nodes, links):
        i = node.index
        if home[i] == i:
            size = bytes_of(node.shape)
            offset = None
            for source in sources[: OVERWRITES.get(node.op, 0)]:
                old = next((place for place in occupied if place.owner == root(source)), None)
                if old and old.last == i and nodes[source].shape == node.shape:
                    occupied.remove(old)
                    places.append(old._replace(last=i - 1))
                    offset = old.offset
                    break
            if offset is None:
                offset = best_fit(size, occupied, end)
            occupied.append(Place(offset, size, i, last[i], i))
            end = max(end, offset + size)
        for place in [place for place in occupied if place.last == i - DELAY]:
            occupied.remove(place)
            places.append(place)
    return places + occupied, end


s = network.session
nodes = s.describe()
outputs = {network.logits.name, network.loss.name} | {g.name for g in network.gradients.values()}
inputs = {tensor.name: tensor.shape for tensor in (network.x, network.labels, network.hp)}
for node in nodes:  # cross_entropy_loss made inputs of its own from the labels
    for source in node.sources:
        if source.name.startswith(f"{network.labels.name}: ") and not source.name.endswith(")"):
            inputs[source.name] = source.shape
places, end = plan_memory(nodes, inputs, outputs)
everything = sum(place.size for place in places)
print(f"every result in a place of its own   {everything:>9,} bytes")
print(f"our plan                             {end:>9,} bytes")
print(f"the plan of the session              {s.explain().bytes['graph']:>9,} bytes")
assert end == s.explain().bytes["graph"]


# %% alt="The memory plan: time goes right, memory goes up; two large boxes of the forward stay until the backward has read them; of the four large ones of the backward three lie above, each for a short time, and the last lies where a forward one was"
def draw_plan(places, end, nodes, part_names):
    _, ax = plt.subplots(figsize=(12, 6), layout="constrained")
    for place in places:
        if isinstance(place.owner, str):
            colour, label = "0.8", place.owner
        else:
            colour, label = PARTS[part_names[place.owner]], nodes[place.owner].op
        first, last = max(place.first, 0) - 0.5, min(place.last, len(nodes) - 1) + 0.5
        box = (first, place.offset / 1024), last - first, place.size / 1024
        ax.add_patch(plt.Rectangle(*box, fc=colour, ec="white", lw=1))
        if place.size > 0.06 * end and last - first > 1:
            centre = (first + last) / 2, (place.offset + place.size / 2) / 1024
            angle = 90 if last - first < 9 else 0
            ax.text(*centre, label, ha="center", va="center", fontsize=10, rotation=angle)
    ax.axhline(end / 1024, color="black", ls="--", lw=1)
    for part, colour in {"input": "0.8", **PARTS}.items():
        ax.bar(0, 0, color=colour, label=part)
    ax.legend(fontsize=11, ncols=5, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    ax.set(
        xlim=(-0.5, len(nodes) - 0.5),
        ylim=(0, 1.04 * end / 1024),
        xlabel="node, in running order",
        ylabel="place in memory (kB)",
    )
    ax.set_title("The memory plan", pad=34)
    plt.show()


draw_plan(places, end, nodes, network.parts)

# %% [markdown]
# From left to right is time, from bottom to top is memory. A box is a result, as high as it has bytes and as long as it
# is needed. AdamW has no boxes, because it writes into the weights, which have memory of their own.
#
# Training needs memory because the backward reads what the forward computed. That is why the two large boxes from the
# forward stay for so long: the gradient of `w2` reads the result of `SILU`, and `SILU_BACK` reads its input. Next to
# them one sees the rules at work. `ADD` took over the place of the `MUL_MAT` before it. The place of `SILU` went to the
# second large `CONT` of the backward. But `SILU_BACK` had to go to the top: its two inputs were still needed, and
# neither `SILU` nor the first large `CONT` had ended long enough ago.
#
# ## Bytes
#
# `explain()` says how many bytes a session has: `weights` (with the two moments of AdamW), `graph` (the picture above)
# and `metadata` (the descriptions of the nodes). Which of them grow with the depth of a network? The answer is
# different for training and for a forward pass alone.

# %% alt="Memory of the graph over 1 to 16 layers: with training it grows with every layer, for a forward pass alone it stays the same from four layers on"
n_weights = sum(int(np.prod(w.shape)) for w in network.w.values())
print(f"{n_weights} weights of 4 bytes, and two moments for each: {3 * 4 * n_weights:,} bytes")
print("explain():", network.session.explain().bytes, "(with gaps, so that every tensor is aligned)")
network.session.close()


def graph_bytes(depth, train, n=256, width=64):
    """Bytes of the graph of `depth` layers silu(x w^T)."""
    with Session(device="cpu", n_threads=1) as s:
        weights = [s.input_2d_f32_persistent(width, width) for _ in range(depth)]
        for w in weights:
            s.set_param(w)
        s.finalize_weights()
        x = s.input_2d_f32(n, width)
        for w in weights:
            x = s.silu(s.matmul(w, x))
        if not train:
            s.build_forward_only(x)
            s.realize()
        else:
            labels, hp = s.input_1d_i32(n), s.input_2d_f32(1, 7)
            loss = s.cross_entropy_loss(x, labels)
            s.set_loss(loss)
            s.build_backward()
            for w in weights:
                s.opt_step_adamw(w, hp)
            s.realize_backward()
        return s.explain().bytes["graph"]


depths = np.array([1, 2, 4, 8, 16])
fig, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
for train, label, style in [(True, "training", "o-"), (False, "forward alone", "s--")]:
    sizes = [graph_bytes(int(depth), train) for depth in depths]
    ax.plot(depths, np.array(sizes) / 1024, style, ms=8, label=label)
    print(f"{label:14} {[f'{size // 1024} kB' for size in sizes]}")
print(f"the weights of {depths[-1]} layers, with two moments: {depths[-1] * 3 * 4 * 64 * 64 // 1024} kB")
ax.set(xlabel="layers", ylabel="memory of the graph (kB)", ylim=(0, None), xticks=depths, title="What depth costs")
ax.legend()
plt.show()


# %% [markdown]
# A forward pass alone has no use for old results: from four layers on it needs the same few places however deep the
# network is. Training keeps results of every layer, so it grows with the depth, and with the number of rows. With the
# 256 rows here this is more than the weights need, even with their moments.
#
# ## Out of order
#
# A session has an order, and a call out of order is an error that says what comes first. It never ends the process,
# which the C library underneath would do for many of these mistakes.


# %%
def upload_early(s):
    w = s.input_2d_f32_persistent(3, 4)
    s.upload_row_major(w, np.zeros((3, 4)))


def forward_early(s):
    w = s.input_2d_f32_persistent(3, 4)
    s.matmul(w, s.input_2d_f32(6, 4))


def layer(s):
    """A linear layer with a loss."""
    w = s.input_2d_f32_persistent(3, 4)
    s.set_param(w)
    s.finalize_weights()
    x, labels = s.input_2d_f32(6, 4), s.input_1d_i32(6)
    return w, x, labels, s.cross_entropy_loss(s.matmul(w, x), labels)


def backward_without_loss(s):
    layer(s)
    s.build_backward()


def training_graph(s):
    w, x, labels, loss = layer(s)
    s.set_loss(loss)
    s.build_backward()
    s.tensor_grad(w)
    s.realize_backward()
    return w, x, labels, loss


def compute_without_reset(s):
    training_graph(s)
    s.compute_backward()


def forward_late(s):
    w, x, _, _ = training_graph(s)
    s.matmul(w, x)


def nothing_uploaded(s):
    training_graph(s)
    s.graph_reset()
    s.compute_backward()


def no_such_class(s):
    _, _, labels, _ = training_graph(s)
    s.upload_int_array(labels, [0, 1, 2, 3, 0, 0])


def wrong_shape(s):
    w = s.input_2d_f32_persistent(3, 4)
    s.finalize_weights()
    s.matmul(w, s.input_2d_f32(6, 5))


for mistake in [
    upload_early,
    forward_early,
    backward_without_loss,
    compute_without_reset,
    forward_late,
    nothing_uploaded,
    no_such_class,
    wrong_shape,
]:
    with Session(device="cpu", n_threads=1) as s:
        try:
            mistake(s)
        except (RuntimeError, ValueError) as error:
            print(f"{mistake.__name__}\n    {type(error).__name__}: {error}")

# %% [markdown]
# ## Where to go from here
#
# `examples/gpt2_by_session.py` is a whole GPT-2, written with the same verbs, one attention head at a time. The engines
# of this library go one level deeper, to `ggml_bridge.Backend` and `ggml_bridge.Graph`, and record their own backward;
# notebook 5 shows how. On another device the first argument changes, `Session(device="metal")`, and nothing else.
#
# ## Exercises
#
# 1. Write one attention head with Session verbs: `q`, `k` and `v` from three weights, `scale`, `diag_mask_inf`,
#    `softmax`, and the product with `s.transpose(v)`. Check its forward against `toy.ops.reference.attention`, then its
#    gradient. How many nodes has the backward of `softmax`?
# 2. In the network above, train `w2` and `b2` alone: no `set_param`, `tensor_grad` and `opt_step_adamw` for the others.
#    How does the picture of the memory plan change, and what does it say about training only the last layers of a
#    model?
# 3. Set `DELAY` to zero in our planner. How many bytes does it save, and whose place does `SILU_BACK` take now? Draw
#    the plan: what may lie in one place at neighbouring nodes, and would go wrong if the two were computed as one?
