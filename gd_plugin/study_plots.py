"""Pictures of a study: training loss with bands, accuracy against ECE, reliability diagrams, a map of warm-ups."""

from __future__ import annotations

import math
import os

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from .plots import COLOURS, layout, legend, line_style, percent, plot_reliability, save, wrap
from .stats import Method, StudyResults

__all__ = ["plot_accuracy_ece", "plot_loss", "plot_study_reliability", "plot_warmup"]

_FAMILIES = ("fixed beta", "warm-up", "other loss")
_BASELINE = {"color": "black", "linestyle": "-", "linewidth": 2}
_NUM_COLOURS = len(COLOURS) - 1  # the last one, black, is the baseline's


def plot_loss(study: StudyResults, path: str | os.PathLike) -> None:
    """Plain training cross-entropy against the epoch: mean and, as a band, smallest to largest over the seeds.

    One panel per family of methods, and the baseline in black in each of them.

    Raises:
        ValueError: no method has a training curve, or another suffix than .png or .svg.
    """
    families = [(family, _of(study, family)) for family in _FAMILIES]
    families = [(family, methods) for family, methods in families if methods] or [("", [])]
    curves = {method.name: _curve(method) for method in study.methods}
    if not any(len(curve) for curve in curves.values()):
        raise ValueError(f"{path}: nothing to draw, no record has a training curve; train for at least one epoch")
    rows = len(families)
    names = [[wrap(method.name) for method in [study.baseline, *methods]] for _, methods in families]
    lines = max("\n".join(group).count("\n") + 1 for group in names)  # of the longest legend
    figure = Figure(figsize=(8.4, max(3.4, 0.8 + 0.2 * lines) * rows), layout=layout())
    for place, (family, methods) in enumerate(families, 1):
        axes = figure.add_subplot(rows, 1, place)
        handles, labels = [], []
        for i, method in enumerate([study.baseline, *methods]):
            curve = curves[method.name]
            if not len(curve):
                continue
            epoch, mean, low, high = curve.T
            style = _BASELINE if i == 0 else _style(study.methods.index(method) - 1)  # as in `plot_accuracy_ece`
            handles += axes.plot(epoch, mean, **style)
            labels.append(names[place - 1][i])
            axes.fill_between(epoch, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_title(f"Training cross-entropy, {family} (lower is better)", fontsize=10.5)
        axes.set(xlabel="epoch", ylabel="nats, mean and range of seeds")
        drawn = np.concatenate([curve[:, 2:] for curve in curves.values() if len(curve)])
        if drawn.min() > 0 and drawn.max() > 10 * drawn.min():  # within a decade a log axis has odd labels
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
        # Given by hand: matplotlib shows no label of its own accord that begins with an underscore.
        box = axes.legend(handles, labels, fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
        for text in box.get_texts():
            text.set_parse_math(False)
    save(figure, path)


def plot_accuracy_ece(study: StudyResults, path: str | os.PathLike) -> None:
    """Accuracy against ECE (log scale) of every method: mean and standard deviation over the seeds.

    The scale is linear where a method has an ECE of 0.

    Raises:
        ValueError: no method has both, or another suffix than .png or .svg.
    """
    figure = Figure(figsize=(8.4, 6.2), layout=layout())
    axes = figure.add_subplot()
    handles, labels, least = [], [], math.inf
    for i, method in enumerate(study.methods):
        accuracy, ece = method.summaries["accuracy"], method.summaries["ece"]
        if not (accuracy.n and ece.n):
            continue
        colour = "black" if i == 0 else _style(i - 1)["color"]
        marker = {"fixed beta": "o", "warm-up": "^", "other loss": "s"}[method.family]
        # A method of its own colour and shape: neighbours share one of the two at most.
        face = "white" if i and (i - 1) // _NUM_COLOURS % 2 else colour
        axes.errorbar(
            ece.mean, accuracy.mean, xerr=_finite(ece.sd), yerr=_finite(accuracy.sd), marker=marker, color=colour,
            markerfacecolor=face, markersize=7, linestyle="", elinewidth=0.8, capsize=2,
        )  # fmt: skip
        handles.append(Line2D([], [], marker=marker, color=colour, markerfacecolor=face, linestyle=""))
        labels.append(method.name)
        least = min(least, ece.mean)
    if not handles:
        raise ValueError(f"{path}: nothing to draw, no run has an accuracy and an ECE")
    title = wrap(f"{study.dataset}, {study.tested_on}: mean ± deviation over the seeds (best is top left)", 90)
    axes.set_title(title, fontsize=10.5, parse_math=False)
    axes.set(xlabel="ECE", ylabel="accuracy")
    if least > 0:
        axes.set(xlabel="ECE (log scale)", xscale="log")
        low, high = axes.get_xlim()
        # As many labels between the powers of ten as there is room for.
        axes.xaxis.set_minor_locator(LogLocator(subs=range(2, 10) if high < 4 * low else (2, 5)))
        axes.xaxis.set_minor_formatter(percent if high < 1000 * low else NullFormatter())
        axes.tick_params(axis="x", which="minor", labelsize=8)
    axes.xaxis.set_major_formatter(percent)
    axes.yaxis.set_major_formatter(percent)
    axes.grid(alpha=0.3)
    legend(figure, handles, labels)
    save(figure, path)


def plot_study_reliability(study: StudyResults, path: str | os.PathLike) -> None:
    """`gd_plugin.plots.plot_reliability` of every method, its seeds pooled.

    Raises:
        ValueError: no record has a reliability diagram, or another suffix than .png or .svg.
    """
    plot_reliability([_pooled(method) for method in study.methods], path)


def plot_warmup(study: StudyResults, path: str | os.PathLike) -> None:
    """Mean ECE and accuracy of the linear warm-ups to the most frequent final beta, by their start and length.

    The column of length 0 is that beta without warm-up.

    Raises:
        ValueError: fewer than two such warm-ups, or another suffix than .png or .svg.
    """
    linear = [m for m in _of(study, "warm-up") if m.gd["schedule"] == "linear" and m.gd["warmup_ratio"]]
    linear = [m for m in linear if isinstance(m.gd["beta"], float) and isinstance(m.gd["beta_start"], float)]
    ends = [m.gd["beta"] for m in linear]
    end = max(ends, key=ends.count, default=None)
    linear = [m for m in linear if m.gd["beta"] == end]
    if len(linear) < 2:
        raise ValueError(f"{path.name} is left out: the study has no two linear warm-ups to the same beta")
    fixed = [m for m in study.methods if m.family == "fixed beta" and m.gd["beta"] == end]
    starts = sorted({m.gd["beta_start"] for m in linear})
    lengths = sorted({m.gd["warmup_ratio"] for m in linear} | ({0.0} if fixed else set()))
    figure = Figure(figsize=(8.4, 1.6 + 0.8 * len(starts)), layout=layout())
    for place, (key, title) in enumerate((("ece", "ECE"), ("accuracy", "accuracy")), 1):
        table = np.full((len(starts), len(lengths)), math.nan)
        for row, start in enumerate(starts):
            for column, length in enumerate(lengths):
                at = fixed if length == 0 else [
                    m for m in linear if (m.gd["beta_start"], m.gd["warmup_ratio"]) == (start, length)
                ]  # fmt: skip
                if at:
                    table[row, column] = at[0].summaries[key].mean
        axes = figure.add_subplot(1, 2, place)
        picture = axes.imshow(table, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if not math.isnan(value):
                light = picture.norm(value) > 0.6
                axes.text(
                    column, row, f"{100 * value:.2f}%", ha="center", va="center", color="black" if light else "white"
                )
        axes.set_title(f"{title}, warm-up to {end:g}", fontsize=10.5)
        axes.set_xticks(range(len(lengths)), [f"{100 * length:g}%" for length in lengths])
        axes.set_yticks(range(len(starts)), [f"{start:g}" for start in starts])
        axes.set(xlabel="length of the warm-up", ylabel="beta at the start")
    save(figure, path)


def _style(i: int) -> dict:
    """Of the i-th method after the baseline."""
    turn, place = divmod(i, _NUM_COLOURS)
    return line_style(turn * len(COLOURS) + place) | {"markersize": 0}


def _of(study: StudyResults, family: str) -> list[Method]:
    return [method for method in study.methods[1:] if method.family == family]


def _curve(method: Method) -> np.ndarray:
    """(epochs, 4): epoch; mean, smallest and largest training cross-entropy; of epochs that all seeds have."""
    by_epoch: dict[float, list[float]] = {}
    for record in method.records.values():
        for entry in record["epochs"]:
            if entry.get("cross_entropy") is not None:
                by_epoch.setdefault(entry["epoch"], []).append(entry["cross_entropy"])
    rows = [
        (epoch, np.mean(values), min(values), max(values))
        for epoch, values in sorted(by_epoch.items())
        if len(values) == len(method.records)
    ]
    return np.array(rows).reshape(-1, 4)


def _pooled(method: Method) -> dict:
    """What `plot_reliability` reads of a record, over all seeds."""
    diagrams = [record["reliability"] for record in method.records.values() if record.get("reliability")]
    pooled = []
    for bins in zip(*diagrams, strict=False):
        count = sum(b["count"] for b in bins)
        mean = {
            key: sum(b[key] * b["count"] for b in bins if b["count"]) / count if count else None
            for key in ("confidence", "accuracy")
        }
        pooled.append({"lower": bins[0]["lower"], "upper": bins[0]["upper"], "count": count, **mean})
    final = {key: method.summaries[key].mean for key in ("accuracy", "ece", "confidence_gap")}
    final = {key: None if math.isnan(value) else value for key, value in final.items()}
    return {"name": method.name, "reliability": pooled, "final": final}


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
