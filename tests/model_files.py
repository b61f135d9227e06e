"""Small model files to load in tests: a quantised llama and a gpt2 with a subword tokenizer, and adapters for the llama."""

import numpy as np
from test_gguf_tokenizer import bpe_metadata

import toy
from toy.checks import gradcheck
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.files.gguf_write import write_adapter, write_gguf
from toy.models import model_for

CONTEXT = 24
RANK, ALPHA = 4, 6.0
MATRICES = ("attn_q", "attn_v", "ffn_down")


def tokenizer(**changes):
    return GGUFTokenizer(bpe_metadata(**changes))


def config(arch):
    sizes = dict(vocab_size=tokenizer().vocab_size, d_model=32, n_heads=4, d_ff=64, n_layers=2, context_length=CONTEXT)
    return toy.LlamaConfig(**sizes, n_kv_heads=2) if arch == "llama" else toy.GPT2Config(**sizes)


def write_model(path, arch="llama", type="q8_0", seed=0, tokenizer=None):
    """A model whose predictions are far from uniform, and whose gains are its own. Returns its parameters before rounding."""
    model = model_for(config(arch))(config(arch))
    gradcheck.random_parameters(model.parameters, np.random.default_rng(seed))
    write_gguf(path, model.config, model.parameters, tokenizer, type=type, metadata={"general.name": "Small"})
    return model.parameters


def adapters(seed=5):
    """Of rank RANK on MATRICES in every block."""
    generator, arrays = np.random.default_rng(seed), {}
    for name, shape in toy.Llama.parameter_shapes(config("llama")).items():
        stem = name.removesuffix(".weight")
        if stem.endswith(MATRICES):
            arrays[f"{stem}.lora_a"] = generator.normal(0, shape[1] ** -0.5, (RANK, shape[1])).astype(np.float32)
            arrays[f"{stem}.lora_b"] = generator.normal(0, 0.3, (shape[0], RANK)).astype(np.float32)
    return arrays


def write_files(folder):
    """llama.gguf (Q8_0), gpt2.gguf (F32), adapter.gguf for the llama, other.gguf: an adapter for another llama."""
    base = write_model(folder / "llama.gguf", tokenizer=tokenizer())
    write_model(folder / "gpt2.gguf", "gpt2", "f32", tokenizer=tokenizer())
    write_model(folder / "mute.gguf")
    write_adapter(folder / "adapter.gguf", config("llama"), adapters(), ALPHA, base=base)
    stranger = {**dict(base.items()), "output_norm.weight": base["output_norm.weight"] + 1}
    write_adapter(folder / "other.gguf", config("llama"), adapters(), ALPHA, base=stranger)
    (folder / "damaged.gguf").write_bytes((folder / "llama.gguf").read_bytes()[:-1000])
    return folder
