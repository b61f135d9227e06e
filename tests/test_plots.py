"""Pictures of runs."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from toy import plots
from toy.cli import runs as cli_runs
from toy.files import BadFileError, Run, atomic
from toy.files.events import Evaluation, EventLog, Step
from toy.files.lock import only_process
from toy.plots import draw_confusion, draw_runs, load_curve, plot_confusion, plot_runs, short_labels, smooth


def make_run(folder, n_steps=200, vocab_size=65, level=2.0, every=50, start=None, **config):
    run = Run.create(folder, {"arch": "transformer", "model": {"vocab_size": vocab_size}, **config})
    start = math.log(vocab_size) if start is None else start
    rng = np.random.default_rng(0)
    log = EventLog(run.events_path)
    log.write(Evaluation(step=0, loss=start))
    for step in range(1, n_steps + 1):
        loss = level + (start - level) * math.exp(-step / 40) + 0.1 * rng.standard_normal()
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
    assert labels[0] == "training, smoothed"
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


# -- many runs ---------------------------------------------------------------------------------------------------------


def smoothed_lines(axes):
    return [line for line in axes.get_lines() if line.get_linewidth() == 1.8 and len(line.get_xdata())]


def labels_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_no_two_of_twenty_eight_runs_look_alike(tmp_path):
    curve = load_curve(make_run(tmp_path / "run", n_steps=60))
    curves = [curve | {"name": f"run {i}", "path": tmp_path / f"run {i}"} for i in range(28)]
    for n in (7, 8, 28):
        axes = draw_runs(curves[:n]).axes[0]
        drawn = [(line.get_color(), line._dash_pattern) for line in smoothed_lines(axes)]
        points = [(p.get_color(), p.get_marker()) for p in axes.get_lines() if p.get_linestyle() == "None"]
        assert len({repr(look) for look in drawn}) == len(drawn) == n
        assert len(set(points)) == len(points) == n
        legend = axes.get_legend()
        entries = {repr((h.get_color(), h._dash_pattern, h.get_marker())) for h in legend.legend_handles[:n]}
        assert len(entries) == n and len(legend.legend_handles) == n + 1
        assert sum(line.get_alpha() is not None for line in axes.get_lines()) == (n if n <= 7 else 0)


@pytest.mark.parametrize("n", [1, 2, 5, 28])
def test_the_legend_stands_outside_and_fits(tmp_path, n):
    curve = load_curve(make_run(tmp_path / "run", n_steps=60))
    figure = draw_runs([curve | {"name": f"a rather long name {i}", "path": tmp_path / f"{i}"} for i in range(n)])
    figure.canvas.draw()
    axes = figure.axes[0]
    legend, inside = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert not legend.overlaps(inside)
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= legend.y0 and legend.y1 <= figure.bbox.y1
    assert inside.width > 0.5 * figure.bbox.width and inside.height > 0.5 * figure.bbox.height


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/wide", "runs/narrow"], ["wide", "narrow"]),
        (["20261126-194141-gpt2-ab12", "20261126-195000-llama-cd34"], ["194141-gpt2-ab12", "195000-llama-cd34"]),
        (["lr-1e-3", "lr-1e-4", "lr-3e-4"], ["1e-3", "1e-4", "3e-4"]),
        (["wide-1", "wide-2"], ["wide-1", "wide-2"]),  # 1 and 2 alone would say nothing
        (["a/run", "b/run", "other"], ["a/run", "b/run", "other"]),
        (["x/a/run", "y/a/run"], ["x/a/run", "y/a/run"]),
        (["run", "run"], ["run", "run"]),  # the same one twice
        (["run", "run-2"], ["run", "run-2"]),
        (["a" * 50 + "1", "a" * 50 + "2"], ["a" * 16 + "…" + "a" * 18 + "1", "a" * 16 + "…" + "a" * 18 + "2"]),
        (
            ["a" * 20 + "1" + "a" * 40, "a" * 20 + "2" + "a" * 40],
            ["a" * 20 + "1" + "a" * 40, "a" * 20 + "2" + "a" * 40],
        ),
        (["alone-in-here"], ["alone-in-here"]),
    ],
)
def test_the_labels_are_the_shortest_that_tell_runs_apart(paths, labels):
    assert short_labels([Path(path).name for path in paths], paths) == labels


# -- the vertical axis -------------------------------------------------------------------------------------------------


def test_a_spike_is_cut_near_the_uniform_guess_and_told(tmp_path):
    folder = make_run(tmp_path / "run")
    usual = draw_runs([load_curve(folder)]).axes[0]
    assert not usual.texts and math.log(65) < usual.get_ylim()[1] < 1.1 * math.log(65)
    log = EventLog(folder / "events.jsonl")
    log.write(Step(step=201, loss=1234.5, lr=1e-3, grad_norm=1.0, tokens=1024, wall_us=1))
    log.close()
    for y, told in (("loss", "1234"), ("perplexity", "at least 5.541e+34")):
        axes = draw_runs([load_curve(folder)], y=y).axes[0]
        assert [told in text.get_text() for text in axes.texts] == [True]
        top = axes.get_ylim()[1] if y == "loss" else math.log(axes.get_ylim()[1])
        assert math.log(65) < top < 1.1 * math.log(65)
        assert len(axes.get_lines()[-1].get_xdata()) == 2  # the uniform guess is seen


def test_a_curve_far_below_the_uniform_guess_is_not_squeezed(tmp_path):
    curve = load_curve(make_run(tmp_path / "run", vocab_size=49_152, level=2.6, start=3.4))
    for y, low, high in (("loss", 2.2, 3.8), ("perplexity", math.exp(2.2), math.exp(3.8))):
        axes = draw_runs([curve], y=y).axes[0]
        assert low < axes.get_ylim()[0] < axes.get_ylim()[1] < high
        assert labels_of(axes)[-1].startswith("uniform guess, ") and labels_of(axes)[-1].endswith(", above")
        assert not axes.texts  # nothing of the curve is cut


def test_perplexity_and_bits_per_byte(tmp_path):
    curve = load_curve(make_run(tmp_path / "run", corpus={"bytes_per_token": 4.0}))
    loss = draw_runs([curve]).axes[0].get_lines()[0].get_ydata()
    for y, wanted, name in (
        ("perplexity", np.exp(loss), "perplexity"),
        ("bits-per-byte", loss / math.log(2) / 4, "bits per byte"),
    ):
        axes = draw_runs([curve], y=y).axes[0]
        np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), wanted)
        assert axes.get_ylabel() == name and axes.get_yscale() == ("log" if y == "perplexity" else "linear")
        shown = wanted[-1] if y == "loss" else float(axes.get_lines()[2].get_ydata()[-1])
        assert labels_of(axes)[1] == f"validation, last {shown:.3f}"
    assert labels_of(axes)[-1] == f"uniform guess, 1 of 65: {math.log2(65) / 4:.2f}"


@pytest.mark.parametrize(
    ("config", "known"),
    [
        ({"tokenizer": {"kind": "bytes"}}, 1.0),
        ({"tokenizer": {"kind": "char", "characters": "abc"}}, 1.0),
        ({"tokenizer": {"kind": "char", "characters": "abé"}}, None),
        ({"tokenizer": {"kind": "bpe"}}, None),
        ({"tokenizer": {"kind": "bytes"}, "corpus": {"bytes_per_token": 2.5}}, 2.5),
        ({"corpus": {"bytes_per_token": -1}}, None),
        ({"corpus": "text", "tokenizer": None}, None),
        ({"model": {"n_classes": 10}}, None),
    ],
)
def test_where_the_bytes_of_a_token_are_known_from(tmp_path, config, known):
    """Older runs do not say it, but some tokenizers do."""
    curve = load_curve(make_run(tmp_path / "run", **config))
    assert curve["bytes_per_token"] == known
    if known is None:
        with pytest.raises(BadFileError, match="so it has no bits per byte: draw the loss"):
            draw_runs([curve], y="bits-per-byte")
    draw_runs([curve])


def test_a_run_records_how_many_bytes_its_tokens_have(tmp_path, toy_command):
    text = "größer als 3 € " * 60
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    sizes = ["--batch=2", "--context=15", "--d-model=8", "--layers=1", "--heads=2", "--eval-batches=2", "--steps=1"]
    arguments = [f"--corpus={tmp_path / 'text.txt'}", f"--out={tmp_path / 'run'}", "--backend=numpy", *sizes]
    assert toy_command("train", "from-scratch", *arguments)[0] == 0
    wanted = len("größer als 3 € ".encode()) / len("größer als 3 € ")  # every window has the same letters
    assert load_curve(tmp_path / "run")["bytes_per_token"] == pytest.approx(wanted)


# -- toy plot ----------------------------------------------------------------------------------------------------------


def test_toy_plot_passes_its_axes_on_and_tells_the_picture(tmp_path, toy_command, monkeypatch):
    asked = []
    monkeypatch.setattr(plots, "plot_runs", lambda *arguments: asked.append(arguments) or Path("drawn-new.png"))
    code, out, err = toy_command("plot", "a", "b", "--x=tokens", "--y=perplexity", "--out=drawn.png")
    assert (code, out, err) == (0, "drawn-new.png\n", "")
    assert asked == [((Path("a"), Path("b")), Path("drawn.png"), "tokens", "perplexity")]
    _, out, err = toy_command("plot", "a", "--json")
    assert (json.loads(out), err) == ({"picture": "drawn-new.png", "runs": ["a"]}, "")


class Going:
    """A run that goes on by some steps each time somebody waits for it, and ends after `n` times."""

    def __init__(self, folder, n, monkeypatch):
        self.folder, self.left, self.lock = folder, n, only_process(folder)
        self.lock.__enter__()
        self.step = load_steps(folder)
        monkeypatch.setattr(cli_runs.time, "sleep", self.wait)

    def wait(self, seconds):
        if seconds < 1:  # of one who asks for the lock
            return
        log = EventLog(self.folder / "events.jsonl")
        self.step += 1
        log.write(Step(step=self.step, loss=2.0, lr=1e-3, grad_norm=1.0, tokens=1024, wall_us=1))
        log.close()
        self.left -= 1
        if self.left == 0:
            self.lock.__exit__(None, None, None)


def load_steps(folder):
    return sum(b'"step", ' in line for line in (folder / "events.jsonl").read_bytes().splitlines())


@pytest.mark.parametrize("as_json", [False, True])
def test_watching_draws_anew_until_the_run_ends(tmp_path, toy_command, monkeypatch, as_json):
    folder, other = make_run(tmp_path / "run", n_steps=3), make_run(tmp_path / "other", n_steps=2)
    drawn = []
    real = plots.draw_runs
    monkeypatch.setattr(
        plots, "draw_runs", lambda curves, x, y: drawn.append(len(curves[0]["steps"])) or real(curves, x, y)
    )
    Going(folder, 3, monkeypatch)
    picture = tmp_path / "out.png"
    code, out, err = toy_command("plot", folder, other, "--watch", f"--out={picture}", *(["--json"] if as_json else []))
    assert (code, err) == (0, "")
    assert drawn == [3, 4, 5, 6]  # the last one after the end
    assert (json.loads(out)["picture"] if as_json else out.strip()) == str(picture) and out.count("\n") == 1


def test_watching_waits_for_the_first_step_and_ends_by_ctrl_c(tmp_path, toy_command, monkeypatch):
    folder = make_run(tmp_path / "run", n_steps=0)
    going = Going(folder, 99, monkeypatch)
    wait = going.wait

    def press(seconds):
        wait(seconds)
        if seconds >= 1 and going.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli_runs.time, "sleep", press)
    code, out, _ = toy_command("plot", folder, "--watch")
    assert (code, out) == (0, f"{folder / 'loss.png'}\n")
    going.lock.__exit__(None, None, None)
    (folder / "events.jsonl").write_text("")
    code, out, err = toy_command("plot", folder, "--watch")
    assert (code, out) == (2, "") and "no training step yet" in err
    assert toy_command("plot", tmp_path / "nowhere", "--watch")[0] == 2
