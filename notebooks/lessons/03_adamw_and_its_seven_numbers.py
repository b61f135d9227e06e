# %% [markdown]
# # 3. AdamW and its seven numbers
#
# The backward pass says in which direction each weight should go. The *optimizer* decides how far. Five of them are
# built here, each out of the one before: SGD, momentum, RMSProp, Adam and AdamW. The last is what nearly every language
# model is trained with.
#
# **You will be able to**
#
# * say what is wrong with plain SGD in a narrow valley, and what momentum and RMSProp do about it;
# * write AdamW as in its paper, and find the same weights as PyTorch;
# * read the row of seven numbers that this library hands to its graphs, and say what is its own about it;
# * see in a curve when the gradient is clipped, and what that changes.
#
# **Before**: [lesson 0](00_from_counting_to_training.ipynb) for the gradient and SGD; lessons 1 and 2 for the model
# that is trained at the end. **Time**: 40 minutes to read, 2 hours with the six exercises.

# %%
import importlib.util
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
# ## A valley
#
# A loss of two weights can be drawn. This one is a long, narrow valley: across it, in $w_1$, it is 25 times as steep as
# along it, in $w_0$. The losses of real models are like this, with a million directions in place of two.
#
# $$\text{loss}(w) = \tfrac12 \left(w_0^2 + 25\, w_1^2\right), \qquad \text{gradient} = (w_0,\ 25\, w_1)$$
#
# An optimizer is a function here: it gets the gradient, a dictionary for what it wants to remember, and the number of
# the step, and it returns how far to go. The first one is the SGD of lesson 0.

# %%
CURVATURE = np.array([1.0, 25.0])
START = np.array([-8.0, 1.6])


def loss(w):
    return 0.5 * (CURVATURE * w**2).sum(axis=-1)


def gradient(w):
    return CURVATURE * w


def descend(optimizer, n_steps, scale=1.0, start=START):
    """The weights before each step and after the last, (n_steps + 1, 2). scale: multiplies the loss."""
    path, memory = [start], {}
    for t in range(1, n_steps + 1):
        path.append(path[-1] - optimizer(scale * gradient(path[-1]), memory, t))
    return np.array(path)


def sgd(lr):
    return lambda g, memory, t: lr * g


# %% [markdown]
# How large can the learning rate be? In one direction with curvature $k$, a step multiplies the weight by
# $1 - \text{lr} \cdot k$. That must lie between $-1$ and $1$, so $\text{lr} < 2/k$, and it is the *steepest* direction
# that sets the limit.


# %% alt="Three pictures of the valley seen from above with the paths of SGD: with 0.01 it creeps along, with 0.07 it zigzags from wall to wall, with 0.085 the zigzag grows and leaves the picture"
def draw_valley(ax, title):
    x, y = np.meshgrid(np.linspace(-9, 4, 200), np.linspace(-2.4, 2.4, 200))
    levels = np.geomspace(0.5, 110, 7)
    ax.contour(x, y, loss(np.stack([x, y], axis=-1)), levels, colors="0.8", linewidths=1)
    ax.plot(0, 0, "*", color="black", ms=13)
    ax.set(title=title, xlabel="$w_0$", xlim=(-9, 4), ylim=(-2.4, 2.4))


fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
for ax, lr, note in zip(axes, [0.01, 0.07, 0.085], ["creeps", "zigzags", "diverges"]):
    path = descend(sgd(lr), 20)
    draw_valley(ax, f"SGD, lr = {lr:g}: {note}")
    ax.plot(*path.T, ".-", lw=1.8, ms=9, color="#0072B2")
axes[0].set_ylabel("$w_1$")
plt.show()

print(f"largest lr for the steep direction: 2/25 = {2 / 25}, for the flat one alone: 2/1 = {2 / 1}")
for lr in (0.01, 0.07, 0.085):
    print(
        f"lr {lr:5}: factors per step {1 - lr * CURVATURE}, loss after 20 steps {loss(descend(sgd(lr), 20)[-1]):8.3f}"
    )

# %% [markdown]
# The star is the lowest point. One learning rate for both directions is a bad bargain: as much as the steep one bears,
# and the flat one gets on by less than 8 percent a step.
#
# ## Momentum
#
# A ball that rolls down keeps its speed. Across the valley the gradients point to and fro and cancel; along it they all
# point the same way and add up. The *velocity* $u$ is that sum, in which older gradients count less (Polyak 1964):
#
# $$u \leftarrow \mu\, u + g, \qquad w \leftarrow w - \text{lr} \cdot u$$
#
# With a constant gradient, $u$ grows to $g\,(1 + \mu + \mu^2 + \dots) = g/(1-\mu)$: ten times $g$ for $\mu = 0.9$.

# %% [markdown] exercise="momentum_step"
# The arrays belong to the caller, so write into them: `velocity *= ...`, `velocity += ...`, `weight -= ...`.

# %% [markdown]
# ## RMSProp
#
# The other cure is to give each weight a learning rate of its own. RMSProp (Tieleman & Hinton 2012) keeps a running
# mean $v$ of the *squared* gradient, and divides by its root, which is the usual size of the gradient of that weight:
#
# $$v \leftarrow \beta\, v + (1 - \beta)\, g^2, \qquad w \leftarrow w - \text{lr}\, \frac{g}{\sqrt{v} + \varepsilon}$$
#
# The quotient has no unit. A weight with gradients a thousand times as large moves no further, and `lr` is, roughly,
# how far a weight goes per step. The small $\varepsilon$ is there for weights whose gradient is zero.

# %% [markdown] exercise="rms_prop_step"
# First bring `v` up to date, then use the new one. `eps` is added to the root, not under it.

# %% [markdown]
# Both on the valley, beside SGD with nearly the largest learning rate that it bears.


# %% alt="Three pictures of the valley: SGD zigzags and ends shortly before the lowest point; momentum swings from side to side and is there; RMSProp goes to the floor of the valley and then straight along it, and ends a little before where SGD does"
def momentum(lr, mu=0.7):
    def step(g, memory, t):
        memory["u"] = mu * memory.get("u", 0.0) + g
        return lr * memory["u"]

    return step


def rms_prop(lr, beta=0.9, eps=1e-8):
    def step(g, memory, t):
        memory["v"] = beta * memory.get("v", 0.0) + (1 - beta) * g**2
        return lr * g / (np.sqrt(memory["v"]) + eps)

    return step


def draw_paths(optimizers, n_steps):
    _, axes = plt.subplots(1, len(optimizers), figsize=(12, 3.6), layout="constrained", sharey=True)
    for ax, (name, optimizer), colour in zip(axes, optimizers.items(), ["#0072B2", "#D55E00", "#009E73"]):
        draw_valley(ax, name)
        ax.plot(*descend(optimizer, n_steps).T, ".-", lw=1.8, ms=8, color=colour)
    axes[0].set_ylabel("$w_1$")
    plt.show()


OPTIMIZERS = {"SGD, lr = 0.07": sgd(0.07), "momentum, lr = 0.05": momentum(0.05), "RMSProp, lr = 0.2": rms_prop(0.2)}
draw_paths(OPTIMIZERS, 40)

for name, optimizer in OPTIMIZERS.items():
    once, thousandfold = (descend(optimizer, 10, scale)[-1] for scale in (1.0, 1000.0))
    same = np.abs(once - thousandfold).max()
    print(f"{name:20} loss after 40 steps {loss(descend(optimizer, 40)[-1]):.1e};  loss x 1000 moves it by {same:.1e}")

# %% [markdown]
# The printed numbers show what the pictures do not: RMSProp does not care if the loss is multiplied by a thousand,
# while for the other two the learning rate would have to be a thousandth. That is why one learning rate fits matrices,
# gains and embeddings alike.
#
# ## Adam: both, and a correction
#
# Adam (Kingma & Ba 2015) divides the mean of the gradient by the root of the mean of its square:
#
# $$\begin{aligned}
# m &\leftarrow \beta_1 m + (1-\beta_1)\, g \\
# v &\leftarrow \beta_2 v + (1-\beta_2)\, g^2
# \end{aligned}$$
#
# Both begin at zero, and so at first they are too small: after $t$ steps with a constant gradient,
# $m = (1 - \beta_1^t)\, g$ and $v = (1 - \beta_2^t)\, g^2$. The *bias correction* divides by exactly these factors:
#
# $$\hat m = \frac{m}{1-\beta_1^t}, \qquad \hat v = \frac{v}{1-\beta_2^t}, \qquad
# w \leftarrow w - \text{lr}\, \frac{\hat m}{\sqrt{\hat v} + \varepsilon}$$

# %% [markdown] exercise="bias_correction"
# `t` is counted from 1, so in the first step the factor is `1 - beta`, and the corrected mean is the gradient itself.

# %% [markdown]
# The mean is two thirds full after ten steps with $\beta_1 = 0.9$, and after a thousand with $\beta_2 = 0.999$. So it
# is above all $v$ that would be too small without the correction, and since one divides by its root, the steps would be
# too *long*.

# %% alt="On the left the running means of a constant gradient of 1: with 0.9 nearly full after 30 steps, with 0.999 after 3000, corrected at 1 from the start. On the right the step of a constant gradient: 1 with the correction, without it up to more than six"
steps = np.arange(1, 3001)
m, v = 1 - 0.9**steps, 1 - 0.999**steps  # the running means of a gradient that is always 1

fig, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
axes[0].plot(steps, m, label="$m$, $\\beta_1 = 0.9$")
axes[0].plot(steps, v, "--", label="$v$, $\\beta_2 = 0.999$")
axes[0].plot(steps, m / (1 - 0.9**steps), ":", color="black", label="each corrected")
axes[0].set(title="The mean of a gradient that is always 1", ylabel="mean")
axes[1].plot(steps, m / np.sqrt(v), label="not corrected")
axes[1].plot(steps, np.ones(len(steps)), ":", color="black", label="corrected")
axes[1].set(title="The step that it gives", ylabel="step / lr")
for ax in axes:
    ax.set(xlabel="step t", xscale="log")
    ax.legend()
plt.show()
print(f"full after 10 steps with beta1: {m[9]:.0%}, after 1000 with beta2: {v[999]:.0%}")
print(
    f"longest step without the correction: {(m / np.sqrt(v)).max():.2f} times lr, at t = {steps[(m / np.sqrt(v)).argmax()]}"
)

# %% [markdown] exercise="adam_step"
# Four of the five blanks are one formula each; the last puts `m_hat` where RMSProp has the gradient. `m` and `v`
# themselves are kept without the correction.

# %% [markdown]
# ## AdamW: the decay beside the gradient
#
# *Weight decay* pulls every weight towards zero, so that none grows without a reason. The older way was to add
# $\text{weight decay} \cdot w$ to the gradient. With Adam this goes wrong: the quotient divides its size away again.
# AdamW (Loshchilov & Hutter 2019) takes it out of the gradient and shrinks the weight itself:
#
# $$w \leftarrow w\,(1 - \text{lr}\cdot\text{weight decay}) - \text{lr}\, \frac{\hat m}{\sqrt{\hat v} + \varepsilon}$$

# %% [markdown] exercise="adamw_step"
# The moments stand there already. Two lines are left: shrink the weight, then take Adam's step.

# %% [markdown]
# The difference is easiest seen on two weights whose loss has no gradient at all, so that only the decay acts.


# %% alt="Two weights that start at 1.0 and 0.3 under decay alone: on the left, AdamW, both fall by the same fraction; on the right, decay in the gradient, both first fall equally far at every step, so that the smaller one is near zero after 250 steps"
def adamw(lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, in_gradient=0.0):
    """An optimizer that also looks at the weight. in_gradient: weight decay in the older way."""

    def step(w, g, memory, t):
        g = g + in_gradient * w
        memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
        memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g**2
        m_hat, v_hat = memory["m"] / (1 - beta1**t), memory["v"] / (1 - beta2**t)
        return lr * weight_decay * w + lr * m_hat / (np.sqrt(v_hat) + eps)

    return step


def follow(step, gradient_at, start, n_steps):
    path, memory = [np.array(start)], {}
    for t in range(1, n_steps + 1):
        path.append(path[-1] - step(path[-1], gradient_at(path[-1]), memory, t))
    return np.array(path)


fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
ways = {
    "AdamW: the same fraction at every step": adamw(0.002, weight_decay=1.0),
    "decay in the gradient: the same distance at first": adamw(0.002, in_gradient=1.0),
}
for ax, (title, step) in zip(axes, ways.items()):
    path = follow(step, np.zeros_like, [1.0, 0.3], 400)
    ax.plot(path[:, 0], label="weight starting at 1.0")
    ax.plot(path[:, 1], "--", label="weight starting at 0.3")
    ax.axhline(0, color="black", lw=1)
    ax.set(xlabel="step", title=title)
axes[0].set_ylabel("weight")
axes[0].legend()
plt.show()

after = follow(ways["AdamW: the same fraction at every step"], np.zeros_like, [1.0, 0.3], 400)[-1]
print("AdamW after 400 steps:", after, " formula:", (1 - 0.002 * 1.0) ** 400 * np.array([1.0, 0.3]))
for title, step in ways.items():
    path = follow(step, np.zeros_like, [1.0, 0.3], 20)
    print(f"{title}: in 20 steps they lost {path[0] - path[-1]}")

# %% [markdown]
# ### All of them on the valley

# %% alt="On the left the valley with the paths of four optimizers; SGD zigzags, momentum and AdamW swing, RMSProp goes to the floor and along it. On the right their losses over 100 steps on a logarithmic axis: momentum falls furthest, RMSProp jumps up again"
everyone = {
    "SGD": (lambda w, g, memory, t: sgd(0.07)(g, memory, t), "-"),
    "momentum": (lambda w, g, memory, t: momentum(0.05)(g, memory, t), "--"),
    "RMSProp": (lambda w, g, memory, t: rms_prop(0.2)(g, memory, t), "-."),
    "AdamW": (adamw(0.4), ":"),
}
fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
draw_valley(axes[0], "40 steps")
for name, (step, style) in everyone.items():
    path = follow(step, gradient, START, 100)
    axes[0].plot(*path[:41].T, style, lw=2, label=name)
    axes[1].semilogy(loss(path), style, label=name)
    print(f"{name:9} loss after 100 steps: {loss(path[-1]):.1e}")
axes[0].set_ylabel("$w_1$")
axes[1].set(xlabel="step", ylabel="loss", title="Loss")
axes[1].legend()
plt.show()

# %% [markdown]
# On a smooth valley with well-chosen numbers momentum is hard to beat, and RMSProp with a constant rate does not
# settle: its steps do not get shorter as the gradient does. The strength of Adam is not in this picture. It is that its
# learning rate needs no knowledge of the curvature, and that it bears gradients that are noisy and of very different
# sizes.
#
# ## The same as PyTorch
#
# Is this *the* AdamW? Here are the weights that `torch.optim.AdamW` (version 2.13) has on our valley after 1, 10 and
# 100 steps. If PyTorch is installed, it is asked again.

# %%
FROM_TORCH = {  # lr 0.1, betas (0.9, 0.999), eps 1e-8, weight_decay 0.1, in float64
    1: (-7.820000000125, 1.484000000025),
    10: (-6.287152523394735, 0.5316467929860665),
    100: (-0.08815213232631466, 0.004327020385688694),
}
ours = follow(adamw(0.1, weight_decay=0.1), gradient, START, 100)
for t, theirs in FROM_TORCH.items():
    print(f"after {t:3} steps: ours {ours[t]}, largest difference from PyTorch's {np.abs(ours[t] - theirs).max():.0e}")
    assert np.abs(ours[t] - theirs).max() < 1e-6

if importlib.util.find_spec("torch") is None:
    print("PyTorch is not installed here, so the numbers from above are all there is to compare with.")
else:
    import torch

    w = torch.tensor(START, requires_grad=True)
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0.1)
    for t in range(1, 101):
        w.grad = torch.tensor(gradient(w.detach().numpy()))
        optimizer.step()
        assert np.abs(w.detach().numpy() - ours[t]).max() < 1e-6
    print("PyTorch is installed here: all 100 steps agree to 1e-6")

# %% [markdown]
# ## The seven numbers
#
# In this library a training step can be one graph: forward, backward and update, recorded once and then run many times.
# Such a graph cannot compute $1 - \beta^t$ anew, so everything that the update needs to know besides the gradient is
# handed to it, as one row:
#
# $$\mathrm{hp} = [\,\mathrm{lr},\ \beta_1,\ \beta_2,\ \varepsilon,\ \text{weight decay},\ s_5,\ s_6\,]$$
#
# $$w \leftarrow w\,(1 - \mathrm{lr}\cdot\text{weight decay}) - \mathrm{lr}\,\frac{m\, s_5}{\sqrt{v\, s_6} + \varepsilon}$$
#
# With $s_5 = 1/(1-\beta_1^t)$ and $s_6 = 1/(1-\beta_2^t)$ this is the AdamW from above. `toy.AdamW` makes the row, and
# `hp(t)` counts from 1 as the formula does. A training loop counts from 0, and there `hp_for_step(k)` is `hp(k + 1)`,
# so that nobody is off by one.

# %%
published = toy.AdamW.bias_corrected(lr=0.1, weight_decay=0.1)


def exact_row(t):
    """The same row in float64."""
    return np.array([0.1, 0.9, 0.999, 1e-8, 0.1, 1 / (1 - 0.9**t), 1 / (1 - 0.999**t)])


print("the row of step 10:", published.hp(10).ravel(), published.hp(10).dtype)
for name, row in [("row in float64", exact_row), ("row of toy.AdamW, in float32", published.hp)]:
    w, m, v = START.copy(), np.zeros(2), np.zeros(2)
    for t in range(1, 101):
        ops.adamw_step(w, gradient(w), m, v, row(t))  # changes w, m and v in place
    print(f"{name}: largest difference from PyTorch's weights after 100 steps {np.abs(w - FROM_TORCH[100]).max():.0e}")
    assert np.abs(w - FROM_TORCH[100]).max() < (1e-6 if row is exact_row else 1e-5)
print(f"1 - beta2 in float32 is {1 - float(np.float32(0.999)):.9f}")

# %% [markdown]
# The formula is PyTorch's to the last digits. A row in float32, the type of the graphs, is a little different, because
# $1 - 0.999$ loses digits there.
#
# ### This library's own convention
#
# There is a second way to fill the last two numbers, and you will find it in no paper: $s_5 = \beta_1$ and
# $s_6 = \beta_2$, the same at every step. It belongs to this library. Some of its graphs read it: those of the models
# other than GPT-2 that are trained from random weights, or started from another model's. LoRA, full fine-tuning and
# every GPT-2 read the published one.
#
# * `toy.AdamW.bias_corrected()`, also called `for_lora()`: the published AdamW, with $\beta_2 = 0.999$ by default;
# * `toy.AdamW.constant_slots()`, also called `for_from_scratch()`: constant slots, with $\beta_2 = 0.95$ by default.
#
# `recipe.adamw()` picks the right one. What does the other one do? We do not argue but measure: the length of the step,
# by calling the optimizer itself on weights with known gradients. First every weight gets the same gradient at every
# step; then every gradient is pure noise, with mean zero.


# %% alt="Step sizes over 3000 steps on logarithmic axes. Constant gradient: bias corrected is flat at 1, constant slots rise from 0.41 to just above 1 and settle at 0.92, constant slots with beta2 = 0.999 overshoot to almost six. Noise: they fall from 1, 0.41 and 2.8 to a little above 0.2"
def step_sizes(adamw, gradients):
    """Root mean square of |change of w| / lr at every step; gradients: function of the step -> array."""
    w, m, v = (np.zeros_like(gradients(1)) for _ in range(3))
    sizes = []
    for t in steps:
        before = w.copy()
        ops.adamw_step(w, gradients(t), m, v, adamw.hp(int(t)))
        sizes.append(np.sqrt(np.mean((w - before) ** 2)) / adamw.lr)
    return np.array(sizes)


def constant(t):
    return np.ones(1)


def noise(t):
    return np.random.default_rng(int(t)).normal(size=1000)


CONVENTIONS = {
    "bias corrected, beta2 = 0.999": (toy.AdamW.bias_corrected(lr=0.003), "-"),
    "constant slots, beta2 = 0.95": (toy.AdamW.constant_slots(lr=0.003), "--"),
    "constant slots, beta2 = 0.999": (toy.AdamW.constant_slots(lr=0.003, beta2=0.999), ":"),  # what must not be
}
fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained", sharey=True)
for ax, gradients, title in zip(axes, [constant, noise], ["The gradient is constant", "The gradient is noise"]):
    for name, (row, style) in CONVENTIONS.items():
        sizes = step_sizes(row, gradients)
        ax.plot(steps, sizes, style, label=name)
        print(f"{title}, {name}: first {sizes[0]:.3f}, largest {sizes.max():.3f}, last {sizes[-1]:.3f}")
    ax.set(xlabel="step t", xscale="log", yscale="log", title=title, ylim=(0.1, 10))
axes[0].set_ylabel("step size / lr")
axes[0].legend(fontsize=11)
plt.show()

first, settled = 0.9 * (1 - 0.9) / np.sqrt(0.95 * (1 - 0.95)), 0.9 / np.sqrt(0.95)
print(f"constant slots by formula: first {first:.3f}, settles at {settled:.3f}")

# %% [markdown]
# Read the left picture first.
#
# * *Bias corrected* is flat at 1: a constant gradient moves a weight by `lr` from the first step on.
# * *Constant slots* start at 0.41, rise a little above 1 and settle at $\beta_1/\sqrt{\beta_2} = 0.92$. The short first
#   steps work like a short warm-up.
# * *With $\beta_2 = 0.999$ they must not be used*: $v$ fills a hundred times as slowly as $m$ and is too small for
#   hundreds of steps. So the convention needs its smaller $\beta_2$.
#
# On the right the gradients disagree with each other. $m$ averages them away and $v$ does not, so the steps get
# shorter: Adam is careful where the gradient is not sure. Only the very first corrected step is always full, since one
# gradient alone agrees with itself. This is why one begins with a warm-up of the learning rate even with the
# correction.
#
# ### By hand and by the engine
#
# Is this all that happens in a training step? The engine takes five steps on random tokens; we read its gradients, and
# apply the formula with the row to a copy of the weights. One model of each convention. One thing has to be known: only
# matrices decay. A gain of a norm has its natural value at 1 and not at 0, so gains and biases get the same row with a
# zero in the place of the weight decay.


# %%
def update(w, g, m, v, hp):
    """One update by the row, in float64. Returns the new w, m and v."""
    lr, beta1, beta2, eps, weight_decay, s5, s6 = np.ravel(hp).astype(np.float64)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    return w * (1 - lr * weight_decay) - lr * (m * s5) / (np.sqrt(v * s6) + eps), m, v


def compare_with_engine(config, steps=5):
    recipe = toy.recipes.FromScratch(backend="auto")
    recipe.realize(config, toy.RecipeOptions(t_seq=8, t_batch=4, seed=0), keep_gradients=True)
    adamw = recipe.adamw(lr=0.001, weight_decay=0.1)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 9))

    w = {name: array.astype(np.float64) for name, array in recipe.parameters().items()}
    start = {name: array.copy() for name, array in w.items()}
    m, v = ({name: np.zeros_like(array) for name, array in w.items()} for _ in range(2))
    for k in range(steps):
        hp = adamw.hp_for_step(k)
        recipe.step(tokens[:, :-1], labels=tokens[:, 1:], hp=hp, is_first=k == 0)
        without_decay = np.where(np.arange(7) == 4, 0, hp)
        for name, g in recipe.gradients().items():
            row = hp if g.ndim == 2 else without_decay
            w[name], m[name], v[name] = update(w[name], g, m[name], v[name], row)

    after = recipe.parameters()
    moved = max(np.abs(w[name] - start[name]).max() for name in w)
    difference = max(np.abs(w[name] - after[name]).max() for name in w)
    print(f"{type(config).__name__:18} largest move {moved:.6f}, by hand and engine agree: {difference < 1e-6}")
    assert difference < 1e-6


sizes = dict(vocab_size=20, d_model=16, n_heads=2, d_ff=32, n_layers=2, context_length=8)
compare_with_engine(toy.TransformerConfig(**sizes))
compare_with_engine(toy.GPT2Config(**sizes))

# %% [markdown]
# ### On real text
#
# The documentation that comes with Python, a small model, the same batches, the same learning rate; only the row
# differs. A row remembers its convention, and the engine refuses the wrong one. A plain array has no memory, and the
# engine takes it as it is: that is how other conventions can be tried here.

# %%
text = load_corpus().text
tokenizer = CharTokenizer.from_text(text)
ids = tokenizer.encode(text)
config = toy.TransformerConfig(
    vocab_size=tokenizer.vocab_size, d_model=48, n_heads=4, d_ff=192, n_layers=2, context_length=32
)
N_STEPS = 400


def train(adamw, clip=None):
    """Train a fresh model with these rows. Returns the losses and the norms of the gradients, (N_STEPS,) each."""
    recipe = toy.recipes.FromScratch(backend="auto")
    recipe.realize(config, toy.RecipeOptions(t_seq=32, t_batch=8, seed=0, grad_clip=clip))
    losses, norms = np.empty(N_STEPS), np.empty(N_STEPS)
    for k in range(N_STEPS):
        batch = training_batch(ids, batch=8, context=32, seed=0, step=k)
        row = np.array(adamw.hp_for_step(k))  # a plain array
        losses[k] = recipe.step(batch.token_ids, labels=batch.labels, hp=row, is_first=k == 0)
        norms[k] = recipe.grad_norm  # of all gradients together, before any clipping
    return losses, norms


curves = {name: train(row) for name, (row, _) in CONVENTIONS.items()}

# %% alt="Training losses for the three rows. In the first 30 steps constant slots beta2 = 0.95 begin most slowly; over 400 smoothed steps the two conventions end close together and the third, beta2 = 0.999 without a correction, lies above them from about step 100 on"
fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
for name, (losses, _) in curves.items():
    style = CONVENTIONS[name][1]
    axes[0].plot(np.arange(1, 31), losses[:30], style, label=name)
    axes[1].plot(np.arange(1, N_STEPS + 1), smooth(losses, span=20), style, label=name)
    print(f"{name}: step 10 {losses[9]:.2f}, mean of the last 50 steps {losses[-50:].mean():.3f} nats")
for ax in axes:
    ax.axhline(np.log(config.vocab_size), color="black", ls="-.", lw=1, label="uniform guess, ln V")
    ax.set(xlabel="step", ylabel="training loss (nats per character)")
axes[0].set_title("The first 30 steps")
axes[1].set_title(f"{N_STEPS} steps, smoothed")
axes[1].legend(fontsize=11)
plt.show()

# %% [markdown]
# The order of the first steps is the order of the first step sizes. Later the two conventions lie close together, so
# neither is wrong. The row that must not be has thrown its weights around in the beginning: it is the first at step 10,
# and the last at the end of the picture.
#
# ## Clipping
#
# Now and then a batch has a gradient that is far too long, and one step along it can ruin what a hundred have built.
# *Clipping* puts an end to that: the norm of all gradients *together* is taken, and where it is above a limit, all of
# them are multiplied by limit / norm. The direction stays.

# %% [markdown] exercise="clip_by_global_norm"
# Add the squares of all numbers of all arrays, and take one root. The factor is at most 1: short gradients stay as they
# are.

# %% [markdown]
# `toy train` clips at 1 unless it is told otherwise. How often does that act? Look at the norm of every step and the
# line at 1.

# %% alt="On the left the norm of the gradient over 400 steps with a line at the limit 1: the points lie on both sides of it. On the right the smoothed training losses with and without clipping, which lie close to each other"
clip = 1.0
losses, norms = curves["constant slots, beta2 = 0.95"]
clipped_losses, clipped_norms = train(toy.AdamW.constant_slots(lr=0.003), clip=clip)

fig, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
above = clipped_norms > clip
at = np.arange(1, N_STEPS + 1)
axes[0].plot(
    at[above], clipped_norms[above], ".", ms=4, color="#D55E00", label=f"clipped: {above.mean():.0%} of the steps"
)
axes[0].plot(at[~above], clipped_norms[~above], ".", ms=4, color="#0072B2", label=f"as it is: {np.mean(~above):.0%}")
axes[0].axhline(clip, color="black", lw=1.5, label="limit")
axes[0].set(xlabel="step", ylabel="norm of the gradient", title="The norm before clipping", ylim=(0, None))
axes[0].legend(fontsize=11, markerscale=3)
axes[1].plot(at, smooth(losses, span=20), label=f"not clipped: {losses[-50:].mean():.3f} in the end")
axes[1].plot(at, smooth(clipped_losses, span=20), "--", label=f"clipped at 1: {clipped_losses[-50:].mean():.3f}")
axes[1].set(xlabel="step", ylabel="training loss (nats per character)", title="Loss, smoothed")
axes[1].legend(fontsize=11)
plt.show()
print(
    f"norm: median {np.median(clipped_norms):.2f}, largest {clipped_norms.max():.2f}; clipped: {above.mean():.0%} of the steps"
)
assert above.mean() > 0.25

# %% [markdown]
# Clipping is not an emergency brake that is pulled once in a thousand steps: it acts on a good part of them. With SGD
# that would be a smaller learning rate for those steps. With Adam it changes little: a factor that is about the same at
# every step stands in $m$ and in $\sqrt v$, and cancels. What is left is the protection from the odd step that is much
# longer than those before. When you see a new run, look at this picture first: it tells at once whether the limit acts
# always, sometimes or never.
#
# ## The wrong row
#
# The two conventions have the same shape, seven floats. If a model that expects one got the other, nothing would crash:
# it would train a little differently, and nobody would know why. So the row remembers who made it, and the engine
# compares.


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
rows = [toy.AdamW.constant_slots(lr=0.001).hp_for_step(0), toy.AdamW.bias_corrected(lr=0.001).hp_for_step(0)]
for hp in rows:
    what_happens(lambda hp=hp: recipe.step(batch.token_ids, labels=batch.labels, hp=hp, is_first=True))

# %% [markdown]
# The other mistakes one can make are answered in the same way: settings without a mode, a mode that contradicts its
# settings, and a step counted from 0 where the formula would divide by zero.

# %%
what_happens(lambda: toy.AdamW(lr=0.001).hp(1))
print()
what_happens(lambda: toy.AdamW(bias_correct=True, mode=toy.AdamW.MODE_FROM_SCRATCH).hp(1))
print()
what_happens(lambda: toy.AdamW.bias_corrected().hp(0))

# %% [markdown]
# ## Exercises
#
# 1. With $\beta_1 = 0$ and $\beta_2 = 0$, what is the corrected update for a gradient $g$? This rule has a name of its
#    own. Which information about the gradient does it throw away?
# 2. Write the step size for a constant gradient as a function of $t$, $\beta_1$ and $\beta_2$ for both conventions. For
#    which $t$ is that of the constant slots largest? Compare with the value printed above.
# 3. Train with a limit of 0.1 and of 10 instead of 1, with `toy.AdamW` and then with SGD of your own on
#    `recipe.gradients()`. For which of the two does the limit matter more?
