"""The loop: schedules, events, exact resume, interruption, divergence, loading a trained model."""

import itertools
import json
import math
import os
import signal
import threading

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

from toy.config import RecipeOptions
from toy.files import BadFileError, read_checkpoint, read_events
from toy.models.generation import generate
from toy.recipes import FromScratch
from toy.switch import BackendUnavailableError
from toy.trained import load_trained
from toy.training import DivergedError, FromScratchOptions, Training, schedules

TEXT = "".join(f"{i} squared is {i * i}, and then comes {i + 1}.\n" for i in range(300))
SMALL = {
    "batch": 3,
    "context": 8,
    "d_model": 8,
    "arch": "transformer",
    "schedule": "constant",
    "lr_floor": 0.1,
    "layers": 1,
    "heads": 2,
    "d_ff": 12,
    "eval_batches": 2,
    "sample_tokens": 5,
}


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than these runs: only a test that asks for `pictures` does it."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Training, "_draw", lambda training: None)


@pytest.fixture
def pictures():
    """Let runs draw their loss.png."""


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def options(corpus, backend):
    """Makes FromScratchOptions of a small run on each backend."""

    def make(**changes):
        own = {
            "corpus": corpus,
            "backend": backend.name,
            "device": backend.device,
            "steps": 20,
            "lr": 0.01,
            "warmup": 3,
        }
        return FromScratchOptions(**{**SMALL, **own, **changes})

    return make


@pytest.fixture
def numpy_options(corpus):
    """The same on numpy alone, for what no backend changes."""

    def make(**changes):
        own = {"corpus": corpus, "backend": "numpy", "steps": 20, "lr": 0.01}
        return FromScratchOptions(**{**SMALL, **own, **changes})

    return make


def weights_of(folder):
    """Everything a checkpoint holds, as one dict of bytes, and its step."""
    checkpoint = read_checkpoint(folder / "weights" / (folder / "weights" / "latest").read_text().strip())
    arrays = {"p": checkpoint.parameters, **checkpoint.moments}
    return checkpoint.step, {(kind, n): a.tobytes() for kind, some in arrays.items() for n, a in some.items()}


def history(folder):
    """What the log says about the training, without times."""
    kinds = {
        "step": ("step", "loss", "lr", "grad_norm", "tokens"),
        "eval": ("step", "loss"),
        "sample": ("step", "text"),
    }
    events = [event for event in read_events(folder / "events.jsonl") if event["kind"] in kinds]
    return [(event["kind"], *(event[name] for name in kinds[event["kind"]])) for event in events]


def run_until(training, step, stop=lambda: signal.raise_signal(signal.SIGINT)):
    """Run, and stop like Ctrl-C does when this step has been done. Returns the events."""
    events = []
    for event in training.run():
        events.append(event)
        if event.kind == "step" and event.step == step:
            stop()
    return events


# ----------------------------------------------------------------------------------------------------------------------
# schedules
# ----------------------------------------------------------------------------------------------------------------------


def test_constant_warms_up_in_equal_steps_and_stays():
    rates = [schedules.constant(k, 0.4, warmup=3) for k in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert schedules.constant(0, 0.4) == 0.4


def test_cosine_goes_from_the_peak_to_the_floor_and_stays_there():
    rate = schedules.make_schedule("cosine", 1.0, steps=101, warmup=20, floor=0.1)
    assert rate(19) == pytest.approx(20 / 21)
    assert rate(20) == 1.0
    assert rate(60) == pytest.approx(0.55)  # half way: the mean of peak and floor
    assert rate(100) == pytest.approx(0.1)
    assert rate(5000) == pytest.approx(0.1)
    rates = [rate(k) for k in range(20, 101)]
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert min(range(80), key=lambda k: rates[k + 1] - rates[k]) in range(35, 45)  # steepest in the middle


def test_a_schedule_of_one_step_is_possible():
    assert schedules.make_schedule("cosine", 1.0, steps=1)(0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("linear", 1.0, 10), "schedule must be one of"),
        (("constant", 0.0, 10), "lr must be a positive number"),
        (("constant", float("nan"), 10), "lr must be a positive number"),
        (("constant", float("inf"), 10), "lr must be a positive number"),
        (("constant", 1.0, 0), "steps must be at least 1"),
        (("constant", 1.0, 10, -1), "warmup"),
        (("cosine", 1.0, 10, 10), "leaves none of 10 steps"),
        (("cosine", 1.0, 10, 0, 1.5), "floor"),
    ],
)
def test_wrong_schedules_are_refused(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        schedules.make_schedule(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# options
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arch", "rnn"),
        ("steps", 0),
        ("batch", -1),
        ("context", 0),
        ("layers", 2.5),
        ("heads", 0),
        ("d_ff", 0),
        ("lr", float("nan")),
        ("lr", -1.0),
        ("schedule", "linear"),
        ("warmup", -1),
        ("clip", -1.0),
        ("clip", float("inf")),
        ("weight_decay", -0.1),
        ("eval_every", 0),
        ("save_every", -5),
        ("val_fraction", 1.0),
        ("threads", 0),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        FromScratchOptions(**{name: value})


def test_defaults_that_depend_on_others_are_resolved():
    resolved = FromScratchOptions(steps=400, d_model=96).resolved()
    assert (resolved.d_ff, resolved.eval_every, resolved.save_every, resolved.sample_every) == (384, 40, 40, 100)
    assert FromScratchOptions(steps=3).resolved().eval_every == 1
    assert FromScratchOptions(steps=3, schedule="cosine").resolved().warmup == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"heads": 3}, "n_heads must divide d_model"),
        ({"corpus": "/nowhere/text.txt"}, "does not exist"),
        ({"context": 10_000}, "context of 10000 needs at least"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"device": "moon"}, "device 'moon'"),
        ({"tokenizer": "words"}, "tokenizer must be one of"),
        ({"seed": -1}, "seed"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(numpy_options, tmp_path, changes, problem):
    with pytest.raises((ValueError, BackendUnavailableError), match=problem):
        Training(numpy_options(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# a run
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_trains_and_writes_what_it_promises(options, tmp_path, pictures):
    out = tmp_path / "runs" / "first"
    training = Training(options(steps=60, eval_every=20, sample_every=30), out=out)
    assert not out.exists()
    events = list(training.run())
    assert [e.step for e in events if e.kind == "step"] == list(range(1, 61))
    assert [e.step for e in events if e.kind == "eval"] == [0, 20, 40, 60]
    assert [e.step for e in events if e.kind == "sample"] == [30, 60]
    assert (events[0].kind, events[-1].kind, events[-1].reason) == ("run_start", "run_end", "completed")
    losses = [e.loss for e in events if e.kind == "eval"]
    assert abs(losses[0] - math.log(training.config.vocab_size)) < 0.3
    assert losses[-1] < losses[0] - 0.5
    assert read_events(out / "events.jsonl") == [event.to_json() for event in events]
    files = {path.name for path in out.iterdir()}
    assert files == {"config.json", "events.jsonl", "loss.png", "samples.txt", "weights"}
    assert {path.name for path in (out / "weights").iterdir()} == {
        "latest",
        "best",
        "step_40.safetensors",
        "step_60.safetensors",
    }
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "samples.txt").read_text().count("--- step") == 2


def test_config_json_says_everything_that_was_resolved(numpy_options, tmp_path):
    for _ in Training(numpy_options(steps=1), out=tmp_path / "run").run():
        pass
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"] == {
        "vocab_size": len(set(TEXT)),
        "d_model": 8,
        "n_heads": 2,
        "d_ff": 12,
        "n_layers": 1,
        "context_length": 8,
    }
    assert config["training"]["seed"] == 0
    assert config["training"]["eval_every"] == 1
    assert config["tokenizer"]["characters"] == "".join(sorted(set(TEXT)))
    assert config["backend"]["name"] == "numpy"
    assert set(config["versions"]) >= {"toy", "python", "numpy"}
    assert len(config["corpus"]["sha256"]) == 64


def test_without_a_directory_nothing_is_written_and_the_events_are_the_same(numpy_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir(tmp_path))
    silent = [e.loss for e in Training(numpy_options()).run() if e.kind in ("step", "eval")]
    assert set(os.listdir(tmp_path)) == before
    written = [e.loss for e in Training(numpy_options(), out="run").run() if e.kind in ("step", "eval")]
    assert silent == written


def test_the_loop_is_the_recipe_fed_with_batches(numpy_options):
    """The losses are those of a loop written by hand from the public pieces."""
    from toy.data import training_batch

    options = numpy_options(steps=5, warmup=3, clip=0.5, weight_decay=0.1, seed=3, split="tail")
    training = Training(options)
    recipe = FromScratch(backend="numpy").realize(
        training.config, RecipeOptions(t_seq=8, t_batch=3, seed=3, grad_clip=0.5)
    )
    adamw = recipe.adamw(weight_decay=0.1)
    for event in training.run():
        if event.kind == "step":
            k = event.step - 1
            ids, labels = training_batch(training.split.train, 3, 8, 3, k)
            lr = schedules.constant(k, 0.01, 3)
            loss = recipe.step(ids, None, labels, adamw.hp_for_step(k, lr=lr), k == 0)
            assert (event.loss, event.lr, event.grad_norm, event.tokens) == (loss, lr, recipe.grad_norm, 24)


def test_evaluating_sampling_and_saving_do_not_change_the_training(options, tmp_path):
    quiet = Training(options(eval_every=20, sample_every=20, save_every=20), out=tmp_path / "quiet")
    busy = Training(options(eval_every=1, sample_every=2, save_every=3), out=tmp_path / "busy")
    losses = [[e.loss for e in training.run() if e.kind == "step"] for training in (quiet, busy)]
    assert losses[0] == losses[1]
    assert weights_of(tmp_path / "quiet") == weights_of(tmp_path / "busy")


def test_the_seed_decides_everything(numpy_options):
    def losses(seed):
        return [e.loss for e in Training(numpy_options(seed=seed, steps=5)).run() if e.kind in ("step", "eval")]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_no_clipping_at_zero_and_smaller_steps_at_small_norms(numpy_options):
    def weights(clip):
        training = Training(numpy_options(clip=clip, steps=1, lr=1.0, weight_decay=0.0))
        before = training.recipe.parameters()
        norms = [e.grad_norm for e in training.run() if e.kind == "step"]
        assert norms[0] > 0.01
        return before, training.recipe.parameters(), training.recipe.optimizer_state()["m"]

    (_, _, free), (_, _, wide), (_, _, clipped) = weights(0), weights(1e9), weights(1e-3)
    total = math.sqrt(sum(float((array.astype(float) ** 2).sum()) for array in clipped.values()))
    assert total == pytest.approx(0.1 * 1e-3, rel=1e-4)  # m = (1 - beta1) * g
    assert all(np.array_equal(free[name], wide[name]) for name in free)


# ----------------------------------------------------------------------------------------------------------------------
# resume
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def straight(options, tmp_path):
    """A run of 20 steps without interruption, evaluated at 0, 8, 16, 20."""

    def run(**changes):
        out = tmp_path / "straight"
        for _ in Training(options(eval_every=8, sample_every=10, **changes), out=out).run():
            pass
        return out

    return run


@pytest.fixture
def straight_numpy(numpy_options, tmp_path):
    out = tmp_path / "straight"
    for _ in Training(numpy_options(), out=out).run():
        pass
    return out


def finish(folder, **changes):
    return list(Training.resume(folder, **changes).run())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("arch", ["transformer", "gpt2"])
def test_twenty_steps_are_ten_and_resume_and_ten(options, straight, tmp_path, arch, threads):
    want = straight(arch=arch, threads=threads, batch=16, context=32)  # enough work for two threads
    half = tmp_path / "half"
    short = options(arch=arch, threads=threads, batch=16, context=32, steps=10, eval_every=8, sample_every=10)
    for _ in Training(short, out=half).run():
        pass
    finish(half, steps=20)
    assert weights_of(half) == weights_of(want)
    extra = {("eval", 10)}  # the end of the first half is evaluated too
    assert [line for line in history(half) if line[:2] not in extra] == history(want)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("step", [1, 8, 13, 19])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(options, straight, tmp_path, step, schedule):
    want = straight(schedule=schedule)
    out = tmp_path / "stopped"
    events = run_until(Training(options(eval_every=8, sample_every=10, schedule=schedule), out=out), step)
    assert (events[-1].kind, events[-1].reason, events[-1].final_step) == ("run_end", "interrupted", step)
    assert weights_of(out)[0] == step
    assert finish(out)[-1].reason == "completed"
    assert weights_of(out) == weights_of(want)
    assert history(out) == history(want)
    assert (out / "samples.txt").read_text() == (want / "samples.txt").read_text()
    kinds = [event["kind"] for event in read_events(out / "events.jsonl")]
    assert (kinds.count("run_start"), kinds.count("run_end")) == (2, 2)


def test_a_run_can_be_interrupted_again_and_again(options, straight, tmp_path):
    want = straight()
    out = tmp_path / "stopped"
    run_until(Training(options(eval_every=8, sample_every=10), out=out), 2)
    for step in (3, 9, 16, 18):
        run_until(Training.resume(out), step)
    finish(out)
    assert (weights_of(out), history(out)) == (weights_of(want), history(want))


class Crash(Exception):
    """Stands for SIGKILL: nothing of the run gets to know of it."""


def crash_at(training, step):
    """Make the process 'die' in the middle of the step after this one."""
    original = training.recipe.engine.step

    def dying_step(*arguments, **keywords):
        if training.step == step:
            raise Crash
        return original(*arguments, **keywords)

    training.recipe.engine.step = dying_step
    with pytest.raises(Crash):
        for _ in training.run():
            pass


@pytest.mark.parametrize("step", [0, 2, 5, 7, 11])
def test_a_crash_loses_only_what_came_after_the_last_checkpoint(options, straight, tmp_path, step):
    want = straight()
    out = tmp_path / "crashed"
    crash_at(Training(options(eval_every=8, sample_every=10, save_every=5), out=out), step)
    with open(out / "events.jsonl", "ab") as file:
        file.write(b'{"kind": "step", "st')
    resumed = Training.resume(out)
    assert resumed.step == step // 5 * 5
    for _ in resumed.run():
        pass
    assert (weights_of(out), history(out)) == (weights_of(want), history(want))
    assert (out / "samples.txt").read_text() == (want / "samples.txt").read_text()


def test_leaving_the_loop_saves_and_running_again_goes_on(options, straight, tmp_path):
    want = straight()
    out = tmp_path / "left"
    training = Training(options(eval_every=8, sample_every=10), out=out)
    for event in training.run():
        if event.kind == "step" and event.step == 6:
            break
    assert weights_of(out)[0] == 6
    assert read_events(out / "events.jsonl")[-1]["reason"] == "interrupted"
    for _ in training.run():
        pass
    assert (weights_of(out), history(out)) == (weights_of(want), history(want))


def test_resuming_without_a_checkpoint_begins_anew(options, straight, tmp_path):
    want = straight()
    out = tmp_path / "nothing-yet"
    crash_at(Training(options(eval_every=8, sample_every=10), out=out), 1)
    assert Training.resume(out).step == 0
    finish(out)
    assert (weights_of(out), history(out)) == (weights_of(want), history(want))


def test_a_finished_run_needs_more_steps(options, straight):
    out = straight()
    with pytest.raises(ValueError, match="has done its 20 steps: give it more"):
        Training.resume(out)
    with pytest.raises(ValueError, match="begun with 20 steps, it cannot go on to only 15"):
        Training.resume(out, steps=15)
    assert Training.resume(out, steps=21).options.steps == 21


def test_contradicting_changes_are_refused_and_agreeing_ones_are_not(numpy_options, tmp_path):
    out = tmp_path / "run"
    run_until(Training(numpy_options(), out=out), 3)
    with pytest.raises(ValueError, match="begun with d_model 8 and cannot go on with 16"):
        Training.resume(out, d_model=16)
    with pytest.raises(ValueError, match=r"lr 0\.01"):
        Training.resume(out, lr=0.02)
    assert Training.resume(out, d_model=8, lr=0.01, eval_every=7).options.eval_every == 7


def test_another_text_is_refused_and_a_moved_one_is_found(numpy_options, corpus, tmp_path):
    out = tmp_path / "run"
    run_until(Training(numpy_options(), out=out), 3)
    os.rename(corpus, tmp_path / "moved.txt")
    with pytest.raises(ValueError, match="does not exist"):
        Training.resume(out)
    (tmp_path / "other.txt").write_text(TEXT + "!")
    with pytest.raises(ValueError, match="not the text this run was trained on"):
        Training.resume(out, corpus=str(tmp_path / "other.txt"))
    events = list(Training.resume(out, corpus=str(tmp_path / "moved.txt")).run())
    assert events[-1].reason == "completed"


def test_a_relative_corpus_is_found_from_elsewhere(numpy_options, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_until(Training(numpy_options(corpus="corpus.txt"), out=tmp_path / "run"), 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert finish(tmp_path / "run")[-1].reason == "completed"


@pytest.mark.parametrize("name", ["training", "model", "tokenizer", "corpus", "backend"])
def test_a_config_with_a_hole_is_named(numpy_options, tmp_path, name):
    out = tmp_path / "run"
    run_until(Training(numpy_options(), out=out), 3)
    config = json.loads((out / "config.json").read_text())
    del config[name]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFileError, match=r"config\.json"):
        Training.resume(out)


# ----------------------------------------------------------------------------------------------------------------------
# stopping
# ----------------------------------------------------------------------------------------------------------------------


def test_sigterm_saves_too(numpy_options, tmp_path):
    training = Training(numpy_options(), out=tmp_path / "run")
    events = run_until(training, 4, lambda: signal.raise_signal(signal.SIGTERM))
    assert (events[-1].reason, training.stopped_by) == ("interrupted", signal.SIGTERM)
    assert weights_of(tmp_path / "run")[0] == 4


def test_a_second_ctrl_c_stops_at_once_and_the_handlers_are_put_back(numpy_options, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    training = Training(numpy_options(), out=tmp_path / "run")
    original, told = training.recipe.engine.step, []

    def slow_step(*arguments, **keywords):
        if training.step == 5:
            signal.raise_signal(signal.SIGINT)
            assert told == ["stopping"]
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **keywords)

    training.recipe.engine.step = slow_step
    with pytest.raises(KeyboardInterrupt):
        for _ in training.run(on_stop=lambda: told.append("stopping")):
            pass
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert Training.resume(tmp_path / "run").step == 4  # saved every 2 steps, and never in the middle of one


def test_ctrl_c_before_the_first_step(numpy_options, straight_numpy, tmp_path, pictures):
    out = tmp_path / "run"
    events = []
    for event in Training(numpy_options(), out=out).run():
        events.append(event)
        if event.kind == "eval":
            signal.raise_signal(signal.SIGINT)
    assert [event.kind for event in events] == ["run_start", "eval", "run_end"]
    assert weights_of(out)[0] == 0
    finish(out)
    assert (weights_of(out), history(out)) == (weights_of(straight_numpy), history(straight_numpy))


def test_ctrl_c_in_the_last_step_is_a_completed_run(numpy_options, tmp_path):
    events = run_until(Training(numpy_options(), out=tmp_path / "run"), 20)
    assert events[-1].reason == "completed"
    assert [event.step for event in events if event.kind == "eval"][-1] == 20


def test_a_run_in_another_thread_needs_no_signals(numpy_options, tmp_path):
    ends = []

    def work():
        ends.extend(event for event in Training(numpy_options(), out=tmp_path / "run").run() if event.kind == "run_end")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [end.reason for end in ends] == ["completed"]


@pytest.mark.parametrize("arch", ["transformer", "gpt2"])
def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(options, tmp_path, arch):
    out = tmp_path / "run"
    training = Training(options(arch=arch, save_every=2, eval_every=12, steps=12, lr=1e-3), out=out)
    ends = []
    with pytest.raises(DivergedError, match=r"became (nan|inf) at step 6: the training diverged; try an lr below"):
        for event in training.run():
            if event.kind == "step" and event.step == 5:
                training.schedule = lambda k: 1e30
                poisoned = {name: array * np.float32(1e30) for name, array in training.recipe.parameters().items()}
                training.recipe.load_parameters(poisoned)
            if event.kind == "run_end":
                ends.append(event)
    assert [(end.reason, end.final_step, end.final_loss) for end in ends] == [("diverged", 5, None)]
    assert weights_of(out)[0] == 4
    assert read_events(out / "events.jsonl")[-1]["reason"] == "diverged"
    assert finish(out)[-1].reason == "completed"


def test_a_weight_that_is_not_finite_is_never_saved(numpy_options, tmp_path):
    out = tmp_path / "run"
    training = Training(numpy_options(save_every=2), out=out)
    original = training.recipe.engine.parameters
    with pytest.raises(DivergedError, match="token_embed is not a finite number at step 6"):
        for event in training.run():
            if event.kind == "step" and event.step == 6:
                training.recipe.engine.parameters = lambda: {**original(), "token_embed": np.array([np.inf])}
    assert weights_of(out)[0] == 4


# ----------------------------------------------------------------------------------------------------------------------
# a trained model
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained_run(numpy_options, tmp_path):
    out = tmp_path / "run"
    for _ in Training(numpy_options(), out=out).run():
        pass
    return out


def test_a_run_and_its_checkpoint_file_load_as_the_model_that_was_trained(options, tmp_path, backend):
    training = Training(options(), out=tmp_path / "run")
    for _ in training.run():
        pass
    ids = training.tokenizer.encode("12 sq")
    want, _ = training.model().forward(ids)
    for path in (tmp_path / "run", tmp_path / "run" / "weights" / "step_20.safetensors"):
        trained = load_trained(path, backend=backend.name)
        assert trained.step == 20
        assert np.array_equal(trained.model.forward(ids)[0], want)
        texts = {trained.tokenizer.decode(generate(trained.model, ids, 20, seed=seed)) for seed in (0, 0, 1)}
        assert len(texts) == 2


def test_what_cannot_be_loaded_is_named(trained_run, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        load_trained(tmp_path / "nothing-here")
    with pytest.raises(BadFileError, match="not a run directory"):
        load_trained(tmp_path)
    with pytest.raises(BadFileError, match=r"corpus\.txt"):
        load_trained(tmp_path / "corpus.txt")
    for path in (trained_run / "weights").iterdir():
        path.unlink()
    with pytest.raises(BadFileError, match="no checkpoint yet"):
        load_trained(trained_run)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("arch"),
        lambda config: config.update(arch="rnn"),
        lambda config: config.pop("model"),
        lambda config: config["model"].update(n_layers=10**9),
        lambda config: config["model"].update(n_heads=3),
        lambda config: config["model"].update(d_model=16),
        lambda config: config["model"].update(d_model=2 * 10**12),
        lambda config: config["model"].update(extra=1),
        lambda config: config["model"].update(d_ff="wide"),
        lambda config: config.update(tokenizer={"kind": "bytes"}),
        lambda config: config.update(tokenizer=None),
    ],
)
def test_a_checkpoint_whose_config_does_not_fit_is_refused(trained_run, change):
    from toy.files import write_checkpoint

    path = trained_run / "weights" / "step_20.safetensors"
    checkpoint = read_checkpoint(path)
    change(checkpoint.config)
    write_checkpoint(path, checkpoint)
    with pytest.raises(BadFileError, match=r"step_20\.safetensors"):
        load_trained(path)


# -- samples -----------------------------------------------------------------------------------------------------------


def test_no_samples_when_none_are_asked_for(numpy_options, tmp_path):
    assert samples(Training(numpy_options(steps=8, sample_every=4), out=tmp_path / "some")) != []
    training = Training(numpy_options(steps=8, sample_every=0), out=tmp_path / "none")
    assert samples(training) == []
    assert not (tmp_path / "none" / "samples.txt").exists() and "samples" not in dict(training.written())
    assert read_config(tmp_path / "none")["training"]["sample_every"] == 0
    resumed = Training.resume(tmp_path / "none", steps=10)
    assert samples(resumed) == [] and resumed.step == 10


def samples(training):
    return [event.text for event in training.run() if event.kind == "sample"]


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def test_a_sample_goes_on_from_the_prompt_at_the_temperature(numpy_options):
    for changes in ({}, {"sample_prompt": "then c"}, {"sample_prompt": "then c", "sample_temperature": 0.0}):
        training = Training(numpy_options(steps=2, sample_every=2, **changes))
        (text,) = samples(training)
        prompt, temperature = changes.get("sample_prompt", "\n"), changes.get("sample_temperature", 0.8)
        ids = training.tokenizer.encode(prompt)
        wanted = generate(training.model(), ids, 5, temperature, seed=[0, 2])
        assert text == training.tokenizer.decode(list(wanted))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sample_prompt": "€"}, "the prompt has the character '€'"),
        ({"sample_prompt": ""}, "sample_prompt is empty"),
        ({"sample_temperature": -1.0}, "sample_temperature must be a number of at least 0, got -1"),
        ({"sample_temperature": math.nan}, "sample_temperature must be"),
        ({"sample_every": -1}, "sample_every must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_settings_of_samples_are_told_before_the_run(numpy_options, tmp_path, changes, problem):
    Training(numpy_options(sample_prompt="t", sample_temperature=1.0, sample_every=1))
    with pytest.raises(ValueError, match=problem):
        Training(numpy_options(**changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_picture_that_is_held_open_is_told_under_its_other_name(numpy_options, tmp_path, pictures, monkeypatch):
    from toy import plots

    write = plots._write

    def held(figure, out):
        if out.name == "loss.png":
            raise plots.FileInUseError(str(out))
        return write(figure, out)

    monkeypatch.setattr(plots, "_write", held)
    training = Training(numpy_options(steps=2), out=tmp_path / "run")
    list(training.run())
    assert dict(training.written())["picture"] == tmp_path / "run" / "loss-new.png"
