"""Lesson 4: training on text: windows, the learning rate, what a loss means, and how a token is drawn."""

import numpy as np

from toy.checks.exercises.engine import Mistake, Task


def _text(rng):
    for n, batch, context in ((20, 3, 4), (9, 1, 5), (6, 4, 1)):
        yield {"ids": rng.permutation(50)[:n], "starts": rng.integers(0, n - context, batch), "context": context}


def _steps(rng):
    for step, lr, steps, warmup, floor in (
        (0, 0.1, 20, 4, 0.1), (3, 0.1, 20, 4, 0.1), (4, 0.3, 20, 4, 0.1), (11, 0.1, 20, 4, 0.2), (19, 0.1, 20, 4, 0.1),
        (25, 0.1, 20, 4, 0.1), (5, 1.0, 12, 0, 0.0),
    ):  # fmt: skip
        yield {"step": step, "lr": lr, "steps": steps, "warmup": warmup, "floor": floor}


def _losses(rng):
    for n in (5, 1, 12):
        yield {"losses": rng.uniform(0.1, 3, n)}


def _losses_and_bytes(rng):
    for n, n_bytes in ((5, 19), (1, 3), (12, 40)):
        yield {"losses": rng.uniform(0.1, 3, n), "n_bytes": n_bytes}


def _top_k(rng):
    for vocab, k in ((7, 3), (5, 1), (4, 4), (6, 9)):
        yield {"logits": rng.permutation(np.arange(vocab) / 2 + rng.uniform(0, 0.3, vocab)) - 1, "k": k}


def _top_p(rng):
    for vocab, p in ((7, 0.8), (5, 0.1), (4, 1.0), (6, 0.5)):
        yield {"logits": rng.permutation(np.arange(vocab) / 2 + rng.uniform(0, 0.3, vocab)), "p": p}


TASKS = (
    Task(
        name="batch_windows",
        lesson=4,
        statement=(
            "Cut a batch out of a text: for each start a window of `context` tokens, and as labels the same window "
            "moved by one, because the label of a token is the one that follows. ids int (N,), starts int (B,); "
            "token_ids and labels are (B, T) with T = context."
        ),
        source='''
def batch_windows(ids, starts, context):
    """ids: int (N,), starts: int (B,) -> token_ids, labels, int (B, T)."""
    places = starts[:, None] + np.arange(context)  #? (B, T)
    token_ids = ids[places]  #?
    labels = ids[places + 1]  #?
    return token_ids, labels
''',
        cases=_text,
        returns=("token_ids", "labels"),
        mistakes=(
            Mistake(
                "ids[places + 1]", "ids[places]",
                "The labels are the inputs themselves: the label of a token is the *next* one, places + 1.",
            ),
            Mistake(
                "ids[places + 1]", "ids[places - 1]",
                "The labels are the tokens before: the next one is to be predicted, places + 1.",
            ),
            Mistake(
                "ids[places + 1]", "np.roll(token_ids, -1, axis=1)",
                "The last label of a window is its first token: moving inside of the window wraps around. Read "
                "ids[places + 1].",
            ),
            Mistake(
                "return token_ids, labels", "return labels, token_ids",
                "Inputs and labels are exchanged: the inputs are the earlier tokens.",
            ),
            Mistake(
                "np.arange(context)", "np.arange(1, context + 1)",
                "The windows begin one token late: the first is ids[start].",
            ),
        ),
    ),
    Task(
        name="learning_rate",
        lesson=4,
        statement=(
            "The learning rate of a step, counted from 0: during the first `warmup` steps it is lr * (step + 1) / "
            "(warmup + 1); then half a cosine goes from lr at step `warmup` down to floor * lr at step steps - 1, where"
            " it stays."
        ),
        source='''
def learning_rate(step, lr, steps, warmup, floor):
    """Whole numbers step, steps, warmup; lr and floor: numbers, floor in [0, 1] -> a number."""
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)  #?
    progress = min(1.0, (step - warmup) / (steps - 1 - warmup))  #? 0 at the peak, 1 at the end
    return lr * (floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * progress)))  #?
''',
        cases=_steps,
        returns=("rate",),
        mistakes=(
            Mistake(
                "(step + 1) / (warmup + 1)", "step / warmup",
                "The warm-up begins with a rate of 0, a wasted step: (step + 1) / (warmup + 1).",
            ),
            Mistake(
                "(floor + (1 - floor) * 0.5", "(0.5",
                "The floor is missing: the cosine ends at floor * lr, not at 0.",
            ),
            Mistake(
                "(step - warmup) / (steps - 1 - warmup)", "step / (steps - 1)",
                "The cosine begins at step 0: its progress is counted from the end of the warm-up.",
            ),
            Mistake(
                "min(1.0, (step - warmup) / (steps - 1 - warmup))", "(step - warmup) / (steps - 1 - warmup)",
                "After the last step the rate rises again: the progress is at most 1.",
            ),
            Mistake(
                "0.5 * (1 + np.cos(np.pi * progress))", "np.cos(np.pi * progress)",
                "A cosine alone falls to -1: half a cosine is 0.5 * (1 + cos).",
            ),
            Mistake(
                "steps - 1 - warmup", "steps - warmup",
                "The floor is reached one step late: the last step is steps - 1, counted from 0.",
            ),
        ),
    ),
    Task(
        name="perplexity",
        lesson=4,
        statement="The perplexity of a text: exp of the mean loss of its tokens. losses: (N,) in nats; a number.",
        source='''
def perplexity(losses):
    """losses: (N,) in nats -> a number of at least 1."""
    return np.exp(np.mean(losses))  #?
''',
        cases=_losses,
        returns=("perplexity",),
        mistakes=(
            Mistake(
                "np.exp(np.mean(losses))", "np.mean(np.exp(losses))",
                "The mean is taken of the exponentials, where one bad token outweighs all: first the mean, then exp.",
            ),
            Mistake(
                "np.exp(np.mean(losses))", "2 ** np.mean(losses)",
                "2 to the power is for losses in bits: these are nats, take exp.",
            ),
            Mistake(
                "np.mean(losses)", "np.sum(losses)",
                "This is one over the probability of the whole text: take the mean over the tokens.",
            ),
            Mistake(
                "np.exp(np.mean(losses))", "np.exp(-np.mean(losses))",
                "The sign is wrong: this is a probability. A loss is -log p already.",
            ),
        ),
    ),
    Task(
        name="bits_per_byte",
        lesson=4,
        statement=(
            "Models with different tokens are compared in bits per byte: the loss of the whole text in bits, divided by"
            " the bytes of the text. losses: (N,), one a token, in nats (a bit is ln 2 nats); n_bytes: of the whole "
            "text."
        ),
        source='''
def bits_per_byte(losses, n_bytes):
    """losses: (N,) in nats, n_bytes: a whole number -> a number."""
    return np.sum(losses) / np.log(2) / n_bytes  #?
''',
        cases=_losses_and_bytes,
        returns=("bits",),
        mistakes=(
            Mistake(" / np.log(2)", "", "These are nats per byte: divide by ln 2 to get bits."),
            Mistake(
                "/ np.log(2)", "* np.log(2)",
                "ln 2 is on the wrong side: a nat is more than a bit, 1/ln 2 = 1.44 of them.",
            ),
            Mistake(" / n_bytes", " / len(losses)", "These are bits per token: divide by the bytes of the text."),
            Mistake(
                "np.sum(losses)", "np.mean(losses)",
                "The mean is divided by tokens and then by bytes: take the sum over the text.",
            ),
        ),
    ),
    Task(
        name="top_k",
        lesson=4,
        statement=(
            "Top-k sampling: keep the k tokens with the largest logits and give the others probability 0; those of the "
            "kept ones sum to 1. logits: (V,), all different; k may be more than V. Return the probabilities (V,)."
        ),
        source='''
def top_k(logits, k):
    """logits: (V,), k: a whole number of at least 1 -> probabilities (V,)."""
    kept = np.argsort(logits)[-k:]  #? the ids of the k largest
    masked = np.full(len(logits), -np.inf)
    masked[kept] = logits[kept]  #?
    exponentials = np.exp(masked - masked.max())
    return exponentials / exponentials.sum()  #?
''',
        cases=_top_k,
        returns=("probabilities",),
        mistakes=(
            Mistake(
                "return exponentials / exponentials.sum()", "return exponentials / np.exp(logits - logits.max()).sum()",
                "The probabilities of the kept tokens do not sum to 1: divide by the sum of the kept ones alone.",
            ),
            Mistake("[-k:]", "[:k]", "The k *smallest* are kept: argsort goes upwards, the largest stand at its end."),
            Mistake(
                "np.full(len(logits), -np.inf)", "np.zeros(len(logits))",
                "A logit of 0 is not impossible: exp(0) is 1. What is dropped gets -infinity.",
            ),
            Mistake("[-k:]", "[-k - 1 :]", "One token too many is kept: k of them, [-k:]."),
        ),
    ),
    Task(
        name="top_p",
        lesson=4,
        statement=(
            "Nucleus sampling (Holtzman et al. 2020): keep the smallest set of most likely tokens whose probabilities "
            "together reach p, the one that reaches it included, and make them sum to 1. logits: (V,), all different, p"
            " in (0, 1]. Return the probabilities (V,)."
        ),
        source='''
def top_p(logits, p):
    """logits: (V,), p: a number in (0, 1] -> probabilities (V,)."""
    exponentials = np.exp(logits - logits.max())
    probabilities = exponentials / exponentials.sum()  # (V,)
    order = np.argsort(-probabilities)  #? the most likely first
    before = np.cumsum(probabilities[order]) - probabilities[order]  #? what those before it have together
    kept = order[before < p]  #?
    nucleus = np.zeros(len(logits))
    nucleus[kept] = probabilities[kept]
    return nucleus / nucleus.sum()  #?
''',
        cases=_top_p,
        returns=("probabilities",),
        mistakes=(
            Mistake(
                " - probabilities[order]", "",
                "The token that reaches p is dropped, and with a small p nothing is left: count what stands *before* "
                "each token.",
            ),
            Mistake(
                "np.argsort(-probabilities)", "np.argsort(probabilities)",
                "The least likely come first: argsort goes upwards, sort -probabilities.",
            ),
            Mistake(
                "nucleus / nucleus.sum()", "nucleus",
                "The kept probabilities do not sum to 1: divide by their sum.",
            ),
            Mistake(
                "order[before < p]", "np.flatnonzero(before < p)",
                "The places in the sorted order are taken for token ids: order[...] leads back to the ids.",
            ),
            Mistake(
                "nucleus[kept] = probabilities[kept]", "nucleus[kept] = 1",
                "The kept tokens are all alike here: they keep their probabilities.",
            ),
        ),
    ),
)  # fmt: skip
