"""The card of a GGUF file."""

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

import toy
from toy.data.tokenizers import CharTokenizer
from toy.files import gguf_write
from toy.files.errors import BadFileError
from toy.files.gguf_write import write_adapter, write_gguf
from toy.models import model_for
from toy.trained.describe import algorithm, describe

LLAMA = toy.LlamaConfig(7, 32, 4, 2, 48, 3, 16)


def parameters_of(config):
    return {name: np.ones(shape, np.float32) for name, shape in model_for(config).parameter_shapes(config).items()}


def card(path):
    console = Console(file=io.StringIO(), width=150)
    console.print(describe(path))
    return console.file.getvalue()


def test_a_model(tmp_path):
    write_gguf(
        tmp_path / "m.gguf", LLAMA, parameters_of(LLAMA), CharTokenizer("\nabcdef"), metadata={"general.license": "mit"}
    )
    text = card(tmp_path / "m.gguf")
    n = sum(a.size for a in parameters_of(LLAMA).values())
    for words in (
        "toy llama  (llama)", f"{n:,} in 29 tensors, 32.00 bits", "4 of 8, 2 for keys and values",
        "7 tokens, output matrix tied", "characters, 7 ids", "mit", "for each layer l = 1 .. 3", "blk.*.ffn_down.weight",
    ):  # fmt: skip
        assert words in text, words
    row = next(line.split() for line in text.splitlines() if "blk.*.ffn_down.weight" in line)
    assert row[1:6] == ["32", "x", "48", "3", "4,608"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, ["2 heads share K and V", "RoPE(H W_qᵀ)", "T x 48", "Eᵀ", "10000^(-2i/8)", "1e-05"]),
        (
            toy.LlamaConfig(7, 32, 4, 4, 48, 3, 16, rope_base=5e5, untied=True, qkv_bias=True),
            ["RoPE(H W_qᵀ + b)", "K_hᵀ", "W_outᵀ", "500000"],
        ),
        (
            toy.LlamaConfig(7, 32, 4, 4, 48, 3, 16, rope_halves=True, qk_norm=True, qkv_bias=True),
            ["Q ← RoPE(RMSNorm(H W_qᵀ + b, g_q))", "K ← RoPE(RMSNorm(H W_kᵀ + b, g_k));  V ← H W_vᵀ + b", "(i, i+4)"],
        ),
        (
            toy.LlamaConfig(  # Gemma
                7,
                32,
                4,
                4,
                48,
                6,
                16,
                geglu=True,
                post_norms=True,
                qk_norm=True,
                attention_softcap=50.0,
                logit_softcap=30.0,
                sliding_window=5,
                window_pattern=3,
                embedding_scale=32**0.5,
                attention_scale=0.25,
                rope_local_base=1e4,
                rope_base=1e6,
            ),
            [
                "X ← 5.65685 rows x of E",
                "S ← 0.25 Q_h K_hᵀ ",
                "S ← 50 tanh(S / 50);  S[t, u] ← -∞ for u > t",
                "S[t, u] ← -∞ for u ≤ t - 5 ",
                "not in every 3rd layer",
                "X ← X + RMSNorm([O_1 .. O_4] W_oᵀ, g_after)",
                "U ← GELU(H W_gateᵀ)",
                "RMSNorm(U W_downᵀ, g_out)",
                "softmax(30 tanh(RMSNorm(X, g) Eᵀ / 30))",
                "1e+06^(-2i/8)",
                "Layers with a window turn by t · 10000^",
                "over each head",
                "√(2/π)",
            ],
        ),
        (
            toy.LlamaConfig(  # OLMo 2
                7,
                32,
                4,
                4,
                48,
                3,
                16,
                no_pre_norms=True,
                post_norms=True,
                qk_norm=True,
                qk_norm_together=True,
                untied=True,
            ),
            ["RoPE(RMSNorm(X W_qᵀ, g_q))", "U ← SiLU(X W_gateᵀ) ⊙ (X W_upᵀ)", "over all heads of a token together"],
        ),
        (
            toy.LlamaConfig(  # Granite, SmolLM3, Llama 3.1 and Mistral 3 at once
                7,
                32,
                4,
                4,
                48,
                4,
                16,
                residual_scale=0.22,
                logit_scale=8.0,
                attn_output_bias=True,
                mlp_bias=True,
                rope_skips=4,
                rope_factors=(1.0, 2.0, 4.0, 8.0),
                rope_scaling="yarn",
                rope_scale=4.0,
                rope_attn_factor=0.5,
                yarn_log_multiplier=1.0,
            ),
            [
                "X ← X + 0.22 ([O_1 .. O_4] W_oᵀ + b_o)",
                "X ← X + 0.22 (U W_downᵀ + b_down)",
                "Eᵀ / 8)",
                "W_gateᵀ + b_gate",
                "Every 4th layer goes without RoPE",
                "/ f_i, and multiply it by 0.5",
                "from 1 to 8",
                "4 times more slowly",
            ],
        ),
        (
            toy.LlamaConfig(7, 32, 4, 4, 48, 3, 16, rope_scaling="linear", rope_scale=2.0),
            ["10000^(-2i/8) / 2"],
        ),
        (toy.GPT2Config(7, 32, 4, 64, 3, 16), ["W_p is 16 x 32", "U ← GELU", "T x 64", "LayerNorm(X, g, b) Eᵀ"]),
    ],
)
def test_the_algorithm_has_the_models_numbers(config, expected):
    text = algorithm(config)
    for words in expected:
        assert words in text, words
    assert "\nwith " not in text
    if isinstance(config, toy.LlamaConfig) and config.no_pre_norms:
        assert "H ←" not in text


@dataclasses.dataclass(frozen=True)
class LlamaWithMore(toy.LlamaConfig):
    """As it would be with two more options, of which the lines of the algorithm know nothing yet."""

    swim: bool = False
    window: int | None = None


def test_no_option_is_missing_in_the_algorithm():
    """An option that changes no line is told in one of its own, so that the card never describes another model."""
    plain = LlamaWithMore(7, 32, 5, 5, 48, 3, 16, head_dim=6, untied=True)
    assert algorithm(plain) == algorithm(toy.LlamaConfig(7, 32, 5, 5, 48, 3, 16, head_dim=6, untied=True))
    changed = algorithm(dataclasses.replace(plain, swim=True, window=4))
    assert changed.splitlines() == [*algorithm(plain).splitlines(), "with swim = True", "with window = 4"]


def test_an_adapter(tmp_path):
    adapters = {"blk.0.attn_q.lora_a": np.ones((2, 32)), "blk.0.attn_q.lora_b": np.ones((32, 2))}
    write_adapter(tmp_path / "a.gguf", LLAMA, adapters, alpha=4.0)
    text = card(tmp_path / "a.gguf")
    assert "LoRA adapter for llama" in text and "What it computes" not in text
    rows = {words[0]: words[1:] for words in map(str.split, text.splitlines()) if words}
    assert rows["rank"] == ["2"] and rows["alpha"] == ["4.0"] and rows["on"] == ["attn_q"]


def test_what_this_library_cannot_run_and_what_is_not_for_a_terminal(tmp_path):
    metadata = {"general.architecture": "mamba", "general.name": "evil\x1b[2Jname", "tokenizer.ggml.model": "bert"}
    gguf_write._write(tmp_path / "x.gguf", metadata, [])
    text = card(tmp_path / "x.gguf")
    assert "architecture 'mamba'; this library has llama and gpt2" in text and "of the kind 'bert'" in text
    assert "\x1b" not in text and "name" in text


def test_a_file_that_contradicts_itself(tmp_path):
    write_gguf(tmp_path / "m.gguf", LLAMA, parameters_of(LLAMA))
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:-100])
    with pytest.raises(BadFileError, match="is cut off"):
        describe(tmp_path / "m.gguf")
