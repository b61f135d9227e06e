"""Is a GPU right, and how fast? One report, as text and as a JSON file, in under 8 minutes.

    python benchmarks/gpu_check.py                      CUDA; a ggml with it is built first where there is none (4 minutes)
    python benchmarks/gpu_check.py --device vulkan      or metal, cpu-native, another ggml device
    python benchmarks/gpu_check.py --quick              small shapes, few steps
    python benchmarks/gpu_check.py --parts steps lora   some parts

The parts, one process each, with a time limit each: the machine; `toy selftest` (gradients and loss curves of every model and
recipe against numpy), on CUDA once more with float32 products; the native graphs in numbers (nodes, copies, splits, bytes
uploaded); training steps against PyTorch on the same card, in turns (eager in float32 and with TF32, compiled), with the time
of the first step and the memory; LoRA on SmolLM2 (`toy fetch smollm2-135m`) likewise; tokens a second, against llama.cpp's
where xllamacpp is installed. What fails or takes too long is a line of the report, and the parts after it run.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

from timing import alternate, processors, thread_environment

HERE = Path(__file__).resolve().parent
MINUTES = 8
LIMITS = {  # seconds of each part, when all have so many minutes
    "build": 330, "machine": 40, "curves": 100, "curves, float32": 60, "graphs": 60, "steps": 150, "lora": 90, "decode": 60,
}  # fmt: skip
PARTS = tuple(LIMITS)
RESULT = "RESULT "  # in front of what a child prints for its parent
TINY_MODEL = "a tiny model"  # what --quick tunes in place of SmolLM2


# ----------------------------------------------------------------------------------------------------------------------
# the parts, each in a process of its own: functions that yield a dict for each item
# ----------------------------------------------------------------------------------------------------------------------


def items_of(part, quick):
    """What a part is made of, in the order in which it is done."""
    if part in ("curves", "curves, float32"):
        from toy.checks.selftest import CASES

        return list(CASES)
    if part == "graphs":
        return ["transformer", "gpt2", "llama", "vit", "lora q4_0", "transformer, char"]
    if part == "steps":
        return ["tiny"] if quick else ["tiny", "char", "baby", "gpt2-124M"]
    if part == "lora":
        return ["16"] if quick else ["128", "512"]
    return [part]


def bridge_name(device):
    """The device's name for `ggml_bridge`."""
    return "cpu" if device == "cpu-native" else device


def backend_of(device):
    """The name of its backend: "cuda" of "cuda:1"."""
    return device.lower().rstrip("0123456789:")


def machine(item, asked):
    import numpy

    import ggml_bridge

    devices = [device._asdict() for device in ggml_bridge.devices()]
    found = {
        "system": f"{platform.platform()}, {processors()} processors, Python {platform.python_version()}",
        "numpy": numpy.__version__,
        "ggml": ggml_bridge.version(),
        "backends": ggml_bridge.load().backends(),
        "devices": devices,
        "tested": ggml_bridge.find_device(bridge_name(asked.device)).name,
    }
    if importlib.util.find_spec("torch"):
        import torch

        found["torch"] = f"{torch.__version__}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(
            query, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    return found


def curves(item, asked):
    from toy.checks import selftest

    error = selftest.product_error(asked.device)
    exact = error <= selftest.EXACT_PRODUCT
    steps = 5 if asked.quick else 200
    checks = selftest.compare(item, asked.device, steps, selftest.EXACT if exact else selftest.ROUNDED)
    return {
        "product_error": error,
        "products": "float32" if exact else "rounded",
        "ok": all(check.ok for check in checks),
        "checks": [check._asdict() | {"value": float(check.value)} for check in checks],
    }


def graphs(item, asked):
    """What can be judged by counting, of the training graph."""
    import numpy as np

    import ggml_bridge
    from toy.checks import selftest

    with tempfile.TemporaryDirectory() as folder:
        if item == "transformer, char":
            from train_step import toy_recipe

            recipe, _ = toy_recipe("ggml", "transformer", "char", asked.device)
        else:
            recipe = selftest._realize(item, "ggml", asked.device, folder)
        inputs, labels = recipe.engine.batch.random(np.random.default_rng(0))
        adamw = recipe.adamw(lr=1e-3)
        for k in range(2):
            recipe.step(inputs, labels=labels, hp=adamw.hp_for_step(k), is_first=k == 0)
        explanation, recorded = recipe.explain(), recipe.engine._training("integers")
    views = ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE", "NONE")
    nodes = [node for node in explanation.nodes if node.op not in views]
    copies = [node for node in nodes if node.op in ("CONT", "CPY", "DUP")]
    transposed = [node for node in copies if not node.sources[0].contiguous_rows]
    # derived on the host from what is uploaded: "labels: weights", "token_ids: slots"
    derived = {s.name: 4 * int(np.prod(s.shape)) for node in nodes for s in node.sources if ": " in s.name}
    found = {
        "nodes": len(nodes),
        "by_operation": {op: n for op, n in explanation.counts().items() if op not in views},
        "products": sum(node.op == "MUL_MAT" for node in nodes),
        "copies": len(copies),
        "transposed_copies": len(transposed),
        "copied_bytes": sum(4 * int(np.prod(node.shape)) for node in copies),
        "transposed_bytes": sum(4 * int(np.prod(node.shape)) for node in transposed),
        "one_hot_rows": sum(node.op == "SET_ROWS" for node in nodes),
        "updates": sum(node.op == "OPT_STEP_ADAMW" for node in nodes),
        "uploaded_bytes": sum(tensor.nbytes for tensor, _ in recorded.feeds) + sum(derived.values()),
        "bytes": explanation.bytes,
        "splits": explanation.splits,
        "elsewhere": sum(node.device != explanation.device for node in explanation.nodes),
        "metal_lacks": len(ggml_bridge.metal_unsupported(recorded.graph)),
        "cuda_lacks": len(ggml_bridge.cuda_unsupported(recorded.graph)),
    }
    recipe.close()
    return found


def torch_kinds(device):
    """{contender: (PyTorch's device, TF32, compiled)} for what stands beside a ggml device."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    backend = backend_of(device)
    if backend in ("cuda", "gpu") and torch.cuda.is_available():
        card = f"cuda:{re.sub('[^0-9]', '', device) or 0}"
        return {
            "pytorch": (card, False, False), "pytorch TF32": (card, True, False), "pytorch TF32 compiled": (card, True, True),
        }  # fmt: skip
    if backend == "metal" and torch.backends.mps.is_available():
        return {"pytorch": ("mps", False, False)}
    return {"pytorch": ("cpu", False, False)}


def against_torch(asked, make_toy, make_torch, seconds):
    """Steps of toy on the device and of PyTorch, in turns.

    make_toy() -> recipe, step; make_torch(device, compiled) -> step."""
    import ggml_bridge

    name = bridge_name(asked.device)
    steps, first, memory, failed = {}, {}, {}, {}
    before = ggml_bridge.find_device(name).memory_free
    started = time.perf_counter()
    recipe, steps["toy"] = make_toy()
    loss = {"toy": steps["toy"]()}
    first["toy"] = time.perf_counter() - started
    steps["toy"]()
    memory["toy"] = sum(size for what, size in recipe.explain().bytes.items() if what != "metadata")
    memory["toy, on the device"] = before - ggml_bridge.find_device(name).memory_free
    for contender, (device, tf32, compiled) in torch_kinds(asked.device).items():
        if asked.quick and compiled:
            continue
        try:
            started = time.perf_counter()
            steps[contender] = with_tf32(make_torch(device, compiled), tf32, device)
            loss[contender] = steps[contender]()
            first[contender] = time.perf_counter() - started
            memory[contender] = torch_peak(steps[contender], device)
        except Exception as error:  # what torch.compile may raise is without end
            steps.pop(contender, None)
            failed[contender] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    times = alternate(steps, seconds)
    medians = {contender: statistics.median(found) for contender, found in times.items()}
    ratios = {contender: medians["toy"] / median for contender, median in medians.items() if contender != "toy"}
    recipe.close()
    return {
        "median_s": medians, "ratio": ratios, "first_step_s": first, "bytes": memory, "first_loss": loss, "failed": failed,
    }  # fmt: skip


def with_tf32(step, tf32, device):
    if not device.startswith("cuda"):
        return step
    import torch

    def run():
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return step()

    return run


def torch_peak(step, device):
    """Bytes that PyTorch has at most during a step; None where it does not tell."""
    if not device.startswith("cuda"):
        return None
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device)


def steps(item, asked):
    from train_step import torch_step, toy_recipe

    return against_torch(
        asked,
        lambda: toy_recipe("ggml", "transformer", item, asked.device),
        lambda device, compiled: torch_step("transformer", item, asked.threads, device, compiled),
        0.2 if asked.quick else 3.0,
    )


def base_model(asked, folder):
    """The file that LoRA and generation use."""
    if asked.quick:
        return tiny_model(folder)
    from toy.files.places import find_model

    return find_model(asked.model)


def tiny_model(folder):
    import toy
    from toy.files.gguf_write import write_gguf

    config = toy.LlamaConfig(96, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, n_layers=2, context_length=32)
    path = Path(folder, "tiny.gguf")
    write_gguf(path, config, toy.Llama(config, seed=1).parameters, type="q4_0")
    return path


def lora(item, asked):
    from lora_step import torch_step, toy_recipe

    with tempfile.TemporaryDirectory() as folder:
        path = base_model(asked, folder)
        options = types.SimpleNamespace(
            model=str(path), context=int(item), batch=1, rank=8, targets=["q"], threads=asked.threads
        )
        return against_torch(
            asked,
            lambda: toy_recipe("ggml", options, asked.device),
            lambda device, compiled: torch_step(options, device, compiled),
            0.2 if asked.quick else 3.0,
        )


def decode(item, asked):
    """Tokens a second, one after the other, on the device and on the CPU's kernels, and llama.cpp's, in turns."""
    from generate import by_clock, llama_cpp_contender

    from toy.engines.decoding import Decoder
    from toy.switch import resolve
    from toy.trained.load import read_trained

    n_new, rounds = (4, 1) if asked.quick else (64, 3)
    with tempfile.TemporaryDirectory() as folder:
        path, failed = base_model(asked, folder), {}
        eager = read_trained(path).model()
        first = eager.config.vocab_size // 10  # beyond the special tokens
        prompt = list(range(first, first + 8))
        decoder = Decoder(eager, resolve("ggml", asked.device))

        contenders = {
            name: by_clock(model, prompt, n_new)
            for name, model in (("toy, eager on the CPU", eager), (f"toy, {asked.device}", decoder))
        }
        if importlib.util.find_spec("xllamacpp") and not asked.quick:
            layers = 0 if asked.device.startswith("cpu") else 999
            try:
                contenders["llama.cpp"] = llama_cpp_contender(path, prompt, n_new, asked.threads, layers)
            except Exception as error:
                failed["llama.cpp"] = str(error)
        times = {name: [] for name in contenders}
        for run in contenders.values():
            run()
        for _ in range(rounds):
            for name, run in contenders.items():
                times[name].append(run()[1])
        decoder.close()
    speeds = {name: 1 / statistics.median(found) for name, found in times.items()}
    return {"tokens_per_s": speeds, "failed": failed}


def child(asked):
    """Do the items of a part, and print a line for each that is done."""
    do = {"machine": machine, "curves": curves, "curves, float32": curves, "graphs": graphs}
    do |= {"steps": steps, "lora": lora, "decode": decode}
    for item in asked.items or items_of(asked.child, asked.quick):
        print(RESULT + json.dumps({"item": item} | do[asked.child](item, asked)), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# the parent: starts the parts, and loses nothing of what they found
# ----------------------------------------------------------------------------------------------------------------------


def run_part(command, items, limit, environment=None):
    """Run `command(items)` until all items are done or `limit` seconds are over -> {item: what it found, or {"failed": why}}.

    A process that ends before its time costs the item it was at: the rest is done by another.
    """
    found, end = {}, time.monotonic() + limit
    while left := [item for item in items if item not in found]:
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(
                command(left), stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment,
                start_new_session=True,
            )  # fmt: skip
            reader = threading.Thread(target=read_results, args=(process.stdout, found), daemon=True)
            reader.start()
            try:
                process.wait(max(end - time.monotonic(), 0.01))
                why = None
            except subprocess.TimeoutExpired:
                why = f"not done in the {limit:.0f} s of this part"
            finally:
                stop(process)
            reader.join(5)
            if not reader.is_alive():
                process.stdout.close()
            if why is not None:
                return found | {item: {"failed": why} for item in items if item not in found}
            if process.returncode or any(item not in found for item in left):
                errors.seek(0)
                said = [line.strip() for line in errors if line.strip()] or [f"it ended with {process.returncode}"]
                at = next((item for item in left if item not in found), None)
                if at is not None:
                    found[at] = {"failed": said[-1]}
    return found


def read_results(stream, found):
    for line in stream:
        if line.startswith(RESULT):
            result = json.loads(line.removeprefix(RESULT))
            found[result.pop("item")] = result


def stop(process):
    """End a process with all that it started."""
    if process.poll() is None or hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()


def build_if_needed(asked, limit):
    """Settings of the environment with which ggml has the device, {} when it has it already; and what there is to report."""
    probe = "import sys, ggml_bridge; ggml_bridge.find_device(sys.argv[1])"
    command = [sys.executable, "-c", probe, bridge_name(asked.device)]
    there = subprocess.run(command, capture_output=True, text=True)
    backend = backend_of(asked.device)
    if there.returncode == 0 or backend not in ("cuda", "vulkan"):
        return {}, {}
    command = [sys.executable, "-m", "ggml_bridge.build", backend]
    command += ["--sdist", asked.sdist] if asked.sdist else []
    command += ["--architecture", asked.architecture] if asked.architecture else []
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return {}, {"failed": f"not built in {limit:.0f} s: run `{' '.join(command[1:])}` by itself first"}
    finally:
        stop(process)
    if process.returncode:
        return {}, {"failed": errors.strip().splitlines()[-1]}
    variable, _, place = out.strip().partition("=")
    return {variable: place}, {"seconds": time.monotonic() - started, "place": place}


def check(asked):
    """Run the parts -> the report as a dict; written to asked.json after each part."""
    started = time.monotonic()
    report = {"device": asked.device, "quick": asked.quick, "parts": {}}
    environment = thread_environment(asked.threads) | {"PYTHONPATH": python_path()}

    def left(part):
        return max(min(LIMITS[part] * asked.minutes / MINUTES, asked.minutes * 60 - (time.monotonic() - started)), 1)

    for part in asked.parts:
        if part == "curves, float32" and not asked.device.lower().startswith("cuda"):
            continue
        begun = time.monotonic()
        if part == "build":
            settings, found = build_if_needed(asked, left(part))
            environment |= settings
            results = {"build": found} if found else {}
        else:
            exact = {"NVIDIA_TF32_OVERRIDE": "0"} if part == "curves, float32" else {}
            results = run_part(
                lambda items, part=part: child_command(part, items, asked), items_of(part, asked.quick), left(part),
                environment | exact,
            )  # fmt: skip
        if results:
            report["parts"][part] = results
        report["seconds"] = time.monotonic() - started
        print(part_text(part, results, time.monotonic() - begun), flush=True)
        if asked.json:
            Path(asked.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def child_command(part, items, asked):
    command = [sys.executable, str(HERE / "gpu_check.py"), "--child", part, "--items", *items]
    command += ["--device", asked.device, "--threads", str(asked.threads), "--model", asked.model]
    return command + (["--quick"] if asked.quick else [])


def python_path():
    """Where this process found the library: its children find the same."""
    import toy

    return os.pathsep.join([str(Path(toy.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


# ----------------------------------------------------------------------------------------------------------------------
# the text
# ----------------------------------------------------------------------------------------------------------------------


def part_text(part, results, seconds):
    """What a part found, as lines to read."""
    lines = [f"\n== {part} ({seconds:.0f} s)"]
    write = {
        "machine": machine_lines,
        "graphs": graph_lines,
        "decode": decode_lines,
        "steps": step_lines,
        "lora": step_lines,
    }
    for item, found in results.items():
        if "failed" in found and isinstance(found["failed"], str):
            lines.append(f"{item}: FAILED: {found['failed']}")
        elif part.startswith("curves"):
            lines += curve_lines(item, found)
        elif part == "build":
            lines.append(f"built in {found['seconds']:.0f} s: TOY_GGML_DIR={found['place']}")
        else:
            lines += write[part](item, found)
    return "\n".join(lines if results else [*lines, "nothing to do"])


def machine_lines(item, found):
    yield found["system"]
    yield f"ggml {found['ggml']}, tested device {found['tested']}; PyTorch {found.get('torch', 'not installed')}"
    for device in found["devices"]:
        total, free = (device[name] / 2**30 for name in ("memory_total", "memory_free"))
        yield f"device {device['name']} ({device['backend']}): {device['description']}, {total:.1f} GiB, {free:.1f} free"
    for backend, features in found["backends"].items():
        if features:
            yield f"{backend}: " + ", ".join(f"{name} {value}" for name, value in features.items())
    if "nvidia-smi" in found:
        yield f"nvidia-smi: {found['nvidia-smi']}"


def curve_lines(item, found):
    said = [
        f"{check['what'].split(',')[0]} {check['value']:.2g}"
        + ("" if check["ok"] else f" FAILED (bar {check['bar']:g})")
        for check in found["checks"]
    ]
    yield f"{item:<14} {found['products']:<8} {'ok' if found['ok'] else 'FAILED':<7} {'; '.join(said)}"


def graph_lines(item, found):
    operations = ", ".join(f"{n} {op}" for op, n in list(found["by_operation"].items())[:6])
    yield (
        f"{item:<18} {found['nodes']} nodes ({operations}), {found['copies']} copies ({found['copied_bytes'] / 1e6:.2f} MB), "
        f"{found['transposed_copies']} of them transposed ({found['transposed_bytes'] / 1e6:.2f} MB), "
        f"{found['one_hot_rows']} one-hot, {found['updates']} updates, {found['uploaded_bytes']:,} bytes uploaded a step, "
        f"{found['splits']} split, {found['elsewhere']} nodes elsewhere, not on Metal {found['metal_lacks']}, "
        f"not on CUDA {found['cuda_lacks']}"
    )


def step_lines(item, found):
    for name, median in found["median_s"].items():
        ratio = f"toy is {found['ratio'][name]:.2f} of it" if name != "toy" else ""
        size = found["bytes"].get(name)
        held = f"{size / 1e6:9.1f} MB" if size is not None else " " * 12
        yield (
            f"{item:<10} {name:<22} {median * 1e3:9.2f} ms, first step {found['first_step_s'][name]:6.2f} s, {held}, "
            f"first loss {found['first_loss'][name]:.4f} {ratio}"
        )
    for name, why in found["failed"].items():
        yield f"{item:<10} {name:<22} FAILED: {why}"


def decode_lines(item, found):
    for name, speed in found["tokens_per_s"].items():
        yield f"{name:<22} {speed:8.1f} tokens/s"
    for name, why in found["failed"].items():
        yield f"{name:<22} FAILED: {why}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes and few steps")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", metavar="FILE", default="gpu_check.json", help="where the figures go")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it; each part's share grows with it")
    parser.add_argument("--model", default="smollm2-135m", help="GGUF file of a llama, or the name of a fetched model")
    parser.add_argument("--sdist", help="of libggml-python, for a build without a network")
    parser.add_argument("--architecture", help="of CUDA, for a build")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--items", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.child:
        return child(asked)
    report = check(asked)
    failures = [
        f"{part}, {item}"
        for part, results in report["parts"].items()
        for item, found in results.items()
        if not found.get("ok", True) or found.get("failed")
    ]
    print(
        f"\n{report['seconds']:.0f} s; figures in {asked.json}; "
        + (f"FAILED: {'; '.join(failures)}" if failures else "ok")
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
