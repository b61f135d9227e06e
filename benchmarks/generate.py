"""Tokens a second of toy and of llama.cpp on the same GGUF file: reading a prompt, and writing one token after the other.

    python benchmarks/generate.py                              SmolLM2-135M, a prompt of 512 tokens, 128 new ones
    python benchmarks/generate.py --model FILE --threads 1
    python benchmarks/generate.py --backends ggml cython       the ggml graph (the default), and op by op in float32
    python benchmarks/generate.py --cpu-time --threads 1       seconds of the processor, on a machine that others use too

Greedy, one sequence, the same prompt ids for all. The contenders live in one process and take turns; the table gives medians
and their ratio to llama.cpp (above 1: faster). llama.cpp (`pip install xllamacpp`) tells its own times; it uses the key/value
cache that it has by itself (half precision, as the graph beside quantised weights), no flash attention, and no cached prompt.
"""

import argparse
import importlib.util
import platform
import statistics
import time

import numpy as np
from timing import processors, restart_with


def by_cpu_time(generate, n_new):
    """generate(n): n new tokens -> a function that tells as the contenders do, in seconds of the processor."""

    def seconds(n):
        started = time.process_time()
        generate(n)
        return time.process_time() - started

    def run():
        read = seconds(1)
        return read, (seconds(n_new) - read) / (n_new - 1)

    return run


def toy_contender(path, prompt, n_new, backend, cpu_time=False):
    """-> a function that generates once and returns (seconds of the prompt, seconds of a new token, ids)."""
    from toy.models.generation import generate
    from toy.trained import load_trained
    from toy.trained.generator import generator

    made = generator(load_trained(path, backend=backend).model, backend)
    print(f"{backend}: {made.how}", made.notice)
    model = made.model
    if cpu_time:
        return by_cpu_time(lambda n: list(generate(model, prompt, n, temperature=0)), n_new)
    return by_clock(model, prompt, n_new)


def by_clock(model, prompt, n_new):
    """-> a function that lets a model generate once and tells as the contenders do."""
    from toy.models.generation import generate

    def run():
        started = time.perf_counter()
        tokens = generate(model, prompt, n_new, temperature=0)
        next(tokens)
        read = time.perf_counter()
        for _ in tokens:
            pass
        return read - started, (time.perf_counter() - read) / (n_new - 1)

    return run


def llama_cpp_contender(path, prompt, n_new, threads, gpu_layers=0, cpu_time=False):
    """The same of llama.cpp, on the CPU; gpu_layers: how many blocks are on the GPU, where it was built with one."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = len(prompt) + n_new + 8, 1, gpu_layers
    settings.warmup, settings.fit_params, settings.verbosity = False, False, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    request = {
        "prompt": [int(i) for i in prompt], "n_predict": n_new, "temperature": 0, "cache_prompt": False, "ignore_eos": True,
    }  # fmt: skip
    if cpu_time:
        return by_cpu_time(lambda n: server.handle_completions(request | {"n_predict": n}), n_new)

    def run():
        answer = server.handle_completions(request)
        timings = answer["timings"]
        if timings["prompt_n"] != len(prompt) or timings["predicted_n"] != n_new:
            raise RuntimeError(f"llama.cpp read {timings['prompt_n']} tokens and wrote {timings['predicted_n']}")
        # its first new token comes with the prompt, as toy's does
        return timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3 / (n_new - 1)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="GGUF file, or the name of a fetched model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens, at least 2")
    parser.add_argument("--backends", nargs="+", default=["ggml", "cython"])
    parser.add_argument("--threads", type=int, default=min(2, processors()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor; take one thread")
    arguments = parser.parse_args()
    if arguments.new < 2 or arguments.prompt < 1 or arguments.rounds < 1:
        parser.error("--new must be at least 2, --prompt and --rounds at least 1")
    restart_with(arguments.threads)

    from toy.files.gguf import GGUF
    from toy.files.places import find_model

    path = find_model(arguments.model)
    with GGUF.open(path) as gguf:
        vocab_size = gguf.config().vocab_size
    prompt = np.random.default_rng(0).integers(
        vocab_size // 10, vocab_size, arguments.prompt
    )  # beyond the special tokens
    contenders = {
        name: toy_contender(path, prompt, arguments.new, name, arguments.cpu_time) for name in arguments.backends
    }
    if importlib.util.find_spec("xllamacpp"):
        contenders["llama.cpp"] = llama_cpp_contender(
            path, prompt, arguments.new, arguments.threads, cpu_time=arguments.cpu_time
        )
    print(
        f"{path.name}: prompt of {arguments.prompt} tokens, {arguments.new} new ones, {arguments.threads} threads, "
        f"Python {platform.python_version()}\n"
    )
    times = {name: [] for name in contenders}
    for run in contenders.values():
        run()  # caches, lazily made tables, memory
    for _ in range(arguments.rounds):
        for name, run in contenders.items():
            times[name].append(run())
            time.sleep(0.3)  # idle threads of a contender may still be spinning
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in times.items()}
    names = ("prompt tok/s", "/ llama.cpp", "new tok/s", "/ llama.cpp")
    print(f"{'contender':<12} " + " ".join(f"{name:>12}" for name in names))
    for name, (read, write) in medians.items():
        reading, writing = medians.get("llama.cpp", (float("nan"), float("nan")))
        cells = (arguments.prompt / read, reading / read, 1 / write, writing / write)
        print(f"{name:<12} " + " ".join(f"{cell:>12.{places}f}" for cell, places in zip(cells, (1, 2, 1, 2))))


if __name__ == "__main__":
    main()
