"""Images to train on and to look at: digits, IDX files, folders; batches; the commands train, predict, eval and resume."""

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import CLASSES, SIDE, idx_bytes, stripes, write_idx, write_images
from single_thread import single_thread  # noqa: F401 (autouse)

from toy.data import images as data_images
from toy.data.images import (
    ImageError,
    Normalisation,
    deformed,
    epoch_order,
    load_images,
    read_idx,
    read_image,
    split_images,
)
from toy.files import read_checkpoint, read_events
from toy.trained.classify import Classifier, confusion, score
from toy.training import Training
from toy.training.vit_tiny import ViTTinyOptions, nearest_divisor

pillow = pytest.importorskip("PIL.Image", reason="pillow is not installed (pip install pillow)")


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def one_sentence(text):
    """An error is one line that names the program, and no traceback."""
    return text.startswith("toy: ") and text.count("\n") == 1 and "Traceback" not in text


def save(path, array, mode=None):
    """An array as an image file; mode: converted to, or None."""
    image = pillow.fromarray(np.asarray(array))
    (image if mode is None else image.convert(mode)).save(path)
    return Path(path)


# ----------------------------------------------------------------------------------------------------------------------
# data sets by name
# ----------------------------------------------------------------------------------------------------------------------


def test_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")
    data = load_images()
    assert data.images.shape == (1797, 8, 8, 1) and data.images.dtype == np.float32
    assert (data.images.min(), data.images.max()) == (0, 1)
    assert data.classes == tuple("0123456789") and np.bincount(data.labels).min() == 174
    assert (data.test, data.path) == (0, None) and "digits" in data.source
    assert data.sha256 == load_images("digits").sha256


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("sklearn.datasets", "digits", "scikit-learn"), ("PIL.Image", "pictures", "pillow")],
    ids=["digits", "folder"],
)
def test_a_missing_package_is_one_sentence_with_the_command_to_type(toy_command, monkeypatch, module, name, package):
    write_images(Path("pictures"))
    before = sorted(Path().rglob("*"))
    monkeypatch.setitem(sys.modules, module, None)
    code, out, err = toy_command("train", "vit-tiny", f"--data={name}", "--out=run")
    assert (code, out, one_sentence(err)) == (2, "", True)
    assert f"pip install {package}" in err
    assert sorted(Path().rglob("*")) == before


def test_fashion_mnist_is_found_keeps_its_names_and_its_run_goes_on(toy_command, monkeypatch):
    monkeypatch.setattr(data_images, "_FASHION_MNIST_PLACES", ("nowhere", "here"))
    code, _, err = toy_command("train", "vit-tiny", "--data=fashion-mnist")
    assert (code, one_sentence(err)) == (2, True) and "dataset-fashion-mnist" in err and not Path("runs").exists()
    write_idx(Path("here"))
    data = load_images("fashion-mnist")
    assert data.classes[:2] == ("T-shirt", "trouser") and len(data.classes) == 10 and data.source == "Fashion-MNIST"
    assert toy_command("train", "vit-tiny", "--data=fashion-mnist", *SMALL, "--out=run")[0] == 0
    assert json.loads(Path("run/config.json").read_text())["classes"][9] == "ankle boot"
    assert toy_command("train", "vit-tiny", "--resume=run", "--steps=5")[0] == 0
    assert toy_command("eval", "run")[0] == 0


# ----------------------------------------------------------------------------------------------------------------------
# IDX files
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(tmp_path, compressed):
    data = load_images(write_idx(tmp_path / "idx", n_train=24, n_test=9, compressed=compressed))
    train, train_labels = stripes(24, seed=0)
    test, test_labels = stripes(9, seed=1)
    assert data.images.shape == (33, SIDE, SIDE, 1) and data.images.dtype == np.float32
    np.testing.assert_allclose(data.images[..., 0] * 255, np.concatenate([train, test]), atol=1e-4)
    assert data.labels.tolist() == [*train_labels, *test_labels]
    assert data.classes == ("0", "1", "2") and data.test == 9 and data.path == str((tmp_path / "idx").resolve())
    chosen = split_images(data, 0.5, seed=3)
    assert [part.tolist() for part in chosen] == [[*range(24)], [*range(24, 33)]]  # its own test part


def change(path, function):
    path.write_bytes(function(path.read_bytes()))


def sizes(*shape):
    return b"".join(n.to_bytes(4, "big") for n in shape)


TRAIN, TRAIN_LABELS, TEST = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"
BAD_IDX = {  # the file that is changed and named: what is done to it, what is said
    "cut-off": (TRAIN, lambda data: data[:-1], r"has 863 of 864 bytes"),
    "too-long": (TRAIN, lambda data: data + b"x", r"has more than 864 of 864 bytes"),
    "header-cut-off": (TRAIN, lambda data: data[:9], "is not an IDX file of bytes with 3 axes"),
    "empty": (TRAIN, lambda data: b"", "is not an IDX file"),
    "wrong-magic": (TRAIN, lambda data: b"\1" + data[1:], "is not an IDX file"),
    "of-floats": (TRAIN, lambda data: b"\0\0\x0d" + data[3:], "is not an IDX file of bytes"),
    "of-4-axes": (TRAIN, lambda data: b"\0\0\x08\4" + data[4:], "is not an IDX file of bytes with 3 axes"),
    "labels-as-images": (TRAIN, lambda data: idx_bytes(np.zeros(24)), "is not an IDX file of bytes with 3 axes"),
    "more-images": (TRAIN, lambda data: data[:4] + sizes(25, 6, 6) + data[16:], "has 864 of 900 bytes"),
    "fewer-images": (TRAIN, lambda data: idx_bytes(stripes(23)[0]), "has 23 images and .* 24 labels"),
    "huge": (TRAIN, lambda data: data[:4] + sizes(2**31, 2**31, 2**31) + data[16:], r"claims 9,903,520,\S+ numbers"),
    "large": (TRAIN, lambda data: data[:4] + sizes(59000, 190, 190) + data[16:], "has 864 of 2,129,900,000 bytes"),
    "not-square": (TRAIN, lambda data: data[:4] + sizes(24, 9, 4) + data[16:], "4 x 9 pixels: they must be square"),
    "no-images": (TRAIN, lambda data: idx_bytes(np.zeros((0, 6, 6))), "has 0 images and .* 24 labels"),
    "no-pixels": (TRAIN, lambda data: idx_bytes(np.zeros((24, 0, 0))), r"has no images: its shape is \(24, 0, 0\)"),
    "another-size": (TEST, lambda data: idx_bytes(stripes(9, side=4)[0]), "have different sizes"),
    "one-class": (TRAIN_LABELS, lambda data: idx_bytes(np.zeros(24)), ""),
    "labels-cut-off": (TRAIN_LABELS, lambda data: data[:-2], "has 22 of 24 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_IDX)
def test_a_bad_idx_file_is_named_and_nothing_is_written(tmp_path, toy_command, case):
    name, damage, message = BAD_IDX[case]
    folder = write_idx(tmp_path / "idx")
    load_images(folder)
    change(folder / name, damage)
    if case == "one-class":  # the test part has others: still two classes in all, until it has not
        load_images(folder)
        change(folder / "t10k-labels-idx1-ubyte", lambda data: idx_bytes(np.zeros(9)))
        message = "every label is 0, there must be at least two classes"
    with pytest.raises(ImageError, match=message):
        load_images(folder)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = toy_command("train", "vit-tiny", f"--data={folder}", "--out=run")
    assert (code, out, one_sentence(err)) == (2, "", True)
    assert (str(folder) if "different sizes" in message or "every label" in message else str(folder / name)) in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-12], r"train-images-idx3-ubyte\.gz cannot be read: .*end-of-stream"),
        (lambda data: data[:10] + b"\xff" + data[11:], r"train-images-idx3-ubyte\.gz cannot be read: Error -3"),
        (
            lambda data: data[:-8] + bytes(4) + data[-4:],
            r"train-images-idx3-ubyte\.gz cannot be read: CRC check failed",
        ),
        (lambda data: b"not gzip", r"train-images-idx3-ubyte\.gz cannot be read: Not a gzipped file"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-3]), r"train-images-idx3-ubyte\.gz has 861 of 864 bytes"),
        (lambda data: gzip.compress(gzip.decompress(data) + bytes(9)), r"\.gz has more than 864 of 864 bytes"),
    ],
    ids=["cut-off", "middle", "checksum", "no-gzip", "short-inside", "long-inside"],
)
def test_a_damaged_compressed_idx_file_is_named(tmp_path, toy_command, damage, message):
    folder = write_idx(tmp_path / "idx", compressed=True)
    load_images(folder)
    change(folder / f"{TRAIN}.gz", damage)
    code, out, err = toy_command("train", "vit-tiny", f"--data={folder}", "--out=run")
    assert (code, out, one_sentence(err)) == (2, "", True)
    assert re.search(message, err) and not Path("run").exists()


@pytest.mark.parametrize("name", [TRAIN, TRAIN_LABELS, TEST, "t10k-labels-idx1-ubyte"])
def test_a_missing_idx_file_is_named(tmp_path, name):
    folder = write_idx(tmp_path / "idx")
    (folder / name).unlink()
    with pytest.raises(ImageError, match=rf"has no {name} or {name}\.gz: an MNIST-like data set has four IDX files"):
        load_images(folder)


def test_read_idx(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx_bytes(array))
    assert np.array_equal(read_idx(tmp_path / "a", 3), array)
    with pytest.raises(ImageError, match="with 1 axes"):
        read_idx(tmp_path / "a", 1)
    with pytest.raises(ImageError, match="b cannot be read: No such file"):
        read_idx(tmp_path / "b", 3)


# ----------------------------------------------------------------------------------------------------------------------
# a folder of images
# ----------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_images(tmp_path):
    data = load_images(write_images(tmp_path / "pictures", n=24))
    assert data.images.shape == (24, SIDE, SIDE, 1) and data.classes == tuple(sorted(CLASSES))
    assert np.bincount(data.labels).tolist() == [8, 8, 8] and data.test == 0
    assert data.path == str((tmp_path / "pictures").resolve()) and "24 images in 3 classes" in data.source
    images, labels = stripes(24)
    for label, name in enumerate(data.classes):
        found = data.images[data.labels == label, ..., 0] * 255
        np.testing.assert_allclose(found, images[labels == CLASSES.index(name)], atol=1e-4)
    train, test = split_images(data, 0.25, seed=0)
    assert sorted([*train, *test]) == [*range(24)]
    assert np.bincount(data.labels[test]).tolist() == [2, 2, 2]  # of every class
    assert [part.tolist() for part in split_images(data, 0.25, seed=0)] == [train.tolist(), test.tolist()]
    assert split_images(data, 0.25, seed=1)[1].tolist() != test.tolist()
    assert np.bincount(data.labels[split_images(data, 0.01, seed=0)[1]]).tolist() == [1, 1, 1]  # at least one
    assert np.bincount(data.labels[split_images(data, 0.99, seed=0)[0]]).tolist() == [1, 1, 1]


def test_what_is_hidden_or_beside_the_classes_is_left_out(tmp_path):
    folder = write_images(tmp_path / "pictures")
    wanted = load_images(folder)
    (folder / "README.txt").write_text("what this is")
    (folder / ".cache").mkdir()
    (folder / "down" / ".DS_Store").write_bytes(b"\0")
    (folder / "down" / ".thumbnails").mkdir()
    found = load_images(folder)
    assert found.sha256 == wanted.sha256


def only_one_class(folder):
    shutil.rmtree(folder / "across")
    shutil.rmtree(folder / "down")


def broken(data):
    """A PNG file whose last pixels are not there."""
    return data[: len(data) // 2]


BAD_FOLDERS = {
    "one-class": (
        only_one_class,
        "{0} must have one subfolder for each class, at least two of them: there is only 'diagonal'",
    ),
    "no-class": (lambda f: [shutil.rmtree(f / name) for name in CLASSES], "{0} must have .*: there is none"),
    "empty-class": (lambda f: (f / "empty").mkdir(), "{0}/empty has no images"),
    "class-of-one": (
        lambda f: [path.unlink() for path in sorted((f / "down").iterdir())[1:]],
        "class 'down' has 1 image, it needs at least two",
    ),
    "another-size": (
        lambda f: save(f / "down" / "zz.png", stripes(1, side=5)[0][0]),
        "{0}/down/zz.png is 5 x 5 pixels, expected 6 x 6: resize it first",
    ),
    "not-square": (
        lambda f: save(f / "across" / "000.png", np.zeros((4, 6), np.uint8)),
        "{0}/across/000.png is 6 x 4 pixels: images must be square",
    ),
    "broken": (lambda f: change(f / "down" / "001.png", broken), "{0}/down/001.png cannot be read as an image"),
    "no-image-inside": (
        lambda f: (f / "down" / "001.png").write_text("text"),
        "{0}/down/001.png cannot be read as an image",
    ),
    "empty-file": (lambda f: (f / "down" / "001.png").write_bytes(b""), "{0}/down/001.png cannot be read as an image"),
    "text-between": (
        lambda f: (f / "down" / "notes.txt").write_text("text"),
        "{0}/down/notes.txt is not an image .*: move it out",
    ),
    "folder-inside": (lambda f: (f / "down" / "more").mkdir(), "{0}/down/more is a folder inside of a class"),
    "32-bits": (
        lambda f: save(f / "down" / "zz.tif", np.ones((6, 6), np.int32) << 20),
        "{0}/down/zz.tif has 32 bits in a pixel",
    ),
    "float": (
        lambda f: save(f / "down" / "zz.tif", np.ones((6, 6), np.float32)),
        "{0}/down/zz.tif has 32 bits in a pixel",
    ),
    "missing": (shutil.rmtree, "there is no folder '{0}'; data sets by name: digits, fashion-mnist"),
    "a-file": (lambda f: [shutil.rmtree(f), f.write_text("text")], "{0} is a file: give a folder"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_named_and_nothing_is_written(tmp_path, toy_command, case):
    damage, message = BAD_FOLDERS[case]
    folder = write_images(tmp_path / "pictures")
    load_images(folder)
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = toy_command("train", "vit-tiny", f"--data={folder}", "--out=run")
    assert (code, out, one_sentence(err)) == (2, "", True)
    assert re.search(message.format(re.escape(str(folder))), err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_very_large_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "pictures")
    save(folder / "down" / "zz.png", np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(pillow.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"zz\.png is 40 x 40 pixels, expected 6 x 6"):
        read_image(folder / "down" / "zz.png", 6, 1)
    monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"zz\.png cannot be read as an image: .*1600 pixels.* exceeds limit"):
        read_image(folder / "down" / "zz.png", 40, 1)


def test_kinds_of_pixels(tmp_path):
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (5, 5), np.uint8), rng.integers(0, 256, (5, 5, 3), np.uint8)
    seen = rng.integers(0, 256, (5, 5, 1), np.uint8)
    share = seen / 255.0
    deep = rng.integers(0, 65536, (5, 5), np.uint16)
    path = tmp_path / "image.png"

    def close(given, wanted, atol=1e-6):
        assert given.dtype == np.float32
        np.testing.assert_allclose(given, wanted, rtol=0, atol=atol)

    save(path, grey)
    close(read_image(path, 5, 1)[..., 0], grey / 255)
    close(read_image(path, 5, 3), np.repeat(grey[..., None], 3, axis=2) / 255)
    save(path, colour)
    close(read_image(path, 5, 3), colour / 255)
    close(read_image(path, 5, 1)[..., 0], colour @ [0.299, 0.587, 0.114] / 255, atol=1 / 255)
    close(read_image(path, 5, 4), np.concatenate([colour / 255, np.ones((5, 5, 1))], axis=2))
    save(path, np.concatenate([colour, seen], axis=2))  # transparent pixels are seen on white
    close(read_image(path, 5, 3), share * colour / 255 + (1 - share), atol=2 / 255)
    close(read_image(path, 5, 4), np.concatenate([colour / 255, share], axis=2))
    save(path, np.concatenate([grey[..., None], seen], axis=2))
    close(read_image(path, 5, 1), share * grey[..., None] / 255 + (1 - share), atol=2 / 255)
    save(path, deep)
    close(read_image(path, 5, 1)[..., 0], deep / 65535)
    close(read_image(path, 5, 3), np.repeat(deep[..., None], 3, axis=2) / 65535)
    close(read_image(path, 5, 4)[..., 3], np.ones((5, 5)))
    save(path, grey > 127)
    close(read_image(path, 5, 1)[..., 0], grey > 127)
    save(path, colour, mode="P")
    assert read_image(path, 5, 3).shape == (5, 5, 3)
    with pytest.raises(ImageError, match=r"image\.png: image files have 1, 3 or 4 channels, the model reads 2"):
        read_image(path, 5, 2)
    big_endian = tmp_path / "image.tif"
    pillow.frombytes("I;16B", (5, 5), deep.astype(">u2").tobytes()).save(big_endian)
    with pillow.open(big_endian) as image:
        assert image.mode == "I;16B"
    close(read_image(big_endian, 5, 1)[..., 0], deep / 65535)


def test_a_photo_is_turned_as_the_camera_was_held(tmp_path):
    image = np.arange(25, dtype=np.uint8).reshape(5, 5) * 10
    exif = pillow.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees clockwise
    pillow.fromarray(image).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_allclose(read_image(tmp_path / "photo.png", 5, 1)[..., 0] * 255, np.rot90(image, -1), atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("LA", 1), ("1", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)]
)
def test_the_first_image_says_how_many_channels_there_are(tmp_path, mode, channels):
    folder = write_images(tmp_path / "pictures")
    first = folder / "across" / "000.png"
    if mode == "I;16":
        save(first, np.full((SIDE, SIDE), 65535, np.uint16))
    else:
        save(first, np.full((SIDE, SIDE, 3), 255, np.uint8), mode)
    data = load_images(folder)
    assert data.images.shape == (25, SIDE, SIDE, channels)
    np.testing.assert_allclose(data.images[0], 1.0, atol=1e-6)  # white is white
    assert load_images(folder, channels=4 - channels).images.shape[3] == 4 - channels  # what a model asks for


# ----------------------------------------------------------------------------------------------------------------------
# batches
# ----------------------------------------------------------------------------------------------------------------------

SMALL = ["--d-model=8", "--heads=2", "--layers=1", "--batch=7", "--steps=4", "--eval-every=2", "--backend=numpy"]
SIZES = {"d_model": 8, "heads": 2, "layers": 1, "backend": "numpy"}


def start_of(folder, **options):
    return Training(ViTTinyOptions(data=str(folder), **{**SIZES, **options})).start


def test_every_image_comes_once_an_epoch(tmp_path):
    start = start_of(write_idx(tmp_path / "idx"), augment="none", batch=7)
    n = start.n_train
    assert n == 24
    originals = {start.normalise(image).tobytes(): i for i, image in enumerate(start.data.images[start.train])}
    assert len(originals) == n
    seen = []
    for step in range(24):  # 168 images: 7 epochs, and no step begins where an epoch does
        images, labels = start.training_batch(step)
        assert images.shape == (7, SIDE, SIDE, 1)
        places = [originals[image.tobytes()] for image in images]
        assert start.data.labels[start.train[places]].tolist() == labels.tolist()
        seen += places
    epochs = np.reshape(seen, (7, n))
    assert all(sorted(epoch) == [*range(n)] for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 7  # each in an order of its own


def test_a_batch_may_be_larger_than_the_data(tmp_path):
    start = start_of(write_idx(tmp_path / "idx", n_train=6, n_test=4), augment="none", batch=20, steps=1)
    _, labels = start.training_batch(0)
    assert np.bincount(labels).sum() == 20 and start.logits().shape == (4, 3)


@pytest.mark.parametrize("augment", ["affine", "none"])
def test_a_batch_is_a_function_of_seed_and_step(tmp_path, augment):
    folder = write_idx(tmp_path / "idx")
    first, again, other = (start_of(folder, augment=augment, seed=seed) for seed in (0, 0, 1))
    late = again.training_batch(9)  # asked for first
    for step in (3, 9):
        (a, labels_a), (b, labels_b) = first.training_batch(step), again.training_batch(step) if step != 9 else late
        assert np.array_equal(a, b) and np.array_equal(labels_a, labels_b)
    assert not np.array_equal(first.training_batch(3)[0], other.training_batch(3)[0])
    assert not np.array_equal(first.training_batch(3)[0], first.training_batch(4)[0])


def test_the_order_of_an_epoch():
    orders = [epoch_order(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == [*range(50)] for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and orders[0] == epoch_order(50, 0, 0).tolist()


def test_deformed_images_are_a_little_different_and_stay_in_range(tmp_path):
    data = load_images(write_idx(tmp_path / "idx", side=12))
    given = data.images.copy()
    found = deformed(data.images, seed=0, step=3)
    assert np.array_equal(data.images, given) and found.shape == given.shape and found.dtype == np.float32
    assert found.min() >= 0 and found.max() <= 1
    difference = np.abs(found - given).mean(axis=(1, 2, 3))
    assert difference.min() > 0.01  # every one
    assert np.array_equal(found, deformed(data.images, 0, 3)) and not np.array_equal(found, deformed(data.images, 0, 4))
    blob = np.zeros((64, 15, 15, 2), np.float32)
    blob[:, 5:10, 5:10] = [1.0, 0.5]
    moved = deformed(blob, seed=0, step=0)
    np.testing.assert_allclose(moved[..., 1], moved[..., 0] / 2, atol=1e-6)  # all channels of an image alike
    rows, columns = np.mgrid[:15, :15]
    mass = moved[..., 0].sum(axis=(1, 2))
    centres = np.stack([(moved[..., 0] * axis).sum(axis=(1, 2)) / mass for axis in (rows, columns)], axis=1) - 7
    assert np.abs(centres).max() < 2.5 and np.abs(centres.mean(axis=0)).max() < 0.5 < centres.std()
    assert mass.min() > 12 and mass.max() < 45  # of 25: stretched by at most e^0.12 each way, and slanted


def test_normalisation_is_of_the_training_part(tmp_path):
    start = start_of(write_idx(tmp_path / "idx"))
    training = start.data.images[start.train]
    assert start.normalise == (pytest.approx(training.mean(dtype=float)), pytest.approx(training.std(dtype=float)))
    normalised = start.normalise(training)
    assert normalised.dtype == np.float32
    assert abs(normalised.mean(dtype=float)) < 1e-5 and abs(normalised.std(dtype=float) - 1) < 1e-5
    flat = Normalisation.of(np.full((2, 3, 3, 1), 0.25, np.float32))
    assert flat == (0.25, 1.0)  # nothing to divide by


def test_score_and_confusion():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]])
    labels = np.array([0, 1, 2, 2])
    loss, accuracy = score(logits, labels)
    assert loss == pytest.approx(-np.log([0.7, 0.8, 0.25, 0.6]).mean()) and accuracy == 0.75
    assert confusion(logits, labels, 3).tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


def test_the_default_patch_divides_the_image():
    cases = {(8, 4): 4, (28, 7): 7, (32, 8): 8, (30, 7.5): 6, (13, 4): 13, (64, 16): 16, (6, 4): 3}
    assert {case: nearest_divisor(*case) for case in cases} == cases


# ----------------------------------------------------------------------------------------------------------------------
# the commands
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(toy_command, tmp_path):
    """A run that has learnt the stripes of a folder of images."""
    write_images(tmp_path / "pictures", n=60)
    options = [*SMALL, "--d-model=16", "--steps=120", "--eval-every=60", "--lr=0.01", "--augment=none", "--batch=16"]
    code, out, err = toy_command("train", "vit-tiny", "--data=pictures", *options, "--out=run")
    assert (code, err) == (0, "")
    Path("run.txt").write_text(out)
    return Path("run")


def test_train_prints_what_it_does_and_leaves_its_pictures(run_folder):
    out = Path("run.txt").read_text()
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "pictures (60 images in 3 classes)" in lines["data"]
    assert "48 to train on, 12 to test (6 x 6 pixels, 1 channel)" in lines["images"]
    assert "3 (across, diagonal, down)" in lines["classes"]
    assert "vit: 1 layers, 2 heads, 16 wide (4 patches of 3 x 3)" in lines["model"]
    assert re.search(
        r"^step  60/120  smoothed loss \d\.\d{3}  val \d\.\d{3}  \d+\.\d % right  \S+ img/s  \d:\d\d left$", out, re.M
    )
    assert re.search(
        r"^done: 120 steps in 0:\d\d\nloss      smoothed \S+, validation \S+ nats per image, \d+\.\d % right$",
        out,
        re.M,
    )
    assert re.fullmatch(r"try it    .*toy predict run IMAGE\.\.\.", out.splitlines()[-1])
    for name in ("loss.png", "confusion.png"):
        assert (run_folder / name).read_bytes().startswith(b"\x89PNG")
    assert not list(run_folder.glob("weights/*.gguf"))  # llama.cpp has no such model
    assert not (run_folder / "samples.txt").exists()
    last = [event for event in read_events(run_folder / "events.jsonl") if event["kind"] == "eval"][-1]
    assert last["accuracy"] >= 0.9
    config = json.loads((run_folder / "config.json").read_text())
    assert config["classes"] == ["across", "diagonal", "down"] and config["data"]["test_images"] == 12
    assert config["training"]["data"] == str(Path("pictures").resolve())


def test_predict_names_what_is_on_an_image(toy_command, run_folder):
    paths = [*sorted(Path("pictures/down").iterdir())[:8], *sorted(Path("pictures/across").iterdir())[:8]]
    code, out, err = toy_command("predict", run_folder, *paths)
    assert (code, err) == (0, "")
    pattern = r"(\S+) +(\w+) (\d+\.\d) %  \((\w+) \d+\.\d %, (\w+) \d+\.\d %\)"
    rows = [re.fullmatch(pattern, line).groups() for line in out.splitlines()]
    assert [row[0] for row in rows] == [str(path) for path in paths]
    assert sum(row[1] == path.parent.name for row, path in zip(rows, paths)) >= 14
    assert all({row[1], row[3], row[4]} == set(CLASSES) for row in rows)

    code, out, _ = toy_command("predict", run_folder, *paths, "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["image"] for record in records] == [str(path) for path in paths]
    for record, row in zip(records, rows):
        probabilities = record["probabilities"]
        assert list(probabilities) == sorted(CLASSES) and sum(probabilities.values()) == pytest.approx(1)
        assert record["class"] == row[1] == max(probabilities, key=probabilities.get)
        assert f"{100 * probabilities[record['class']]:.1f}" == row[2]
    checkpoint = next(iter(run_folder.glob("weights/step_120.safetensors")))
    assert toy_command("predict", checkpoint, *paths, "--json")[1] == out


def test_predict_refuses_what_it_cannot_look_at(toy_command, run_folder):
    good = next(iter(sorted(Path("pictures/down").iterdir())))
    save("large.png", np.zeros((9, 9), np.uint8))
    Path("broken.png").write_bytes(broken(good.read_bytes()))
    Path("text.png").write_text("text")
    refused = {
        "nowhere.png": "there is no image nowhere.png",
        "large.png": "large.png is 9 x 9 pixels, expected 6 x 6: resize it first",
        "broken.png": "broken.png cannot be read as an image",
        "text.png": "text.png cannot be read as an image",
        "pictures": "pictures cannot be read as an image: Is a directory",
    }
    for name, message in refused.items():
        code, out, err = toy_command("predict", run_folder, good, name)
        assert (code, out, one_sentence(err)) == (2, "", True), name  # nothing is said of the good one either
        assert message in err
    code, out, err = toy_command("predict", run_folder)
    assert (code, out, "IMAGE" in err) == (2, "", True)
    assert toy_command("predict", "nowhere", good)[0] == 2
    assert toy_command("predict", run_folder, good)[0] == 0


def test_eval_measures_the_test_part_or_a_data_set(toy_command, run_folder):
    code, out, err = toy_command("eval", run_folder, "--json")
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record.keys() == {"loss", "accuracy", "n_images", "checkpoint"}
    last = [event for event in read_events(run_folder / "events.jsonl") if event["kind"] == "eval"][-1]
    assert (record["n_images"], record["checkpoint"]) == (12, 120)
    assert record["accuracy"] == last["accuracy"] and record["loss"] == pytest.approx(last["loss"], abs=1e-5)
    code, out, _ = toy_command("eval", run_folder)
    assert code == 0 and re.search(r"^right +\d+\.\d\d %$", out, re.M) and re.search(r"^images +12$", out, re.M)
    everything = json.loads(toy_command("eval", run_folder, "--data=pictures", "--json")[1])
    assert everything["n_images"] == 60
    shutil.copytree("pictures", "others")
    assert json.loads(toy_command("eval", run_folder, "--data=others", "--json")[1]) == everything


def test_eval_refuses_other_data(toy_command, run_folder):
    write_images(Path("larger"), side=9)
    shutil.copytree("pictures", "renamed")
    Path("renamed/down").rename("renamed/up")
    write_idx(Path("idx"))
    refused = {
        ("--data=nowhere",): "there is no folder 'nowhere'",
        ("--data=larger",): "larger/across/002.png is 9 x 9 pixels, expected 6 x 6",
        ("--data=renamed",): "has the classes across, diagonal, up, the model across, diagonal, down",
        ("--data=idx",): "has the classes 0, 1, 2, the model",
        ("--corpus=text.txt",): "--corpus is for models that read text",
        ("--context=3",): "--context is for models that read text",
        ("--tokens-out=a.csv",): "--tokens-out is for models that read text",
        ("--adapter=pictures",): "LoRA adapters belong to a llama or a gpt2, this is a vit",
    }
    for arguments, message in refused.items():
        code, out, err = toy_command("eval", run_folder, *arguments)
        assert (code, out, one_sentence(err), message in err) == (2, "", True, True), err
    save("pictures/down/zz.png", stripes(1)[0][0])  # the test part of other images would be another one
    code, _, err = toy_command("eval", run_folder)
    assert (code, one_sentence(err)) == (2, True) and "not the images that the model was trained on" in err


def test_a_model_of_images_of_another_size_with_the_same_classes_is_refused(toy_command):
    write_idx(Path("small"))
    write_idx(Path("large"), side=9)
    assert toy_command("train", "vit-tiny", "--data=small", *SMALL, "--out=run")[0] == 0
    code, _, err = toy_command("eval", "run", "--data=large")
    assert (code, one_sentence(err)) == (2, True)
    assert "has images of 9 x 9 pixels and 1 channels, the model reads 6 x 6 and 1" in err


def test_what_is_for_text_says_so_of_an_image_model(toy_command, run_folder):
    code, _, err = toy_command("generate", run_folder)
    assert (code, one_sentence(err)) == (2, True) and "reads images: toy predict is for it" in err
    code, _, err = toy_command("export", run_folder)
    assert (code, one_sentence(err)) == (2, True) and "ViTConfig" in err and not list(Path().glob("*.gguf"))
    assert toy_command("plot", run_folder, "--out=curve.png")[0] == 0
    text = "".join(f"{i} and then comes {i + 1}.\n" for i in range(200))
    Path("text.txt").write_text(text)
    options = ["--d-model=8", "--heads=2", "--layers=1", "--context=8", "--steps=1", "--backend=numpy", "--out=words"]
    assert toy_command("train", "from-scratch", "--corpus=text.txt", *options)[0] == 0
    code, _, err = toy_command("predict", "words", "pictures/down/001.png")
    assert (code, one_sentence(err)) == (2, True) and "reads text: toy generate and toy eval are for it" in err
    code, _, err = toy_command("eval", "words", "--data=pictures")
    assert (code, one_sentence(err)) == (2, True) and "--data is for image models" in err


def test_resume_from_the_command_line(toy_command):
    write_images(Path("pictures"))
    options = ["--data=pictures", *SMALL, "--eval-every=3", "--schedule=constant"]
    assert toy_command("train", "vit-tiny", *options, "--steps=9", "--out=whole")[0] == 0
    assert toy_command("train", "vit-tiny", *options, "--steps=4", "--out=parts")[0] == 0
    code, out, err = toy_command("train", "vit-tiny", "--resume=parts", "--steps=9")
    assert (code, err) == (0, "") and "after step 4" in out

    def steps(folder):
        events = [event for event in read_events(Path(folder, "events.jsonl")) if event["kind"] == "step"]
        return [(event["step"], event["loss"], event["grad_norm"]) for event in events]

    assert steps("parts") == steps("whole") and len(steps("whole")) == 9
    parts, whole = (read_checkpoint(Path(run, "weights/step_9.safetensors")) for run in ("parts", "whole"))
    for a, b in zip((parts.parameters, *parts.moments.values()), (whole.parameters, *whole.moments.values())):
        assert all(a[name].tobytes() == b[name].tobytes() for name in b)

    refused = {
        ("--patch-size=1",): "begun with patch_size 3 and cannot go on with 1",
        ("--val-fraction=0.5",): "begun with val_fraction 0.2 and cannot go on with 0.5",
        ("--augment=none",): "begun with augment affine and cannot go on with none",
    }
    for arguments, message in refused.items():
        code, _, err = toy_command("train", "vit-tiny", "--resume=parts", "--steps=12", *arguments)
        assert (code, one_sentence(err), message in err) == (2, True, True), err
    save("pictures/down/zz.png", stripes(1)[0][0])
    code, _, err = toy_command("train", "vit-tiny", "--resume=parts", "--steps=12")
    assert (code, one_sentence(err)) == (2, True) and "are not the images this run was trained on" in err
    code, _, err = toy_command("train", "from-scratch", "--resume=parts", "--steps=12")
    assert (code, one_sentence(err)) == (2, True) and "toy train vit-tiny --resume goes on with it" in err


BAD_OPTIONS = {
    "--patch-size=4": "patch_size must divide image_size: 6 / 4 leaves 2 pixels",
    "--patch-size=0": "patch_size must be at least 1",
    "--heads=3": "n_heads must divide d_model",
    "--val-fraction=1": "val_fraction must lie between 0 and 1",
    "--augment=flip": "'flip' is not one of 'affine', 'none'",
    "--init-scale=0": "init_scale must be a positive number",
    "--corpus=text.txt": "No such option",
}


@pytest.mark.parametrize("option", BAD_OPTIONS)
def test_bad_options_are_one_sentence_and_leave_nothing_behind(toy_command, option):
    write_images(Path("pictures"))
    before = sorted(Path().rglob("*"))
    code, out, err = toy_command("train", "vit-tiny", "--data=pictures", *SMALL, option, "--out=run")
    assert (code, out, one_sentence(err), BAD_OPTIONS[option] in err) == (2, "", True, True), err
    assert sorted(Path().rglob("*")) == before


# ----------------------------------------------------------------------------------------------------------------------
# from Python
# ----------------------------------------------------------------------------------------------------------------------


def test_a_classifier_takes_one_path_or_none_and_numbers_from_0_to_1(run_folder):
    classifier = Classifier(run_folder, "numpy")
    path = next(iter(sorted(Path("pictures/down").iterdir())))
    (alone,) = classifier.predict(path)
    assert alone == classifier.predict([str(path)])[0]._replace(path=path)
    assert classifier.predict([]) == []
    assert classifier.logits(np.zeros((0, 6, 6, 1))).shape == (0, 3)
    image = read_image(path, 6, 1)
    assert np.array_equal(classifier.logits(image[None]), classifier.logits(image[None, ..., 0]))
    for wrong in (image[None] * 255, classifier.normalise(image[None]), np.full((1, 6, 6, 1), np.nan)):
        with pytest.raises(ValueError, match="images must be numbers from 0 to 1"):
            classifier.logits(wrong)


def test_a_large_batch_is_read_in_parts(run_folder, monkeypatch):
    from toy.trained import classify

    classifier, data = Classifier(run_folder, "numpy"), load_images("pictures")
    whole = classifier.logits(data.images)
    monkeypatch.setattr(classify, "_ROWS", 7)
    np.testing.assert_allclose(classifier.logits(data.images), whole, rtol=0, atol=1e-5)
