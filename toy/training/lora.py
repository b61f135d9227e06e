"""LoRA: the options of the run, and how it begins."""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from toy import recipes
from toy.config import LlamaConfig
from toy.engines.adapters import TARGETS, check_alpha, check_targets
from toy.engines.base import Arrays, Engine
from toy.files.atomic import StrPath
from toy.files.gguf_write import digest, write_adapter
from toy.training.options import MODEL, FromModelOptions, again, option
from toy.training.start import Decision, FromGGUFStart


@dataclass(frozen=True)
class LoRAOptions(FromModelOptions):
    """LoRA on a llama in a GGUF file. Raises ValueError for a value out of range."""

    recipe: ClassVar[str] = "lora"

    rank: int = option(8, "Rank of the adapters.", MODEL, at_least=1)
    alpha: float | None = option(None, "The adapters' product is scaled by alpha / rank.", MODEL, shown="as --rank")
    targets: tuple[str, ...] = option(("q",), f"Which matrices get adapters: some of {','.join(TARGETS)}.", MODEL)
    init_scale: float = option(1.0, "Multiplies the standard deviation of the adapters' A.", MODEL)
    context: int = again("context", 128, FromModelOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", check_alpha(self.alpha, self.rank))
        object.__setattr__(self, "targets", check_targets(self.targets))


class LoRAStart(FromGGUFStart):
    """Train LoRA adapters on a llama in a GGUF file.

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
    config: LlamaConfig

    def check_config(self) -> None:
        if not isinstance(self.config, LlamaConfig):
            raise ValueError(
                f"LoRA needs a model of architecture llama, {self.gguf.path} is a {self.gguf.architecture}"
            )

    def realize(self) -> None:
        o = self.options
        options = self.recipe_options(o.context, init_scale=o.init_scale)
        self.recipe.realize(self.gguf, self.config, o.rank, options, alpha=o.alpha, targets=o.targets)
        self.base_digest = digest(cast(Engine, self.recipe.engine).weights.borrowed)

    def base_decisions(self) -> list[Decision]:
        o, where = self.options, f"on {', '.join(self.options.targets)}"
        return [*super().base_decisions(), Decision("adapters", f"rank {o.rank}, alpha {o.alpha:g}", where)]

    def base(self) -> dict[str, Any]:
        o = self.options
        return {
            "base": {"path": o.model, "digest": self.base_digest},
            "lora": {"rank": o.rank, "alpha": o.alpha, "targets": list(o.targets)},
        }

    def write_gguf(self, path: StrPath, parameters: Arrays) -> None:
        """Write the adapters as the GGUF file that llama.cpp takes with --lora."""
        write_adapter(path, self.config, parameters, cast(float, self.options.alpha), base=self.gguf)
