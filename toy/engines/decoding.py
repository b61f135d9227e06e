"""Decoding as a ggml graph of its own: a language model that goes on from a text, one token after the other.

A `Decoder` generates what `toy.models.generation` samples from. The weights stay in their GGUF type; on the CPU they stay
where they lie, mapped from the file, except for types that ggml multiplies faster in another order of their blocks. The keys
and values of the tokens read so far are on the device, in a store that grows with the text. One graph reads one token; it
serves until attention needs more rows of the store (`ROWS_STEP`).

Its products are ggml's own: for quantised weights ggml rounds the activations to 8-bit integers, as llama.cpp does, so that a
text is llama.cpp's text. Where the eager op table computes with the same weights in float32 it is exact, and slower.
"""

import statistics
import threading
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt

from toy.engines.graph import WORTH_TWO_THREADS
from toy.engines.weights import borrow
from toy.models.base import LanguageModel, checked_ids
from toy.models.llama import Llama
from toy.models.parameters import ParameterTree
from toy.ops.graph.decoding import DecodingOps, RecordedCache, Store, Weight
from toy.quantized import Leaf, QuantizedMatrix
from toy.switch import Resolved, num_threads, usable_processors

if TYPE_CHECKING:
    from ggml_bridge import Backend, Explanation, Tensor

ROWS_STEP = 256  # attention reads so many rows of the store, or a multiple
PROMPT_STEP = 512  # tokens of a prompt that one run of a graph reads
# on the CPU the compiled kernels read what has at least so many tokens: they dequantise each weight once for all of them
# (SmolLM2 Q4_1, one thread: 63 ms for 16 tokens, where ggml's products take 150, and llama.cpp 145)
EAGER_PROMPT = 8
# a software Vulkan device reads so many tokens or one, see `is_software_vulkan`
FIXED_STEP = 16
TRY_AFTER = 2  # tokens until another number of threads is tried, at first: each time that it is no faster twice as many


class DeviceCache:
    """The tokens that a `Decoder` has read of one text. `length`: how many; it may be set to fewer, to go on from there.
    bridge: the device on which it reads them."""

    def __init__(self, bridge: "Backend") -> None:
        self.bridge = bridge
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    @length.setter
    def length(self, value: int) -> None:
        if not 0 <= value <= len(self.ids):
            raise ValueError(
                f"the length of a cache can be set to at most the {len(self.ids)} tokens in it, got {value}"
            )
        del self.ids[value:]


class Decoder:
    """A language model to generate from, with `config`, `new_kv_cache` and `forward` as a `LanguageModel` has them.

    model: the model on an eager op table; its parameters are shared. choice: a device of the backend ggml; on "cpu" the
    compiled kernels read longer prompts, on "cpu-native" and other devices ggml's operations compute everything. Raises
    ValueError, RuntimeError or MemoryError, with a sentence that says why, for a model that the device does not take.

    There is one store of keys and values: the text that was read last is in it. A cache of another text is read again when it
    is gone on from. Threads that share a decoder wait for each other. What is changed in the model's parameters afterwards
    may be seen or not.
    """

    def __init__(self, model: LanguageModel, choice: Resolved) -> None:
        import ggml_bridge

        self.eager, self.config, self.device = model, model.config, choice.device
        self.on_cpu = choice.device.startswith("cpu")
        worth_two = 2 * sum(leaf.size for leaf in model.parameters.values()) >= WORTH_TWO_THREADS
        self.threads = ThreadChoice((num_threads() or usable_processors()) if self.on_cpu and worth_two else 1)
        self.bridge = ggml_bridge.Backend("cpu" if self.on_cpu else choice.device, self.threads.now)
        self.frees_nothing = is_software_vulkan(self.bridge.device_name)
        self.weights = {
            name: Weight(leaf, partial(place, self.bridge, leaf, name)) for name, leaf in model.parameters.items()
        }
        self.rounds_activations = any(is_rounded(weight.leaf) for weight in self.weights.values())
        self._store: Store | None = None
        self._in_store: DeviceCache | None = None  # whose keys and values those are
        # by how many tokens of the text in the store the logits were no numbers any more
        self._spoilt_at: int | None = None
        self._lock = threading.RLock()
        # by whether it reads one token; by its shape where none is freed
        self._graphs: dict[bool | tuple[int, int], _DecodingGraph] = {}
        try:
            self._recorded(1, 1)  # what the device does not run is told now
        except BaseException:
            self.bridge.close()
            raise

    def close(self) -> None:
        """Free the device's memory. Nothing can be called after it."""
        with self._lock:
            self.bridge.close()

    def new_kv_cache(self) -> DeviceCache:
        return DeviceCache(self.bridge)

    def forward(
        self, token_ids: npt.ArrayLike, *, kv_cache: DeviceCache, last_only: bool = True
    ) -> tuple[np.ndarray, None]:
        """token_ids: int (T,), which go on from the cache -> logits of the last one (1, V), None. Errors as
        `LanguageModel.forward`; last_only: nothing else is to be had. kv_cache: from this decoder's `new_kv_cache`."""
        if not last_only:
            raise ValueError("a Decoder gives the logits of the last position: set last_only, or take the model itself")
        if getattr(kv_cache, "bridge", None) is not self.bridge:
            raise ValueError(
                f"this {type(kv_cache).__name__} is not of this Decoder: take one that its new_kv_cache() gives"
            )
        with self._lock:
            return self._forward(token_ids, kv_cache), None

    def _forward(self, token_ids: npt.ArrayLike, kv_cache: DeviceCache) -> np.ndarray:
        ids = checked_ids(self.config, token_ids, kv_cache.length)
        if ids.ndim != 1:
            raise ValueError(f"a Decoder reads one sequence, token_ids (T,), got {ids.shape}")
        rows = np.ascontiguousarray(ids, np.int64)
        if self._spoilt_at is not None and (self._in_store is not kv_cache or kv_cache.length < self._spoilt_at):
            self._clean()
        if self._in_store is not kv_cache:  # another text was read since
            self._in_store, again = None, self.new_kv_cache()
            if kv_cache.ids:
                self._read(np.array(kv_cache.ids, np.int64), again)
            self._in_store = kv_cache
        return self._read(rows, kv_cache)

    def explain(self) -> "Explanation":
        """What reads one token: the nodes, the number of splits, and the bytes; str() is a table."""
        with self._lock:
            return self._recorded(1, max(1, len(self._in_store.ids) if self._in_store else 1)).graph.explain()

    # -- reading ------------------------------------------------------------------------------------------------------

    def _read(self, rows: np.ndarray, cache: DeviceCache) -> np.ndarray:
        """Read the tokens after those in the cache -> logits of the last one (1, V)."""
        logits = np.empty((0, 0), np.float32)
        eager = self.device == "cpu" and len(rows) >= EAGER_PROMPT
        for part in [rows] if eager else self._parts(rows):
            positions = np.arange(cache.length, cache.length + len(part))
            if eager:
                logits = self._read_eagerly(part, positions)
            else:
                recorded = self._recorded(len(part), cache.length + len(part))
                threads = self.threads.next() if len(part) == 1 else self.threads.now
                if threads != self.bridge.n_threads:
                    self.bridge.n_threads = threads
                started = time.perf_counter()
                logits = recorded.run(token_ids=part, positions=positions)
                if len(part) == 1:
                    self.threads.took(time.perf_counter() - started)
            if self._spoilt_at is None and not np.isfinite(logits).all():
                self._spoilt_at = cache.length + len(part)
            cache.ids.extend(part.tolist())
        return logits

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        """The tokens in the parts that one run of a graph each reads."""
        if not self.frees_nothing:
            return [rows[start : start + PROMPT_STEP] for start in range(0, len(rows), PROMPT_STEP)]
        whole = len(rows) - len(rows) % FIXED_STEP
        return [*rows[:whole].reshape(-1, FIXED_STEP), *rows[whole:, None]]

    def _clean(self) -> None:
        """Zeros for what is in the store. Attention multiplies rows that a token does not see by 0, which serves for numbers:
        an infinity or NaN of an earlier text would be seen."""
        self._in_store = None
        if self._store is not None:
            for tensor in (*self._store.keys, *self._store.values):
                tensor.zero()
        self._spoilt_at = None

    def _read_eagerly(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        store: Any = _StoredCache(self._reserve(positions[-1] + 1), positions[0])
        x, *_ = self.eager.hidden_rows(rows, positions, 1, store, keep_cache=False)
        logits, *_ = self.eager.unembed_rows(x[-1:])
        return np.asarray(logits)

    def _recorded(self, n: int, length: int) -> "_DecodingGraph":
        """The graph that reads n tokens, the last of which is the length-th of its text."""
        self._reserve(length)
        n_rows = padded(length)
        key = (n, n_rows) if self.frees_nothing else n == 1
        recorded = self._graphs.get(key)
        if recorded is None or (recorded.n, recorded.n_rows) != (n, n_rows):
            self._graphs.pop(key, None)
            if recorded is not None:
                recorded.graph.close()
            self._graphs[key] = recorded = _DecodingGraph(self, n, n_rows)
        return recorded

    # -- memory -------------------------------------------------------------------------------------------------------

    def _reserve(self, length: int) -> Store:
        """The store, which holds so many tokens now; what is in it stays. It grows by doubling, up to the context."""
        store, rows = self._store, padded(self.config.context_length if self.frees_nothing else length)
        if store is not None and rows <= store.rows:
            return store
        rows = max(rows, min(2 * store.rows if store else 0, padded(self.config.context_length)))
        dtype = "f16" if self.rounds_activations else "f32"
        width = self._width()
        layers = range(self.config.n_layers)
        try:
            made = Store(
                [self.bridge.persistent((rows, width), dtype, f"keys {i}") for i in layers],
                [self.bridge.persistent((width * rows, 1), dtype, f"values {i}") for i in layers],
                rows,
            )
            self.bridge.allocate()
        except BaseException:
            self.bridge.forget_pending()  # the store stays, and what is in it can be gone on from
            raise
        if store is not None:
            for layer in layers:
                write_rows(made, layer, *read_rows(store, layer, store.rows))
        self._store, self._graphs = made, {}  # before anything is given back: they are used no more
        if store is not None:
            self.bridge.release_tensors([*store.keys, *store.values])
        return made

    def _width(self) -> int:
        """Numbers in the key of a token, in all heads."""
        return getattr(self.config, "n_kv_heads", self.config.n_heads) * self.config.d_head


def is_software_vulkan(device_name: str) -> bool:
    """Whether a device is Mesa's software Vulkan (lavapipe, which names itself llvmpipe). There a decoder frees nothing
    before it is closed, and records few graphs: they read `FIXED_STEP` tokens or one.

    With Mesa 22.3, after the memory of one graph was freed, the next one crashed the process or never came back, in Mesa's
    code. (ggml writes as many bindings of a descriptor set as the shader reads and leaves in the rest what an earlier shader
    had there, which Vulkan allows; that Mesa reads them is a guess.) Other numbers of tokens need shaders that it compiles
    for up to a minute each."""
    import ggml_bridge

    found = [device for device in ggml_bridge.devices() if device.name == device_name]
    return any(device.backend == "Vulkan" and "llvmpipe" in device.description for device in found)


def place(bridge: "Backend", leaf: Leaf, name: str) -> "Tensor":
    """A parameter as a tensor: where a CPU multiplies it faster in another order of its blocks, a copy in that order."""
    if is_rounded(leaf):
        repacked = bridge.repacked(leaf.raw, leaf.shape, leaf.type.lower(), name=name)
        if repacked is not None:
            return repacked
    return borrow(bridge, leaf, name)


class ThreadChoice:
    """All threads or one, whichever reads a token sooner. ggml's threads wait for each other after every node, spinning: on a
    machine that others use, two are slower than one (SmolLM2 on 2 processors at a load of 16: 0.45 tokens a second against
    5). So now and then two tokens are read the other way. The numbers are the same either way.

    most: all threads. now: as many as are used. `next` gives those for the next token, then `took` is told how long it took.
    """

    def __init__(self, most: int) -> None:
        self.most = self.now = most
        self._period = self._left = TRY_AFTER
        self._times: deque[float] = deque(maxlen=5)  # of the last tokens as it is now
        self._tried: list[float] = []  # of the tokens of a trial

    def next(self) -> int:
        return self._other() if self.most > 1 and self._left <= 0 else self.now

    def took(self, seconds: float) -> None:
        if self.most == 1:
            return
        if self._left > 0:
            self._times.append(seconds)
            self._left -= 1
            return
        self._tried.append(seconds)
        if len(self._tried) < 2:
            return
        if min(self._tried) < 0.9 * statistics.median(self._times):
            self.now, self._period = self._other(), TRY_AFTER
        else:
            self._period = min(2 * self._period, 64 * TRY_AFTER)
        self._left, self._tried = self._period, []
        self._times.clear()

    def _other(self) -> int:
        return 1 if self.now > 1 else self.most


class _DecodingGraph:
    """The recorded forward of n tokens, with attention over n_rows rows of the store."""

    def __init__(self, decoder: Decoder, n: int, n_rows: int) -> None:
        eager, config = decoder.eager, decoder.config
        self.n, self.n_rows, self.graph = n, n_rows, decoder.bridge.graph()
        ops = DecodingOps(self.graph, n, decoder.rounds_activations)
        token_ids = ops.integers("token_ids", n, config.vocab_size)
        positions = ops.integers("positions", n, config.context_length)
        model: Any = type(eager).from_config(
            config, ops=ops, parameters=ParameterTree(decoder.weights), lora_scale=eager.lora_scale
        )
        if isinstance(model, Llama):  # with the scores, not with the queries, which are rounded to half precision first
            ops.attention_scale, model.query_scale = model.config.attention_scale, 1.0
        cache = RecordedCache(ops, decoder._reserve(n_rows), n_rows)
        x, *_ = model.hidden_rows(token_ids, positions, 1, cache, keep_cache=False)  # (n, D)
        logits, *_ = model.unembed_rows(x if n == 1 else self.graph.slice(x, 0, n - 1, n))  # (1, V)
        self.logits = self.graph.output(logits)
        self.graph.allocate()
        self.feeds = []
        for tensor, value in ops.feeds:
            if callable(value):
                self.feeds.append((tensor, value))
            else:
                tensor.upload(value)

    def run(self, **arrays: np.ndarray) -> np.ndarray:
        for tensor, function in self.feeds:
            tensor.upload(function(arrays))
        self.graph.compute()
        return self.logits.download()


class _StoredCache:
    """The key/value cache of a forward on an eager op table, in a decoder's store. length: tokens in it already."""

    def __init__(self, store: Store, length: int) -> None:
        self.store, self.length = store, int(length)

    def extend(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """k, v: of the new tokens (T, width) -> all keys and values so far (length + T, width)."""
        if self.length:
            past = read_rows(self.store, layer, self.length)
            k, v = (np.concatenate(pair) for pair in zip(past, (k, v)))
        write_rows(self.store, layer, k, v)
        return k, v


def read_rows(store: Store, layer: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of the first `end` tokens, float32 (end, width) each."""
    keys, values = store.keys[layer].download(), store.values[layer].download()
    return keys[:end], np.ascontiguousarray(values.reshape(-1, store.rows)[:, :end].T)


def write_rows(store: Store, layer: int, keys: np.ndarray, values: np.ndarray) -> None:
    """Write keys and values (T, width) as those of the first T tokens; rows after them are zero."""
    end, width = keys.shape
    all_keys, all_values = np.zeros((store.rows, width), np.float32), np.zeros((width, store.rows), np.float32)
    all_keys[:end], all_values[:, :end] = keys, values.T
    store.keys[layer].upload(all_keys)
    store.values[layer].upload(all_values.reshape(-1, 1))


def padded(length: int) -> int:
    """The number of the store's rows that attention reads for a text of so many tokens."""
    return -(-length // ROWS_STEP) * ROWS_STEP


def is_rounded(leaf: Leaf) -> TypeGuard[QuantizedMatrix]:
    """Whether ggml rounds the activations that this weight is multiplied with."""
    return isinstance(leaf, QuantizedMatrix) and leaf.type != "F32"
