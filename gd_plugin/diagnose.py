"""`gd-plugin diagnose`: the paper's other claims, measured on runs that were traced while they trained.

1. Curriculum: with a small beta easy samples are convinced first and hard ones only then.
2. Features: with a small beta classes are tighter and further apart.
3. Smoothness: beta acts through the local Lipschitz constant of the loss.

Each draws a picture and ends in one line that says whether the claim held here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from .parser import Parser
from .plots import layout, legend, line_style, save, wrap
from .record import family, read_record, write_json
from .terminal import Console
from .trace import read_trace

__all__ = ["main"]

_CONVINCED = 0.9  # a sample counts as learned in the first epoch from which on its label's probability stays above
_GROUPS = ("easy", "medium", "hard")


@dataclass
class Traced:
    name: str
    beta: float  # of a fixed one, else NaN
    fixed: bool  # no warm-up, no other loss, one number for all classes
    seed: int
    trace: dict[str, np.ndarray]


def main(argv: list[str]) -> int:
    """Run ``gd-plugin diagnose`` with the words after the command, and return its exit code.

    Raises:
        ValueError: a folder without traced runs, or without a reference; one line.
        OSError: the folder cannot be written to.
    """
    parser = Parser(
        prog="gd-plugin diagnose",
        description="Measures the claims about curriculum, features and smoothness on runs that were trained with "
        "--trace_samples, for instance by `gd-plugin train digits_traced`. Needs at least two fixed betas, and a run "
        "with beta 1 as the reference for what is easy, if possible one of another seed. Writes curriculum.png, "
        "features.png, smoothness.png and diagnosis.json into the folder.",
    )
    parser.add_argument("folder", type=Path, metavar="RUNS", help="output folder of gd-plugin train with several runs")
    folder = parser.parse_args(argv).folder
    runs = [_read(path.parent) for path in sorted(folder.glob("*/record.json"))]
    if not runs:
        raise ValueError(f"{folder} holds no runs; give the output folder of gd-plugin train with several runs")
    fixed = sorted((run for run in runs if run.fixed), key=lambda run: run.beta)
    reference = _reference(fixed)
    # With itself the reference agrees perfectly. The other claims need it where it is the only cross-entropy.
    others = [run for run in runs if run is not reference]
    compared = others if any(run.fixed and run.beta == 1 for run in others) else [reference, *others]
    if len({run.beta for run in compared if run.fixed}) < 2:
        raise ValueError(f"{folder} has fewer than two fixed betas to compare; train at least two, and beta 1")

    console = Console(emoji=False)
    claims = {
        "curriculum": _curriculum(reference, others, folder / "curriculum.png"),
        "features": _features(compared, folder / "features.png"),
        "smoothness": _smoothness(compared, folder / "smoothness.png"),
    }
    write_json(folder / "diagnosis.json", {"reference": reference.name, "claims": claims})
    for name, claim in claims.items():
        console.print(f"{name}: {claim['conclusion']}", soft_wrap=True, markup=False)
    console.print(f"Pictures and numbers: {folder}/", soft_wrap=True, markup=False)
    return 0


def _read(folder: Path) -> Traced:
    record = read_record(folder / "record.json", ("gd.beta", "gd.beta_start"))
    beta = record["gd"]["beta"]
    fixed = family(record) == "fixed beta" and isinstance(beta, float)
    return Traced(record["name"], beta if fixed else math.nan, fixed, record["seed"], read_trace(folder))


def _reference(fixed: list[Traced]) -> Traced:
    """The run that says what is easy: cross-entropy, of another seed than the others where there is one."""
    found = [run for run in fixed if run.beta == 1]
    if not found:
        raise ValueError("there is no run with beta 1, which says what is easy; train one with --trace_samples too")
    others = [run.seed for run in fixed if run.beta != 1]
    return next((run for run in found if run.seed not in others), found[0])


def _learned(confidence: np.ndarray) -> np.ndarray:
    """(E, N) to (N): the first measurement from which on a sample stays convinced; E where it never does."""
    below = ~(confidence > _CONVINCED)  # also where it is no number
    last_below = len(below) - 1 - below[::-1].argmax(0)
    return np.where(below.any(0), last_below + 1, 0)


def _curriculum(reference: Traced, runs: list[Traced], path: Path) -> dict:
    difficulty = _learned(reference.trace["confidence"])
    # Thirds by rank, equal ranks by the reference's mean confidence: the number of epochs is small.
    order = np.lexsort((-reference.trace["confidence"].mean(0), difficulty))
    groups = np.array_split(order, len(_GROUPS))
    figure = Figure(figsize=(11, 3.6), layout=layout())
    numbers = {}
    for place, (name, rows) in enumerate(zip(_GROUPS, groups, strict=True), 1):
        axes = figure.add_subplot(1, 3, place)
        for i, run in enumerate(runs):
            axes.plot(run.trace["epoch"], run.trace["confidence"][:, rows].mean(1), marker="o", **line_style(i))
        axes.set_title(f"{name} third of the training samples", fontsize=10.5)
        axes.set(xlabel="epoch", ylabel="mean confidence in the label", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    _names(figure, runs)
    save(figure, path)
    for run in runs:
        learned = _learned(run.trace["confidence"])
        # Without ranks, where no sample or every one was learned at once, there is no correlation.
        ranked = np.ptp(learned) > 0 and np.ptp(difficulty) > 0
        rank = stats.spearmanr(learned, difficulty).statistic if ranked else math.nan
        lag = [run.trace["confidence"][:, rows].mean() for rows in groups]
        numbers[run.name] = {"beta": run.beta, "rank_correlation": float(rank), "lag": float(lag[0] - lag[-1])}
    fixed = [run for run in runs if run.fixed]
    return _conclude(
        numbers,
        fixed,
        "rank_correlation",
        falls=True,
        claim="the smaller beta, the more closely samples are learned in the order of their difficulty",
        unit="Spearman's rho of the order with that of another cross-entropy run",
    )


def _features(runs: list[Traced], path: Path) -> dict:
    numbers = {}
    for run in runs:
        features, labels = run.trace["features"].astype(np.float64), run.trace["test_labels"]
        classes = [label for label in np.unique(labels) if (labels == label).sum() > 1]
        means = np.stack([features[labels == label].mean(0) for label in classes])
        within = np.mean(
            [np.linalg.norm(features[labels == c] - m, axis=1).mean() for c, m in zip(classes, means, strict=True)]
        )
        distances = np.linalg.norm(means[:, None] - means[None], axis=2)
        nearest = np.mean([row[np.arange(len(row)) != i].min() for i, row in enumerate(distances)])
        numbers[run.name] = {
            "beta": run.beta,
            "within": float(within),
            "between": float(nearest),
            "ratio": float(within / nearest) if nearest > 0 else math.nan,
        }
    figure = Figure(figsize=(8.4, 1.2 + 0.45 * len(runs)), layout=layout())
    axes = figure.add_subplot()
    axes.barh([wrap(run.name) for run in runs], [numbers[run.name]["ratio"] for run in runs], color="#0072B2")
    axes.invert_yaxis()
    axes.set_title(
        "Distance to the own class's mean / distance to the nearest class's mean (lower is better)", fontsize=10.5
    )
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    save(figure, path)
    return _conclude(
        numbers,
        [run for run in runs if run.fixed],
        "ratio",
        falls=False,
        claim="the smaller beta, the tighter the classes in relation to their distance",
        unit="distance within / between classes, test samples",
    )


def _smoothness(runs: list[Traced], path: Path) -> dict:
    figure = Figure(figsize=(11, 3.6), layout=layout())
    panels = (
        ("curvature", "largest eigenvalue of the loss's Hessian"),
        ("quotient", "|difference of gradients| / |of weights|"),
    )
    for place, (key, title) in enumerate(panels, 1):
        axes = figure.add_subplot(1, 3, place)
        for i, run in enumerate(runs):
            axes.plot(run.trace["epoch"], run.trace[key], marker="o", **line_style(i))
        axes.set_title(title, fontsize=10.5)
        axes.set(xlabel="epoch", yscale="log")
        axes.grid(alpha=0.3)
    axes = figure.add_subplot(1, 3, 3)
    numbers = {}
    for i, run in enumerate(runs):
        around = run.trace["input_gradient"]
        numbers[run.name] = {
            "beta": run.beta,
            "curvature": float(np.nanmean(run.trace["curvature"])),
            "quotient": float(np.nanmean(run.trace["quotient"])) if np.isfinite(run.trace["quotient"]).any() else None,
            "input_gradient": float(np.nanmean(around)) if np.isfinite(around).any() else None,
        }
        values = np.sort(around[np.isfinite(around) & (around > 0)])
        axes.plot(values, np.linspace(0, 1, len(values)), **(line_style(i) | {"markersize": 0}))
    axes.set_title("|gradient by the input| around test points", fontsize=10.5)
    axes.set(xlabel="norm", ylabel="share of the samples below", xscale="log")
    axes.grid(alpha=0.3)
    _names(figure, runs)
    save(figure, path)
    return _conclude(
        numbers,
        [run for run in runs if run.fixed],
        "curvature",
        falls=False,
        claim="the smaller beta, the smaller the local Lipschitz constant of the gradient along training",
        unit="mean largest Hessian eigenvalue",
    )


def _conclude(numbers: dict[str, dict], fixed: list[Traced], key: str, falls: bool, claim: str, unit: str) -> dict:
    """The claim holds where ``key`` only falls (or only rises) with beta over the fixed betas."""
    ordered = sorted(fixed, key=lambda run: run.beta)
    values = [numbers[run.name][key] for run in ordered]
    steps = np.diff(values)
    held = bool((steps < 0).all() if falls else (steps > 0).all())
    shown = ", ".join(f"{run.name} {value:.3g}" for run, value in zip(ordered, values, strict=True))
    verdict = "held here" if held else "did not hold here"
    if len(values) < 2 or not np.isfinite(values).all():
        held, verdict = False, "could not be measured here, train longer or more fixed betas"
    return {"held": held, "conclusion": f"'{claim}' {verdict}: {unit}: {shown}. One run each.", "runs": numbers}


def _names(figure: Figure, runs: list[Traced]) -> None:
    legend(figure, [Line2D([], [], **line_style(i)) for i in range(len(runs))], [run.name for run in runs])
