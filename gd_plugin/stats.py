"""From the records of a study to its numbers: n, mean, deviation, paired differences to the baseline."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from . import shape
from .reading import load_json
from .record import RECORD_FORMAT, STUDY_FILE, differences, family, read_record

__all__ = ["COLUMNS", "Method", "Pair", "StudyResults", "Summary", "read_study"]

_NEEDED = ("gd.beta", "gd.beta_start", "dataset.name", "dataset.tested_on", "dataset.train", "dataset.test")


@dataclass(frozen=True)
class Column:
    """A number of a record: what it is called, and how it is shown."""

    title: str
    scale: float
    digits: int
    signed: bool = False


# Of a record's `final`; `temperature/` and `vector/` of what was calibrated on the validation split; `early_` and
# `train_` of its epochs; and `epochs_to_` the final training cross-entropy or validation accuracy of the baseline with
# the same seed.
COLUMNS = {
    "accuracy": Column("accuracy %", 100, 2),
    "nll": Column("NLL", 1, 4),
    "brier": Column("Brier", 1, 4),
    "ece": Column("ECE %", 100, 2),
    "adaptive_ece": Column("adaptive ECE %", 100, 2),
    "mce": Column("MCE %", 100, 1),
    "confidence_gap": Column("gap %", 100, 2, signed=True),
    "temperature/nll": Column("NLL, temperature", 1, 4),
    "temperature/ece": Column("ECE %, temperature", 100, 2),
    "vector/nll": Column("NLL, vector scaling", 1, 4),
    "vector/ece": Column("ECE %, vector scaling", 100, 2),
    "early_accuracy": Column("validation accuracy %, first epoch at or past a quarter of training", 100, 2),
    "train_cross_entropy": Column("training cross-entropy, last epoch", 1, 4),
    "epochs_to_loss": Column("epochs to the baseline's final training cross-entropy", 1, 1),
    "epochs_to_accuracy": Column("epochs to the baseline's final validation accuracy", 1, 1),
}


@dataclass
class Summary:
    """One metric of one method. NaN where there is no such number: a deviation of one run, an interval of no change."""

    values: dict[int, float]  # by seed, those that are finite
    n: int = 0
    mean: float = math.nan
    sd: float = math.nan  # with n - 1
    difference: float = math.nan  # to the reference, mean over the seeds that both have
    low: float = math.nan  # 95% interval of the difference, Student's t
    high: float = math.nan
    p: float = math.nan  # two-sided paired t-test; 1 of no difference at all, NaN of equal differences
    q: float = math.nan  # p, corrected for the number of comparisons of this metric (Benjamini and Hochberg 1995)


@dataclass
class Method:
    """All runs of one method."""

    name: str
    records: dict[int, dict]  # by seed
    summaries: dict[str, Summary] = field(default_factory=dict)  # by key of COLUMNS

    @property
    def gd(self) -> dict[str, Any]:
        """The knobs of the loss."""
        return next(iter(self.records.values()))["gd"]

    def validation(self, key: str) -> float:
        """Mean over the seeds of an ``eval_`` metric after the last epoch; NaN where a run has none."""
        values = [(record["epochs"] or [{}])[-1].get(key) for record in self.records.values()]
        return math.nan if None in values else float(np.mean(values))

    @property
    def family(self) -> str:
        """As `gd_plugin.record.family`."""
        return family(next(iter(self.records.values())))


@dataclass
class Pair:
    """A warm-up beside the fixed beta that it ends at, and its differences to that, paired by seed as all others.

    The baseline is no such beta, to which every method's difference is in its own summaries.
    """

    warmup: Method
    fixed: Method
    summaries: dict[str, Summary]  # by key of COLUMNS, but for those that look at the baseline


@dataclass
class StudyResults:
    dataset: str
    tested_on: str
    methods: list[Method]  # the first is the baseline
    pairs: list[Pair]
    seeds: list[int]
    missing: int  # runs that were asked for and have no record
    command: str

    @property
    def baseline(self) -> Method:
        return self.methods[0]

    def chosen(self, key: str) -> Method:
        """The method that is best on the validation split after the last epoch, by a key of a record's epochs."""
        sign = -1 if key == "eval_accuracy" else 1
        values = {method.name: sign * method.validation(key) for method in self.methods}
        return min(
            self.methods, key=lambda method: math.inf if math.isnan(values[method.name]) else values[method.name]
        )


def read_plan(folder: Path) -> dict:
    """What a study was asked for: ``methods``, ``seeds`` and ``command``.

    Raises:
        ValueError: no study, or a damaged or foreign file; one line.
    """
    path = folder / STUDY_FILE
    try:
        asked = load_json(path.read_bytes())
        if wrong := shape.problem(asked, shape.STUDY, "it"):
            raise ValueError(wrong)
        names, _ = asked["methods"], asked["seeds"]  # a KeyError where one is missing
        if not names:
            raise ValueError("it names no method")
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {STUDY_FILE}; give the output folder of gd-plugin study") from None
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); give the study's command again"
        ) from None
    if asked.get("format") != RECORD_FORMAT:
        raise ValueError(f"{path} has format {asked.get('format')!r}, this version reads {RECORD_FORMAT}")
    return asked


def read_study(folder: Path) -> StudyResults:
    """Read the records of a study, finished or not, and sum them up.

    Raises:
        ValueError: no study, a damaged or foreign file, or no run of the first method yet; one line.
    """
    asked = read_plan(folder)
    names, seeds = asked["methods"], asked["seeds"]
    found: dict[str, dict[int, dict]] = {name: {} for name in names}
    data: dict[str, Any] = {}  # of the first record
    for seed in seeds:
        for file in sorted((folder / f"seed-{seed}").glob("*.json")):
            record = read_record(file, _NEEDED)
            if record["name"] in found:
                if record["seed"] != seed:
                    raise ValueError(f"{file} is of seed {record['seed']}; it was moved, move it back")
                if seed in found[record["name"]]:
                    raise ValueError(f"{file} is a second record of {record['name']!r} with seed {seed}; remove one")
                data = data or record["dataset"]
                if record["dataset"] != data:
                    raise ValueError(
                        f"{file} is of other data than the records before it, {differences(data, record['dataset'])}; "
                        "remove it or train it again"
                    )
                found[record["name"]][seed] = record
    methods = [Method(name, records) for name, records in found.items() if records]
    if not methods or methods[0].name != names[0]:
        raise ValueError(f"{folder} has no run of {names[0]!r} yet, with which the others are compared; let it go on")
    _summarise(methods)
    total = sum(len(method.records) for method in methods)
    return StudyResults(
        dataset=data["name"],
        tested_on=data["tested_on"],
        methods=methods,
        pairs=_pairs(methods),
        seeds=seeds,
        missing=len(names) * len(seeds) - total,
        command=str(asked.get("command", "")),
    )


def _summarise(methods: list[Method]) -> None:
    baseline = methods[0]
    for key in COLUMNS:
        for method in methods:
            method.summaries[key] = _summary(key, method, baseline)
        _correct([method.summaries[key] for method in methods[1:]])


def _pairs(methods: list[Method]) -> list[Pair]:
    pairs = []
    for warmup in (method for method in methods[1:] if method.family == "warm-up"):
        ends = (m for m in methods[1:] if m.family == "fixed beta" and _but_for_warmup(m) == _but_for_warmup(warmup))
        pairs += [Pair(warmup, fixed, {}) for fixed in itertools.islice(ends, 1)]
    for key in COLUMNS:
        if not key.startswith("epochs_to"):
            for pair in pairs:
                pair.summaries[key] = _summary(key, pair.warmup, pair.fixed)
            _correct([pair.summaries[key] for pair in pairs])
    return pairs


def _but_for_warmup(method: Method) -> tuple[dict, Any, Any]:
    """All settings, which for a pair must be the same."""
    record = next(iter(method.records.values()))
    of_warmup = ("seed", "gd_beta_start", "gd_schedule", "gd_warmup_ratio", "gd_warmup_steps", "gd_warmup_epochs")
    settings = {key: value for key, value in record["config"].items() if key not in of_warmup}
    return settings, method.gd["beta"], method.gd.get("class_weights")


def _correct(summaries: list[Summary]) -> None:
    compared = [summary for summary in summaries if not math.isnan(summary.p)]
    if compared:
        for summary, q in zip(compared, stats.false_discovery_control([s.p for s in compared]), strict=True):
            summary.q = float(q)


def _summary(key: str, method: Method, reference: Method) -> Summary:
    """``reference``: what to compare with, whose summary of this key is there already unless it is ``method``."""
    values = {seed: _value(key, record, reference.records.get(seed)) for seed, record in method.records.items()}
    values = {seed: value for seed, value in values.items() if value is not None and math.isfinite(value)}
    summary = Summary(values, n=len(values))
    if values:
        summary.mean = float(np.mean(list(values.values())))
    if len(values) > 1:
        summary.sd = float(np.std(list(values.values()), ddof=1))
    if method is reference:
        return summary
    of_reference = reference.summaries[key].values
    seeds = [seed for seed in values if seed in of_reference]
    if key.startswith("epochs_to") and len(seeds) < len(method.records):
        return summary  # without those that never got there, a mean would flatter
    differences = [values[seed] - of_reference[seed] for seed in seeds]
    if differences:
        summary.difference = float(np.mean(differences))
    # 0.3 - 0.1 and 0.4 - 0.2 differ by rounding alone, and would have a p-value of 1e-16.
    rounding = 1e-12 * max((abs(value) for seed in seeds for value in (values[seed], of_reference[seed])), default=0)
    if len(differences) > 1 and max(map(abs, differences)) <= rounding:
        summary.p = 1.0  # it is a comparison, for the number of which the others are corrected
    elif len(differences) > 1 and np.ptp(differences) > rounding:
        test = stats.ttest_1samp(differences, 0.0)
        interval = test.confidence_interval(0.95)
        summary.p, summary.low, summary.high = float(test.pvalue), float(interval.low), float(interval.high)
    return summary


def _value(key: str, record: dict, of_baseline: dict | None) -> float | None:
    """The number in one record, or None."""
    if key == "early_accuracy":
        entries = [entry for entry in record["epochs"] if entry["epoch"] >= record["epochs"][-1]["epoch"] / 4]
        return entries[0].get("eval_accuracy") if entries else None
    if key == "train_cross_entropy":
        return record["epochs"][-1].get("cross_entropy") if record["epochs"] else None
    if key == "epochs_to_loss":
        return _epochs_to(record, of_baseline, "cross_entropy", lower_is_better=True)
    if key == "epochs_to_accuracy":
        return _epochs_to(record, of_baseline, "eval_accuracy", lower_is_better=False)
    if "/" in key:
        calibration, key = key.split("/")
        return ((record.get("calibrated") or {}).get(calibration) or {}).get(key)
    return record["final"].get(key)


def _epochs_to(record: dict, of_baseline: dict | None, key: str, lower_is_better: bool) -> float | None:
    """The first epoch that is as good as the baseline's last one; None where there is none."""
    if of_baseline is None or not of_baseline["epochs"]:
        return None
    goal = of_baseline["epochs"][-1].get(key)
    if goal is None:
        return None
    for entry in record["epochs"]:
        value = entry.get(key)
        if value is not None and (value <= goal if lower_is_better else value >= goal):
            return entry["epoch"]
    return None
