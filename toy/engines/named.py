"""GPT-2 and Llama by their own names: the same engines as the recipes', realized step by step."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from toy.config import GPT2Config, LlamaConfig, RecipeOptions, ViTConfig, check_positive_int
from toy.engines.adapters import AdapterOptions, adapter_fill, adapter_weights, adapters_to_save
from toy.engines.base import Engine, with_model_options
from toy.engines.handle import EngineHandle
from toy.engines.source import borrowed_parameters, checked_config, finetuned_weights
from toy.engines.weights import Weights, filled, random_fill, random_weights
from toy.files.gguf import GGUF
from toy.models.llama import Llama
from toy.quantized import Leaf


class GPT2SeqEngine(EngineHandle):
    """GPT-2 by its own name: `realize` takes the sizes one by one."""

    def realize(
        self,
        vocab: int,
        d_model: int,
        n_heads: int,
        d_ff: int,
        n_layers: int,
        context: int,
        seed: int = 0,
        *,
        t_seq: int | None = None,
        t_batch: int = 1,
        keep_gradients: bool = False,
    ) -> "GPT2SeqEngine":
        """Build a GPT-2 with random weights; t_seq: None = the whole context. Returns self. Errors as `GPT2Config`."""
        config = GPT2Config(vocab, d_model, n_heads, d_ff, n_layers, context)
        options = RecipeOptions(t_seq=config.context_length if t_seq is None else t_seq, t_batch=t_batch, seed=seed)
        return self._realize(config, options, keep_gradients)


class ViTTinyEngine(EngineHandle):
    """A small vision transformer by its own name: `realize` takes the sizes one by one."""

    def realize(
        self, image_size: int, channels: int, patch_size: int, d_model: int, n_heads: int, d_ff: int, n_layers: int,
        n_classes: int, seed: int = 0, *, t_batch: int = 1, keep_gradients: bool = False,
    ) -> "ViTTinyEngine":  # fmt: skip
        """Build a ViT with random weights; the arguments are those of `ViTConfig`. Returns self. Errors as `ViTConfig`."""
        config = ViTConfig(image_size, channels, patch_size, d_model, n_heads, d_ff, n_layers, n_classes)
        return self._realize(config, RecipeOptions(config.n_tokens, t_batch, seed=seed), keep_gradients)


class StepTensor:
    """What goes into a training step, or comes out of it. value: of the last step, None before the first."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.name, self.shape, self.dtype = name, shape, dtype
        self.value: float | np.ndarray | None = None

    def __repr__(self) -> str:
        return f"StepTensor({self.name!r}, {self.shape}, {self.dtype})"


class TrainingStep(NamedTuple):
    """What `LlamaSeqEngine.build_training_step` gives: the loss (), the labels (t_batch * t_seq,), the AdamW row (1, 7)."""

    t_loss: StepTensor
    t_labels: StepTensor
    t_hp: StepTensor


class LlamaSeqEngine(EngineHandle):
    """A Llama for training, by the name and the verbs of its parts:

    1. where the weights come from: `realize_for_random_init`, or `realize_for_mmap` of a GGUF file;
    2. what is trained: everything after `realize_for_random_init`; after `realize_for_mmap` either adapters
       (`enable_lora_q` and `enable_lora_q_adamw`, started by `upload_lora_q_init`) or everything (`enable_full_finetune`);
    3. `build_training_step`, and then `step` and all the rest that recipes have too.

    The verbs of 1 and 2 may come in any order. One that contradicts another, or comes after `build_training_step`, raises
    RuntimeError and says what is missing.
    """

    def __init__(self, backend: str = "auto", device: str = "auto") -> None:
        super().__init__(backend, device)
        self._source: tuple[LlamaConfig, RecipeOptions, GGUF | None] | None = None
        self._rank: int | None = None
        self._adamw_on_adapters, self._full_finetune = False, False
        self._adapter_start = (0, 1.0)  # seed, init_scale
        self._tensors: TrainingStep | None = None

    def realize_for_random_init(
        self,
        cfg: LlamaConfig,
        t_seq: int,
        t_batch: int = 1,
        weight_dtype: str = "f32",
        untied: bool = False,
        qkv_bias: bool = False,
        seed: int = 0,
        init_scale: float = 1.0,
    ) -> "LlamaSeqEngine":
        """Weights drawn from `seed`; arguments as `LlamaConfig` and `RecipeOptions`. Returns self."""
        if not isinstance(cfg, LlamaConfig):
            raise TypeError(f"cfg must be a toy.LlamaConfig, got {type(cfg).__name__}")
        options = RecipeOptions(t_seq, t_batch, weight_dtype, untied, qkv_bias, seed, init_scale)
        return self._from(with_model_options(cfg, options), options, None)

    def realize_for_mmap(
        self,
        gguf: GGUF,
        cfg: LlamaConfig | None = None,
        t_seq: int | None = None,
        untied: bool = False,
        qkv_bias: bool = False,
        *,
        t_batch: int = 1,
    ) -> "LlamaSeqEngine":
        """The weights of an open `toy.GGUF`, memory-mapped in their own types. cfg: None = `gguf.config()`; t_seq: None = the
        whole context. Returns self. Raises ValueError for another architecture and a cfg that is not the file's."""
        config = checked_config(gguf, cfg, untied, qkv_bias)
        if not isinstance(config, LlamaConfig):
            raise ValueError(f"{gguf.path} holds a model of architecture {gguf.architecture}, expected llama")
        options = RecipeOptions(config.context_length if t_seq is None else t_seq, t_batch)
        return self._from(config, options, gguf)

    def enable_lora_q(self, rank: int) -> "LlamaSeqEngine":
        """Adapters of this rank on every query projection; alpha is the rank, so their scale is 1. Returns self."""
        self._check_open("enable_lora_q")
        if self._full_finetune:
            raise RuntimeError("enable_lora_q: enable_full_finetune() was called, one model cannot do both")
        self._rank = check_positive_int("rank", rank)
        return self

    def enable_lora_q_adamw(self) -> "LlamaSeqEngine":
        """Train the adapters with AdamW (the convention of `AdamW.for_lora()`). Returns self."""
        self._check_open("enable_lora_q_adamw")
        if self._rank is None:
            raise RuntimeError("enable_lora_q_adamw: call enable_lora_q(rank) first")
        self._adamw_on_adapters = True
        return self

    def upload_lora_q_init(self, seed: int = 0, init_scale: float = 1.0) -> "LlamaSeqEngine":
        """Start the adapters anew: A small and random from `seed`, B zero. Between steps too; the moments then go on until a
        step with is_first=True. Returns self."""
        if self._rank is None:
            raise RuntimeError("upload_lora_q_init: call enable_lora_q(rank) first")
        options = RecipeOptions(1, seed=seed, init_scale=init_scale)
        self._adapter_start = (options.seed, options.init_scale)
        if self.engine is not None:
            self.engine.load_parameters(filled(self.engine.weights.own, adapter_fill(*self._adapter_start)))
        return self

    def enable_full_finetune(self) -> "LlamaSeqEngine":
        """Train every weight, in float32 copies of the file's. Returns self."""
        self._check_open("enable_full_finetune")
        if self._rank is not None:
            raise RuntimeError("enable_full_finetune: enable_lora_q() was called, one model cannot do both")
        self._full_finetune = True
        return self

    def build_training_step(self, keep_gradients: bool = False) -> TrainingStep:
        """Build what `step` runs -> `TrainingStep` (t_loss, t_labels, t_hp). Once; later calls give the same."""
        if self._tensors is None:
            config, options, weights = self._plan()
            self._realize(config, options, keep_gradients, weights)
            n = options.t_batch * options.t_seq
            self._tensors = TrainingStep(
                StepTensor("loss", (), "f32"), StepTensor("labels", (n,), "i32"), StepTensor("hp", (1, 7), "f32")
            )
        return self._tensors

    def _ready(self, verb: str) -> Engine:
        if self.engine is None and self._source is not None:
            self.build_training_step()  # what needs the engine builds it
        return super()._ready(verb)

    def step(
        self,
        token_ids: npt.ArrayLike,
        positions: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        hp: npt.ArrayLike | None = None,
        is_first: bool = False,
    ) -> float:
        """ONE training step, as `EngineHandle.step`; the tensors of `build_training_step` get its values."""
        tensors = self.build_training_step()
        loss = super().step(token_ids, positions, labels, hp, is_first)
        tensors.t_loss.value, tensors.t_labels.value, tensors.t_hp.value = loss, np.array(labels), np.array(hp)
        return loss

    def _base_to_save(self) -> dict[str, Any]:
        gguf = None if self._source is None else self._source[2]
        if self._rank is None or gguf is None:
            return super()._base_to_save()
        engine = self._ready("save")
        return adapters_to_save(gguf.path, engine.weights.borrowed, engine.config, AdapterOptions(self._rank))

    def _from(self, config: LlamaConfig, options: RecipeOptions, gguf: GGUF | None) -> "LlamaSeqEngine":
        self._check_open("realize")
        self._source = (config, options, gguf)
        return self

    def _check_open(self, verb: str) -> None:
        if self._tensors is not None:
            raise RuntimeError(f"{verb}: the training step is built already; make a new engine")

    def _plan(self) -> tuple[LlamaConfig, RecipeOptions, Weights]:
        if self._source is None:
            raise RuntimeError("build_training_step: call realize_for_random_init() or realize_for_mmap() first")
        config, options, gguf = self._source
        if self._rank is not None:
            if not self._adamw_on_adapters:
                raise RuntimeError("build_training_step: call enable_lora_q_adamw() first, nothing trains the adapters")
            return config, options, self._adapters(config, options, gguf, self._rank)
        if gguf is None:
            return config, options, random_weights(config, options)
        if not self._full_finetune:
            raise RuntimeError(
                "build_training_step: call enable_lora_q(rank) and enable_lora_q_adamw(), or enable_full_finetune() first: "
                "a memory-mapped model is frozen"
            )
        return config, options, finetuned_weights(config, gguf)

    def _adapters(self, config: LlamaConfig, options: RecipeOptions, gguf: GGUF | None, rank: int) -> Weights:
        base: dict[str, Leaf]
        if gguf is not None:
            base = borrowed_parameters(gguf, config)
        else:
            base = {**filled(Llama.parameter_shapes(config), random_fill(config, options))}
        seed, init_scale = self._adapter_start
        options = RecipeOptions(1, seed=seed, init_scale=init_scale)
        return adapter_weights(config, base, AdapterOptions(rank), options)


class LlamaSeqEngineMetal(LlamaSeqEngine):
    """`LlamaSeqEngine` on Apple's GPU. Raises `toy.BackendUnavailableError` or ValueError where there is none."""

    def __init__(self, backend: str = "ggml", device: str = "metal") -> None:
        super().__init__(backend, device)
