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
#
# Two things are noted down beside, for later: the token embedding before the first step, and now and then how strongly the
# loss of one fixed batch pulls at each block.

# %%
embedding_before = training.recipe.parameters()["token_embed"]
fixed = validation_batches(training.split.validation, batch=12, context=32, n_batches=1, seed=1)[0]


def gradient_norms(training):
    """The norm of the gradient of the token embedding, and of each block."""
    model = model_from(training.config, training.recipe.parameters(), backend="numpy")
    grads = model.new_gradients()
    model.backward(model.forward(fixed.token_ids)[1], fixed.labels, grads)
    blocks = [
        np.sqrt(sum((g**2).sum() for name, g in grads.items() if name.startswith(f"blocks.{i}."))) for i in range(2)
    ]
    return [np.linalg.norm(grads.token_embed), *blocks]


norms = {0: gradient_norms(training)}


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
            norms[len(history.losses)] = gradient_norms(training)
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
# The loss falls steeply while the frequent characters are learned, and slowly after that. Do the points lie on the line?

# %%
last_of_training = np.array(history.losses[-100:])
last_of_validation = list(history.validation.values())[-1]
difference = last_of_validation - last_of_training.mean()
error = last_of_training.std() / np.sqrt(len(last_of_training))
seen = options.steps * options.batch * options.context / len(training.split.train)
print(f"training, mean of the last 100 steps: {last_of_training.mean():.3f} ± {error:.3f} nats")
print(f"validation at the end:                {last_of_validation:.3f} nats, a difference of {difference:+.3f}")
print(f"the run has read {seen:.2f} times as many characters as the training part has")

# %% [markdown]
# The validation part is made of whole documents from all over the text, as hard as the others on average, but not exactly:
# it is a tenth of them. A small difference to either side is that luck. The run has read hardly anything twice, so it cannot
# know it by heart. In a long run it would, the line would sink below the points, and the points are what counts.
#
# Here is what was noted down beside: how strongly the loss pulls at each part of the model.

# %% alt="Three curves over the steps: the gradient norm of the token embedding and of the two blocks."
fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for label, curve, style in zip(
    ["token embedding", "block 0", "block 1"], np.transpose(list(norms.values())), ["-", "--", ":"]
):
    ax.plot(list(norms), curve, style, marker="o", label=label)
ax.set(
    xlabel="step", ylabel="gradient norm (nats per unit of weight)", title="The pull of the loss, on one fixed batch"
)
ax.set(yscale="log")
ax.legend()
plt.show()

# %% [markdown]
# And the token embedding, a row of 64 numbers for each character, before and after. The map shows its two main axes: the
# directions in which the rows differ most.


# %% alt="Two maps of characters. Before training they lie at random. After training lower-case letters, digits and capitals form groups."
def draw_map(ax, table, title):
    """table: (V, D), a row for each character"""
    centred = table - table.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    places, share = centred @ axes[:2].T, (sizes[:2] ** 2).sum() / (sizes**2).sum()
    kinds = {
        "lower case": str.islower,
        "capitals": str.isupper,
        "digits": str.isdigit,
        "other signs": lambda c: not c.isalnum(),
    }
    for (kind, belongs), colour in zip(kinds.items(), ["#0072B2", "#D55E00", "#009E73", "0.5"]):
        ax.plot([], [], "s", color=colour, label=kind)
        for character, (x, y) in zip(training.tokenizer.characters, places):
            if belongs(character):
                shown = {" ": "␣", "\n": "⏎"}.get(character, character)
                ax.text(x, y, shown.replace("$", r"\$"), color=colour, ha="center", va="center", fontsize=13)
    low, high = places.min(axis=0), places.max(axis=0)
    ax.set(
        xlim=(low[0] * 1.1, high[0] * 1.1),
        ylim=(low[1] * 1.1, high[1] * 1.1),
        xlabel="first axis",
        ylabel="second axis",
    )
    ax.set_title(f"{title}: {share:.0%} of the variance")


fig, axes = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
embedding_after = training.recipe.parameters()["token_embed"]
draw_map(axes[0], embedding_before, "before")
draw_map(axes[1], embedding_after, "after")
axes[1].legend(fontsize=11)
plt.show()


# %%
def likeness(table, first, second):
    """The mean cosine between the rows of two groups of characters, each row with others."""
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    at = [[training.tokenizer.characters.index(c) for c in group] for group in (first, second)]
    cosines = unit[at[0]] @ unit[at[1]].T
    return cosines[~np.equal.outer(*at)].mean()


for when, table in (("before", embedding_before), ("after", embedding_after)):
    pairs = [("aeiou", "aeiou"), ("0123456789", "0123456789"), ("aeiou", "0123456789")]
    told = ", ".join(f"{a[0]}..{a[-1]} and {b[0]}..{b[-1]} {likeness(table, a, b):+.2f}" for a, b in pairs)
    print(f"{when:6} mean cosine of {told}")

# %% [markdown]
# Nobody told the model that vowels are alike, or digits. Characters that are followed by the same characters get similar
# rows, because that is what the loss rewards.

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

# %% alt="Loss of the last character over the number of characters shown, from 1 to 31: it falls steeply to 4 and slowly after that"
trained = model_from(training.config, training.recipe.parameters(), backend="numpy")
windows = validation_batches(training.split.validation, batch=1000, context=32, n_batches=1, seed=0)[0]


def loss_with_context(model, length):
    """Mean loss of the last character of every window when only the `length` characters before it are shown, and its error."""
    logits, _ = model.forward(windows.token_ids[:, -length:])  # (B, length, V)
    logits, labels = logits[:, -1], windows.labels[:, -1]  # (B, V), (B,)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    losses = -log_p[np.arange(len(labels)), labels]
    return losses.mean(), losses.std() / np.sqrt(len(losses))


lengths = [1, 2, 4, 8, 16, 31]
fig, ax = plt.subplots(figsize=(8, 3.8), layout="constrained")
means, errors = np.transpose([loss_with_context(trained, length) for length in lengths])
ax.errorbar(lengths, means, errors, fmt="o-", ms=9, capsize=5)
ax.set_xscale("log", base=2)
ax.set_xticks(lengths, lengths)
ax.set(
    xlabel="characters shown",
    ylabel="loss (nats per character)",
    title="What is a longer context worth?",
)
plt.show()


# %% [markdown]
# The bars are standard errors over the 1000 windows. The windows are the same for every length, so two neighbouring points
# share most of their luck; how sure a *difference* is, comes from the differences window by window.

# %%
for length, mean, error in zip(lengths, means, errors):
    print(f"{length:2} characters shown: {mean:.3f} ± {error:.3f} nats")
gain = (means[0] - means[2]) / (means[0] - means[-1])
print(f"the last four characters bring {gain:.0%} of what 31 bring")

# %% [markdown]
# Most of the gain comes from the last few characters: the model knows which letters follow each other. To use more of the
# text takes a longer training and a larger model. With 32 characters shown the prediction would be made at the very last
# position, which is a case of its own: exercise 2.

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
# What does a head do in the middle of a word? Over the same windows: how often does a letter give most of its probability to
# the character before it, and how often to the space before its word? And what do the letters of `list` look at in the
# sentence above?


# %%
def looks_at(maps, characters):
    """maps (H, T, T) of a text -> for each head, which key each query looks at most: (H, T)"""
    return [[characters[key] for key in row] for row in maps.argmax(axis=-1)]


some = windows.token_ids[:200]
all_maps = attention_maps(trained, some).reshape(len(some), -1, some.shape[1], some.shape[1])  # (B, L * H, T, T)
texts = [training.tokenizer.decode(row) for row in some]
print("most of the probability goes to    the one before  the space before the word    list looks at")
for head in range(n_layers * n_heads):
    before, space, letters = 0, 0, 0
    for words, of_text in zip(texts, all_maps[:, head]):
        for query in range(2, len(words)):
            start = words.rfind(" ", 0, query)
            if start < 0 or query - start < 2 or not words[start + 1 : query + 1].isalpha():
                continue  # not inside a word, or its beginning is not in the window
            letters, key = letters + 1, of_text[query].argmax()
            before, space = before + (key == query - 1), space + (key == start)
    seen = "".join(looks_at(maps.reshape(-1, T, T)[head : head + 1], text)[0][7:11]).replace(" ", "␣")
    name = f"block {head // n_heads}, head {head % n_heads}"
    print(
        f"{name:34} {before / letters:14.0%}  {space / letters:25.0%}    l→{seen[0]} i→{seen[1]} s→{seen[2]} t→{seen[3]}"
    )

# %% [markdown]
# Look for a head with a high number in the first column: that is how a model learns which letters follow each other. A high
# number in the second is something more, a head that knows where its word began; as the last column shows, not every letter
# of every word follows it. The heads of block 1 often have no preferred distance; which character they choose depends on what
# it is. The numbers of the heads mean nothing, and another seed distributes the roles differently.
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
# Ten times smaller is not wrong, only slow. How slow?

# %%
slow, fast = (smooth(load_curve(run)["loss"], span=20) for run in runs)
reached = int(np.argmax(fast <= slow[-1])) + 1
print(f"after 300 steps the smaller rate is at {slow[-1]:.3f} nats; the larger one was there at step {reached}")
assert reached < 150

# %% [markdown]
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
