"""Lesson 9: from an image to a row of tokens."""

import numpy as np

from toy.checks.exercises.engine import Mistake, Task


def _images(rng):
    for batch, side, p, channels in ((2, 4, 2, 1), (1, 6, 2, 3), (3, 3, 1, 2), (2, 6, 3, 2)):
        yield {"images": rng.normal(size=(batch, side, side, channels)), "p": p}


def _tokens(rng):
    for batch, n, d in ((2, 4, 3), (1, 3, 4), (3, 1, 2)):
        yield {
            "patches": rng.normal(size=(batch, n, d)),
            "class_token": rng.normal(size=d),
            "positions": rng.normal(size=(n + 1, d)),
        }


def _predictions(rng):
    for n, classes in ((11, 3), (1, 4), (13, 5)):
        logits = rng.normal(size=(n, classes))
        yield {
            "logits": logits,
            "labels": np.where(rng.random(n) < 0.5, logits.argmax(axis=1), rng.integers(0, classes, n)),
        }


TASKS = (
    Task(
        name="patches",
        lesson=9,
        statement=(
            "Cut every image (B, side, side, C) into patches of p x p pixels, in the order in which a page is read, and"
            " lay the pixels of a patch into one row, also in reading order: (B, P, p*p*C) with P = (side/p)^2. Split "
            "both axes of the image, bring the two that count patches to the front, and flatten."
        ),
        source='''
def patches(images, p):
    """images: (B, side, side, C), p: divides side -> (B, (side/p)^2, p*p*C)."""
    batch, side, _, channels = images.shape
    n = side // p  # patches in a row
    cut = images.reshape(batch, n, p, n, p, channels)  #?
    return cut.swapaxes(2, 3).reshape(batch, n * n, p * p * channels)  #? (B, n, n, p, p, C) on the way
''',
        cases=_images,
        returns=("patches",),
        mistakes=(
            Mistake(
                "cut.swapaxes(2, 3).reshape", "cut.reshape",
                "These are stripes of pixel rows: without exchanging axes a reshape only cuts the numbers in their "
                "order. (B, n, p, n, p, C) has to become (B, n, n, p, p, C).",
            ),
            Mistake(
                "cut.swapaxes(2, 3)", "cut.transpose(0, 3, 1, 2, 4, 5)",
                "The patches come column by column: they are read like a page, row by row.",
            ),
            Mistake(
                "cut.swapaxes(2, 3)", "cut.transpose(0, 1, 3, 4, 2, 5)",
                "The pixels inside of a patch come column by column: row by row is right.",
            ),
            Mistake(
                "cut.swapaxes(2, 3)", "cut.transpose(0, 1, 3, 5, 2, 4)",
                "The channels come first inside of a patch: the C numbers of a pixel stay together, last.",
            ),
        ),
    ),
    Task(
        name="class_token_and_positions",
        lesson=9,
        statement=(
            "Put the class token (D,) before the patches (B, P, D) of every image, and add to each of the T = P + 1 "
            "tokens the row of its position (T, D). The result is (B, T, D)."
        ),
        source='''
def class_token_and_positions(patches, class_token, positions):
    """patches: (B, P, D), class_token: (D,), positions: (P+1, D) -> (B, P+1, D)."""
    batch, _, d = patches.shape
    first = np.broadcast_to(class_token, (batch, 1, d))  #? one for each image
    return np.concatenate([first, patches], axis=1) + positions  #?
''',
        cases=_tokens,
        returns=("tokens",),
        mistakes=(
            Mistake(
                "[first, patches]", "[patches, first]",
                "The class token stands last: it is the first token of every image.",
            ),
            Mistake(" + positions", "", "The positions are missing: without them the patches are a bag without order."),
            Mistake(
                "np.concatenate([first, patches], axis=1) + positions",
                "np.concatenate([first, patches + positions[1:]], axis=1)",
                "The class token has no position: its row, positions[0], is added too.",
            ),
            Mistake(
                "np.concatenate([first, patches], axis=1) + positions",
                "np.concatenate([first + positions[-1:], patches + positions[:-1]], axis=1)",
                "The positions are moved by one: row 0 belongs to the class token, row 1 to the first patch.",
            ),
        ),
    ),
    Task(
        name="accuracy",
        lesson=9,
        statement=(
            "The fraction of images whose largest logit is that of their class. logits (N, classes), labels int (N,); a"
            " number from 0 to 1."
        ),
        source='''
def accuracy(logits, labels):
    """logits: (N, classes), labels: int (N,) -> a number from 0 to 1."""
    return np.mean(logits.argmax(axis=1) == labels)  #?
''',
        cases=_predictions,
        returns=("accuracy",),
        mistakes=(
            Mistake("np.mean(logits", "np.sum(logits", "This is how many are right: divide by how many there are."),
            Mistake("== labels", "!= labels", "This is the fraction that is wrong."),
            Mistake("logits.argmax", "logits.argmin", "The *smallest* logit is taken: the prediction is the largest."),
            Mistake(
                "np.mean(logits.argmax(axis=1) == labels)", "100 * np.mean(logits.argmax(axis=1) == labels)",
                "This is in percent: a number from 0 to 1 is asked for.",
            ),
        ),
    ),
)  # fmt: skip
