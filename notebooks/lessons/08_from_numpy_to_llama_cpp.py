# %% [markdown]
# # 8. From numpy to llama.cpp
#
# A model that nobody else can load is a toy. Here a small Llama is trained in numpy and written to a GGUF file, the
# format of llama.cpp. Then llama.cpp, a C++ program by other people, reads the file and has to predict the same next
# character, position by position. On the way we read the file byte by byte, and see what it costs to store it in fewer
# bits.
#
# llama.cpp comes from `pip install xllamacpp`. Without it the cells that ask llama.cpp say so and the rest runs as
# usual.
#
# **You will be able to**
#
# * say in what a Llama differs from the transformer of lesson 1, and write each difference with its backward;
# * read a GGUF file byte by byte;
# * have another program confirm your model, and say what it costs to store it in fewer bits.
#
# **Before**: [lessons 1](01_forward_by_hand.ipynb) and [2](02_backward_by_hand.ipynb). **Time**: 45 minutes to read, 4
# hours with the thirteen exercises. Nobody has to do all of them.

# %%
import os

# the matrices here are small: more threads would only wait for each other
os.environ.setdefault("TOY_NUM_THREADS", "1")

import struct
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

try:
    import xllamacpp
except ImportError:
    xllamacpp = None

import toy
from toy.data import CharTokenizer, load_corpus, split, training_batch, validation_batches
from toy.engines import model_from
from toy.files.gguf_write import write_gguf
from toy.plots import lesson_style, smooth
from toy.trained.describe import describe
from toy.training.schedules import make_schedule

lesson_style()
BLUE, RED, GREEN, PINK, ORANGE, SKY = plt.rcParams["axes.prop_cycle"].by_key()["color"]
NO_JUDGE = "left out: llama.cpp is not installed (pip install xllamacpp)"
print("llama.cpp is here" if xllamacpp else NO_JUDGE)

# %% [markdown]
# ## A small Llama
#
# The text is the documentation inside Python, its length differs a little between versions. A token is a character. The
# few characters beyond ASCII are dropped, which keeps the tokenizer that goes into the file simple: one byte, one
# token.
#
# The model has four heads for queries and two for keys and values, so that two query heads share each pair. That is
# *grouped-query attention* (Ainslie et al. 2023): the matrices of keys and values are half as large, and so is the
# cache when it writes.

# %% alt="Training loss over 300 steps from 4.5 to 2.3 nats per character"
CONTEXT = 64
text = "".join(character for character in load_corpus().text if character.isascii())
tokenizer = CharTokenizer.from_text(text)
train, validation = split(tokenizer.encode(text), val_fraction=0.1, context=CONTEXT)
config = toy.LlamaConfig(
    vocab_size=tokenizer.vocab_size,
    d_model=64,
    n_heads=4,
    n_kv_heads=2,
    d_ff=160,
    n_layers=2,
    context_length=CONTEXT,
)
recipe = toy.recipes.FromScratch(backend="numpy")
recipe.realize(config, toy.RecipeOptions(t_seq=CONTEXT, t_batch=12, seed=0))
adamw = recipe.adamw()
schedule = make_schedule("cosine", 8e-3, 300, 30, 0.1)

losses = []
for k in range(300):
    batch = training_batch(train, batch=12, context=CONTEXT, seed=0, step=k)
    hp = adamw.hp_for_step(k, lr=schedule(k))
    losses.append(recipe.step(batch.token_ids, labels=batch.labels, hp=hp, is_first=k == 0))
parameters = recipe.parameters()
print(f"{recipe.n_parameters:,} parameters, last losses {np.mean(losses[-20:]):.2f} nats per character")

fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
ax.plot(losses, alpha=0.25, lw=1)
ax.plot(smooth(losses, span=20), color=BLUE, label="training, smoothed")
ax.axhline(np.log(config.vocab_size), color="black", ls="--", lw=1.5, label="uniform guess, ln V")
ax.set(xlabel="step", ylabel="loss (nats per character)", title="Trained in numpy")
ax.legend()
plt.show()

# %% [markdown]
# Three hundred steps are no good model, but one with opinions: it is far from a uniform guess. That matters below. Two
# programs agree easily about a model that knows nothing.

# %% [markdown]
# ## What is new in a Llama
#
# Between the transformer of lesson 1 and this model lie three changes; the RMSNorm is the same. Here they are, each
# with its backward, because it was trained.
#
# **SwiGLU.** The MLP has two matrices side by side, and one of them opens and closes the other:
# $y = \mathrm{silu}(\text{gate}) \odot \text{up}$. SiLU, $x\,\sigma(x)$, is smooth and close to GELU. A product has the
# simplest backward of all: each factor gets the gradient times the other factor.

# %% [markdown] exercise="silu"
# `1 / (1 + np.exp(-x))` is the sigmoid.

# %% [markdown] exercise="silu_backward"
# With $s = \sigma(x)$ the product rule gives $s + x \cdot s'$, and $s' = s\,(1 - s)$.

# %% [markdown] exercise="swiglu"
# One line, with the SiLU of the gate.

# %% [markdown] exercise="swiglu_backward"
# `d_up` is `d_y` times `silu(gate)`. `d_gate` is `d_y * up` times the slope of SiLU, which you have just written.

# %% [markdown]
# **RoPE.** Positions are not added to the embedding. In every layer, queries and keys are *turned*: the numbers of a
# head are taken in pairs, and each pair is a point in the plane that is turned by an angle that grows with the
# position. The dot product of a query and a key then depends on the difference of their positions only. The first pair
# turns fast, the last hardly at all.
#
# A rotation keeps lengths, and what undoes it is the rotation back. So the backward is the forward with the angles
# reversed.

# %% [markdown] exercise="rope"
# Take `x` as `(N, n_heads, d_head/2, 2)`: the last axis holds the two numbers of a pair. The angles have the shape
# `(N, 1, d_head/2)`, so that all heads are turned alike.

# %% [markdown] exercise="rope_backward"
# Only the sign of the sine changes.

# %% [markdown]
# **Grouped-query attention.** Two query heads read the same keys and values. In the forward each key head is simply
# used twice; in the backward what comes from both uses is added, as always when a value is used twice.
#
# When the model writes, it computes the keys and values of one token at a time and keeps those of all tokens before,
# the *key/value cache*.

# %% [markdown] exercise="grouped_attention"
# `np.repeat(k, H // G, axis=1)` gives each query head its key head. Then it is the causal attention of lesson 1.

# %% [markdown] exercise="grouped_attention_backward"
# Compute `d_k` and `d_v` for every query head first, `(B, H, T, d)`, then `reshape` to `(B, G, H // G, T, d)` and sum
# over the axis of the group.

# %% [markdown] exercise="kv_cache_step"
# Write first, then read places `0` to `n`, which are `n + 1`. What lies behind them is of an earlier text.

# %% [markdown]
# ## Into a file
#
# `write_gguf` takes the config, the arrays and the tokenizer. The names and shapes of our parameters are those of GGUF
# already, and so is the order of rows in `attn_q` and `attn_k` (the pairs that RoPE turns stand side by side), so
# nothing is renamed or permuted.

# %%
folder = tempfile.TemporaryDirectory()  # give it a place of your own to keep the files
paths = {kind: Path(folder.name, f"small-llama-{kind}.gguf") for kind in ["f32", "f16", "q8_0"]}
write_gguf(paths["f32"], config, parameters, tokenizer, metadata={"general.name": "small llama"})

data = paths["f32"].read_bytes()
print(f"{len(data):,} bytes in the file, {4 * recipe.n_parameters:,} of them are the float32 numbers")
print(data[:4])

# %% [markdown]
# The tokenizer is in the file too. Ours is a list of characters. That of a large model is a list of *merges*, found by
# byte-pair encoding: begin with single bytes; find the pair that stands side by side most often, make it a token of its
# own; repeat some ten thousand times. Two functions are all that it needs.

# %% [markdown] exercise="most_frequent_pair"
# Count the pairs `zip(ids, ids[1:])` in a dictionary. For the tie, `min` with the key `(-count, pair)` finds the
# highest count and, among equals, the lowest ids.

# %% [markdown] exercise="merge_pair"
# Go through the list with an index of your own: after a pair it moves on by two, otherwise by one. At the last place
# there is no pair any more.

# %% [markdown]
# ## What is inside
#
# The file begins with four letters. What follows is meant to be read from front to back, with four kinds of things:
#
# | part | what it says |
# |---|---|
# | header | `GGUF`, the version, how many tensors, how many metadata entries |
# | metadata | entries of a key, a type and a value: sizes of the model, the tokenizer, anything |
# | tensor list | for each tensor its name, shape, type, and at which byte of the data it begins |
# | tensor data | the numbers; every tensor begins at a multiple of 32 bytes |
#
# Strings are a length (8 bytes) and the characters. Shapes stand in ggml's order, the fastest axis first, so a matrix
# (out, in) is written as in, out. A whole reader fits on a page. (`toy.GGUF` is longer because it believes nothing: a
# file from a stranger can claim a string of a terabyte.)

# %%
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TYPES = {0: "F32", 1: "F16", 8: "Q8_0"}


class Reader:
    """Reads from front to back and notes which bytes were what: spans of (start, stop, part, label)."""

    def __init__(self, data):
        self.data, self.position, self.spans = data, 0, []

    def number(self, form):
        (value,) = struct.unpack_from("<" + form, self.data, self.position)
        self.position += struct.calcsize("<" + form)
        return value

    def string(self):
        length = self.number("Q")
        self.position += length
        return self.data[self.position - length : self.position].decode()

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:  # an array: the kind of its items, how many, the items
            kind, n = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(n)]
        return self.number(SCALARS[kind])

    def note(self, start, part, label):
        self.spans.append((start, self.position, part, label))


def read_gguf(data):
    """-> metadata {key: value}, tensors {name: (shape, type, first byte)}, spans."""
    r = Reader(data)
    magic, version, n_tensors, n_entries = (r.number(form) for form in "IIQQ")
    assert magic == int.from_bytes(b"GGUF", "little") and version == 3
    r.note(0, "header", "header")
    metadata, tensors = {}, {}
    for _ in range(n_entries):
        start, key = r.position, r.string()
        metadata[key] = r.value(r.number("I"))
        r.note(start, "metadata", key)
    for _ in range(n_tensors):
        start, name = r.position, r.string()
        shape = [r.number("Q") for _ in range(r.number("I"))]
        tensors[name] = (tuple(reversed(shape)), TYPES[r.number("I")], r.number("Q"))
        r.note(start, "tensor list", name)
    first = -(-r.position // 32) * 32  # the data begin at the next multiple of 32
    tensors = {name: (shape, kind, first + offset) for name, (shape, kind, offset) in tensors.items()}
    return metadata, tensors, r.spans


metadata, tensors, spans = read_gguf(data)
for key, value in metadata.items():
    print(f"{key:42} {value if not isinstance(value, list) else f'{value[:6]} ... {len(value)} items'}")

# %% [markdown]
# No code is in the file and no pickle, only what the model *is*. A program that knows the word `llama` knows what to do
# with these sizes. Here are the first bytes, in the manner of a hex editor, coloured by what they belong to.

# %% alt="The first 224 bytes of the file as hexadecimal numbers with their letters, coloured by field: magic, version, number of tensors, number of entries, then metadata"
PART_COLOURS = {"header": ORANGE, "metadata": SKY, "tensor list": PINK, "tensor data": GREEN}
COLUMNS, ROWS = 32, 7
FIELDS = [(0, 4, "magic"), (4, 8, "version"), (8, 16, "tensors"), (16, 24, "entries")]
FIELDS += [(start, stop, "") for start, stop, _, _ in spans[1:]]

fig, ax = plt.subplots(figsize=(13, 3.7), layout="constrained")
for i, byte in enumerate(data[: COLUMNS * ROWS]):
    row, column = divmod(i, COLUMNS)
    number = next(n for n, (start, stop, _) in enumerate(FIELDS) if start <= i < stop)
    colour = ORANGE if i < 24 else SKY
    ax.add_patch(plt.Rectangle((column, row), 1, 1, color=colour, alpha=0.65 if number % 2 else 0.3, lw=0))
    ax.text(
        column + 0.5,
        row + 0.36,
        f"{byte:02x}",
        ha="center",
        va="center",
        fontsize=9,
        family="monospace",
    )
    letter = chr(byte) if 33 <= byte < 127 else "·"
    ax.text(column + 0.5, row + 0.76, letter, ha="center", va="center", fontsize=9, color="0.25")
for start, stop, label in FIELDS[:4]:
    ax.text((start + stop) / 2, -0.35, label, ha="center", fontsize=11)
ax.text(24.2, -0.35, "metadata: length of the key, key, type, value ...", fontsize=11)
ax.set(xlim=(0, COLUMNS), ylim=(ROWS, -0.9), xticks=[], ylabel="first byte of the line")
ax.set_title("The first bytes of the file")
ax.set_yticks(np.arange(ROWS) + 0.5, np.arange(ROWS) * COLUMNS)
ax.tick_params(length=0)
for side in ax.spines.values():
    side.set_visible(False)
plt.show()

# %% [markdown]
# Light and dark take turns from one field, and then from one metadata entry, to the next. All numbers are
# little-endian, the smallest byte first, and the picture shows them in hexadecimal: the tensors are `14 00 ...`,
# twenty. Find the length of the key `general.architecture`, the `08` that says *string*, and the length of `llama`.
#
# Now the whole file, drawn to scale: above all of it, below the part before the data.

# %% alt="Above the whole file as a strip: a thin part before the data, then the tensors; below that part enlarged: header, metadata with the tokenizer as the largest entries, and the tensor list"
ends = [*sorted(first for _, _, first in tensors.values())[1:], len(data)]
blocks = [(first, end, name) for (name, (_, _, first)), end in zip(tensors.items(), ends)]
before_data = blocks[0][0]

fig, axes = plt.subplots(2, 1, figsize=(13, 5), layout="constrained")
axes[0].broken_barh([(0, before_data)], (0, 1), color=SKY)
for start, end, name in blocks:
    is_vector = len(tensors[name][0]) == 1
    axes[0].broken_barh([(start, end - start)], (0, 1), fc="black" if is_vector else GREEN, alpha=0.5, lw=0)
    if end - start > 0.015 * len(data):
        label = name.removesuffix(".weight")
        axes[0].text((start + end) / 2, 0.5, label, rotation=90, ha="center", va="center", fontsize=11)
for i, (start, stop, part, label) in enumerate(spans):
    axes[1].broken_barh([(start, stop - start)], (0, 1), color=PART_COLOURS[part], alpha=0.9 if i % 2 else 0.5, lw=0)
    if stop - start > 0.1 * before_data:
        axes[1].text(
            (start + stop) / 2,
            0.5,
            label.replace("tokenizer.", "tokenizer\n."),
            ha="center",
            va="center",
            fontsize=11,
        )
for part in ["header", "metadata", "tensor list"]:
    axes[1].bar(0, 0, color=PART_COLOURS[part], label=part)
axes[1].legend(ncols=3, fontsize=11, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
axes[0].set(
    xlim=(0, len(data)),
    yticks=[],
    title="The whole file (blue: everything before the data)",
    xlabel="byte",
)
axes[1].set(xlim=(0, before_data), yticks=[], xlabel="byte")
axes[1].set_title("Before the data", loc="left")
plt.show()

# %% [markdown]
# Most of a model file is numbers, even for a model this small. The thin dark lines among the matrices are the gains of
# the norms. Each tensor can be used where it lies: map the file into memory, go to its first byte, and look at the
# bytes as float32. That is why opening a GGUF file of many gigabytes takes no time.

# %%
shape, kind, first = tensors["blk.0.attn_k.weight"]
key_matrix = np.frombuffer(data, "<f4", count=np.prod(shape), offset=first).reshape(shape)
print("blk.0.attn_k.weight", shape, kind, "from byte", first)
print(
    "the same numbers as in the recipe:",
    np.array_equal(key_matrix, parameters["blk.0.attn_k.weight"]),
)

# %% [markdown]
# `toy describe FILE` prints a card of any GGUF file, with the algorithm of its model written out. The shape of `W_k`
# and the line about `g` say what grouped-query attention is.

# %%
console = Console(width=140, force_jupyter=False, color_system=None)
with console.capture() as capture:
    console.print(describe(paths["f32"]))
card = capture.get().replace(folder.name + os.sep, "")  # without the way to the temporary folder
print("\n".join(line.rstrip() for line in card.splitlines()))


# %% [markdown]
# ## llama.cpp as the judge
#
# We give llama.cpp the first 1, 2, 3, ... characters of a text from the validation part and ask for the
# log-probabilities of everything that could come next. Its server answers for one position at a time, so there is one
# request per position. Three settings make the comparison strict: one thread, a key/value cache in float32 (it would
# keep half precision otherwise), and no flash attention.


# %%
class LlamaCpp:
    """A model file in llama.cpp."""

    def __init__(self, path):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = 2 * CONTEXT
        settings.n_parallel, settings.warmup, settings.fit_params = 1, False, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.verbosity = -1
        self.server = xllamacpp.Server(settings)

    def ask(self, **request):
        return self.server.handle_completions(request | {"temperature": 0})["choices"][0]

    def log_probabilities(self, ids):
        """ids (T,) -> (T, V): of the token after each of the T prefixes"""
        rows = np.full((len(ids), config.vocab_size), np.nan)
        for t in range(len(ids)):
            answer = self.ask(prompt=ids[: t + 1].tolist(), n_predict=1, n_probs=config.vocab_size)
            for entry in answer["logprobs"]["content"][0]["top_logprobs"]:
                rows[t, entry["id"]] = entry["logprob"]
        return rows


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


model = model_from(config, parameters, backend="numpy")
excerpt = validation[1000 : 1000 + CONTEXT - 1]
ours = log_softmax(model.forward(excerpt)[0])  # (T, V)
wrong_way_round = parameters | {"blk.0.attn_q.weight": parameters["blk.0.attn_q.weight"].T.copy()}
off = np.abs(log_softmax(model_from(config, wrong_way_round, backend="numpy").forward(excerpt)[0]) - ours)
print(f"W_q of the first layer transposed: {np.mean(off > 1e-3):.1%} of the log-probabilities move by more than 1e-3")
if xllamacpp:
    judge = LlamaCpp(paths["f32"])
    theirs = judge.log_probabilities(excerpt)
    difference = np.abs(ours - theirs)
    print(f"{difference.size:,} log-probabilities from {ours.min():.1f} to {ours.max():.2f} nats")
    print(f"largest difference {difference.max():.1e}, mean {difference.mean():.1e}")
    assert difference.max() <= 1e-3
else:
    print(NO_JUDGE)

# %% alt="Log-probabilities of all characters at each position as numpy computes them, and below the differences from llama.cpp, nearly all below 1e-5"
if xllamacpp:
    characters = [{" ": "␣", "\n": "⏎"}.get(c, c) for c in tokenizer.decode(excerpt)]
    pixels = dict(aspect="auto", interpolation="nearest")
    fig, axes = plt.subplots(2, 1, figsize=(12, 6), layout="constrained", sharex=True)
    image = axes[0].imshow(ours.T, cmap="viridis", vmin=-12, vmax=0, **pixels)
    fig.colorbar(image, ax=axes[0], label="log-probability (nats)")
    axes[0].set(ylabel="id of the next character", title="What numpy computes")
    exponent = np.log10(np.maximum(difference, 1e-9))
    image = axes[1].imshow(exponent.T, cmap="magma", vmin=-8, vmax=-3, **pixels)
    fig.colorbar(image, ax=axes[1], label="log10 of the difference")
    axes[1].set(
        ylabel="id of the next character",
        title="Difference from llama.cpp; the bar we set is -3, the brightest colour",
    )
    axes[1].set_xticks(range(len(characters)), characters)
    axes[1].tick_params(axis="x", length=0)
    plt.show()
else:
    print(NO_JUDGE)

# %% [markdown]
# Above: a light row is a character that is likely nearly everywhere, such as the space near the top. Below: what is
# left between the two programs is rounding, in the sixth digit or so. Everything has to be right for that: every matrix
# the right way round, the pairs of RoPE, the sharing of heads, the epsilon in the norm. A single transposed square
# matrix would still run, and this picture would be of its brightest colour nearly all over: the share is printed above.
#
# The greedy text, where each program always takes the character it finds most likely:

# %%
PROMPTS = ["The ", "If an ", "class "]
for prompt in PROMPTS:
    n_tokens = CONTEXT - len(prompt) - 1
    our_text = tokenizer.decode(model.generate(tokenizer.encode(prompt), n_tokens, temperature=0))
    print("numpy    ", repr(prompt + our_text))
    if xllamacpp:
        their_text = judge.ask(prompt=prompt, n_predict=n_tokens)["text"]
        print("llama.cpp", repr(prompt + their_text))
        assert their_text == our_text
if not xllamacpp:
    print(NO_JUDGE)

# %% [markdown]
# A model of this size has little to say when it always takes the most likely character, and repeats itself. But both
# programs repeat the same thing. The prompts went to llama.cpp as text. So its tokenizer, which it built from the
# metadata, gave the same ids too.
#
# ## What quantising costs
#
# The same model in two smaller types. `f16` is half precision. `Q8_0` cuts each row into blocks of 32 numbers and
# stores for each block one scale (a half-precision number) and 32 whole numbers from -127 to 127: 34 bytes instead of
# 128. Here is one block, read by hand.

# %% [markdown] exercise="quantise_q8_0"
# `np.rint` rounds to the nearest. Divide by the scale only where it is not zero.

# %% [markdown] exercise="dequantise_q8_0"
# `raw.reshape(-1, 34)` puts one block into each row. `.view("<f2")` of the first two columns reads them as
# half-precision numbers (on a copy, `np.ascontiguousarray`, since the columns are not side by side in memory),
# `.view(np.int8)` of the others as signed integers.

# %% alt="The 32 numbers of a block and what Q8_0 makes of them, which lie on each other; below the errors, within half a step"
for kind in ["f16", "q8_0"]:
    write_gguf(paths[kind], config, parameters, tokenizer, type=kind)

name = "blk.0.ffn_gate.weight"
quantised = paths["q8_0"].read_bytes()
first = read_gguf(quantised)[1][name][2]
scale = np.frombuffer(quantised, "<f2", count=1, offset=first)[0]
integers = np.frombuffer(quantised, np.int8, count=32, offset=first + 2)
original = parameters[name][0, :32]
decoded = np.float32(scale) * integers
print(f"scale {scale:.6f}, integers {integers[:10]} ...")
with toy.GGUF.open(paths["q8_0"]) as gguf:
    print("as toy.GGUF reads it:", np.array_equal(decoded, gguf.dequantize(name)[0, :32]))

fig, axes = plt.subplots(2, 1, figsize=(10, 5), layout="constrained", sharex=True, height_ratios=[2, 1])
axes[0].plot(original, "o", ms=9, color=BLUE, label="float32")
axes[0].plot(decoded, "x", ms=8, mew=2, color=RED, label="scale times integer")
axes[0].set(ylabel="weight", title="One block of Q8_0", ylim=(-1.6 * np.abs(original).max(), None))
axes[0].legend(ncols=2, fontsize=11, loc="lower right")
axes[1].stem(decoded - original, linefmt=RED, markerfmt=" ", basefmt="k-")
for half in [-scale / 2, scale / 2]:
    axes[1].axhline(half, color="black", ls="--", lw=1)
axes[1].set(xlabel="position in the block", ylabel="error")
axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
plt.show()

# %% [markdown]
# In the upper picture the crosses sit on the dots. The error is at most half a step, the dashed lines, and the step is
# set by the largest number of the block. That is the reason for blocks: an unusually large weight spoils the precision
# of its 31 neighbours and no others.
#
# What does the model lose? We read each file back and measure: bytes, the error of the weights, the loss on the
# validation text, and how far the log-probabilities moved, in numpy and in llama.cpp.

# %%
windows = validation_batches(validation, batch=100, context=CONTEXT, n_batches=1, seed=0)[0]


def loss_of(parameters):
    """Mean cross-entropy on the windows (nats per character)"""
    logits, _ = model_from(config, parameters, backend="numpy").forward(windows.token_ids)
    log_p = log_softmax(logits)  # (B, T, V)
    return -np.take_along_axis(log_p, windows.labels[..., None], axis=-1).mean()


def relative_error(parameters_now):
    """RMS error of all weights over their RMS"""
    error = sum(((parameters_now[n] - w) ** 2).sum() for n, w in parameters.items())
    return np.sqrt(error / sum((w**2).sum() for w in parameters.values()))


exact = loss_of(parameters)
print("type   bytes    weight error  loss    loss - f32   largest change of a log-probability")
for kind, path in paths.items():
    with toy.GGUF.open(path) as gguf:
        stored = gguf.parameters()
    change = np.abs(log_softmax(model_from(config, stored, backend="numpy").forward(excerpt)[0]) - ours).max()
    loss = loss_of(stored)
    row = f"{kind:5} {path.stat().st_size:8,} {relative_error(stored):11.1e} {loss:10.4f} {loss - exact:+11.6f}"
    row += f"     numpy {change:.4f}"
    if xllamacpp:
        change = np.abs(LlamaCpp(path).log_probabilities(excerpt) - ours).max()
        row += f", llama.cpp {change:.4f}"
    print(row)
if not xllamacpp:
    print("llama.cpp's column is", NO_JUDGE)


# %% [markdown]
# Little more than a quarter of the bytes, and the loss moves in the fourth digit behind the point, here even to the
# better: an error that small can help as well as harm. llama.cpp is further away from the float32 model than numpy is,
# because it rounds the activations too before it multiplies: integers times integers are faster.
#
# So how few bits are enough? We can find out without any file, by rounding the matrices the way `Q8_0` does, to $b$
# bits instead of 8: blocks of 32, integers from $-(2^{b-1}-1)$ to $2^{b-1}-1$. Two bits leave -1, 0 and 1.


# %% alt="On the left the relative error of the weights over 8 to 2 bits, from 0.004 to 0.5; on the right the validation loss, flat down to 4 bits and much higher at 2"
def rounded(w, bits):
    """w (out, in) as a type with this many bits in blocks of 32 would store it"""
    largest = 2 ** (bits - 1) - 1
    blocks = w.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / largest
    integers = np.round(blocks / np.maximum(scale, 1e-30))
    return (scale * integers).reshape(w.shape).astype(np.float32)


bits = [8, 6, 5, 4, 3, 2]
costs, errors = [], []
for b in bits:
    candidate = {n: rounded(w, b) if w.ndim == 2 else w for n, w in parameters.items()}
    costs.append(loss_of(candidate) - exact)
    errors.append(relative_error(candidate))
    print(f"{b} bits and the scale: error {errors[-1]:.3f}, loss {exact + costs[-1]:.3f} ({costs[-1]:+.4f})")

fig, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
axes[0].semilogy(bits, errors, "o-", ms=9)
axes[0].set(xlabel="bits per weight (and the scale)", ylabel="relative error of the weights", title="The weights")
axes[1].plot(bits, exact + np.array(costs), "o-", ms=9, color=RED, label="rounded")
axes[1].axhline(exact, color="black", ls="--", lw=1.5, label="float32")
axes[1].set(xlabel="bits per weight (and the scale)", ylabel="validation loss (nats)", title="The loss")
axes[1].legend()
for ax in axes:
    ax.set_xticks(bits)
    ax.invert_xaxis()
plt.show()

# %% [markdown]
# Each bit less doubles the error of the weights (the last ones do more), that is the straight line on the left. The
# loss takes no notice for a long time and then goes up steeply. This bend is why models are passed around in four or
# five bits. The model of notebook 7 is one of them: its type `Q4_1` stores a minimum beside the scale of each block, so
# that none of its sixteen values is wasted.
#
# ## The way back
#
# What llama.cpp can read, toy can read too: `config()` gives the sizes, `parameters()` the weights as float32 arrays.
# From our own file we get our own model back, to the last bit.

# %%
with toy.GGUF.open(paths["f32"]) as gguf:
    config_back, parameters_back = gguf.config(), gguf.parameters()
model_back = model_from(config_back, parameters_back, backend="numpy")

print("the same config: ", config_back == config)
print("the same weights:", all(np.array_equal(parameters_back[n], w) for n, w in parameters.items()))
print("the same logits: ", np.array_equal(model_back.forward(excerpt)[0], model.forward(excerpt)[0]))
folder.cleanup()

# %% [markdown]
# `toy export RUN --out model.gguf` does the same for a run of `toy train`, and `toy generate model.gguf` reads such a
# file, whoever made it.
#
# ## Exercises
#
# 1. Break the export on purpose: swap two rows of `blk.0.attn_q.weight` before writing it, or turn the pairs of RoPE
#    into halves (rows 0, 2, 4, ... of each head first, then 1, 3, 5, ...). What does the picture of the differences
#    look like, and does the greedy text still look sensible?
# 2. Round only one kind of matrix to 3 bits (`attn_q`, `attn_v`, `ffn_down`, the embedding, ...) and leave the rest
#    alone. Which one costs the most loss per byte saved? Files called `Q4_K_M` mix types for this reason.
# 3. Write `rounded` with a minimum beside the scale, as `Q4_1` does. How much lower is the error at 2, 3 and 4 bits,
#    and what do the additional bytes cost?
