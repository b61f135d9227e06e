"""Generation as a ggml graph: the same numbers as the model itself, whatever the order in which texts are read."""

import dataclasses
import gc
import json
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

import ggml_bridge
import toy
from toy.checks import gradcheck
from toy.engines import decoding
from toy.engines.decoding import Decoder
from toy.files.gguf import GGUF
from toy.files.gguf_write import write_adapter, write_gguf
from toy.models import model_for
from toy.models.architectures import language_models
from toy.models.generation import generate, go_on
from toy.switch import Resolved
from toy.trained import read_trained
from toy.trained.export import export_model
from toy.trained.generator import generator

pytestmark = pytest.mark.usefixtures("kernels")

V, CONTEXT = 97, 640
SIZES = {"vocab_size": V, "d_model": 64, "n_heads": 4, "d_ff": 96, "n_layers": 2, "context_length": CONTEXT}
CONFIGS = {
    "transformer": toy.TransformerConfig(**SIZES),
    "gpt2": toy.GPT2Config(**SIZES),
    "llama": toy.LlamaConfig(**SIZES, n_kv_heads=2),
}
IDS = np.arange(CONTEXT) ** 2 * 7 % V


def random_model(config):
    model = model_for(config)(config)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(0))
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return random_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def llama():
    return random_model(CONFIGS["llama"])


@pytest.fixture
def decode():
    """Makes a `Decoder` that is closed at the end."""
    made = []

    def make(model, device="cpu"):
        made.append(Decoder(model, Resolved("ggml", device, "")))
        return made[-1]

    yield make
    for decoder in made:
        decoder.close()


def close_to(expected, found, bar=2e-5):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bar * np.abs(expected).max()


def read(decoder, cache, *parts):
    """The logits of the last token of each part, (number of parts, V)."""
    return np.concatenate([decoder.forward(part, kv_cache=cache, last_only=True)[0] for part in parts])


def test_every_language_model_is_here():
    assert CONFIGS.keys() == {row.name for row, fields in language_models().values() if not fields}


def test_in_any_parts_it_is_the_model(model, decode, monkeypatch):
    """Token by token, a prompt by the compiled kernels, and by graphs of several runs; the store grows meanwhile."""
    monkeypatch.setattr(decoding, "PROMPT_STEP", 100)
    wanted = model.forward(IDS[:600])[0]
    for device in ("cpu", "cpu-native"):
        decoder = decode(model, device)
        cache = decoder.new_kv_cache()
        parts = [IDS[:1], IDS[1:4], IDS[4:250], *IDS[250:260, None], IDS[260:500], IDS[500:501], IDS[501:600]]
        ends = np.cumsum([len(part) for part in parts]) - 1
        close_to(wanted[ends], read(decoder, cache, *parts))
        assert cache.length == 600


def test_the_store_grows_with_the_text(llama, decode):
    decoder, rows = decode(llama), []
    cache = decoder.new_kv_cache()
    for part in (IDS[:1], IDS[1:256], IDS[256:257], IDS[257:600]):
        read(decoder, cache, part)
        rows.append((decoder._store.rows, decoder.bridge.persistent_bytes))
    assert [n for n, _ in rows] == [256, 256, 512, 768]  # 640 tokens of the context are at most 768 rows
    weight = 2 * 2 * 2 * 16 * 4  # bytes of a token: keys and values, layers, heads, numbers, float32
    assert [n_bytes for _, n_bytes in rows] == [n * weight for n, _ in rows]  # what was outgrown is given back


def test_texts_that_take_turns(model, decode):
    """There is memory for one text: another one is read again when it is gone on from."""
    decoder = decode(model)
    one, other = decoder.new_kv_cache(), decoder.new_kv_cache()
    begun = IDS[:20], IDS[100:103]
    read(decoder, one, begun[0])
    read(decoder, other, begun[1])
    found = [read(decoder, cache, IDS[50:51]) for cache in (one, other, one)]
    texts = [[*begun[0], IDS[50]], [*begun[1], IDS[50]], [*begun[0], IDS[50], IDS[50]]]
    for text, logits in zip(texts, found):
        close_to(model.forward(np.array(text), last_only=True)[0], logits)


def test_a_cache_is_cut_and_gone_on_from(model, decode):
    decoder = decode(model)
    cache = decoder.new_kv_cache()
    read(decoder, cache, IDS[:30])
    cache.length = 12
    close_to(model.forward(np.r_[IDS[:12], 5, 6], last_only=True)[0], read(decoder, cache, np.array([5, 6])))
    ids = [*IDS[:12].tolist(), 5, 6, 7]
    assert list(go_on(decoder, ids, cache, 5, temperature=0)) == list(
        generate(model, [*IDS[:12].tolist(), 5, 6, 7], 5, temperature=0)
    )
    for wrong in (-1, cache.length + 1):
        with pytest.raises(ValueError, match="can be set to at most the 19 tokens"):
            cache.length = wrong
    assert cache.length == 19


def test_the_window_moves_when_the_context_is_full(decode):
    for config in CONFIGS.values():
        small = random_model(dataclasses.replace(config, context_length=24))
        wanted = list(generate(small, IDS[:20], 40, temperature=0))
        assert len(set(wanted)) > 3
        assert list(generate(decode(small), IDS[:20], 40, temperature=0)) == wanted


def test_sampling_and_stops(model, decode):
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 4}
    wanted = list(generate(model, IDS[:9], 60, **options))
    decoder = decode(model)
    assert list(generate(decoder, IDS[:9], 60, **options)) == wanted
    stop = wanted[30]
    assert list(generate(decoder, IDS[:9], 60, **options, stop_ids=[stop])) == wanted[: wanted.index(stop)]


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "q4_1"])
def test_quantised_weights_round_the_activations(decode, tmp_path, kind):
    """Close to the exact numbers, but not equal to them; and what a graph of several tokens says is what one token says."""
    config = dataclasses.replace(CONFIGS["llama"], d_ff=128)
    write_gguf(tmp_path / "f32.gguf", config, random_model(config).parameters)
    export_model(read_trained(tmp_path / "f32.gguf"), tmp_path / "m.gguf", kind)
    model = read_trained(tmp_path / "m.gguf").model("cython")
    decoder, native = decode(model), decode(model, "cpu-native")
    assert decoder.rounds_activations
    wanted = model.forward(IDS[:40])[0]
    cache = decoder.new_kv_cache()
    found = read(decoder, cache, *IDS[:40, None])
    spread = wanted.std()
    assert 1e-5 * spread < np.abs(found - wanted).mean() < 0.03 * spread
    together = read(native, native.new_kv_cache(), IDS[:40])
    assert np.abs(together - found[-1:]).max() < 0.01 * spread


def test_adapters(decode, tmp_path):
    config = dataclasses.replace(CONFIGS["llama"], untied=True)
    write_gguf(tmp_path / "m.gguf", config, random_model(config).parameters)
    generator = np.random.default_rng(1)
    arrays = {
        f"{name}.lora_{which}": generator.normal(0, 0.2, shape).astype(np.float32)
        for name, width in (("blk.0.attn_q", 64), ("blk.1.ffn_up", 96))
        for which, shape in (("a", (3, 64)), ("b", (width, 3)))
    }
    arrays |= {"token_embd.lora_a": generator.normal(0, 0.2, (V, 3)).astype(np.float32)}
    arrays |= {"token_embd.lora_b": generator.normal(0, 0.2, (64, 3)).astype(np.float32)}
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        write_adapter(tmp_path / "a.gguf", config, arrays, 2.0, base=gguf)
    with_it = toy.load(tmp_path / "m.gguf", tmp_path / "a.gguf")
    wanted = with_it.model.forward(IDS[:12])[0]
    plain = toy.load(tmp_path / "m.gguf").model.forward(IDS[:12])[0]
    assert np.abs(wanted - plain).max() > 0.1 * np.abs(plain).max()
    decoder = decode(with_it.model)
    close_to(wanted, read(decoder, decoder.new_kv_cache(), *IDS[:12, None]))


def test_where_nothing_is_freed(llama, decode, monkeypatch):
    """As on software Vulkan: the same text from graphs of two numbers of tokens, none of which is let go of."""
    monkeypatch.setattr(decoding, "is_software_vulkan", lambda device_name: True)
    decoder, wanted = decode(llama, "cpu-native"), llama.forward(IDS[:300])[0]
    kept = {}
    for _ in range(2):  # the second text has the graphs of the first
        found = read(decoder, decoder.new_kv_cache(), IDS[:100], IDS[100:101], IDS[101:300])
        close_to(wanted[[99, 100, 299]], found)
        kept = kept or dict(decoder._graphs)
    assert decoder._graphs == kept
    assert set(kept) == {(1, 256), (16, 256), (1, 512), (16, 512)}


def test_one_piece_that_metal_and_cuda_run(model, decode):
    decoder = decode(model, "cpu-native")
    read(decoder, decoder.new_kv_cache(), IDS[:3], IDS[3:4])
    for recorded in decoder._graphs.values():
        assert ggml_bridge.metal_unsupported(recorded.graph) == ggml_bridge.cuda_unsupported(recorded.graph) == []
        assert recorded.graph.explain().splits == 1
    assert decoder.explain().splits == 1


def test_wrong_ids_are_told_and_change_nothing(llama, decode):
    decoder = decode(llama)
    cache = decoder.new_kv_cache()
    read(decoder, cache, IDS[:5])
    for wrong, message in (([V], "token_ids"), ([[1, 2]], "one sequence"), ([], "token_ids"), (IDS, "do not fit")):
        with pytest.raises(ValueError, match=message):
            decoder.forward(np.array(wrong, np.int64), kv_cache=cache, last_only=True)
    with pytest.raises(ValueError, match="last_only"):
        decoder.forward(IDS[:1], kv_cache=cache, last_only=False)
    assert cache.length == 5
    close_to(llama.forward(IDS[:6], last_only=True)[0], read(decoder, cache, IDS[5:6]))


def test_a_cache_of_another_decoder_is_refused(llama, decode):
    """Each has a store of its own: what one has read, the other has not."""
    one, other = decode(llama), decode(llama)
    cache = one.new_kv_cache()
    read(one, cache, IDS[:5])
    for wrong in (cache, llama.new_kv_cache()):
        with pytest.raises(ValueError, match=r"is not of this Decoder: take one that its new_kv_cache\(\) gives"):
            other.forward(IDS[5:6], kv_cache=wrong, last_only=True)
    close_to(llama.forward(IDS[:6], last_only=True)[0], read(one, cache, IDS[5:6]))


def test_without_memory_to_grow_nothing_is_lost(llama, decode, monkeypatch):
    decoder = decode(llama)
    cache = decoder.new_kv_cache()
    read(decoder, cache, IDS[:255])
    n_bytes = decoder.bridge.persistent_bytes
    with monkeypatch.context() as full:
        full.setattr(ggml_bridge.core, "_memory_limit", lambda total: n_bytes)
        for part in (IDS[255:300], IDS[255:257]):
            with pytest.raises(MemoryError, match="bytes are needed on CPU"):
                read(decoder, cache, part)
        assert cache.length == 255
        close_to(llama.forward(IDS[:256], last_only=True)[0], read(decoder, cache, IDS[255:256]))
    close_to(llama.forward(IDS[:257], last_only=True)[0], read(decoder, cache, IDS[256:257]))
    assert decoder.bridge.persistent_bytes == 2 * n_bytes  # not also what was asked for in vain


def test_numbers_that_are_none_stay_in_their_text(decode):
    """A token with a damaged embedding: what a token does not see of the store is multiplied by 0, and 0 * NaN is NaN."""
    model = random_model(dataclasses.replace(CONFIGS["llama"], untied=True))
    model.parameters["token_embd.weight"][V - 1] = np.nan
    text = np.r_[IDS[:3], 5, V - 1, 7]
    wanted = model.forward(text[:4])[0]
    assert np.isfinite(wanted).all() and np.isnan(model.forward(text)[0][4:]).all()
    decoder = decode(model)
    cache, other = decoder.new_kv_cache(), decoder.new_kv_cache()
    assert np.isnan(read(decoder, cache, *text[:, None])[4:]).all()
    close_to(wanted[2:3], read(decoder, other, text[:3]))
    assert np.isnan(read(decoder, cache, text[5:])).all()
    cache.length = 3
    close_to(wanted[3:4], read(decoder, cache, text[3:4]))


def test_threads_wait_for_each_other(llama, decode):
    """Four texts at once through one decoder: each is what it is alone."""
    prompts = [IDS[start : start + 12] for start in (0, 40, 80, 120)]
    wanted = [list(generate(llama, prompt, 12, temperature=0)) for prompt in prompts]
    decoder, interval = decode(llama), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns all the time
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda prompt: list(generate(decoder, prompt, 12, temperature=0)), prompts))
    finally:
        sys.setswitchinterval(interval)
    assert found == wanted


def test_nothing_stays_when_a_decoder_is_let_go_of(llama):
    """Without the garbage collector: no circle of references holds the weights, which may be mapped from a file."""
    gc.collect()
    gc.disable()
    try:
        decoder = Decoder(llama, Resolved("ggml", "cpu", ""))
        read(decoder, decoder.new_kv_cache(), IDS[:20], IDS[20:21])
        bridge = weakref.ref(decoder.bridge)
        del decoder
        assert bridge() is None
    finally:
        gc.enable()


# -- who computes ------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_is_taken(llama):
    assert isinstance(generator(llama, "ggml").model, Decoder)
    assert generator(llama, "ggml").how == "ggml graph, float32"
    for backend, precision in (("cython", "auto"), ("ggml", "f32")):
        found = generator(llama, backend, precision=precision)
        assert found.model is llama and found.how == "compiled kernels, float32"
    with pytest.raises(ValueError, match="precision must be one of auto, f32"):
        generator(llama, precision="bf16")
    with pytest.raises(ValueError, match="computes with the compiled kernels on the CPU, not on cpu-native"):
        generator(llama, "ggml", "cpu-native", "f32")


def test_a_closed_model_gives_the_memory_back(llama, tmp_path):
    write_gguf(tmp_path / "m.gguf", llama.config, llama.parameters, model_tokenizer())
    with toy.load(tmp_path / "m.gguf", backend="ggml") as loaded:
        loaded.generate("ab", 2)
        decoder = loaded.generator.model
        assert isinstance(decoder, Decoder) and not decoder.bridge.closed
    assert decoder.bridge.closed
    with pytest.raises(RuntimeError, match="closed"):
        read(decoder, decoder.new_kv_cache(), IDS[:1])


def test_a_model_that_the_graph_does_not_take_is_told(llama, monkeypatch, tmp_path):
    write_gguf(tmp_path / "m.gguf", llama.config, llama.parameters, model_tokenizer())
    loaded = toy.load(tmp_path / "m.gguf", backend="ggml")
    wanted = loaded.generate("ab", 8, temperature=0)
    assert loaded.generator.notice == ""

    def refuse(*arguments):
        raise RuntimeError("no such node")

    monkeypatch.setattr(decoding, "_DecodingGraph", refuse)
    loaded = toy.load(tmp_path / "m.gguf", backend="ggml")
    with pytest.warns(
        UserWarning, match="compiled kernels, float32, because the ggml graph does not take it: no such node"
    ):
        assert loaded.generate("ab", 8, temperature=0) == wanted


def model_tokenizer():
    from toy.data.tokenizers import CharTokenizer

    return CharTokenizer("".join(chr(i) for i in range(32, 127)) + "\n\t")


def test_the_command_says_how_fast_and_how(llama, toy_command, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, llama.config, llama.parameters, model_tokenizer())
    records = []
    for arguments in ((), ("--precision", "f32"), ("--backend", "cython"), ("--device", "cpu-native")):
        code, out, err = toy_command(
            "generate", path, "--prompt=ab", "--tokens=6", "--temperature=0", "--json", *arguments
        )
        assert (code, err) == (0, "")
        records.append(json.loads(out))
    assert len({record["text"] for record in records}) == 1
    exact = "compiled kernels, float32"
    assert [record["computed_by"] for record in records] == ["ggml graph, float32", exact, exact, "ggml graph, float32"]
    assert all(speed > 0 for record in records for speed in record["timings"].values())
    code, _, err = toy_command("generate", path, "--precision=f16")
    assert code == 2 and "precision must be one of auto, f32" in err


def test_threads_are_as_many_as_are_faster():
    """By times that are made up: first two threads are faster, then, with other programs about, one, then two again."""
    choice, seconds, used = decoding.ThreadChoice(2), {1: 1.7, 2: 1.0}, []

    def read(n):
        for _ in range(n):
            threads = choice.next()
            used.append(threads)
            choice.took(seconds[threads])

    read(200)
    assert choice.now == 2 and used.count(1) <= 14
    seconds[2] = 20.0
    read(200)
    assert choice.now == 1 and used[-50:].count(2) <= 2
    seconds[2] = 1.0
    read(200)
    assert choice.now == 2
    alone = decoding.ThreadChoice(1)
    for _ in range(100):
        assert alone.next() == 1
        alone.took(1.0)


def test_another_number_of_threads_gives_the_same_numbers(llama, decode):
    decoder = decode(llama)
    assert decoder.threads.most == 1  # too small to be worth two
    found = []
    for threads in (1, 2):
        decoder.bridge.n_threads = decoder.threads.now = threads
        found.append(read(decoder, decoder.new_kv_cache(), *IDS[:6, None]))
        assert decoder.bridge.n_threads == threads
    assert np.array_equal(*found)


# -- the bridge --------------------------------------------------------------------------------------------------------


def test_memory_of_persistent_tensors_is_given_back():
    with ggml_bridge.Backend("cpu", 1) as backend:
        kept = backend.persistent((8, 4))
        backend.allocate()
        kept.upload(np.ones((8, 4)))
        one, two = backend.persistent((100, 4)), backend.persistent((100, 4))
        backend.allocate()
        n_bytes, graph = backend.persistent_bytes, backend.graph()
        graph.output(graph.add(one, two))
        graph.allocate()
        with pytest.raises(ValueError, match="no persistent tensor of this backend with memory"):
            backend.release_tensors(
                [one, graph.input((4,))] if not graph.is_allocated else [one, backend.persistent((2,))]
            )
        one.upload(np.zeros((100, 4)))  # nothing was given back
        backend.release_tensors([one])
        assert graph.closed and backend.persistent_bytes == n_bytes  # they share a buffer
        backend.release_tensors([two, two])
        assert backend.persistent_bytes < n_bytes
        with pytest.raises(RuntimeError, match="has no memory"):
            one.download()
        with pytest.raises(ValueError, match="was given back"):
            backend.graph().add(one, kept)
        assert (kept.download() == 1).all()


def test_tensors_that_got_no_memory_are_forgotten(monkeypatch):
    with ggml_bridge.Backend("cpu", 1) as backend:
        large = backend.persistent((1000, 4))
        with monkeypatch.context() as full:
            full.setattr(ggml_bridge.core, "_memory_limit", lambda total: 1000)
            for _ in range(2):  # another try asks for the same
                with pytest.raises(MemoryError, match="bytes are needed on CPU"):
                    backend.allocate()
            backend.forget_pending()
            small = backend.persistent((10, 4))
            backend.allocate()
        assert (small.download() == 0).all() and backend.persistent_bytes < 1000
        with pytest.raises(ValueError, match="was given back"):
            backend.graph().add(large, large)


def test_rows_are_written_into_half_precision():
    with ggml_bridge.Backend("cpu", 1) as backend:
        target = backend.persistent((5, 3), "f16")
        g = backend.graph()
        rows, ids = g.input((2, 3)), g.input((2,), "i32")
        g.set_rows(target, rows, ids)
        with pytest.raises(ValueError, match="must be f32"):
            g.set_rows(g.cast(rows, "f16"), rows, ids)
        g.allocate()
        numbers = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
        rows.upload(numbers)
        ids.upload(np.array([3, 1]))
        g.compute()
        wanted = np.zeros((5, 3), np.float32)
        wanted[[3, 1]] = numbers.astype(np.float16)
        assert (target.download() == wanted).all()


def test_ggmls_own_gelu():
    """As exact as its table of float16 numbers is on the CPU."""
    x, up = np.random.default_rng(0).normal(0, 2, (2, 5, 12)).astype(np.float32)
    exact = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        inputs = g.input((5, 12)), g.input((5, 12))
        alone, gated = g.output(g.unary(inputs[0], "gelu")), g.output(g.geglu(*inputs))
        with pytest.raises(ValueError, match=r"geglu: .* must be of the same shape"):
            g.geglu(inputs[0], g.input((5, 4)))
        with pytest.raises(ValueError, match=r"geglu: .* view with gaps|geglu: .* strided"):
            g.geglu(g.transpose(inputs[0]), g.transpose(inputs[1]))
        assert ggml_bridge.metal_unsupported(g) == []
        g.allocate()
        inputs[0].upload(x)
        inputs[1].upload(up)
        g.compute()
        assert np.abs(alone.download() - exact).max() < 3e-3
        assert np.abs(gated.download() - exact * up).max() < 3e-3 * np.abs(up).max()


def test_repacked_weights_give_the_same_products():
    generator = np.random.default_rng(0)
    w = generator.normal(size=(64, 256)).astype(np.float32)
    n_repacked = 0
    with ggml_bridge.Backend("cpu", 1) as backend:
        for dtype in ("q4_0", "q4_1", "q8_0", "q4_k", "q6_k", "iq4_nl"):
            raw = ggml_bridge.quantize(w, dtype)
            plain, packed = backend.mapped(aligned(raw), w.shape, dtype), backend.repacked(raw, w.shape, dtype)
            if packed is None:
                continue
            n_repacked += 1
            for rows in (1, 7):
                g = backend.graph()
                x = g.input((rows, 256))
                products = [g.output(g.mul_mat(weight, x)) for weight in (plain, packed)]
                g.allocate()
                x.upload(generator.normal(size=(rows, 256)))
                g.compute()
                wanted, found = (product.download() for product in products)
                assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
            g = backend.graph()
            ids = g.input((1,), "i32")
            for use in (
                lambda g=g, packed=packed, ids=ids: g.get_rows(packed, ids),
                lambda g=g, packed=packed: g.slice(packed, 0, 0, 8),
                lambda g=g, packed=packed: g.reshape(packed, (128, 128)),
                lambda g=g, packed=packed: g.cast(packed, "f32"),
            ):
                with pytest.raises(ValueError, match="repacked for products"):
                    use()
            with pytest.raises(ValueError, match="cannot be read back"):
                packed.download()
            with pytest.raises(ValueError):
                packed.upload(raw)
            with pytest.raises(ValueError):
                packed.zero()
        with pytest.raises(ValueError, match="takes 4608 bytes"):
            backend.repacked(raw[:2], w[:32].shape, dtype)
        assert backend.repacked(w, w.shape, "f32") is None  # there is nothing to repack
    if ggml_bridge.load().x86_features() > 0:
        assert n_repacked > 0


def aligned(raw):
    memory = np.empty(raw.nbytes + 32, np.uint8)
    start = -memory.ctypes.data % 32
    memory[start : start + raw.nbytes] = raw.reshape(-1)
    return memory[start : start + raw.nbytes]
