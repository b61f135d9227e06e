"""Pictures of runs: one figure with the loss curves of one or several run directories."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toy.files import BadFileError, Run, read_events
from toy.files.atomic import FileInUseError, StrPath, replacing
from toy.files.errors import printable

X_AXES = {"steps": "steps", "tokens": "training tokens", "seconds": "seconds in training steps"}
# Okabe & Ito 2008: eight colours that people with any kind of colour vision can tell apart (without yellow: too light)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MOST_POINTS = 4000  # more are not to be seen, and make an SVG of megabytes


def plot_runs(paths: Iterable[StrPath], out: StrPath, x: str = "steps") -> Path:
    """Draw the runs in the directories `paths` into the file `out` (.png, .svg or .pdf). Returns the path.

    Where a viewer has that picture open and the system does not let it be replaced, it is loss-new.png for loss.png: a run
    must not end for that.

    x: "steps", "tokens" or "seconds". Per run: the training loss, faint, and smoothed; the validation loss as points;
    dashed, the loss ln(V) of a uniform guess.
    Raises ValueError for a wrong `x` or suffix, BadFileError for a directory that is not a run or has no step yet.
    """
    picture = _checked(out)
    return _save(draw_runs([load_curve(path) for path in paths], x), picture)


def _checked(out: StrPath) -> Path:
    """The path of a picture. Raises ValueError for a suffix that is none."""
    if Path(out).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"the picture must be named .png, .svg or .pdf, got {str(out)!r}")
    return Path(out)


def _save(figure: Any, out: Path) -> Path:
    try:
        return _write(figure, out)
    except FileInUseError:
        return _write(figure, out.with_stem(f"{out.stem}-new"))


def _write(figure: Any, out: Path) -> Path:
    with replacing(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:].lower(), dpi=150)
    return out


def draw_runs(curves: Sequence[dict[str, Any]], x: str = "steps") -> Any:
    """The matplotlib Figure of `plot_runs` for curves made by `load_curve`; a notebook shows it as it is."""
    if x not in X_AXES:
        raise ValueError(f"x must be one of {', '.join(X_AXES)}, got {x!r}")
    if not curves:
        raise ValueError("there is nothing to draw: name at least one run")
    # the object interface with its own canvas: no display, no pyplot, no figure that somebody else has open
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        _draw_curve(axes, curve, x, COLOURS[i % len(COLOURS)], curve["name"] if len(curves) > 1 else None)
    for vocab_size in sorted({curve["vocab_size"] for curve in curves}):
        label = f"uniform guess, ln {vocab_size} = {math.log(vocab_size):.2f}"
        axes.axhline(math.log(vocab_size), color="#666666", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel(X_AXES[x])
    axes.set_ylabel(f"loss (nats per {' or '.join(sorted({curve['unit'] for curve in curves}))})")
    if len(curves) == 1:
        axes.set_title(curves[0]["name"], fontsize=10, parse_math=False)
    axes.xaxis.set_major_formatter(_in_thousands if x == "tokens" else "{x:,g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for text in axes.legend(fontsize=9, facecolor="white", edgecolor="none", framealpha=0.9).get_texts():
        text.set_parse_math(False)  # a directory may well have a $ in its name
    return figure


def plot_confusion(counts: npt.ArrayLike, classes: Sequence[str], out: StrPath) -> Path:
    """Draw which classes are taken for which into the file `out` (.png, .svg or .pdf). Returns the path, as `plot_runs`.

    counts: int (n, n), row = what it is, column = what it was taken for. classes: their names. Raises ValueError for counts
    of another shape and a wrong suffix.
    """
    picture = _checked(out)
    return _save(draw_confusion(counts, classes), picture)


def draw_confusion(counts: npt.ArrayLike, classes: Sequence[str]) -> Any:
    """The matplotlib Figure of `plot_confusion`; a notebook shows it as it is."""
    counts, n = np.asarray(counts), len(classes)
    if counts.shape != (n, n) or n == 0:
        raise ValueError(f"counts of {n} classes must have the shape {(n, n)}, got {counts.shape}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = min(3.2 + 0.42 * n, 30)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= 40:  # more numbers could not be read
        for i, j in zip(*np.nonzero(counts)):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{counts[i, j]}", ha="center", va="center", color=colour, fontsize=9)
    names = [name if len(name) <= 20 else name[:19] + "…" for name in classes]
    axes.set_xticks(range(n), names, rotation=90 if max(map(len, names)) > 3 else 0, parse_math=False)
    axes.set_yticks(range(n), names, parse_math=False)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    right, total = int(np.trace(counts)), int(counts.sum())
    axes.set_title(f"{right:,} of {total:,} test images right ({100 * right / max(total, 1):.1f} %)", fontsize=10)
    return figure


def load_curve(path: StrPath) -> dict[str, Any]:
    """The numbers of a run directory as a dict: name, vocab_size, and arrays steps, tokens, seconds, loss (one element a
    training step), val_steps, val_tokens, val_seconds, val_loss (one an evaluation)."""
    run = Run.open(path)
    try:
        model = run.config["model"]
        vocab_size = int(model["vocab_size"] if "vocab_size" in model else model["n_classes"])
        if vocab_size < 1:
            raise ValueError(vocab_size)
    except (KeyError, TypeError, ValueError):
        raise BadFileError(run.config_path, "does not say the size of the vocabulary") from None
    latest = run.latest_checkpoint()  # before the log, which a run that goes on writes first
    events = read_events(run.events_path, reach=0 if latest is None else int(latest.stem.removeprefix("step_")))
    logged = [event["vocab_size"] for event in events if event["kind"] == "run_start" and "vocab_size" in event]
    if logged and vocab_size != logged[-1]:
        raise BadFileError(
            run.config_path, f"says {vocab_size} for the size of the vocabulary, events.jsonl says {logged[-1]!r}"
        )
    steps = [event for event in events if event["kind"] == "step"]
    evals = [event for event in events if event["kind"] == "eval"]
    if not steps:
        raise BadFileError(run.events_path, "has no training step yet: there is nothing to draw")
    curve: dict[str, Any] = {
        "name": printable(os.fsencode(run.folder.resolve().name).decode(errors="replace")),
        "vocab_size": vocab_size,
        "unit": "token" if "vocab_size" in model else "image",
        "steps": np.array([event["step"] for event in steps]),
        "tokens": np.cumsum([event["tokens"] for event in steps]),
        "seconds": np.cumsum([event["wall_us"] for event in steps]) / 1e6,
        "loss": np.array([event["loss"] for event in steps]),
        "val_steps": np.array([event["step"] for event in evals], dtype=int),
        "val_loss": np.array([event["loss"] for event in evals], dtype=float),
    }
    for name in ("tokens", "seconds"):  # an evaluation stands where the training was at that step
        curve[f"val_{name}"] = np.interp(curve["val_steps"], np.append(0, curve["steps"]), np.append(0, curve[name]))
    return curve


def smooth(values, span):
    """The running mean of about `span` values around each one, twice (that rounds its corners).

    It looks to both sides, and near the beginning no farther ahead than back: a loss that falls steeply is followed
    closely there, where an exponential mean would lag behind it.
    """
    half = int(span // 2)
    places = np.arange(len(values))
    low = np.maximum(places - half, 0)
    high = np.minimum(places + np.minimum(half, places), len(values) - 1) + 1
    for _ in range(2):
        sums = np.append(0.0, np.cumsum(values, dtype=np.float64))
        values = (sums[high] - sums[low]) / (high - low)
    return values


def _draw_curve(axes, curve, x, colour, name):
    prefix = f"{name}, " if name else ""
    if prefix.startswith("_"):
        prefix = " " + prefix  # matplotlib hides labels with a leading underscore
    stride = max(1, len(curve["loss"]) // _MOST_POINTS)
    smoothed = smooth(curve["loss"], span=len(curve["loss"]) / 40)
    axes.plot(curve[x][::stride], curve["loss"][::stride], color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(curve[x][::stride], smoothed[::stride], color=colour, linewidth=1.8, label=f"{prefix}training")
    if len(curve["val_loss"]):
        label = f"{prefix}validation, last {curve['val_loss'][-1]:.3f}"
        axes.plot(
            curve[f"val_{x}"], curve["val_loss"], "o", color=colour, markeredgecolor="white", markersize=6, label=label
        )


def _in_thousands(value, _position):
    for unit, suffix in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
