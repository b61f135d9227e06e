"""Image models that exist: what is on a picture, and how often they are right."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from toy.config import ViTConfig
from toy.data.images import ImageError, Normalisation, load_images, read_image, split_images
from toy.engines import model_from
from toy.files import BadFileError
from toy.files.atomic import StrPath
from toy.models.vit import ViT
from toy.trained.load import read_trained

_ROWS = 256  # images read at a time


class Prediction(NamedTuple):
    """What a model sees in one image: the class, and the probability of every class by name."""

    path: Path
    name: str
    probabilities: dict[str, float]


class ImageEvaluation(NamedTuple):
    """loss: mean negative log-likelihood, nats per image. accuracy: share of the images that are right."""

    loss: float
    accuracy: float
    n_images: int


class Classifier:
    """A trained image model to use. path: a run of `toy train vit-tiny`, a checkpoint of one, or what `recipe.save` wrote:
    there the classes are numbered and the pixels taken as they are, unless `ViTTiny.save` was told more. checkpoint: of a
    run, "last", "best" or a step.

    Attributes: model, config, classes (their names), normalise, step. Raises the errors of `read_trained`, ValueError for a
    model that reads text.
    """

    def __init__(self, path: StrPath, backend: str = "auto", checkpoint: str | int = "last") -> None:
        stored = read_trained(path, checkpoint=checkpoint)
        if not isinstance(stored.config, ViTConfig):
            raise ValueError(f"{path} is a {stored.arch}, which reads text: toy generate and toy eval are for it")
        self.path, self.step, self.config, self.about = stored.path, stored.step, stored.config, stored.about
        classes = self.about.get("classes", range(self.config.n_classes))
        normalisation = self.about.get("normalisation", {"mean": 0.0, "std": 1.0})
        try:
            self.classes = tuple(str(name) for name in classes)
            self.normalise = Normalisation(**{key: float(normalisation[key]) for key in ("mean", "std")})
        except (KeyError, TypeError, ValueError) as error:
            raise BadFileError(stored.path, f"does not say what its classes are ({error})") from error
        if len(self.classes) != self.config.n_classes:
            raise BadFileError(
                stored.path, f"names {len(self.classes)} classes and its model has {self.config.n_classes}"
            )
        parameters = cast(dict[str, np.ndarray], stored.parameters)  # no GGUF file holds such a model
        self.model = cast(ViT, model_from(stored.config, parameters, backend))

    def logits(self, images: npt.ArrayLike) -> np.ndarray:
        """images: numbers from 0 to 1 (N, height, width, channels) -> float32 (N, n_classes). Others raise ValueError."""
        images = np.asarray(images, np.float32)
        if images.size and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images must be numbers from 0 to 1, these are from {images.min():g} to {images.max():g}: "
                "divide bytes by 255"
            )
        if not len(images):
            return np.zeros((0, self.config.n_classes), np.float32)
        parts = [self.model.forward(self.normalise(images[i : i + _ROWS]))[0] for i in range(0, len(images), _ROWS)]
        return np.concatenate(parts)

    def predict(self, paths: StrPath | Iterable[StrPath]) -> list[Prediction]:
        """What is on each of the image files -> list of `Prediction`. paths: a list, or one path alone. Raises ImageError for
        one that cannot be read or has another size than the model's images; nothing is predicted then."""
        c, files = self.config, [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        images = np.empty((len(files), c.image_size, c.image_size, c.channels), np.float32)
        for i, path in enumerate(files):
            images[i] = read_image(path, c.image_size, c.channels)
        rows = softmax(self.logits(images))
        return [
            Prediction(Path(path), self.classes[row.argmax()], dict(zip(self.classes, row.tolist())))
            for path, row in zip(files, rows)
        ]

    def evaluate(self, data: str | None = None) -> ImageEvaluation:
        """How often it is right -> `ImageEvaluation`.

        data: a data set as `load_images` takes it, all of it; None: the test part of the run's own data, all of it. Raises
        ImageError for one with other classes or another size of images, ValueError when the run's own data are others now, or
        when there is no run.
        """
        c, own = self.config, None
        if data is None:
            data, own = self._own_data()
        found = load_images(data, c.image_size, c.channels)
        if found.classes != self.classes:
            raise ImageError(
                f"{found.source} has the classes {', '.join(found.classes[:20])}, the model {', '.join(self.classes[:20])}"
            )
        if found.images.shape[1:] != (c.image_size, c.image_size, c.channels):
            height, width, channels = found.images.shape[1:]
            raise ImageError(
                f"{found.source} has images of {height} x {width} pixels and {channels} channels, the model reads "
                f"{c.image_size} x {c.image_size} and {c.channels}"
            )
        chosen = np.arange(len(found.labels))
        if own is not None:
            sha256, val_fraction, seed = own
            if found.sha256 != sha256:
                raise ValueError(
                    f"{found.source}: not the images that the model was trained on, so no test part of them"
                )
            _, chosen = split_images(found, val_fraction, seed)
        loss, accuracy = score(self.logits(found.images[chosen]), found.labels[chosen])
        return ImageEvaluation(loss, accuracy, len(chosen))

    def _own_data(self) -> tuple[str, tuple[str, float, int]]:
        """(the name of the run's data set, (its sha256, the share of the test part, the seed of the split))."""
        if not self.about.get("training"):
            raise ValueError(f"{self.path} is of no run, so it has no test part of its own: name a data set")
        try:
            options, data = self.about["training"], self.about["data"]
            return str(options["data"]), (data["sha256"], float(options["val_fraction"]), int(options["seed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise BadFileError(self.path, f"does not say what its test part is ({error})") from error


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, classes) -> probabilities, float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def score(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """(mean negative log-likelihood in nats, share of the rows whose largest logit is the label)."""
    chosen = softmax(logits)[np.arange(len(labels)), labels]
    with np.errstate(divide="ignore"):
        return float(-np.log(chosen).mean()), float((logits.argmax(axis=1) == labels).mean())


def confusion(logits: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """(n_classes, n_classes) counts: row = what it is, column = what the model takes it for."""
    counts = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(counts, (labels, logits.argmax(axis=1)), 1)
    return counts
