"""Everything a run can be told, one dataclass for each kind of training. A None is chosen by `resolved`."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from toy.config import check_positive_int
from toy.data.tokenizers import KINDS
from toy.engines.adapters import check_alpha, check_targets
from toy.models import ARCHITECTURES
from toy.training import schedules


@dataclass(frozen=True)
class RunOptions:
    """What every kind of training can be told. Raises ValueError for a value out of range.

    batch, context: sequences in a step, tokens in a sequence. lr_floor: where the cosine ends, as a fraction of lr.
    clip: largest gradient norm, 0 = off. eval_every, sample_every, save_every: in steps. keep: how many checkpoints stay.
    val_fraction: the part of the text, at its end, that is never trained on. threads: of BLAS and the kernels, None = their
    own choice.
    """

    recipe: ClassVar[str]  # the name on the command line and in config.json

    corpus: str | None = None
    steps: int = 1000
    batch: int = 12
    context: int | None = 64
    lr: float = 1e-3
    schedule: str = "constant"
    warmup: int | None = None
    lr_floor: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_every: int | None = None
    eval_batches: int = 16
    sample_every: int | None = None
    sample_tokens: int = 200
    save_every: int | None = None
    keep: int = 2
    val_fraction: float = 0.1
    seed: int = 0
    backend: str = "auto"
    device: str = "auto"
    threads: int | None = None

    _sizes: ClassVar[tuple] = ("steps", "batch", "eval_batches", "sample_tokens", "keep")
    _optional_sizes: ClassVar[tuple] = ("context", "eval_every", "sample_every", "save_every", "threads")

    def __post_init__(self):
        given = [name for name in self._optional_sizes if getattr(self, name) is not None]
        for name in (*self._sizes, *given):
            object.__setattr__(self, name, check_positive_int(name, getattr(self, name)))
        for name in ("weight_decay", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {getattr(self, name)}")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        self.make_schedule()

    def resolved(self):
        """The same options with every None that depends on others filled in."""
        tenth = max(1, self.steps // 10)
        eval_every = self.eval_every or min(tenth, 500)
        return dataclasses.replace(
            self,
            warmup=self._default_warmup(),
            eval_every=eval_every,
            sample_every=self.sample_every or min(max(1, self.steps // 4), 2000),
            save_every=self.save_every or eval_every,
        )

    def make_schedule(self):
        """The learning rate as a function of the step, counted from 0."""
        return schedules.make_schedule(self.schedule, self.lr, self.steps, self._default_warmup(), self.lr_floor)

    def _default_warmup(self):
        if self.warmup is not None:
            return self.warmup
        # a fixed number, not a share of the steps: a longer run then begins like a shorter one
        return 20 if self.schedule == "constant" else min(20, self.steps // 10)


@dataclass(frozen=True)
class TrainingOptions(RunOptions):
    """A run from scratch. kv_heads: key/value heads of a llama, None = as many as heads."""

    recipe: ClassVar[str] = "from-scratch"

    arch: str = "transformer"
    tokenizer: str = "char"
    d_model: int = 128
    d_ff: int | None = None
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None

    _sizes: ClassVar[tuple] = (*RunOptions._sizes, "context", "d_model", "layers", "heads")
    _optional_sizes: ClassVar[tuple] = ("eval_every", "sample_every", "save_every", "threads", "d_ff", "kv_heads")

    def __post_init__(self):
        _check_name("arch", self.arch, ARCHITECTURES)
        super().__post_init__()

    def resolved(self):
        return dataclasses.replace(super().resolved(), d_ff=self.d_ff or 4 * self.d_model)

    def model_config(self, vocab_size):
        """The config of the model these options describe. Raises ValueError for sizes that do not fit each other."""
        sizes = dict(
            vocab_size=vocab_size,
            d_model=self.d_model,
            n_heads=self.heads,
            d_ff=self.d_ff or 4 * self.d_model,
            n_layers=self.layers,
            context_length=self.context,
        )
        if self.arch == "llama":
            sizes["n_kv_heads"] = self.kv_heads or self.heads
        elif self.kv_heads is not None:
            raise ValueError(f"kv_heads belongs to arch llama: {self.arch} has as many key/value heads as heads")
        return ARCHITECTURES[self.arch].config(**sizes)


@dataclass(frozen=True)
class FromModelOptions(RunOptions):
    """What the recipes that begin with a model have in common. model: its GGUF file, or the name of a fetched model."""

    model: str = ""
    steps: int = 100
    batch: int = 1
    context: int | None = 128
    eval_batches: int = 8
    sample_tokens: int = 60

    def __post_init__(self):
        if not self.model:
            raise ValueError("model is missing: the path of a GGUF file, or the name of a fetched model")
        super().__post_init__()


@dataclass(frozen=True)
class LoRAOptions(FromModelOptions):
    """LoRA on a llama in a GGUF file. alpha: None = rank. targets: some of q, k, v, o, gate, up, down."""

    recipe: ClassVar[str] = "lora"

    rank: int = 8
    alpha: float | None = None
    targets: tuple = ("q",)

    _sizes: ClassVar[tuple] = (*RunOptions._sizes, "context", "rank")

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "alpha", check_alpha(self.alpha, self.rank))
        object.__setattr__(self, "targets", check_targets(self.targets))


@dataclass(frozen=True)
class FullFinetuneOptions(FromModelOptions):
    """Full fine-tuning of a GGUF model, in float32. freeze_embeddings: leave the embedding tables as they are."""

    recipe: ClassVar[str] = "full-finetune"

    lr: float = 3e-5
    freeze_embeddings: bool = False

    _sizes: ClassVar[tuple] = (*RunOptions._sizes, "context")


@dataclass(frozen=True)
class WarmStartOptions(FromModelOptions):
    """A new model that begins with weights of another one.

    model: the donor, a run directory, a checkpoint or a GGUF file. take: shell patterns of the names of the parameters to
    take. lens: see the donor's token embedding, frozen, through a trained projection. tokenizer: "donor", "char" or "bytes".
    Sizes: None = the donor's (with a lens: those of a small llama).
    """

    recipe: ClassVar[str] = "warm-start"

    take: tuple = ("*",)
    lens: bool = False
    tokenizer: str = "donor"
    steps: int = 1000
    batch: int = 12
    context: int | None = None
    arch: str | None = None
    d_model: int | None = None
    d_ff: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    sample_tokens: int = 200

    _optional_sizes: ClassVar[tuple] = (
        *RunOptions._optional_sizes, "d_model", "d_ff", "layers", "heads", "kv_heads",
    )  # fmt: skip

    def __post_init__(self):
        if self.arch is not None:
            _check_name("arch", self.arch, ARCHITECTURES)
        _check_name("tokenizer", self.tokenizer, ("donor", *KINDS))
        object.__setattr__(self, "take", (self.take,) if isinstance(self.take, str) else tuple(self.take))
        super().__post_init__()


OPTIONS = {kind.recipe: kind for kind in (TrainingOptions, LoRAOptions, FullFinetuneOptions, WarmStartOptions)}


def _check_name(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
