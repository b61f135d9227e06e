"""Small data sets of images to write in tests: stripes in three directions, as IDX files or as a folder of PNG images."""

import gzip

import numpy as np

CLASSES = ("diagonal", "down", "across")
SIDE = 6


def stripes(n, seed=0, side=SIDE):
    """n images, uint8 (n, side, side), and their labels, int (n,): the class is the direction of the stripes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    rows, columns = np.mgrid[:side, :side]
    phases = np.stack([rows + columns, columns, rows])[labels] + rng.integers(0, 3, n)[:, None, None]
    noise = rng.integers(-30, 31, (n, side, side))
    return np.clip(220 * (phases % 3 == 0) + 15 + noise, 0, 255).astype(np.uint8), labels


def idx_bytes(array):
    """An array of bytes in the IDX format of MNIST."""
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + np.asarray(array, np.uint8).tobytes()


def write_idx(folder, n_train=24, n_test=9, compressed=False, side=SIDE):
    """The four IDX files of an MNIST-like data set. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, n, seed in (("train", n_train, 0), ("t10k", n_test, 1)):
        images, labels = stripes(n, seed, side)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            data = idx_bytes(array)
            path = folder / (f"{name}.gz" if compressed else name)
            path.write_bytes(gzip.compress(data) if compressed else data)
    return folder


def write_images(folder, n=24, side=SIDE):
    """One subfolder a class with PNG images in it. Returns the folder. Needs pillow."""
    from PIL import Image

    images, labels = stripes(n, side=side)
    for i, (image, label) in enumerate(zip(images, labels)):
        subfolder = folder / CLASSES[label]
        subfolder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(subfolder / f"{i:03}.png")
    return folder
