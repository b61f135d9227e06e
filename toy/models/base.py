"""What the models share: parameters and an op table, how a loss starts the backward pass; of language models also how token
ids become rows, and the key/value cache."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from toy.arrays import plain_array
from toy.config import LanguageModelConfig, ModelConfig
from toy.models.generation import Seed, generate
from toy.models.inputs import Batch, TokenBatch, check_range
from toy.models.parameters import Block, GradientTree, ParameterTree, Shapes, Stds, initialize
from toy.op_table import Array, OpCache, OpTable

if TYPE_CHECKING:
    from typing_extensions import Self


class Model:
    """A config, a parameter tree and an op table. The forward and the backward are in the subclasses:

    forward_rows(inputs by role ..., batch=) -> logits (N, n_classes), cache
    backward_rows(d_logits (N, n_classes), cache, grads)           adds to grads
    block_backward(d_x (N, D), cache, grads of the block) -> d_x   likewise
    parameter_shapes(config), parameter_stds(config)               dicts by parameter name
    """

    arch: ClassVar[str]  # the model's name on the command line
    hp_mode: ClassVar[int]  # the AdamW convention its graphs read
    learned_positions: bool = False  # whether the context length is a size of a weight
    batch_type: Callable[[Any, int, int], Batch]  # what a batch of it is: of config, t_batch and t_seq
    default_ops: ClassVar[Callable[[], OpTable]]  # gives a model made without an op table one; `toy.engines` sets it

    config: ModelConfig
    forward_rows: Callable[..., tuple[Array, Any]]
    backward_rows: Callable[..., None]
    block_backward: Callable[[Array, Any, Block], Array]
    parameter_shapes: Callable[[Any], Shapes]
    parameter_stds: Callable[[Any], Stds]

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        *,
        init_scale: float = 1.0,
        ops: OpTable | None = None,
        dtype: npt.DTypeLike = np.float32,
        parameters: ParameterTree | None = None,
        recompute: int = 0,
    ) -> None:
        """ops: an op table (None: the one of the current backend). parameters: a ready tree; None: initialised from seed.

        recompute: of how many blocks, from the first on, to keep the input alone; the backward runs their forward again (Chen
        et al. 2016). The gradients are the same, to the bit.
        """
        self.config = config
        self.ops = Model.default_ops() if ops is None else ops
        self.recompute = recompute
        if parameters is None:
            parameters = ParameterTree.zeros(self.parameter_shapes(config), dtype)
            initialize(parameters, self.parameter_stds(config), seed, init_scale)
        self.parameters = parameters

    @classmethod
    def from_config(cls, config: ModelConfig, seed: int = 0, **options: Any) -> "Self":
        """A model of this config; the arguments are those of the class."""
        return cls(config, seed=seed, **options)

    @classmethod
    def decays(cls, name: str, shape: tuple[int, ...]) -> bool:
        """Whether weight decay shrinks this parameter: matrices and embeddings, not the gains and biases (Loshchilov & Hutter
        2019 decay everything; since GPT-2 this is what is done, because a gain's natural value is 1 and not 0)."""
        return len(shape) >= 2

    @property
    def n_classes(self) -> int:
        """What a label chooses from."""
        raise NotImplementedError

    def new_gradients(self) -> GradientTree:
        """Gradients of the parameters, all zeros."""
        return GradientTree.like(self.parameters)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}, ops={self.ops.name}):\n{self.parameters.summary()}"

    def backward(
        self, cache: tuple[Array, Any], labels: npt.ArrayLike, grads: GradientTree, release_cache: bool = False
    ) -> float:
        """The mean cross-entropy of the forward that gave `cache`, as a float; its gradient is *added* to `grads`.

        labels: int, one for each row of the logits (in the shape of token_ids; -1 = not counted), or float rows (N, V).
        release_cache: free each block's activations as soon as they have served (a training step; the cache cannot be used
        again).
        """
        logits, cache = cache
        labels = plain_array("labels", labels)
        if labels.dtype.kind in "iu":
            check_range("labels", labels, -1, self.n_classes)
            labels = np.ascontiguousarray(labels.reshape(-1), dtype=np.int64)
        else:
            labels = np.ascontiguousarray(labels, dtype=logits.dtype)
        if labels.shape not in ((logits.shape[0],), logits.shape):
            raise ValueError(
                f"labels must be {(logits.shape[0],)} integers or float rows {logits.shape}, got {labels.shape}"
            )
        loss, loss_cache = self.ops.cross_entropy(logits, labels)
        d_logits = self.ops.cross_entropy_backward(loss_cache)
        del logits, loss_cache
        self.backward_rows(d_logits, cache, grads, release_cache)
        grads.loss += loss
        return loss

    def loss(self, inputs: Mapping[str, Array], labels: Array, batch: int, grads: GradientTree | None = None) -> float:
        """The mean cross-entropy of a batch; its gradient is added to `grads` (None: the loss alone).

        inputs: the arguments of `forward_rows` by name, labels: those of its rows, checked as `toy.models.inputs.Batch` does.
        """
        logits, cache = self.forward_rows(**inputs, batch=batch)
        loss, loss_cache = self.ops.cross_entropy(logits, labels)
        if grads is not None:
            d_logits = self.ops.cross_entropy_backward(loss_cache)
            del logits, loss_cache
            self.backward_rows(d_logits, cache, grads, release_cache=True)
        return loss

    def to_keep(self, layer: int, cache: Any, forward: Callable[[], tuple[Array, Any]]) -> Any:
        """What is kept of a block until its backward: its cache, or with `recompute` how to get it. forward() -> x, cache."""
        return Recomputed(forward) if layer < self.recompute else cache

    def blocks_backward(
        self, d_x: Array, cache_list: list[Any], gradient_blocks: Sequence[Block], release_cache: bool, lowest: int = 0
    ) -> Array:
        """d_x: gradient of the last block's output (N, D) -> that of the first one's input (N, D). Adds to the gradients.

        A cache that was not kept is made again. release_cache: each is dropped after use. lowest: the block to stop at, see
        `ParameterTree.lowest_block`; what comes back is then the gradient of its input, which nobody needs.
        """
        for i in reversed(range(lowest, len(cache_list))):
            d_x = self.block_backward(d_x, self._made_again(cache_list[i]), gradient_blocks[i])
            if release_cache:
                cache_list[i] = None
        return d_x

    def _made_again(self, kept: Any) -> Any:
        return self.ops.again(kept.forward)[1] if isinstance(kept, Recomputed) else kept


class Recomputed(NamedTuple):
    """In place of a block's cache: the forward that makes it again."""

    forward: Callable[[], tuple[Array, Any]]  # () -> x, cache


class Cache(NamedTuple):
    """What the backward of a language model needs."""

    embed: Any
    blocks: list[Any]  # a cache each; None: not kept; with `recompute` how to get it
    unembed: Any


class EmbedCache(NamedTuple):
    """Of `embed` with learned positions."""

    token: OpCache
    position: OpCache


class UnembedCache(NamedTuple):
    norm: OpCache
    linear: OpCache


class LanguageModel(Model):
    """A model that reads token ids. It has three parts, each with its backward, which are in the subclasses:

    embed(token_ids (N,), ...) -> x (N, D), cache                  embed_backward(d_x, cache, grads)
    block_forward(layer, block, x, ...) -> x (N, D), cache         block_backward(d_x, cache, grads of the block) -> d_x
    unembed_rows(x) -> logits (N, V), cache                        unembed_backward(d_logits, cache, grads) -> d_x

    Here they are put together: the blocks one after another, and in the backward from the last one to the first. For training
    the third part is `loss_rows`, in the subclasses too, which never has all logits at a time.
    """

    batch_type = TokenBatch
    block_list: ClassVar[str] = "blk"  # the name of the list of blocks in the parameter tree

    config: LanguageModelConfig
    embed: Callable[..., tuple[Array, Any]]
    embed_backward: Callable[[Array, Any, GradientTree], None]
    block_forward: Callable[..., tuple[Array, Any]]
    unembed_rows: Callable[[Any], tuple[Any, Any]]
    unembed_backward: Callable[[Array, Any, GradientTree], Array]
    loss_rows: Callable[[Array, Array, GradientTree | None], tuple[float, Array | None]]

    def __init__(self, config: LanguageModelConfig, seed: int = 0, *, lora_scale: float = 1.0, **options: Any) -> None:
        """lora_scale: what the product of LoRA adapters is multiplied by, if the tree has any. Others as `Model`."""
        super().__init__(config, seed, **options)
        self.lora_scale = lora_scale

    def forward_rows(self, token_ids: Array, positions: Array, batch: int, kv_cache: Any = None) -> tuple[Array, Any]:
        """token_ids, positions: int (N,) -> logits (N, V), `Cache`. kv_cache: what extends as a `KeyValueCache` does."""
        x, embed_cache, block_caches = self.hidden_rows(token_ids, positions, batch, kv_cache)  # (N, D)
        logits, unembed_cache = self.unembed_rows(x)  # (N, V)
        return logits, Cache(embed_cache, block_caches, unembed_cache)

    def backward_rows(self, d_logits: Array, cache: Cache, grads: GradientTree, release_cache: bool = False) -> None:
        """d_logits: (N, V). Adds the gradient of every parameter to `grads` (None there: frozen)."""
        d_x = self.unembed_backward(d_logits, cache.unembed, grads)  # (N, D)
        self.hidden_rows_backward(d_x, cache.embed, cache.blocks, grads, release_cache)

    def hidden_rows(
        self,
        token_ids: Array,
        positions: Array,
        batch: int,
        kv_cache: Any = None,
        keep_cache: bool = True,
    ) -> tuple[Any, Any, list[Any]]:
        """token_ids, positions: int (N,) -> the residual stream after the last block (N, D), and the caches of `embed` and of
        the blocks.

        keep_cache: False when no backward follows; the blocks' activations are then freed at once.
        """
        # learned positions are embedded like the tokens, others (RoPE) are needed in every block
        places, more = ((positions,), ()) if self.learned_positions else ((), (positions,))
        x, embed_cache = self.embed(token_ids, *places)  # (N, D)
        block_caches = []
        for layer, block in enumerate(getattr(self.parameters, self.block_list)):
            forward = partial(self.block_forward, layer, block, x, *more, batch, kv_cache)
            x, cache = forward()  # (N, D)
            block_caches.append(self.to_keep(layer, cache, forward) if keep_cache else None)
        return x, embed_cache, block_caches

    def hidden_rows_backward(
        self, d_x: Array, embed_cache: Any, block_caches: list[Any], grads: GradientTree, release_cache: bool = False
    ) -> None:
        """d_x: gradient of what `hidden_rows` gave (N, D). Adds to grads."""
        blocks, lowest = getattr(grads, self.block_list), grads.lowest_block()
        d_x = self.blocks_backward(d_x, block_caches, blocks, release_cache, lowest)  # (N, D)
        self.embed_backward(d_x, embed_cache, grads)

    def loss(self, inputs: Mapping[str, Array], labels: Array, batch: int, grads: GradientTree | None = None) -> float:
        keep = grads is not None
        x, embed_cache, block_caches = self.hidden_rows(
            inputs["token_ids"], inputs["positions"], batch, keep_cache=keep
        )  # (N, D)
        loss, d_x = self.loss_rows(x, labels, grads)
        if grads is not None and d_x is not None:
            self.hidden_rows_backward(d_x, embed_cache, block_caches, grads, release_cache=True)
        return loss

    @property
    def n_classes(self) -> int:
        return self.config.vocab_size

    def forward(
        self,
        token_ids: npt.ArrayLike,
        positions: npt.ArrayLike | None = None,
        kv_cache: "KeyValueCache | None" = None,
        last_only: bool = False,
    ) -> tuple[Array, tuple[Array, Any] | None]:
        """token_ids: int (B, T) or (T,) -> logits (B, T, V) or (T, V), and the cache that `backward` takes.

        positions: int (T,), None: they go on from the key/value cache, or 0 .. T-1. With a `KeyValueCache` (batch 1) the
        tokens are appended to it and see all earlier ones. last_only: the logits of the last position alone, T = 1 in their
        shape, and no cache (None): for a large vocabulary they are most of the memory of a long prompt.
        Raises ValueError for ids outside the vocabulary, sequences longer than the context, and a batch with a cache.
        """
        n_past = kv_cache.length if kv_cache is not None else 0
        token_ids = checked_ids(self.config, token_ids, n_past)
        batch = token_ids.shape[0] if token_ids.ndim == 2 else 1
        t_seq = token_ids.shape[-1]
        if kv_cache is not None and batch != 1:
            raise ValueError(f"a key/value cache holds one sequence, got a batch of {batch}: make one cache a sequence")
        positions = np.arange(n_past, n_past + t_seq) if positions is None else plain_array("positions", positions)
        if positions.shape != (t_seq,) or positions.dtype.kind not in "iu":
            raise ValueError(f"positions must be integers {(t_seq,)}, got {positions.dtype} {positions.shape}")
        check_range("positions", positions, 0, self.config.context_length)
        rows = np.ascontiguousarray(token_ids.reshape(-1), dtype=np.int64)
        positions = np.tile(positions, batch).astype(np.int64)
        if last_only:
            x, *_ = self.hidden_rows(rows, positions, batch, kv_cache, keep_cache=False)  # (N, D)
            logits, *_ = self.unembed_rows(x[t_seq - 1 :: t_seq])  # (B, V)
            shape, cache = (*token_ids.shape[:-1], 1, -1), None
        else:
            logits, cache = self.forward_rows(rows, positions, batch, kv_cache)  # (N, V)
            shape, cache = (*token_ids.shape, -1), (logits, cache)
        if kv_cache is not None:
            kv_cache.length += t_seq
        return logits.reshape(shape), cache

    def generate(
        self,
        prompt_ids: Iterable[int],
        n_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: Seed = 0,
    ) -> list[int]:
        """The next `n_tokens` ids after `prompt_ids`, as a list (see `toy.models.generation.generate`)."""
        return list(generate(self, prompt_ids, n_tokens, temperature, top_k, top_p, seed))

    def new_kv_cache(self) -> "KeyValueCache":
        return KeyValueCache(self.config.n_layers, self.config.context_length)


def checked_ids(config: LanguageModelConfig, token_ids: npt.ArrayLike, n_past: int = 0) -> np.ndarray:
    """token_ids (B, T) or (T,), as an array that a model can read after n_past tokens. Raises ValueError for ids outside the
    vocabulary, and for sequences longer than the context."""
    token_ids = plain_array("token_ids", token_ids)
    if token_ids.ndim not in (1, 2) or token_ids.size == 0 or token_ids.dtype.kind not in "iu":
        raise ValueError(f"token_ids must be integers (B, T) or (T,), got {token_ids.dtype} {token_ids.shape}")
    t_seq = token_ids.shape[-1]
    if n_past + t_seq > config.context_length:
        raise ValueError(
            f"{n_past + t_seq} tokens do not fit the context of {config.context_length}: shorten the sequence"
        )
    check_range("token_ids", token_ids, 0, config.vocab_size)
    return token_ids


class KeyValueCache:
    """The keys and values of the tokens seen so far, per layer, for one sequence. `length`: tokens seen.

    Its arrays grow with the sequence, doubling, up to the context: a file may claim any context, and most texts are short.
    """

    def __init__(self, n_layers: int, context_length: int) -> None:
        self.length = 0
        self.context_length = context_length
        self.layers: list[tuple[Array, ...] | None] = [None] * n_layers

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, ...]:
        """Append k, v (T, width) after the first `length` rows -> all keys and values so far (length + T, width)."""
        end, stores = self.length + len(k), self.layers[layer]
        if stores is None or len(stores[0]) < end:
            rows = min(max(2 * end, _LEAST_ROWS), max(self.context_length, end))
            larger = tuple(np.empty((rows, a.shape[1]), a.dtype) for a in (k, v))
            for store, new in zip(stores or (), larger):
                new[: self.length] = store[: self.length]
            stores = self.layers[layer] = larger
        for store, new in zip(stores, (k, v)):
            store[self.length : end] = new
        return tuple(store[:end] for store in stores)


_LEAST_ROWS = 64  # of a cache: fewer are not worth growing
