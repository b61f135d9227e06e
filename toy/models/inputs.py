"""What a batch is, said by the model: the arrays that one step takes, by role, and how they are checked.

Engines know inputs by role, labels and the hyper-parameter row; what the roles are is said here. The checks run before
anything is changed.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from toy.arrays import plain_array
from toy.config import LanguageModelConfig, ViTConfig


class Input(NamedTuple):
    """One argument of a model's `forward_rows`. shape: of the checked array. limit: integers 0 .. limit-1, None: float32."""

    shape: tuple[int, ...]
    limit: int | None = None


def check_range(name: str, ids: np.ndarray, low: int, high: int) -> None:
    """Raise ValueError unless every id is in [low, high)."""
    if ids.size and (ids.min() < low or ids.max() >= high):
        wrong = ids[(ids < low) | (ids >= high)].flat[0]
        raise ValueError(f"{name} must lie in [{low}, {high}), got {wrong}")


def n_counted(labels: np.ndarray) -> int:
    """How many rows of checked labels count: those that are not -1, or not all zero."""
    return int(np.count_nonzero(labels >= 0) if labels.ndim == 1 else labels.any(axis=1).sum())


class Batch:
    """The batches of fixed shape of one engine. label_shape: of integer labels; n_classes: what a label chooses from.

    roles: what `step` takes, first the one that every batch has. inputs: dict of role to `Input`, the arguments of
    `forward_rows` besides the number of sequences or images.
    """

    roles: tuple[str, ...] = ()
    inputs: dict[str, Input] = {}  # noqa: RUF012 (each subclass makes its own)
    label_names = ""  # the axes of label_shape, for error messages

    def __init__(self, label_shape: tuple[int, ...], n_classes: int) -> None:
        self.label_shape, self.n_classes = label_shape, n_classes
        self.n_rows = math.prod(label_shape)  # of the logits, one for each label

    def check(self, *given: Any, **by_role: Any) -> dict[str, np.ndarray]:
        """The arrays of a step by role -> the arguments of `forward_rows`, contiguous. Raises ValueError for wrong ones."""
        raise NotImplementedError

    def random(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A batch to try a model on: (the array of the first role, integer labels)."""
        raise NotImplementedError

    def check_labels(self, labels: npt.ArrayLike) -> np.ndarray:
        """-> contiguous int64 (N,), -1 = not counted, or float32 (N, n_classes), one distribution a row.

        Raises ValueError for another shape or dtype, labels out of range, and a batch in which nothing counts.
        """
        labels = plain_array("labels", labels)
        if labels.dtype.kind in "iu":
            labels = self._rows("labels", labels)
            check_range("labels", labels, -1, self.n_classes)
            if not n_counted(labels):
                raise ValueError(
                    "labels: every label is -1 (not counted), so there is nothing to learn from this batch"
                )
            return labels
        wanted = (self.n_rows, self.n_classes)
        if labels.dtype.kind != "f" or labels.shape != wanted:
            raise ValueError(
                f"labels must be integers {self.label_shape} or float rows {wanted}, got {labels.dtype} {labels.shape}"
            )
        labels = np.ascontiguousarray(labels, np.float32)
        if not np.isfinite(labels).all() or (labels < 0).any():
            raise ValueError("labels: float rows must be finite and not negative (one distribution per row)")
        if not labels.any():
            raise ValueError("labels: every row is zero, so there is nothing to learn from this batch")
        return labels

    def _rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Integers in the shape of the labels -> contiguous int64 (N,)."""
        if ids.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
        shape = self.label_shape
        if ids.shape != shape and not (len(shape) == 2 and shape[0] == 1 and ids.shape == shape[1:]):
            flat = f" or {shape[1:]}" if len(shape) == 2 and shape[0] == 1 else ""
            raise ValueError(f"{name} must have shape {shape}{flat} {self.label_names}, got {ids.shape}")
        if ids.dtype.kind == "u":
            check_range(name, ids, 0, 2**31)  # before the cast, so that a huge unsigned id does not turn negative
        return np.ascontiguousarray(ids.reshape(-1), dtype=np.int64)


class TokenBatch(Batch):
    """Sequences of token ids: token_ids int (B, T), positions int (T,) or None for 0 .. T-1, labels int (B, T)."""

    roles = ("token_ids", "positions")
    label_names = "(t_batch, t_seq)"

    def __init__(self, config: LanguageModelConfig, t_batch: int, t_seq: int) -> None:
        """Raises ValueError for a t_seq that does not fit the config's context."""
        if t_seq > config.context_length:
            raise ValueError(
                f"t_seq {t_seq} does not fit the context of {config.context_length}: "
                "choose a shorter t_seq or a longer context_length"
            )
        super().__init__((t_batch, t_seq), config.vocab_size)
        self.context_length = config.context_length
        self.inputs = {
            "token_ids": Input((self.n_rows,), config.vocab_size),
            "positions": Input((self.n_rows,), config.context_length),
        }
        self.usual_positions = self._check_positions(np.arange(t_seq))  # what a step has that gives none
        self.usual_positions.flags.writeable = False

    def check(self, token_ids: npt.ArrayLike, positions: npt.ArrayLike | None = None) -> dict[str, np.ndarray]:
        ids = self._rows("token_ids", plain_array("token_ids", token_ids))
        check_range("token_ids", ids, 0, self.n_classes)
        return {
            "token_ids": ids,
            "positions": self.usual_positions if positions is None else self._check_positions(positions),
        }

    def random(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(0, self.n_classes, (self.label_shape[0], self.label_shape[1] + 1))
        return ids[:, :-1], ids[:, 1:]

    def _check_positions(self, positions: npt.ArrayLike) -> np.ndarray:
        """-> contiguous int64 (N,): the positions of every sequence of the batch."""
        t_batch, t_seq = self.label_shape
        positions = plain_array("positions", positions)
        if positions.shape != (t_seq,) or positions.dtype.kind not in "iu":
            raise ValueError(
                f"positions must be integers of shape {(t_seq,)} or None, got {positions.dtype} {positions.shape}"
            )
        check_range("positions", positions, 0, self.context_length)
        return np.tile(positions.astype(np.int64), t_batch)


class ImageBatch(Batch):
    """Images: numbers (B, height, width, channels), or (B, height, width) of one channel, and labels int (B,).

    They are cut into patches, row by row of the image: patch (i, j) holds the pixels of rows i*p .. i*p+p-1 and columns j*p
    .. j*p+p-1, then the channels, as one row of numbers.
    """

    roles = ("images", "positions")
    label_names = "(t_batch,)"

    def __init__(self, config: ViTConfig, t_batch: int, t_seq: int) -> None:
        """t_seq: the tokens of an image, patches and class token. Raises ValueError for another number than the config's."""
        if t_seq != config.n_tokens:
            raise ValueError(
                f"t_seq must be {config.n_tokens}, the {config.n_patches} patches of an image and the class token; "
                f"got {t_seq}"
            )
        super().__init__((t_batch,), config.n_classes)
        self.config = config
        self.inputs = {
            "patches": Input((t_batch * config.n_patches, config.patch_numbers)),
            "class_ids": Input((t_batch,), 1),
            "positions": Input((t_batch * config.n_tokens,), config.n_tokens),
        }

    def check(self, images: npt.ArrayLike, positions: npt.ArrayLike | None = None) -> dict[str, np.ndarray]:
        c, images = self.config, plain_array("images", images)
        if positions is not None:
            raise ValueError("images have no positions to give: leave positions out")
        wanted = (*self.label_shape, c.image_size, c.image_size, c.channels)
        grey = c.channels == 1 and images.shape == wanted[:3]
        if not (images.shape == wanted or grey) or images.dtype.kind not in "fiu":
            raise ValueError(
                f"images must be numbers {wanted} (t_batch, height, width, channels), got {images.dtype} {images.shape}"
            )
        with np.errstate(over="ignore"):
            images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise ValueError("images must be finite numbers in float32")
        side, p = c.image_size // c.patch_size, c.patch_size
        patches = images.reshape(-1, side, p, side, p, c.channels).swapaxes(2, 3)  # (B, side, side, p, p, channels)
        return {
            "patches": np.ascontiguousarray(patches.reshape(-1, c.patch_numbers)),
            "class_ids": np.zeros(self.label_shape, np.int64),
            "positions": np.tile(np.arange(c.n_tokens), len(images)),
        }

    def random(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        c = self.config
        images = rng.normal(size=(*self.label_shape, c.image_size, c.image_size, c.channels))
        return images, rng.integers(0, self.n_classes, self.label_shape)
