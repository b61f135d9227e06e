# %% [markdown]
# # 3. AdamW and its seven numbers
#
# The backward pass says in which direction each weight should go. The optimizer decides how far. AdamW keeps two
# running means per weight, and everything it needs to know besides the gradient fits into seven numbers:
#
# $$\mathrm{hp} = [\,\mathrm{lr},\ \beta_1,\ \beta_2,\ \varepsilon,\ \text{weight decay},\ s_5,\ s_6\,]$$
#
# The first five are known from every textbook. This notebook is mostly about the last two, because there are two ways
# to fill them, and both are in use.

# %%
import os

# the matrices here are small: more threads would only wait for each other
os.environ.setdefault("TOY_NUM_THREADS", "1")

import matplotlib.pyplot as plt
import numpy as np
from threadpoolctl import threadpool_limits

import toy
from toy.data import CharTokenizer, load_corpus, training_batch
from toy.ops import reference as ops
from toy.plots import lesson_style, smooth

threadpool_limits(limits=1)  # the same for numpy
lesson_style()
np.set_printoptions(precision=4, suppress=True, linewidth=110)


# %% [markdown]
# ## The update
#
# For every weight $w$ with gradient $g$, and with $m$ and $v$ starting at zero:
#
# $$\begin{aligned}
# m &\leftarrow \beta_1 m + (1-\beta_1)\, g \\
# v &\leftarrow \beta_2 v + (1-\beta_2)\, g^2 \\
# w &\leftarrow w\,(1 - \mathrm{lr}\cdot\text{weight decay}) - \mathrm{lr}\,\frac{m\, s_5}{\sqrt{v\, s_6} + \varepsilon}
# \end{aligned}$$
#
# $m$ is a running mean of the gradient, $v$ of its square. Their quotient has no unit: if all gradients were a thousand
# times larger, the step would be the same. So `lr` is, roughly, how far a weight moves per step.


# %%
def adamw_by_hand(w, g, m, v, hp):
    """One update of arrays of the same shape. Returns the new w, m, v."""
    lr, beta1, beta2, eps, weight_decay, s5, s6 = np.ravel(hp).astype(np.float64)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    w = w * (1 - lr * weight_decay) - lr * (m * s5) / (np.sqrt(v * s6) + eps)
    return w, m, v


# %% [markdown]
# ## The two conventions
#
# `toy.AdamW` makes the row, and it has two factories:
#
# * `bias_corrected()`: $s_5 = 1/(1-\beta_1^t)$ and $s_6 = 1/(1-\beta_2^t)$ at step $t$. This is the *bias correction* of
#   the Adam paper.
# * `constant_slots()`: $s_5 = \beta_1$ and $s_6 = \beta_2$, the same at every step. Nothing is corrected.
#
# Each has a second name that says which models read it: `for_lora()` is `bias_corrected()`, for LoRA, full fine-tuning
# and every GPT-2; `for_from_scratch()` is `constant_slots()`, for the other models from random weights or from another
# model's. Below they are `lora` and `from_scratch`, as in the error messages; `recipe.adamw()` picks the right one. The
# default of $\beta_2$ differs too, 0.999 and 0.95.

# %%
from_scratch = toy.AdamW.constant_slots(lr=0.001)
lora = toy.AdamW.bias_corrected(lr=0.001)

print("t      lr    beta1   beta2    eps  decay      s5        s6")
for name, adamw in [("from_scratch", from_scratch), ("lora", lora)]:
    print(name)
    for t in [1, 2, 10, 1000]:
        lr, beta1, beta2, eps, decay, s5, s6 = adamw.hp(t).ravel()
        print(f"{t:<5} {lr:.3f} {beta1:6.3f} {beta2:7.3f} {eps:8.0e} {decay:4.1f} {s5:9.4f} {s6:10.4f}")

# %% [markdown]
# `hp(t)` counts from 1, as the formula does. A training loop counts from 0, and so there is `hp_for_step(k)`, which is
# `hp(k + 1)`. Use it in loops, and you cannot be off by one.

# %%
print("the same row:", np.array_equal(lora.hp_for_step(0), lora.hp(1)))
print("shape and type:", lora.hp(1).shape, lora.hp(1).dtype)


# %% [markdown]
# ## By hand and by the engine
#
# Is this really all that happens in a training step? We let the engine take five steps on random tokens, read its
# gradients, and apply our own seven-number update to a copy of the weights. The readable transformer reads the
# from-scratch convention and GPT-2 the other; `recipe.adamw()` knows which.


# %%
def compare_with_engine(config, steps=5):
    recipe = toy.recipes.FromScratch(backend="auto")
    recipe.realize(config, toy.RecipeOptions(t_seq=8, t_batch=4, seed=0), keep_gradients=True)
    adamw = recipe.adamw(lr=0.001, weight_decay=0.1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 9))

    w = {name: array.astype(np.float64) for name, array in recipe.parameters().items()}
    start = {name: array.copy() for name, array in w.items()}
    m = {name: np.zeros_like(array) for name, array in w.items()}
    v = {name: np.zeros_like(array) for name, array in w.items()}
    for k in range(steps):
        hp = adamw.hp_for_step(k)
        recipe.step(tokens[:, :-1], labels=tokens[:, 1:], hp=hp, is_first=k == 0)
        for name, g in recipe.gradients().items():
            w[name], m[name], v[name] = adamw_by_hand(w[name], g, m[name], v[name], hp)

    after = recipe.parameters()
    moved = max(np.abs(w[name] - start[name]).max() for name in w)
    difference = max(np.abs(w[name] - after[name]).max() for name in w)
    print(f"{type(config).__name__:18} largest move {moved:.6f}, by hand and engine agree: {difference < 1e-6}")


sizes = dict(vocab_size=20, d_model=16, n_heads=2, d_ff=32, n_layers=2, context_length=8)
compare_with_engine(toy.TransformerConfig(**sizes))
compare_with_engine(toy.GPT2Config(**sizes))

# %% [markdown]
# ## What the slots 5 and 6 are for
#
# $m$ and $v$ start at zero, so at first they are too small: after $t$ steps with a constant gradient $g$,
# $m = (1-\beta_1^t)\,g$ and $v = (1-\beta_2^t)\,g^2$. The bias correction divides by exactly these factors. It is large
# at the beginning and fades away, for $v$ slowly, because $\beta_2 = 0.999$ remembers about a thousand steps.

# %%
steps = np.arange(1, 3001)


def slots(adamw):
    """s5 and s6 at every step."""
    rows = np.vstack([adamw.hp(int(t)) for t in steps])
    return rows[:, 5], rows[:, 6]


fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
for ax, slot, name in zip(axes, [0, 1], ["s5, multiplies m", "s6, multiplies v"]):
    ax.loglog(steps, slots(lora)[slot], label="lora")
    ax.loglog(steps, slots(from_scratch)[slot], "--", label="from_scratch")
    ax.set(xlabel="step t", title=name)
axes[0].set_ylabel("value of the slot")
axes[0].legend()
plt.show()


# %% [markdown]
# ## The effective step size
#
# What matters is the step that comes out, $|\Delta w| / \mathrm{lr} = |m|\,s_5 / \sqrt{v\,s_6}$. We measure it by
# calling the optimizer itself, `ops.adamw_step`, on weights with known gradients. First every weight gets the same
# gradient at every step; then every gradient is pure noise, with mean zero.


# %%
def step_sizes(adamw, gradients):
    """Root mean square of |change of w| / lr at every step; gradients: function of the step -> array."""
    w, m, v = (np.zeros_like(gradients(1)) for _ in range(3))
    sizes = []
    for t in steps:
        before = w.copy()
        ops.adamw_step(w, gradients(t), m, v, adamw.hp(int(t)))
        sizes.append(np.sqrt(np.mean((w - before) ** 2)) / adamw.lr)
    return sizes


def constant(t):
    return np.ones(1)


def noise(t):
    return np.random.default_rng(int(t)).normal(size=1000)


uncorrected = toy.AdamW.constant_slots(lr=0.001, beta2=0.999)  # for comparison: beta2 = 0.999 without a correction
settings = [
    ("lora: beta2 = 0.999, corrected", lora, "-"),
    ("from_scratch: beta2 = 0.95", from_scratch, "--"),
    ("beta2 = 0.999, not corrected", uncorrected, ":"),
]

fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
for ax, gradients, title in zip(axes, [constant, noise], ["constant gradient", "gradient is noise"]):
    for name, adamw, style in settings:
        ax.plot(steps, step_sizes(adamw, gradients), style, label=name)
    ax.set(
        xlabel="step t",
        ylabel="step size / lr",
        xscale="log",
        yscale="log",
        title=title,
        ylim=(0.1, 10),
    )
axes[0].legend(fontsize=11)
plt.show()

# %% [markdown]
# Read the left picture first.
#
# * **lora** is flat at 1: with the correction, a constant gradient moves a weight by `lr` from the first step on.
# * **from_scratch** starts at 0.41, passes 1 after some fifteen steps and settles at $\beta_1/\sqrt{\beta_2} = 0.92$. The
#   small start works like a short warm-up, for free, and the row is the same at every step.
# * **not corrected, with $\beta_2 = 0.999$** is what must not happen: $v$ fills much more slowly than $m$, so it stays
#   too small for hundreds of steps, and the steps are up to six times too large. The from-scratch convention does without
#   a correction only because its $\beta_2$ is smaller.
#
# On the right the gradients disagree with each other. $m$ averages them away while $v$ does not, so the steps
# become smaller: AdamW is careful where the gradient is not sure. But the very first corrected step is always full, because
# one gradient alone always agrees with itself. This is why one uses a warm-up even with bias correction.

# %%
print(f"from_scratch, first step: {0.9 * (1 - 0.9) / np.sqrt(0.95 * (1 - 0.95)):.3f}")
print(f"from_scratch, largest:    {max(step_sizes(from_scratch, constant)):.3f}")
print(f"from_scratch, later:      {0.9 / np.sqrt(0.95):.3f}")
print(f"not corrected, largest:   {max(step_sizes(uncorrected, constant)):.3f}")

# %% [markdown]
# ## Loss curves
#
# Now a small model and real text, the documentation that comes with Python. The same model, the same batches, the same
# learning rate; only the row differs.
#
# A row remembers its convention, and the engine refuses the wrong one (more below). A plain array has no memory, and
# the engine takes it as it is: that is how we can try other conventions here.

# %%
text = load_corpus().text
tokenizer = CharTokenizer.from_text(text)
ids = tokenizer.encode(text)
config = toy.TransformerConfig(
    vocab_size=tokenizer.vocab_size, d_model=48, n_heads=4, d_ff=192, n_layers=2, context_length=32
)


def train(adamw, n_steps=400, watch=lambda recipe: None):
    """Train a fresh model with these rows. Returns the losses and what `watch` saw after every step."""
    recipe = toy.recipes.FromScratch(backend="auto")
    recipe.realize(config, toy.RecipeOptions(t_seq=32, t_batch=8, seed=0))
    losses, seen = [], []
    for k in range(n_steps):
        batch = training_batch(ids, batch=8, context=32, seed=0, step=k)
        row = np.array(adamw.hp_for_step(k))  # a plain array
        losses.append(recipe.step(batch.token_ids, labels=batch.labels, hp=row, is_first=k == 0))
        seen.append(watch(recipe))
    return np.array(losses), seen


lr = 0.003
curves = {
    "lora: corrected": (train(toy.AdamW.bias_corrected(lr=lr))[0], "-"),
    "from_scratch": (train(toy.AdamW.constant_slots(lr=lr))[0], "--"),
    "beta2 = 0.999, not corrected": (train(toy.AdamW.constant_slots(lr=lr, beta2=0.999))[0], ":"),
}

# %% [markdown]
# On the left the first 30 steps as they are, on the right the whole run, smoothed.

# %%
fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
for name, (losses, style) in curves.items():
    axes[0].plot(np.arange(1, 31), losses[:30], style, label=name)
    axes[1].plot(np.arange(1, 401), smooth(losses, span=20), style, label=name)
for ax in axes:
    ax.axhline(np.log(config.vocab_size), color="black", ls="-.", lw=1, label="uniform guess, ln V")
    ax.set(xlabel="step", ylabel="training loss (nats per character)")
axes[0].set_title("The first 30 steps")
axes[1].set_title("400 steps, smoothed")
axes[1].legend(fontsize=11)
plt.show()


# %% [markdown]
# On the left, from_scratch begins most slowly, as its small first steps predict, and the uncorrected row most quickly. On
# the right the order is another one. The two conventions end close together. The uncorrected one has thrown its
# weights around in the beginning and is behind to the end of the picture.
#
# So neither convention is wrong. What must not happen is to mix them up, and the last section shows what guards against it.
#
# ## Weight decay
#
# The factor $(1 - \mathrm{lr}\cdot\text{weight decay})$ pulls every weight towards zero, by the same fraction for all.
# It stands outside of the quotient of $m$ and $v$; that is the W in AdamW.
#
# The older way was to add $\text{weight decay}\cdot w$ to the gradient. With Adam this goes wrong, because the quotient
# divides its size away again. The picture shows two weights whose loss has no gradient at all, so that only the decay
# acts.


# %%
def decay_only(hp, l2=0.0, n_steps=400):
    """Two weights without a gradient from the loss. l2: added to the gradient in the older way."""
    w, m, v = np.array([1.0, 0.3]), np.zeros(2), np.zeros(2)
    path = [w.copy()]
    for _ in range(n_steps):
        ops.adamw_step(w, l2 * w, m, v, hp)
        path.append(w.copy())
    return np.array(path)


decoupled = decay_only(toy.AdamW.constant_slots(lr=0.002, weight_decay=1.0).hp())
in_gradient = decay_only(toy.AdamW.constant_slots(lr=0.002).hp(), l2=1.0)

fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
for ax, path, title in zip(
    axes,
    [decoupled, in_gradient],
    ["AdamW: the same fraction", "in the gradient: the same distance"],
):
    ax.plot(path[:, 0], label="weight starting at 1.0")
    ax.plot(path[:, 1], "--", label="weight starting at 0.3")
    ax.axhline(0, color="black", lw=1)
    ax.set(xlabel="step", title=title)
axes[0].set_ylabel("weight")
axes[0].legend()
plt.show()
print("AdamW after 400 steps:", decoupled[-1], " formula:", (1 - 0.002) ** 400 * np.array([1.0, 0.3]))


# %% [markdown]
# In a real training the gradient pushes back, and the weights settle where both agree. Here is the size of one matrix
# of the small model for three strengths of decay.


# %%
def size_of_w_ff1(recipe):
    return np.sqrt(np.mean(recipe.parameters()["blocks.0.w_ff1"] ** 2))


fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
for weight_decay, style in [(0.0, "-"), (0.3, "--"), (1.0, ":")]:
    adamw = toy.AdamW.constant_slots(lr=lr, weight_decay=weight_decay)
    losses, sizes = train(adamw, watch=size_of_w_ff1)
    label = f"weight decay {weight_decay} (last losses: {losses[-50:].mean():.2f} nats)"
    ax.plot(range(1, 401), sizes, style, label=label)
ax.set(xlabel="step", ylabel="rms of blocks.0.w_ff1", ylim=(0, None))
ax.legend(loc="lower right")
plt.show()


# %% [markdown]
# ## The wrong row
#
# The two conventions have the same shape, seven floats. If a model that expects one got the other, nothing would crash:
# it would train a little worse, and nobody would know why. So the row remembers who made it, and the engine compares.


# %%
def what_happens(action):
    try:
        action()
        print("no error")
    except ValueError as error:
        print("ValueError:", error)


recipe = toy.recipes.FromScratch(backend="auto")
recipe.realize(config, toy.RecipeOptions(t_seq=32, t_batch=8))
batch = training_batch(ids, batch=8, context=32, seed=0, step=0)

what_happens(lambda: recipe.step(batch.token_ids, labels=batch.labels, hp=from_scratch.hp_for_step(0), is_first=True))
what_happens(lambda: recipe.step(batch.token_ids, labels=batch.labels, hp=lora.hp_for_step(0), is_first=True))

# %% [markdown]
# The other mistakes one can make are answered in the same way: settings without a mode, a mode that contradicts its
# settings, and a step counted from 0 where the formula would divide by zero.

# %%
what_happens(lambda: toy.AdamW(lr=0.001).hp(1))
print()
what_happens(lambda: toy.AdamW(bias_correct=True, mode=toy.AdamW.MODE_FROM_SCRATCH).hp(1))
print()
what_happens(lambda: lora.hp(0))

# %% [markdown]
# ## Exercises
#
# 1. With $\beta_1 = 0$ and $\beta_2 = 0$, what is the corrected update for a gradient $g$? This rule has a name of its
#    own. Which information about the gradient does it throw away?
# 2. Derive the left picture: write the step size for a constant gradient as a function of $t$, $\beta_1$ and $\beta_2$
#    for both conventions. For which $t$ is the from-scratch step largest? Compare with the value printed above.
# 3. Let the gradient be noise plus a small constant, `noise(t) + 0.1`, and plot the mean of the step next to its root
#    mean square. How does the ratio depend on the constant?
