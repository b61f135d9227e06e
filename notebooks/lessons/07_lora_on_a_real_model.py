# %% [markdown]
# # 7. LoRA on a real model
#
# The models of the other notebooks were born on this computer. This one comes from outside: SmolLM2-135M-Instruct, 135
# million parameters, trained by Hugging Face on two trillion tokens. Nobody trains that again to change its style a
# little. *Low-rank adaptation*, LoRA (Hu et al. 2021), freezes the model and trains a small correction beside each
# matrix. A few hundred lines of text and less than a minute are enough to see it work.
#
# The file has 98 MB, because most of its weights are stored in four bits each, with a scale and a minimum for every 32
# of them. Get it once with `toy fetch smollm2-135m`. Without it the first cell ends with an error that says so.
#
# **You will be able to**
#
# * say what LoRA trains, what it leaves alone, and what that saves;
# * write the adapter's forward and backward, and merge it into its matrix;
# * measure what a fine-tuning has changed, on held-out text and on other text.
#
# **Before**: [lessons 2](02_backward_by_hand.ipynb) and [4](04_train_and_plot.ipynb). **Time**: 40 minutes to read, 2
# hours with the three exercises.

# %%
import codecs
import contextlib
import io
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import toy
from toy.engines.adapters import TARGETS
from toy.files.places import find_model
from toy.models.generation import generate
from toy.plots import lesson_style, smooth
from toy.trained.look import look_inside
from toy.training import LoRAOptions, Training

lesson_style()
BLUE, RED, GREEN, PINK, ORANGE, SKY = plt.rcParams["axes.prop_cycle"].by_key()["color"]

gguf = toy.GGUF.open(find_model("smollm2-135m"))  # memory-mapped: opened, not read
config = gguf.config()
print(f"{gguf.n_parameters:,} parameters in {gguf.n_bytes / 1e6:.0f} MB")
print(f"{config.n_layers} layers, {config.d_model} wide, {config.vocab_size:,} tokens in the vocabulary")

# %% [markdown]
# ## Look inside first
#
# What does such a model do with a prompt? `toy look smollm2-135m --prompt "The capital of France is"` makes a page of it for a
# browser. Its numbers are at hand in Python too: the attention of every head, and what the model would say if it had to
# answer after each block (the *logit lens*: the residual stream of that depth, put through the last norm and the head).

# %% alt="Left, the attention of one head of SmolLM2 over five words. Right, the probability of Paris, near zero until the last blocks."
with toy.load("smollm2-135m") as loaded:
    words = loaded.tokenizer
    ids = words.encode("The capital of France is")
    inside = look_inside(loaded.model, words, ids)
pieces = [words.decode([i]) for i in ids]
paris = inside.followed[-1].tolist().index(words.encode(" Paris")[0])
rising = inside.followed_probabilities[-1, paris]  # (L+1,)

# the head whose last token looks most at "France", the beginning of the text aside, where many heads rest
at = pieces.index(" France")
layer, head = np.unravel_index(inside.attention[:, :, -1, at].argmax(), inside.attention.shape[:2])
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
shown = np.where(np.triu(np.ones((len(ids), len(ids)), bool), k=1), np.nan, inside.attention[layer, head])
image = left.imshow(shown, cmap="viridis", vmin=0, vmax=1)
left.set_xticks(range(len(ids)), pieces, rotation=30)
left.set_yticks(range(len(ids)), pieces)
left.set(xlabel="key: looked at", ylabel="query: looking", title=f"Attention of block {layer}, head {head}")
fig.colorbar(image, ax=left, label="probability")
right.plot(range(-1, config.n_layers), rising, "o-", ms=5)  # -1: the embedding alone
right.set(
    xlabel="after block (-1: the embedding alone)",
    ylabel='probability of " Paris"',
    ylim=(-0.02, 1),
    title="The logit lens at the last token",
)
plt.show()
for block in (20, 27, 28, 29):
    print(f"after block {block}: {rising[block + 1]:.2f}")
assert rising[21] < 0.01 < rising[29] < 0.5 < rising[30]  # it comes late, and suddenly

# %% [markdown]
# For most of its way the stream says nothing of Paris; the last blocks turn it there. Keep the picture in mind: all that LoRA
# changes is small beside what is there already.
#
# ## The idea
#
# Fine-tuning changes a matrix $W$ to $W + \Delta W$. LoRA's assumption is that $\Delta W$ can be of low rank $r$, so it
# is written as a product of two thin matrices, and only these are trained:
#
# $$ y = x W^T + \frac{\alpha}{r}\, (x A^T) B^T, \qquad A: (r, \text{in}), \quad B: (\text{out}, r) $$
#
# $A$ starts small and random and $B$ at zero. So $\Delta W = \frac{\alpha}{r} B A$ is zero in the beginning, and
# training starts at exactly the model in the file.
#
# What is gained? $W$ has out × in numbers, the adapter $r$ × (out + in).

# %% [markdown] exercise="lora"
# Two ways from `x` to `y`, added: through `weight.T`, and through `a.T` and then `b.T`, scaled with alpha over the
# rank. The rank is the number of rows of `a`.

# %% [markdown] exercise="lora_backward"
# The adapter is two linear layers in a row, `x -> a -> b`. Compute the small array in the middle, `x @ a.T`, again, go
# back through `b`, then through `a`. `W` passes the gradient on and gets none.

# %%
RANK = 8
print(f"rank {RANK}      W (out, in)        in W   in A and B")
n_adapters = 0
for target, stem in TARGETS.items():
    n_out, n_in = gguf.tensors[f"blk.0.{stem}.weight"].shape
    n_adapters += config.n_layers * RANK * (n_out + n_in)
    print(f"{target:8} {n_out:6} x {n_in:4} {n_out * n_in:12,} {RANK * (n_out + n_in):12,}")
print(
    f"all {config.n_layers} layers: {n_adapters:,} numbers to train, {n_adapters / gguf.n_parameters:.1%} of the model"
)

# %% [markdown]
# The saving in memory is larger than that. AdamW wants three more numbers for each number it trains: the gradient and
# two moments. And what is not trained need not be float32. The matrices stay in the file, in their four bits. The
# engine multiplies with them in place and unpacks only what it is about to use.

# %% alt="Memory for weights, gradients and moments as bars: 2152 MB to train everything, 577 MB for LoRA on a float32 model, 136 MB for LoRA on the file as it is"
full = 4 * gguf.n_parameters / 1e6  # MB, float32
adapters = 4 * n_adapters / 1e6
bars = {  # what -> (weights, gradients, moments)
    "train everything": (full, full, 2 * full),
    "LoRA on a float32 model": (full + adapters, adapters, 2 * adapters),
    "LoRA on the file as it is": (gguf.n_bytes / 1e6 + adapters, adapters, 2 * adapters),
}
fig, ax = plt.subplots(figsize=(10, 3), layout="constrained")
left = np.zeros(len(bars))
for label, colour, values in zip(["weights", "gradients", "moments"], [SKY, ORANGE, GREEN], zip(*bars.values())):
    ax.barh(list(bars), values, left=left, color=colour, label=label)
    left += values
for i, total in enumerate(left):
    ax.text(total + 20, i, f"{total:,.0f} MB", va="center")
ax.set(xlabel="MB, without activations", xlim=(0, 1.15 * left.max()), title="What has to be in memory")
ax.invert_yaxis()
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## The text
#
# It has to have a clear style, and it should be on every computer. Python's own manual is: the chapter on the methods
# of strings, which `help()` shows, a few hundred lines. Its style is strict: a signature at the margin, an empty line,
# an indented paragraph that begins with *Return ...*, code after `>>>`, everything quoted in `"..."` and wrapped after
# 70 characters. The model has surely read this manual in some form, so what is new to it is less the content than the
# form. (The text differs a little between versions of Python, and the numbers below with it.)
#
# The last fifth of the chapter is held out. There the methods are others, the style is the same.

# %%
text = topics["string-methods"]
folder = tempfile.TemporaryDirectory()
corpus = Path(folder.name, "string-methods.txt")
corpus.write_text(text, encoding="utf-8")

training = Training(
    LoRAOptions(
        model="smollm2-135m",
        corpus=str(corpus),
        rank=RANK,
        targets=tuple(TARGETS),
        steps=30,
        batch=1,
        context=128,
        lr=3e-3,
        schedule="cosine",
        warmup=5,
        eval_every=10,
        eval_batches=4,
        sample_every=1000,  # samples are drawn below
        sample_tokens=1,
        val_fraction=0.2,
        seed=0,
    )
)
recipe, tokenizer = training.recipe, training.tokenizer
folder.cleanup()  # the text has been read

print(f"{len(text.splitlines())} lines")
for choice in training.choices():
    if choice.name in (
        "tokens",
        "adapters",
        "model",
        "parameters",
        "steps",
        "learning rate",
        "ln(V)",
    ):
        print(f"{choice.name:14} {choice.value}  ({choice.reason})".replace("  ()", ""))
start = text.index("str.center")
print("\n" + text[start : start + 560])

# %% [markdown]
# ## Before
#
# Two things are kept for later: the loss of every token in some windows of the held-out part, and a sample. The prompts
# are signatures of methods that Python does not have, so they cannot be known by heart. (They end before the line
# break, because this tokenizer makes one token of a line break and the indentation after it. That token is a part of
# the style.)

# %%
CONTEXT = training.options.context


def token_losses(ids):
    """ids (T+1,) -> (T,): the cross-entropy of each token after the first, in nats"""
    logits = recipe.logits(ids[None, :-1])[0].astype(np.float64)  # (T, V)
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))  # (T,)
    return log_sum - logits[np.arange(len(logits)), ids[1:]]


held_out = training.split.validation
starts = range(0, min(4, (len(held_out) - 1) // CONTEXT) * CONTEXT, CONTEXT)
windows = np.stack([held_out[start : start + CONTEXT + 1] for start in starts])  # (W, T+1)
before = np.stack([token_losses(window) for window in windows])  # (W, T)


def continue_prompt(model, prompt, n_tokens=50):
    """The most likely continuation, with the prompt in front."""
    ids = tokenizer.encode(prompt)
    return prompt + "".join(tokenizer.stream(generate(model, ids, n_tokens, temperature=0)))


PROMPTS = ["str.shuffle([seed])", "str.encrypt(key[, mode])"]
print(f"held-out loss {before.mean():.3f} nats per token")
for prompt in PROMPTS:
    print("\n---", continue_prompt(training.model(), prompt))

# %% [markdown]
# And a text of quite another kind, to see later whether it was forgotten: the Zen of Python, which `import this`
# prints.

# %%
with contextlib.redirect_stdout(io.StringIO()):
    import this
zen = tokenizer.encode(codecs.decode(this.s, "rot13"))[: CONTEXT + 1]
zen_before = token_losses(zen).mean()
print(f"Zen of Python: {zen_before:.3f} nats per token")


# %% [markdown]
# ## The run
#
# The loop is the one of notebook 4. Each step reads 128 tokens, runs forward and backward through all 135 million
# parameters, and changes the adapters. The learning rate is a hundred times what one would use for the whole model: the
# adapters begin at zero and have a way to go.


# %% alt="Training loss over 30 steps, faint and smoothed, and the held-out points at 0, 10, 20 and 30 steps: most of the gain is in the first ten"
def draw(ax, losses, validation):
    ax.clear()
    steps = np.arange(1, len(losses) + 1)
    ax.plot(steps, losses, color=BLUE, alpha=0.25, lw=1)
    if losses:
        ax.plot(steps, smooth(losses, span=8), color=BLUE, label="training, smoothed")
    ax.plot(validation.keys(), validation.values(), "o", ms=10, color=RED, label="held out")
    ax.axhline(validation[0], color="black", ls="--", lw=1.5, label="held out, without adapters")
    ax.set(
        xlim=(-0.5, training.options.steps + 0.5),
        xlabel="step",
        ylabel="loss (nats per token)",
        title="Training the adapters",
    )
    ax.legend()


losses, validation = [], {}
fig, ax = plt.subplots(figsize=(9, 4.4), layout="constrained")
picture = display(fig, display_id=True)
for event in training.run():
    if event.kind == "step":
        losses.append(event.loss)
    elif event.kind == "eval":
        validation[event.step] = event.loss
    if event.kind == "run_end" or (event.kind == "step" and event.step % 5 == 0):
        draw(ax, losses, validation)
        picture.update(fig)
plt.close(fig)

# %% [markdown]
# The batches differ a lot, some parts of the chapter are tables and others prose, so the blue line jumps. The red points are
# measured on the same tokens each time. Here they are as numbers.

# %%
for step, loss in validation.items():
    print(f"after {step:2} steps: held-out loss {loss:.3f} nats per token")
total, first = validation[0] - validation[30], validation[0] - validation[10]
read = training.options.steps * CONTEXT / len(training.split.train)
print(f"the first ten steps brought {first / total:.0%} of the gain; read: {read:.0%} of the training part's length")

# %% [markdown]
# Form is learned fast. What the blue line does beyond the red points is another thing: windows overlap, so parts of the text
# come back, and what comes back can be remembered. The red points are what counts.
#
# ## After
#
# The same windows and the same prompts again.

# %%
after = np.stack([token_losses(window) for window in windows])
zen_after = token_losses(zen).mean()
difference = (before - after).mean()
error = (before - after).std() / np.sqrt(before.size)
print("the four windows from above, without what is left over at the end of the held-out part:")
print(
    f"held-out loss {before.mean():.3f} -> {after.mean():.3f} nats per token: lower by {difference:.2f} ± {error:.2f}"
)
print(f"perplexity    {np.exp(before.mean()):.1f} -> {np.exp(after.mean()):.1f}")
print(f"Zen of Python {zen_before:.3f} -> {zen_after:.3f}")
for prompt in PROMPTS:
    print("\n---", continue_prompt(training.model(), prompt))


# %% [markdown]
# The ± is the standard error over the tokens (taken as independent, which neighbours are not quite). The margin is many
# times as large: it is no luck.
#
# How much of the form do the samples have? Look for the empty line between two entries, `str.` at the margin, a break before the
# line gets long. Before, the model closed a code block and explained, or went on with code. What it says about methods that
# do not exist is made up, as it has to be: a few hundred lines teach a manner, hardly any facts.
#
# The Zen of Python is predicted about as well as before, so the model has not paid for its new manner by forgetting
# others, at least not in so short a run. And the base was not touched: without the adapters it is what it was.
#
# Where was the gain made? Here is a part of the held-out text, each token coloured by how much better (blue) or worse
# (red) it is predicted.


# %% alt="A piece of the held-out manual, each token on a background of its gain: line breaks, indentations and 'Return' are dark blue, some words are red"
def draw_gains(ax, ids, gains, limit=3.0):
    """ids (T+1,), gains (T,): each token of the text on a background of its gain"""
    x, y = 0, 0
    for token, gain in zip(ids[1:], gains):
        shade = plt.cm.RdBu(0.5 + 0.5 * np.clip(gain / limit, -1, 1))
        for letter in tokenizer.decode([token]):
            ax.add_patch(plt.Rectangle((x, y), 1, 1, color=shade, lw=0))
            shown = "⏎" if letter == "\n" else letter
            colour = "white" if abs(gain) > 0.7 * limit else "black"
            ax.text(
                x + 0.5,
                y + 0.55,
                shown,
                ha="center",
                va="center",
                fontsize=10,
                family="monospace",
                color=colour,
            )
            x, y = (0, y + 1) if letter == "\n" else (x + 1, y)
    ax.set(xlim=(0, 74), ylim=(y + 1, 0))
    ax.axis("off")
    return y + 1


gains = before - after
i = 1
n_lines = tokenizer.decode(windows[i][1:]).count("\n") + 1
fig, ax = plt.subplots(figsize=(11, 0.3 * n_lines), layout="constrained")
draw_gains(ax, windows[i], gains[i])
scale = plt.cm.ScalarMappable(plt.Normalize(-3, 3), cmap="RdBu")
fig.colorbar(scale, ax=ax, label="gain (nats)", shrink=0.7)
ax.set_title("Which tokens are predicted better (blue) and worse (red)")
plt.show()


# %% [markdown]
# Much of the dark blue is the form: the break and the indentation after a signature, `str` at the margin, the `>>>`.
# Red are mostly single words: the model bets on other words of the manual and loses.
#
# The same as numbers, by the kind of token: white space (line breaks and indentation), words, and everything else
# (brackets, quotes, digits).


# %% alt="Loss before and after for white space, words and other signs: all are lower after, white space by most"
def kind_of(token):
    piece = tokenizer.decode([token])
    return "white space" if piece.isspace() else "word" if piece.strip().isalpha() else "other signs"


kinds = np.array([[kind_of(token) for token in window[1:]] for window in windows])
names = ["white space", "word", "other signs"]
fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
for offset, values, colour, label in [(-0.2, before, "0.6", "before"), (0.2, after, BLUE, "after")]:
    means = [values[kinds == name].mean() for name in names]
    bars = ax.bar(np.arange(3) + offset, means, width=0.38, color=colour, label=label)
    ax.bar_label(bars, fmt="%.2f")
ax.set_xticks(range(3), [f"{name}\n({(kinds == name).mean():.0%} of the tokens)" for name in names])
ax.margins(y=0.15)  # room for the number on the highest bar
ax.set(ylabel="loss (nats per token)", title="Loss by kind of token")
ax.legend()
plt.show()

# %% [markdown]
# The numbers on the bars say it: white space gains most, then the other signs. Words gain too, but less: they are the content,
# and the manual's vocabulary is only a part of it.
#
# ## What the adapters did
#
# $\Delta W$ can be computed for every matrix, and compared with the $W$ beside it. The size of a matrix is its
# Frobenius norm, the root of the sum of squares.

# %% [markdown] exercise="lora_merge"
# What is $\Delta W$, such that `x @ (W + dW).T` is the same for every `x`? Return a new matrix; `weight` is not to be
# changed.

# %% alt="Size of the update relative to the weights for seven matrices in 30 layers: mostly below one percent, largest for v and o in layer 0"
trained = recipe.parameters()  # the adapters alone: nothing else is trained
alpha = training.options.alpha


def update(layer, target):
    """Delta W = alpha / r * B A: (out, in)"""
    stem = f"blk.{layer}.{TARGETS[target]}"
    return alpha / RANK * trained[f"{stem}.lora_b"] @ trained[f"{stem}.lora_a"]


def weight(layer, target):
    """W, unpacked: (out, in)"""
    return gguf.dequantize(f"blk.{layer}.{TARGETS[target]}.weight")


relative = np.array(
    [
        [
            np.linalg.norm(update(layer, target)) / np.linalg.norm(weight(layer, target))
            for layer in range(config.n_layers)
        ]
        for target in TARGETS
    ]
)
fig, ax = plt.subplots(figsize=(12, 3.6), layout="constrained")
image = ax.imshow(100 * relative, cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
ax.set_yticks(range(len(TARGETS)), TARGETS)
ax.set(xlabel="layer", title="Size of the update, relative to the weights")
fig.colorbar(image, ax=ax, label="percent")
plt.show()
for target, row in zip(TARGETS, relative):
    print(f"{target:5} {100 * row.mean():.1f} % on average, at most {100 * row.max():.1f} % in layer {row.argmax()}")

# %% [markdown]
# Less than a percent of each matrix, on average, is enough to change the style. In the run printed here the values and
# the output of the first layer changed the most. One thing in this picture is about AdamW and not about the model: its
# step has the same size for every number, however small the gradient is, so no matrix is left out.
#
# Is $\Delta W$ really of rank 8? Its *singular values* tell: how strong it is in each of its directions, the strongest
# first. A matrix of rank $r$ has $r$ that are not zero.

# %% alt="On the left the singular values of W and of the update in layer 0: those of the update end after eight; on the right the eight relative to the largest, falling to a tenth"
layer, target = np.unravel_index(relative.T.argmax(), relative.T.shape)
target = list(TARGETS)[target]
fig, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
of_weight = np.linalg.svd(weight(layer, target), compute_uv=False)
of_update = np.linalg.svd(update(layer, target), compute_uv=False)
axes[0].semilogy(np.arange(1, len(of_weight) + 1), of_weight, ".", color="0.5", label="W")
axes[0].semilogy(np.arange(1, len(of_update) + 1), of_update, ".", color=RED, label="ΔW")
axes[0].set(
    xlabel="number of the singular value",
    ylabel="singular value",
    title=f"{TARGETS[target]} of layer {layer}",
)
axes[0].legend()
for target in TARGETS:
    # B A with A^T = Q R has the singular values of B R^T, which is small
    values = []
    for layer in range(config.n_layers):
        stem = f"blk.{layer}.{TARGETS[target]}"
        r = np.linalg.qr(trained[f"{stem}.lora_a"].T, mode="r")
        of_update = np.linalg.svd(trained[f"{stem}.lora_b"] @ r.T, compute_uv=False)
        values.append(of_update / of_update[0])
    colour = "black" if target == "down" else None  # the cycle has six colours
    axes[1].plot(np.arange(1, RANK + 1), np.mean(values, axis=0), "o-", lw=1.5, color=colour, label=target)
axes[1].set(
    xlabel="number of the singular value",
    ylabel="relative to the largest",
    ylim=(0, 1.05),
    title="The eight, mean over the layers",
)
axes[1].legend(ncols=2, fontsize=11)
plt.show()

# %% [markdown]
# On the left, $\Delta W$ falls off a cliff after the eighth: what is left is rounding. $W$ itself uses all of its
# directions. On the right, the first direction is clearly the strongest, and the others are not zero. Would a smaller
# rank have done? Exercise 1.
#
# ## To keep
#
# The adapters are all there is to keep: a few megabytes beside a model that everybody has. On the command line all of
# this is
#
#     toy train lora --model smollm2-135m --corpus FILE --rank 8 --targets q,k,v,o,gate,up,down
#
# and the run's folder holds the adapters, also as a GGUF file that llama.cpp takes with `--lora`. `toy generate RUN`
# writes with them, and `toy export RUN --merge --out model.gguf` adds $\Delta W$ to $W$ once and for all.
#
# ## Exercises
#
# 1. Train with rank 1, 2 and 32 and the same seed. How do the held-out loss and the number of parameters change? At
#    which rank does it stop paying?
# 2. Train `targets=("q", "v")`, as the paper did, and `("gate", "up", "down")`. Which does better with the same number
#    of steps, and which with the same number of parameters?
# 3. Take another text with a style of its own, such as `topics["debugger"]` or a book you like. Use
#    `FullFinetuneOptions` on it too, with its lower learning rate: how much memory does that take, and is it better?
