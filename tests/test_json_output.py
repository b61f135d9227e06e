"""--json: on stdout JSON alone, whatever else there is to say on stderr. And examples/events_to_tracker.py."""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import click
import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

from toy.checks import gradcheck, selftest
from toy.files import fetch as fetching
from toy.files import read_events
from toy.files.gguf import GGUF

cli_main = importlib.import_module("toy.cli.main")  # `toy.cli.main` is the function
SMALL = ["--batch=2", "--context=8", "--d-model=8", "--layers=1", "--heads=2", "--eval-batches=1", "--backend=numpy"]
TEXT = "".join(f"{i} squared is {i * i}.\n" for i in range(200))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


@pytest.fixture
def said(toy_command):
    """Runs a command with --json -> (its records, what it said on stderr). Every line of stdout must be JSON, strictly."""

    def run(*arguments, code=0):
        found, out, err = toy_command(*arguments, "--json")
        assert found == code, err

        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        return [json.loads(line, parse_constant=refuse) for line in out.splitlines()], err

    return run


def commands(group, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_has_it():
    found = dict(commands(cli_main.cli))
    assert {
        ("generate",),
        ("eval",),
        ("runs",),
        ("plot",),
        ("data", "show"),
        ("train", "lora"),
        ("fetch",),
    } <= found.keys()
    without = [" ".join(path) for path, c in found.items() if "--json" not in [o for p in c.params for o in p.opts]]
    assert without == ["chat"]  # a conversation, which /save writes as JSON


@pytest.mark.parametrize("columns", [80, 60])
def test_no_help_is_wider_than_the_terminal(toy_command, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for path, _ in commands(cli_main.cli):
        code, out, err = toy_command(*path, "--help")
        assert (code, err) == (0, "")
        assert max(map(len, out.splitlines())) <= columns, path


def test_training_tells_its_events(said):
    records, err = said(
        "train", "from-scratch", "--corpus=text.txt", *SMALL, "--steps=4", "--out=run", "--eval-every=2"
    )
    assert records == read_events("run/events.jsonl")
    assert [record["kind"] for record in records][:2] == ["run_start", "eval"] and records[-1]["kind"] == "run_end"
    assert "learning rate" in err and "done: 4 steps" in err and "toy generate" in err.replace("python -m toy", "toy")


def test_training_that_cannot_begin_tells_nothing(said):
    records, err = said("train", "from-scratch", "--corpus=nowhere", *SMALL, code=2)
    assert records == [] and "nowhere" in err


def test_backends(said, monkeypatch):
    monkeypatch.setattr(cli_main, "matmul_gflops", lambda name: 12.5)
    ((record,), err) = said("backends")
    rows = {row["name"]: row for row in record["backends"]}
    assert err == "" and rows["numpy"]["available"] is True and rows["numpy"]["gflops"] == 12.5
    assert record["auto"]["backend"] in rows and record["auto"]["reason"]
    assert all((row["gflops"] is None) == (not row["available"]) for row in rows.values())
    monkeypatch.setenv("TOY_BACKEND", "cuda")
    assert said("backends", code=2)[0] == []


def test_gradcheck(said, monkeypatch):
    rows = [gradcheck.Row("linear", "x", (5, 4), np.float64(1e-12), 1e-7, np.True_)]
    monkeypatch.setattr(gradcheck, "chosen_checks", lambda seed, layers: [lambda: rows])
    ((record,), err) = said("gradcheck", "--seed=3")
    row = {"layer": "linear", "gradient": "x", "shape": [5, 4], "rel_error": 1e-12, "bar": 1e-7, "ok": True}
    assert (record, err) == ({"ok": True, "seed": 3, "gradients": [row]}, "")
    rows.append(rows[0]._replace(rel_error=np.float64("nan"), ok=False))
    ((record,), _) = said("gradcheck", code=1)
    assert record["ok"] is False and record["gradients"][1]["rel_error"] is None


def test_selftest(said, monkeypatch, kernels):
    checks = (selftest.Check("gpt2", "worst gradient", np.float64(1e-6), 2e-5, np.True_),)
    report = selftest.Report("cpu", ("a machine",), checks, True)
    monkeypatch.setattr(selftest, "run", lambda device, steps: report)
    ((record,), err) = said("selftest")
    check = {"model": "gpt2", "what": "worst gradient", "value": 1e-6, "bar": 2e-5, "ok": True}
    assert (record, err) == ({"device": "cpu", "system": ["a machine"], "checks": [check], "ok": True}, "")
    monkeypatch.setattr(selftest, "run", lambda device, steps: report._replace(ok=False))
    assert said("selftest", code=1)[0][0]["ok"] is False


def test_fetch(said, monkeypatch):
    Path("model.gguf").write_bytes(b"12345")
    monkeypatch.setattr(fetching, "fetch", lambda model, file, progress: progress(1, 2) or Path("model.gguf"))
    ((record,), err) = said("fetch", "some-model")
    assert err == ""
    assert record == {"model": "some-model", "file": None, "path": "model.gguf", "bytes": 5}


def test_describe_and_export(said):
    pytest.importorskip("gguf", reason="quantised files need the gguf package")
    pytest.importorskip("tokenizers", reason="the tokenizers library is not installed (pip install tokenizers)")
    import model_files

    model_files.write_files(Path())
    ((record,), err) = said("describe", "llama.gguf")
    with GGUF.open("llama.gguf") as gguf:
        assert record["n_parameters"] == gguf.n_parameters and record["tensors"].keys() == gguf.tensors.keys()
        shape = list(gguf.tensors["token_embd.weight"].shape)
    assert err == "" and record["config"]["n_layers"] == 2 and record["metadata"]["general.name"] == "Small"
    assert record["tensors"]["token_embd.weight"] == {"type": "Q8_0", "shape": shape, "bytes": shape[0] * 34}
    assert record["problem"] is None and "byte-level BPE" in record["tokenizer"]
    adapter = said("describe", "adapter.gguf")[0][0]
    assert adapter["adapter"] is True and adapter["config"] is None and adapter["problem"]
    ((record,), err) = said("export", "llama.gguf", "--type=f16", "--out=out.gguf")
    n_bytes = Path("out.gguf").stat().st_size
    assert record == {
        "path": "out.gguf", "bytes": n_bytes, "adapter": False, "type": "f16", "checkpoint": None,
        "command": "llama-cli -m out.gguf",
    }  # fmt: skip
    assert (
        said("describe", "damaged.gguf", code=2)[0] == said("export", "llama.gguf", "--out=out.gguf", code=2)[0] == []
    )


# -- the example -------------------------------------------------------------------------------------------------------


@pytest.fixture
def example():
    path = Path(__file__).parents[1] / "examples" / "events_to_tracker.py"
    spec = importlib.util.spec_from_file_location("events_to_tracker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**changes):
    from toy.training import FromScratchOptions

    sizes = dict(corpus="text.txt", batch=2, context=8, d_model=8, layers=1, heads=2, eval_batches=1, backend="numpy")
    return FromScratchOptions(**{"steps": 4, "eval_every": 2, **sizes, **changes})


def logged(folder):
    """What a tracker must have got, out of the run's own log."""
    wanted = []
    for event in read_events(folder / "events.jsonl"):
        names = {"step": ("loss", "lr", "grad_norm"), "eval": ("loss",)}.get(event["kind"], ())
        if names:
            wanted.append((event["step"], {f"{event['kind']}/{name}": event[name] for name in names}))
    return wanted


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_events_reach_a_tracker_with_the_functions_of_wandb(example, monkeypatch, name):
    got, done, begun = [], [], []
    fake = types.SimpleNamespace(
        init=lambda *, project, name, config: begun.append((project, name, config["steps"])),
        log=lambda values, *, step: got.append((step, values)),
        finish=lambda: done.append(len(got)),
    )
    monkeypatch.setitem(sys.modules, name, fake)
    example.track(name, options(), Path("run"))
    assert begun == [("toy", "run", 4)]
    assert got == logged(Path("run")) and len(got) == 4 + 3 and done == [7]
    with pytest.raises(RuntimeError, match="diverged"):
        example.track(name, options(lr=1e30, clip=0.0, warmup=0, steps=40), Path("diverged"))
    assert len(done) == 2  # finished all the same


def test_the_events_reach_tensorboard(example):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed (pip install tensorboardX)")
    from tensorboardX.proto import event_pb2

    example.track("tensorboardX", options(), Path("run"))
    (path,) = Path("run-tensorboardX").glob("events.*")
    data, found = path.read_bytes(), []
    while data:  # a TFRecord: length (8 bytes), its check (4), the record, its check (4)
        n = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + n])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        data = data[16 + n :]
    wanted = [(step, tag, value) for step, values in logged(Path("run")) for tag, value in values.items()]
    assert [row[:2] for row in found] == [row[:2] for row in wanted]
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in wanted], rtol=1e-6)
