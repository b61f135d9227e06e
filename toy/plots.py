"""Pictures of runs: one figure with the loss curves of one or several run directories."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toy.files import BadFileError, Run, read_events
from toy.files.atomic import FileInUseError, StrPath, replacing
from toy.files.errors import printable

X_AXES = {"steps": "steps", "tokens": "training tokens", "seconds": "seconds in training steps"}
Y_AXES = {"loss": "loss (nats per {unit})", "perplexity": "perplexity", "bits-per-byte": "bits per byte"}
# Okabe & Ito 2008: eight colours that people with any kind of colour vision can tell apart (without yellow: too light)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# past seven runs the colours come again, with another dash and another marker: 28 styles
DASHES: tuple[Any, ...] = ("solid", (0, (7, 1.5)), (0, (2.2, 1.2)), (0, (7, 1.5, 1.5, 1.5)))
MARKERS = ("o", "s", "^", "D")
_MOST_POINTS = 4000  # more are not to be seen, and make an SVG of megabytes
_ONE_LINE_EACH = 4  # from so many runs on the legend has one entry for each, not two
_ABOVE_UNIFORM = 1.06  # how far above a uniform guess the picture reaches; what is higher is cut
_FAR_BELOW = 0.6  # of the loss of a uniform guess: a curve below all the time is not squeezed for the sake of that line
_MOST_NATS = 80.0  # whose perplexity is told
_LONGEST_LABEL, _LEAST_LABEL = 36, 3  # characters


class NoStepsError(BadFileError):
    """A run has no training step yet."""


def plot_runs(paths: Iterable[StrPath], out: StrPath, x: str = "steps", y: str = "loss") -> Path:
    """Draw the runs in the directories `paths` into the file `out` (.png, .svg or .pdf). Returns the path.

    Where a viewer has that picture open and the system does not let it be replaced, it is loss-new.png for loss.png: a run
    must not end for that.

    x: "steps", "tokens" or "seconds". y: "loss", "perplexity" or "bits-per-byte". Per run: the training loss, faint (not of
    more than seven), and smoothed; the validation loss as points; dashed and grey, a uniform guess: ln(V) nats. The picture
    ends a little above it, and where something is cut it says so.
    Raises ValueError for a wrong `x`, `y` or suffix, BadFileError for a directory that is not a run, has no step yet, or,
    with bits-per-byte, does not say how many bytes a token has.
    """
    picture = _checked(out)
    return _save(draw_runs([load_curve(path) for path in paths], x, y), picture)


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


def draw_runs(curves: Sequence[dict[str, Any]], x: str = "steps", y: str = "loss") -> Any:
    """The matplotlib Figure of `plot_runs` for curves made by `load_curve`; a notebook shows it as it is."""
    if x not in X_AXES:
        raise ValueError(f"x must be one of {', '.join(X_AXES)}, got {x!r}")
    if y not in Y_AXES:
        raise ValueError(f"y must be one of {', '.join(Y_AXES)}, got {y!r}")
    if not curves:
        raise ValueError("there is nothing to draw: name at least one run")
    # the object interface with its own canvas: no display, no pyplot, no figure that somebody else has open
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures, several = [_measure(curve, y) for curve in curves], len(curves) > 1
    n_entries = 2 * len(curves) if len(curves) < _ONE_LINE_EACH else len(curves)
    # with several runs the legend stands beside the axes and gets room of its own
    figure = Figure(figsize=(10.5, max(4.8, 0.235 * (n_entries + 3))) if several else (8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = short_labels([curve["name"] for curve in curves], [curve["path"] for curve in curves])
    for i, (curve, measure) in enumerate(zip(curves, measures)):
        _draw_curve(axes, curve, x, measure, i, labels[i] if several else None, len(curves))
    if y == "perplexity":
        axes.set_yscale("log")
    uniform = {(c["vocab_size"], float(measure(math.log(c["vocab_size"])))) for c, measure in zip(curves, measures)}
    _set_ends(axes, curves, measures, max(height for _, height in uniform))
    for vocab_size, height in sorted(uniform):
        label = f"uniform guess, {_uniform_in_words(y, vocab_size, height)}"
        if height > axes.get_ylim()[1]:  # an entry of the legend without a line
            axes.plot([], [], color="#666666", linestyle="--", linewidth=1, label=f"{label}, above")
        else:
            axes.axhline(height, color="#666666", linestyle="--", linewidth=1, label=label)
    axes.set_xlabel(X_AXES[x])
    axes.set_ylabel(Y_AXES[y].format(unit=" or ".join(sorted({curve["unit"] for curve in curves}))))
    if not several:
        axes.set_title(curves[0]["name"], fontsize=10, parse_math=False)
    axes.xaxis.set_major_formatter(_in_thousands if x == "tokens" else "{x:,g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="both", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "ncols": 3}
    if several:
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    legend = axes.legend(fontsize=9, frameon=False, handlelength=3.2, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a directory may well have a $ in its name
    return figure


def _measure(curve: dict[str, Any], y: str) -> Any:
    """What makes numbers of this axis out of a loss in nats (a number or an array)."""
    if y == "loss":
        return lambda loss: loss
    if y == "perplexity":
        return lambda loss: np.exp(np.minimum(loss, _MOST_NATS))
    bytes_per_token = curve["bytes_per_token"]
    if not bytes_per_token:
        problem = (
            "is of a model of images" if curve["unit"] == "image" else "does not say how many bytes its tokens have"
        )
        raise BadFileError(curve["path"], f"{problem}, so it has no bits per byte: draw the loss")
    return lambda loss: loss / math.log(2) / bytes_per_token


def _uniform_in_words(y: str, vocab_size: int, height: float) -> str:
    if y == "loss":
        return f"ln {vocab_size} = {height:.2f}"
    return f"1 of {vocab_size}" if y == "perplexity" else f"1 of {vocab_size}: {height:.2f}"


def _set_ends(axes: Any, curves: Sequence[dict[str, Any]], measures: Sequence[Any], uniform: float) -> None:
    """End the vertical axis a little above a uniform guess, or above the curves where they are far below it all the time."""
    axes.margins(x=0.02)
    pairs = [(np.append(_drawn(c, len(curves)), c["val_loss"]), measure) for c, measure in zip(curves, measures)]
    highest = max(float(measure(losses.max())) for losses, measure in pairs)
    lowest = min(float(measure(losses.min())) for losses, measure in pairs)
    # in perplexity the axis is logarithmic, and its distances are those of the loss
    is_log = axes.get_yscale() == "log"
    low, high, guess = (math.log(value) if is_log else value for value in (lowest, highest, uniform))
    far_below = high < _FAR_BELOW * guess
    # low: a loss that is above a uniform guess all the time
    top = high if far_below else max(_ABOVE_UNIFORM * guess, low)
    margin = 0.05 * (top - low) or max(1.0, 0.001 * abs(top))
    ends = low - margin, top + margin if far_below or top == low else top
    axes.set_ylim(*(math.exp(end) if is_log else end for end in ends))
    if is_log:
        from matplotlib.ticker import LogLocator

        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        is_short = ends[1] - ends[0] < math.log(10)
        axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if is_short else (2.0, 5.0)))
    if high > ends[1]:
        more = "at least " if is_log and high >= _MOST_NATS else ""
        axes.annotate(
            f"cut: the highest value is {more}{highest:.4g}", (0.995, 0.985), xycoords="axes fraction", ha="right", va="top",
            fontsize=8, color="#666666",
        )  # fmt: skip


def _drawn(curve: dict[str, Any], n_curves: int) -> npt.NDArray[Any]:
    """The training losses that are to be seen: of many curves the smoothed ones alone."""
    return curve["loss"] if n_curves <= len(COLOURS) else smooth(curve["loss"], span=len(curve["loss"]) / 40)


def short_labels(names: Sequence[str], paths: Sequence[StrPath] = ()) -> list[str]:
    """The shortest ends of the names that tell them apart, cut where a word begins; equal names get folders before them.

    names: of run directories. paths: theirs, for folders to put before equal names. A label has at least three characters,
    unless the name is shorter, and at most 36: of a longer one the middle is left out.
    """
    parts = [Path(path).resolve().parts[1:] if path else (name,) for name, path in zip(names, paths or names)]
    labels = dict(zip(parts, names))  # a run that is there twice has one label
    for depth in range(2, max(map(len, parts), default=0) + 1):
        told = list(labels.values())
        for path, label in labels.items():
            if told.count(label) > 1:
                labels[path] = "/".join(path[-depth:])
    texts = list(labels.values())
    if len(texts) > 1:
        n_shared = next((i for i, c in enumerate(zip(*texts)) if len(set(c)) > 1), min(map(len, texts)))
        begins = [match.end() for match in re.finditer(r"[-_/]", texts[0][:n_shared])]
        cut = max((at for at in begins if min(map(len, texts)) - at >= _LEAST_LABEL), default=0)
        texts = [text[cut:] for text in texts]
    short = [text if len(text) <= _LONGEST_LABEL else f"{text[:16]}…{text[-19:]}" for text in texts]
    labels = dict(zip(labels, short if len(set(short)) == len(short) else texts))
    return [labels[path] for path in parts]


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


def lesson_style() -> None:
    """How the pictures of the lessons look: one font size, colours that everybody can tell apart, 160 dots per inch.

    Sets matplotlib's defaults. In a notebook pictures get twice the dots of the size at which they are shown.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "font.size": 13,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "lines.linewidth": 2.5,
            "axes.prop_cycle": plt.cycler(color=COLOURS[:-1]),
        }
    )
    if "inline" in plt.get_backend():  # a notebook, so that IPython's package is there
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def load_curve(path: StrPath) -> dict[str, Any]:
    """The numbers of a run directory as a dict: name, path, vocab_size, unit ("token" or "image"), bytes_per_token (None
    where nothing says it), and arrays steps, tokens, seconds, loss (one element a training step), val_steps, val_tokens,
    val_seconds, val_loss (one an evaluation)."""
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
    bytes_per_token = _bytes_per_token(run.config)
    said = {
        "vocab_size": ("the size of the vocabulary", vocab_size),
        "bytes_per_token": ("the bytes of a token", bytes_per_token),
    }
    for name, (what, number) in said.items():
        logged = [event[name] for event in events if event["kind"] == "run_start" and event.get(name) is not None]
        if logged and number != logged[-1]:
            raise BadFileError(run.config_path, f"says {number} for {what}, events.jsonl says {logged[-1]!r}")
    steps = [event for event in events if event["kind"] == "step"]
    evals = [event for event in events if event["kind"] == "eval"]
    if not steps:
        raise NoStepsError(run.events_path, "has no training step yet: there is nothing to draw")
    curve: dict[str, Any] = {
        "name": printable(os.fsencode(run.folder.resolve().name).decode(errors="replace")),
        "path": run.folder,
        "bytes_per_token": bytes_per_token,
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


def _bytes_per_token(config: dict[str, Any]) -> float | None:
    """How many bytes of text a token stands for on average, None where the config does not say it.

    Runs that were begun before it was recorded say it by their tokenizer: a byte, or characters of one byte each.
    """
    corpus, tokenizer = config.get("corpus"), config.get("tokenizer")
    said = corpus.get("bytes_per_token") if isinstance(corpus, dict) else None
    if isinstance(said, (int, float)) and 0 < said < math.inf:
        return float(said)
    if not isinstance(tokenizer, dict):
        return None
    kind, characters = tokenizer.get("kind"), str(tokenizer.get("characters"))
    return 1.0 if kind == "bytes" or (kind == "char" and characters.isascii()) else None


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


def _draw_curve(axes, curve, x, measure, i, name, n_curves):
    """The i-th of the curves. name: None when there is but one."""
    one_entry = n_curves >= _ONE_LINE_EACH  # of the legend, not two
    colour, round_ = COLOURS[i % len(COLOURS)], i // len(COLOURS) % len(DASHES)
    prefix = f"{name}, " if name else ""
    if prefix.startswith("_"):
        prefix = " " + prefix  # matplotlib hides labels with a leading underscore
    stride = max(1, len(curve["loss"]) // _MOST_POINTS)
    places, smoothed = curve[x][::stride], smooth(curve["loss"], span=len(curve["loss"]) / 40)[::stride]
    last = f"validation, last {float(measure(curve['val_loss'][-1])):.3f}" if len(curve["val_loss"]) else ""
    label = (
        f"{prefix}{last.removeprefix('validation, ')}".removesuffix(", ")
        if one_entry
        else f"{prefix}training, smoothed"
    )
    line = {"color": colour, "linestyle": DASHES[round_], "linewidth": 1.8}
    point = {"color": colour, "marker": MARKERS[round_], "markeredgecolor": "white", "markersize": 6}
    if n_curves <= len(COLOURS):  # of more the faint lines would be a fog
        alpha = 0.12 if one_entry else 0.25
        axes.plot(places, measure(curve["loss"][::stride]), color=colour, alpha=alpha, linewidth=0.8)
    axes.plot(places, measure(smoothed), label=None if one_entry else label, **line)
    if last:
        label_of_points = None if one_entry else prefix + last
        axes.plot(curve[f"val_{x}"], measure(curve["val_loss"]), label=label_of_points, **point, linestyle="none")
    if one_entry:  # line and point together, as they are seen
        axes.plot([], [], label=label, **line | point)


def _in_thousands(value, _position):
    for unit, suffix in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{suffix}"
    return f"{value:g}"
