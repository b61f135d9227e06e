"""The ops and models written once more in PyTorch, float64: an outside reference with automatic differentiation.

Ops take the names of `toy.ops.reference` and models the parameter names of `toy.models`, so that a test can compare
everything by name.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from toy.models.rotation import rotation

torch.set_num_threads(1)  # the shapes are tiny, and waiting threads take time from the library under test

# ----------------------------------------------------------------------------------------------------------------------
# ops
# ----------------------------------------------------------------------------------------------------------------------


def embedding(table, token_ids):
    return F.embedding(torch.as_tensor(token_ids), table)


def linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def rms_norm(x, gamma, eps):
    return F.rms_norm(x, x.shape[1:], gamma, eps)


def layer_norm(x, gamma, beta, eps):
    return F.layer_norm(x, x.shape[1:], gamma, beta, eps)


def gelu(x):
    return F.gelu(x, approximate="tanh")


def silu(x):
    return F.silu(x)


def swiglu(gate, up):
    return F.silu(gate) * up


def geglu(gate, up):
    return gelu(gate) * up


def softcap(x, cap=30.0):
    return cap * torch.tanh(x / cap)


def rope(x, positions, n_heads, base, halves=False, factors=None, magnitude=1.0):
    """Pairs as complex numbers: a rotation is a multiplication by e^(i angle)."""
    rows, width = x.shape
    half = width // n_heads // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float64) / half)
    if factors is not None:
        frequencies = frequencies / torch.as_tensor(factors, dtype=torch.float64)
    angles = torch.as_tensor(positions, dtype=torch.float64)[:, None, None] * frequencies  # (N, 1, half)
    turn = torch.polar(torch.full_like(angles, magnitude), angles)
    if halves:
        a, b = x.reshape(rows, n_heads, 2, half).unbind(2)
        turned = torch.complex(a, b) * turn
        return torch.cat([turned.real, turned.imag], dim=2).reshape(rows, width)
    pairs = torch.view_as_complex(x.reshape(rows, n_heads, half, 2))
    return torch.view_as_real(pairs * turn).reshape(rows, width)


def attention(q, k, v, batch, n_heads, n_kv_heads=None, causal=True, window=None, softcap=None):
    kv = n_kv_heads or n_heads
    q = q.reshape(batch, -1, n_heads, q.shape[1] // n_heads).transpose(1, 2)  # (B, heads, Tq, d_head)
    k, v = (
        a.reshape(batch, -1, kv, a.shape[1] // kv).transpose(1, 2).repeat_interleave(n_heads // kv, dim=1)
        for a in (k, v)
    )
    t_q, t_k = q.shape[2], k.shape[2]
    seen = torch.ones(t_q, t_k, dtype=torch.bool).tril(t_k - t_q) if causal else None
    if window is not None:
        seen = seen.triu(t_k - t_q - window + 1)
    if softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    else:
        scores = softcap * torch.tanh(q @ k.transpose(2, 3) / (softcap * q.shape[3] ** 0.5))
        out = torch.softmax(scores if seen is None else scores.masked_fill(~seen, -torch.inf), dim=3) @ v
    return out.transpose(1, 2).reshape(batch * t_q, -1)


def cross_entropy(logits, labels):
    labels = torch.as_tensor(labels)
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, ignore_index=-1)
    counted = (labels != 0).any(dim=1).sum()
    return -(labels * F.log_softmax(logits, dim=1)).sum() / counted


OPS = {
    f.__name__: f
    for f in (
        embedding,
        linear,
        rms_norm,
        layer_norm,
        gelu,
        geglu,
        softcap,
        silu,
        swiglu,
        rope,
        attention,
        cross_entropy,
    )
}


def run_case(case, cotangent):
    """The output and the gradients of a `toy.checks.gradcheck.Case`, as float64 arrays, by autograd."""
    assert case.op in OPS, f"write the PyTorch twin of {case.op} above, by this name, for an outside reference"
    inputs = {name: _leaf(array) for name, array in case.inputs.items()}
    settings = {
        name: torch.as_tensor(value, dtype=torch.float64)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
        for name, value in case.settings.items()
    }
    out = OPS[case.op](**inputs, **settings)
    (out * torch.as_tensor(cotangent, dtype=torch.float64)).sum().backward()
    return out.detach().numpy(), {name: leaf.grad.numpy() for name, leaf in inputs.items()}


def _leaf(array):
    return torch.tensor(np.asarray(array), dtype=torch.float64, requires_grad=True)


# ----------------------------------------------------------------------------------------------------------------------
# models: dict of parameters, config, token ids (B, T) -> logits (B*T, V); of images -> logits (B, n_classes)
# ----------------------------------------------------------------------------------------------------------------------


def transformer(p, config, token_ids):
    batch, t_seq = token_ids.shape
    x = (p["token_embed"][token_ids] + p["pos_embed"][:t_seq]).reshape(batch * t_seq, -1)
    for i in range(config.n_layers):
        w = {name.split(".")[2]: array for name, array in p.items() if name.startswith(f"blocks.{i}.")}
        h = rms_norm(x, w["norm1_gamma"], 1e-5)
        a = attention(h @ w["w_q"].T, h @ w["w_k"].T, h @ w["w_v"].T, batch, config.n_heads)
        x = x + a @ w["w_o"].T
        h = rms_norm(x, w["norm2_gamma"], 1e-5)
        x = x + gelu(h @ w["w_ff1"].T) @ w["w_ff2"].T
    return rms_norm(x, p["norm_final_gamma"], 1e-5) @ p["token_embed"].T


def embed(p, token_ids):
    """With a parameter `token_embd.lens` the embedding is a donor's, seen through a projection."""
    x = p["token_embd.weight"][token_ids]
    if "token_embd.lora_a" in p:
        x = x + p["token_embd.lora_a"][token_ids] @ p["token_embd.lora_b"].T
    return x @ p["token_embd.lens"].T if "token_embd.lens" in p else x


def unembed(p, x):
    if "output.lens" in p:
        x = x @ p["output.lens"].T
    logits = x @ p.get("output.weight", p["token_embd.weight"]).T
    if "output.lora_a" not in p:
        return logits
    return logits + (x * p.get("output.lora_mask", 1.0)) @ p["output.lora_a"].T @ p["output.lora_b"].T


def affine(p, x, name):
    """Where there are parameters `<name>.lora_a` and `<name>.lora_b`, an adapter of scale 1 joins the product; it reads
    x * `<name>.lora_mask`, where there is one."""
    y = F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))
    if f"{name}.lora_a" not in p:
        return y
    return y + (x * p.get(f"{name}.lora_mask", 1.0)) @ p[f"{name}.lora_a"].T @ p[f"{name}.lora_b"].T


def pre_norm_block(p, config, x, block, batch, eps, causal):
    """What a block of GPT-2 and of a ViT adds to the residual stream, and the stream itself. x: (B*T, D)."""

    def norm(x, name):
        return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], eps)

    q, k, v = affine(p, norm(x, f"{block}.attn_norm"), f"{block}.attn_qkv").chunk(3, dim=1)
    x = x + affine(p, attention(q, k, v, batch, config.n_heads, causal=causal), f"{block}.attn_output")
    return x + affine(p, gelu(affine(p, norm(x, f"{block}.ffn_norm"), f"{block}.ffn_up")), f"{block}.ffn_down")


def gpt2(p, config, token_ids):
    batch, t_seq = token_ids.shape
    x = (embed(p, token_ids) + p["position_embd.weight"][:t_seq]).reshape(batch * t_seq, -1)
    for i in range(config.n_layers):
        x = pre_norm_block(p, config, x, f"blk.{i}", batch, 1e-5, causal=True)
    return unembed(p, layer_norm(x, p["output_norm.weight"], p["output_norm.bias"], 1e-5))


def vit(p, config, images):
    """images: (B, height, width, channels) -> logits (B, n_classes). The patches are cut by a strided convolution."""
    batch, size = len(images), config.patch_size
    kernel = p["patch_embd.weight"].reshape(-1, size, size, config.channels).permute(0, 3, 1, 2)
    x = F.conv2d(images.double().permute(0, 3, 1, 2), kernel, p["patch_embd.bias"], stride=size)  # (B, D, side, side)
    x = torch.cat([p["class_embd.weight"].expand(batch, 1, -1), x.flatten(2).transpose(1, 2)], dim=1)  # (B, T, D)
    x = (x + p["position_embd.weight"]).reshape(batch * config.n_tokens, -1)
    for i in range(config.n_layers):
        x = pre_norm_block(p, config, x, f"blk.{i}", batch, 1e-6, causal=False)
    x = x.reshape(batch, config.n_tokens, -1)[:, 0]  # the class tokens
    return affine(p, layer_norm(x, p["output_norm.weight"], p["output_norm.bias"], 1e-6), "head")


def llama(p, config, token_ids):
    """Every projection is an `affine`, with its adapters. How far RoPE turns is taken from the library:
    tests/test_llama_relatives.py compares that with llama.cpp."""
    batch, t_seq = token_ids.shape
    positions = torch.arange(t_seq).repeat(batch)
    eps, turns, residual = config.rms_eps, (rotation(config), rotation(config, True)), config.residual_scale
    scores = 1.0 if config.attention_scale is None else config.attention_scale * config.d_head**0.5

    project = partial(affine, p)

    def place(x, name, heads, layer):
        """x: (B*T, heads*d_head) as attention sees it."""
        if f"{name}_norm.weight" in p:
            gain = p[f"{name}_norm.weight"]
            x = F.rms_norm(x.reshape(len(x), -1, len(gain)), (len(gain),), gain, eps).flatten(1)
        if config.rope_skips and layer % config.rope_skips == config.rope_skips - 1:
            return x
        return rope(x, positions, heads, **turns[windows[layer] is not None])

    def leave(x, name):
        return residual * normed(x, name)

    def normed(x, name):
        return rms_norm(x, p[name], eps) if name in p else x

    pattern = config.window_pattern or config.n_layers + 1
    windows = [None if i % pattern == pattern - 1 else config.sliding_window for i in range(config.n_layers)]

    x = config.embedding_scale * embed(p, token_ids).reshape(batch * t_seq, -1)
    for i in range(config.n_layers):
        block = f"blk.{i}"
        h = normed(x, f"{block}.attn_norm.weight")
        q, k, v = (project(h, f"{block}.attn_{name}") for name in "qkv")
        q, k = place(q, f"{block}.attn_q", config.n_heads, i), place(k, f"{block}.attn_k", config.n_kv_heads, i)
        a = attention(
            scores * q, k, v, batch, config.n_heads, config.n_kv_heads, True, windows[i], config.attention_softcap
        )
        x = x + leave(project(a, f"{block}.attn_output"), f"{block}.post_attention_norm.weight")
        h = normed(x, f"{block}.ffn_norm.weight")
        gated = geglu if config.geglu else swiglu
        h = gated(project(h, f"{block}.ffn_gate"), project(h, f"{block}.ffn_up"))
        x = x + leave(project(h, f"{block}.ffn_down"), f"{block}.post_ffw_norm.weight")
    logits = unembed(p, rms_norm(x, p["output_norm.weight"], eps)) / config.logit_scale
    return logits if config.logit_softcap is None else softcap(logits, config.logit_softcap)


MODELS = {"transformer": transformer, "gpt2": gpt2, "llama": llama, "vit": vit}  # by the `arch` of a model


def run_model(arch, parameters, config, inputs, labels):
    """Logits, mean cross-entropy and its gradients by name. parameters: dict of arrays; inputs: token ids or images; labels
    as in `toy`."""
    assert arch in MODELS, f"write the PyTorch twin of {arch} above and put it into MODELS, for an outside reference"
    leaves = {name: _leaf(array) for name, array in parameters.items()}
    logits = MODELS[arch](leaves, config, torch.as_tensor(inputs))
    labels = np.asarray(labels)
    labels = torch.as_tensor(labels.reshape(-1) if labels.dtype.kind in "iu" else labels)
    loss = cross_entropy(logits, labels)
    loss.backward()
    return logits.detach().numpy(), loss.item(), {name: leaf.grad.numpy() for name, leaf in leaves.items()}


def adamw(weight, gradients, lr, beta1, beta2, eps, weight_decay):
    """The weights after each of the steps with the given gradients, by torch.optim.AdamW in float64."""
    leaf = _leaf(weight)
    optimizer = torch.optim.AdamW([leaf], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    history = []
    for gradient in gradients:
        leaf.grad = torch.tensor(np.asarray(gradient), dtype=torch.float64)
        optimizer.step()
        history.append(leaf.detach().numpy().copy())
    return history
