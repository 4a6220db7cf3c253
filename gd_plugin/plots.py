"""Pictures of run records: training curves and reliability diagrams; and what `study_plots` draws with.

Figures are built without pyplot: no display is needed, and no global state or open figure is left behind.
"""

from __future__ import annotations

import io
import os
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from .markdown import one_line
from .record import write_atomic

__all__ = ["plot_curves", "plot_reliability"]

# Okabe and Ito's colours, told apart with any colour vision, without the yellow that is too pale for a line. From the
# eighth record on they repeat with another line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")
# The bars of a reliability diagram, which hatches tell apart without colours too.
_ACCURACY = {"facecolor": "#56B4E9", "edgecolor": "white", "linewidth": 0.5}
_OVERCONFIDENT = {"facecolor": "#F6D9C9", "edgecolor": "#D55E00", "linewidth": 0.5, "hatch": "////"}
_UNDERCONFIDENT = {"facecolor": "#56B4E9", "edgecolor": "#003F66", "linewidth": 0.5, "hatch": "...."}
_FEW = 10  # a bin of fewer samples is drawn pale: its accuracy is chance
_DIAGONAL = {"color": "black", "linestyle": "--", "linewidth": 1}

# Title, label of y; then where the curve lies: the part of the record, the key of x, the keys of y (the first found).
_PANELS = (
    ("Training cross-entropy (lower is better)", "nats", "epochs", "epoch", ("cross_entropy",)),
    ("Training loss (below 0 is normal for β < 1)", "nats", "epochs", "epoch", ("loss",)),
    ("Gradient-decay coefficient (log scale)", "β", "log", "step", ("gd_beta",)),
    ("Validation accuracy (higher is better)", "", "epochs", "epoch", ("eval_accuracy",)),
    ("Validation NLL (lower is better)", "nats", "epochs", "epoch", ("eval_nll", "eval_loss")),
    ("Validation ECE (lower is better)", "", "epochs", "epoch", ("eval_ece",)),
)


def plot_curves(records: list[dict], path: str | os.PathLike) -> None:
    """Draw the training curves of some runs into one picture, one colour per record.

    Panels: training cross-entropy (plain, so comparable across beta), training loss (the gradient-decay loss), beta,
    and validation accuracy, NLL and ECE. A panel for which no record has data is left out.

    Args:
        records: as from `gd_plugin.record.read_record`; ``name``, ``epochs`` and ``log`` are read.
        path: ends in .png or .svg; written whole or not at all.

    Raises:
        ValueError: another suffix, or no record with a curve.
        OSError: as `gd_plugin.record.write_atomic`.
    """
    panels = [(panel, [_curve(record, *panel[2:]) for record in records]) for panel in _PANELS]
    panels = [(panel, curves) for panel, curves in panels if any(curves)]
    if not panels:
        raise ValueError(f"{path}: nothing to draw, no record has a curve; train for at least one epoch")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * max(columns, 1.3), 3.1 * rows + 0.3), layout=layout())
    for place, (panel, curves) in enumerate(panels, 1):
        _draw_curves(figure.add_subplot(rows, columns, place), panel, curves)
    legend(
        figure, [Line2D([], [], **line_style(i)) for i in range(len(records))], [record["name"] for record in records]
    )
    save(figure, path)


def plot_reliability(records: list[dict], path: str | os.PathLike) -> None:
    """Draw one reliability diagram per record, side by side, with the share of samples per confidence bin below it.

    The bars are the accuracy of a bin. What lies between a bar and the bin's mean confidence is its contribution to
    the ECE (Guo et al. 2017, arXiv 1706.04599); a signed gap above 0 % is overconfidence.

    Args:
        records: as from `gd_plugin.record.read_record`; ``name``, ``reliability`` (as from
            `gd_plugin.metrics.ClassificationMetrics.reliability`) and ``final`` are read. Those without
            ``reliability`` are left out.
        path: ends in .png or .svg; written whole or not at all.

    Raises:
        ValueError: another suffix, or no record with a reliability diagram.
        OSError: as `gd_plugin.record.write_atomic`.
    """
    records = [record for record in records if record.get("reliability")]
    if not records:
        raise ValueError(f"{path}: nothing to draw, no record has 'reliability'; give records of classification runs")
    columns = min(4, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(3.3 * max(columns, 1.5), 4.2 * rows + 0.3), layout=layout())
    axes = figure.subplots(2 * rows, columns, squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1] * rows)
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        diagram, histogram = axes[2 * row : 2 * row + 2, column]
        if place >= len(records):
            diagram.remove()
            histogram.remove()
            continue
        _draw_reliability(diagram, histogram, records[place])
        if column == 0:
            diagram.set_ylabel("accuracy")
            histogram.set_ylabel("samples")
    entries = {
        "accuracy": Patch(**_ACCURACY),
        "overconfident by": Patch(**_OVERCONFIDENT),
        "underconfident by": Patch(**_UNDERCONFIDENT),
        f"pale: fewer than {_FEW} samples": Patch(facecolor="none", edgecolor="none"),
        "perfect calibration": Line2D([], [], **_DIAGONAL),
    }
    legend(figure, list(entries.values()), list(entries))
    save(figure, path)


def _curve(record: dict, part: str, x: str, keys: tuple[str, ...]) -> list[tuple[float, float]]:
    """The points of a curve; an entry without x or y (an evaluation before training, a null) has none."""
    for key in keys:
        entries = [(entry.get(x), entry.get(key)) for entry in record.get(part) or ()]
        points = [point for point in entries if None not in point]
        if points:
            return points
    return []


def _draw_curves(axes: Axes, panel: tuple, curves: list[list[tuple[float, float]]]) -> None:
    title, y_label, part, x, keys = panel
    for i, points in enumerate(curves):
        # A marker shows a curve of one point too; a log has too many.
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], marker="" if len(points) > 30 else "o", **line_style(i)
        )
    axes.set_title(title, fontsize=10.5)
    axes.set(xlabel="optimizer step" if x == "step" else x, ylabel=y_label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.grid(alpha=0.3)
    if part == "log":
        _log_scale(axes, [y for points in curves for _, y in points])
    if keys[0] in ("eval_accuracy", "eval_ece"):
        axes.yaxis.set_major_formatter(percent)


def _log_scale(axes: Axes, values: list[float]) -> None:
    """A log y axis with plain numbers, readable too where beta never changes."""
    low, high = min(values), max(values)
    # At least a decade: below that a log locator falls back to evenly spaced, odd numbers.
    margin = 1.5 if high > 5 * low else 4
    axes.set_yscale("log")
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_reliability(diagram: Axes, histogram: Axes, record: dict) -> None:
    bins = [b for b in record["reliability"] if b["count"]]
    left, width = [b["lower"] for b in bins], [b["upper"] - b["lower"] for b in bins]
    accuracy, confidence = [b["accuracy"] for b in bins], [b["confidence"] for b in bins]
    total = sum(b["count"] for b in bins)

    for low, size, a, c, b in zip(left, width, accuracy, confidence, bins, strict=True):
        alpha = 1.0 if b["count"] >= _FEW else 0.3
        diagram.bar(low, a, size, align="edge", alpha=alpha, **_ACCURACY)
        diagram.bar(low, c - a, size, a, align="edge", alpha=alpha, **(_OVERCONFIDENT if c > a else _UNDERCONFIDENT))
    diagram.plot([0, 1], [0, 1], **_DIAGONAL)
    diagram.set(xlim=(0, 1), ylim=(0, 1))
    title = [wrap(record["name"]), *_final_metrics(record.get("final") or {})]
    diagram.set_title("\n".join(title), fontsize=9.5, parse_math=False)

    histogram.bar(left, [b["count"] / total for b in bins], width, align="edge", color="0.5", edgecolor="white")
    histogram.set(xlabel="confidence", xticks=(0, 0.25, 0.5, 0.75, 1), xticklabels=("0", "0.25", "0.5", "0.75", "1"))
    histogram.yaxis.set_major_formatter(percent)
    histogram.tick_params(labelbottom=True)


def _final_metrics(final: dict) -> list[str]:
    """Lines for those of the final metrics that are there; a null is a metric without a finite value."""
    forms = {"accuracy": "accuracy {:.1%}", "ece": "ECE {:.1%}", "confidence_gap": "confidence gap {:+.1%}"}
    accuracy, ece, gap = (form.format(final[k]) if final.get(k) is not None else "" for k, form in forms.items())
    return [line for line in (", ".join(filter(None, (accuracy, ece))), gap) if line]


def line_style(i: int) -> dict:
    """Of the i-th record in a picture."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": _LINE_STYLES[i // len(COLOURS) % len(_LINE_STYLES)],
        "linewidth": 1.6,
        "markersize": 3,
    }


def percent(value: float, _) -> str:
    """A label of an axis of fractions."""
    return f"{100 * value:.4g}%"


def wrap(name: str, width: int = 40) -> str:
    """A name of any length, in lines of so many characters, of which the picture has room for some."""
    return "\n".join(textwrap.wrap(one_line(name), width, max_lines=8, placeholder=" ..."))


def legend(figure: Figure, handles: list, labels: list[str]) -> None:
    """A legend below all panels, where it covers no data."""
    labels = [wrap(label) for label in labels]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 12 / (longest + 6))))
    box = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5)
    for text in box.get_texts():
        text.set_parse_math(False)  # a name is other people's text: its dollar signs are no mathematics


def layout() -> ConstrainedLayoutEngine:
    """With room between the panels."""
    return ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)  # inches


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as .png or .svg, whole or not at all. Raises ``ValueError`` for another suffix."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: pictures are written as .png or .svg; give the file one of these suffixes")
    picture = io.BytesIO()
    # The same bytes from the same records: an SVG otherwise holds the date and random names.
    with matplotlib.rc_context({"svg.hashsalt": "gd_plugin"}):
        figure.savefig(picture, format=suffix[1:], dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
    write_atomic(path, picture.getvalue())
