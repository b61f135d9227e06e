"""LoRA: the options of the run, and how it begins."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from toy import recipes
from toy.config import LanguageModelConfig
from toy.engines.adapters import GROUPS, MATRICES, AdapterOptions, adapter_shapes, check_targets, targets_of
from toy.engines.base import Arrays, Engine
from toy.files.atomic import StrPath
from toy.files.gguf_write import digest, write_adapter
from toy.training.options import MODEL, STEPS, FromModelOptions, again, option
from toy.training.start import Decision, FromGGUFStart


@dataclass(frozen=True)
class LoRAOptions(FromModelOptions):
    """LoRA on a model in a GGUF file. Raises ValueError for a value out of range."""

    recipe: ClassVar[str] = "lora"

    rank: int = option(8, "Rank of the adapters.", MODEL, at_least=1)
    alpha: float | None = option(None, "The adapters' product is scaled by alpha / rank.", MODEL, shown="as --rank")
    targets: tuple[str, ...] | None = option(
        None,
        f"Which matrices get adapters: some of {','.join(GROUPS)} (all of the layers) and {','.join(MATRICES)}.",
        MODEL,
        shown="q, or qkv where that is one matrix",
    )
    last_layers: int | None = option(
        None, "Only so many layers at the end get adapters.", MODEL, shown="all", at_least=1
    )
    rslora: bool = option(False, "Scale by alpha / sqrt(rank) instead, which does not shrink with the rank.", MODEL)
    dropout: float = option(0.0, "Share of its inputs that an adapter does not see in a step, at random.", STEPS)
    init_scale: float = option(1.0, "Multiplies the standard deviation of the adapters' A.", MODEL)
    context: int = again("context", 128, FromModelOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "targets", None if self.targets is None else check_targets(self.targets))
        object.__setattr__(self, "alpha", self.adapters.alpha)

    @property
    def adapters(self) -> AdapterOptions:
        """What of them is about the adapters."""
        fields = (field.name for field in dataclasses.fields(AdapterOptions))
        return AdapterOptions(**{name: getattr(self, name) for name in fields})


class LoRAStart(FromGGUFStart):
    """Train LoRA adapters on a llama, one of its relatives or a gpt2 in a GGUF file.

    The file stays as it is and is used in place, in its own tensor types; the run directory gets the adapters, also as a
    GGUF file that llama.cpp takes with --lora.

    \b
    toy fetch smollm2-135m
    toy train lora --model smollm2-135m --corpus FILE
    """

    options_class = LoRAOptions
    recipe_class = recipes.LoRA
    options: LoRAOptions
    recipe: recipes.LoRA
    config: LanguageModelConfig

    def __init__(self, options: LoRAOptions) -> None:
        super().__init__(options)
        if self.options.targets is None:
            self.options = dataclasses.replace(self.options, targets=targets_of(self.config, None))

    def check_config(self) -> None:
        adapter_shapes(self.config, self.options.adapters)

    def realize(self) -> None:
        o = self.options
        options = self.recipe_options(o.context, init_scale=o.init_scale)
        self.recipe.realize(self.gguf, self.config, opts=options, **dataclasses.asdict(o.adapters))
        self.base_digest = digest(cast(Engine, self.recipe.engine).weights.borrowed)

    def base_decisions(self) -> list[Decision]:
        o = self.options
        where = f"on {', '.join(targets_of(self.config, o.targets))}"
        where += "" if o.last_layers is None else f" of the last {o.last_layers} layers"
        where += "; scaled by alpha / sqrt(rank)" if o.rslora else ""
        where += f"; dropout {o.dropout:g}" if o.dropout else ""
        return [*super().base_decisions(), Decision("adapters", f"rank {o.rank}, alpha {o.alpha:g}", where)]

    def base(self) -> dict[str, Any]:
        o = self.options
        return {
            "base": {"path": o.model, "digest": self.base_digest},
            "lora": o.adapters.record(self.config),
        }

    def write_gguf(self, path: StrPath, parameters: Arrays) -> None:
        """Write the adapters as the GGUF file that llama.cpp takes with --lora."""
        adapters = self.options.adapters
        write_adapter(path, self.config, parameters, adapters.scale * adapters.rank, base=self.gguf)
