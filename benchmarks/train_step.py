"""Time one training step on every backend and in PyTorch eager: the same model, threads, batch, optimizer and precision.

    python benchmarks/train_step.py                      all shapes, all backends present, PyTorch if installed
    python benchmarks/train_step.py --shapes tiny char   some shapes
    python benchmarks/train_step.py --model gpt2         GPT-2 instead of the readable TransformerLM
    python benchmarks/train_step.py --precision bf16     products in bfloat16, of PyTorch under autocast (numpy has none)

All contenders live in one process and take turns in short bursts of steps (A B C A B C ...), so that a machine whose speed
drifts treats them alike; the table gives medians and their ratio to PyTorch (below 1: faster than PyTorch). Peak memory is
measured apart, one fresh process per contender: resident memory at its highest during the steps, above what the imports took.

"of limit" is the share of a step that its matrix products would take at the speed of one product alone, the MLP's of this
shape by numpy's BLAS, which takes its turns with the contenders: 1 would be a step of nothing but products at that speed, in
float32: with --precision bf16 it may be more.

PyTorch gets its best: scaled_dot_product_attention, its own RMSNorm / LayerNorm and tanh GELU, fused AdamW, and gradients
set to None between the steps.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import sys

from timing import alternate, child_figure, print_peak, processors, restart_with

SHAPES = {  # vocabulary, width, heads, layers, context, batch; the MLP is 4 times as wide as the model
    "tiny": (65, 64, 4, 2, 32, 4),
    "char": (65, 128, 4, 4, 64, 12),
    "baby": (65, 384, 6, 6, 256, 8),
    "gpt2-124M": (50257, 768, 12, 12, 64, 4),
}


PRODUCT = "a product alone"


def make_batch(shape):
    import numpy as np

    vocab, _, _, _, t_seq, batch = SHAPES[shape]
    ids = np.random.default_rng(0).integers(0, vocab, (batch, t_seq + 1))
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])


def product_flops(shape):
    """Additions and multiplications of the matrix products in a training step: forward, and twice as many backward."""
    vocab, width, _, layers, t_seq, batch = SHAPES[shape]
    rows = batch * t_seq
    matrices = layers * 12 * width**2 + vocab * width  # numbers: four square ones and the MLP; the unembedding
    attention = layers * 2 * rows * width * (t_seq + 1) / 2  # scores and values, of what the mask leaves
    return 3 * 2 * (rows * matrices + attention)


def product_alone(shape):
    """-> a function that makes one product of the MLP, and its additions and multiplications."""
    import numpy as np

    _, width, _, _, t_seq, batch = SHAPES[shape]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch * t_seq, width), dtype=np.float32)
    w = rng.standard_normal((4 * width, width), dtype=np.float32)
    y = np.empty((len(x), len(w)), np.float32)
    return lambda: np.matmul(x, w.T, out=y), 2 * x.size * len(w)


def toy_recipe(backend, model, shape, device="auto", precision="f32"):
    """-> (the recipe, a function that makes one training step and returns the loss)."""
    import toy

    vocab, width, heads, layers, t_seq, batch = SHAPES[shape]
    config_class = {"transformer": toy.TransformerConfig, "gpt2": toy.GPT2Config}[model]
    config = config_class(vocab, width, heads, 4 * width, layers, t_seq)
    recipe = toy.recipes.FromScratch(backend=backend, device=device)
    recipe.realize(config, toy.RecipeOptions(t_seq=t_seq, t_batch=batch, precision=precision))
    adamw = recipe.adamw(lr=1e-3)
    token_ids, labels = make_batch(shape)
    steps = iter(range(10**9))

    def step():
        k = next(steps)
        return recipe.step(token_ids, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)

    return recipe, step


def torch_step(model, shape, threads, device="cpu", compiled=False, precision="f32"):
    """-> a function that makes one PyTorch training step and returns the loss. compiled: by torch.compile. precision: "bf16"
    is autocast, of the forward and the loss."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vocab, width, heads, layers, t_seq, _ = SHAPES[shape]
    gpt2 = model == "gpt2"

    def norm():
        return nn.LayerNorm(width) if gpt2 else nn.RMSNorm(width, eps=1e-5)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = norm(), norm()
            self.projections = nn.ModuleList(
                [nn.Linear(width, 3 * width)] if gpt2 else [nn.Linear(width, width, bias=False) for _ in range(3)]
            )
            self.output = nn.Linear(width, width, bias=gpt2)
            self.up, self.down = nn.Linear(width, 4 * width, bias=gpt2), nn.Linear(4 * width, width, bias=gpt2)

        def forward(self, x):
            b, t, d = x.shape
            h = self.norm1(x)
            q, k, v = self.projections[0](h).split(d, dim=2) if gpt2 else (p(h) for p in self.projections)
            q, k, v = (a.view(b, t, heads, d // heads).transpose(1, 2) for a in (q, k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.output(a.transpose(1, 2).reshape(b, t, d))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = nn.Embedding(vocab, width), nn.Embedding(t_seq, width)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(layers)), norm()
            for parameter in self.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, ids):
            x = self.token(ids) + self.position.weight
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.token.weight.T

    network = LanguageModel().to(device)
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    token_ids, labels = (torch.from_numpy(a).to(device) for a in make_batch(shape))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(forward(token_ids).view(-1, vocab), labels.view(-1))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def step_of(contender, model, shape, threads, precision):
    if contender == "pytorch":
        return torch_step(model, shape, threads, precision=precision)
    return toy_recipe(contender, model, shape, precision=precision)[1]


def memory_child(contender, model, shape, threads, precision):
    """Print the peak of resident memory during 4 steps above what the imports took, in bytes (Linux)."""
    import numpy  # noqa: F401

    if contender == "pytorch":
        import torch
        from torch.nn import functional  # noqa: F401

        torch.optim.AdamW([torch.zeros(1)])
    else:
        import toy

        toy.switch.resolve(contender)
    print_peak(lambda: step_of(contender, model, shape, threads, precision))


def peak_memory(contender, model, shape, threads, precision):
    which = ["--model", model, "--shapes", shape, "--threads", str(threads), "--precision", precision]
    return child_figure([__file__, "--child", contender, *which], threads)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--model", choices=("transformer", "gpt2"), default="transformer")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32")
    parser.add_argument("--backends", nargs="+", default=None, help="default: all that are available")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--seconds", type=float, default=5.0, help="time per shape and contender")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    threads, model, precision = arguments.threads, arguments.model, arguments.precision
    if arguments.child:
        return memory_child(arguments.child, model, arguments.shapes[0], threads, precision)
    restart_with(threads)

    import toy

    contenders = arguments.backends or [row.name for row in toy.backends() if row.available]
    if precision == "bf16":
        contenders = [name for name in contenders if name != "numpy"]
    if importlib.util.find_spec("torch"):
        contenders.append("pytorch")
        import torch

        print(f"PyTorch {torch.__version__}, ", end="")
    versions = ", ".join(f"{row.name} ({row.version})" for row in toy.backends() if row.name in contenders)
    print(f"Python {platform.python_version()}, {versions}, {threads} threads, model {model}, {precision}\n")
    print(
        f"{'shape':<10} {'contender':<12} {'median ms':>10} {'fastest':>9} {'/ PyTorch':>10} {'of limit':>9} "
        f"{'peak MB':>9} {'/ PyTorch':>10}"
    )
    figures = []
    for shape in arguments.shapes:
        product, flops = product_alone(shape)
        steps = {name: step_of(name, model, shape, threads, precision) for name in contenders}
        times = alternate(steps | {PRODUCT: product}, arguments.seconds)
        speed = flops / statistics.median(times.pop(PRODUCT))  # a second
        limit = product_flops(shape) / speed
        medians = {name: statistics.median(values) for name, values in times.items()}
        memory = {}
        if not arguments.no_memory and sys.platform == "linux":
            memory = {name: peak_memory(name, model, shape, threads, precision) for name in contenders}
        for name in contenders:
            ratio = medians[name] / medians["pytorch"] if "pytorch" in medians else float("nan")
            peak = memory.get(name, float("nan"))
            memory_ratio = peak / memory["pytorch"] if memory.get("pytorch") else float("nan")
            print(
                f"{shape:<10} {name:<12} {medians[name] * 1e3:>10.2f} {min(times[name]) * 1e3:>9.2f} {ratio:>10.2f} "
                f"{limit / medians[name]:>9.2f} {peak / 1e6:>9.1f} {memory_ratio:>10.2f}",
                flush=True,
            )
            figures.append(
                {
                    "shape": shape,
                    "contender": name,
                    "median_s": medians[name],
                    "ratio": ratio,
                    "peak_bytes": peak,
                    "share_of_limit": limit / medians[name],
                }
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1)


if __name__ == "__main__":
    main()
