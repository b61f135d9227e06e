"""Pictures of runs."""

import json
import math
import re
import sys

import numpy as np
import pytest

from toy.files import BadFileError, Run, atomic
from toy.files.events import Evaluation, EventLog, Step
from toy.plots import draw_confusion, draw_runs, load_curve, plot_confusion, plot_runs, smooth


def make_run(folder, n_steps=200, vocab_size=65, level=2.0, every=50):
    run = Run.create(folder, {"arch": "transformer", "model": {"vocab_size": vocab_size}})
    rng = np.random.default_rng(0)
    log = EventLog(run.events_path)
    log.write(Evaluation(step=0, loss=math.log(vocab_size)))
    for step in range(1, n_steps + 1):
        loss = level + (math.log(vocab_size) - level) * math.exp(-step / 40) + 0.1 * rng.standard_normal()
        log.write(Step(step=step, loss=loss, lr=1e-3, grad_norm=1.0, tokens=1024, wall_us=20_000))
        if step % every == 0:
            log.write(Evaluation(step=step, loss=loss + 0.1))
    log.close()
    return run.folder


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.PDF", b"%PDF")])
def test_the_suffix_decides_the_format(tmp_path, name, start):
    out = plot_runs([make_run(tmp_path / "run")], tmp_path / name)
    assert out.read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_the_picture_shows_training_validation_and_the_uniform_guess(tmp_path):
    figure = draw_runs([load_curve(make_run(tmp_path / "run"))])
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[0] == "training"
    assert labels[1].startswith("validation, last 2.")
    assert labels[2] == f"uniform guess, ln 65 = {math.log(65):.2f}"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert axes.get_xlabel() == "steps"
    raw, smoothed, validation, uniform = axes.get_lines()
    assert len(raw.get_xdata()) == len(smoothed.get_xdata()) == 200
    assert raw.get_alpha() < 0.5
    assert np.abs(np.diff(smoothed.get_ydata())).mean() < 0.3 * np.abs(np.diff(raw.get_ydata())).mean()
    assert validation.get_xdata().tolist() == [0, 50, 100, 150, 200]
    assert uniform.get_linestyle() == "--"


@pytest.mark.parametrize(
    ("x", "last", "at_100"), [("steps", 200, 100), ("tokens", 204_800, 102_400), ("seconds", 4.0, 2.0)]
)
def test_the_horizontal_axis_can_be_steps_tokens_or_seconds(tmp_path, x, last, at_100):
    figure = draw_runs([load_curve(make_run(tmp_path / "run"))], x)
    raw, _, validation, _ = figure.axes[0].get_lines()
    assert raw.get_xdata()[-1] == pytest.approx(last)
    assert validation.get_xdata()[2] == pytest.approx(at_100)
    assert x in figure.axes[0].get_xlabel()


def test_several_runs_share_a_picture_and_a_legend(tmp_path):
    curves = [load_curve(make_run(tmp_path / name, level=level)) for name, level in (("wide", 1.8), ("narrow", 2.2))]
    curves.append(load_curve(make_run(tmp_path / "bytes", vocab_size=256)))
    axes = draw_runs(curves).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(",")[0] for label in labels[:6:2]] == ["wide", "narrow", "bytes"]
    assert sum("uniform guess" in label for label in labels) == 2  # 65 is drawn once
    colours = [line.get_color() for line in axes.get_lines()[1:9:3]]
    assert len(set(colours)) == 3


def test_a_name_with_mathematics_in_it_is_only_a_name(tmp_path):
    plot_runs([make_run(tmp_path / "$x_{$ run"), make_run(tmp_path / "_hidden")], tmp_path / "out.png")
    plot_runs([make_run(tmp_path / "$\\frac$")], tmp_path / "one.png")
    labels = [t.get_text() for t in draw_runs([load_curve(tmp_path / "_hidden")] * 2).axes[0].get_legend().get_texts()]
    assert sum("_hidden" in label for label in labels) == 4


def test_a_long_run_gives_a_small_file(tmp_path):
    out = plot_runs([make_run(tmp_path / "run", n_steps=30_000, every=1000)], tmp_path / "out.svg")
    assert out.stat().st_size < 600_000


def test_a_run_of_one_step_can_be_drawn(tmp_path):
    plot_runs([make_run(tmp_path / "run", n_steps=1)], tmp_path / "out.png")


def test_a_picture_that_a_viewer_holds_gets_another_name(tmp_path, monkeypatch):
    """As on Windows: the old picture cannot be replaced while it is on the screen. A training run must not end for that."""
    run, out = make_run(tmp_path / "run"), tmp_path / "loss.png"
    out.write_bytes(b"on the screen")
    real = atomic.os.replace

    def replace(source, target):
        if target == out:
            error = PermissionError(13, "Permission denied")
            error.winerror = 32
            raise error
        real(source, target)

    monkeypatch.setattr(atomic.os, "replace", replace)
    monkeypatch.setattr(atomic.time, "sleep", lambda seconds: None)
    drawn = plot_runs([run], out)
    assert drawn == tmp_path / "loss-new.png" and drawn.read_bytes().startswith(b"\x89PNG")
    assert plot_confusion(np.eye(2, dtype=int), ["a", "b"], out) == drawn
    assert out.read_bytes() == b"on the screen"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss-new.png", "loss.png", "run"]


def test_no_pyplot_and_no_figure_is_left_behind(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    plot_runs([make_run(tmp_path / "run")], tmp_path / "out.png")
    assert "matplotlib.pyplot" not in sys.modules


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert smooth(np.full(50, 3.0), 10) == pytest.approx(np.full(50, 3.0))
    assert smooth(np.array([5.0, 1.0, 4.0]), 1).tolist() == [5.0, 1.0, 4.0]
    assert smooth(np.array([6.0, 0.0, 3.0]), 2) == pytest.approx([6.0, 3.5, 2.25])  # means 6, 3, 1.5, and again
    line = np.arange(200.0)
    assert smooth(line, 20)[:170] == pytest.approx(line[:170])  # an exponential mean would be 20 below


def test_what_cannot_be_drawn_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf"):
        plot_runs([run], tmp_path / "out.gif")
    with pytest.raises(ValueError, match="x must be one of"):
        plot_runs([run], tmp_path / "out.png", x="hours")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_runs([], tmp_path / "out.png")
    with pytest.raises(BadFileError, match=r"no config\.json"):
        plot_runs([tmp_path], tmp_path / "out.png")
    with pytest.raises(OSError, match="cannot write"):
        plot_runs([run], tmp_path / "nowhere" / "out.png")
    (run / "events.jsonl").write_text("")
    with pytest.raises(BadFileError, match="no training step yet"):
        plot_runs([run], tmp_path / "out.png")
    (run / "config.json").write_text(json.dumps({"format": "toy-run-1", "model": {}}))
    with pytest.raises(BadFileError, match=re.escape("config.json")):
        load_curve(run)
    assert not (tmp_path / "out.png").exists()


def test_the_confusion_picture_has_every_count_and_the_share_that_is_right(tmp_path):
    counts = np.array([[5, 1, 0], [0, 7, 0], [2, 0, 5]])
    names = ["$a$", "b_{c", "a name that is rather long"]
    axes = draw_confusion(counts, names).axes[0]
    shown = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert shown == {(0, 0): "5", (0, 1): "1", (1, 1): "7", (2, 0): "2", (2, 2): "5"}
    assert axes.get_title() == "17 of 20 test images right (85.0 %)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$a$", "b_{c", "a name that is rath…"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("taken for", "is")
    assert axes.images[0].get_array().sum() == pytest.approx(3)  # each row is shared out
    assert plot_confusion(counts, names, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert plot_confusion(counts, names, tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert not draw_confusion(np.eye(41, dtype=int), [str(i) for i in range(41)]).axes[0].texts  # too many to be read
    for wrong, classes, out, message in (
        (counts, names[:2], "b.png", r"2 classes must have the shape \(2, 2\), got \(3, 3\)"),
        (counts[:2], names, "b.png", r"got \(2, 3\)"),
        (counts, names, "b.gif", r"\.png, \.svg or \.pdf"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_confusion(wrong, classes, tmp_path / out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]
