"""benchmarks/gpu_check.py: its parts on the CPU in the smallest shapes, and that nothing costs the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import toy
from toy.models import ARCHITECTURES

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(
        sys.platform == "win32" or not BENCHMARKS.exists(), reason="needs the sources, and a POSIX shell"
    ),
]


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    yield gpu_check
    for name in ("gpu_check", "timing", "train_step", "lora_step", "generate"):
        sys.modules.pop(name, None)


def asked(gpu_check, *arguments):
    """The options of a command line, as a part gets them."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "child", lambda options: kept.append(options))
        gpu_check.main(["--child", "x", "--quick", "--threads", "1", "--device", "cpu-native", *arguments])
    return kept[0]


def shell(script):
    """A command that says what the items left are, and then does as `script`, in which $1 is the first of them."""
    return lambda items: ["sh", "-c", script, "sh", *items]


def test_a_part_that_takes_too_long_costs_only_what_is_not_done(gpu_check):
    script = """echo 'RESULT {"item": "a", "value": 1}'; sleep 1000"""
    found = gpu_check.run_part(shell(script), ["a", "b", "c"], limit=3)
    assert found["a"] == {"value": 1}
    assert found["b"] == found["c"] == {"failed": "not done in the 3 s of this part"}


def test_an_item_that_ends_the_process_costs_itself_alone(gpu_check):
    script = """
    for item; do
        if [ $item = b ]; then echo noise; echo "GGML_ASSERT failed" >&2; kill -ABRT $$; fi
        echo "RESULT {\\"item\\": \\"$item\\"}"
    done"""
    found = gpu_check.run_part(shell(script), ["a", "b", "c"], limit=60)
    assert found == {"a": {}, "b": {"failed": "GGML_ASSERT failed"}, "c": {}}


def test_a_command_that_says_nothing(gpu_check):
    assert gpu_check.run_part(shell("exit 3"), ["a"], 60) == {"a": {"failed": "it ended with 3"}}
    assert gpu_check.run_part(shell("exit 0"), ["a"], 60) == {"a": {"failed": "it ended with 0"}}


def test_the_graph_in_numbers(gpu_check):
    found, row = gpu_check.graphs("gpt2", asked(gpu_check)), ARCHITECTURES["gpt2"]
    assert found["splits"] == 1 and found["elsewhere"] == found["metal_lacks"] == found["cuda_lacks"] == 0
    assert found["updates"] == len(row.model.parameter_shapes(row.small))
    assert 0 < found["transposed_copies"] < found["copies"] < found["nodes"] and found["one_hot_rows"] == 3
    ids = 4 * row.small.context_length  # of a batch of 4
    assert 3 * 4 * ids < found["uploaded_bytes"] < 40 * 4 * ids  # ids and what is made of them, no table
    (line,) = gpu_check.graph_lines("gpt2", found)
    assert f"{found['nodes']} nodes" in line and "1 split" in line


def test_gradients_and_curves(gpu_check):
    found = gpu_check.curves("lora q4_0", asked(gpu_check))
    assert found["ok"] and found["products"] == "float32" and len(found["checks"]) == 6
    (line,) = gpu_check.curve_lines("lora q4_0", found)
    assert "float32  ok" in line and "worst gradient" in line
    found["ok"], found["checks"][0]["ok"] = False, False
    assert "FAILED (bar 2e-05)" in next(gpu_check.curve_lines("lora q4_0", found))


@pytest.mark.slow
def test_the_whole_report_on_the_cpu(gpu_check, tmp_path):
    parts = ["machine", "graphs", "steps", "lora", "decode"]
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--device", "cpu-native", "--quick", "--threads", "1"]
    result = subprocess.run(
        [*command, "--json", tmp_path / "report.json", "--parts", *parts],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(toy.__file__).parent.parent)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.rstrip().endswith("ok") and "FAILED" not in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["parts"]) == parts and report["device"] == "cpu-native"
    assert list(report["parts"]["graphs"]) == gpu_check.items_of("graphs", True)
    tiny, lora = report["parts"]["steps"]["tiny"], report["parts"]["lora"]["16"]
    for found in (tiny, lora):
        assert found["median_s"]["toy"] > 0 and found["bytes"]["toy"] > 0 and found["first_step_s"]["toy"] > 0
        if "pytorch" in found["median_s"]:
            assert found["ratio"]["pytorch"] == pytest.approx(found["median_s"]["toy"] / found["median_s"]["pytorch"])
            assert found["first_loss"]["toy"] == pytest.approx(found["first_loss"]["pytorch"], abs=0.1)
    assert set(report["parts"]["decode"]["decode"]["tokens_per_s"]) == {"toy, eager on the CPU", "toy, cpu-native"}


def test_a_build_that_cannot_be_is_a_line_and_the_rest_runs(gpu_check, tmp_path, monkeypatch, capsys):
    import ggml_bridge

    if "CUDA" in ggml_bridge.load().backends():
        pytest.skip("this ggml has CUDA")
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvcc, no cmake
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    arguments = ["--parts", "build", "machine", "--json", str(tmp_path / "report.json"), "--architecture", "61"]
    assert gpu_check.main(["--quick", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "build: FAILED: ggml_bridge.build: " in printed
    assert "machine: FAILED: ValueError: device 'cuda' was not found" in printed and "built without CUDA" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["parts"]) == {"build", "machine"}


def test_what_stands_beside_a_device(gpu_check):
    torch = pytest.importorskip("torch")
    assert gpu_check.torch_kinds("cpu-native") == {"pytorch": ("cpu", False, False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        kinds = gpu_check.torch_kinds("CUDA1")
        assert list(kinds) == ["pytorch", "pytorch TF32", "pytorch TF32 compiled"]
        assert {device for device, _, _ in kinds.values()} == {"cuda:1"}
        assert gpu_check.torch_kinds("cuda")["pytorch"] == ("cuda:0", False, False)
    assert gpu_check.torch_kinds("vulkan") == {"pytorch": ("cpu", False, False)}


def test_the_flops_of_a_step(gpu_check):
    """Of one layer of width 2, with 3 numbers in the vocabulary, 2 tokens and 1 head: counted by hand."""
    import train_step

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train_step.SHAPES, "counted", (3, 2, 1, 1, 2, 1))
        linear = 2 * (4 * 2 * 2 + 2 * 2 * 8 + 3 * 2)  # rows times numbers of the matrices
        attention = 2 * (1 + 2) * 2  # scores and values: each query with the keys before it and itself
        assert train_step.product_flops("counted") == 3 * 2 * (linear + attention)
        product, flops = train_step.product_alone("counted")
        assert product().shape == (2, 8) and flops == 2 * 2 * 2 * 8
