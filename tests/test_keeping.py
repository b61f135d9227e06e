"""What a run keeps and how long it goes on: the best checkpoint, patience, budgets, the rate of a longer run, branches,
options out of a file, and what it says it will take."""

import itertools
import json
import math
import signal

import numpy as np
import pytest
from single_thread import single_thread  # noqa: F401 (autouse)

import toy
from toy.files import BadFileError, Run, read_checkpoint, read_events
from toy.training import FromScratchOptions, Training, ViTTinyOptions, schedules
from toy.training.config_file import options_from_file
from toy.training.estimate import largest_memory

TEXT = "".join(f"{i} squared is {i * i}, and then comes {i + 1}.\n" for i in range(300))
SMALL = {
    "batch": 3, "context": 8, "d_model": 8, "layers": 1, "heads": 2, "d_ff": 12, "eval_batches": 2, "sample_tokens": 5,
    "arch": "transformer", "schedule": "constant", "lr_floor": 0.1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Training, "_draw", lambda training: None)


@pytest.fixture
def options(tmp_path):
    (tmp_path / "corpus.txt").write_text(TEXT)

    def make(**changes):
        own = {"corpus": str(tmp_path / "corpus.txt"), "backend": "numpy", "lr": 0.01, "steps": 20}
        if {"epochs", "tokens", "minutes"} & changes.keys():
            del own["steps"]
        return FromScratchOptions(**{**SMALL, **own, **changes})

    return make


def with_losses(monkeypatch, losses):
    """Let the validations after steps give these losses, one after the other; the one at step 0 gives 9."""
    left = iter(losses)
    monkeypatch.setattr(Training, "_evaluate", _evaluation_of(left))


def _evaluation_of(left):
    from toy.files.events import Evaluation

    def evaluate(training):
        training._evaluated.add(training.step)
        return Evaluation(step=training.step, loss=9.0 if training.step == 0 else next(left))

    return evaluate


def killed_in_validation(monkeypatch, step):
    """End the process, as it were, in the validation at this step. Returns what was there before."""
    evaluate = Training._evaluate

    def killed(training):
        if training.step == step:
            raise KeyboardInterrupt
        return evaluate(training)

    monkeypatch.setattr(Training, "_evaluate", killed)
    return evaluate


def checkpoints(folder):
    return sorted(int(path.stem[5:]) for path in (folder / "weights").glob("step_*.safetensors"))


def losses_of(folder):
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "step"]


# -- the best checkpoint -----------------------------------------------------------------------------------------------


def test_the_best_checkpoint_stays_and_the_newest(options, tmp_path, monkeypatch):
    with_losses(monkeypatch, [3.0, 2.0, 2.5, 2.6, 2.7])
    out = tmp_path / "run"
    training = Training(options(eval_every=4, save_every=4, keep=1), out=out)
    list(training.run())
    assert training.best == (2.0, 8)
    assert checkpoints(out) == [8, 20]
    run = Run.open(out)
    assert run.best_checkpoint().name == "step_8.safetensors" == run.find_checkpoint("best").name
    assert run.find_checkpoint("last").name == "step_20.safetensors" == run.find_checkpoint().name
    assert run.find_checkpoint(8) == run.find_checkpoint("8") == run.best_checkpoint()
    assert [toy.load(out, checkpoint=which).step for which in ("last", "best", 8, "20")] == [20, 8, 8, 20]
    for which, message in (
        (12, "has no checkpoint of step 12, there are 8, 20"),
        ("first", "checkpoint must be best, last or a step, got 'first'"),
        ("-8", "must be best, last or a step"),
        ("٣", "must be best, last or a step"),
    ):
        with pytest.raises(ValueError, match=message):
            toy.load(out, checkpoint=which)
    with pytest.raises(ValueError, match="is one file, and checkpoint best chooses among those of a run"):
        toy.load(run.best_checkpoint(), checkpoint="best")


def test_a_better_validation_between_two_saves_is_saved(options, tmp_path, monkeypatch):
    with_losses(monkeypatch, [3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9])
    out = tmp_path / "run"
    list(Training(options(eval_every=3, save_every=10, keep=1), out=out).run())
    assert Run.open(out).best_checkpoint().name == "step_6.safetensors"
    assert checkpoints(out) == [6, 20]


def test_the_start_is_never_the_best(options, tmp_path, monkeypatch):
    with_losses(monkeypatch, [10.0, 11.0])
    training = Training(options(eval_every=10), out=tmp_path / "run")
    list(training.run())
    assert training.best == (10.0, 10)


@pytest.mark.parametrize("stopped_at", [5, 9, 13])
def test_the_best_is_the_same_after_a_resume(options, tmp_path, monkeypatch, stopped_at):
    losses = [3.0, 2.0, 2.5, 2.6, 1.9]
    with_losses(monkeypatch, losses)
    out = tmp_path / "run"
    for event in Training(options(eval_every=4, save_every=2, keep=1), out=out).run():
        if event.kind == "step" and event.step == stopped_at:
            signal.raise_signal(signal.SIGINT)
    (out / "weights" / "best").unlink(missing_ok=True)  # killed before it was written
    with_losses(monkeypatch, losses[stopped_at // 4 :])
    resumed = Training.resume(out)
    events = list(resumed.run())
    assert resumed.best == (1.9, 20) and events[-1].reason == "completed"
    assert Run.open(out).best_checkpoint().name == "step_20.safetensors"
    found = [event["step"] for event in read_events(out / "events.jsonl") if event["kind"] == "eval"]
    assert found == [0, 4, 8, 12, 16, 20]


def test_a_strange_best_is_told(options, tmp_path):
    out = tmp_path / "run"
    list(Training(options(), out=out).run())
    (out / "weights" / "best").write_text("../../etc/passwd\n")
    with pytest.raises(BadFileError, match="expected step_<N>"):
        toy.load(out, checkpoint="best")
    (out / "weights" / "best").write_text("step_7.safetensors\n")
    with pytest.raises(BadFileError, match="is missing, but weights/best names it"):
        toy.load(out, checkpoint="best")
    assert toy.load(out).step == 20


def test_it_is_saved_before_it_is_evaluated(options, tmp_path, monkeypatch):
    """A process that is killed in a long validation has lost no step; the validation is made up for."""

    evaluate = killed_in_validation(monkeypatch, 10)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        list(Training(options(eval_every=5, save_every=5), out=out).run())
    assert checkpoints(out) == [5, 10]
    monkeypatch.setattr(Training, "_evaluate", evaluate)
    events = list(Training.resume(out).run())
    assert [event.step for event in events if event.kind == "eval"] == [10, 15, 20]


def test_killed_in_the_last_validation_it_ends_all_the_same(options, tmp_path, monkeypatch):
    evaluate = killed_in_validation(monkeypatch, 20)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        list(Training(options(), out=out).run())
    monkeypatch.setattr(Training, "_evaluate", evaluate)
    events = list(Training.resume(out).run())
    assert [event.kind for event in events] == ["run_start", "eval", "sample", "run_end"]
    assert events[-1].reason == "completed" and toy.load(out, checkpoint="best").step in (18, 20)


# -- patience ----------------------------------------------------------------------------------------------------------


def test_patience_ends_a_run_that_gets_no_better(options, tmp_path, monkeypatch):
    with_losses(monkeypatch, [3.0, 2.0, 2.0, 2.1, 2.2, 1.0])
    out = tmp_path / "run"
    training = Training(options(eval_every=2, patience=3), out=out)
    events = list(training.run())
    assert (events[-1].reason, training.step, training.best, training.out_of_patience) == (
        "patience",
        10,
        (2.0, 4),
        True,
    )
    assert toy.load(out).step == 10 and toy.load(out, checkpoint="best").step == 4
    with_losses(monkeypatch, [2.3, 2.4, 1.9, 1.8, 1.7])
    resumed = Training.resume(out, patience=9)
    assert list(resumed.run())[-1].reason == "completed" and resumed.step == 20


def test_patience_counts_across_a_resume(options, tmp_path, monkeypatch):
    with_losses(monkeypatch, [2.0, 2.1, 2.2])
    out = tmp_path / "run"
    for event in Training(options(eval_every=2, save_every=1, patience=3), out=out).run():
        if event.kind == "step" and event.step == 7:
            signal.raise_signal(signal.SIGINT)
    with_losses(monkeypatch, [2.3, 2.4])
    resumed = Training.resume(out)
    assert list(resumed.run())[-1].reason == "patience" and resumed.step == 8


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_epochs_and_tokens_are_counted_in_steps(options):
    training = Training(options(epochs=2.5, eval_every=None))
    n, per_step = training.data.n_train_tokens, 3 * 8
    assert training.options.steps == math.ceil(2.5 * n / per_step)
    assert training.options.eval_every == min(training.options.steps // 10, 500)
    assert training.options.epochs is None
    assert Training(options(tokens=7 * per_step)).options.steps == 7
    assert Training(options(tokens=7 * per_step + 1)).options.steps == 8
    assert Training(options(tokens=1)).options.steps == 1
    assert Training(options(tokens=8 * per_step, accumulate=4)).options.steps == 2
    # what was asked for stays
    training = Training(options(epochs=1, eval_every=7, warmup=3))
    assert (training.options.eval_every, training.options.warmup) == (7, 3)


def test_an_epoch_of_examples_is_every_example_once(tmp_path, options):
    rows = [{"prompt": f"what is {i}? ", "completion": f"{i} is {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = Training(options(corpus=str(tmp_path / "rows.jsonl"), epochs=3, context=40))
    assert training.options.steps == math.ceil(3 * len(training.data.training) / 3)


def test_an_epoch_of_images():
    training = Training(ViTTinyOptions(epochs=2, batch=50, d_model=8, heads=2, layers=1, backend="numpy"))
    assert training.options.steps == math.ceil(2 * training.start.n_train / 50)
    with pytest.raises(TypeError, match="tokens"):
        ViTTinyOptions(tokens=5)


def test_the_schedule_follows_the_budget(options):
    training = Training(options(tokens=24 * 50, schedule="cosine", lr=1.0, lr_floor=0.1, warmup=5))
    assert training.schedule(49) == pytest.approx(0.1) and training.schedule(5) == 1.0


def test_minutes_are_as_many_steps_as_fit(options, monkeypatch):
    from toy.training import estimate
    from toy.training.start import TextStart

    monkeypatch.setattr(estimate, "seconds_of_a_step", lambda start, step: 0.25)
    monkeypatch.setattr(TextStart, "validation_seconds", lambda start: 1.0)
    monkeypatch.setattr(TextStart, "sample_seconds", lambda start: 2.0)
    # 60 s: eleven validations and four samples, then steps of a quarter of a second
    assert Training(options(minutes=1)).options.steps == round((60 - 11 - 8) / 0.25)
    # a validation and a sample belong to every tenth step
    assert Training(options(minutes=1, eval_every=10, sample_every=10)).options.steps == round(60 / (0.25 + 0.1 + 0.2))
    assert Training(options(minutes=0.01)).options.steps == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 1, "tokens": 100}, "epochs and tokens each say how long to train"),
        ({"epochs": 0}, "epochs must be a number above 0"),
        ({"minutes": -1}, "minutes must be a number above 0"),
        ({"tokens": math.nan}, "tokens must be a number above 0"),
        ({"tokens": 1e15}, "steps must be at most"),
    ],
)
def test_budgets_that_cannot_be(options, given, message):
    Training(options(epochs=1))
    with pytest.raises(ValueError, match=message):
        Training(options(**given))


def test_steps_and_a_budget_are_too_much(options, tmp_path):
    with pytest.raises(ValueError, match="steps and epochs each say how long to train"):
        Training(options(epochs=1, steps=30))
    out = tmp_path / "run"
    list(Training(options(), out=out).run())
    with pytest.raises(ValueError, match="steps and epochs each say how long"):
        Training.resume(out, steps=40, epochs=2)


def test_a_run_goes_on_for_a_budget(options, tmp_path):
    out = tmp_path / "run"
    list(Training(options(steps=6), out=out).run())
    resumed = Training.resume(out, tokens=24 * 9)
    assert list(resumed.run())[-1].reason == "completed" and resumed.step == 9
    with pytest.raises(ValueError, match="begun with 9 steps, it cannot go on to only 2"):
        Training.resume(out, tokens=24 * 2)


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_warmup_stable_decay():
    rate = schedules.make_schedule("wsd", 1.0, steps=101, warmup=10, floor=0.1, cooldown=0.2)
    start = schedules.cooldown_start(101, 0.2)
    assert start == 80
    assert rate(0) == pytest.approx(1 / 11) and {rate(k) for k in range(10, 81)} == {1.0}
    assert rate(90) == pytest.approx(0.55) and rate(100) == pytest.approx(0.1) == rate(1000)
    assert all(a > b for a, b in itertools.pairwise(rate(k) for k in range(80, 101)))
    assert schedules.make_schedule("wsd", 1.0, steps=1)(0) == 1.0
    for changes, message in (
        ({"cooldown": 0.0}, "cooldown must lie in"),
        ({"cooldown": 1.5}, "cooldown must lie in"),
        ({"warmup": 90}, "reaches into the last 0.2 of 101 steps"),
        ({"warmup": 200}, "leaves none of 101 steps for the wsd"),
    ):
        with pytest.raises(ValueError, match=message):
            schedules.make_schedule("wsd", 1.0, **{"steps": 101, **changes})


@pytest.mark.parametrize(("schedule", "jumps"), [("constant", False), ("cosine", True), ("wsd", True)])
def test_a_longer_resume_says_what_becomes_of_the_rate(options, tmp_path, schedule, jumps):
    out = tmp_path / "run"
    list(Training(options(schedule=schedule, warmup=2), out=out).run())
    resumed = Training.resume(out, steps=40)
    told = [notice for notice in resumed.notices() if "learning rate" in notice]
    assert len(told) == jumps
    if jumps:
        assert (
            "was 1.00e-03 at step 20" in told[0] and f"{schedule} over 40 steps (before: {schedule} over 20)" in told[0]
        )


def test_a_resume_of_the_stable_part_says_nothing(options, tmp_path):
    out = tmp_path / "run"
    for event in Training(options(schedule="wsd", save_every=1), out=out).run():
        if event.kind == "step" and event.step == 10:
            signal.raise_signal(signal.SIGINT)
    assert not [notice for notice in Training.resume(out, steps=40).notices() if "learning rate" in notice]


# -- branches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trunk(options, tmp_path):
    out = tmp_path / "trunk"
    list(Training(options(save_every=5, eval_every=5, keep=9, warmup=0), out=out).run())
    return out


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_branch_is_a_new_run_with_other_options(trunk, tmp_path):
    before, out = everything(trunk), tmp_path / "branch"
    training = Training.branch(trunk, out, checkpoint=10, lr=0.002, steps=25, batch=2)
    assert training.step == 10 and not out.exists()
    events = list(training.run())
    assert everything(trunk) == before
    assert [event.step for event in events if event.kind == "step"] == list(range(11, 26))
    assert {event.lr for event in events if event.kind == "step"} == {0.002}
    config = Run.open(out).config
    assert config["branched_from"] == {"run": str(trunk.absolute()), "step": 10}
    assert (config["training"]["lr"], config["training"]["batch"], config["training"]["d_model"]) == (0.002, 2, 8)
    first = read_checkpoint(trunk / "weights" / "step_10.safetensors")
    assert {event["step"] for event in read_events(out / "events.jsonl")[:1]} == {10}
    assert first.step == 10 and toy.load(out).step == 25


def test_a_branch_with_the_same_options_is_the_run_itself(trunk, tmp_path):
    out = tmp_path / "branch"
    list(Training.branch(trunk, out, checkpoint=10).run())
    assert losses_of(out) == losses_of(trunk)[10:]
    a, b = (read_checkpoint(folder / "weights" / "step_20.safetensors") for folder in (trunk, out))
    assert all(np.array_equal(a.parameters[name], b.parameters[name]) for name in a.parameters)
    assert all(np.array_equal(a.moments[s][name], b.moments[s][name]) for s in "mv" for name in a.moments[s])


def test_a_branch_that_was_stopped_goes_on(trunk, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    list(Training.branch(trunk, whole, checkpoint=10, lr=0.003).run())
    run = Training.branch(trunk, stopped, checkpoint=10, lr=0.003).run()
    next(run)
    run.close()  # before its first step
    assert checkpoints(stopped) == [10]
    list(Training.resume(stopped).run())
    assert losses_of(stopped) == losses_of(whole)
    assert Run.open(stopped).config["branched_from"]["step"] == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 16, "steps": 30}, "the model of the run in .* is another one"),
        ({"tokenizer": "bytes", "steps": 30}, "the (model|tokenizer) of the run in .* is another one"),
        ({}, "has done its 20 steps: give it more steps"),
        ({"steps": 10}, "has done its 20 steps"),
        ({"checkpoint": 3}, "has no checkpoint of step 3, there are 5, 10, 15, 20"),
    ],
)
def test_branches_that_cannot_be(trunk, tmp_path, changes, message):
    Training.branch(trunk, tmp_path / "good", steps=30)
    with pytest.raises(ValueError, match=message):
        Training.branch(trunk, tmp_path / "bad", **changes)
    assert not (tmp_path / "bad").exists()


def test_a_branch_with_another_text_keeps_its_vocabulary(trunk, tmp_path):
    (tmp_path / "same.txt").write_text(TEXT[::-1])
    training = Training.branch(trunk, tmp_path / "branch", steps=22, corpus=str(tmp_path / "same.txt"))
    assert list(training.run())[-1].reason == "completed"
    (tmp_path / "more.txt").write_text(TEXT + "QXZ" * 100)
    with pytest.raises(ValueError, match="is another one, and a branch goes on with its weights"):
        Training.branch(trunk, tmp_path / "other", steps=22, corpus=str(tmp_path / "more.txt"))


# -- options out of a file ---------------------------------------------------------------------------------------------


def test_the_config_of_a_run_gives_the_same_run(trunk, options, tmp_path):
    given = options_from_file(trunk / "config.json", FromScratchOptions)
    assert options_from_file(trunk, FromScratchOptions) == given
    out = tmp_path / "again"
    list(Training(FromScratchOptions(**given), out=out).run())
    assert losses_of(out) == losses_of(trunk)


def test_toml_gives_options_and_flags_go_before_them(tmp_path, toy_command, options):
    corpus = options().corpus
    path = tmp_path / "options.toml"
    path.write_text(
        f'corpus = "{corpus}"\nd-model = 8\nheads = 2\nlayers = 1\nd_ff = 12\ncontext = 8\nsteps = 4\nlr = 1\n'
        'backend = "numpy"\nuntied = true\narch = "llama"\n'
    )
    out = tmp_path / "run"
    code, _, err = toy_command("train", "from-scratch", "--config", path, "--lr", "0.01", "--out", out)
    assert code == 0, err
    training = Run.open(out).config["training"]
    assert (training["lr"], training["steps"], training["arch"], training["untied"]) == (0.01, 4, "llama", True)
    assert training["batch"] == 6  # what nobody said is the default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d_modle = 8", "has no option 'd_modle', did you mean 'd_model'?"),
        ("qqq = 8", "has no option 'qqq'; its options are "),
        ('steps = "many"', "steps must be int, got 'many'"),
        ("steps = 1.5", "steps must be int, got 1.5"),
        ("steps = true", "steps must be int, got True"),
        ("untied = 1", "untied must be bool, got 1"),
        ("lr = [1]", r"lr must be float, got \[1\]"),
        ("steps 5", "is not TOML"),
        ('recipe = "lora"', "is for lora: toy train lora --config takes it"),
        ("steps = 0", "steps must be at least 1"),
    ],
)
def test_files_of_options_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "options.toml"
    path.write_text("steps = 5")
    assert options_from_file(path, FromScratchOptions) == {"steps": 5}
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        FromScratchOptions(**options_from_file(path, FromScratchOptions))


def test_config_files_that_cannot_be(tmp_path, trunk):
    for name, content, message in (
        ("a.json", b"{}", "is not the config.json of a run"),
        ("b.json", b"[1]", "is not the config.json of a run"),
        ("c.json", b"\xff", "is not a text in UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadFileError, match=message):
            options_from_file(tmp_path / name, FromScratchOptions)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        options_from_file(tmp_path / "nowhere.toml", FromScratchOptions)
    with pytest.raises(ValueError, match="is of a run of from-scratch"):
        options_from_file(trunk, ViTTinyOptions)


# -- what it takes -----------------------------------------------------------------------------------------------------


def test_measuring_changes_nothing(tmp_path, options, backend):
    own = {"backend": backend.name, "device": backend.device, "save_every": 5, "keep": 9}
    runs = []
    for name, measured in (("plain", False), ("measured", True)):
        training = Training(options(**own), out=tmp_path / name)
        state = training.recipe.parameters()
        if measured:
            estimate = training.measure()
            assert estimate is training.estimate and estimate.step_seconds > 0
            assert estimate.seconds > 19 * estimate.step_seconds
            assert estimate.bytes is None or estimate.bytes > largest_memory() / 2
            assert all(np.array_equal(array, state[n]) for n, array in training.recipe.parameters().items())
        for event in training.run():
            if event.kind == "step" and event.step == 12:
                break
        resumed = Training.resume(tmp_path / name)
        if measured:
            moments = resumed.recipe.optimizer_state()
            resumed.measure()
            after = resumed.recipe.optimizer_state()
            assert all(np.array_equal(moments[s][n], after[s][n]) for s in "mv" for n in moments[s])
        list(resumed.run())
        runs.append((losses_of(tmp_path / name), toy.load(tmp_path / name).model.parameters.copies()))
    assert runs[0][0] == runs[1][0]
    assert all(np.array_equal(array, runs[1][1][name]) for name, array in runs[0][1].items())


def test_a_dry_run_says_what_it_takes_and_writes_nothing(tmp_path, options, toy_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    corpus = options().corpus
    before = sorted(tmp_path.iterdir())
    arguments = ["--corpus", corpus, "--backend=numpy", "--d-model=8", "--heads=2", "--layers=1", "--steps=7"]
    code, out, err = toy_command("train", "from-scratch", *arguments, "--dry-run")
    assert (code, err) == (0, "")
    assert "takes          about " in out and " a step, measured" in out and "nothing was trained" in out
    assert sorted(tmp_path.iterdir()) == before


# -- the command line --------------------------------------------------------------------------------------------------


def test_branching_on_the_command_line(trunk, tmp_path, toy_command):
    out = tmp_path / "branch"
    train = ("train", "from-scratch", "--resume", trunk)
    code, text, err = toy_command(*train, "--branch", "--checkpoint=10", "--lr=0.002", "--steps=14", "--out", out)
    assert code == 0, err
    assert "after step 10" in text and toy.load(out).step == 14
    for arguments, message in (
        ((*train, "--checkpoint=best"), "--checkpoint belongs to --branch"),
        (("train", "from-scratch", "--branch"), "--branch belongs to --resume RUN"),
        ((*train, "--config", trunk / "config.json"), "--config cannot be given with --resume"),
        (("train", "from-scratch", "--steps=5", "--epochs=1"), "--steps and --epochs each say how long"),
    ):
        code, _, err = toy_command(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["generate", "eval", "export"])
def test_commands_take_a_checkpoint_and_say_which(options, tmp_path, monkeypatch, toy_command, name):
    monkeypatch.chdir(tmp_path)
    with_losses(monkeypatch, [3.0, 2.0, 2.5, 2.6])
    own = {"arch": "gpt2", "eval_every": 5, "save_every": 5}
    list(Training(options(**own), out=tmp_path / "run").run())
    more = {"generate": ["--tokens=5", "--prompt=1"], "eval": ["--json"], "export": ["--force", "--out=a.gguf"]}[name]
    code, first, err = toy_command(name, "run", *more)
    assert (code, err) == (
        0,
        "checkpoint: step 20, the last; the best on validation is step 10, --checkpoint best takes it\n",
    )
    code, second, err = toy_command(name, "run", *more, "--checkpoint=best")
    assert (code, err) == (0, "checkpoint: step 10, the best on validation\n")
    if name == "eval":
        assert (json.loads(first)["checkpoint"], json.loads(second)["checkpoint"]) == (20, 10)
        assert json.loads(first)["loss"] != json.loads(second)["loss"]
    code, _, err = toy_command(name, "run", *more, "--checkpoint=3")
    assert code == 2 and "has no checkpoint of step 3" in err


# -- accumulate --------------------------------------------------------------------------------------------------------


def test_a_run_that_accumulates_draws_the_rows_of_the_large_batch(tmp_path, options, backend):
    own = {"backend": backend.name, "device": backend.device, "clip": 0.5}
    whole = Training(options(batch=6, **own), out=tmp_path / "whole")
    cut = Training(options(batch=2, accumulate=3, **own), out=tmp_path / "cut")
    for k in (0, 7):
        for a, b in zip(whole.start.training_batch(k), cut.start.training_batch(k)):
            assert np.array_equal(a, b)
    list(whole.run())
    events = list(cut.run())
    np.testing.assert_allclose(losses_of(tmp_path / "cut"), losses_of(tmp_path / "whole"), rtol=0, atol=2e-5)
    assert {event.tokens for event in events if event.kind == "step"} == {6 * 8}
    stopped = tmp_path / "stopped"
    for event in Training(options(batch=2, accumulate=3, **own), out=stopped).run():
        if event.kind == "step" and event.step == 9:
            signal.raise_signal(signal.SIGINT)
    list(Training.resume(stopped).run())
    assert losses_of(stopped) == losses_of(tmp_path / "cut")


def test_answers_of_unequal_length_in_several_passes(tmp_path, options, backend):
    rows = [{"prompt": f"{i}? ", "completion": f"{i} " * (1 + i % 7)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {"corpus": str(tmp_path / "rows.jsonl"), "context": 24, "backend": backend.name, "device": backend.device}
    losses = []
    for name, batch, accumulate in (("whole", 8, 1), ("cut", 2, 4)):
        list(Training(options(batch=batch, accumulate=accumulate, **own), out=tmp_path / name).run())
        losses.append(losses_of(tmp_path / name))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=2e-5)


def test_images_in_several_passes():
    own = {"d_model": 8, "heads": 2, "layers": 1, "steps": 4, "backend": "numpy", "lr": 0.01}
    curves = []
    for batch, accumulate in ((12, 1), (4, 3)):
        training = Training(ViTTinyOptions(batch=batch, accumulate=accumulate, **own))
        curves.append([event.loss for event in training.run() if event.kind == "step"])
    np.testing.assert_allclose(curves[1], curves[0], rtol=0, atol=2e-5)
