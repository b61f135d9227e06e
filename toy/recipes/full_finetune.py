"""Full fine-tuning: every weight of a GGUF file, as float32, is trained further."""

from toy.config import ModelConfig, RecipeOptions
from toy.engines import EngineHandle, check_options
from toy.engines.source import checked_config, finetuned_weights
from toy.files.gguf import GGUF


class FullFinetune(EngineHandle):
    """Train all weights of the model in a GGUF file (llama or gpt2), in float32 copies. The file is not changed.

    The convention of the hyper-parameter row is `AdamW.for_lora()` for every model.
    """

    def realize(
        self,
        gguf: GGUF,
        cfg: ModelConfig | None,
        opts: RecipeOptions,
        *,
        freeze_embeddings: bool = False,
        keep_gradients: bool = False,
    ) -> "FullFinetune":
        """Build the training step; returns self.

        gguf: an open `toy.GGUF`, read now and not needed afterwards. cfg: its config, None = `gguf.config()`; a Llama's may
        ask for a shorter context. freeze_embeddings: leave the embedding tables (with a tied head, the head too) as they
        are.
        Raises ValueError for a cfg that is not the file's and for a file whose numbers are not finite.
        """
        check_options(opts)
        config = checked_config(gguf, cfg, opts.untied, opts.qkv_bias)
        return self._realize(config, opts, keep_gradients, finetuned_weights(config, gguf, freeze_embeddings))
