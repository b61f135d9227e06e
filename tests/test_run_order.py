"""What a run does at which moment, where an ordinary run would not show it: the last step, the step it resumes from, the
order of writes, what is drawn, and the backend that a resumed run takes."""

import itertools
import os
import signal

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

from toy.files import read_checkpoint, read_events
from toy.training import DivergedError, FromScratchOptions, Training

TEXT = "".join(f"{i} squared is {i * i}, and then comes {i + 1}.\n" for i in range(300))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Training, "_draw", lambda training: None)


@pytest.fixture
def options(tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)
    small = {
        "batch": 3,
        "context": 8,
        "d_model": 8,
        "arch": "transformer",
        "schedule": "constant",
        "layers": 1,
        "heads": 2,
        "d_ff": 12,
        "eval_batches": 2,
        "sample_tokens": 5,
    }

    def make(**changes):
        return FromScratchOptions(
            **{**small, "corpus": str(tmp_path / "corpus.txt"), "backend": "numpy", "lr": 0.01, **changes}
        )

    return make


def steps_of(events, kind):
    return [event.step for event in events if event.kind == kind]


def logged(folder, kind):
    return [event["step"] for event in read_events(folder / "events.jsonl") if event["kind"] == kind]


def newest(folder):
    return read_checkpoint(folder / "weights" / (folder / "weights" / "latest").read_text().strip())


def same_arrays(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# -- which steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped_at", [None, 4])
def test_the_last_step_is_evaluated_and_sampled_when_it_is_no_multiple_too(options, tmp_path, stopped_at):
    out, training = (
        tmp_path / "run",
        Training(options(steps=7, eval_every=5, sample_every=3, save_every=2), out=tmp_path / "run"),
    )
    for event in training.run():
        if event.kind == "step" and event.step == stopped_at:
            signal.raise_signal(signal.SIGINT)
    if stopped_at is not None:
        list(Training.resume(out).run())
    assert logged(out, "eval") == [0, 5, 7]
    assert logged(out, "sample") == [3, 6, 7]
    assert newest(out).step == 7
    assert (out / "samples.txt").read_text().count("--- step 7") == 1


@pytest.mark.parametrize("kind", ["eval", "sample"])
@pytest.mark.parametrize("step", [4, 8])
def test_what_was_done_at_a_step_is_not_done_again_by_the_run_that_goes_on_from_it(options, tmp_path, kind, step):
    """Stopped right after the evaluation (or the sample) of a step, which is in the log then."""
    out = tmp_path / "run"
    for event in Training(options(steps=12, eval_every=4, sample_every=4), out=out).run():
        if event.kind == kind and event.step == step:
            signal.raise_signal(signal.SIGINT)
    done = {name: logged(out, name) for name in ("eval", "sample")}
    assert done[kind][-1] == step == newest(out).step
    events = list(Training.resume(out).run())
    for name in ("eval", "sample"):
        assert steps_of(events, name) == [n for n in (4, 8, 12) if n not in done[name]]
        assert logged(out, name) == ([0] if name == "eval" else []) + [4, 8, 12]
    assert (out / "samples.txt").read_text().count("--- step") == 3


# -- what is saved, and when -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "number"), [("m", np.nan), ("v", np.inf), ("v", np.nan)])
def test_a_moment_that_is_not_finite_is_never_saved(options, tmp_path, slot, number):
    out = tmp_path / "run"
    training = Training(options(steps=12, save_every=2, eval_every=100), out=out)
    state, files = training.recipe.engine.optimizer_state, None
    with pytest.raises(DivergedError, match="a moment of pos_embed is not a finite number at step 6"):
        for event in training.run():
            if event.kind == "step" and event.step == 6:
                files = sorted(path.name for path in (out / "weights").iterdir())

                def damaged():
                    moments = state()
                    moments[slot]["pos_embed"][2, 3] = number
                    return moments

                training.recipe.engine.optimizer_state = damaged
    assert sorted(path.name for path in (out / "weights").iterdir()) == files
    assert newest(out).step == 4
    assert list(Training.resume(out).run())[-1].reason == "completed"


def test_the_log_is_on_the_disk_before_the_checkpoint_that_it_leads_to(options, tmp_path, monkeypatch):
    """After a power cut a checkpoint must not know of steps that the log has lost: fsync of the whole log comes first."""
    out, happened = tmp_path / "run", []
    log, fsync, replace = out / "events.jsonl", os.fsync, os.replace

    def noting_fsync(handle):
        if log.exists() and os.path.sameopenfile(handle, reader.fileno()):
            happened.append(("synced", os.fstat(handle).st_size))
        return fsync(handle)

    def noting_replace(source, target, **options):
        if str(target).endswith(".safetensors"):
            happened.append(("checkpoint", log.stat().st_size))
        return replace(source, target, **options)

    training = Training(options(steps=6, save_every=2, eval_every=6), out=out)
    run = training.run()
    next(run)
    with open(log, "rb") as reader:
        monkeypatch.setattr(os, "fsync", noting_fsync)
        monkeypatch.setattr(os, "replace", noting_replace)
        list(run)
    kinds = [kind for kind, _ in happened]
    assert kinds.count("checkpoint") == 3
    for before, (kind, size) in zip([("", 0), *happened], happened):
        if kind == "checkpoint":
            assert before == ("synced", size)


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_samples_of_an_unchanged_model_differ_from_step_to_step(options):
    training = Training(options(steps=4, lr=1e-30, sample_every=1, sample_tokens=40))
    before = training.recipe.parameters()
    texts = [event.text for event in training.run() if event.kind == "sample"]
    assert same_arrays(before, training.recipe.parameters())
    assert len(set(texts)) == len(texts) == 4
    again = [
        event.text
        for event in Training(options(steps=4, lr=1e-30, sample_every=1, sample_tokens=40)).run()
        if event.kind == "sample"
    ]
    assert again == texts


# -- the backend of a resumed run --------------------------------------------------------------------------------------


def backends_here():
    import toy

    return [row.name for row in toy.backends() if row.available]


@pytest.mark.parametrize("name", backends_here())
def test_a_run_that_goes_on_under_auto_keeps_its_backend(options, tmp_path, monkeypatch, name):
    """Begun with backend auto, which meant `name` then and would mean another one now: the same numbers to the last bit."""
    monkeypatch.setenv("TOY_BACKEND", name)
    straight = Training(options(steps=8, backend="auto"), out=tmp_path / "straight")
    assert straight.recipe.backend == name
    list(straight.run())
    for event in Training(options(steps=8, backend="auto"), out=tmp_path / "stopped").run():
        if event.kind == "step" and event.step == 3:
            signal.raise_signal(signal.SIGINT)
    other = next(iter({"numpy", *backends_here()} - {name}), name)
    for setting in ("", other):
        monkeypatch.setenv("TOY_BACKEND", setting)
        resumed = Training.resume(tmp_path / "stopped")
        assert resumed.recipe.backend == name
        assert len(list(itertools.islice(resumed.run(), 3))) == 3
    list(Training.resume(tmp_path / "stopped").run())
    a, b = newest(tmp_path / "straight"), newest(tmp_path / "stopped")
    assert a.step == b.step == 8
    assert same_arrays(a.parameters, b.parameters)
    assert all(same_arrays(a.moments[slot], b.moments[slot]) for slot in "mv")
