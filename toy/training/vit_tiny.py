"""ViT-tiny: the options of the run, and how it begins."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from toy import recipes
from toy.config import MOST_LAYERS, ViTConfig
from toy.data.images import Images, Normalisation, deformed, epoch_order, load_images, split_images
from toy.files import BadFileError, Run
from toy.trained.classify import confusion, score
from toy.training.options import DATA, MODEL, RunOptions, again, check_fraction, option
from toy.training.start import Decision, Start

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class ViTTinyOptions(RunOptions):
    """A vision transformer from random weights. Raises ValueError for a value out of range."""

    recipe: ClassVar[str] = "vit-tiny"

    data: str = option(
        "digits", "digits, fashion-mnist, or a folder with one subfolder of images a class.", DATA, resumable=True
    )
    val_fraction: float = option(0.2, "Share of each class to test on, where the data have no test part.", DATA)
    patch_size: int | None = option(
        None,
        "Pixels of a patch's side; they divide the image's.",
        MODEL,
        shown="a quarter of it, 4 to 16",
        at_least=1,
    )
    augment: str = option(
        "affine", "Turn, stretch, slant and move the training images a little.", DATA, choices=("affine", "none")
    )
    d_model: int = option(64, "Width of the residual stream.", MODEL, at_least=1)
    layers: int = option(3, "Blocks.", MODEL, at_least=1, at_most=MOST_LAYERS)
    heads: int = option(4, "Attention heads in a block; they divide the width.", MODEL, at_least=1)
    d_ff: int | None = option(None, "Hidden width of the MLP.", MODEL, shown="4 x d-model", at_least=1)
    init_scale: float = option(1.0, "Multiplies the standard deviations of the first weights.", MODEL)
    steps: int = again("steps", 1000, RunOptions)
    batch: int = again("batch", 64, RunOptions, help="Images in a step.")
    lr: float = again("lr", 3e-3, RunOptions)
    schedule: str = again("schedule", "cosine", RunOptions)
    weight_decay: float = again("weight_decay", 0.05, RunOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("val_fraction", self.val_fraction)

    def resolved(self) -> "Self":
        return dataclasses.replace(super().resolved(), d_ff=self.d_ff or 4 * self.d_model)


class ViTTinyStart(Start):
    """Train a small vision transformer from random weights.

    Without options: scikit-learn's digits, in less than a minute. The run directory gets a picture of what is taken for
    what (confusion.png); toy predict RUN IMAGE... says what is on a picture.
    """

    options_class = ViTTinyOptions
    recipe_class = recipes.ViTTiny
    unit = "image"
    options: ViTTinyOptions
    recipe: recipes.ViTTiny
    config: ViTConfig
    data: Images
    next_command = ("try it", "predict", "IMAGE...")

    def read(self) -> None:
        o = self.options
        self.data = data = load_images(o.data)
        self.train, self.test = split_images(data, o.val_fraction, o.seed)
        self.normalise = Normalisation.of(data.images[self.train])
        image_size, channels = data.images.shape[2:]
        patch = o.patch_size or nearest_divisor(image_size, min(max(image_size / 4, 4), 16))
        self.options = o = dataclasses.replace(o, data=data.path or o.data, patch_size=patch)
        self.config = ViTConfig(
            image_size=image_size,
            channels=channels,
            patch_size=patch,
            d_model=o.d_model,
            n_heads=o.heads,
            d_ff=cast(int, o.d_ff),
            n_layers=o.layers,
            n_classes=len(data.classes),
        )

    def realize(self) -> None:
        options = self.recipe_options(self.config.n_tokens, init_scale=self.options.init_scale)
        self.recipe.realize(self.config, options)

    @property
    def per_step(self) -> int:
        return self.options.rows

    @property
    def n_train(self) -> int:
        return len(self.train)

    def training_batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Every image once an epoch; the epochs follow each other without a gap, so that every step is full."""
        o, n = self.options, self.n_train
        places = np.arange(step * o.rows, (step + 1) * o.rows)
        orders = {epoch: epoch_order(n, o.seed, int(epoch)) for epoch in np.unique(places // n)}
        chosen = self.train[[orders[place // n][place % n] for place in places]]
        images = self.data.images[chosen]
        if o.augment == "affine":
            images = deformed(images, o.seed, step)
        return self.normalise(images), self.data.labels[chosen]

    def logits(self) -> np.ndarray:
        """Of the test part -> float32 (number of test images, classes)."""
        batch, rows = self.options.batch, []
        for start in range(0, len(self.test), batch):
            chosen = self.test[start : start + batch]
            full = np.resize(chosen, batch)  # the last batch repeats some; their rows are dropped
            rows.append(self.recipe.logits(self.normalise(self.data.images[full]))[: len(chosen)])
        return np.concatenate(rows)

    def validate(self) -> dict[str, float]:
        loss, accuracy = score(self.logits(), self.data.labels[self.test])
        return {"loss": loss, "accuracy": accuracy}

    def draw(self, folder: Path) -> dict[str, Path]:
        from toy.plots import plot_confusion

        counts = confusion(self.logits(), self.data.labels[self.test], len(self.data.classes))
        return {"confusion": plot_confusion(counts, self.data.classes, folder / "confusion.png")}

    def decisions(self) -> list[Decision]:
        c, d = self.config, self.data
        size = f"{c.image_size} x {c.image_size} pixels, {c.channels} channel{'s' if c.channels > 1 else ''}"
        tokens = f"{c.n_patches} patches of {c.patch_size} x {c.patch_size}"
        default = "the default; --data names others" if self.options.data == "digits" else ""
        return [
            Decision("data", d.source, default),
            Decision("images", f"{self.n_train:,} to train on, {len(self.test):,} to test", size),
            Decision("classes", f"{len(d.classes)}", ", ".join(d.classes) if len(d.classes) <= 20 else ""),
            Decision("model", f"vit: {c.n_layers} layers, {c.n_heads} heads, {c.d_model} wide", tokens),
        ]

    def describe(self) -> dict[str, Any]:
        d = self.data
        return {
            "classes": list(d.classes),
            "normalisation": self.normalise._asdict(),
            "data": {
                "source": d.source,
                "path": d.path,
                "sha256": d.sha256,
                "train_images": self.n_train,
                "test_images": len(self.test),
            },
        }

    def check_same(self, run: Run) -> None:
        try:
            sha256, source = run.config["data"]["sha256"], run.config["data"]["source"]
        except (KeyError, TypeError) as error:
            raise BadFileError(run.config_path, f"it does not say what the run was trained on ({error})") from error
        if sha256 != self.data.sha256:
            raise ValueError(
                f"{self.data.source} are not the images this run was trained on ({source}): give them with --data, "
                "or start a new run"
            )


def nearest_divisor(number: int, wanted: float) -> int:
    """The divisor of `number` that is nearest to `wanted`, by ratio."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(math.log(d / wanted)))
