"""Time every op, forward and backward together: numpy reference, compiled kernels, and PyTorch where it is installed.

    python benchmarks/ops.py [--shapes tiny char baby] [--threads 2] [--seconds 0.5] [--ops attention ...]

The three take turns, so that a busy moment of the machine hits all of them; the figures are medians in milliseconds,
and the last column is accelerated / PyTorch (below 1: the kernels are faster). PyTorch runs eagerly in float32 with the
same number of threads.

Of the ops that are matrix products, `limit` is the accelerated time as a multiple of what their multiplications and additions
take at the rate of a large sgemm, which is measured in turns with them. Of attention those that the causal mask leaves count.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# vocabulary, width, heads, layers, context, batch
SHAPES = {
    "tiny": (65, 64, 4, 2, 32, 4),
    "char": (65, 128, 4, 4, 64, 12),
    "baby": (65, 384, 6, 6, 256, 8),
    "gpt2-124M": (50257, 768, 12, 12, 64, 4),
}


def make_cases(np, shape, torch):
    """{op: (function of an op table, function that runs PyTorch or None, its flops or None)}."""
    vocab, width, heads, layers, context, batch = SHAPES[shape]
    n = batch * context
    rng = np.random.default_rng(0)

    def normal(*size):
        return rng.standard_normal(size, dtype=np.float32)

    def tensors(*arrays):
        return [torch.tensor(a, requires_grad=True) for a in arrays]

    def torch_pair(function, inputs, d_out):
        """Forward and backward; gradients of parameters (all inputs but the first) accumulate, as ours do."""
        if torch is None:
            return None
        leaves = tensors(*inputs)
        gradient = torch.tensor(d_out) if d_out is not None else None

        def run():
            leaves[0].grad = None
            function(*leaves).backward(gradient)

        return run

    cases = {}

    def add_linear(label, n_in, n_out, bias):
        x, weight, d_y = normal(n, n_in), normal(n_out, n_in), normal(n, n_out)
        b = normal(n_out) if bias else None
        d_weight, d_bias = np.zeros_like(weight), np.zeros(n_out, np.float32) if bias else None

        def run(ops):
            _, cache = ops.linear(x, weight, b)
            ops.linear_backward(d_y, cache, d_weight, d_bias)

        inputs = (x, weight, b) if bias else (x, weight)
        function = torch.nn.functional.linear if torch else None
        flops = 3 * 2 * n * n_in * n_out  # y, d_x and d_weight
        cases[f"linear {label} {n}x{n_in}->{n_out}{'+b' if bias else ''}"] = (
            run,
            torch_pair(function, inputs, d_y),
            flops,
        )

    add_linear("qkv", width, 3 * width, True)
    add_linear("out", width, width, False)
    add_linear("up", width, 4 * width, True)
    add_linear("down", 4 * width, width, True)
    add_linear("logits", width, vocab, False)

    x, d_y, gamma, beta = normal(n, width), normal(n, width), normal(width), normal(width)
    d_gamma, d_beta = np.zeros_like(gamma), np.zeros_like(beta)
    hidden, d_hidden = normal(n, 4 * width), normal(n, 4 * width)

    def rms_norm(ops):
        ops.rms_norm_backward(d_y, ops.rms_norm(x, gamma)[1], d_gamma)

    def layer_norm(ops):
        ops.layer_norm_backward(d_y, ops.layer_norm(x, gamma, beta)[1], d_gamma, d_beta)

    def gelu(ops):
        ops.gelu_backward(d_hidden, ops.gelu(hidden)[1])

    def swiglu(ops):
        ops.swiglu_backward(d_hidden, ops.swiglu(hidden, d_hidden)[1])

    def add(ops):
        ops.add(x, d_y)

    qkv, d_out = normal(n, 3 * width), normal(n, width)

    def attention(ops):
        _, cache = ops.attention(*ops.split(qkv, [width] * 3), batch, heads)
        ops.concat(ops.attention_backward(d_out, cache))

    positions = np.tile(np.arange(context), batch)

    def rope(ops):
        ops.rope_backward(d_y, ops.rope(x, positions, heads)[1])

    logits, labels = normal(n, vocab), rng.integers(0, vocab, n)

    def cross_entropy(ops):
        ops.cross_entropy_backward(ops.cross_entropy(logits, labels)[1])

    table, ids = normal(vocab, width), rng.integers(0, vocab, n)
    d_table = np.zeros_like(table)

    def embedding(ops):
        ops.embedding_backward(d_y, ops.embedding(ids, table)[1], d_table)

    size = 12 * layers * width * width + (vocab + context) * width
    weight, gradient, m, v = normal(size), normal(size), np.zeros(size, np.float32), np.zeros(size, np.float32)
    hp = np.array([[1e-3, 0.9, 0.95, 1e-8, 0.1, 0.9, 0.95]], np.float32)

    def adamw(ops):
        ops.adamw_step(weight, gradient, m, v, hp)

    def clip(ops):
        ops.sum_of_squares(gradient)  # what it is to be multiplied by goes into AdamW

    twins = dict.fromkeys(["rms_norm", "layer_norm", "gelu", "swiglu", "add", "attention", "rope", "cross_entropy",
                           "embedding", "adamw", "clip"])  # fmt: skip
    if torch is not None:
        functional = torch.nn.functional

        def torch_attention(leaf):
            q, k, v = (a.view(batch, context, heads, width // heads).transpose(1, 2) for a in leaf.split(width, dim=1))
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return out.transpose(1, 2).reshape(n, width)

        t_x, t_d_y, t_labels, t_ids = torch.tensor(x), torch.tensor(d_y), torch.tensor(labels), torch.tensor(ids)
        parameter = torch.nn.Parameter(torch.tensor(weight))
        parameter.grad = torch.tensor(gradient)
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
        twins.update(
            rms_norm=torch_pair(lambda a, g: functional.rms_norm(a, (width,), g, 1e-5), (x, gamma), d_y),
            layer_norm=torch_pair(lambda a, g, b: functional.layer_norm(a, (width,), g, b), (x, gamma, beta), d_y),
            gelu=torch_pair(lambda a: functional.gelu(a, approximate="tanh"), (hidden,), d_hidden),
            swiglu=torch_pair(lambda a, b: functional.silu(a) * b, (hidden, d_hidden), d_hidden),
            add=lambda: t_x + t_d_y,
            attention=torch_pair(torch_attention, (qkv,), d_out),
            cross_entropy=torch_pair(lambda a: functional.cross_entropy(a, t_labels), (logits,), None),
            embedding=torch_pair(lambda t: functional.embedding(t_ids, t), (table,), d_y),
            adamw=optimizer.step,
            clip=lambda: torch.nn.utils.clip_grad_norm_([parameter], 1e9, foreach=True),
        )
    rows = {"rms_norm": n, "layer_norm": n, "gelu": n, "swiglu": n, "add": n, "attention": n, "rope": n}
    functions = dict(rms_norm=rms_norm, layer_norm=layer_norm, gelu=gelu, swiglu=swiglu, add=add, attention=attention,
                     rope=rope, cross_entropy=cross_entropy, embedding=embedding, adamw=adamw, clip=clip)  # fmt: skip
    widths = {"gelu": 4 * width, "swiglu": 4 * width}
    sizes = {op: f"{rows[op]}x{widths.get(op, width)}" for op in rows}
    sizes.update(attention=f"{batch}x{heads}x{context}x{width // heads}", cross_entropy=f"{n}x{vocab}",
                 embedding=f"{n} of {vocab}x{width}", adamw=f"{size}", clip=f"{size}")  # fmt: skip
    # scores and outputs; their gradients, the scores once more: seven products of 2 flops a score and number of a head
    flops = {"attention": 7 * 2 * batch * width * context * (context + 1) // 2}
    for op, function in functions.items():
        cases[f"{op} {sizes[op]}"] = function, twins[op], flops.get(op)
    return cases


def large_product(np, ops):
    """(a function that multiplies matrices which the second cache holds, its flops)."""
    x, weight = np.ones((512, 384), np.float32), np.ones((1536, 384), np.float32)
    return lambda: ops.linear(x, weight), 2 * 512 * 384 * 1536


def alternate(functions, seconds):
    """Median seconds of each function; they take turns of a quarter of a second.

    A turn is some calls in a row. Those of the first 0.15 s are not counted: the BLAS or OpenMP threads of the one before
    spin for up to 0.1 s after their last work and hold a core all that time.
    """
    times = [[] for _ in functions]
    for _ in range(max(2, round(seconds / 0.25))):
        for function, own in zip(functions, times):
            warm = time.perf_counter() + 0.15
            function()
            while time.perf_counter() < warm:
                function()
            own += timed_calls(function, 0.1)
    return [statistics.median(own) for own in times]


def timed_calls(function, seconds):
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["char", "baby"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="per op and implementation")
    parser.add_argument("--ops", nargs="+", default=[""], help="only ops whose line contains one of these words")
    parser.add_argument("--no-reference", action="store_true", help="leave out the numpy reference")
    arguments = parser.parse_args()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TOY_NUM_THREADS"):
        os.environ[variable] = str(arguments.threads)  # read when the libraries are loaded, so before they are

    import numpy as np

    from toy.ops import accelerated, reference

    try:
        import torch

        torch.set_num_threads(arguments.threads)
    except ImportError:
        torch = None
    heads = f"{'reference':>11}{'accelerated':>12}{'PyTorch':>9}{'ratio':>7}{'limit':>7}"
    print(f"{'shape':<10}{'op, forward + backward':<36}{heads}")
    product, product_flops = large_product(np, accelerated)
    for shape in arguments.shapes:
        for case, (run, twin, flops) in make_cases(np, shape, torch).items():
            if not any(word in case for word in arguments.ops):
                continue
            functions = [] if arguments.no_reference else [lambda run=run: run(reference)]
            functions.append(lambda run=run: run(accelerated))
            functions += [twin] if twin else []
            functions += [product] if flops else []
            times = [1e3 * t for t in alternate(functions, arguments.seconds)]
            limit_ms = times.pop() / product_flops * flops if flops else None
            reference_ms = "" if arguments.no_reference else f"{times.pop(0):.3f}"
            torch_ms, ratio = (f"{times[1]:.3f}", f"{times[0] / times[1]:.2f}") if twin else ("", "")
            limit = f"{times[0] / limit_ms:.2f}" if flops else ""
            print(
                f"{shape:<10}{case:<36}{reference_ms:>11}{times[0]:>12.3f}{torch_ms:>9}{ratio:>7}{limit:>7}", flush=True
            )


if __name__ == "__main__":
    main()
