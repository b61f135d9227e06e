"""llama.cpp as the judge of what is exported: the same log-probabilities, the same greedy text, the same token ids.

llama.cpp runs on one thread with a float32 key/value cache and without flash attention, so that what is left is rounding. It
needs `pip install xllamacpp`; the comparison on SmolLM2-135M needs the model in the cache too.
"""

import importlib.util
import json
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl
from fetch_test_data import COMMAND, smollm2

import toy
from toy.checks import gradcheck
from toy.data.batches import training_batch
from toy.data.corpora import python_documentation
from toy.data.open_tokenizer import load_tokenizer
from toy.data.tokenizers import ByteTokenizer, CharTokenizer
from toy.files import gguf_write
from toy.files.gguf import GGUF
from toy.files.gguf_write import write_adapter, write_gguf
from toy.models.parameters import ParameterTree
from toy.ops import reference
from toy.trained import load_trained, read_trained
from toy.trained.export import export_adapter, export_model
from toy.training import LoRAOptions, Training

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
pytestmark = pytest.mark.llama_cpp

ROOT = Path(__file__).parent.parent
BAR = 1e-3  # nats, largest difference of a log-probability
CONTEXT = 48
PROMPTS = ("The ", "Python\n", "a = ")


class LlamaCpp:
    """A model file in llama.cpp, for the length of the object. adapter: a path, or a dict of paths to their scales.
    half_cache: keys and values in half precision, as it has them by itself."""

    def __init__(self, path, adapter=None, half_cache=False):
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = (
            128  # at most: the server stays within the model's context, and wants room in it for one token more
        )
        settings.n_parallel, settings.warmup, settings.fit_params = 1, False, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        if not half_cache:
            settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.verbosity = -1
        if adapter is not None:
            adapters = adapter if isinstance(adapter, dict) else {adapter: 1.0}
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(a), scale) for a, scale in adapters.items()]
        self._server = xllamacpp.Server(settings)

    def log_probabilities(self, ids, vocab_size):
        """ids (T,) -> (T, V): of the token after each prefix. The server tells the last position alone, so T requests."""
        rows = np.full((len(ids), vocab_size), np.nan)
        for t in range(len(ids)):
            request = {
                "prompt": [int(i) for i in ids[: t + 1]],
                "n_predict": 1,
                "n_probs": vocab_size,
                "temperature": 0,
            }
            choice = self._server.handle_completions(request)["choices"][0]
            for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
                rows[t, entry["id"]] = entry["logprob"]
        assert not np.isnan(rows).any()
        return rows

    def write(self, prompt, n_tokens):
        """The greedy continuation."""
        request = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0}
        return self._server.handle_completions(request)["choices"][0]["text"]

    def chat(self, message, n_tokens):
        """The likeliest answer to one message, by the template in the file -> (text, why it ended)."""
        request = {"messages": [{"role": "user", "content": message}], "max_tokens": n_tokens, "temperature": 0}
        choice = self._server.handle_chat_completions(request)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    def tokenize(self, text):
        return self._post("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def detokenize(self, ids):
        return self._post("/detokenize", tokens=[int(i) for i in ids])["content"]

    def _post(self, path, **content):
        request = urllib.request.Request(
            self._server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


TEXT = python_documentation().text[:60_000]
ASCII = "".join(character for character in TEXT if character.isascii())
TOKENIZERS = {
    "ascii": CharTokenizer.from_text(ASCII),
    "unicode": CharTokenizer.from_text(TEXT + "é…日😀"),
    "bytes": ByteTokenizer(),
}


class Trained:
    """A small model that was trained for some steps, and its F32 export."""

    def __init__(self, folder, arch, tokenizer_name, steps=150):
        self.tokenizer = TOKENIZERS[tokenizer_name]
        self.text = ASCII if tokenizer_name == "ascii" else TEXT
        v = self.tokenizer.vocab_size
        self.config = {
            "gpt2": toy.GPT2Config(v, 64, 4, 256, 2, CONTEXT),
            "llama": toy.LlamaConfig(v, 64, 4, 2, 160, 2, CONTEXT),
            "llama-options": toy.LlamaConfig(
                v, 64, 4, 2, 96, 2, CONTEXT, rope_base=5e4, rms_eps=1e-6, head_dim=24, untied=True, qkv_bias=True
            ),
        }[arch]
        self.ids = self.tokenizer.encode(self.text)
        self.recipe = toy.recipes.FromScratch(backend="numpy")
        self.recipe.realize(self.config, toy.RecipeOptions(t_seq=CONTEXT, t_batch=4, seed=1))
        adamw = self.recipe.adamw(lr=3e-3)
        with threadpoolctl.threadpool_limits(1):  # small matrices: a second thread would wait more than work
            for step in range(steps):
                batch = training_batch(self.ids, 4, CONTEXT, seed=0, step=step)
                hp = adamw.hp_for_step(step)
                self.loss = self.recipe.step(batch.token_ids, None, batch.labels, hp, is_first=step == 0)
        self.parameters = self.recipe.parameters()
        self.path = folder / f"{arch}-{tokenizer_name}.gguf"
        write_gguf(self.path, self.config, self.parameters, self.tokenizer)

    @property
    def sample(self):
        """As many ids as llama.cpp takes at a time."""
        return self.ids[2000 : 2000 + CONTEXT - 1]

    def log_probabilities(self, ids):
        """ids (CONTEXT - 1,) -> (CONTEXT - 1, V), by the recipe that was trained (the last token changes nothing before)."""
        rows = np.tile(np.append(ids, 0), (4, 1))
        return log_softmax(self.recipe.logits(rows)[0, :-1])


@pytest.fixture(scope="module", params=["gpt2-ascii", "llama-ascii", "llama-options-unicode", "gpt2-bytes"])
def trained(request, tmp_path_factory):
    arch, _, tokenizer = request.param.rpartition("-")
    return Trained(tmp_path_factory.mktemp("llama_cpp"), arch, tokenizer)


@pytest.fixture(scope="module")
def judge(trained):
    return LlamaCpp(trained.path)


def continuation(model, tokenizer, prompt, n_tokens):
    return tokenizer.decode(model.generate(tokenizer.encode(prompt), n_tokens, temperature=0))


def test_the_same_log_probabilities_as_the_recipe(trained, judge):
    assert trained.loss < 0.75 * np.log(trained.config.vocab_size)
    ids = trained.sample
    theirs = judge.log_probabilities(ids, trained.config.vocab_size)
    assert theirs.std() > 1  # not a uniform distribution, with which anything would agree
    assert np.abs(theirs - trained.log_probabilities(ids)).max() <= BAR


def half_precision_gelu(x):
    """GELU as llama.cpp's CPU code computes it: a table over all float16 numbers, with float16 results."""
    rounded = x.astype(np.float16).astype(np.float32)
    y, cache = reference.gelu(rounded)
    return np.where(x <= -10, 0, np.where(x >= 10, x, y.astype(np.float16))).astype(np.float32), cache


def test_what_is_left_for_gpt2_is_llama_cpps_gelu(tmp_path):
    """With its table in the place of our GELU the difference falls by an order of magnitude: the export itself is exact."""
    trained = Trained(tmp_path, "gpt2", "ascii")
    ids = trained.sample
    theirs = LlamaCpp(trained.path).log_probabilities(ids, trained.config.vocab_size)
    differences = []
    for gelu in (reference.gelu, half_precision_gelu):
        ops = types.SimpleNamespace(**(vars(reference) | {"gelu": gelu}))
        model = toy.GPT2(trained.config, ops=ops)
        model.parameters.load(trained.parameters)
        differences.append(np.abs(theirs - log_softmax(model.forward(ids)[0])).max())
    assert differences[1] < min(1e-4, differences[0] / 4), differences


def test_the_same_greedy_text(trained, judge):
    model = toy.engines.model_from(trained.config, trained.parameters, "numpy")
    for prompt in PROMPTS:
        ours = continuation(model, trained.tokenizer, prompt, CONTEXT - len(prompt))
        assert judge.write(prompt, CONTEXT - len(prompt)) == ours, prompt


def test_the_same_token_ids_and_the_text_back(trained, judge):
    sample = trained.text[5000:7000]
    if trained.tokenizer is TOKENIZERS["unicode"]:
        sample += "😀é日…é."
    ids = trained.tokenizer.encode(sample).tolist()
    assert judge.tokenize(sample) == ids
    assert judge.detokenize(ids) == sample


def test_a_character_outside_the_vocabulary_does_not_stop_llama_cpp(trained, judge):
    """It shares its first bytes with some that are inside. What becomes of it is in `tokenizer_metadata`."""
    if trained.tokenizer is TOKENIZERS["unicode"]:
        assert judge.tokenize("aè⁦b") == trained.tokenizer.encode("ab").tolist()


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_smaller_exports_load_and_stay_close(trained, tmp_path, kind):
    if kind == "q8_0":
        pytest.importorskip("gguf", reason="the gguf package is not installed (pip install gguf)")
    path = tmp_path / f"{kind}.gguf"
    write_gguf(path, trained.config, trained.parameters, trained.tokenizer, type=kind)
    ids = trained.sample[:16]
    theirs = LlamaCpp(path).log_probabilities(ids, trained.config.vocab_size)
    with GGUF.open(path) as gguf:
        model = toy.engines.model_from(trained.config, gguf.parameters(), "numpy")
    ours = log_softmax(model.forward(ids)[0])
    assert np.abs(theirs - ours).max() < 0.25  # llama.cpp rounds the activations too


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A trained Llama, adapters of rank 4 and alpha 6 on all its matrices, and the model with them."""
    base = Trained(tmp_path_factory.mktemp("lora"), "llama", "ascii")
    generator = np.random.default_rng(5)
    adapters, rank, alpha = {}, 4, 6.0
    for name, weight in base.parameters.items():
        if name.startswith("blk.") and weight.ndim == 2:
            stem = name.removesuffix(".weight")
            n_out, n_in = weight.shape
            adapters[f"{stem}.lora_a"] = generator.normal(0, n_in**-0.5, (rank, n_in)).astype(np.float32)
            adapters[f"{stem}.lora_b"] = generator.normal(0, 0.1, (n_out, rank)).astype(np.float32)
    assert len(adapters) == 2 * 7 * base.config.n_layers
    tree = ParameterTree.zeros({name: array.shape for name, array in (base.parameters | adapters).items()})
    tree.load(base.parameters | adapters)
    model = toy.Llama(base.config, parameters=tree, ops=reference, lora_scale=alpha / rank)
    return types.SimpleNamespace(base=base, adapters=adapters, alpha=alpha, rank=rank, model=model)


def test_an_adapter_on_the_f32_base(adapted, tmp_path):
    base, path = adapted.base, tmp_path / "adapter.gguf"
    write_adapter(path, base.config, adapted.adapters, adapted.alpha, base=base.parameters)
    check_adapted(adapted, LlamaCpp(base.path, adapter=path))


def test_a_merged_export(adapted, tmp_path):
    base, path = adapted.base, tmp_path / "merged.gguf"
    merged = dict(base.parameters)
    for name in merged:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_a" in adapted.adapters:
            product = adapted.adapters[f"{stem}.lora_b"].astype(np.float64) @ adapted.adapters[f"{stem}.lora_a"]
            merged[name] = (merged[name] + adapted.alpha / adapted.rank * product).astype(np.float32)
    write_gguf(path, base.config, merged, base.tokenizer)
    check_adapted(adapted, LlamaCpp(path))


def check_adapted(adapted, judge):
    base = adapted.base
    ids = base.sample
    theirs = judge.log_probabilities(ids, base.config.vocab_size)
    assert np.abs(theirs - log_softmax(adapted.model.forward(ids)[0])).max() <= BAR
    assert np.abs(theirs - base.log_probabilities(ids)).max() > 0.1  # the adapter does something
    for prompt in PROMPTS:
        ours = continuation(adapted.model, base.tokenizer, prompt, CONTEXT - len(prompt))
        assert judge.write(prompt, CONTEXT - len(prompt)) == ours, prompt


# -- other names of the same model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ministral(tmp_path_factory):
    """A file of architecture mistral3 with random weights, large enough that attention matters."""
    folder, generator = tmp_path_factory.mktemp("ministral"), np.random.default_rng(2)
    tokenizer = TOKENIZERS["ascii"]
    config = toy.LlamaConfig(
        tokenizer.vocab_size, 48, 3, 1, 80, 2, CONTEXT, rope_base=5e4, rms_eps=1e-6, head_dim=24, untied=True
    )
    parameters = {
        name: generator.normal(0, 0.3 if len(shape) == 2 else 1, shape).astype(np.float32)
        for name, shape in toy.Llama.parameter_shapes(config).items()
    }
    write_gguf(folder / "llama.gguf", config, parameters, tokenizer)
    return written_as_mistral3(folder / "llama.gguf", folder / "ministral.gguf")


def written_as_mistral3(source, path, **more):
    with GGUF.open(source) as gguf:
        prefix = f"{gguf.architecture}."
        entries = {name.replace(prefix, "mistral3.", 1): value for name, value in gguf.metadata.items()}
        tensors = [(name, gguf.dequantize(name), "F32") for name in gguf.tensors]
    more = {f"mistral3.{name}": value for name, value in more.items()}
    gguf_write._write(path, entries | {"general.architecture": "mistral3"} | more, tensors)
    return path


IDS = np.arange(20) * 7 % TOKENIZERS["ascii"].vocab_size


def test_mistral3_on_a_plain_file(ministral):
    loaded = toy.load(ministral, backend="numpy")
    theirs = LlamaCpp(ministral).log_probabilities(IDS, loaded.config.vocab_size)
    assert theirs.std() > 1
    assert np.abs(theirs - log_softmax(loaded.logits(IDS))).max() <= BAR
    prompt = "a = "
    ours = loaded.generate(prompt, CONTEXT - len(prompt), temperature=0)
    assert LlamaCpp(ministral).write(prompt, CONTEXT - len(prompt)) == ours


def test_an_adapter_on_a_mistral3_file(ministral, tmp_path):
    """llama.cpp takes it because it names the base's architecture."""
    generator = np.random.default_rng(3)
    with GGUF.open(ministral) as gguf:
        config = gguf.config()
        n_out, n_in = gguf.tensors["blk.1.attn_q.weight"].shape
        adapters = {
            "blk.1.attn_q.lora_a": generator.normal(0, n_in**-0.5, (4, n_in)).astype(np.float32),
            "blk.1.attn_q.lora_b": generator.normal(0, 1, (n_out, 4)).astype(np.float32),
        }
        write_adapter(tmp_path / "adapter.gguf", config, adapters, alpha=6.0, base=gguf)
    theirs = LlamaCpp(ministral, tmp_path / "adapter.gguf").log_probabilities(IDS, config.vocab_size)
    ours = toy.load(ministral, tmp_path / "adapter.gguf", backend="numpy").logits(IDS)
    assert np.abs(theirs - log_softmax(ours)).max() <= BAR
    without = toy.load(ministral, backend="numpy").logits(IDS)
    assert np.abs(theirs - log_softmax(without)).max() > 0.1


@pytest.mark.parametrize(
    "keys",
    [
        {"rope.scaling.attn_factor": 2.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8},
    ],
)
def test_scaled_rope_of_mistral3_changes_the_result_here_too(ministral, tmp_path, keys):
    path = written_as_mistral3(ministral, tmp_path / "scaled.gguf", **keys)
    theirs = LlamaCpp(path).log_probabilities(IDS, TOKENIZERS["ascii"].vocab_size)
    assert np.abs(theirs - log_softmax(toy.load(path, backend="numpy").logits(IDS))).max() <= BAR
    assert np.abs(theirs - log_softmax(toy.load(ministral, backend="numpy").logits(IDS))).max() > 0.1


def test_the_attention_temperature_of_mistral3_ends_the_context(ministral, tmp_path):
    """It changes what stands after the original context, and only that; longer texts are refused."""
    keys = {"attention.temperature_scale": 0.5, "rope.scaling.original_context_length": 7}
    path = written_as_mistral3(ministral, tmp_path / "scaled.gguf", **keys)
    loaded = toy.load(path, backend="numpy")
    theirs = LlamaCpp(path).log_probabilities(IDS, loaded.config.vocab_size)
    assert np.abs(theirs[:7] - log_softmax(loaded.logits(IDS[:7]))).max() <= BAR
    assert np.abs(theirs[7:] - log_softmax(toy.load(ministral, backend="numpy").logits(IDS))[7:]).max() > 0.1
    with pytest.raises(ValueError, match="do not fit the context of 7"):
        loaded.logits(IDS[:8])


# -- toy eval ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_perplexity_of_llama_perplexity(tmp_path, add_bos):
    """Its numbers out of llama.cpp's own log-probabilities, window by window, as that program puts them together."""
    pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
    import model_files

    tokenizer, config = model_files.tokenizer(**{"tokenizer.ggml.add_bos_token": add_bos}), model_files.config("llama")
    model = toy.Llama(config)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(0))
    for i, row in enumerate(model.parameters["token_embd.weight"]):
        if not (tokenizer.token_bytes(i) and tokenizer.token_bytes(i).isascii()):
            row *= 0.05  # never the likeliest: the server tells no probabilities with a token that is no text yet
    write_gguf(tmp_path / "model.gguf", config, model.parameters, tokenizer)
    text, context = "hello 12, hello. How far is it?\n" * 2, 11
    judge = LlamaCpp(tmp_path / "model.gguf")
    tokens = judge._post("/tokenize", content=text.removesuffix("\n"), add_special=True, parse_special=False)["tokens"]
    assert (tokens[0] == tokenizer.bos_id) == add_bos
    found = []
    for start in range(0, len(tokens) - context + 1, context):
        window = tokens[start : start + context]
        read = [tokenizer.bos_id, *window[1:]] if add_bos else window
        rows = judge.log_probabilities(read[:-1], config.vocab_size)
        found += [rows[i, window[i + 1]] for i in range(context // 2, context - 1)]
    loaded = toy.load(tmp_path / "model.gguf", backend="numpy")
    result = loaded.evaluate(text, context, like="llama-perplexity")
    assert len(found) == result.n_tokens >= 15 and np.std(found) > 0.5
    assert np.abs(result.log_probabilities - found).max() <= BAR
    assert result.perplexity == pytest.approx(np.exp(-np.mean(found)), rel=1e-3)


# -- toy export --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """A trained Llama as a Q8_0 file, and the directory of a LoRA run on it."""
    pytest.importorskip("gguf", reason="the gguf package is not installed (pip install gguf)")
    folder = tmp_path_factory.mktemp("export")
    base = Trained(folder, "llama", "ascii")
    write_gguf(folder / "base.gguf", base.config, base.parameters, base.tokenizer, type="q8_0")
    (folder / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(400)))
    options = LoRAOptions(
        model=str(folder / "base.gguf"), corpus=str(folder / "text.txt"), steps=60, context=24, batch=4, lr=0.02, rank=4,
        alpha=6.0, targets=("q", "v", "up", "down"), eval_batches=1, sample_tokens=1, backend="numpy",
    )  # fmt: skip
    with threadpoolctl.threadpool_limits(1):
        for _ in Training(options, out=folder / "run").run():
            pass
    return folder / "run"


def test_a_merged_export_of_a_lora_run_on_a_quantised_base(lora_run, tmp_path):
    """The base dequantised plus scale * B A, in F32: llama.cpp computes what the run does."""
    export_model(read_trained(lora_run), tmp_path / "merged.gguf")
    judge, trained = LlamaCpp(tmp_path / "merged.gguf"), load_trained(lora_run, backend="numpy")
    ids = trained.tokenizer.encode("17 squared is 289.\n18 squared is 3")
    theirs = judge.log_probabilities(ids, trained.model.config.vocab_size)
    assert np.abs(theirs - log_softmax(trained.model.forward(ids)[0])).max() <= BAR
    without = load_trained(lora_run.parent / "base.gguf", backend="numpy").model
    assert np.abs(theirs - log_softmax(without.forward(ids)[0])).max() > 1  # the adapter does something


def test_an_exported_adapter_on_the_quantised_base(lora_run, tmp_path):
    """llama.cpp rounds the activations for Q8_0 products: close, and far from the base alone."""
    export_adapter(read_trained(lora_run), tmp_path / "adapter.gguf")
    base = lora_run.parent / "base.gguf"
    trained = load_trained(base, tmp_path / "adapter.gguf", backend="numpy")
    ids = trained.tokenizer.encode("17 squared is 289.\n18 squared is 3")
    theirs = LlamaCpp(base, adapter=tmp_path / "adapter.gguf").log_probabilities(ids, trained.model.config.vocab_size)
    difference = np.abs(theirs - log_softmax(trained.model.forward(ids)[0]))
    without = np.abs(theirs - log_softmax(load_trained(base, backend="numpy").model.forward(ids)[0]))
    assert np.median(difference) < 0.05 and np.median(difference) < np.median(without) / 10


# -- a real model ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
def test_the_greedy_text_of_a_quantised_file():
    """By the ggml graph, which rounds as llama.cpp does, its prompt too on cpu-native."""
    pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
    path = smollm2()
    if path is None:
        pytest.skip(f"SmolLM2-135M is not in the cache ({COMMAND})")
    judge, loaded = LlamaCpp(path, half_cache=True), toy.load(path, backend="ggml", device="cpu-native")
    assert loaded.generator.how == "ggml graph, activations rounded as in llama.cpp"
    exact = toy.load(path, backend="ggml", precision="f32")
    for prompt, rounding_shows in (("The capital of France is", True), ("def add(a, b):\n", False)):
        text = loaded.generate(prompt, 64, temperature=0)
        assert text == judge.write(prompt, 64)
        if rounding_shows:
            assert text != exact.generate(prompt, 64, temperature=0)


@pytest.mark.slow
def test_smollm2(tmp_path):
    """Log-probabilities on the F32 re-export, the tokenizer on documents, and a chat."""
    pytest.importorskip("gguf", reason="the gguf package is not installed (pip install gguf)")
    pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
    path = smollm2()
    if path is None:
        pytest.skip(f"SmolLM2-135M is not in the cache ({COMMAND})")
    with GGUF.open(path) as gguf:
        config, tokenizer, parameters = gguf.config(), load_tokenizer(gguf), gguf.parameters()
    write_gguf(tmp_path / "smollm2.gguf", config, parameters, tokenizer)
    judge = LlamaCpp(tmp_path / "smollm2.gguf")
    model = toy.engines.model_from(config, parameters)

    ids = tokenizer.encode("The capital of France is Paris, and")
    theirs = judge.log_probabilities(ids, config.vocab_size)
    assert np.abs(theirs - log_softmax(model.forward(ids)[0])).max() <= BAR

    documents = [TEXT[start : start + 3000] for start in range(0, len(TEXT), 3000)]
    for document in documents:
        assert judge.tokenize(document) == tokenizer.encode(document).tolist()

    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Name three colours."}])
    ours = "".join(tokenizer.stream(model.generate(tokenizer.encode(chat, parse_special=True), 12, temperature=0)))
    assert judge.write(chat, 12) == ours


@pytest.mark.slow
def test_a_chat_fine_tune_of_smollm2_stops_in_both(tmp_path):
    """examples/chat_finetune.py: after 30 steps on conversations the model answers in the new manner and ends its answer by
    itself, and llama.cpp, with its own reading of the template and the adapter on the quantised file, writes the same."""
    path = smollm2()
    if path is None:
        pytest.skip(f"SmolLM2-135M is not in the cache ({COMMAND})")
    spec = importlib.util.spec_from_file_location("chat_finetune", ROOT / "examples" / "chat_finetune.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    training = example.train(tmp_path / "run", path, 30)
    assert training.data.family == "examples"
    before, after = load_trained(path), load_trained(tmp_path / "run")
    export_adapter(read_trained(tmp_path / "run"), tmp_path / "adapter.gguf")
    judge = LlamaCpp(path, adapter=tmp_path / "adapter.gguf")
    for word, expected in (("tall", "Short, of course."), ("young", "Old, of course.")):
        question = example.QUESTION.format(word)
        assert "of course" not in example.answer(before.model, before.tokenizer, question)[1]
        ids, text = example.answer(after.model, after.tokenizer, question)
        assert text == expected and len(ids) < 10
        assert judge.chat(question, 40) == (text, "stop")
