"""LoRA: small trained corrections beside a frozen model that stays in its file."""

from collections.abc import Iterable
from typing import Any

from toy.config import ModelConfig, RecipeOptions
from toy.engines import EngineHandle, check_options
from toy.engines.adapters import AdapterOptions, adapter_weights, adapters_to_save, targets_of
from toy.engines.source import borrowed_parameters, checked_config
from toy.files.gguf import GGUF


class LoRA(EngineHandle):
    """Train low-rank adapters on a model in a GGUF file (Hu et al. 2021).

    The file's matrices stay memory-mapped in their own type and are used in place; only the adapters and their AdamW
    moments are trained, in float32. The convention of the hyper-parameter row is `AdamW.for_lora()`.
    """

    def realize(
        self,
        gguf: GGUF,
        cfg: ModelConfig | None,
        rank: int,
        opts: RecipeOptions,
        *,
        alpha: float | None = None,
        targets: Iterable[str] | None = None,
        last_layers: int | None = None,
        rslora: bool = False,
        dropout: float = 0.0,
        keep_gradients: bool = False,
    ) -> "LoRA":
        """Build the training step; returns self.

        gguf: an open `toy.GGUF`; the engine keeps its mapping alive. cfg: its config, None = `gguf.config()`; it may ask
        for a shorter context. rank: of the adapters. opts: `RecipeOptions` (seed, init_scale: of the adapters' A). alpha: the
        correction is scaled by alpha / rank, None = rank, so by 1. targets: which matrices get adapters, some of q, k, v, o,
        gate, up, down (of a GPT-2 qkv, o, up, down), output, and the groups all (of the blocks), attention and mlp; None = q
        (qkv). last_layers: only in so many blocks at the end, None = in all. rslora: the correction is scaled by
        alpha / sqrt(rank). dropout: the share of its inputs that a correction does not see in a step; the row that `step` is
        given must then be one of `hp_for_step`, which knows the step.

        `parameters()`, `gradients()` and the moments are those of the adapters: `blk.0.attn_q.lora_a` (rank, in), which
        starts small and random, and `blk.0.attn_q.lora_b` (out, rank), which starts at zero, so that the first loss is the
        base model's.
        Raises ValueError for a rank below 1, unknown targets and those that the model does not have, and a cfg that is not
        the file's.
        """
        check_options(opts)
        config = checked_config(gguf, cfg, opts.untied, opts.qkv_bias)
        adapters = AdapterOptions(rank, alpha, targets_of(config, targets), last_layers, rslora, dropout)
        weights = adapter_weights(config, borrowed_parameters(gguf, config), adapters, opts)
        self._base, self._adapters = gguf.path, adapters
        return self._realize(config, opts, keep_gradients, weights)

    def _base_to_save(self) -> dict[str, Any]:
        engine = self._ready("save")
        return adapters_to_save(self._base, engine.weights.borrowed, engine.config, self._adapters)


class LoRAMetal(LoRA):
    """`LoRA` on Apple's GPU. Raises as `LoRA` where there is none."""

    def __init__(self, backend: str = "ggml", device: str = "metal") -> None:
        super().__init__(backend, device)
