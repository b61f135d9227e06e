"""Images to train on: scikit-learn's digits, Fashion-MNIST as IDX files, or a folder with one subfolder a class.

Pixels become float32 numbers from 0 to 1, in arrays (N, height, width, channels); what a model is given is normalised
(`Normalisation`).
"""

import gzip
import hashlib
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from toy.files.atomic import StrPath
from toy.optional import optional_package

KNOWN = ("digits", "fashion-mnist")
FASHION_MNIST_CLASSES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# where Debian's package dataset-fashion-mnist puts them
_FASHION_MNIST_PLACES = ("fashion-mnist", "/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_MOST_NUMBERS = 2**31  # of all pixels of a data set: 8 GB as float32
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class ImageError(ValueError):
    """Images that cannot be trained on; the message names the file."""


class Images(NamedTuple):
    """images: float32 (N, height, width, channels), 0 to 1. labels: int64 (N,). classes: their names. test: how many of the
    images, at the end, are the test part of the data set itself; 0 where it has none. source: where they came from, in words.
    path: absolute, None for a data set by name."""

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    test: int
    source: str
    path: str | None

    @property
    def sha256(self) -> str:
        """Of pixels, labels and classes: a resumed run must find the same ones."""
        digest = hashlib.sha256(repr((self.images.shape, self.classes, self.test)).encode())
        digest.update(np.ascontiguousarray(self.images, "<f4").data)
        digest.update(np.ascontiguousarray(self.labels, "<i8").data)
        return digest.hexdigest()


class Normalisation(NamedTuple):
    """What is subtracted and divided by: the mean and the standard deviation of all training pixels."""

    mean: float
    std: float

    @classmethod
    def of(cls, images: np.ndarray) -> "Normalisation":
        """Of float32 images from 0 to 1."""
        std = float(images.std(dtype=np.float64))
        return cls(float(images.mean(dtype=np.float64)), std if std > 1e-6 else 1.0)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images of mean 0 and standard deviation 1, float32."""
        return (images - np.float32(self.mean)) / np.float32(self.std)


def load_images(name: StrPath = "digits", image_size: int | None = None, channels: int | None = None) -> Images:
    """The data set `name`: "digits", "fashion-mnist", or the path of a folder -> `Images`.

    A folder has one subfolder for each class, with the images in it; or it holds the four IDX files of an MNIST-like data
    set. image_size, channels: what a folder's images must be made to, None = those of its first image (which must be
    square). Raises ImageError for a folder without classes, an image that cannot be read or has another size, and for
    broken files; RuntimeError, with the command to type, where a package is needed and missing.
    """
    if str(name) == "digits":
        return _digits()
    if str(name) == "fashion-mnist":
        return _fashion_mnist()
    path = Path(name)
    if not path.exists():
        raise ImageError(f"there is no folder {str(name)!r}; data sets by name: {', '.join(KNOWN)}")
    if not path.is_dir():
        raise ImageError(f"{path} is a file: give a folder with one subfolder of images for each class")
    if any(_idx_file(path, file) for part in _FASHION_MNIST_FILES.values() for file in part):
        return _idx_folder(path, None, f"IDX files in {path}")._replace(path=str(path.resolve()))
    return _image_folder(path, image_size, channels)


def read_image(path: StrPath, image_size: int, channels: int) -> np.ndarray:
    """One image file as float32 (image_size, image_size, channels) from 0 to 1.

    channels: 1 (grey), 3 (colour) or 4. Raises ImageError for a file that is no image or has another size.
    """
    return _pixels(path, _open_image(Path(path), image_size), channels)


def split_images(data: Images, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training indices, test indices). The data set's own test part, otherwise a share `val_fraction` of every class,
    drawn from the seed; at least one image of a class goes to each side. Raises ImageError for a class of fewer than two
    images."""
    n = len(data.labels)
    if data.test:
        return np.arange(n - data.test), np.arange(n - data.test, n)
    rng, train, test = np.random.default_rng([seed, 2]), [], []
    for label, name in enumerate(data.classes):
        members = rng.permutation(np.flatnonzero(data.labels == label))
        if len(members) < 2:
            raise ImageError(
                f"{data.source}: class {name!r} has {len(members)} image{'' if len(members) == 1 else 's'}, "
                "it needs at least two, one to train on and one to test"
            )
        n_test = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        test.append(members[:n_test])
        train.append(members[n_test:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The images of an epoch in a random order, a function of (seed, epoch): every one once."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(3, epoch)))).permutation(n)


def deformed(images: np.ndarray, seed: int, step: int) -> np.ndarray:
    """The images (N, height, width, channels) a little turned, stretched, slanted and moved, each in its own way: what a
    model that has few of them must not learn by heart. A function of (seed, step)."""
    from scipy import ndimage  # takes a moment to import

    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(4, step))))
    n, height = len(images), images.shape[1]
    angle, slant = np.deg2rad(rng.uniform(-12, 12, n)), rng.uniform(-0.15, 0.15, n)
    stretch, shift = np.exp(rng.uniform(-0.12, 0.12, (n, 2))), rng.uniform(-0.1, 0.1, (n, 2)) * height
    centre = (np.array(images.shape[1:3]) - 1) / 2
    out = np.empty_like(images)
    for i, image in enumerate(images):
        turn = np.array([[np.cos(angle[i]), -np.sin(angle[i])], [np.sin(angle[i]), np.cos(angle[i])]])
        matrix = turn @ np.array([[stretch[i, 0], slant[i]], [0.0, stretch[i, 1]]])
        offset = centre - matrix @ centre + shift[i]
        for channel in range(images.shape[3]):
            ndimage.affine_transform(
                image[..., channel], matrix, offset, output=out[i, ..., channel], order=1, mode="nearest"
            )
    return out


# ----------------------------------------------------------------------------------------------------------------------
# data sets by name
# ----------------------------------------------------------------------------------------------------------------------


def _digits():
    datasets = optional_package("sklearn.datasets", "the images of --data digits", install="scikit-learn")
    found = datasets.load_digits()
    images = (found.images / 16.0).astype(np.float32)[..., None]  # (1797, 8, 8, 1)
    source = "scikit-learn's digits (8 x 8 pixels)"
    return Images(images, found.target.astype(np.int64), tuple("0123456789"), 0, source, None)


def _fashion_mnist():
    for place in _FASHION_MNIST_PLACES:
        folder = Path(place)
        if _idx_file(folder, _FASHION_MNIST_FILES["train"][0]):
            return _idx_folder(folder, FASHION_MNIST_CLASSES, "Fashion-MNIST")
    raise ImageError(
        "Fashion-MNIST is not here: install Debian's package dataset-fashion-mnist, or put its four IDX files "
        f"({_FASHION_MNIST_FILES['train'][0]}.gz and the others) into a folder and give that with --data"
    )


def _idx_folder(folder, classes, source):
    parts = {}
    for part, (image_name, label_name) in _FASHION_MNIST_FILES.items():
        image_path, label_path = (_idx_file(folder, name) for name in (image_name, label_name))
        if image_path is None or label_path is None:
            missing = image_name if image_path is None else label_name
            raise ImageError(f"{folder} has no {missing} or {missing}.gz: an MNIST-like data set has four IDX files")
        images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
        if len(images) != len(labels):
            raise ImageError(f"{image_path} has {len(images)} images and {label_path} {len(labels)} labels")
        if not images.size:
            raise ImageError(f"{image_path} has no images: its shape is {images.shape}")
        if images.shape[1] != images.shape[2]:
            raise ImageError(
                f"{image_path} has images of {images.shape[2]} x {images.shape[1]} pixels: they must be square"
            )
        parts[part] = images, labels
    (train, train_labels), (test, test_labels) = parts["train"], parts["test"]
    if train.shape[1:] != test.shape[1:]:
        raise ImageError(f"{folder}: the images to train on and to test have different sizes")
    labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
    n_classes = int(labels.max()) + 1
    if len(np.unique(labels)) < 2:
        raise ImageError(f"{folder}: every label is {labels[0]}, there must be at least two classes")
    if classes is None:
        classes = tuple(str(i) for i in range(n_classes))
    if n_classes > len(classes):
        raise ImageError(f"{folder} has the label {n_classes - 1}, and there are {len(classes)} classes")
    images = np.concatenate([train, test]).astype(np.float32)[..., None] / np.float32(255)
    return Images(images, labels, classes, len(test), source, None)


def _idx_file(folder, name):
    """The path of an IDX file, compressed or not; None where there is none."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path, n_axes):
    """An IDX file of bytes (the format of MNIST), maybe compressed with gzip -> uint8 array of `n_axes` axes.

    Raises ImageError for another type or number of axes, and for a file that is shorter or longer than it says.
    """
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            head = file.read(4 + 4 * n_axes)
            if len(head) != 4 + 4 * n_axes or head[:2] != b"\0\0" or head[2:4] != bytes((8, n_axes)):
                raise ImageError(f"{path} is not an IDX file of bytes with {n_axes} axes")
            shape = tuple(int.from_bytes(head[4 + 4 * i : 8 + 4 * i], "big") for i in range(n_axes))
            size = int(np.prod(shape, dtype=object))
            if size > _MOST_NUMBERS:
                raise ImageError(f"{path} claims {size:,} numbers, at most {_MOST_NUMBERS:,} can be read")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) != size:
        raise ImageError(
            f"{path} has {'more than ' if len(data) > size else ''}{min(len(data), size):,} of {size:,} bytes"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


# ----------------------------------------------------------------------------------------------------------------------
# a folder of images
# ----------------------------------------------------------------------------------------------------------------------


def _image_folder(folder, image_size, channels):
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(classes) < 2:
        found = f"only {classes[0].name!r}" if classes else "none"
        raise ImageError(f"{folder} must have one subfolder for each class, at least two of them: there is {found}")
    paths, labels = [], []
    for label, subfolder in enumerate(classes):
        members = sorted(path for path in subfolder.iterdir() if not path.name.startswith("."))
        if not members:
            raise ImageError(f"{subfolder} has no images")
        if inner := [path for path in members if path.is_dir()]:
            raise ImageError(f"{inner[0]} is a folder inside of a class: the images must lie in {subfolder} itself")
        wrong = [path for path in members if path.suffix.lower() not in _SUFFIXES]
        if wrong:
            raise ImageError(f"{wrong[0]} is not an image ({', '.join(_SUFFIXES)}): move it out of the folder")
        paths += members
        labels += [label] * len(members)
    first = _open_image(paths[0], image_size)
    if first.size[0] != first.size[1]:
        raise ImageError(f"{paths[0]} is {first.size[0]} x {first.size[1]} pixels: images must be square")
    image_size = first.size[0]
    channels = channels or (1 if first.mode in _GREY or first.mode.startswith("I;16") else 3)
    if len(paths) * image_size**2 * channels > _MOST_NUMBERS:
        raise ImageError(f"{folder} has {len(paths):,} images of {image_size} pixels: too many for memory")
    images = np.empty((len(paths), image_size, image_size, channels), np.float32)
    for i, path in enumerate(paths):
        images[i] = read_image(path, image_size, channels)
    names = tuple(path.name for path in classes)
    source = f"folder {folder} ({len(paths):,} images in {len(classes)} classes)"
    return Images(images, np.array(labels, np.int64), names, 0, source, str(folder.resolve()))


def _open_image(path, image_size=None):
    """The image in a file, turned as its camera was held. image_size: what its sides must be, looked at before it is read."""
    package = optional_package("PIL.Image", "image files", install="pillow")
    operations = optional_package("PIL.ImageOps", "image files", install="pillow")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", package.DecompressionBombWarning)
            with package.open(path) as image:
                if image_size is not None and image.size != (image_size, image_size):
                    raise ImageError(
                        f"{path} is {image.size[0]} x {image.size[1]} pixels, expected {image_size} x {image_size}: "
                        "resize it first"
                    )
                return operations.exif_transpose(image)
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"there is no image {path}") from error
    except Exception as error:  # decoders of damaged files raise what they like
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{path} cannot be read as an image: {reason}") from error


_GREY = ("1", "L", "LA")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels


def _pixels(path, image, channels):
    """float32 (height, width, channels) from 0 to 1. Transparent pixels are seen on white, unless there are 4 channels."""
    if channels not in _MODES:
        raise ImageError(f"{path}: image files have 1, 3 or 4 channels, the model reads {channels}")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"{path} has 32 bits in a pixel, and nothing says which of them are white: save it with 8 or 16"
        )
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)[..., None].astype(np.float32) / np.float32(65535)
        return np.concatenate([grey] * min(channels, 3) + [np.ones_like(grey)] * (channels == 4), axis=2)
    if channels < 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        white = image.copy()
        white.paste((255, 255, 255, 255), (0, 0, *image.size))
        white.alpha_composite(image)
        image = white
    pixels = np.asarray(image.convert(_MODES[channels]), np.float32) / np.float32(255)
    return pixels.reshape(*pixels.shape[:2], channels)
