"""Time one LoRA step on a real model on every backend and in PyTorch eager float32, and measure the memory it takes.

    toy fetch smollm2-135m
    python benchmarks/lora_step.py                             rank 8 on q, context 128, batch 1
    python benchmarks/lora_step.py --context 512 --backends ggml

PyTorch computes with the dequantised float32 weights (frozen: requires_grad=False), scaled_dot_product_attention and fused
AdamW on the adapters; toy with the file as it is. Contenders take turns in one process; the memory is that of a fresh process
each, at its peak, above what the imports took. "first loss" shows that all of them compute the same thing.
"""

import argparse
import importlib.util
import platform
import statistics
import sys

from timing import alternate, child_figure, print_peak, processors, restart_with


def make_batch(vocab_size, context, batch):
    import numpy as np

    ids = np.random.default_rng(0).integers(0, vocab_size, (batch, context + 1))
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def toy_recipe(backend, arguments, device="auto"):
    """-> (the recipe, a function that makes one training step and returns the loss)."""
    import toy
    from toy.files.places import find_model

    gguf = toy.GGUF.open(find_model(arguments.model))
    options = toy.RecipeOptions(t_seq=arguments.context, t_batch=arguments.batch)
    recipe = toy.recipes.LoRA(backend=backend, device=device).realize(
        gguf, gguf.config(), arguments.rank, options, targets=arguments.targets
    )
    adamw = recipe.adamw(lr=1e-4)
    token_ids, labels = make_batch(recipe.engine.config.vocab_size, arguments.context, arguments.batch)
    steps = iter(range(10**9))

    def step():
        k = next(steps)
        return recipe.step(token_ids, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)

    return recipe, step


def torch_step(arguments, device="cpu", compiled=False):
    import torch
    from torch.nn import functional as F

    import toy
    from toy.engines.adapters import TARGETS
    from toy.files.places import find_model

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with toy.GGUF.open(find_model(arguments.model)) as gguf:
        c = gguf.config()
        p = {name: torch.from_numpy(array).to(device) for name, array in gguf.parameters().items()}
    names = [f"blk.{i}.{TARGETS[target]}" for i in range(c.n_layers) for target in arguments.targets]
    adapters = {}
    for name in names:
        n_out, n_in = p[f"{name}.weight"].shape
        a = torch.randn(arguments.rank, n_in, device=device) * (3 * n_in) ** -0.5
        adapters[name] = (a.requires_grad_(), torch.zeros(n_out, arguments.rank, device=device, requires_grad=True))
    trained = [tensor for pair in adapters.values() for tensor in pair]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    frequencies = c.rope_base ** (-torch.arange(0, c.d_head, 2, dtype=torch.float64) / c.d_head)
    angles = torch.arange(arguments.context)[:, None] * frequencies
    cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)  # (T, d_head/2)

    def project(x, name):
        y = F.linear(x, p[f"{name}.weight"])
        if name in adapters:
            a, b = adapters[name]
            y = y + F.linear(F.linear(x, a), b)
        return y

    def rope(x):  # (B, heads, T, d_head), interleaved pairs
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def heads(x, n):
        return x.view(*x.shape[:2], n, c.d_head).transpose(1, 2)

    token_ids, labels = (
        torch.from_numpy(a).to(device) for a in make_batch(c.vocab_size, arguments.context, arguments.batch)
    )

    def forward():
        x = F.embedding(token_ids, p["token_embd.weight"])
        for i in range(c.n_layers):
            block = f"blk.{i}"
            h = F.rms_norm(x, (c.d_model,), p[f"{block}.attn_norm.weight"], c.rms_eps)
            q, k = (rope(heads(project(h, f"{block}.attn_{n}"), m)) for n, m in (("q", c.n_heads), ("k", c.n_kv_heads)))
            v = heads(project(h, f"{block}.attn_v"), c.n_kv_heads)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + project(a.transpose(1, 2).flatten(-2), f"{block}.attn_output")
            h = F.rms_norm(x, (c.d_model,), p[f"{block}.ffn_norm.weight"], c.rms_eps)
            h = F.silu(project(h, f"{block}.ffn_gate")) * project(h, f"{block}.ffn_up")
            x = x + project(h, f"{block}.ffn_down")
        x = F.rms_norm(x, (c.d_model,), p["output_norm.weight"], c.rms_eps)
        return F.linear(x, p.get("output.weight", p["token_embd.weight"]))

    run = torch.compile(forward) if compiled else forward

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(run().view(-1, c.vocab_size), labels.view(-1))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def step_of(contender, arguments):
    return torch_step(arguments) if contender == "pytorch" else toy_recipe(contender, arguments)[1]


def memory_child(arguments):
    import toy
    import toy.quantized

    if arguments.child == "pytorch":
        import torch

        torch.optim.AdamW([torch.zeros(1)])
    else:
        toy.switch.resolve(arguments.child)
    print_peak(lambda: step_of(arguments.child, arguments))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="GGUF file of a llama, or the name of a fetched model")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", nargs="+", default=["q"])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=None, help="default: ggml and cython, where available")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--seconds", type=float, default=10.0, help="time per contender")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return memory_child(arguments)
    restart_with(arguments.threads)

    import toy

    there = [row.name for row in toy.backends() if row.available and row.name != "numpy"]
    contenders = arguments.backends or there
    if importlib.util.find_spec("torch"):
        contenders.append("pytorch")
    print(
        f"LoRA on {arguments.model}: rank {arguments.rank} on {', '.join(arguments.targets)}, context {arguments.context}, "
        f"batch {arguments.batch}, {arguments.threads} threads, Python {platform.python_version()}\n"
    )
    steps = {name: step_of(name, arguments) for name in contenders}
    losses = {name: step() for name, step in steps.items()}
    times = alternate(steps, arguments.seconds, burst=1.0)
    medians = {name: statistics.median(values) for name, values in times.items()}
    steps.clear()
    own = ["--model", arguments.model, "--rank", arguments.rank, "--context", arguments.context]
    own += ["--batch", arguments.batch, "--threads", arguments.threads, "--targets", *arguments.targets]
    memory = {}
    if not arguments.no_memory and sys.platform == "linux":
        memory = {
            name: child_figure([__file__, "--child", name, *map(str, own)], arguments.threads) for name in contenders
        }
    names = ("first loss", "median ms", "fastest", "/ PyTorch", "peak MB", "/ PyTorch")
    print(f"{'contender':<12} " + " ".join(f"{name:>10}" for name in names))
    for name in contenders:
        ratio = medians[name] / medians["pytorch"] if "pytorch" in medians else float("nan")
        peak = memory.get(name, float("nan"))
        memory_ratio = peak / memory["pytorch"] if memory.get("pytorch") else float("nan")
        print(
            f"{name:<12} {losses[name]:>10.4f} {medians[name] * 1e3:>10.1f} {min(times[name]) * 1e3:>10.1f} {ratio:>10.2f} "
            f"{peak / 1e6:>10.1f} {memory_ratio:>10.2f}"
        )


if __name__ == "__main__":
    main()
