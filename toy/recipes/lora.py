"""LoRA: small trained corrections beside a frozen model that stays in its file."""

from collections.abc import Iterable
from typing import Any

from toy.config import ModelConfig, RecipeOptions
from toy.engines import EngineHandle, check_options
from toy.engines.adapters import adapter_weights, adapters_to_save
from toy.engines.source import borrowed_parameters, checked_config
from toy.files.gguf import GGUF


class LoRA(EngineHandle):
    """Train low-rank adapters on a Llama in a GGUF file (Hu et al. 2021).

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
        targets: Iterable[str] = ("q",),
        keep_gradients: bool = False,
    ) -> "LoRA":
        """Build the training step; returns self.

        gguf: an open `toy.GGUF`; the engine keeps its mapping alive. cfg: its config, None = `gguf.config()`; it may ask
        for a shorter context. rank: of the adapters. opts: `RecipeOptions` (seed, init_scale: of the adapters' A). alpha: the
        correction is scaled by alpha / rank, None = rank, so by 1. targets: which matrices get adapters, some of
        q, k, v, o, gate, up, down.

        `parameters()`, `gradients()` and the moments are those of the adapters: `blk.0.attn_q.lora_a` (rank, in), which
        starts small and random, and `blk.0.attn_q.lora_b` (out, rank), which starts at zero, so that the first loss is the
        base model's.
        Raises ValueError for a rank below 1, unknown targets, another architecture than llama, and a cfg that is not the
        file's.
        """
        check_options(opts)
        config = checked_config(gguf, cfg, opts.untied, opts.qkv_bias)
        weights = adapter_weights(config, borrowed_parameters(gguf, config), rank, opts, alpha, targets)
        self._base, self._adapters = gguf.path, (rank, alpha, targets)
        return self._realize(config, opts, keep_gradients, weights)

    def _base_to_save(self) -> dict[str, Any]:
        return adapters_to_save(self._base, self._ready("save").weights.borrowed, *self._adapters)


class LoRAMetal(LoRA):
    """`LoRA` on Apple's GPU. Raises as `LoRA` where there is none."""

    def __init__(self, backend: str = "ggml", device: str = "metal") -> None:
        super().__init__(backend, device)
