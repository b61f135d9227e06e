"""A card of a GGUF file: what it holds, how large it is, and what it computes, with this model's own numbers.

The algorithm is written in the manner of Phuong & Hutter, "Formal Algorithms for Transformers" (2022): every step of the
forward pass, with the shape of everything that is made.
"""

import dataclasses
import math
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from toy.config import GPT2Config
from toy.data.gguf_tokenizer import GGUFTokenizer
from toy.data.open_tokenizer import has_tokenizer, load_tokenizer
from toy.files import gguf_models
from toy.files.hugging_face import open_model
from toy.models.gpt2 import NORM_EPS
from toy.models.rotation import rotation


def describe(path):
    """The card of a GGUF file (a model, a LoRA adapter, or a vocabulary alone), or of a Hugging Face folder, as a rich
    renderable.

    A model that this library cannot run is described as far as the file goes. Raises BadFileError for a damaged file and
    FileNotFoundError for a path where nothing is.
    """
    with open_model(path) as gguf:
        config, problem = None, None
        try:
            config = gguf.config()
        except gguf_models.UnsupportedModelError as error:
            problem = str(error).removeprefix(f"{gguf.path} ")
        sections = [_heading(gguf), _facts(gguf, config, problem)]
        if gguf.tensors:
            sections += [_title("Tensors by type"), _types_table(gguf)]
    if config is not None:
        sections += [
            _title("Parameters by part"),
            _parts_table(config),
            _title("What it computes"),
            Text(algorithm(config)),
        ]
    return Group(*sections)


def algorithm(config):
    """The forward pass of a GPT-2 or Llama as pseudocode, with the numbers of `config` -> str, the shapes in a column."""
    write = _gpt2_lines if isinstance(config, GPT2Config) else _llama_lines
    lines = write(config)
    lines += [(f"with {field} = {value}", "") for field, value in _left_out(write, config)]
    widest = max(len(line) for line, shape in lines if shape)
    return "\n".join(f"{line:<{widest}}   {shape}".rstrip() for line, shape in lines)


def _left_out(write, config):
    """Yields (name, value) of the options of the config that are not at their default and change no line of `write`."""
    for field in dataclasses.fields(config):
        if field.default is dataclasses.MISSING:
            continue
        try:
            plain = dataclasses.replace(config, **{field.name: field.default})
        except ValueError:  # heads of a width of their own, which the lines show
            continue
        if plain != config and write(plain) == write(config):
            yield field.name, getattr(config, field.name)


def facts(path):
    """What `describe` shows of a GGUF file, for programs: a dict of what JSON can hold. Errors as `describe`.

    config: of the model, None (and `problem` says why) when this library cannot run it. metadata: without the arrays.
    """
    with open_model(path) as gguf:
        config, problem = None, None
        try:
            config = dataclasses.asdict(gguf.config())
        except gguf_models.UnsupportedModelError as error:
            problem = str(error).removeprefix(f"{gguf.path} ")
        tensors = {
            name: {"type": record.type, "shape": list(record.shape), "bytes": record.n_bytes}
            for name, record in gguf.tensors.items()
        }
        plain = {key: value for key, value in gguf.metadata.items() if isinstance(value, (bool, int, float, str))}
        return {
            "file": str(gguf.path), "bytes": gguf.file_bytes, "architecture": gguf.architecture,
            "adapter": _is_adapter(gguf), "n_parameters": gguf.n_parameters, "config": config, "problem": problem,
            "tokenizer": None if _is_adapter(gguf) else _tokenizer(gguf), "metadata": plain, "tensors": tensors,
        }  # fmt: skip


# -- tables ------------------------------------------------------------------------------------------------------------


def _heading(gguf):
    kind = "LoRA adapter for " if _is_adapter(gguf) else ""
    name = gguf.metadata.get("general.name")
    name = name if isinstance(name, str) and name else Path(gguf.path).name
    return Text.assemble((_plain(name), "bold"), f"  ({kind}{_plain(gguf.architecture)})")


def _title(text):
    return Text(f"\n{text}", style="bold")


def _facts(gguf, config, problem):
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in _fact_rows(gguf, config, problem):
        table.add_row(name, Text(_plain(value)))
    return table


def _fact_rows(gguf, config, problem):
    yield "file", f"{gguf.path} ({human_bytes(gguf.file_bytes)})"
    if gguf.tensors:
        bits = 8 * gguf.n_bytes / gguf.n_parameters
        yield "parameters", f"{gguf.n_parameters:,} in {len(gguf.tensors)} tensors, {bits:.2f} bits each on average"
    if config is not None:
        yield from _model_rows(gguf, config)
    elif _is_adapter(gguf):
        yield from _adapter_rows(gguf)
    else:
        yield "model", problem
    if not _is_adapter(gguf):
        yield "tokenizer", _tokenizer(gguf)
    for key in ("license", "organization", "author"):
        if isinstance(value := gguf.metadata.get(f"general.{key}"), str):
            yield key, value


def _adapter_rows(gguf):
    ups = {
        name.removesuffix(".weight.lora_b"): gguf.tensors[name].shape
        for name in gguf.tensors
        if name.endswith("lora_b")
    }
    ranks, alpha = sorted({shape[-1] for shape in ups.values()}), gguf.metadata.get("adapter.lora.alpha")
    yield "rank", ", ".join(map(str, ranks))
    yield "alpha", f"{'none' if alpha is None else alpha}"
    yield "scale", ", ".join(f"{alpha / rank:.4g}" for rank in ranks) if isinstance(alpha, float) and alpha else "1"
    yield "on", ", ".join(sorted({name.split(".")[-1] for name in ups}))
    if blocks := sorted({int(name.split(".")[1]) for name in ups if name.startswith("blk.")}):
        yield "layers", f"{len(blocks)}, {blocks[0]} to {blocks[-1]}"
    for key in ("task_name", "prompt_prefix"):
        if isinstance(value := gguf.metadata.get(f"adapter.lora.{key}"), str):
            yield key.replace("_", " "), value
    if norms := [name for name in gguf.tensors if name.endswith("_norm.weight")]:
        yield (
            "not used",
            f"{', '.join(norms[:3])}{' ...' if len(norms) > 3 else ''}: norms in an adapter, as in llama.cpp",
        )


def _model_rows(gguf, config):
    n_kv_heads = getattr(config, "n_kv_heads", config.n_heads)
    groups = f", {n_kv_heads} for keys and values" if n_kv_heads != config.n_heads else ""
    yield "layers", f"{config.n_layers}"
    yield "width", f"{config.d_model}, MLP {config.d_ff}"
    yield "heads", f"{config.n_heads} of {config.d_head}{groups}"
    yield "vocabulary", f"{config.vocab_size:,} tokens, output matrix {'of its own' if _untied(config) else 'tied'}"
    yield "context", f"{config.context_length:,} tokens"
    kv_bytes = 2 * config.n_layers * n_kv_heads * config.d_head * 4
    yield (
        "memory",
        f"{human_bytes(gguf.n_bytes)} as stored, {human_bytes(4 * gguf.n_parameters)} in float32; training all of it with "
        f"AdamW {human_bytes(16 * gguf.n_parameters)} and activations; key/value cache {human_bytes(kv_bytes)} a token, "
        f"{human_bytes(kv_bytes * config.context_length)} for the whole context",
    )


def _types_table(gguf):
    counts: dict[str, tuple[int, int, int]] = {}
    for record in gguf.tensors.values():
        tensors, numbers, n_bytes = counts.get(record.type, (0, 0, 0))
        counts[record.type] = (tensors + 1, numbers + math.prod(record.shape), n_bytes + record.n_bytes)
    table = _table("type", "tensors", "parameters", "bytes", "bits each")
    for name, (tensors, numbers, n_bytes) in sorted(counts.items(), key=lambda item: -item[1][2]):
        table.add_row(name, f"{tensors}", f"{numbers:,}", human_bytes(n_bytes), f"{8 * n_bytes / numbers:.2f}")
    return table


def _parts_table(config):
    """One row for each tensor of a layer, one for each outside of the layers."""
    shapes = gguf_models.parameter_shapes(config)
    total = sum(math.prod(shape) for shape in shapes.values())
    table = _table("tensor", "shape (out, in)", "times", "parameters", "share")
    for name, shape in shapes.items():
        layer = name.split(".")[1] if name.startswith("blk.") else None
        if layer in (None, "0"):
            times = 1 if layer is None else config.n_layers
            numbers = times * math.prod(shape)
            label = name if layer is None else name.replace("blk.0.", "blk.*.", 1)
            share = f"{100 * numbers / total:.1f} %"
            table.add_row(label, " x ".join(map(str, shape)), f"{times}", f"{numbers:,}", share)
    return table


def _table(*columns):
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _tokenizer(gguf):
    if not has_tokenizer(gguf):
        return "none"
    try:
        tokenizer = load_tokenizer(gguf)
    except (ValueError, RuntimeError) as error:
        return str(error).removeprefix(f"{gguf.path}: ")
    if not isinstance(tokenizer, GGUFTokenizer):
        return f"{'bytes' if tokenizer.kind == 'bytes' else 'characters'}, {tokenizer.vocab_size} ids"
    kind = f"byte-level BPE ({tokenizer.pre})" if tokenizer.model == "gpt2" else "SentencePiece BPE"
    stops = ", ".join(tokenizer.tokens[i] for i in sorted(tokenizer.stop_ids)) or "nothing"
    chat = ", with a chat template" if tokenizer.chat_template else ""
    return f"{kind}, {tokenizer.vocab_size:,} tokens, an answer ends with {stops}{chat}"


def _is_adapter(gguf):
    return gguf.metadata.get("general.type") == "adapter"


def _plain(text):
    """Text out of a file, fit for a terminal: no escape sequences, not too long."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= 500 else text[:500] + "..."


def human_bytes(n):
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.3g} {unit}" if n < 1000 else f"{n:,.0f} {unit}"
        n /= 1000


# -- the algorithm -----------------------------------------------------------------------------------------------------


_GELU = "GELU(a) = a/2 · (1 + tanh(√(2/π) (a + 0.044715 a³)))"


def _untied(config):
    return getattr(config, "untied", False)


def _first_lines(config):
    return [
        (f"Input: token ids x[1 .. T], each in 0 .. {config.vocab_size - 1}, T ≤ {config.context_length}", ""),
        ("Output: P[1 .. T], where P[t] is the distribution of the token after x[1 .. t]", ""),
    ]


def _attention_lines(config, n_kv_heads, scale=None, cap=None, window=None, which=""):
    """scale: of the scores, None: one over the root of the width of a head. cap: of the scores. window: see `LlamaConfig`;
    which: the layers that have it."""
    causal = "S[t, u] ← -∞ for u > t"
    d, heads, shared = config.d_head, config.n_heads, config.n_heads // n_kv_heads
    group = "h" if shared == 1 else f"⌈h / {shared}⌉"
    own = "h" if shared == 1 else "g"
    product = f"Q_h K_{own}ᵀ / √{d}" if scale is None else f"{scale:.6g} Q_h K_{own}ᵀ"
    return [
        (
            f"        for each head h = 1 .. {heads}:",
            "" if shared == 1 else f"g = {group}: {shared} heads share K and V",
        ),
        (f"            S ← {product};  {causal}", "T x T") if cap is None else (f"            S ← {product}", "T x T"),
        *([] if cap is None else [(f"            S ← {cap:g} tanh(S / {cap:g});  {causal}", "")]),
        *([] if window is None else [(f"            S[t, u] ← -∞ for u ≤ t - {window}", which)]),
        (f"            O_h ← softmax(S) V_{own}", f"T x {d}"),
    ]


def _placed(c, projection, gain):
    """What a query or key is, of each head, when attention sees it."""
    norm = f"RMSNorm({projection}, {gain})" if c.qk_norm else projection
    return f"RoPE({norm})"


def _times(factor):
    return "" if factor == 1 else f"{factor:.6g} "


def _added(c, product, gain):
    """What attention or MLP adds to the residual stream."""
    if c.post_norms:
        product = f"RMSNorm({product}, {gain})"
    elif c.residual_scale != 1 and " + " in product:
        product = f"({product})"
    return f"{_times(c.residual_scale)}{product}"


def _llama_lines(c):
    v, d, f = c.vocab_size, c.d_model, c.d_ff
    q, k = c.n_heads * c.d_head, c.n_kv_heads * c.d_head
    bias = " + b" if c.qkv_bias else ""
    gate, up, down = (f" + b_{name}" if c.mlp_bias else "" for name in ("gate", "up", "down"))
    h, gelu = "X" if c.no_pre_norms else "H", "GELU" if c.geglu else "SiLU"
    which = f"not in every {_ordinal(c.window_pattern)} layer" if c.window_pattern else ""
    logits = f"RMSNorm(X, g) {'W_out' if c.untied else 'E'}ᵀ{'' if c.logit_scale == 1 else f' / {c.logit_scale:g}'}"
    output = f"{logits} / {c.logit_softcap:g}" if c.logit_softcap else logits
    lines = [
        *_first_lines(c),
        (f"    X ← {_times(c.embedding_scale)}rows x of E", f"T x {d}; E is {v} x {d}"),
        (f"    for each layer l = 1 .. {c.n_layers}:", ""),
        ("        H ← RMSNorm(X, g_attn)", f"T x {d}"),
        (f"        Q ← {_placed(c, f'{h} W_qᵀ{bias}', 'g_q')}", f"T x {q}"),
        (f"        K ← {_placed(c, f'{h} W_kᵀ{bias}', 'g_k')};  V ← {h} W_vᵀ{bias}", f"T x {k}"),
        *_attention_lines(c, c.n_kv_heads, c.attention_scale, c.attention_softcap, c.sliding_window, which),
        (
            f"        X ← X + {_added(c, f'[O_1 .. O_{c.n_heads}] W_oᵀ' + ' + b_o' * c.attn_output_bias, 'g_after')}",
            f"T x {d}",
        ),
        ("        H ← RMSNorm(X, g_ffn)", f"T x {d}"),
        (f"        U ← {gelu}({h} W_gateᵀ{gate}) ⊙ ({h} W_upᵀ{up})", f"T x {f}"),
        (f"        X ← X + {_added(c, f'U W_downᵀ{down}', 'g_out')}", f"T x {d}"),
        (
            f"    P ← softmax({f'{c.logit_softcap:g} tanh({output})' if c.logit_softcap else output})",
            f"T x {v}",
        ),
        (f"RMSNorm(x, g) = g ⊙ x / √(mean(x²) + {c.rms_eps:g})", ""),
    ]
    if c.no_pre_norms:
        lines = [line for line in lines if not line[0].startswith("        H ←")]
    if c.qk_norm:
        over = "all heads of a token together" if c.qk_norm_together else "each head"
        lines.append((f"The norms of Q and K are over {over}", ""))
    if c.geglu:
        lines.append((_GELU, ""))
    else:
        lines.append(("SiLU(a) = a / (1 + exp(-a))", ""))
    return lines + [(line, "") for line in _rope_lines(c)]


def _rope_lines(c):
    """How RoPE turns, and in which layers."""
    pair = f"i, i+{c.d_head // 2}" if c.rope_halves else "2i, 2i+1"
    factor = " / f_i" if c.rope_factors is not None else ""
    stretched = f" / {c.rope_scale:g}" if c.rope_scaling == "linear" else ""
    magnitude = rotation(c).get("magnitude", 1)
    times = "" if magnitude == 1 else f", and multiply it by {magnitude:.6g}"
    yield (
        f"RoPE: turn the pair ({pair}) of each head at position t by t · {c.rope_base:g}^(-2i/{c.d_head})"
        f"{factor}{stretched}{times}"
    )
    if c.rope_factors is not None:
        yield f"f_i: {c.d_head // 2} factors of the file, from {min(c.rope_factors):g} to {max(c.rope_factors):g}"
    if c.rope_scaling == "yarn":
        original = c.rope_original_context or c.context_length
        yield f"YaRN: slow pairs turn {c.rope_scale:g} times more slowly, for contexts beyond the {original} of training"
    if c.rope_local_base is not None:
        yield f"Layers with a window turn by t · {c.rope_local_base:g}^(-2i/{c.d_head})"
    if c.rope_skips:
        yield f"Every {_ordinal(c.rope_skips)} layer goes without RoPE"


def _ordinal(n):
    ending = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"


def _gpt2_lines(c):
    v, d, f = c.vocab_size, c.d_model, c.d_ff
    return [
        *_first_lines(c),
        ("    X ← rows x of E + rows 1 .. T of W_p", f"T x {d}; E is {v} x {d}, W_p is {c.context_length} x {d}"),
        (f"    for each layer l = 1 .. {c.n_layers}:", ""),
        ("        H ← LayerNorm(X, g_attn, b_attn)", f"T x {d}"),
        ("        [Q, K, V] ← H W_qkvᵀ + b_qkv", f"T x {d} each"),
        *_attention_lines(c, c.n_heads),
        (f"        X ← X + [O_1 .. O_{c.n_heads}] W_oᵀ + b_o", f"T x {d}"),
        ("        H ← LayerNorm(X, g_ffn, b_ffn)", f"T x {d}"),
        ("        U ← GELU(H W_upᵀ + b_up)", f"T x {f}"),
        ("        X ← X + U W_downᵀ + b_down", f"T x {d}"),
        ("    P ← softmax(LayerNorm(X, g, b) Eᵀ)", f"T x {v}"),
        (f"LayerNorm(x, g, b) = g ⊙ (x - mean(x)) / √(var(x) + {NORM_EPS:g}) + b", ""),
        (_GELU, ""),
    ]
