"""`build` picks the engine of a backend; `EngineHandle` is what recipes and named engines share."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from toy.adamw import AdamW
from toy.config import ModelConfig, RecipeOptions
from toy.engines.base import Arrays, Engine, Moments
from toy.engines.eager import EagerEngine, OpCalls
from toy.engines.shared import Ranks, SharedEngine
from toy.engines.weights import Weights
from toy.files import Checkpoint, write_checkpoint
from toy.models.base import LanguageModel, Model
from toy.switch import Resolved, resolve

if TYPE_CHECKING:
    from typing_extensions import Self

    from ggml_bridge import Explanation

NO_TOKENIZER = {"kind": "none"}  # what `save` says of a model that was given none


class SavedTokenizer(Protocol):
    """What `save` asks of a tokenizer; `toy.data` has them."""

    @property
    def vocab_size(self) -> int: ...

    def to_json(self) -> dict[str, Any]: ...


def build(
    config: ModelConfig,
    options: RecipeOptions,
    choice: Resolved,
    weights: Weights | None = None,
    keep_gradients: bool = False,
    ranks: Ranks | None = None,
) -> Engine:
    """The engine of a config on a resolved backend (`toy.switch.Resolved`). weights: `Weights`, None = random, all
    trained. ranks: the processes that share each batch, None = this one alone."""
    kind: Any = EagerEngine
    if choice.backend == "ggml":
        from toy.engines.graph import GraphEngine as kind
    if ranks is not None:
        return SharedEngine(config, options, choice, weights, keep_gradients, kind, ranks)
    made: Engine = kind(config, options, choice, weights, keep_gradients)
    return made


class EngineHandle:
    """An object that is made first and realized later: `backend` and `device` now, the model with `realize`.

    All that needs the model raises RuntimeError before `realize`. `with recipe:` closes it at the end of the block.
    """

    engine: Engine | None = None  # the `toy.engines.base.Engine` after `realize`
    ranks: Ranks | None = None  # the processes that share each batch; to be set before `realize`

    def __init__(self, backend: str = "auto", device: str = "auto") -> None:
        self._choice = resolve(backend, device)
        self.backend, self.device, self.backend_reason = self._choice

    def _realize(
        self, config: ModelConfig, options: RecipeOptions, keep_gradients: bool, weights: Weights | None = None
    ) -> "Self":
        check_options(options)
        self.engine = build(config, options, self._choice, weights, keep_gradients, self.ranks)
        return self

    def _ready(self, verb: str) -> Engine:
        """The engine, for something that needs it. verb: what was called, for the error message."""
        if self.engine is None:
            raise RuntimeError(f"{type(self).__name__}.{verb}: call realize() first")
        return self.engine

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *error: object) -> None:
        if self.engine is not None:
            self.engine.close()

    # -- training -----------------------------------------------------------------------------------------------------

    def step(
        self,
        token_ids: npt.ArrayLike,
        positions: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        hp: npt.ArrayLike | None = None,
        is_first: bool = False,
    ) -> float:
        """ONE training step: forward, mean cross-entropy, backward, clip, AdamW -> the loss before the update, a float.

        token_ids: int (t_batch, t_seq), or (t_seq,) when t_batch is 1; of an image model the images, float
        (t_batch, height, width, channels). With `accumulate` in the options, that many times t_batch. positions: int
        (t_seq,), None = 0 .. t_seq-1. labels: int in the shape of token_ids (images: (t_batch,)), -1 = not counted, or float
        rows (N, number of classes). hp: the (1, 7) row of `AdamW.hp_for_step`. is_first: also zero the AdamW moments
        (gradients always start at zero).
        Raises ValueError for a wrong shape, dtype, id, label, position or row; nothing is changed then.
        """
        engine = self._ready("step")
        if labels is None or hp is None:
            missing = "labels" if labels is None else "hp"
            raise ValueError(f"step: {missing} is missing: step(token_ids, labels=..., hp=adamw.hp_for_step(k))")
        return engine.step(self._by_role(token_ids, positions), labels, hp, is_first)

    def evaluate(
        self, token_ids: npt.ArrayLike, labels: npt.ArrayLike, positions: npt.ArrayLike | None = None
    ) -> float:
        """The mean cross-entropy of a batch without any update (arguments and errors as `step`)."""
        return self._ready("evaluate").evaluate(self._by_role(token_ids, positions), labels)

    def logits(self, token_ids: npt.ArrayLike, positions: npt.ArrayLike | None = None) -> np.ndarray:
        """token_ids: int (t_batch, t_seq) -> float32 (t_batch, t_seq, vocab_size); images -> (t_batch, classes)."""
        return self._ready("logits").logits(self._by_role(token_ids, positions))

    def adamw(self, lr: float = 0.001, **fields: float) -> AdamW:
        """An `AdamW` in the convention this model reads (see `hp_mode`). fields: beta1, beta2, eps, weight_decay."""
        return self._ready("adamw").adamw(lr=lr, **fields)

    def _by_role(self, first: npt.ArrayLike, positions: npt.ArrayLike | None) -> dict[str, npt.ArrayLike]:
        role = self._ready("step").batch.roles[0]
        return {role: first} if positions is None else {role: first, "positions": positions}

    # -- weights ------------------------------------------------------------------------------------------------------

    def parameters(self) -> Arrays:
        """dict of names to float32 copies of the (master) weights that the engine holds; a frozen base is not among them."""
        return self._ready("parameters").parameters()

    def load_parameters(self, mapping: Mapping[str, npt.ArrayLike]) -> None:
        """Copy weights in. Raises ValueError for wrong names, shapes or numbers; nothing is changed then."""
        self._ready("load_parameters").load_parameters(mapping)

    def gradients(self) -> Arrays:
        """dict of names to copies of the last step's gradients, before clipping. On ggml after `keep_gradients=True`."""
        return self._ready("gradients").gradients()

    def optimizer_state(self) -> dict[str, Arrays]:
        """{"m": {name: array}, "v": {name: array}}: copies of the AdamW moments."""
        return self._ready("optimizer_state").optimizer_state()

    def load_optimizer_state(self, state: Moments) -> None:
        """Copy moments in, all or nothing; errors as `load_parameters`."""
        self._ready("load_optimizer_state").load_optimizer_state(state)

    def save(self, path: str | os.PathLike[str], tokenizer: SavedTokenizer | None = None) -> None:
        """Write the model into the file `path` (safetensors, atomically), for `toy.load` and the commands that take a
        checkpoint.

        tokenizer: what turns its text into ids, if it is to read and write text. The AdamW moments are in it too. Raises
        ValueError for a tokenizer of another vocabulary, a base that is in no file and a path that ends with .gguf, OSError
        when the file cannot be written.
        """
        engine = self._ready("save")
        if tokenizer is not None and not issubclass(engine.model_class, LanguageModel):
            raise ValueError(f"a {engine.arch} reads no text: leave the tokenizer out")
        if tokenizer is not None and tokenizer.vocab_size != engine.batch.n_classes:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the model {engine.batch.n_classes}: they do not fit"
            )
        self._write(path, tokenizer=NO_TOKENIZER if tokenizer is None else tokenizer.to_json())

    def _write(self, path: str | os.PathLike[str], **about: Any) -> None:
        """The file of `save`. about: what its config says besides the model."""
        engine, to = self._ready("save"), Path(path)
        if to.suffix.lower() == ".gguf":
            raise ValueError(f"{to}: what is written is no GGUF file, give it another name; toy export makes one of it")
        config = {
            "arch": engine.arch,
            "model": dataclasses.asdict(engine.config),
            "training": {},
            **about,
            **self._base_to_save(),
        }
        write_checkpoint(to, Checkpoint(0, config, engine.parameters(), engine.optimizer_state()))

    def _base_to_save(self) -> dict[str, Any]:
        """What `save` says of weights that are not the engine's own."""
        if self._ready("save").weights.borrowed:
            raise ValueError("save: this model looks at weights that are in no file, so it cannot be opened again")
        return {}

    def model_copy(self) -> Model:
        """A model object on an eager op table with a copy of the present weights: for generation and inspection."""
        return self._ready("model_copy").model_copy()

    # -- what it is ---------------------------------------------------------------------------------------------------

    def explain(self) -> "OpCalls | Explanation":
        """What a training step runs: nodes or op calls in order, with shapes and bytes; str() of it is a table."""
        return self._ready("explain").explain()

    def close(self) -> None:
        """Free what the engine holds outside of Python's memory. Nothing can be called after it."""
        self._ready("close").close()

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self._ready("config").config

    @property
    def options(self) -> RecipeOptions:
        """The `RecipeOptions` it was realized with."""
        return self._ready("options").options

    @property
    def arch(self) -> str:
        """The name of the model's architecture."""
        return self._ready("arch").arch

    @property
    def model_class(self) -> type[Model]:
        """The class of the model."""
        return self._ready("model_class").model_class

    @property
    def hp_mode(self) -> int:
        """The AdamW convention that the model reads: AdamW.MODE_FROM_SCRATCH or AdamW.MODE_LORA."""
        return self._ready("hp_mode").hp_mode

    @property
    def decayed(self) -> frozenset[str]:
        """The names of the trained parameters that weight decay acts on: matrices and embeddings."""
        return self._ready("decayed").decayed

    @property
    def n_classes(self) -> int:
        """What a label chooses from: the size of the vocabulary, or the number of classes."""
        return self._ready("n_classes").batch.n_classes

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model, frozen ones too."""
        return self._ready("n_parameters").n_parameters

    @property
    def n_own(self) -> int:
        """Parameters that the engine holds itself, in float32: all but those of a frozen base."""
        return self._ready("n_own").n_own

    @property
    def n_trained(self) -> int:
        """Parameters that are trained."""
        return self._ready("n_trained").n_trained

    @property
    def recompute(self) -> int:
        """How many blocks the backward computes again, in place of keeping their activations."""
        return self._ready("recompute").recompute

    @property
    def recompute_reason(self) -> str:
        """Why so many."""
        return self._ready("recompute_reason").recompute_reason

    @property
    def grad_norm(self) -> float:
        """L2 norm of the last step's whole gradient, before clipping; NaN before the first step."""
        return self._ready("grad_norm").grad_norm


def check_options(options: RecipeOptions) -> None:
    """Raise TypeError unless these are RecipeOptions."""
    if not isinstance(options, RecipeOptions):
        raise TypeError(f"opts must be a toy.RecipeOptions, got {type(options).__name__}")
