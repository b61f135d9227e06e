"""Time data-parallel training on this machine, and predict it on several.

    pip install mpi4py mpich
    python benchmarks/ranks.py                            the default of toy train from-scratch
    python benchmarks/ranks.py --shape baby --batch 16    a larger one

Contenders take turns, each in processes of its own that wait meanwhile: one process with a thread for each processor; one
rank under mpirun; two ranks with half the processors each; two processes at once that know nothing of each other, with half
the processors and half the batch each, which is what a rank computes. The prediction for two ranks is the time of the slower
of these two plus that of adding up the gradients alone; it is compared with the measurement. Then the same model for more
machines like this one, joined by a network: ring allreduce sends and receives 2 (K-1)/K gradients of 4 bytes a parameter on
each machine, in 2 (K-1) messages.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from timing import processors, thread_environment

# vocabulary, width, layers, heads, context, batch; the first is the default of toy train from-scratch
SHAPES = {
    "default": (103, 128, 4, 4, 128, 6),
    "baby": (65, 384, 6, 6, 256, 8),
    "gpt2-124M": (50257, 768, 12, 12, 64, 4),
}
NETWORKS = (1, 10, 100)  # Gbit/s
LATENCY = 5e-5  # seconds of a message between machines, over TCP
MACHINES = (2, 4, 8, 16, 32, 64)


def child(arguments):
    """One contender: for every line on stdin a burst of steps, whose seconds are printed as JSON."""
    import numpy as np

    import toy
    from toy.training.ranks import join

    ranks = join()
    vocabulary, width, layers, heads, context, _ = SHAPES[arguments.shape]
    kind = toy.GPT2Config if arguments.shape == "gpt2-124M" else toy.LlamaConfig
    more = {} if kind is toy.GPT2Config else {"n_kv_heads": heads}
    config = kind(
        vocab_size=vocabulary,
        d_model=width,
        n_heads=heads,
        d_ff=4 * width,
        n_layers=layers,
        context_length=context,
        **more,
    )
    recipe = toy.recipes.FromScratch(arguments.backend)
    recipe.ranks = ranks
    recipe.realize(config, toy.RecipeOptions(t_seq=context, t_batch=arguments.batch, grad_clip=1.0))
    if ranks is not None and ranks.rank > 0:
        while True:
            recipe.engine.follow()
            if ranks.exit_code != 0:
                return ranks.leave()
            buffer = np.zeros(recipe.n_parameters, np.float32)  # a turn of adding up alone
            for _ in range(20):
                ranks.add_up(buffer, [0.0])
    inputs, labels = recipe.engine.step_batch.random(np.random.default_rng(0))
    adamw, k = recipe.adamw(lr=1e-4), 0
    print(json.dumps(recipe.n_parameters), flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            ranks.send(_orders(ranks, 0))
            buffer, times = np.zeros(recipe.n_parameters, np.float32), []
            for _ in range(20):
                began = time.perf_counter()
                ranks.add_up(buffer, [0.0])
                times.append(time.perf_counter() - began)
            print(json.dumps(times[5:]), flush=True)
            continue
        times, end = [], time.perf_counter() + float(line)
        while time.perf_counter() < end or len(times) < 3:
            began = time.perf_counter()
            recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)
            times.append(time.perf_counter() - began)
            k += 1
        print(json.dumps(times[1:]), flush=True)  # the first finds cold caches
    if ranks is not None:
        ranks.send(_orders(ranks, 1))
        ranks.leave()


def _orders(ranks, exit_code):
    from toy.engines.shared import Order

    return [Order("end", (exit_code,))] * (ranks.size - 1)


class Contender:
    """Processes that make steps when they are told to."""

    def __init__(self, arguments, threads, batch, ranks=None):
        words = [__file__, "--child", "--shape", arguments.shape, "--backend", arguments.backend, "--batch", batch]
        launcher = [] if ranks is None else [_mpirun(), "-n", ranks]
        self.turns = []  # lists of seconds of a step
        self.process = subprocess.Popen(
            [*map(str, launcher), sys.executable, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=thread_environment(threads) | {"OMP_NUM_THREADS": str(threads), "OMPI_ALLOW_RUN_AS_ROOT": "1",
                                               "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
        )  # fmt: skip
        self.n_parameters = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contender ended with {self.process.wait()}")
        return json.loads(line)

    def tell(self, word):
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Pair(Contender):
    """Two of them at once; a step is over when the slower one's is."""

    def __init__(self, arguments, threads, batch):
        self.other = Contender(arguments, threads, batch)
        super().__init__(arguments, threads, batch)

    def tell(self, word):
        for process in (self.process, self.other.process):
            process.stdin.write(f"{word}\n")
            process.stdin.flush()
        return [max(pair) for pair in zip(self.read(), self.other.read())]

    def close(self):
        self.other.close()
        super().close()


def _mpirun():
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        sys.exit("there is no mpirun: pip install mpi4py mpich")
    return found


def network_seconds(n_parameters, machines, gigabits):
    """Seconds of a ring allreduce of float32 gradients."""
    n_bytes = 2 * (machines - 1) / machines * 4 * n_parameters
    return n_bytes / (gigabits * 1e9 / 8) + 2 * (machines - 1) * LATENCY


def fast(times):
    """The time that a tenth of them keep under: of a machine that others use too, nearly what it is without them."""
    return sorted(times)[len(times) // 10]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="default")
    parser.add_argument("--batch", type=int, default=None, help="sequences in a step, an even number")
    parser.add_argument("--backend", default="ggml")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per contender")
    parser.add_argument("--burst", type=float, default=0.5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or SHAPES[arguments.shape][-1]
    if arguments.child:
        return child(arguments)
    batch, all_of_them = arguments.batch, processors()
    half = max(1, all_of_them // 2)
    there = {
        "one process": Contender(arguments, all_of_them, batch),
        "one rank": Contender(arguments, all_of_them, batch, ranks=1),
        "two ranks": Contender(arguments, half, batch, ranks=2),
        "half a batch": Pair(arguments, half, batch // 2),
        "one sequence": Contender(arguments, half, 1),
    }
    adding, turns = [], max(3, round(arguments.seconds / arguments.burst))
    for _ in range(turns):
        for contender in there.values():
            contender.turns.append(contender.tell(arguments.burst))
        adding += there["two ranks"].tell("add")
    for contender in there.values():
        contender.close()
    n_parameters, exchange = there["one process"].n_parameters, fast(adding)
    print(
        f"{arguments.shape}: {n_parameters:,} parameters, {batch} sequences of {SHAPES[arguments.shape][4]}, "
        f"{arguments.backend}, {all_of_them} processors, {turns} turns\n"
    )
    print(f"{'milliseconds a step':<24}{'fastest tenth':>14}{'median':>10}  threads each")
    seconds = {}
    for name, contender in there.items():
        times = [time for turn in contender.turns for time in turn]
        seconds[name] = fast(times)
        threads = all_of_them if name in ("one process", "one rank") else half
        print(f"{name:<24}{fast(times) * 1e3:>14.2f}{statistics.median(times) * 1e3:>10.2f}{threads:>14}")
    print(
        f"{'adding up alone':<24}{exchange * 1e3:>14.2f}{statistics.median(adding) * 1e3:>10.2f}"
        f"  ({4 * n_parameters / 1e6:.1f} MB)\n"
    )
    for what, a, b, bar in (
        ("one rank / one process", "one rank", "one process", "<= 1.02"),
        ("speed of two ranks / of one process", "one process", "two ranks", ">= 0.85"),
    ):
        neighbours = [statistics.median(x) / statistics.median(y) for x, y in zip(there[a].turns, there[b].turns)]
        low, middle, high = statistics.quantiles(neighbours, n=4)
        print(
            f"{what:<38}{seconds[a] / seconds[b]:>6.3f} of the fastest, {middle:.3f} of neighbours in time "
            f"({low:.3f} to {high:.3f}); bar {bar}"
        )
    middle = {name: statistics.median(time for turn in there[name].turns for time in turn) for name in there}
    expected = middle["half a batch"] + statistics.median(adding)
    error = expected / middle["two ranks"] - 1
    print(f"{'two ranks, predicted':<38}{expected * 1e3:>6.2f} ms, {error:+.1%} from the measurement\n")
    # of one machine: what a step takes whatever the batch is (the update), and what the sequences take
    whole, part, row = seconds["one process"], seconds["half a batch"], seconds["one sequence"]
    a_row = max(0.0, (part - row) / max(1, batch // 2 - 1))
    fixed = max(0.0, row - a_row) * whole / max(2 * (part - row) + row, 1e-9) if a_row else 0.0
    fixed = min(fixed, 0.9 * whole)
    print("machines like this one: times as many tokens a second as one (share of the time that is the network's)\n")
    for grows in (False, True):
        print(f"{batch} sequences in a step " + ("on each machine" if grows else "in all"))
        print(f"{'':<10}" + "".join(f"{f'{n} Gbit/s':>16}" for n in NETWORKS))
        for machines in MACHINES:
            if not grows and machines > batch:
                print(f"{machines:<10}  refused: more ranks than sequences")
                continue
            cells = []
            for gigabits in NETWORKS:
                network = network_seconds(n_parameters, machines, gigabits)
                step = (whole if grows else fixed + (whole - fixed) / machines) + network
                cells.append(f"{(machines if grows else 1) * whole / step:.2f} ({network / step:.0%})")
            print(f"{machines:<10}" + "".join(f"{cell:>16}" for cell in cells))
        print()


if __name__ == "__main__":
    main()
