# %% [markdown]
# # 1. The forward pass by hand
#
# A language model is a function: token ids go in, and for every position a row of numbers comes out, one number
# for each token of the vocabulary. These numbers are called *logits*, and a softmax turns them into the
# probabilities of the next token.
#
# In this notebook you compute that function yourself, one operation at a time, and watch the shape of every array.
# At the end your logits and those of `toy.TransformerLM` are the same, bit for bit.
#
# Letters in the shapes: `B` sequences in a batch, `T` tokens in a sequence, `N = B*T` rows, `D` the width of the model,
# `F` the hidden width of the MLP, `V` the size of the vocabulary.
#
# **You will be able to**
#
# * follow the shape of every array from the ids to the loss;
# * write embedding, norms, linear layers, softmax, attention, GELU and cross-entropy, and check them;
# * say what the causal mask promises, and show that it holds.
#
# **Before**: [lesson 0](00_from_counting_to_training.ipynb), or what a softmax, a logit and a loss are; matrix products
# in numpy. **Time**: 45 minutes to read, 2 hours with the ten exercises.

# %%
import matplotlib.pyplot as plt
import numpy as np

import toy
from toy.data import CharTokenizer
from toy.ops import reference as ops  # the textbook operations: plain numpy, one small function each
from toy.plots import lesson_style

lesson_style()
np.set_printoptions(precision=3, suppress=True, linewidth=110)

# %% [markdown]
# ## Tokens
#
# A model does not read letters, it reads whole numbers. The simplest tokenizer gives one number to each distinct
# character. Our text has ten distinct characters, so the vocabulary size is `V = 10`.

# %%
text = "the cat sat on the mat"
tokenizer = CharTokenizer.from_text(text)
ids = tokenizer.encode(text)

print("vocabulary:", list(enumerate(tokenizer.characters)))
print("text:      ", text)
print("ids:       ", ids)
print("decoded:   ", tokenizer.decode(ids))

# %% [markdown]
# The task is always the same: from the tokens so far, predict the next one. So the labels are the inputs moved by
# one place, and one text of 22 characters is 21 exercises at once.

# %%
token_ids = ids[:-1]  # (T,)
labels = ids[1:]  # (T,)
T = len(token_ids)

for t in range(5):
    print(f"position {t}: after {text[: t + 1]!r:8} comes {text[t + 1]!r}")
print("...")
print(f"position {T - 1}: after {text[:T]!r} comes {text[T]!r}")

# %% [markdown]
# ## The model
#
# Here is all that happens in it, with the shape of every array. The parts come one after the other below; look back at
# the picture, to see where you are.
#
# ![The architecture of the readable transformer, with the shape of every array](attachment:architecture.svg)
#
# Ours is tiny, so that every array can be printed. Its weights are random: nothing has been learned yet.
# (`init_scale=10` makes them ten times larger than one would choose for training. With small weights an untrained
# model treats all tokens nearly alike, and there would be nothing to see in the pictures below.)
#
# We pass `ops`, the table of textbook operations, so that the model computes with the same functions as we do.

# %%
V, D, F, n_heads, n_layers, context = tokenizer.vocab_size, 16, 32, 2, 2, 24
d_head = D // n_heads

model = toy.TransformerLM(V, D, F, n_heads, n_layers, context, seed=0, init_scale=10, ops=ops)

for name, weight in model.parameters.items():
    print(f"{name:22} {weight.shape!s:10} {weight.size:5}")
print(f"{'sum':22} {'':10} {model.parameters.n_parameters:5}")

# %% [markdown]
# Weight matrices have the shape `(out, in)`, so a linear layer is `y = x @ W.T`. There are two blocks with the same
# eight parameters each.
#
# ## Embedding
#
# The table `token_embed` has one row of `D` numbers per token of the vocabulary. To embed a token is to look up its
# row. Attention alone does not know which token came first, so a second table adds one row per *position*.

# %% [markdown] exercise="embedding"
# A look-up is indexing: an array of ids as the index gives one row for each.

# %%
p = model.parameters
positions = np.arange(T)

token, _ = ops.embedding(token_ids, p.token_embed)  # (T,) -> (T, D)
position, _ = ops.embedding(positions, p.pos_embed)  # (T,) -> (T, D)
x = ops.add(token, position)  # (T, D)

print("token_ids", token_ids.shape, " token", token.shape, " position", position.shape, " x", x.shape)
print("a look-up is indexing:", np.array_equal(token, p.token_embed[token_ids]))


# %% [markdown]
# Equal characters have equal token rows: look for the rows of the spaces. After the sum they differ, because their
# positions do. This array `x` is called the *residual stream*: every following layer reads it and adds to it.


# %% alt="Three matrices of 21 characters by 16 features, token rows plus position rows gives x; the rows of equal characters are equal in the first one and differ in the sum"
def show_matrix(ax, matrix, title, limit, xlabel="feature (of D)"):
    image = ax.imshow(matrix, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    ax.set(title=title, xlabel=xlabel)
    return image


def label_characters(axis, characters):
    axis.set_ticks(range(len(characters)), ["␣" if c == " " else c for c in characters])
    axis.set_tick_params(length=0)


fig, axes = plt.subplots(1, 3, figsize=(11, 5.5), layout="constrained", sharey=True)
for ax, (matrix, title) in zip(axes, [(token, "token"), (position, "+ position"), (x, "= x")]):
    image = show_matrix(ax, matrix, title, limit=0.8)
    label_characters(ax.yaxis, text[:T])
axes[0].set_ylabel("input character (of T)")
fig.colorbar(image, ax=axes, label="value")
plt.show()

# %% [markdown]
# ## A block, op by op
#
# A block has two halves. The first, attention, moves information between positions. The second, the MLP, works on each
# position alone. Both start with a norm and end by adding their result to the residual stream.
#
# ### RMSNorm
#
# $$y = \gamma \odot \frac{x}{\mathrm{rms}(x)}, \qquad \mathrm{rms}(x) = \sqrt{\tfrac{1}{D}\textstyle\sum_i x_i^2 + \varepsilon}$$
#
# Each row is divided by its own size, so that what follows always sees numbers of size 1.

# %% [markdown] exercise="rms_norm"
# The mean of the squares runs over the features, `axis=-1`; with `keepdims=True` it has shape `(N, 1)` and divides row
# by row. `eps` is added under the root.

# %%
block = p.blocks[0]
h, _ = ops.rms_norm(x, block.norm1_gamma, 1e-5)  # (T, D) -> (T, D)


def rms(a):
    return np.sqrt((a**2).mean(axis=1))


by_formula = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * block.norm1_gamma
print("rms of the first rows before:", rms(x)[:6])
print("rms of the first rows after: ", rms(h)[:6])
print("largest difference from the formula:", np.abs(h - by_formula).max())

# %% [markdown]
# ### LayerNorm
#
# The older norm, in GPT-2 and in the vision transformer of lesson 9, also moves each row so that its mean is zero, and
# has a second parameter, $\beta$:
#
# $$y = \gamma \odot \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta, \qquad \mu = \tfrac1D \textstyle\sum_i x_i, \qquad \sigma^2 = \tfrac1D \textstyle\sum_i (x_i - \mu)^2$$
#
# Our model does not use it.

# %% [markdown] exercise="layer_norm"
# The variance is the mean of the squared deviations, divided by D and not by D - 1. It is a statistic of each row, over
# `axis=-1`.

# %% [markdown]
# ### Queries, keys and values
#
# Three linear layers read the same `h`. Each position gets a *query* (what am I looking for?), a *key* (what do I have
# to offer?) and a *value* (what do I hand over if I am chosen?).

# %% [markdown] exercise="linear"
# The weight has the shape `(out, in)`, so its transpose is what `x` is multiplied with. A bias of shape `(out,)` is
# added to every row by itself.

# %%
q, _ = ops.linear(h, block.w_q)  # (T, D) @ (D, D) -> (T, D)
k, _ = ops.linear(h, block.w_k)
v, _ = ops.linear(h, block.w_v)
print("q", q.shape, " k", k.shape, " v", v.shape)


# %% [markdown]
# The columns are then divided among the heads: head 0 owns the first `d_head` columns, head 1 the next. Every head
# does its own attention, and none sees the columns of another.


# %% [markdown] exercise="split_heads"
# First split the rows into `(batch, T)` and the columns into `(n_heads, d_head)` with one `reshape`, then bring the
# axis of the heads to its place with `transpose`. A `reshape` alone would mix tokens and heads.


# %%
def to_heads(a):
    """(T, n_heads * d_head) -> (n_heads, T, d_head)"""
    return a.reshape(T, n_heads, d_head).transpose(1, 0, 2)


q_heads, k_heads, v_heads = to_heads(q), to_heads(k), to_heads(v)
print("one row of T per head:", q_heads.shape)

# %% [markdown]
# ### Scores, mask and softmax
#
# $$\text{scores} = \frac{q\,k^\top}{\sqrt{d_\text{head}}}, \qquad \text{probabilities} = \mathrm{softmax}(\text{scores} + \text{mask})$$
#
# The score of a pair of positions is the dot product of one's query with the other's key. The sum has `d_head` terms,
# and the division by $\sqrt{d_\text{head}}$ keeps its size independent of how many.

# %% [markdown] exercise="softmax"
# Subtract the largest score of each row first: it changes nothing, and `exp` cannot overflow.

# %%
scores = q_heads @ k_heads.transpose(0, 2, 1) * np.float32(d_head**-0.5)  # (heads, T, d_head) @ (heads, d_head, T)
print("scores", scores.shape, "= (n_heads, T queries, T keys)")
print("mean", scores.mean().round(3), " standard deviation", scores.std().round(3))

# %% [markdown]
# The label of a position is the character that comes next. If a position could look to its right, it would read its
# own label and learn nothing. The *causal mask* sets every such score to minus infinity, and the softmax turns that
# into a probability of exactly zero.

# %%
future = np.triu(np.ones((T, T), dtype=bool), k=1)  # True where key > query
masked = np.where(future, -np.inf, scores)


def softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))  # subtracting the maximum changes nothing, but exp cannot overflow
    return e / e.sum(axis=-1, keepdims=True)


probabilities = softmax(masked)  # (n_heads, T, T)
print("upper left corner of head 0:")
print(probabilities[0, :5, :5])
print(
    "each row sums to one:",
    probabilities.sum(axis=-1).round(6).min(),
    "to",
    probabilities.sum(axis=-1).round(6).max(),
)


# %% [markdown]
# Here are these probabilities for both heads, first without and then with the mask. Each row is one query: it
# distributes the probability 1 over the keys that it may see. Masked pairs are left white: the first position sees only
# itself.


# %% alt="Attention probabilities of two heads, above without a mask, all pairs dark with a few lighter ones, below causal: a triangle, light in its first rows, where there are few keys to share the probability"
def show_attention(ax, matrix, title):
    image = ax.imshow(matrix, cmap="viridis", vmin=0, vmax=0.5)
    ax.set(title=title, xlabel="key: looked at", ylabel="query: looking")
    label_characters(ax.xaxis, text[:T])
    label_characters(ax.yaxis, text[:T])
    return image


fig, axes = plt.subplots(2, 2, figsize=(11, 9.8), layout="constrained")
causal = np.where(future, np.nan, probabilities)  # not a number: not drawn
for row, (name, matrix) in enumerate([("no mask", softmax(scores)), ("causal", causal)]):
    for head in range(n_heads):
        image = show_attention(axes[row, head], matrix[head], f"{name}, head {head}")
fig.colorbar(image, ax=axes, label="probability (0.5 and above: yellow)", shrink=0.5)
plt.show()

# %% [markdown]
# Now each position takes the mean of the values it may see, weighted with these probabilities. The heads are put back
# side by side, and the result has the shape that `q` had. The library does all of this in one op.

# %% [markdown] exercise="attention"
# Three lines: scores, softmax over the keys (the last axis), and the probabilities times the values. The scale is the
# root of the width of a head.

# %% [markdown] exercise="causal_attention"
# As before, with one step between: the scores of keys that come after the query become minus infinity.
# `np.triu(..., k=1)` marks them.

# %%
a_heads = probabilities @ v_heads  # (heads, T, T) @ (heads, T, d_head) -> (heads, T, d_head)
by_hand = a_heads.transpose(1, 0, 2).reshape(T, D)  # (T, D)

a, attention_cache = ops.attention(q, k, v, batch=1, n_heads=n_heads, causal=True)  # (T, D)
print("a", a.shape)
print("largest difference from by hand:", np.abs(a - by_hand).max())

# %% [markdown]
# A last linear layer, `w_o`, mixes the heads and writes the result back into the residual stream. The addition is
# important: a block does not replace `x`, it changes it a little.

# %%
a, _ = ops.linear(a, block.w_o)  # (T, D)
x_before = x
x = ops.add(x, a)  # (T, D)
print(
    "x",
    x.shape,
    " mean rms before:",
    rms(x_before).mean().round(3),
    " after:",
    rms(x).mean().round(3),
)

# %% [markdown]
# ### The MLP
#
# Two linear layers with a bend between them: `D -> F`, GELU, `F -> D`. Without the bend, the two matrices could be
# multiplied into one, and nothing would be gained.
#
# $$\mathrm{gelu}(x) = \tfrac{x}{2}\left(1 + \tanh\!\left(\sqrt{2/\pi}\,(x + 0.044715\,x^3)\right)\right)$$

# %% [markdown] exercise="gelu"
# Write the formula from left to right. The cube stands inside of the root's bracket: `x + 0.044715 * x**3`.

# %% alt="GELU and ReLU over the input from -4 to 4: GELU follows ReLU, but dips a little below zero between -3 and 0 and has no corner"
s = np.linspace(-4, 4, 200)
fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.plot(s, ops.gelu(s)[0], label="GELU (tanh form)")
ax.plot(s, np.maximum(s, 0), "--", label="ReLU, for comparison")
ax.set(xlabel="input x", ylabel="output", title="The bend in the MLP")
ax.legend()
plt.show()

# %% [markdown]
# Here is the MLP on our rows. Each row is treated alone: in this half of the block no position looks at another one.

# %%
h, _ = ops.rms_norm(x, block.norm2_gamma, 1e-5)  # (T, D)
f, _ = ops.linear(h, block.w_ff1)  # (T, D) -> (T, F)
print("hidden layer", f.shape)
f, _ = ops.gelu(f)  # (T, F)
f, _ = ops.linear(f, block.w_ff2)  # (T, F) -> (T, D)
x = ops.add(x, f)  # (T, D)
print("x after block 0", x.shape)


# %% [markdown]
# ## The whole model
#
# A deeper model is the same block again, with other weights. We put the lines above into a function and run it for
# every block; the code in `toy/models/transformer.py` is nearly the same.


# %%
def block_by_hand(x, block):
    """(T, D) -> (T, D)"""
    h, _ = ops.rms_norm(x, block.norm1_gamma, 1e-5)
    q, _ = ops.linear(h, block.w_q)
    k, _ = ops.linear(h, block.w_k)
    v, _ = ops.linear(h, block.w_v)
    a, _ = ops.attention(q, k, v, batch=1, n_heads=n_heads, causal=True)
    a, _ = ops.linear(a, block.w_o)
    x = ops.add(x, a)
    h, _ = ops.rms_norm(x, block.norm2_gamma, 1e-5)
    f, _ = ops.linear(h, block.w_ff1)
    f, _ = ops.gelu(f)
    f, _ = ops.linear(f, block.w_ff2)
    return ops.add(x, f)


# %% [markdown]
# After the last block comes one more norm. Then each row is compared with every row of the embedding table by a dot
# product: the same table `token_embed` that turned ids into rows now turns rows into scores. This is called *weight
# tying*.


# %%
def forward_by_hand(token_ids):
    """(T,) -> logits (T, V)"""
    token, _ = ops.embedding(token_ids, p.token_embed)
    position, _ = ops.embedding(np.arange(len(token_ids)), p.pos_embed)
    x = ops.add(token, position)
    for block in p.blocks:
        x = block_by_hand(x, block)
    x, _ = ops.rms_norm(x, p.norm_final_gamma, 1e-5)
    logits, _ = ops.linear(x, p.token_embed)  # (T, D) @ (D, V) -> (T, V)
    return logits


logits = forward_by_hand(token_ids)
logits_of_model, cache = model.forward(token_ids)
print("logits", logits.shape)
print("bit for bit equal to model.forward:", np.array_equal(logits, logits_of_model))

# %% [markdown]
# `model.forward` also returns a `cache`: every intermediate array that the backward pass will need. The attention
# probabilities are among them, and they are the ones that we computed by hand.

# %%
_, model_cache = cache
from_cache = model_cache.blocks[0].attention.probabilities.reshape(n_heads, T, T)
print("largest difference:", np.abs(from_cache - probabilities).max())

# %% [markdown]
# ## What the causal mask promises
#
# If position `t` sees only itself and what is to its left, then a change of the last character can change only the last row of the
# logits. We change one character in the middle and look at which rows move. Those before it must not move at all, not
# even by a rounding error.

# %% alt="Largest change of a logit at each position: zero at the eight positions before the changed character, about 1 at the changed one, 0.05 to 0.2 after it"
changed_ids = token_ids.copy()
changed_at = 8
changed_ids[changed_at] = tokenizer.encode("h")[0]  # "the cat sat ..." becomes "the cat hat ..."
difference = np.abs(forward_by_hand(changed_ids) - logits).max(axis=1)  # (T,)

fig, ax = plt.subplots(figsize=(10, 3.6), layout="constrained")
ax.bar(range(T), difference, color=["#0072B2" if t < changed_at else "#D55E00" for t in range(T)])
label_characters(ax.xaxis, tokenizer.decode(changed_ids))
ax.set(xlabel="input character (position 8 changed from s to h)", ylabel="largest change of a logit")
ax.set_title("Earlier positions do not notice")
plt.show()
print("rows before the change are untouched:", np.all(difference[:changed_at] == 0))

# %% [markdown]
# ## From logits to a loss
#
# The softmax of a row of logits is the model's belief about the next character. The loss of that position is
# $-\ln p$ of the character that really came: 0 if the model was sure and right, large if it was sure and wrong.
# The loss of the batch is the mean over all positions, and its unit is the *nat*.

# %% [markdown] exercise="cross_entropy"
# The logarithm of a softmax is `shifted - log(sum(exp(shifted)))`, with the largest logit of each row subtracted. Take
# it at the label of each row, and the mean with a minus.

# %%
beliefs = softmax(logits)  # (T, V)
losses = -np.log(beliefs[np.arange(T), labels])  # (T,)
loss, _ = ops.cross_entropy(logits, labels)
print(f"mean by hand {losses.mean():.6f}, ops.cross_entropy {loss:.6f}")

# %% [markdown]
# What should an untrained model give? If it knows nothing, each of the `V` characters has probability $1/V$, and the
# loss is $-\ln(1/V) = \ln V$. This is the first number to check in every training run.
#
# Our model has weights that are much too large. It has strong opinions without any reason, and so it is *worse* than a
# uniform guess. With the usual small weights the loss of the same model lies close to $\ln V$.

# %%
usual = toy.TransformerLM(V, D, F, n_heads, n_layers, context, seed=0, ops=ops)
usual_loss, _ = ops.cross_entropy(usual.forward(token_ids)[0], labels)
print(f"uniform guess   ln({V}) = {np.log(V):.3f} nats")
print(f"usual weights           {usual_loss:.3f} nats")
print(f"10 times larger         {loss:.3f} nats")

# %% [markdown]
# On the left one row of probabilities, on the right the loss of every position. With random weights some bars are on
# the good side of the uniform guess and some on the bad side, without any pattern.

# %% alt="On the left the probabilities of the next character after 'the c' as ten bars around the uniform 0.1; on the right the loss at each position, half of the bars above the uniform ln V and half below"
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")

at = 4
left.bar(range(V), beliefs[at], color=["#D55E00" if c == labels[at] else "#0072B2" for c in range(V)])
left.axhline(1 / V, color="black", ls="--", lw=1.5, label="uniform, 1/V")
label_characters(left.xaxis, tokenizer.characters)
left.set(
    xlabel="next character",
    ylabel="probability",
    title=f"After {text[: at + 1]!r} (right answer: orange)",
)
left.legend()

right.bar(range(T), losses)
right.axhline(np.log(V), color="black", ls="--", lw=1.5, label="uniform, ln V")
label_characters(right.xaxis, text[:T])
right.set(xlabel="input character", ylabel="loss (nats)", title="Loss at every position")
right.legend()
plt.show()

# %% [markdown]
# Training means: change the weights so that these bars become smaller. That needs the gradient of the loss with
# respect to every weight, and it is what the next notebook computes.
#
# ## Generating, and the idea of a key/value cache
#
# To write text, the model reads what is there, a character is drawn from the last row of probabilities, it is appended,
# and the model reads again. But the causal mask says that nothing appended on the right can change the rows on the
# left. Their keys and values could simply be kept. That is the key/value cache: each new token costs one row instead of
# the whole sequence.

# %%
kv_cache = model.new_kv_cache()
for t in range(T):
    row, _ = model.forward(token_ids[t : t + 1], kv_cache=kv_cache)  # (1, V): one token in, one row out
    difference = np.abs(row[0] - logits[t]).max()
    if t in (0, 1, T - 1):
        keys, values = kv_cache.layers[0]
        print(
            f"token {t:2}: keys kept per layer {keys[: t + 1].shape}, difference from the full forward {difference:.0e}"
        )

# %% [markdown]
# The logits agree up to rounding: sums of a product with one row may be added up in another order than those of a
# product with many rows. The saving grows with the length of the text.

# %% alt="Rows computed to generate up to 200 tokens: with a key/value cache 200, reading everything again 20100, on a logarithmic axis"
lengths = np.arange(1, 201)
fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
ax.plot(lengths, lengths * (lengths + 1) / 2, label="read everything again: T(T+1)/2")
ax.plot(lengths, lengths, "--", label="key/value cache: T")
ax.set(
    xlabel="tokens generated, T",
    ylabel="rows computed",
    yscale="log",
    title="Work to generate T tokens",
)
ax.legend()
plt.show()

# %% [markdown]
# `model.generate` works this way. What the untrained model writes is noise; notebook 4 trains one and asks again.

# %%
prompt = tokenizer.encode("the ")
print(repr(tokenizer.decode(model.generate(prompt, 40, seed=0))))

# %% [markdown]
# ## Exercises
#
# 1. Remove the position embedding from `forward_by_hand` (leave out the addition). Swap two characters at the beginning
#    of the text, for example `"the"` and `"hte"`. Does the last row of the logits still change? Why is it not exactly
#    zero when there are two blocks, and what do you expect with one?
# 2. The usual weights gave a loss a little *above* $\ln V$, not below. Look at which character the untrained model
#    finds most likely at each position (`logits.argmax(axis=1)`) and compare with its input. What does weight tying
#    have to do with it?
# 3. How many parameters would the model have with `V = 50257`, `D = 768`, `F = 3072`, 12 layers and a context of 1024?
#    Which share of them is the embedding?
