"""LoRA adapters: what a file may hold, and what of it llama.cpp and this library do with it; which matrices are trained, with
which scale and dropout; several adapters at use."""

import json
import warnings

import numpy as np
import pytest

import toy
from toy.checks import gradcheck
from toy.data.tokenizers import CharTokenizer
from toy.engines.adapters import TARGETS, check_targets, targets_of
from toy.files import gguf_write
from toy.files.gguf import GGUF
from toy.files.gguf_write import read_adapter, write_gguf
from toy.models import model_for
from toy.ops import reference
from toy.trained import read_trained
from toy.trained.adapters import AdapterWarning
from toy.trained.export import export_adapter, export_model
from toy.training import LoRAOptions, Training

BAR = 1e-3  # nats, largest difference of a log-probability from llama.cpp's
GRADIENT_BAR = 2e-5  # relative L2 per tensor, float32 against PyTorch's float64
TOKENIZER = CharTokenizer("".join(chr(i) for i in range(32, 127)) + "\n\t")  # ASCII alone: no end token
V, CONTEXT, T = TOKENIZER.vocab_size, 40, 7
IDS = np.arange(T) ** 2 * 7 % V
SIZES = {"vocab_size": V, "d_model": 24, "n_heads": 3, "d_ff": 40, "n_layers": 2, "context_length": CONTEXT}
CONFIGS = {
    "untied": toy.LlamaConfig(**SIZES, n_kv_heads=1, head_dim=14, untied=True),
    "tied": toy.LlamaConfig(**SIZES, n_kv_heads=3),
    "gpt2": toy.GPT2Config(**SIZES),
}
QUANTISED = {  # rows in whole blocks of Q8_0
    "untied": toy.LlamaConfig(V, 64, 2, 1, 96, 2, CONTEXT, untied=True),
    "gpt2": toy.GPT2Config(V, 64, 2, 96, 2, CONTEXT),
}
ARCH = {"untied": "llama", "tied": "llama", "gpt2": "gpt2"}


def random_parameters(config, seed=0):
    model = model_for(config)(config)
    gradcheck.random_parameters(model.parameters, np.random.default_rng(seed))
    return dict(model.parameters.items())


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def as_there(loaded):
    """The log-probabilities of IDS by a `toy.load`ed model, of a GPT-2 with llama.cpp's GELU, a table of float16 numbers."""
    if loaded.model.arch == "gpt2":
        from test_llama_cpp import half_precision_gelu

        loaded.model.ops = type(
            "Ops", (), {name: staticmethod(f) for name, f in vars(reference).items() if callable(f)}
        )
        loaded.model.ops.gelu = staticmethod(half_precision_gelu)
    return log_softmax(loaded.logits(IDS))


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (pip install xllamacpp)")
    from test_llama_cpp import LlamaCpp

    return LlamaCpp


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Paths of a model of each kind, F32."""
    folder = tmp_path_factory.mktemp("bases")
    for kind, config in CONFIGS.items():
        write_gguf(folder / f"{kind}.gguf", config, random_parameters(config), TOKENIZER)
    return {kind: folder / f"{kind}.gguf" for kind in CONFIGS}


# -- adapter files -----------------------------------------------------------------------------------------------------


def pair(name, n_in, n_out, rank=3, seed=0):
    """The two tensors of an adapter as a file has them."""
    generator = np.random.default_rng([seed, n_in, n_out])
    down = generator.normal(0, n_in**-0.5, (rank, n_in)).astype(np.float32)
    up = generator.normal(0, 0.5, (n_out, rank)).astype(np.float32)
    return {f"{name}.lora_a": down, f"{name}.lora_b": up}


def of_the_embedding(d, rank=3):
    generator = np.random.default_rng(3)
    rows, columns = generator.normal(0, 1, (V, rank)), generator.normal(0, 1, (d, rank))
    return {"token_embd.weight.lora_a": np.float32(rows), "token_embd.weight.lora_b": np.float32(columns)}


class File:
    """An adapter file. tensors, keys: beside those that every adapter has (None: without this key). tail: bytes behind it."""

    def __init__(self, tensors, alone=False, tail=0, **keys):
        self.tensors, self.alone, self.tail = tensors, alone, tail
        self.keys = {name.replace("__", "."): value for name, value in keys.items()}

    def write(self, path, kind):
        c = CONFIGS[kind]
        first = pair("blk.0.ffn_down.weight", c.d_ff, c.d_model)
        keys = {"general.type": "adapter", "general.architecture": ARCH[kind], "adapter.type": "lora"}
        keys = keys | {"adapter.lora.alpha": 6.0} | self.keys
        tensors = self.tensors if self.alone else first | self.tensors
        keys = {name: value for name, value in keys.items() if value is not None}
        gguf_write._write(path, keys, [(name, array, "F32") for name, array in tensors.items()])
        with open(path, "ab") as file:
            file.write(bytes(self.tail))


D, F = SIZES["d_model"], SIZES["d_ff"]
Q = pair("blk.0.attn_q.weight", D, 3 * 14)
HALF = {"blk.1.ffn_up.weight.lora_a": np.ones((3, D), np.float32)}
ROW = np.full(D, 3, np.float32)

# what llama.cpp takes, and so does this library
TAKEN = {
    "a plain one": File(Q),
    "ranks that differ": File(Q | pair("blk.1.ffn_up.weight", D, F, 5)),
    "a rank above the width": File(pair("blk.1.attn_k.weight", D, 14, 31)),
    "alpha 0": File(Q, adapter__lora__alpha=0.0),
    "no alpha": File(Q, adapter__lora__alpha=None),
    "alpha below 0": File(Q, adapter__lora__alpha=-6.0),
    "the output matrix": File(pair("output.weight", D, V), alone=True),
    "the embedding": File(of_the_embedding(D)),
    "the embedding and the output": File(of_the_embedding(D) | pair("output.weight", D, V, 4)),
    "a norm": File({"blk.0.attn_norm.weight": ROW}),
    "a norm of nothing": File({"blk.7.attn_q_norm.weight": ROW[:5], "output_norm.weight": ROW}),
    "unknown general keys": File({}, general__whatever=7, general__base_model__count=1, general__file_type=99),
    "keys for people": File({}, adapter__lora__task_name="rhymes", adapter__lora__prompt_prefix="Rhyme: "),
    "unknown adapter keys": File({}, adapter__lora__rslora=True, adapter__whatever=3),
    "keys of a model": File({}, llama__block_count=77, llama__rope__freq_base=3.0, tokenizer__ggml__model="gpt2"),
    "zero bytes behind it": File({}, tail=64),
}
# what neither takes, and what this library says
REFUSED = {
    "the embedding, otherwise": (File(pair("token_embd.weight", D, V)), r"token_embd.lora_a has shape \(3, 24\)"),
    "a bias": (File({"blk.0.attn_q.bias": ROW}), "'blk.0.attn_q.bias'"),
    "a pair of a bias": (File(pair("blk.0.attn_q.bias", D, 1)), "'blk.0.attn_q.bias.lora_a'"),
    "a whole matrix": (File({"blk.0.ffn_up.weight": np.ones((F, D), np.float32)}), "'blk.0.ffn_up.weight'"),
    "half a pair": (File(HALF), "blk.1.ffn_up.lora_a is not one of a pair"),
    "a magnitude": (File({"blk.0.ffn_down.weight.lora_magnitude": ROW}), "lora_magnitude"),
    "a layer that is not there": (File(pair("blk.9.ffn_up.weight", D, F)), r"no matrix blk\.9\.ffn_up"),
    "the transposed layout": (
        File({name: np.ascontiguousarray(array.T) for name, array in pair("blk.1.ffn_up.weight", D, F).items()}),
        r"blk\.1\.ffn_up\.lora_a has shape",
    ),
    "another type": (File({}, adapter__type="dora"), "not a LoRA adapter"),
    "no type": (File({}, adapter__type=None), "not a LoRA adapter"),
    "no adapter": (File({}, general__type=None), "not a LoRA adapter"),
    "another architecture": (File({}, general__architecture="qwen2"), "it is for a qwen2 model"),
    "no tokens to wait for": (File({}, adapter__alora__invocation_tokens=3), r"adapter\.alora\.invocation_tokens"),
}  # fmt: skip
# what llama.cpp opens and then does nothing with, or nothing before certain tokens: refused here by name
DEAD = {
    "tokens to wait for": (
        File({}, adapter__alora__invocation_tokens=np.array([3, 4], np.uint32)), r"adapter\.alora\.invocation_tokens",
    ),
    "norms alone": (File({"blk.0.attn_norm.weight": ROW}, alone=True), "it has no adapters"),
    "nothing": (File({}, alone=True), "it has no adapters"),
    "a pair of a norm": (File(pair("output_norm.weight", D, 1), alone=True), r"no matrix output_norm\.weight"),
}  # fmt: skip
OF_TIED = {
    "the output matrix": (File(pair("output.weight", D, V)), "its output matrix is its token embedding"),
    "the embedding, otherwise": (File(pair("token_embd.weight", D, V)), "the model's output matrix too"),
}
OF_GPT2 = {
    "every matrix": File(
        {
            name: array
            for i, stem, n_in, n_out in (
                (0, "attn_qkv", D, 3 * D), (1, "attn_qkv", D, 3 * D), (0, "attn_output", D, D), (1, "ffn_up", D, F),
                (1, "ffn_down", F, D),
            )
            for name, array in pair(f"blk.{i}.{stem}.weight", n_in, n_out, 2 + i, seed=i).items()
        }
    ),
    "a norm": File({"blk.0.attn_norm.weight": ROW}),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(llama_cpp, bases):
    return {kind: llama_cpp(path).log_probabilities(IDS, V) for kind, path in bases.items()}


def there(llama_cpp, base, path):
    """What llama.cpp gives, None where it does not open the adapter."""
    try:
        return llama_cpp(base, path).log_probabilities(IDS, V)
    except RuntimeError:
        return None


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind, name", [("untied", name) for name in TAKEN] + [("gpt2", name) for name in OF_GPT2])
def test_what_llama_cpp_takes_is_computed_alike(llama_cpp, bases, plain, tmp_path, kind, name):
    base, path = bases[kind], tmp_path / "adapter.gguf"
    (TAKEN if kind == "untied" else OF_GPT2)[name].write(path, kind)
    theirs = there(llama_cpp, base, path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loaded = toy.load(base, path, backend="numpy")
    assert len(told) == ("norm" in name) == ("norms beside its adapters" in "".join(str(one.message) for one in told))
    warnings.simplefilter("ignore", AdapterWarning)  # of what follows, until the test ends
    assert np.abs(theirs - plain[kind]).max() > 0.1
    assert np.abs(theirs - as_there(loaded)).max() <= BAR
    # and in every use: on the kernels, evaluated, merged, exported again
    compiled = toy.load(base, path)
    assert np.abs(compiled.logits(IDS) - toy.load(base, path, backend="numpy").logits(IDS)).max() < 1e-4
    assert compiled.generate("a = ", 12, temperature=0) == toy.load(base, path, backend="numpy").generate(
        "a = ", 12, temperature=0
    )
    text = TOKENIZER.decode(IDS)
    assert abs(compiled.evaluate(text).loss - toy.load(base).evaluate(text).loss) > 1e-3
    stored = read_trained(base, path)
    export_model(stored, tmp_path / "merged.gguf")
    assert np.abs(as_there(toy.load(tmp_path / "merged.gguf", backend="numpy")) - theirs).max() <= BAR
    export_adapter(stored, tmp_path / "again.gguf")
    assert np.abs(there(llama_cpp, base, tmp_path / "again.gguf") - theirs).max() <= BAR


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", ["the output matrix", "the embedding and the output"])
def test_the_merged_model_in_llama_cpp(llama_cpp, bases, tmp_path, name):
    TAKEN[name].write(tmp_path / "adapter.gguf", "untied")
    theirs = there(llama_cpp, bases["untied"], tmp_path / "adapter.gguf")
    export_model(read_trained(bases["untied"], tmp_path / "adapter.gguf"), tmp_path / "merged.gguf")
    assert np.abs(llama_cpp(tmp_path / "merged.gguf").log_probabilities(IDS, V) - theirs).max() <= BAR


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "kind, name", [("untied", name) for name in REFUSED] + [("tied", name) for name in OF_TIED] + [("gpt2", "output")]
)
def test_what_llama_cpp_refuses_is_refused(llama_cpp, bases, tmp_path, kind, name):
    rows = {"untied": REFUSED, "tied": OF_TIED, "gpt2": {"output": OF_TIED["the output matrix"]}}
    file, message = rows[kind][name]
    file.write(tmp_path / "adapter.gguf", kind)
    with pytest.raises(ValueError, match=message):
        toy.load(bases[kind], tmp_path / "adapter.gguf")
    assert there(llama_cpp, bases[kind], tmp_path / "adapter.gguf") is None


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", DEAD)
def test_what_llama_cpp_does_nothing_with_is_refused(llama_cpp, bases, plain, tmp_path, name):
    file, message = DEAD[name]
    file.write(tmp_path / "adapter.gguf", "untied")
    with pytest.raises(ValueError, match=message):
        toy.load(bases["untied"], tmp_path / "adapter.gguf")
    theirs = there(llama_cpp, bases["untied"], tmp_path / "adapter.gguf")
    assert np.abs(theirs - plain["untied"]).max() < 1e-5


@pytest.mark.parametrize(
    "kind, file, message",
    [
        ("untied", File({}, adapter__lora__alpha=6), "alpha = 6, expected a float"),
        ("tied", File(of_the_embedding(D)), "the model's output matrix too"),
        ("gpt2", File(of_the_embedding(D)), "the model's output matrix too"),
        ("gpt2", File(pair("position_embd.weight", D, CONTEXT)), r"position_embd\.weight is looked up"),
    ],
)
def test_what_ends_llama_cpps_process_or_is_lost_there_is_refused(bases, tmp_path, kind, file, message):
    """llama.cpp aborts on the first three, so it is not asked here; the last it opens and ignores."""
    file.write(tmp_path / "adapter.gguf", kind)
    with pytest.raises(ValueError, match=message):
        toy.load(bases[kind], tmp_path / "adapter.gguf")


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0"])
def test_adapters_of_other_types_are_read(tmp_path, type):
    down, up = np.random.default_rng(0).normal(size=(2, 32, 32)).astype(np.float32)
    keys = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
    tensors = [("blk.0.attn_q.weight.lora_a", down, type), ("blk.0.attn_q.weight.lora_b", up, type)]
    gguf_write._write(tmp_path / "a.gguf", keys, tensors)
    read = read_adapter(tmp_path / "a.gguf").parameters
    for name, array in (("lora_a", down), ("lora_b", up)):
        assert 0 < np.abs(read[f"blk.0.attn_q.{name}"] - array).max() < 0.02


def test_describe_tells_what_an_adapter_has(tmp_path, toy_command):
    file = File(TAKEN["a norm"].tensors | pair("output.weight", D, V, 5), adapter__lora__task_name="rhymes")
    file.write(tmp_path / "a.gguf", "untied")
    code, out, _ = toy_command("describe", tmp_path / "a.gguf")
    words = " ".join(out.split())
    assert code == 0 and "rank 3, 5" in words and "alpha 6.0 scale 2, 1.2" in words
    assert "on ffn_down, output" in words and "task name rhymes" in words and "not used blk.0.attn_norm.weight" in words
    TAKEN["no alpha"].write(tmp_path / "a.gguf", "untied")
    assert "alpha none scale 1" in " ".join(toy_command("describe", tmp_path / "a.gguf")[1].split())


# -- several adapters --------------------------------------------------------------------------------------------------


@pytest.fixture
def two(bases, tmp_path):
    """Paths of two adapters for the untied model, of other ranks and alphas, on some matrices both."""
    first, second = tmp_path / "a=1.gguf", tmp_path / "b.gguf"
    File(Q | pair("output.weight", D, V, 5) | of_the_embedding(D)).write(first, "untied")
    File(pair("blk.0.attn_q.weight", D, 42, 2, seed=9) | of_the_embedding(D, 1), adapter__lora__alpha=None).write(
        second, "untied"
    )
    return first, second


@pytest.mark.llama_cpp
def test_several_adapters_with_scales_are_llama_cpps(llama_cpp, bases, two, tmp_path):
    first, second = two
    scales = {first: 0.7, second: -1.5}
    theirs = llama_cpp(bases["untied"], adapter=scales).log_probabilities(IDS, V)
    ours = as_there(toy.load(bases["untied"], scales, backend="numpy"))
    assert np.abs(theirs - ours).max() <= BAR
    for other in ([first], [second], [first, second], {first: 0.7, second: 1.5}):
        assert np.abs(theirs - as_there(toy.load(bases["untied"], other, backend="numpy"))).max() > 0.05
    stored = read_trained(bases["untied"], scales)
    export_model(stored, tmp_path / "merged.gguf")
    assert np.abs(llama_cpp(tmp_path / "merged.gguf").log_probabilities(IDS, V) - theirs).max() <= BAR
    export_adapter(stored, tmp_path / "one.gguf")
    assert np.abs(there(llama_cpp, bases["untied"], tmp_path / "one.gguf") - theirs).max() <= BAR


def test_a_scale_multiplies_an_adapter(bases, two):
    first, _ = two
    plain = toy.load(bases["untied"], backend="numpy").logits(IDS)
    assert np.abs(toy.load(bases["untied"], {first: 0.0}, backend="numpy").logits(IDS) - plain).max() < 1e-5
    once, twice = (
        read_trained(bases["untied"], {first: scale}).model("numpy").parameters["output.lora_b"] for scale in (1, 2)
    )
    assert np.array_equal(2 * once, twice)
    with pytest.raises(ValueError, match=r"scale of .* must be a finite number"):
        toy.load(bases["untied"], {first: float("nan")})


def test_scales_on_the_command_line(bases, two, toy_command, monkeypatch, tmp_path):
    """A name with = in it is a name where such a file is there."""
    monkeypatch.chdir(tmp_path)
    wanted = toy.load(bases["untied"], {"a=1.gguf": 0.7, "b.gguf": 1.0}).generate("a = ", 12, temperature=0)
    common = ["--prompt", "a = ", "--tokens", 12, "--temperature", 0]
    adapters = ["--adapter", "a=1.gguf=0.7", "--adapter", "b.gguf"]
    code, out, _ = toy_command("generate", bases["untied"], *adapters, *common)
    assert (code, out) == (0, f"a = {wanted}\n")
    TAKEN["a norm"].write(tmp_path / "norm.gguf", "untied")
    code, _, error = toy_command("generate", bases["untied"], "--adapter", "norm.gguf", *common)
    assert code == 0 and error.startswith("note: norm.gguf has norms beside its adapters (blk.0.attn_norm.weight)")
    code, out, _ = toy_command("generate", bases["untied"], "--adapter", "a=1.gguf", *common)
    assert code == 0 and out != f"a = {wanted}\n"
    (tmp_path / "text.txt").write_text(TOKENIZER.decode(IDS))
    code, out, _ = toy_command("eval", bases["untied"], *adapters, "--corpus", "text.txt", "--json")
    losses = [
        toy.load(bases["untied"], some).evaluate(TOKENIZER.decode(IDS)).loss
        for some in ({"a=1.gguf": 0.7, "b.gguf": 1.0}, None)
    ]
    assert json.loads(out)["loss"] == pytest.approx(losses[0], abs=1e-5) != pytest.approx(losses[1], abs=1e-3)
    code, _, _ = toy_command("export", bases["untied"], "--lora", "a=1.gguf=0.7", "--lora", "b.gguf", "--out", "m.gguf")
    assert code == 0 and toy.load("m.gguf").generate("a = ", 12, temperature=0) == wanted
    code, _, error = toy_command("generate", bases["untied"], "--adapter", "b.gguf=much", *common)
    assert code == 2 and "must be FILE or FILE=SCALE" in error
    code, _, error = toy_command("generate", bases["untied"], "--adapter", "b.gguf=1", "--adapter", "b.gguf=2", *common)
    assert code == 2 and "given twice" in error


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_targets_and_their_groups():
    untied, tied, gpt2 = CONFIGS["untied"], CONFIGS["tied"], CONFIGS["gpt2"]
    assert targets_of(untied, ["all"]) == tuple(TARGETS) == targets_of(tied, ["mlp", "attention"])
    assert targets_of(untied, ["output", "mlp", "q"]) == ("q", "gate", "up", "down", "output")
    assert targets_of(gpt2, ["all"]) == ("qkv", "o", "up", "down") and targets_of(gpt2, ["attention"]) == ("qkv", "o")
    assert (targets_of(untied, None), targets_of(gpt2, None)) == (("q",), ("qkv",))
    assert check_targets(["up", "all", "up"]) == ("all", "up")
    for config, targets, message in (
        (gpt2, ["q"], "some of qkv, o, up, down: 'q' is not one"),
        (untied, ["qkv"], "down, output: 'qkv' is not one"),
        (tied, ["output"], "output matrix is its token embedding"),
        (tied, [], "none was given .groups of them: all, attention, mlp"),
    ):
        with pytest.raises(ValueError, match=message):
            targets_of(config, targets)


def realize(backend, gguf, rank=3, t_batch=2, accumulate=1, seed=4, recompute=False, **more):
    options = toy.RecipeOptions(t_seq=T, t_batch=t_batch, accumulate=accumulate, seed=seed, recompute=recompute)
    recipe = toy.recipes.LoRA(*backend).realize(gguf, None, rank, options, keep_gradients=True, **more)
    generator = np.random.default_rng(5)
    recipe.load_parameters({n: generator.normal(0, 0.2, a.shape) for n, a in recipe.parameters().items()})
    return recipe


def make_batch(rows=2):
    token_ids, labels = np.random.default_rng(0).integers(0, V, (2, rows, T))
    labels[:, 2:3] = -1
    return token_ids, labels


ALL = {"targets": ("all", "output"), "rslora": True, "alpha": 2.0, "dropout": 0.25}
TRAINED = {
    "untied": ("untied", CONFIGS, ALL),
    "untied, the last layer": ("untied", CONFIGS, {**ALL, "last_layers": 1, "targets": ("mlp", "v", "output")}),
    "gpt2": ("gpt2", CONFIGS, {**ALL, "targets": ("all",)}),
    "gpt2, plain": ("gpt2", CONFIGS, {"targets": ("qkv", "down")}),
    "untied, quantised": ("untied", QUANTISED, ALL),
    "gpt2, quantised": ("gpt2", QUANTISED, {**ALL, "targets": ("all",), "last_layers": 1}),
}


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_torchs(backend, torch_models, tmp_path, name):
    """With dropout on the masks that the recipe draws, which thereby are the same on every backend."""
    kind, configs, more = TRAINED[name]
    if configs is QUANTISED:
        pytest.importorskip("gguf", reason="the gguf package is not installed (pip install gguf)")
    config, (token_ids, labels) = configs[kind], make_batch()
    write_gguf(tmp_path / "m.gguf", config, random_parameters(config), type="f32" if configs is CONFIGS else "q8_0")
    with GGUF.open(tmp_path / "m.gguf") as gguf:
        recipe = realize(backend, gguf, **more)
        scale = 2.0 / 3**0.5 if "rslora" in more else 1.0
        adapters = recipe.parameters()
        of_b = {name: np.float32(scale if name.endswith("lora_b") else 1) for name in adapters}
        weights = gguf.parameters() | {name: array * of_b[name] for name, array in adapters.items()}
        if "last_layers" in more:
            assert not any(name.startswith("blk.0.") for name in adapters) and any("blk.1." in n for n in adapters)
        evaluated = torch_models.run_model(ARCH[kind], weights, config, token_ids, labels)
        assert recipe.evaluate(token_ids, labels) == pytest.approx(evaluated[1], rel=GRADIENT_BAR)
        dropout = recipe.engine.weights.dropout
        if dropout is not None:
            weights |= {leaf: dropout.draw(name, 2 * T, (3, 0)) for leaf, name in dropout.masks.items()}
        _, loss, expected = torch_models.run_model(ARCH[kind], weights, config, token_ids, labels)
        hp = recipe.adamw(lr=0.0).hp_for_step(2)
        assert recipe.step(token_ids, None, labels, hp, is_first=True) == pytest.approx(loss, rel=GRADIENT_BAR)
        assert (abs(loss - evaluated[1]) > 1e-3) == ("dropout" in more)
        for name, gradient in recipe.gradients().items():
            wanted = expected[name] * of_b[name]
            assert np.linalg.norm(gradient - wanted) <= GRADIENT_BAR * np.linalg.norm(wanted), name


def test_gradients_of_an_adapted_embedding_are_torchs(ops, torch_models):
    """No recipe trains it, but the model has its backward."""
    from toy.models.parameters import ParameterTree

    config, (token_ids, labels) = CONFIGS["untied"], make_batch()
    shapes = {"token_embd.lora_a": (V, 3), "token_embd.lora_b": (D, 3)}
    dtype = np.float64 if ops is reference else np.float32
    tree = ParameterTree.zeros(toy.Llama.parameter_shapes(config) | shapes, dtype)
    gradcheck.random_parameters(tree, np.random.default_rng(0))
    model, grads = toy.Llama(config, ops=ops, parameters=tree), None
    grads = model.new_gradients()
    loss = model.backward(model.forward(token_ids)[1], labels, grads)
    _, wanted, expected = torch_models.run_model("llama", dict(tree.items()), config, token_ids, labels)
    assert loss == pytest.approx(wanted, rel=GRADIENT_BAR)
    for name in shapes:
        assert np.linalg.norm(grads[name] - expected[name]) <= GRADIENT_BAR * np.linalg.norm(expected[name]), name


@pytest.mark.parametrize("kind", ["untied", "gpt2"])
def test_the_backward_ends_at_the_lowest_adapter(bases, kind):
    with GGUF.open(bases[kind]) as gguf:
        whole, last = (
            realize(("numpy", "cpu"), gguf, targets=("down",), last_layers=n).explain().nodes for n in (None, 1)
        )
    count = [sum(node.op == "attention_backward" for node in nodes) for nodes in (whole, last)]
    assert count == [2, 1] and sum(node.op == "attention" for node in last) == 2


def test_the_lowest_block_is_found():
    from toy.models.parameters import GradientTree

    tree = toy.Llama(CONFIGS["untied"]).parameters
    for trained, lowest in (
        (["blk.1.attn_q.weight", "output.weight"], 1),
        (["blk.1.attn_q.weight", "token_embd.weight"], 0),
        (["blk.0.attn_q.weight", "blk.1.attn_q.weight"], 0),
        (["output.weight", "output_norm.weight"], 2),
    ):
        assert GradientTree.like(tree, trained).lowest_block() == lowest


@pytest.mark.parametrize("kind", ["untied", "gpt2"])
def test_blocks_that_are_computed_again_have_the_same_dropout(backend, bases, kind):
    more, (token_ids, labels) = {"targets": ("all",), "dropout": 0.3}, make_batch()
    with GGUF.open(bases[kind]) as gguf:
        recipes = [realize(backend, gguf, recompute=recompute, **more) for recompute in (False, True)]
        for recipe in recipes:
            recipe.step(token_ids, None, labels, recipe.adamw(lr=0.0).hp_for_step(0), is_first=True)
        kept, again = (recipe.gradients() for recipe in recipes)
    assert recipes[1].recompute == 1
    for name, gradient in kept.items():
        assert np.linalg.norm(again[name] - gradient) <= 1e-6 * np.linalg.norm(gradient), name


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["untied", "gpt2"])
def test_the_native_graph_is_one_piece_that_metal_runs(bases, kind):
    import ggml_bridge

    with GGUF.open(bases[kind]) as gguf:
        targets = ("all",) if kind == "gpt2" else ALL["targets"]
        recipe = realize(("ggml", "cpu-native"), gguf, **{**ALL, "targets": targets})
        assert recipe.engine.explain().splits == 1
        assert ggml_bridge.metal_unsupported(recipe.engine._training("integers").graph) == []
        assert ggml_bridge.cuda_unsupported(recipe.engine._training("integers").graph) == []
        assert ggml_bridge.metal_unsupported(recipe.engine._forward(None).graph) == []
        assert ggml_bridge.cuda_unsupported(recipe.engine._forward(None).graph) == []


# -- dropout -----------------------------------------------------------------------------------------------------------


def test_masks_are_random_and_follow_from_seed_step_and_name(bases):
    with GGUF.open(bases["untied"]) as gguf:
        dropout = realize(("numpy", "cpu"), gguf, targets=("all",), dropout=0.2, seed=11).engine.weights.dropout
    assert dropout.masks["blk.1.attn_k.lora_mask"] == dropout.masks["blk.1.attn_v.lora_mask"] == "blk.1.attn_q"
    mask = dropout.draw("blk.0.ffn_gate", 4000, (1, 0))
    assert set(np.unique(mask)) == {0, np.float32(1 / 0.8)} and mask.dtype == np.float32
    assert abs(mask.mean() - 1) < 5 * (0.25 / mask.size) ** 0.5
    assert abs(np.corrcoef(mask[:, 0], mask[:, 1])[0, 1]) < 0.1 > abs(np.corrcoef(mask[:-1, 0], mask[1:, 0])[0, 1])
    assert np.array_equal(mask, dropout.draw("blk.0.ffn_gate", 4000, (1, 0)))
    others = [("blk.1.ffn_gate", (1, 0)), ("blk.0.ffn_gate", (2, 0)), ("blk.0.ffn_gate", (1, 1))]
    others = [dropout.draw(name, 4000, moment) for name, moment in others]
    others.append(dropout._replace(seed=12).draw("blk.0.ffn_gate", 4000, (1, 0)))
    for other in others:
        assert abs((mask == other).mean() - (0.8**2 + 0.2**2)) < 0.01


@pytest.mark.parametrize("kind", ["untied", "gpt2"])
def test_passes_with_dropout_are_the_step_of_one_batch(backend, bases, kind):
    """And every backend takes the same steps."""
    more, (token_ids, labels) = {"targets": ("all",), "dropout": 0.3}, make_batch(4)
    with GGUF.open(bases[kind]) as gguf:
        recipes = [
            realize(backend, gguf, t_batch=4, **more), realize(backend, gguf, accumulate=2, **more),
            realize(("numpy", "cpu"), gguf, t_batch=4, **more),
        ]  # fmt: skip
        adamw = recipes[0].adamw(lr=0.01)
        for k in range(3):
            losses = [r.step(token_ids, None, labels, adamw.hp_for_step(k), is_first=k == 0) for r in recipes]
            assert losses == pytest.approx([losses[2]] * 3, rel=1e-5)
        again = recipes[2].step(token_ids, None, labels, recipes[2].adamw(lr=0.0).hp_for_step(7))
        assert again != recipes[2].step(token_ids, None, labels, recipes[2].adamw(lr=0.0).hp_for_step(8))


def test_dropout_needs_to_know_the_step(bases):
    token_ids, labels = make_batch()
    with GGUF.open(bases["tied"]) as gguf:
        recipe = realize(("numpy", "cpu"), gguf, dropout=0.1)
        row = recipe.adamw().hp_for_step(0)
        recipe.step(token_ids, None, labels, row, is_first=True)
        before = recipe.parameters()
        with pytest.raises(ValueError, match="hp_for_step"):
            recipe.step(token_ids, None, labels, np.array(row))
        assert all(np.array_equal(array, before[name]) for name, array in recipe.parameters().items())
        for wrong, message in (
            ({"dropout": 1.0}, "dropout must be a share"), ({"dropout": -0.1}, "dropout must be a share"),
            ({"last_layers": 3}, "last_layers must be at most 2"), ({"last_layers": 0}, "last_layers must be at least 1"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=message):
                realize(("numpy", "cpu"), gguf, **wrong)


# -- runs --------------------------------------------------------------------------------------------------------------

TEXT = "".join(f"{i} squared is {i * i}.\n" for i in range(200))


@pytest.fixture
def trained(bases, tmp_path):
    """A LoRA run on a GPT-2 with everything that can be said."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = LoRAOptions(
        model=str(bases["gpt2"]), corpus=str(tmp_path / "text.txt"), steps=8, batch=2, context=16, eval_batches=1,
        sample_tokens=2, lr=0.02, warmup=1, rank=4, alpha=3.0, targets=("mlp", "qkv"), last_layers=1, dropout=0.1,
        rslora=True, backend="numpy",
    )  # fmt: skip
    for _ in Training(options, out=tmp_path / "run").run():
        pass
    return tmp_path / "run"


def test_a_run_knows_its_options_everywhere(trained, bases, tmp_path, toy_command):
    config = json.loads((trained / "config.json").read_text())
    assert config["lora"] == {
        "rank": 4, "alpha": 3.0, "targets": ["qkv", "up", "down"], "rslora": True, "last_layers": 1,
    }  # fmt: skip
    assert config["training"]["targets"] == ["mlp", "qkv"] and config["training"]["dropout"] == 0.1
    run = toy.load(trained, backend="numpy")
    assert set(run.model.parameters) > {"blk.1.attn_qkv.lora_a"} and "blk.0.attn_qkv.lora_a" not in run.model.parameters
    assert run.model.lora_scale == pytest.approx(3.0 / 2)
    ours, base = run.logits(IDS), toy.load(bases["gpt2"], backend="numpy").logits(IDS)
    assert np.abs(ours - base).max() > 0.05
    for path in (trained / "weights" / "step_8.gguf", tmp_path / "adapter.gguf"):
        if not path.exists():
            export_adapter(read_trained(trained), path)
        with GGUF.open(bases["gpt2"]) as gguf:
            assert read_adapter(path, gguf.config(), gguf).alpha == pytest.approx(6.0)  # for llama.cpp: alpha / rank
        assert np.abs(toy.load(bases["gpt2"], path, backend="numpy").logits(IDS) - ours).max() < 1e-4
    export_model(read_trained(trained), tmp_path / "merged.gguf")
    assert np.abs(toy.load(tmp_path / "merged.gguf", backend="numpy").logits(IDS) - ours).max() < 1e-4
    code, out, _ = toy_command("runs", trained, "--json")
    assert code == 0 and json.loads(out)["options"]["dropout"] == 0.1


def test_a_run_on_the_output_matrix(bases, tmp_path):
    """Stopped and resumed, opened, exported: the same numbers."""
    (tmp_path / "text.txt").write_text(TEXT)
    options = LoRAOptions(
        model=str(bases["untied"]), corpus=str(tmp_path / "text.txt"), steps=6, batch=2, context=16, eval_batches=1,
        sample_every=0, lr=0.02, warmup=1, rank=2, targets=("output", "q"), dropout=0.2, accumulate=2, backend="numpy",
    )  # fmt: skip
    for folder, stop in (("whole", None), ("parts", 3)):
        for event in Training(options, out=tmp_path / folder).run():
            if event.kind == "step" and event.step == stop:
                break
    training = Training.resume(tmp_path / "parts")
    assert training.step == 3
    for _ in training.run():
        pass
    ours = toy.load(tmp_path / "parts", backend="numpy").logits(IDS)
    assert np.array_equal(ours, toy.load(tmp_path / "whole", backend="numpy").logits(IDS))
    assert np.abs(ours - toy.load(bases["untied"], backend="numpy").logits(IDS)).max() > 0.05
    assert np.abs(ours - training.model().forward(IDS)[0]).max() < 1e-5
    export_adapter(read_trained(tmp_path / "parts"), tmp_path / "a.gguf")
    assert np.abs(ours - toy.load(bases["untied"], tmp_path / "a.gguf", backend="numpy").logits(IDS)).max() < 1e-5
    export_model(read_trained(tmp_path / "parts"), tmp_path / "m.gguf")
    assert np.abs(ours - toy.load(tmp_path / "m.gguf", backend="numpy").logits(IDS)).max() < 1e-4


@pytest.mark.llama_cpp
def test_a_run_in_llama_cpp(llama_cpp, trained, bases, tmp_path):
    export_adapter(read_trained(trained), tmp_path / "adapter.gguf")
    ours = as_there(toy.load(trained, backend="numpy"))
    assert np.abs(there(llama_cpp, bases["gpt2"], tmp_path / "adapter.gguf") - ours).max() <= BAR


def test_a_run_of_before_these_options_goes_on(trained, tmp_path):
    """What its config does not say is as it was: no dropout, all layers, alpha / rank."""
    run = tmp_path / "run"
    config = json.loads((run / "config.json").read_text())
    options = {
        name: value for name, value in config["training"].items() if name not in ("last_layers", "rslora", "dropout")
    }
    changes = {"targets": ["qkv"], "steps": 4}
    from toy.training.options import saved_options

    saved = LoRAOptions(**saved_options(LoRAOptions, options | changes))
    assert (saved.last_layers, saved.rslora, saved.dropout) == (None, False, 0.0)
    for _ in Training(saved, out=tmp_path / "old").run():
        pass
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert config["lora"] == {"rank": 4, "alpha": 3.0, "targets": ["qkv"]}
    for name in ("last_layers", "rslora", "dropout"):
        del config["training"][name]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    for go_on in (
        Training.resume(tmp_path / "old", steps=6),
        Training.branch(tmp_path / "old", tmp_path / "new", steps=8),
    ):
        assert go_on.step == 4
        for _ in go_on.run():
            pass


def test_the_flags(bases, tmp_path, toy_command):
    (tmp_path / "text.txt").write_text(TEXT)
    common = [
        "train", "lora", "--model", bases["gpt2"], "--corpus", tmp_path / "text.txt", "--steps", 1, "--context", 16,
        "--backend", "numpy", "--dry-run",
    ]  # fmt: skip
    more = ["--targets", "attention, up", "--last-layers", 1, "--rslora", "--dropout", 0.25]
    code, out, _ = toy_command(*common, *more)
    assert code == 0 and "on qkv, o, up of the last 1 layers; scaled by alpha / sqrt(rank); dropout 0.25" in " ".join(
        out.split()
    )
    code, out, _ = toy_command(*common)
    assert code == 0 and "on qkv" in out
    for wrong, message in (
        (["--targets", "gate"], "some of qkv, o, up, down: 'gate' is not one"),
        (["--targets", "everything"], "'everything' is not one"),
        (["--last-layers", 3], "last_layers must be at most 2"),
        (["--dropout", 1], "dropout must be a share"),
    ):
        code, _, error = toy_command(*common, *wrong)
        assert code == 2 and message in " ".join(error.split())
