# %% [markdown]
# # 4. Train and plot
#
# The forward pass, the backward pass and the optimizer are in place. Now they are repeated a thousand times on real
# text. You watch the loss fall while it happens, read what the model writes on the way, and look into its attention
# afterwards.
#
# The text is the documentation that comes with Python, so nothing has to be downloaded. Its length differs a little
# from one Python version to the next, and the numbers below with it.
#
# **You will be able to**
#
# * train a small language model on real text, and read its curves: training, validation, the line of a uniform guess;
# * say what warm-up, cosine, perplexity, temperature, top-k and top-p are;
# * look into the attention of a trained model without believing too much in it.
#
# **Before**: [lessons 1](01_forward_by_hand.ipynb) to [3](03_adamw_and_its_seven_numbers.ipynb). **Time**: 40 minutes
# to read, 2 hours with the six exercises.

# %%
import os

# the matrices here are small: more threads would only wait for each other
os.environ.setdefault("TOY_NUM_THREADS", "1")

import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import toy
from toy.data import validation_batches
from toy.engines import model_from
from toy.plots import draw_runs, lesson_style, load_curve, smooth
from toy.trained import load_trained
from toy.training import FromScratchOptions, Training

lesson_style()

# %% [markdown]
# ## What is going to be trained
#
# `FromScratchOptions` holds everything a run can be told, and `Training` gets it ready: it reads the text, cuts it into
# a training part and a validation part, and builds the model. `choices()` lists what was decided. Compare the number of
# parameters with the number of training tokens, and note $\ln V$, the loss of a uniform guess.

# %%
options = FromScratchOptions(
    steps=1000,
    batch=12,
    context=32,
    d_model=64,
    layers=2,
    heads=4,
    arch="transformer",
    lr=4e-3,
    schedule="cosine",
    lr_floor=0.1,
    warmup=100,
    seed=0,
    eval_batches=32,
    sample_tokens=160,
    threads=1,
)
training = Training(options)

for choice in training.choices():
    if choice.name not in (
        "backend",
        "device",
        "threads",
        "corpus",
    ):  # these depend on the computer
        reason = f"  ({choice.reason})" if choice.reason else ""
        print(f"{choice.name:14} {choice.value}{reason}")

# %% [markdown]
# One batch consists of 12 windows of 32 characters, from random places of the training part. The labels are the
# same windows, moved by one character.

# %% [markdown] exercise="batch_windows"
# `starts[:, None] + np.arange(context)` has shape `(B, T)`: the places of all tokens of all windows. Used as an index
# it gives them at once.

# %%
print(repr(training.corpus.text[10_000:10_200]))

# %% [markdown]
# The learning rate is not constant. It rises during the *warm-up*, while the moments of AdamW still rest on few
# gradients, and then falls along half a cosine, so that the last steps only polish.

# %% [markdown] exercise="learning_rate"
# Two cases. In the second, how far the step has come is a number from 0 (at `warmup`) to 1 (at `steps - 1`), and half a
# cosine is $\frac12 (1 + \cos(\pi \cdot \text{that}))$, from 1 to 0.

# %% alt="The learning rate over 1000 steps: a straight rise to 0.004 in 100 steps, then half a cosine down to 0.0004"
steps = np.arange(options.steps)
fig, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
ax.plot(steps, [training.schedule(k) for k in steps])
ax.set(xlabel="step", ylabel="learning rate", title="Warm-up, then half a cosine", ylim=(0, None))
plt.show()

# %% [markdown]
# What does the model write before it is trained? All characters are nearly equally likely.

# %%
prompt = training.tokenizer.encode("The ")
print(repr(training.tokenizer.decode(training.model().generate(prompt, 80, seed=0))))


# %% [markdown]
# ## The run
#
# `training.run()` is a generator: it trains, and after every step, evaluation or sample it hands out an *event*.
# What to do with the events is up to us. Here we collect them and draw them.
#
# The blue line is the loss of the batches that are trained on, faint as it is and strong when smoothed. The orange
# points are the *validation loss*: the mean over some batches of the part of the text that is never trained on.


# %%
class History:
    """What happened in a run so far."""

    def __init__(self):
        self.losses, self.grad_norms, self.validation, self.samples = [], [], {}, {}

    def add(self, event):
        if event.kind == "step":
            self.losses.append(event.loss)
            self.grad_norms.append(event.grad_norm)
        elif event.kind == "eval":
            self.validation[event.step] = event.loss
        elif event.kind == "sample":
            self.samples[event.step] = event.text


def draw(ax, history, vocab_size, n_steps):
    ax.clear()
    steps = range(1, len(history.losses) + 1)
    ax.plot(steps, history.losses, color="#0072B2", alpha=0.25, lw=1)
    ax.plot(steps, smooth(history.losses, span=20), color="#0072B2", label="training, smoothed")
    ax.plot(
        history.validation.keys(),
        history.validation.values(),
        "o",
        ms=8,
        color="#D55E00",
        label="validation",
    )
    ax.axhline(np.log(vocab_size), color="black", ls="--", lw=1.5, label="uniform guess, ln V")
    ax.set(xlim=(0, n_steps), ylim=(1, 5), xlabel="step", ylabel="loss (nats per character)", title="Training")
    ax.legend()


# %% [markdown]
# The figure is made once, and every 50 steps its picture is replaced by a newer one. Run this cell and watch.


# %% alt="Training loss, faint and smoothed, and validation points over 1000 steps: from 4.6 nats quickly to 2.7, then slowly to about 1.9"
def train_and_watch(training, redraw_every=50):
    history = History()
    fig, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
    picture = display(fig, display_id=True)
    for event in training.run():
        history.add(event)
        if event.kind == "run_end" or (event.kind == "step" and event.step % redraw_every == 0):
            draw(ax, history, training.config.vocab_size, training.options.steps)
            picture.update(fig)
    plt.close(fig)
    return history


history = train_and_watch(training)

# %% [markdown]
# The validation losses once more, as numbers.

# %%
for step, loss in history.validation.items():
    print(f"after {step:4} steps: validation loss {loss:.3f} nats, exp(loss) = {np.exp(loss):4.1f}")

# %% [markdown]
# $e^{\text{loss}}$ is called the *perplexity*: the model is as unsure as if it had to choose among that many equally
# likely characters.
#
# The loss falls steeply while the frequent characters are learned, and slowly after that. The points lie a little below
# the line, because the last part of this text is easier than the rest: a quarter of it is spaces. In a thousand steps
# the model does not even see the whole text once, so it cannot know anything by heart. In a long run the line would
# sink below the points, and the points are what counts.

# %% [markdown] exercise="perplexity"
# First the mean, then the exponential.

# %% [markdown]
# A character here, half a word there: losses per token of models with different tokens cannot be compared. What they
# all share are the bytes of the text. *Bits per byte* is the loss of the whole text, in bits, divided by its bytes.

# %% [markdown] exercise="bits_per_byte"
# The loss of the whole text is the sum over its tokens. One bit is $\ln 2$ nats, so there are fewer nats than bits.

# %% [markdown]
# ## Samples along the way
#
# Four times during the run the model was asked to write something. It learns the frequent characters first, then spaces
# and the length of words, then common syllables and words, and the indentation and tables of this documentation.

# %%
for step, sample in history.samples.items():
    print(f"--- after {step} steps")
    print(sample)

# %% [markdown]
# How bold the draws are is set by the *temperature*, which divides the logits. Near zero the model always takes what it
# believes in most, and repeats itself; above one it takes more and more of the unlikely.

# %% [markdown]
# There are two more ways to keep the model from the unlikely: draw only from the `k` most likely tokens, *top-k*, or
# from the smallest group of tokens that has the probability `p` together, *top-p*.

# %% [markdown] exercise="top_k"
# `np.argsort(-logits)[:k]` are the places of the largest. Give all others the logit minus infinity, and take the
# softmax.

# %% [markdown] exercise="top_p"
# Sort the probabilities from the largest down, and add them up with `np.cumsum`. The token that reaches `p` belongs to
# the group, so ask whether the sum *before* a token is still below `p`.

# %%
model = training.model()
for temperature in [0.2, 0.8, 1.5]:
    ids = model.generate(prompt, 120, temperature=temperature, seed=1)
    print(f"--- temperature {temperature}")
    print("The " + training.tokenizer.decode(ids))

# %% [markdown]
# ## What the context is good for
#
# How much does the model gain from looking back? We let it predict the same characters again and again, while it may
# see only the last 1, 2, 4, ... characters before them. They come from the validation part.
#
# From here on the model runs on the textbook operations (`backend="numpy"`), which keep the attention probabilities in
# their cache.

# %% alt="Loss of the last character over the number of characters shown, from 1 to 32: it falls steeply to 4 and is nearly flat after 8"
trained = model_from(training.config, training.recipe.parameters(), backend="numpy")
windows = validation_batches(training.split.validation, batch=1000, context=32, n_batches=1, seed=0)[0]


def loss_with_context(model, length):
    """Mean loss of the last character of every window when only the `length` characters before it are shown."""
    logits, _ = model.forward(windows.token_ids[:, -length:])  # (B, length, V)
    logits, labels = logits[:, -1], windows.labels[:, -1]  # (B, V), (B,)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(labels)), labels].mean()


lengths = [1, 2, 4, 8, 16, 32]
fig, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
ax.plot(lengths, [loss_with_context(trained, length) for length in lengths], "o-", ms=9)
ax.set_xscale("log", base=2)
ax.set_xticks(lengths, lengths)
ax.set(
    xlabel="characters shown",
    ylabel="loss (nats per character)",
    title="What is a longer context worth?",
)
plt.show()


# %% [markdown]
# Nearly all of the gain comes from the last four characters: the model knows which letters follow each other. Beyond
# eight there is nothing to be gained yet; that takes a longer training and a larger model. The last point is even a
# little worse, and exercise 2 asks why.

# %% [markdown]
# ## Attention maps
#
# Which earlier characters does each head look at? The probabilities are in the cache of the forward pass, one matrix
# per block and head. In notebook 1 they came from random weights and had no structure.


# %% alt="Attention maps of two blocks with four heads for 'if the list is': in block 0 near the diagonal, in block 1 on single earlier characters"
def attention_maps(model, token_ids):
    """(B, T) -> probabilities (B, n_layers, n_heads, T, T)"""
    batch, T = token_ids.shape
    _, (_, cache) = model.forward(token_ids)
    maps = [block.attention.probabilities.reshape(batch, -1, T, T) for block in cache.blocks]
    return np.stack(maps, axis=1)


def label_characters(axis, characters):
    axis.set_ticks(range(len(characters)), ["␣" if c == " " else c for c in characters])
    axis.set_tick_params(length=0, labelsize=12)


text = "if the list is"
maps = attention_maps(trained, training.tokenizer.encode(text)[None])[0]  # (n_layers, n_heads, T, T)
n_layers, n_heads, T, _ = maps.shape
future = np.triu(np.ones((T, T), dtype=bool), k=1)

fig, axes = plt.subplots(n_layers, n_heads, figsize=(13, 7.2), layout="constrained", sharex=True, sharey=True)
for (layer, head), ax in np.ndenumerate(axes):
    image = ax.imshow(np.where(future, np.nan, maps[layer, head]), cmap="viridis", vmin=0, vmax=1)
    ax.set_title(f"block {layer}, head {head}")
    label_characters(ax.xaxis, text)
    label_characters(ax.yaxis, text)
fig.supxlabel("key: looked at")
fig.supylabel("query: looking")
fig.colorbar(image, ax=axes, label="probability", shrink=0.6)
plt.show()


# %% [markdown]
# One sentence can mislead, so we take the mean over many windows: how much probability does each head give to the
# character at a certain distance? Distance 0 is the character itself, distance 1 the one before.


# %% alt="Mean attention over the distance back for eight heads: the heads of block 0 look at distances 0 to 3, those of block 1 have no preferred distance"
def mean_by_distance(maps, farthest=10):
    """(B, L, H, T, T) -> (L * H, farthest + 1): mean probability at each distance, over queries that can see that far"""
    maps = maps.mean(axis=0)
    maps = maps.reshape(-1, *maps.shape[2:])
    queries = np.arange(farthest, maps.shape[1])
    return np.stack([maps[:, queries, queries - d].mean(axis=1) for d in range(farthest + 1)], axis=1)


table = mean_by_distance(attention_maps(trained, windows.token_ids[:200]))
fig, ax = plt.subplots(figsize=(9.5, 4.4), layout="constrained")
image = ax.imshow(table, cmap="viridis", vmin=0, aspect="auto")
ax.set_xticks(range(table.shape[1]))
ax.set_yticks(
    range(len(table)),
    [f"block {layer}, head {head}" for layer in range(n_layers) for head in range(n_heads)],
)
ax.set(xlabel="distance back (characters)", title="Where the heads look, on average")
fig.colorbar(image, ax=ax, label="mean probability")
plt.show()

# %% [markdown]
# In the run printed here, the heads of block 0 look at the last few characters, most of all at the one before. That is
# how a model learns which letters follow each other. Head 0 of block 0 has found something more: in the maps above, the
# letters of `list` and of `is` look at the space before their word. The heads of block 1 have no preferred distance;
# which character they choose depends on what it is. The numbers of the heads mean nothing, and another seed distributes
# the roles differently.
#
# ## Two learning rates in one picture
#
# The learning rate is the first thing to get right. Two shorter runs, all else equal. This time `Training` gets a
# directory to write into, as every run from the command line does: its events, its checkpoints and its picture. Then
# `draw_runs` puts the directories into one figure.

# %% alt="Loss curves of two runs over 300 steps: the learning rate 0.004 is below 0.0004 all the way, 2.65 against 2.88 nats at the end"
folder = Path(tempfile.mkdtemp())  # name a directory of your own to keep the runs
runs = []
for lr in [4e-4, 4e-3]:
    run = folder / f"lr {lr:g}"
    for _ in Training(replace(options, lr=lr, steps=300, warmup=30), out=run).run():
        pass  # everything is in the directory
    runs.append(run)

figure = draw_runs([load_curve(run) for run in runs])
figure.set(dpi=95)
display(figure)

# %% [markdown]
# Ten times smaller is not wrong, only slow: after 300 steps it has come to where the larger rate was before step 90.
# Too large a rate looks different, and exercise 1 asks how.
#
# A directory is all that is needed to use a model later.

# %%
print("in the directory:", sorted(path.name for path in runs[1].iterdir()))
saved = load_trained(runs[1])
print(
    f"step {saved.step}:",
    repr(saved.tokenizer.decode(saved.model.generate(prompt, 60, temperature=0.5, seed=0))),
)

# %% [markdown]
# ## The same from the command line
#
# Everything above is one command in a terminal. This is the run of this notebook, with the same numbers:
#
# toy train from-scratch --steps 1000 --batch 12 --context 32 --d-model 64 --layers 2 --heads 4 \ --arch transformer
# --lr 0.004 --schedule cosine --lr-floor 0.1 --warmup 100 --eval-batches 32 --seed 0 --threads 1 \ --out runs/first
#
# And this is how to go on: train longer, write text, compare runs, train on a text of your own.
#
#     toy train from-scratch --resume runs/first --steps 2000
#     toy generate runs/first --prompt "The " --temperature 0.8
#     toy plot runs/first runs/second --out both.png
#     toy train from-scratch --corpus my_text.txt
#
# ## Exercises
#
# 1. Add `lr=3e-2` to the comparison of learning rates. Does it diverge, or is it only worse? Then set `warmup=0` for
#    all three. Which of them needs the warm-up most?
# 2. With 32 characters shown, the prediction is made at the last position of the context. Compare 31 with 32. In
#    training no later position ever looked back at the last one. Compute the gradient for a batch of windows and
#    compare the norms of the rows of `pos_embed`. What do you see in the last row, and what would a longer training do?
# 3. Choose the head with the clearest pattern and switch it off: set its `d_head` columns of `w_o` to zero in `trained`
#    and compare the validation loss. Does the clearest head matter most?
