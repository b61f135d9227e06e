"""What every kind of training can be told: each option once, with its default, its help and its bounds.

A recipe's options are a dataclass in the recipe's own file. Its fields become the flags of `toy train`: the name, the type
and the default are the field's, the rest stands in its metadata (`option`).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, SupportsIndex

from toy.config import PRECISIONS, WEIGHT_DTYPES, check_positive_int
from toy.data.encoding import TRAIN_ON
from toy.data.training_data import SPLITS
from toy.switch import BACKEND_NAMES, MOST_THREADS
from toy.training import schedules

if TYPE_CHECKING:
    from typing_extensions import Self

# the sections of `toy train RECIPE --help`
DATA, MODEL, STEPS, REPORTS, MACHINE = "Data", "Model", "Training", "Reports and files", "Machine"
LARGEST = 2**31 - 1  # of whole numbers: sizes, steps, seeds
RECOMPUTE = {"auto": None, "on": True, "off": False}  # and what `RecipeOptions` calls it


def option(
    default: Any,
    help: str,
    group: str,
    *,
    shown: str | None = None,
    choices: tuple[str, ...] | None = None,
    resumable: bool = False,
    at_least: int | None = None,
    at_most: int = LARGEST,
    several: bool = False,
    alone: str | None = None,
) -> Any:
    """A field of an options dataclass.

    shown: the default in words, where the value does not say it. choices: the values there are. resumable: whether a run
    may go on with another value. at_least: the smallest value of a whole number; None there means "not said", not a
    bound. at_most: the largest. several: whether the flag may be given more than once. alone: the value that the flag stands
    for when none is said.
    """
    metadata = {
        "help": help, "group": group, "shown": shown, "choices": choices, "resumable": resumable, "at_least": at_least,
        "at_most": at_most, "several": several, "alone": alone,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def again(name: str, default: Any, of: type["RunOptions"], **changes: Any) -> Any:
    """The option `name` of the options class `of` with another default, and other words where `changes` has them."""
    field = next(field for field in dataclasses.fields(of) if field.name == name)
    return dataclasses.field(default=default, metadata={**field.metadata, **changes})


@dataclass(frozen=True)
class RunOptions:
    """What every kind of training can be told. Raises ValueError for a value out of range."""

    recipe: ClassVar[str]  # the name on the command line and in config.json

    steps: int = option(1000, "Training steps in all.", STEPS, resumable=True, at_least=1)
    epochs: float | None = option(
        None, "In place of --steps: passes over the training part.", STEPS, shown="by steps", resumable=True
    )
    minutes: float | None = option(
        None,
        "In place of --steps: as many as take this long, by the time of a step measured at the start.",
        STEPS,
        shown="by steps",
        resumable=True,
    )
    batch: int = option(12, "Sequences in a step.", STEPS, at_least=1)
    accumulate: int = option(1, "Batches of that size that make one step, in the memory of one.", STEPS, at_least=1)
    lr: float = option(1e-3, "Learning rate.", STEPS)
    schedule: str = option("constant", "Learning rate after the warm-up.", STEPS, choices=schedules.NAMES)
    warmup: int | None = option(None, "Steps of linear warm-up.", STEPS, shown="20", at_least=0)
    lr_floor: float = option(0.1, "Where cosine and wsd end, as a fraction of --lr.", STEPS)
    cooldown: float = option(0.2, "Share of the steps in which wsd goes down.", STEPS)
    weight_decay: float = option(0.0, "AdamW's weight decay, of matrices and embeddings.", STEPS)
    beta1: float = option(0.9, "AdamW's decay of the mean gradient.", STEPS)
    beta2: float | None = option(
        None, "AdamW's decay of the mean square.", STEPS, shown="0.999 bias-corrected, else 0.95"
    )
    eps: float = option(1e-8, "AdamW's epsilon.", STEPS)
    clip: float = option(1.0, "Largest gradient norm, 0 = no clipping.", STEPS)
    seed: int = option(0, "Of the weights, the batches and the samples.", STEPS, at_least=0)
    eval_every: int | None = option(
        None,
        "Steps between validations.",
        REPORTS,
        shown="a tenth of the steps, at most 500",
        resumable=True,
        at_least=1,
    )
    save_every: int | None = option(
        None, "Steps between checkpoints.", REPORTS, shown="as --eval-every", resumable=True, at_least=1
    )
    keep: int = option(
        2, "Newest checkpoints to keep; the best one is kept besides.", REPORTS, resumable=True, at_least=1
    )
    patience: int | None = option(
        None,
        "Stop after so many validations without a lower loss.",
        REPORTS,
        shown="never",
        resumable=True,
        at_least=1,
    )
    weight_dtype: str = option(
        "f32", "Type of the weights a step computes with; float32 masters stay.", MACHINE, choices=WEIGHT_DTYPES
    )
    precision: str = option(
        "f32", "Of the products of linear layers: bf16 rounds what is multiplied; sums stay float32.", MACHINE,
        choices=PRECISIONS,
    )  # fmt: skip
    recompute: str = option(
        "auto", "Compute blocks again in the backward, to save their memory; auto: where it would not do.", MACHINE,
        choices=tuple(RECOMPUTE), resumable=True, alone="on",
    )  # fmt: skip
    backend: str = option("auto", f"One of {', '.join(BACKEND_NAMES)}.", MACHINE, resumable=True)
    device: str = option(
        "auto",
        "Device of the backend: of ggml cpu, cuda, metal, vulkan, or a name of `toy backends`.",
        MACHINE,
        resumable=True,
    )
    threads: int | None = option(
        None, "Threads of BLAS and the kernels.", MACHINE, shown="the backend's own choice", resumable=True, at_least=1,
        at_most=MOST_THREADS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, at_least = getattr(self, field.name), field.metadata.get("at_least")
            if at_least is not None and not (value is None and field.default is None):
                object.__setattr__(
                    self, field.name, check_whole(field.name, value, at_least, field.metadata["at_most"])
                )
            choices = field.metadata.get("choices")
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, got {value!r}")
        budgets = [name for name in self.budgets if getattr(self, name) is not None]
        for name in budgets:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)}")
        if len(budgets) > 1:
            raise ValueError(f"{' and '.join(budgets)} each say how long to train: give one of them")
        for name in ("weight_decay", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        self.make_schedule()

    def resolved(self) -> "Self":
        """The same options with every None that depends on others filled in."""
        eval_every = self.eval_every or min(max(1, self.steps // 10), 500)
        return dataclasses.replace(
            self, warmup=self._default_warmup(), eval_every=eval_every, save_every=self.save_every or eval_every
        )

    def make_schedule(self) -> schedules.Schedule:
        """The learning rate as a function of the step, counted from 0."""
        warmup = self._default_warmup()
        return schedules.make_schedule(self.schedule, self.lr, self.steps, warmup, self.lr_floor, self.cooldown)

    @property
    def rows(self) -> int:
        """Sequences (images) in a step, of all its batches."""
        return self.batch * self.accumulate

    budgets: ClassVar[tuple[str, ...]] = ("epochs", "minutes")  # what may be said in place of steps

    @property
    def budget(self) -> str | None:
        """Which of `budgets` is given."""
        return next((name for name in self.budgets if getattr(self, name) is not None), None)

    def with_steps(self, steps: int, asked: "RunOptions") -> "Self":
        """These many steps in place of a budget. asked: the options as they were given: what they do not say and what depends
        on the steps is filled in anew."""
        names = [name for name in ("warmup", "eval_every", "save_every", "sample_every") if hasattr(self, name)]
        none: dict[str, Any] = dict.fromkeys([*self.budgets, *(name for name in names if getattr(asked, name) is None)])
        return dataclasses.replace(self, steps=check_whole("steps", steps, 1), **none).resolved()

    def _default_warmup(self) -> int:
        if self.warmup is not None:
            return self.warmup
        # a fixed number, not a share of the steps: a longer run then begins like a shorter one
        return 20 if self.schedule == "constant" else min(20, self.steps // 10)


@dataclass(frozen=True)
class TextOptions(RunOptions):
    """What training on text can be told besides. Raises ValueError for a value out of range."""

    corpus: str | tuple[str, ...] | None = option(
        None,
        "Text file, .jsonl, .bin or a folder of them; may be given several times.",
        DATA,
        shown="the documentation inside Python",
        resumable=True,
        several=True,
    )
    valid: str | None = option(
        None, "File or folder to validate on.", DATA, shown="a share of --corpus", resumable=True
    )
    val_fraction: float = option(0.1, "Share of the documents to validate on, without --valid.", DATA)
    split: str = option(
        "spread", "Where that share lies: spread over the corpus, or its tail joined to one text.", DATA, choices=SPLITS
    )
    train_on: str = option("answers", "Of prompts and conversations: what is learned.", DATA, choices=TRAIN_ON)
    tokens: float | None = option(
        None, "In place of --steps: tokens to train on, 1e6 for a million.", STEPS, shown="by steps", resumable=True
    )
    context: int | None = option(64, "Tokens in a sequence.", STEPS, at_least=1)
    eval_batches: int = option(16, "Batches in a validation.", REPORTS, at_least=1)
    sample_every: int | None = option(
        None,
        "Steps between samples, 0 = none.",
        REPORTS,
        shown="a quarter of the steps, at most 2000",
        resumable=True,
        at_least=0,
    )
    sample_tokens: int = option(200, "Tokens in a sample.", REPORTS, at_least=1, at_most=1_000_000)
    sample_prompt: str | None = option(
        None,
        "Text a sample goes on from; of conversations, a message to answer.",
        REPORTS,
        shown="a new line; of examples, the first prompt to validate on",
        resumable=True,
    )
    sample_temperature: float = option(0.8, "Of the samples, 0 = always the likeliest.", REPORTS, resumable=True)

    budgets: ClassVar[tuple[str, ...]] = ("epochs", "tokens", "minutes")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("val_fraction", self.val_fraction)
        if not (math.isfinite(self.sample_temperature) and self.sample_temperature >= 0):
            raise ValueError(f"sample_temperature must be a number of at least 0, got {self.sample_temperature}")
        if isinstance(self.corpus, (tuple, list)):  # one path stands for itself
            several = tuple(map(str, self.corpus))
            object.__setattr__(self, "corpus", several if len(several) > 1 else several[0] if several else None)

    @property
    def corpora(self) -> list[Path] | None:
        """The paths to read, None for the default corpus."""
        if self.corpus is None:
            return None
        return [Path(path) for path in ((self.corpus,) if isinstance(self.corpus, str) else self.corpus)]

    def resolved(self) -> "Self":
        every = min(max(1, self.steps // 4), 2000) if self.sample_every is None else self.sample_every
        return dataclasses.replace(super().resolved(), sample_every=every)


@dataclass(frozen=True)
class FromModelOptions(TextOptions):
    """What the recipes that begin with a model have in common. Raises ValueError when none is named."""

    model: str = option(
        "", "GGUF file, Hugging Face folder, or the name of a fetched model (toy fetch).", MODEL, resumable=True
    )
    steps: int = again("steps", 100, TextOptions)
    batch: int = again("batch", 1, TextOptions)
    context: int | None = again("context", 128, TextOptions)
    eval_batches: int = again("eval_batches", 8, TextOptions)
    sample_tokens: int = again("sample_tokens", 60, TextOptions)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is missing: the path of a GGUF file, or the name of a fetched model")
        super().__post_init__()


def saved_options(kind: type[RunOptions], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a config.json has, by name; those that a run was begun without are what they were then."""
    options = dict(saved)
    if "split" in {field.name for field in dataclasses.fields(kind)}:
        options.setdefault("split", "tail")
    return options


def check_whole(name: str, value: SupportsIndex, at_least: int, at_most: int = LARGEST) -> int:
    """`value` as a Python int from `at_least` to `at_most`. Raises ValueError, naming the option, otherwise."""
    if at_least == 1:
        value = check_positive_int(name, value)
    elif isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")
    value = value.__index__()
    if value > at_most:
        raise ValueError(f"{name} must be at most {at_most:,}, got a number of {len(str(value))} digits")
    return value


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies between 0 and 1."""
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
