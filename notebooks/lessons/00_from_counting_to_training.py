# %% [markdown]
# # 0. From counting to training
#
# The smallest language model there is fits into one table. In this lesson you make it twice. First you count; then you
# forget the counts, begin with a table of zeros, and *train* it until it knows the same. What you need for the second
# way, a loss, its slope, the chain rule and a step downhill, is all that a large model needs too.
#
# **You will be able to**
#
# * say what a language model is, and how good one is, in nats;
# * find the slope of a function by measuring and by the chain rule;
# * train a table with stochastic gradient descent, and tell when it is done.
#
# **Before**: Python with functions and loops, and what a numpy array is. Derivatives from school help, and are
# explained. **Time**: 40 minutes to read, 1 hour with the six exercises. **Needs**: numpy and matplotlib, nothing else.
#
# In an exercise you replace every `...`, run the cell, and run the check below it. A wrong answer is told what is wrong
# with it. You can leave an exercise out: no later cell needs your answer.

# %%
import matplotlib.pyplot as plt
import numpy as np

import toy  # for toy.check alone
from toy.plots import lesson_style

lesson_style()
np.set_printoptions(precision=3, suppress=True, linewidth=110)

# %% [markdown]
# ## A text is a row of numbers
#
# Here is all that our models will ever read. Each distinct character gets a number, its *id*. The characters together
# are the *vocabulary*, and `V` is how many there are. A thing with an id is called a *token*; here that is a character.

# %%
text = (
    "the sea was calm that morning and the old man sat on the stones and mended the net. the cat sat near him and "
    "looked at the sea. there were three small boats on the water and none of them moved. then the wind came. it came "
    "over the hills and over the town and the boats turned their heads to it as horses do. the man looked up. he saw "
    "the line on the water where the wind began and he saw that it was near. he took the net and the cat and went "
    "home. in the night the sea was loud and the house stood in the rain and the cat slept on the net near the stove. "
    "in the morning there were two boats. the old man went down to the stones and looked for the third and found it "
    "on the sand behind the harbour. it was dry and it was whole. the wind had carried it there and had set it down."
)
characters = sorted(set(text))  # the vocabulary
id_of = {character: i for i, character in enumerate(characters)}
ids = np.array([id_of[character] for character in text])  # (N,)
N, V = len(ids), len(characters)

print(f"N = {N} tokens, V = {V} different ones: {''.join(characters)!r}")
print(f"{text[:12]!r} is {ids[:12]}")

# %% [markdown]
# ## Counting
#
# A *language model* says, for every token that may come next, how probable it is. Ours looks at one token only, the
# last: it is a *bigram* model, from two tokens in a row. So all that it has to know is which token follows which, and
# how often. That is a table of `V` rows and `V` columns:
#
# `counts[a, b]` says how often token `b` stands right behind token `a`.
#
# A text of `N` tokens has `N - 1` such pairs, and they overlap: `the` holds `th` and `he`.

# %% [markdown] exercise="bigram_counts"
# `ids[:-1]` are the first tokens of all pairs and `ids[1:]` the second ones. `np.add.at(table, (rows, columns), 1)`
# adds 1 at every place, as often as the place is named.

# %% [markdown]
# Whether you did it with numpy or with a loop, this is the table. A dark field is a pair that occurs often.

# %% alt="The table of counts as a grid of 24 by 24 fields, the first character of a pair downwards and the second to the right; few fields are dark, the darkest are space then t, e then space, h then e, and t then h"
counts = np.zeros((V, V), int)
for k in range(N - 1):
    counts[ids[k], ids[k + 1]] += 1


def show_table(ax, table, title, label):
    """A table (V, V) as a picture."""
    image = ax.imshow(table, cmap="Blues", vmin=0)
    names = ["␣" if character == " " else character for character in characters]
    ax.set_xticks(range(V), names)
    ax.set_yticks(range(V), names)
    ax.tick_params(length=0, labelsize=11)
    ax.set(title=title, xlabel="next character", ylabel="character")
    ax.figure.colorbar(image, ax=ax, label=label, shrink=0.8)


fig, ax = plt.subplots(figsize=(8, 6.6), layout="constrained")
show_table(ax, counts, "How often does one follow the other?", "count")
plt.show()

print("pairs:", counts.sum(), "= N - 1")
for a, b in zip(*np.unravel_index(np.argsort(-counts, axis=None)[:4], counts.shape)):
    print(f"{characters[a]!r} then {characters[b]!r}: {counts[a, b]} times")
print(f"fields with a zero: {np.mean(counts == 0):.0%}")

# %% [markdown]
# ## From counts to probabilities
#
# Divide each row by its sum, and it holds the probabilities of what comes next; they add up to 1.
#
# One thing has to be settled before. Most fields hold a zero, and probability 0 means *impossible*: a model that says
# so is infinitely wrong when it happens after all. So a small number is added to every count first, the *smoothing*.

# %% [markdown] exercise="bigram_probabilities"
# `table.sum(axis=1, keepdims=True)` sums along each row and has shape `(V, 1)`, so that it divides row by row.

# %% [markdown]
# With this table one can write. Take a token, look up its row, throw a die with these probabilities, and go on from
# what comes out.

# %%
smoothing = 0.01
row_sums = counts.sum(axis=1) + V * smoothing  # (V,)
probabilities = np.stack([(counts[a] + smoothing) / row_sums[a] for a in range(V)])  # (V, V)


def write(probabilities, n, seed):
    """n characters, drawn from the table one by one, after a space."""
    rng = np.random.default_rng(seed)
    token, written = id_of[" "], []
    for _ in range(n):
        token = rng.choice(V, p=probabilities[token])
        written.append(characters[token])
    return "".join(written)


print("every row sums to", probabilities.sum(axis=1).min().round(6), "to", probabilities.sum(axis=1).max().round(6))
print("a uniform die:", write(np.full((V, V), 1 / V), 60, seed=0))
print("the table:    ", write(probabilities, 60, seed=0))

# %% [markdown]
# Not English, but one sees what it was made from: words have a length, and one of them is `the`.
#
# ## How good is it?
#
# Look at the probability that the model gave to what really came, at each of the `N - 1` places. A good model gives
# high ones. Multiplied with each other they make a number far too small for a computer, so one adds their logarithms
# instead. With a minus sign, so that less is better, and divided by the number of places, so that texts of any length
# compare:
#
# $$\text{loss} = -\frac{1}{N-1} \sum_{t} \ln p(\text{token}_{t+1} \mid \text{token}_t)$$
#
# The unit is the *nat*. A model that knows nothing gives each token $1/V$, and its loss is $-\ln(1/V) = \ln V$. One
# that always knows what comes has loss 0.

# %% alt="The curve of minus the logarithm of p, from above 4 nats at a probability near 0 down to 0 nats at probability 1, with two points on it: the uniform guess and the table of counts"
first, second = ids[:-1], ids[1:]  # the pairs, (N-1,) each
loss_uniform = np.log(V)
loss_counted = -np.mean(np.log(probabilities[first, second]))
print(f"uniform guess: {loss_uniform:.3f} nats")
print(f"counted:       {loss_counted:.3f} nats")

p = np.linspace(0.01, 1, 300)
fig, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
ax.plot(p, -np.log(p), label="$-\\ln p$")
for name, loss, marker in [("uniform guess", loss_uniform, "s"), ("table of counts", loss_counted, "o")]:
    ax.plot(np.exp(-loss), loss, marker, markersize=11, label=f"{name}: {loss:.2f} nats, p = {np.exp(-loss):.2f}")
ax.set(xlabel="probability of what came, p", ylabel="loss (nats)", title="Sure and right costs nothing")
ax.legend()
plt.show()

# %% [markdown]
# ## A table that can be trained
#
# Counting works for pairs, though most fields hold a zero even here. For ten tokens in a row there are $V^{10}$
# possibilities, and nearly all of them never occur in a text. So we learn another way, on the same table, where we can
# see whether it comes to the same.
#
# The table now holds any numbers, positive or negative, called *logits*. The *softmax* makes probabilities of a row: it
# takes the exponential of each number, which is positive, and divides by their sum.
#
# $$p(b \mid a) = \frac{e^{\text{logits}[a, b]}}{\sum_{c} e^{\text{logits}[a, c]}}$$
#
# The loss is the one from above. Written with logits, $-\ln p$ is the logarithm of the sum minus the logit of the token
# that came:
#
# $$-\ln p(b \mid a) = \ln \sum_{c} e^{\text{logits}[a, c]} - \text{logits}[a, b]$$

# %% [markdown] exercise="bigram_loss"
# `logits[ids[:-1]]` picks one row for each pair, shape `(N-1, V)`. `rows[np.arange(len(rows)), ids[1:]]` takes one
# number out of each of these rows.

# %% [markdown]
# We begin with a table of zeros. Every row then gives $1/V$ to every token, so the loss must be $\ln V$: check it
# before you train anything.


# %%
def softmax(logits):
    """(..., V) -> probabilities (..., V)"""
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def loss_of(logits):
    """The mean loss of a table of logits (V, V) over all pairs of the text."""
    return -np.mean(np.log(softmax(logits)[first, second]))


zeros = np.zeros((V, V))
print(f"loss of the zeros {loss_of(zeros):.6f}, ln V {np.log(V):.6f}")

# %% [markdown]
# ## The slope
#
# Change one number of the table, and leave the rest. The loss changes with it. How fast is the *slope*, or derivative:
# the change of the loss divided by the change of the number, when that is small. One can simply measure it, a little to
# the right and a little to the left:
#
# $$\text{slope} \approx \frac{\text{loss}(x + h) - \text{loss}(x - h)}{2h}$$

# %% alt="The loss as a function of the one logit for h then e, a valley with its lowest point near 4; the tangent at 0 points down to the right, the tangent at 8 goes slightly up"
h_then_e = id_of["h"], id_of["e"]


def loss_at(x):
    """The loss when the logit of "e after h" is x and all others are 0."""
    logits = np.zeros((V, V))
    logits[h_then_e] = x
    return loss_of(logits)


def measured_slope(x, h=1e-4):
    return (loss_at(x + h) - loss_at(x - h)) / (2 * h)


x = np.linspace(-3, 10, 200)
fig, ax = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
ax.plot(x, [loss_at(value) for value in x], color="black")
for at in (0.0, 8.0):
    slope = measured_slope(at)
    around = np.array([at - 2, at + 2])
    ax.plot(around, loss_at(at) + slope * (around - at), label=f"slope at {at:g}: {slope:+.4f}")
    ax.plot(at, loss_at(at), "o", color="black")
ax.set(xlabel="logit of “e after h”", ylabel="loss (nats)", title="One number of the table, and the loss")
ax.legend()
plt.show()

# %% [markdown]
# The slope is negative at 0: make the number larger, and the loss falls. At 8 it is positive, there we have gone too
# far. At the lowest point of the valley it is zero. So the sign says in which direction to go, and one stops where the
# slope is zero. That is training.
#
# But to measure all slopes of the table takes two losses for each of its numbers, and a large model has billions of
# them. There is a way to get all of them at once.
#
# ## The chain rule
#
# Every computation is made of small steps. Of one step alone the slope is easily said:
#
# | step | slope in its first input | slope in its second |
# |---|---|---|
# | $a + b$ | $1$ | $1$ |
# | $a \cdot b$ | $b$ | $a$ |
# | $\tanh(a)$ | $1 - \tanh^2(a)$ | |
#
# Steps one after the other: slopes are *multiplied*. If $s$ grows twice as fast as $a$, and the loss three times as
# fast as $s$, then the loss grows six times as fast as $a$. And if $a$ is used at two places, it reaches the loss on
# two ways: their slopes are *added*. These two sentences are the chain rule.
#
# Here is a machine that does it. Each number remembers what it was made from, and the slope of that step. `backward`
# begins at the end, where the slope is 1, and hands it back, step by step.


# %%
class Number:
    """A number that knows what it was made from."""

    def __init__(self, value, made_from=(), name=""):
        self.value, self.made_from, self.name = value, made_from, name  # made_from: pairs (input, slope of this step)
        self.slope = 0.0  # of the end in this number: filled by backward

    def __add__(self, other):
        return Number(self.value + other.value, ((self, 1.0), (other, 1.0)), "+")

    def __mul__(self, other):
        return Number(self.value * other.value, ((self, other.value), (other, self.value)), "*")

    def steps(self):
        """This number and all that it was made from, each behind its inputs."""
        order = []

        def visit(number):
            if number not in order:
                for source, _ in number.made_from:
                    visit(source)
                order.append(number)

        visit(self)
        return order

    def backward(self):
        """Fill `slope` of all numbers that this one was made from."""
        self.slope = 1.0
        for number in reversed(self.steps()):
            for source, slope_of_step in number.made_from:
                source.slope += number.slope * slope_of_step  # multiplied along a way, added over the ways


a, b, c = Number(2.0, name="a"), Number(-3.0, name="b"), Number(10.0, name="c")
s = a * b + c
end = s * s + a  # a is used twice, and s is too
end.backward()

h = 1e-6
for number, moved in [(a, (2 + h, -3, 10)), (b, (2, -3 + h, 10)), (c, (2, -3, 10 + h))]:
    measured = ((moved[0] * moved[1] + moved[2]) ** 2 + moved[0] - end.value) / h
    print(f"slope in {number.name}: by the chain rule {number.slope:6.2f}, measured {measured:9.5f}")

# %% [markdown]
# The same as a picture: values in black, computed from left to right; slopes in orange, from right to left.


# %% alt="The graph of (a times b plus c) squared plus a: three numbers and four steps from left to right, under each its value in black and its slope in orange; the slope of a is minus 23, made of two ways"
def draw_graph(end, places, title):
    _, ax = plt.subplots(figsize=(12, 4.6), layout="constrained")
    for number, (x, y) in zip(end.steps(), places):
        for source, _ in number.made_from:
            start = places[end.steps().index(source)]
            ax.annotate(
                "",
                (x, y),
                start,
                arrowprops={"arrowstyle": "->", "color": "0.6", "shrinkA": 26, "shrinkB": 26, "lw": 1.5},
            )
        ax.plot(x, y, "o", ms=38, mfc="white", mec="#0072B2", mew=2)
        ax.text(x, y, number.name, ha="center", va="center", fontsize=16)
        ax.text(x, y - 0.42, f"{number.value:g}", ha="center", va="top", color="black")
        ax.text(x, y - 0.68, f"slope {number.slope:g}", ha="center", va="top", color="#B34E00")
    ax.set(title=title, xlim=(-0.6, 6.6), ylim=(-1.1, 3.5))
    ax.axis("off")
    plt.show()


print("in the order in which they were made:", [number.name for number in end.steps()])
draw_graph(
    end,
    [(0, 2.9), (0, 1.5), (1.5, 2), (1.5, 0), (3, 1.2), (4.5, 1.2), (6, 2)],
    "loss = (a * b + c)² + a: values go right, slopes come back left",
)

# %% [markdown]
# Now you, for another function and without the machine. You go backwards as it did: first the slope of the last step,
# then of the one before, always times the slope that came back.

# %% [markdown] exercise="chain_rule"
# `d_y` is the slope of the loss in `y`: of `y*y + a` that is `2*y`. Then `d_s` is `d_y` times the slope of tanh, and so
# on. For `d_a` there are two ways: through the product, and directly.

# %% [markdown]
# ## All slopes of the table at once
#
# For one pair, the chain rule gives a result that is worth to be remembered; it stands at the end of every language
# model:
#
# $$\frac{\partial(-\ln p_b)}{\partial\,\text{logits}} = p - \text{one\_hot}(b)$$
#
# The vector $p$ is the softmax of the row, and $\text{one\_hot}(b)$ is 1 at the token that came and 0 elsewhere. In
# words: the slope is the probability that was given, minus the one that should have been given. What came is pushed up,
# all else is pushed down, and more so the more probable it was thought to be.
#
# The loss is the mean over the pairs, so the slopes of all pairs with the same first token are added up, and divided by
# their number, $N - 1$.

# %% [markdown] exercise="bigram_slope"
# Two lines as in `bigram_counts`: subtract 1 at one place of each row, and then add row after row to the table at the
# rows of the first tokens. In both, the same place may come twice.

# %% [markdown]
# Add the pairs up and the counts come back: token $a$ occurs $n_a$ times as a first token, so its row of slopes is
# $(n_a\, p - \text{counts}[a]) / (N-1)$. Look at what that says. The slope is zero exactly when
# $p = \text{counts}[a] / n_a$: *where training ends is what counting gives*.

# %%
n_first = counts.sum(axis=1, keepdims=True)  # (V, 1), how often each token is the first of a pair


def slope_of(logits):
    """The slope of the loss in every logit, (V, V)."""
    return (n_first * softmax(logits) - counts) / (N - 1)


slope = slope_of(zeros)
print(f"e after h: by the formula {slope[h_then_e]:.8f}, measured {measured_slope(0.0):.8f}")
print(f"the {V} slopes of every row sum to zero, up to {np.abs(slope.sum(axis=1)).max():.0e}")
no_smoothing = -np.mean(np.log((counts / n_first)[first, second]))
print(f"loss of counts / n, the lowest there is: {no_smoothing:.3f} nats, with the smoothing {loss_counted:.3f}")

# %% [markdown]
# ## Downhill
#
# One step of *gradient descent*: move every number against its slope. How far is the slope times a number that you
# choose, the *learning rate* `lr`. The slopes of all numbers together are called the *gradient*.
#
# $$\text{weight} \leftarrow \text{weight} - \text{lr} \cdot \text{gradient}$$

# %% [markdown] exercise="sgd_step"
# One line. `weight -= ...` writes into the array that was given; `weight = weight - ...` would make another one, and
# the caller would never see it.

# %% [markdown]
# Now repeat it. The slopes are taken over the whole text here, and three learning rates are tried.


# %% alt="Loss over 300 steps for three learning rates, from ln V = 3.18 nats: 1 falls slowly, 10 quickly and close to the dashed line of the counted table, 100 jumps up and down between 1.9 and 2.7 and never settles"
def train(lr, n_steps):
    """Gradient descent from zeros. Returns the table and the losses before each step, and after the last."""
    logits, losses = np.zeros((V, V)), []
    for _ in range(n_steps):
        losses.append(loss_of(logits))
        logits -= lr * slope_of(logits)
    return logits, np.array([*losses, loss_of(logits)])


fig, ax = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
for lr, style in [(1, ":"), (10, "--"), (100, "-")]:
    trained, losses = train(lr, 300)
    ax.plot(losses, style, label=f"lr = {lr}: {losses[-1]:.3f} after 300 steps")
ax.axhline(loss_uniform, color="0.5", lw=1.5, ls="-.", label=f"uniform guess: {loss_uniform:.3f}")
ax.axhline(loss_counted, color="black", lw=1.5, ls=(0, (7, 2)), label=f"counted: {loss_counted:.3f}")
ax.set(xlabel="step", ylabel="loss (nats per character)", title="Training comes down to what counting gives")
ax.legend(fontsize=11)
plt.show()

# %% [markdown]
# The larger the learning rate, the faster, until the steps are too long: with 100 they leap from one side of the valley
# to the other, and have not come to rest after 300 steps. To try three values, each ten times the last, and to look at
# the curves, is how a learning rate is found for large models too. (Theirs are far smaller than 10. This model bears
# such steps because it is so simple.)
#
# ## The S in SGD
#
# A real text is too long to be read for one step. *Stochastic* gradient descent takes a few pairs at random, a *batch*,
# and their slopes instead of all. They point in about the right direction, and a step costs little.


# %% alt="Loss of batches of 32 pairs over 3000 steps as a cloud of points, nearly all from 1.2 to 2.4 nats; the loss on the whole text is a smooth line inside the cloud that comes close to the counted loss"
def train_sgd(lr, n_steps, batch, seed):
    """SGD from zeros. Returns the table, the loss of every batch, and the loss on the whole text after every 50 steps."""
    rng = np.random.default_rng(seed)
    logits, of_batch, of_text = np.zeros((V, V)), [], [loss_of(zeros)]
    for step in range(1, n_steps + 1):
        chosen = rng.integers(0, N - 1, batch)  # the pairs of this batch
        p = softmax(logits[first[chosen]])  # (batch, V)
        of_batch.append(-np.mean(np.log(p[np.arange(batch), second[chosen]])))
        p[np.arange(batch), second[chosen]] -= 1
        np.subtract.at(logits, first[chosen], lr * p / batch)
        if step % 50 == 0:
            of_text.append(loss_of(logits))
    return logits, np.array(of_batch), np.array(of_text)


trained, of_batch, of_text = train_sgd(lr=5.0, n_steps=3000, batch=32, seed=0)

fig, ax = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
ax.plot(range(1, 3001), of_batch, ".", ms=3, color="#56B4E9", label="a batch of 32 pairs")
ax.plot(range(0, 3001, 50), of_text, color="#0072B2", label="the whole text")
ax.axhline(loss_counted, color="black", lw=1.5, ls=(0, (7, 2)), label="counted")
ax.set(xlabel="step", ylabel="loss (nats per character)", title="Every batch says something else, and it works")
ax.legend(markerscale=4)
plt.show()
all_pairs = train(lr=5.0, n_steps=3000)[1][-1]  # the same steps, but none of the luck of a batch
print(f"trained: {of_text[-1]:.3f} nats on the whole text, with all pairs in every step {all_pairs:.3f}")
print(f"counted: {loss_counted:.3f}")
print(f"batches of the last 500 steps: {of_batch[-500:].mean():.2f} +- {of_batch[-500:].std():.2f} nats")

# %% [markdown]
# The loss of a single batch jumps up and down, and says little. That is how the curve of every training looks, and why
# it is drawn smoothed. It is also what keeps the line on the whole text a little above the counted loss to the end.
#
# Is it the same table now? The probabilities of both, side by side:

# %% alt="Two tables of probabilities, counted and trained with SGD, that look alike"
fig, axes = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
show_table(axes[0], probabilities, "Counted", "probability")
show_table(axes[1], softmax(trained), "Trained with SGD", "probability")
plt.show()

difference = np.abs(softmax(trained) - probabilities)
worst = characters[difference.max(axis=1).argmax()]
print(
    f"difference of a probability: {difference.mean():.4f} in the mean, at most {difference.max():.2f}, behind {worst!r}"
)
print(f"{worst!r} begins {n_first[id_of[worst], 0]} of the {N - 1} pairs")
print("counted:", write(probabilities, 60, seed=1))
print("trained:", write(softmax(trained), 60, seed=1))

# %% [markdown]
# Nobody told the second table to count. It was only ever moved downhill.
#
# ## What comes next
#
# A bigram looks at one token. After `th` and after `oth` it says the same, for it sees only the `h`. No training will
# take it below the loss of the counts without smoothing; to get lower, a model has to look further back. The next
# lesson does that: there the row of logits is not looked up in a table but *computed*, from all tokens so far. What
# comes behind it, softmax, loss, slope and step, you know already.
#
# ## Exercises
#
# 1. Where between 10 and 100 does gradient descent stop to settle? Watch one row of the table over the steps, that of a
#    frequent token. What does it do where the learning rate is too large?
# 2. Count on the first half of the text, and measure the loss on the second, for a smoothing of 0.001, 0.01, 0.1, 1 and
#    10. Which one is best, and why is it not the one that is best on the first half?
# 3. Give `Number` a method `tanh`, and let it confirm your `chain_rule` at three points.
