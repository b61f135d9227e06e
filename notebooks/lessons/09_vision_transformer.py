# %% [markdown]
# # 9. A vision transformer
#
# The blocks of the earlier notebooks never asked whether their tokens were words. So they read images too, once an
# image has become a row of tokens (Dosovitskiy et al. 2021): it is cut into square *patches*, and a linear layer makes
# a token of each. What is new stands before the first block and after the last one. Here you compute both by hand,
# train the model on handwritten digits, and look at what it looks at.
#
# Letters in the shapes: `B` images in a batch, `P` patches in an image, `T = P+1` tokens, `N = B*T` rows, `C` numbers
# in a patch, `D` the width of the model.
#
# The digits come with scikit-learn (`pip install scikit-learn`).
#
# **You will be able to**
#
# * turn an image into a row of tokens, and say what class token and positions are for;
# * train a vision transformer, and read its confusion matrix and its errors;
# * tell what a model looks at from what it needs.
#
# **Before**: [lessons 1](01_forward_by_hand.ipynb) and [4](04_train_and_plot.ipynb). **Time**: 40 minutes to read, 1
# hour with the three exercises.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display

import toy
from toy.data.images import Normalisation, deformed, epoch_order, load_images, split_images
from toy.engines import model_from
from toy.models.inputs import ImageBatch
from toy.models.vit import NORM_EPS
from toy.ops import reference as ops  # the textbook operations
from toy.plots import draw_confusion, lesson_style, smooth
from toy.trained.classify import confusion, score, softmax
from toy.training.schedules import make_schedule

# the matrices here are small: more threads would only wait for each other
toy.set_num_threads(1)
lesson_style()
BLUE, RED, GREEN, PINK, ORANGE, SKY = plt.rcParams["axes.prop_cycle"].by_key()["color"]
np.set_printoptions(precision=3, suppress=True, linewidth=110)

# %% [markdown]
# ## Images as arrays
#
# The digits are scans of 8 x 8 pixels. A pixel is a number from 0 (paper) to 1 (ink), and there is one channel; a
# colour image has three. One fifth of each class is put aside: the model is tested on these images and never trained on
# them.

# %% alt="Two images of each digit from 0 to 9, 8 by 8 pixels"
data = load_images("digits")
train, test = split_images(data, val_fraction=0.2, seed=0)  # which images
print("images", data.images.shape, " labels", data.labels.shape, " classes", *data.classes)
print(len(train), "to train on,", len(test), "to test")


def show_image(ax, image, title="", black=1.0):
    """black: which pixel is drawn black."""
    ax.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=black)
    ax.set_title(title, fontsize=13)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color="0.7")


fig, axes = plt.subplots(2, 10, figsize=(12, 3.2), layout="constrained")
fig.suptitle("Two digits of each class")
for label, column in enumerate(axes.T):
    for ax, i in zip(column, train[data.labels[train] == label]):
        show_image(ax, data.images[i], data.classes[label] if ax is column[0] else "")
plt.show()

# %% [markdown]
# As inside of the model, numbers of size 1 are the best start. So the mean of all training pixels is subtracted, and
# the result divided by their standard deviation.

# %%
normalise = Normalisation.of(data.images[train])
images = normalise(data.images[train[:3]])  # (B, height, width, channels)
print(f"mean {normalise.mean:.3f}, standard deviation {normalise.std:.3f}")
print(
    "a batch of",
    images.shape,
    "with values from",
    images.min().round(2),
    "to",
    images.max().round(2),
)

# %% [markdown]
# ## An image as patches
#
# We cut every image into patches of 2 x 2 pixels: four rows of four, so `P = 16`, and each patch is a row of `C = 4`
# numbers. Reading order is that of a page. Cutting is only another way to number the pixels: split both axes, put the
# two that count patches in front, and flatten.

# %% [markdown] exercise="patches"
# `reshape(B, side, p, side, p, C)` with `side` patches along an edge; exchange the two axes in the middle; flatten.

# %%
config = toy.ViTConfig(image_size=8, channels=1, patch_size=2, d_model=48, n_heads=4, d_ff=96, n_layers=3, n_classes=10)
B, P, T = len(images), config.n_patches, config.n_tokens
D, C, p = config.d_model, config.patch_numbers, config.patch_size
side = config.image_size // p  # patches along one side

patches = images.reshape(B, side, p, side, p, config.channels)
patches = patches.swapaxes(2, 3)  # (B, side, side, p, p, channels)
patches = patches.reshape(B * P, C)
print("patches", patches.shape, "= (B*P, C)")

inputs = ImageBatch(config, t_batch=B, t_seq=T).check(images)
print("the same as what the library cuts:", np.array_equal(patches, inputs["patches"]))

# %% alt="An image of a zero cut into 16 patches of 2 by 2 pixels, the patches with their numbers, and the patches as rows of four numbers"
fig, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained", width_ratios=[4, 4.4, 2])
picture = data.images[train[0]]
show_image(axes[0], picture, "the image, cut")
for cut in np.arange(1, side) * p - 0.5:
    axes[0].axhline(cut, color=RED)
    axes[0].axvline(cut, color=RED)

gap = 0.7  # of a pixel, between the patches
for n, patch in enumerate(inputs["patches"][:P].reshape(P, p, p)):
    row, column = divmod(n, side)
    x, y = column * (p + gap), row * (p + gap)
    shades = patch * normalise.std + normalise.mean
    axes[1].imshow(shades, cmap="gray_r", vmin=0, vmax=1, extent=(x, x + p, y + p, y))
    axes[1].add_patch(plt.Rectangle((x, y), p, p, fill=False, color=RED, lw=1))
    axes[1].text(x + p / 2, y - 0.1, n, ha="center", fontsize=11, color=RED)
size = side * (p + gap)
axes[1].set(xlim=(-0.1, size), ylim=(size - 0.5, -0.7))
axes[1].set_title("patches 0 to 15", fontsize=13)
axes[1].axis("off")

shades = inputs["patches"][:P] * normalise.std + normalise.mean
axes[2].imshow(shades, cmap="gray_r", vmin=0, vmax=1, aspect="auto")
axes[2].set_title("as rows", fontsize=13)
axes[2].set(xlabel="number (of C)", ylabel="patch (of P)", xticks=range(C), yticks=range(0, P, 3))
axes[2].spines[:].set(visible=True, color="0.7")
plt.show()

# %% [markdown]
# ## A patch becomes a token
#
# In notebook 1 a token was looked up in a table, one row for each entry of the vocabulary. There is no vocabulary of
# patches. Instead one linear layer maps the `C` numbers of a patch to the `D` numbers of a token:
#
# $$x = W_\text{patch}\,\text{patch} + b_\text{patch}$$
#
# By hand that is a matrix product, and it is the first operation of the model: the cache of its forward pass keeps what
# the layer read.

# %%
model = toy.ViT(config, seed=0, ops=ops)
w = model.parameters
tokens = patches @ w.patch_embd.weight.T + w.patch_embd.bias  # (B*P, C) @ (C, D) -> (B*P, D)

logits, (_, cache) = model.forward(images)
by_model, _ = ops.linear(cache.patch.x, w.patch_embd.weight, w.patch_embd.bias)
print("W_patch", w.patch_embd.weight.shape, " tokens", tokens.shape)
print("the model's first operation read our patches:", np.array_equal(cache.patch.x, patches))
print("and gives our tokens:", np.array_equal(by_model, tokens))

# %% [markdown]
# ## The class token and the positions
#
# Two things are added before the blocks. The *class token* is one more row, the same for every image, and it is
# learned. It has no pixels. It is the place where the model collects what it finds, and the prediction will be read
# there. And as in notebook 1, every place gets a learned row of its own, which says where a patch lay: row 0 is the
# class token's.

# %% [markdown] exercise="class_token_and_positions"
# `np.broadcast_to(class_token, (B, 1, D))` is one more token for each image. Concatenate along axis 1, then add the
# positions, which all images share.

# %%
class_token = np.broadcast_to(w.class_embd.weight, (B, 1, D))  # the same row for every image
x = np.concatenate([class_token, tokens.reshape(B, P, D)], axis=1)  # (B, T, D)
x = x + w.position_embd.weight  # (T, D), the same for every image
x = x.reshape(B * T, D)  # (N, D)
print("x", x.shape, "= (N, D): the residual stream")

# %% [markdown]
# The blocks are those of GPT-2, with one difference. There is no next token to be hidden, so attention is not causal:
# every token sees every token.
#
# After the last block only the rows of the class token are read, one of 17: a last norm, and a linear layer with one
# output for each class.

# %%
for block in w.blk:
    x, _ = model.block_forward(block, x, batch=B)  # (N, D) -> (N, D)

x = x.reshape(B, T, D)[:, 0]  # (B, D): the class tokens
x, _ = ops.layer_norm(x, w.output_norm.weight, w.output_norm.bias, NORM_EPS)
by_hand = x @ w.head.weight.T + w.head.bias  # (B, D) @ (D, n_classes) -> (B, n_classes)

print("logits", by_hand.shape)
print("the same as the model's, bit for bit:", np.array_equal(by_hand, logits))
print(f"{w.n_parameters:,} parameters,", f"{w.position_embd.weight.size:,} of them positions")

# %% [markdown]
# ### Without positions: a bag of patches
#
# How much does the model know about where a patch lay? Only what the position rows tell it. We shuffle the patches of
# an image and compare the logits, with the position rows and without them.

# %% alt="An image of a zero, and the same with its patches shuffled, which nobody can read"
order = np.random.default_rng(0).permutation(P)
shuffled = patches.reshape(B, side, side, p, p, 1).reshape(B, P, p, p, 1)[:, order]
shuffled = shuffled.reshape(B, side, side, p, p, 1).swapaxes(2, 3).reshape(images.shape)

without = model_from(config, dict(w.items()), backend="numpy")
without.parameters.position_embd.weight[:] = 0
for name, m in [("with positions", model), ("without", without)]:
    difference = np.abs(m.forward(shuffled)[0] - m.forward(images)[0]).max()
    print(f"{name:15} largest difference of a logit: {difference:.1e}")
assert difference < 1e-5

fig, axes = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
for ax, batch, title in zip(axes, [images, shuffled], ["an image", "its patches, shuffled"]):
    show_image(ax, batch[0] * normalise.std + normalise.mean, title)
plt.show()

# %% [markdown]
# Without positions the two pictures are the same to the model, but for the last digits of a sum in another order.
# Attention is a weighted mean, and a mean has no order.
#
# ## Training
#
# Fourteen hundred images are few, and a transformer knows nothing about images: not that a 7 that is moved by a pixel
# is still a 7. We show it. Every time an image is drawn it is turned, stretched, slanted and moved a little, each time
# in another way.

# %% alt="A digit and eight deformed copies of it: turned, slanted, stretched and moved a little"
fig, axes = plt.subplots(1, 9, figsize=(12, 2.3), layout="constrained")
fig.suptitle("One digit, deformed eight times")
picture = data.images[train[7]]
show_image(axes[0], picture, "original")
for ax, image in zip(axes[1:], deformed(np.stack([picture] * 8), seed=0, step=0)):
    show_image(ax, image)
plt.show()

# %% [markdown]
# The recipe is `ViTTiny`: it trains every weight, starting from random ones. A step takes images and their labels, and
# the loss is the mean cross-entropy as always. The learning rate rises for 20 steps and then falls along half a cosine.

# %% [markdown]
# How many images are right is counted with the largest logit of each row.

# %% [markdown] exercise="accuracy"
# `argmax` over the classes, compared with the labels; the mean of true and false is the fraction.

# %%
N_STEPS, BATCH = 600, 64
recipe = toy.recipes.ViTTiny().realize(config, t_batch=BATCH, seed=0)
adamw = recipe.adamw(weight_decay=0.05)
schedule = make_schedule("cosine", lr=4e-3, steps=N_STEPS, warmup=20, floor=0.1)


def test_logits():
    return recipe.model_copy().forward(normalise(data.images[test]))[0]


losses, tests = [], {0: score(test_logits(), data.labels[test])}
per_epoch = len(train) // BATCH  # full batches
for k in range(N_STEPS):
    epoch, i = divmod(k, per_epoch)
    chosen = train[epoch_order(len(train), seed=0, epoch=epoch)[i * BATCH : (i + 1) * BATCH]]
    batch = normalise(deformed(data.images[chosen], seed=0, step=k))
    hp = adamw.hp_for_step(k, lr=schedule(k))
    losses.append(recipe.step(batch, labels=data.labels[chosen], hp=hp, is_first=k == 0))
    if (k + 1) % 100 == 0:
        tests[k + 1] = score(test_logits(), data.labels[test])

for step, (loss, accuracy) in tests.items():
    print(f"after {step:3} steps: test loss {loss:.3f} nats, {accuracy:.1%} of the test images right")

# %% alt="On the left the training loss and the test loss over 600 steps, the points from 2.6 down to 0.13 close to the line of the training; on the right the share of test images that are right, up to 95.5 percent"
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
left.plot(losses, color=BLUE, alpha=0.25, lw=1)
left.plot(smooth(losses, span=20), color=BLUE, label="training, smoothed")
left.plot(tests.keys(), [loss for loss, _ in tests.values()], "o", ms=8, color=RED, label="test")
left.axhline(np.log(10), color="black", ls="--", lw=1.5, label="uniform guess, ln 10")
left.set(xlabel="step", ylabel="loss (nats per image)", ylim=(0, 3), title="Loss")
left.legend()
right.plot(tests.keys(), [100 * accuracy for _, accuracy in tests.values()], "o-", ms=8, color=RED)
right.axhline(10, color="black", ls="--", lw=1.5)
right.text(N_STEPS, 12, "a guess", ha="right")
right.set(xlabel="step", ylabel="test images right (%)", ylim=(0, 102), title="Accuracy")
plt.show()

# %% [markdown]
# The model is trained on deformed images and tested on plain ones, which are easier: that is why the points need not
# lie above the line.
#
# ## The errors
#
# Which digits are taken for which? Each row of the *confusion matrix* is what the image is, each column what the model
# takes it for. On the diagonal it is right. `toy train vit-tiny` writes the same picture into the directory of a run.

# %% alt="The confusion matrix of the ten digits: nearly all counts are on the diagonal"
logits, labels = test_logits(), data.labels[test]
counts = confusion(logits, labels, n_classes=10)
figure = draw_confusion(counts, data.classes)
figure.set(dpi=70)
display(figure)

# %% [markdown]
# And these are the images it gets wrong, those first of which it is most certain. Some of them we would not dare to
# name ourselves.

# %% alt="The images that are taken for a wrong digit, with what they are, what they are taken for and how sure the model is"
probabilities = softmax(logits)  # (images, n_classes)
guesses = probabilities.argmax(axis=1)
wrong = np.flatnonzero(guesses != labels)
wrong = wrong[np.argsort(-probabilities[wrong].max(axis=1))]

fig, axes = plt.subplots(2, 8, figsize=(12, 4.6), layout="constrained")
fig.suptitle("What it gets wrong, the surest first")
for ax in axes.flat:
    ax.axis("off")
for ax, i in zip(axes.flat, wrong):
    ax.axis("on")
    show_image(ax, data.images[test[i]], f"is {labels[i]}\n{guesses[i]}? {probabilities[i].max():.0%}")
plt.show()

second = probabilities[wrong].argsort(axis=1)[:, -2]
right = guesses == labels
print(f"{len(wrong)} of {len(test)} images wrong")
print(f"in {(second == labels[wrong]).sum()} of them the right class is the second choice")
print(f"mean probability of the guess, where it is right: {probabilities[right].max(axis=1).mean():.0%}")
print(f"mean probability of the guess, where it is wrong: {probabilities[wrong].max(axis=1).mean():.0%}")

# %% [markdown]
# The model does not only guess: it also says how sure it is, and where it is wrong it is less sure on the average.
#
# ## What the class token attends to
#
# The prediction is read from one row, and that row has no pixels of its own. All it knows it has from attention. So we
# ask: how much probability does the class token give to each patch, layer by layer? The textbook operations keep these
# probabilities in their cache. We take the mean over the four heads and lay it over the image.

# %% alt="Ten digits, and for each of three layers the attention of the class token to the 16 patches, in orange"
trained = model_from(config, recipe.parameters(), backend="numpy")
_, (_, cache) = trained.forward(normalise(data.images[test]))
maps = np.stack(
    [block.attention.probabilities.reshape(-1, config.n_heads, T, T) for block in cache.blocks],
    axis=1,
)  # (images, n_layers, n_heads, T queries, T keys)
from_class = maps[:, :, :, 0]  # (images, n_layers, n_heads, T keys): the query is the class token
to_itself, to_patches = from_class[..., 0], from_class[..., 1:]
print("maps", maps.shape)
for layer in range(config.n_layers):
    print(f"layer {layer}: the class token gives itself {to_itself[:, layer].mean():.1%}")


def show_patches(ax, image, values, title="", highest=None):
    """One number a patch, as a shade of orange over the image."""
    show_image(ax, image, title, black=2.5)  # ink is light grey
    grid = np.kron(values.reshape(side, side), np.ones((p, p)))
    strength = np.clip(grid / (values.max() if highest is None else highest), 0, 1)
    ax.imshow(np.ones_like(grid), cmap="Oranges", vmin=0, vmax=1.6, alpha=0.9 * strength)


shown = [np.flatnonzero((labels == digit) & right)[0] for digit in range(10)]
fig, axes = plt.subplots(4, 10, figsize=(12, 5.8), layout="constrained")
fig.suptitle("What the class token attends to")
for column, i in zip(axes.T, shown):
    show_image(column[0], data.images[test[i]])
    for layer, ax in enumerate(column[1:]):
        show_patches(ax, data.images[test[i]], to_patches[i, layer].mean(axis=0), highest=0.25)
for ax, name in zip(axes[:, 0], ["image", "layer 0", "layer 1", "layer 2"]):
    ax.set_ylabel(name)
plt.show()

# %% [markdown]
# Full orange is a quarter of all attention or more; sixteen patches alike would get a sixteenth each. To itself the
# class token gives less than that. Many of the orange patches lie on ink, but not all: some are paper, and that there
# is no ink says something too.
#
# The mean hides that the heads have different tastes. For every head: how does its attention to a patch go together
# with the ink in it? A correlation of 1 would mean that it follows the ink alone, 0 that it does not care.

# %% alt="Correlation of the attention of the class token with the ink, for four heads in three layers, from about -0.5 to 0.6"
ink = data.images[test].reshape(-1, side, p, side, p).mean(axis=(2, 4)).reshape(-1, P)  # (images, P)


def correlation(a, b):
    """Over the last axis."""
    a, b = (v - v.mean(axis=-1, keepdims=True) for v in (a, b))
    return (a * b).sum(axis=-1) / np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))


with_ink = correlation(to_patches, ink[:, None, None]).mean(axis=0)  # (n_layers, n_heads)
fig, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
image = ax.imshow(with_ink, cmap="PuOr_r", vmin=-1, vmax=1)
for (layer, head), value in np.ndenumerate(with_ink):
    ax.text(head, layer, f"{value:.2f}", ha="center", va="center")
ax.set(xlabel="head", ylabel="layer", title="attention of the class token and ink")
ax.set(xticks=range(config.n_heads), yticks=range(config.n_layers))
fig.colorbar(image, ax=ax, label="correlation")
plt.show()


# %% [markdown]
# ### Looking is not needing
#
# A patch that is looked at need not matter, and one that is hardly looked at may have told its neighbours all they
# need. What matters can be measured: cover one patch with paper and see how much worse the model predicts the right
# class. That is 16 times the whole test part.


# %% alt="Ten digits, above with the patches that are looked at, below with those that are needed: the rows differ"
def losses_of(batch):
    """The loss of every test image."""
    p_right = softmax(trained.forward(normalise(batch))[0])[np.arange(len(labels)), labels]
    return -np.log(p_right)


harm = np.empty((len(test), P))  # nats
plain = losses_of(data.images[test])
for n in range(P):
    covered = data.images[test].copy()
    row, column = divmod(n, side)
    covered[:, row * p : (row + 1) * p, column * p : (column + 1) * p] = 0
    harm[:, n] = losses_of(covered) - plain

attention = to_patches.mean(axis=(1, 2))  # (images, P): the mean over layers and heads
fig, axes = plt.subplots(2, 10, figsize=(12, 3.3), layout="constrained")
fig.suptitle("Attention, and what covering a patch does")
for column, i in zip(axes.T, shown):
    show_patches(column[0], data.images[test[i]], attention[i])
    show_patches(column[1], data.images[test[i]], np.maximum(harm[i], 0))
axes[0, 0].set_ylabel("looked at")
axes[1, 0].set_ylabel("needed")
plt.show()

most, least = attention.argmax(axis=1), attention.argmin(axis=1)
rows = np.arange(len(test))
print(f"the patch that is looked at most covered:  loss +{harm[rows, most].mean():.3f} nats")
print(f"the patch that is looked at least covered: loss +{harm[rows, least].mean():.3f} nats")
print(f"correlation of attention and harm: {correlation(attention, harm).mean():.2f}")
print(f"correlation of ink and harm:       {correlation(ink, harm).mean():.2f}")


# %% [markdown]
# On the average, the patches that are looked at most are needed more than those that are looked at least. But the two
# rows are far from equal, and the correlation says so as well. An attention map is a fact about the model, not an
# explanation of what it says.
#
# ## What the positions have learned
#
# The position rows started as random numbers, and nobody told the model which patches are neighbours. For each of the
# 16 places: how similar is its row to all others (the cosine of the angle between them)?


# %% alt="For each of 16 places the similarity of its position row to all others: on the average higher to the left and right of the place itself than farther away"
def similarity(positions):
    """(T, D) -> (P, P) cosines, without the class token's row, and without what all places share."""
    rows = positions[1:] - positions[1:].mean(axis=0)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


learned = similarity(trained.parameters.position_embd.weight)
at_first = similarity(w.position_embd.weight)

fig, axes = plt.subplots(side, side, figsize=(6.8, 6), layout="constrained")
fig.suptitle("How alike is each place's row to the others?", fontsize=14)
for n, ax in enumerate(axes.flat):
    image = ax.imshow(learned[n].reshape(side, side), cmap="PuOr_r", vmin=-0.6, vmax=0.6)
    ax.plot(*divmod(n, side)[::-1], "k.", ms=7)
    ax.set(xticks=[], yticks=[])
fig.supxlabel("column of the patch")
fig.supylabel("row of the patch")
fig.colorbar(image, ax=axes, label="similarity (0.6 and above: dark)")
plt.show()

row, column = np.divmod(np.arange(P), side)  # of a patch
up, along = abs(row[:, None] - row), abs(column[:, None] - column)
PAIRS = {
    "side by side": (up == 0) & (along == 1),
    "one above the other": (up == 1) & (along == 0),
    "corner to corner": (up == 1) & (along == 1),
    "farther": np.maximum(up, along) > 1,
}
for name, pairs in PAIRS.items():
    print(f"{name:20} {learned[pairs].mean():5.2f}   (at first {at_first[pairs].mean():5.2f})")
assert learned[PAIRS["side by side"]].mean() > learned[PAIRS["farther"]].mean() + 0.1

# %% [markdown]
# The dot marks the place itself, and orange is what is like it. At first no place was like another. Now those that lie
# side by side are on the average more alike than others: a stroke that is in one of them is often in the other too, so
# the model found this by the images alone. (The original paper shows the same picture for 7 x 7 patches and a large
# model, where it is much clearer.)
#
# ## Saved, loaded, and from the command line
#
# `save` writes the model into a file, with the names of the classes and the normalisation. `toy.load` opens it, and
# takes images as they are, from 0 to 1.

# %%
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "digits.safetensors")
    recipe.save(path, classes=data.classes, normalisation=normalise)
    plt.imsave(Path(folder, "some digit.png"), data.images[test[0], ..., 0], cmap="gray", vmin=0, vmax=1)
    with toy.load(path) as loaded:
        again = loaded.logits(data.images[test])
        (prediction,) = loaded.predict(Path(folder, "some digit.png"))
likeliest = prediction.probabilities[prediction.name]
print("largest difference of a logit:", np.abs(again - logits).max())
print(f"the image in the file is a {prediction.name} ({likeliest:.1%}); its label says {labels[0]}")

# %% [markdown]
# In a terminal all of this is two commands. The first trains on the digits, with a test part and a confusion picture;
# `--data` names a folder of your own, with one subfolder of images for each class. The second says what is on an image.
#
#     toy train vit-tiny --out runs/digits
#     toy train vit-tiny --data my_pictures --out runs/mine
#     toy predict runs/mine photo.png
#
# ## Exercises
#
# 1. `toy train vit-tiny` cuts the digits into patches of 4 x 4, here they are 2 x 2. Try 4 and 1. How many tokens are
#    there, how many numbers has a patch, and how long does a step take? Which size is best after the same number of
#    steps, and after the same time?
# 2. Leave out `deformed`. Compare the training loss with the test loss at the end, with and without. What does the
#    model learn by heart?
# 3. Switch one head off: set its `d_head` columns of `blk.0.attn_output.weight` (or of another layer) in `trained` to
#    zero, and count the test images that are right. Which head is needed most? Is it the one that follows the ink?
