"""Full fine-tuning: the options of the run, and how it begins."""

from dataclasses import dataclass
from typing import Any, ClassVar

from toy import recipes
from toy.files.gguf_write import fingerprint
from toy.training.options import MODEL, FromModelOptions, again, option
from toy.training.start import FromGGUFStart


@dataclass(frozen=True)
class FullFinetuneOptions(FromModelOptions):
    """Full fine-tuning of a GGUF model, in float32. Raises ValueError for a value out of range."""

    recipe: ClassVar[str] = "full-finetune"

    freeze_embeddings: bool = option(False, "Leave the embedding tables as they are.", MODEL)
    lr: float = again("lr", 3e-5, FromModelOptions)
    context: int = again("context", 128, FromModelOptions)


class FullFinetuneStart(FromGGUFStart):
    """Train every weight of the model in a GGUF file further, in float32.

    A weight takes 16 bytes of memory, and about 30 while a checkpoint is written.
    """

    options_class = FullFinetuneOptions
    recipe_class = recipes.FullFinetune
    options: FullFinetuneOptions
    recipe: recipes.FullFinetune

    def realize(self) -> None:
        o = self.options
        self.recipe.realize(
            self.gguf, self.config, self.recipe_options(o.context), freeze_embeddings=o.freeze_embeddings
        )

    def base(self) -> dict[str, Any]:
        return {"base": {"path": self.options.model, "fingerprint": fingerprint(self.gguf)}}
