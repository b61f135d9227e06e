"""The device "cuda" without a card: a played one, which ggml loads as its CUDA backend and which computes on the CPU.

What a real card does, `toy selftest --device cuda` and `benchmarks/gpu_check.py` tell; here is what is said around it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bridge_support import needs_ggml

import ggml_bridge
import toy
from ggml_bridge import cards
from ggml_bridge.records import Device

COMPILER = shutil.which("cc") or shutil.which("gcc")
pytestmark = [
    needs_ggml,
    pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="compiles a library for Linux"),
]

TRAIN = """
import toy, numpy as np
config = toy.GPT2Config(vocab_size=11, d_model=8, n_heads=2, d_ff=16, n_layers=1, context_length=4)
ids = np.arange(5)
def losses(**where):
    recipe = toy.recipes.FromScratch(**where).realize(config, toy.RecipeOptions(t_seq=4))
    adamw = recipe.adamw(lr=1e-2)
    return recipe.device, [recipe.step(ids[:-1], labels=ids[1:], hp=adamw.hp_for_step(k), is_first=k == 0) for k in range(20)]
"""


@pytest.fixture(scope="module")
def card(tmp_path_factory):
    """-> a function that runs Python code where ggml has the played card; its keywords are played (`cards=0`, `free=...`)."""
    place = tmp_path_factory.mktemp("ggml")
    (own,) = importlib.util.find_spec("libggml").submodule_search_locations
    libraries = next(Path(own) / name for name in ("lib64", "lib") if (Path(own) / name).is_dir())
    for file in libraries.glob("libggml*"):
        (place / file.name).symlink_to(file)
    source, compile_ = Path(__file__).with_name("played_card.c"), [COMPILER, "-shared", "-fPIC"]
    subprocess.run([*compile_, "-DDRIVER", source, "-o", place / "libcuda.so.1"], check=True)
    links = [f"-L{libraries}", "-l:libggml-cpu.so.0", "-l:libggml-base.so.0", f"-I{own}/include"]
    subprocess.run([*compile_, source, "-o", place / "libggml-cuda.so", *links], check=True)

    def run(code, **played):
        environment = {f"PLAYED_{name.upper()}": str(value) for name, value in played.items()}
        environment |= {"TOY_GGML_DIR": str(place), "LD_LIBRARY_PATH": str(place), "TOY_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(Path(toy.__file__).parent.parent)}
        command = code if isinstance(code, list) else ["-c", code]
        return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=os.environ | environment)

    return run


def test_training_on_cuda_by_all_its_names(card):
    code = TRAIN + (
        "expected = losses(backend='numpy')[1]\n"
        "for name in ('cuda', 'CUDA', 'cuda0', 'cuda:1', 'gpu'):\n"
        "    device, found = losses(backend='ggml', device=name)\n"
        "    assert found[-1] < 0.8 * found[0]\n"
        "    print(name, device, float(np.abs(np.subtract(found, expected)).max()) < 1e-3)\n"
    )
    result = card(code, cards=2)
    assert result.stdout.split() == [
        *("cuda", "CUDA0", "True", "CUDA", "CUDA0", "True", "cuda0", "CUDA0", "True"),
        *("cuda:1", "CUDA1", "True", "gpu", "CUDA0", "True"),
    ], result.stderr


def test_toy_backends_lists_the_card_with_its_memory(card):
    result = card(["-m", "toy", "backends"], total=24 * 2**30, free=23 * 2**30)
    assert "ggml device CUDA0 (gpu): Played card, 24.0 GiB, 23.0 GiB of it free" in " ".join(result.stdout.split())
    result = card(["-m", "toy", "backends", "--json"], total=24 * 2**30, free=23 * 2**30)
    found = json.loads(result.stdout)
    (played,) = (device for device in found["devices"] if device["name"] == "CUDA0")
    assert {name: played[name] for name in ("name", "memory_total", "memory_free")} == {
        "name": "CUDA0",
        "memory_total": 24 * 2**30,
        "memory_free": 23 * 2**30,
    }
    assert found["notices"] == []


def one_sentence(result, *parts):
    """The command failed with bad input, in one sentence that has these parts."""
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


def test_no_driver(card):
    arguments = ["-m", "toy", "selftest", "--device", "cuda"]
    complaint = "no CUDA-capable device is detected"
    one_sentence(
        card(arguments, cards=0), "its CUDA found no device", complaint, "install NVIDIA's driver (`nvidia-smi`"
    )
    listed = json.loads(card(["-m", "toy", "backends", "--json"], cards=0).stdout)
    assert [complaint in notice for notice in listed["notices"]] == [True]
    assert "ggml's CUDA found no device" in card(["-m", "toy", "backends"], cards=0).stdout


def test_a_ggml_without_cuda():
    if any(name in ggml_bridge.load().backends() for name in ("CUDA", "Vulkan")):
        pytest.skip("this ggml has them")
    for name in ("cuda", "vulkan"):
        with pytest.raises(ValueError, match=rf"(?i)built without {name}: `python -m ggml_bridge.build {name}`"):
            ggml_bridge.find_device(name)


def test_too_old_a_card(card):
    code = TRAIN + "print(losses(backend='ggml', device='cuda')[0])"
    assert card(code, capability=90, architectures="750,900").stdout == "CUDA0\n"
    assert card(code, capability=120, architectures="900").stdout == "CUDA0\n"  # the driver translates
    result = card(code, capability=61, architectures="750,900")
    said = result.stderr.splitlines()[-1]
    assert (
        said.startswith("RuntimeError: CUDA0 (Played card) is of architecture 6.1, older than") and "(7.5, 9.0)" in said
    )
    assert "python -m ggml_bridge.build cuda --architecture 61" in said


def test_too_little_memory(card):
    code = TRAIN + "print(losses(backend='ggml', device='cuda')[0])"
    assert card(code, free=cards.KEPT_FREE + 2**20).stdout == "CUDA0\n"
    result = card(code, free=cards.KEPT_FREE + 100)
    said = result.stderr.splitlines()[-1]
    assert (
        said.startswith("MemoryError: ") and f"has {cards.KEPT_FREE + 100:,} free" in said and "smaller batch" in said
    )


def test_the_driver_that_is_not_there_or_fails(monkeypatch):
    device = Device("CUDA0", "gpu", "a card", 0, 0, "CUDA", ())
    for capability in (None, (9, 0)):
        monkeypatch.setattr(cards, "compute_capability", lambda index, found=capability: found)
        cards.check_architecture(device, "900")
    monkeypatch.setattr(cards, "compute_capability", lambda index: (8, 6))
    cards.check_architecture(device, "")  # a build that does not say
    with pytest.raises(RuntimeError, match=r"of architecture 8\.6"):
        cards.check_architecture(device, "900")
    monkeypatch.undo()
    monkeypatch.setattr(cards, "DRIVER", "libno_such_driver.so")
    assert cards.compute_capability(0) is None


def test_the_table_of_nodes_finds_what_cuda_lacks():
    with ggml_bridge.Backend("cpu", 1) as backend:
        g = backend.graph()
        x, ids = g.input((4, 6), name="x"), g.input((4,), "i32")
        for fine in (
            *(g.tanh(x), g.mul_mat(x, x), g.get_rows(x, ids), g.sum_rows(x), g.set_rows(g.full((4, 6), 0), x, ids)),
            *(g.add(x, x), g.repeat(x, (8, 6)), g.cast(x, "f16"), g.cont(g.transpose(x)), g.swiglu(x, x)),
        ):
            g.output(fine)
        assert ggml_bridge.cuda_unsupported(g) == []
        part = g.slice(x, 1, 0, 4)  # rows of 4 numbers, 6 apart
        g.sum_rows(part)
        g.add(g.cast(x, "bf16"), x)
        found = [(node.op, why) for node, why in ggml_bridge.cuda_unsupported(g)]
        assert found == [
            ("SUM_ROWS", "the input is not contiguous"),
            ("ADD", "types are bf16, f32, not f32 or f16"),
        ]
