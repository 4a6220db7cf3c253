"""The numbers of a study, each against a computation of its own. `write_study` and its like make the folder of one."""

from __future__ import annotations

import json
import math
import re
import statistics
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from gd_plugin.metrics import METRICS
from gd_plugin.record import write_json
from gd_plugin.stats import COLUMNS, StudyResults, Summary, read_study

PLAIN = [key for key in COLUMNS if not key.startswith("epochs_to")]  # that stand in the record as they are


# The folder of a study ------------------------------------------------------------------------------------------------


def knobs(**changes) -> dict:
    """The loss of a record: plain cross-entropy, but for ``changes``."""
    return {
        "beta": 1.0,
        "beta_start": None,
        "schedule": "linear",
        "warmup_ratio": 0.0,
        "warmup_steps": 0,
        "warmup_epochs": 0.0,
        "class_weights": None,
    } | changes


def record(name: str = "cross-entropy", seed: int = 0, **changes) -> dict:
    """What a run of three epochs leaves in a study, with numbers that are those of this name and seed alone."""
    random = np.random.default_rng([seed, *name.encode()])

    def metrics() -> dict[str, float]:
        values = random.uniform(0.01, 0.1, len(METRICS)).tolist()
        return dict(zip(METRICS, values, strict=True)) | {"accuracy": float(random.uniform(0.9, 1))}

    return {
        "format": 1,
        "name": name,
        "created": "2026-11-24T22:38:51+00:00",
        "command": "gd-plugin study digits --seeds 3",
        "config": {"dataset": "digits", "model": "timm:test_efficientnet", "num_train_epochs": 3.0, "seed": seed},
        "loss": "gd",
        "gd": knobs(),
        "seed": seed,
        "python": "3.11.7",
        "platform": "Linux",
        "versions": {"gd_plugin": "0.1.0", "torch": "2.15.0+cu132", "transformers": "5.24.0", "timm": "1.0.31"},
        "commit": None,
        "hardware": {"cpu": "AMD EPYC", "cpu_count": 2, "gpu": [], "gpu_count": 0, "torch_threads": 1},
        "wall_time_s": 13.0,
        "dataset": {
            "name": "digits",
            "train": 1293,
            "validation": 144,
            "test": 360,
            "tested_on": "test",
            "labels": [str(i) for i in range(10)],
        },
        "model": {"name": "timm:test_efficientnet", "parameters": 101766},
        "epochs": curve(*(random.uniform(0.5, 1.5) / e for e in (1, 2, 3))),
        "log": [{"loss": 1.0 / e, "epoch": float(e), "step": 21 * e, "gd_beta": 1.0} for e in (1, 2, 3)],
        "final": {"loss": 0.1, **metrics()},
        "calibrated": {"temperature": {"temperature": 1.5, **metrics()}, "vector": metrics()},
        "reliability": [
            {"lower": i / 15, "upper": (i + 1) / 15, "count": count, "confidence": (i + 0.5) / 15, "accuracy": accuracy}
            if count
            else {"lower": i / 15, "upper": (i + 1) / 15, "count": 0, "confidence": None, "accuracy": None}
            for i, (count, accuracy) in enumerate(
                zip([0] * 5 + random.integers(1, 40, 10).tolist(), random.uniform(0, 1, 15).tolist(), strict=True)
            )
        ],
        **changes,
    }


def curve(*losses: float | None, accuracies: Iterable[float | None] = ()) -> list[dict]:
    """The epochs of a record, by their training cross-entropy and validation accuracy."""
    accuracies = list(accuracies) or [None if loss is None else 1 / (1 + loss) for loss in losses]
    return [
        {
            "epoch": float(e),
            "step": 21 * e,
            "loss": loss,
            "cross_entropy": loss,
            "gd_beta": 1.0,
            "eval_loss": loss,
            "eval_accuracy": accuracy,
            "eval_nll": loss,
            "eval_ece": 0.05,
        }
        for e, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True), 1)
    ]


def diverged(name: str, seed: int, **changes) -> dict:
    nothing = {"count": 0, "confidence": None, "accuracy": None}
    reliability = [entry | nothing for entry in record()["reliability"]]
    final = dict.fromkeys(("loss", *METRICS))
    return record(
        name, seed, final=final, calibrated=None, reliability=reliability, epochs=curve(None, None, None), **changes
    )


def runs(methods: dict[str, dict], seeds: int) -> list[dict]:
    """A record per method and seed. ``methods``: name -> what is different in its records."""
    return [record(name, seed, **changes) for seed in range(seeds) for name, changes in methods.items()]


def write_study(folder: Path, records: list[dict], **changes) -> Path:
    """A folder as `gd-plugin study` leaves it; ``changes`` are those of study.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in records:
        path = run_path(folder, run["name"], run["seed"])
        path.parent.mkdir(exist_ok=True)
        assert not path.exists()
        write_json(path, run)
    asked = {
        "format": 1,
        "dataset": "digits",
        "methods": list(dict.fromkeys(run["name"] for run in records)),
        "seeds": sorted({run["seed"] for run in records}),
        "command": "gd-plugin study digits --seeds 3",
    }
    write_json(folder / "study.json", asked | changes)
    return folder


def run_path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"seed-{seed}" / f"{re.sub(r'[^0-9A-Za-z.]+', '-', name).strip('-').lower()}.json"


@pytest.fixture
def read(tmp_path):
    """Write a study and read it; what numpy and scipy warn of is an error."""

    def read(records, **changes) -> StudyResults:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return read_study(write_study(tmp_path / "study", records, **changes))

    return read


def value(run: dict, key: str) -> float:
    if key == "early_accuracy":  # of three epochs the first is the first at or past a quarter of training
        return run["epochs"][0]["eval_accuracy"]
    if key == "train_cross_entropy":
        return run["epochs"][-1]["cross_entropy"]
    calibration, _, metric = key.rpartition("/")
    return (run["calibrated"][calibration] if calibration else run["final"])[metric]


def values(records: list[dict], name: str, key: str) -> list[float]:
    return [value(run, key) for run in records if run["name"] == name]


def with_final(key: str, **lists: Iterable[float]) -> list[dict]:
    """Runs whose ``final`` holds these values of one metric: name=(of seed 0, of seed 1, ...)."""
    found = [record(name, seed) for name, numbers in lists.items() for seed, _ in enumerate(numbers)]
    for run, number in zip(found, (number for numbers in lists.values() for number in numbers), strict=True):
        run["final"][key] = number
    return found


def has_test(summary: Summary) -> bool:
    """Whether there is an interval and a p-value, both or none. (Of no difference at all there is a p-value alone.)"""
    absent = {math.isnan(number) for number in (summary.low, summary.high, summary.p, summary.q)}
    assert len(absent) == 1
    return not absent.pop()


METHODS = {
    "cross-entropy": {},
    "beta 0.1": {"gd": knobs(beta=0.1)},
    "beta 5": {"gd": knobs(beta=5.0)},
    "0.01 to 5": {"gd": knobs(beta=5.0, beta_start=0.01, warmup_ratio=0.5)},
    "focal loss": {"loss": "focal"},
}


# Means, deviations, differences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [2, 5])
def test_mean_and_deviation(read, seeds):
    records = runs(METHODS, seeds)
    study = read(records)
    assert [method.name for method in study.methods] == list(METHODS)
    for method in study.methods:
        assert list(method.summaries) == list(COLUMNS)
        for key in PLAIN:
            summary, expected = method.summaries[key], values(records, method.name, key)
            assert list(summary.values.items()) == list(enumerate(expected)) and summary.n == seeds
            assert summary.mean == pytest.approx(statistics.mean(expected), rel=1e-12)
            assert summary.sd == pytest.approx(statistics.stdev(expected), rel=1e-9)


@pytest.mark.parametrize("seeds", [2, 5])
def test_differences_are_those_of_a_paired_t_test(read, seeds):
    records = runs(METHODS, seeds)
    study = read(records)
    for method in study.methods[1:]:
        for key in PLAIN:
            summary, own, base = (
                method.summaries[key],
                *(values(records, name, key) for name in (method.name, "cross-entropy")),
            )
            test = ttest_rel(own, base)
            low, high = test.confidence_interval(0.95)
            assert summary.difference == pytest.approx(statistics.mean(own) - statistics.mean(base), abs=1e-12)
            assert (summary.low, summary.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))
            assert summary.p == pytest.approx(test.pvalue, rel=1e-9) and summary.low < summary.difference < summary.high


def test_the_baseline_has_no_difference(read):
    for summary in read(runs(METHODS, 3)).baseline.summaries.values():
        assert math.isnan(summary.difference) and not has_test(summary)


def benjamini_hochberg(p: list[float]) -> list[float]:
    """The smallest of p * m / rank over this rank and all above it."""
    by_size = sorted(range(len(p)), key=lambda i: p[i], reverse=True)
    q, smallest = [0.0] * len(p), 1.0
    for rank, i in zip(range(len(p), 0, -1), by_size, strict=True):
        smallest = q[i] = min(smallest, p[i] * len(p) / rank)
    return q


def test_benjamini_and_hochberg_by_hand():
    """The first five p-values: 0.005 * 5 / 1, 0.009 * 5 / 2 (which is less, and so both have it), ..."""
    assert benjamini_hochberg([0.3, 0.005, 0.05, 0.9, 0.009]) == pytest.approx([0.375, 0.0225, 1 / 12, 0.9, 0.0225])


def test_p_is_corrected_for_the_number_of_methods(read):
    study = read(runs(METHODS, 5))
    for key in PLAIN:
        summaries = [method.summaries[key] for method in study.methods[1:]]
        p = [summary.p for summary in summaries]
        assert [summary.q for summary in summaries] == pytest.approx(benjamini_hochberg(p), rel=1e-12)
        assert max(summary.q - summary.p for summary in summaries) > 0.01  # not so without a correction


def test_one_comparison_needs_no_correction(read):
    for key, summary in read(runs(dict(list(METHODS.items())[:2]), 3)).methods[1].summaries.items():
        assert summary.q == summary.p or key not in PLAIN


def test_only_seeds_that_both_have_are_paired(read):
    """Seed 2 of the baseline and seed 1 of a method are missing."""
    records = [
        run
        for run in runs(METHODS, 5)
        if (run["name"], run["seed"]) not in {("cross-entropy", 2), ("beta 5", 1), ("beta 5", 4)}
    ]
    study = read(records)
    both = {"beta 0.1": [0, 1, 3, 4], "beta 5": [0, 3]}
    for method in study.methods[1:3]:
        summary = method.summaries["nll"]
        own, base = (
            [run["final"]["nll"] for run in records if run["name"] == name and run["seed"] in both[method.name]]
            for name in (method.name, "cross-entropy")
        )
        test = ttest_rel(own, base)
        assert summary.difference == pytest.approx(np.subtract(own, base).mean(), abs=1e-12)
        assert (summary.p, summary.low) == pytest.approx((test.pvalue, test.confidence_interval().low))
        # Its own mean is that of all its runs, so that the difference is another than that of the means.
        assert summary.mean == pytest.approx(statistics.mean(values(records, method.name, "nll")))
        assert summary.difference != pytest.approx(summary.mean - study.baseline.summaries["nll"].mean, abs=1e-6)
    assert [method.summaries["nll"].n for method in study.methods] == [4, 5, 3, 5, 5]
    assert study.missing == 3


def test_no_seed_in_common(read):
    study = read([record("a", 0), record("a", 1), record("b", 2), record("b", 3)])
    summary = study.methods[1].summaries["nll"]
    assert summary.n == 2 and summary.sd > 0
    assert math.isnan(summary.difference) and not has_test(summary)


def test_one_seed(read):
    records = runs(METHODS, 1)
    study = read(records)
    for method in study.methods:
        for key in PLAIN:
            summary = method.summaries[key]
            assert (summary.n, summary.mean) == (1, values(records, method.name, key)[0])
            assert math.isnan(summary.sd) and not has_test(summary)
    difference = study.methods[1].summaries["nll"].difference
    assert difference == pytest.approx(records[1]["final"]["nll"] - records[0]["final"]["nll"], abs=1e-15)


def test_no_difference_at_all_has_a_p_of_one(read):
    """And counts among the comparisons: to leave it out would make the others look more certain."""
    base = (0.9, 0.8, 0.7)
    records = with_final("accuracy", base=base, own=base, other=[x + 0.01 * i for i, x in enumerate(base, 1)])
    _, own, other = (method.summaries["accuracy"] for method in read(records).methods)
    assert (own.difference, own.p, own.q) == (0.0, 1.0, 1.0) and math.isnan(own.low) and math.isnan(own.high)
    assert other.q == pytest.approx(2 * other.p) and other.p < 0.2


def test_pairs_of_a_warm_up_and_its_final_beta(read, tmp_path):
    more = {"0.1 to 5": {"gd": knobs(beta=5.0, beta_start=0.1, warmup_ratio=0.5)}}
    more |= {"0.1 to 2": {"gd": knobs(beta=2.0, beta_start=0.1, warmup_ratio=0.5)}}  # whose end is not in the study
    more |= {"0.1 to 1": {"gd": knobs(beta_start=0.1, warmup_ratio=0.5)}}  # whose end is the baseline
    # The first of these is of other settings than the warm-ups.
    other = record()["config"] | {"learning_rate": 0.1}
    first = {"cross-entropy": {}, "beta 5, faster": {"gd": knobs(beta=5.0), "config": other}}
    records = runs(first | METHODS | more, 4)
    for run in records:  # as a run has them
        run["config"] = run["config"] | {"gd_beta": [run["gd"]["beta"]], "seed": run["seed"]}
        if run["gd"]["beta_start"]:
            run["config"] |= {"gd_beta_start": [run["gd"]["beta_start"]], "gd_warmup_ratio": 0.5}
    pairs = read(records).pairs
    assert [(pair.warmup.name, pair.fixed.name) for pair in pairs] == [("0.01 to 5", "beta 5"), ("0.1 to 5", "beta 5")]
    for key in PLAIN:
        tests = [ttest_rel(values(records, pair.warmup.name, key), values(records, "beta 5", key)) for pair in pairs]
        for pair, test in zip(pairs, tests, strict=True):
            summary = pair.summaries[key]
            interval = test.confidence_interval()
            assert (summary.p, summary.low, summary.high) == pytest.approx((test.pvalue, interval.low, interval.high))
            assert summary.difference != pytest.approx(pair.warmup.summaries[key].difference, rel=1e-3)
        q = benjamini_hochberg([test.pvalue for test in tests])
        assert [pair.summaries[key].q for pair in pairs] == pytest.approx(q)
    without = runs({name: METHODS[name] for name in ("cross-entropy", "beta 5", "focal loss")}, 2)
    assert read_study(write_study(tmp_path / "without", without)).pairs == []


def test_pairs_have_the_seeds_that_both_have(read):
    """Beta 5 without seed 1, and a warm-up whose seed 2 has diverged."""
    names = ("cross-entropy", "beta 5", "0.01 to 5")
    records = [r for r in runs({n: METHODS[n] for n in names}, 4) if (r["name"], r["seed"]) != ("beta 5", 1)]
    records = [
        diverged("0.01 to 5", 2, **METHODS["0.01 to 5"]) if (r["name"], r["seed"]) == ("0.01 to 5", 2) else r
        for r in records
    ]
    (pair,) = read(records).pairs
    of = {name: [r["final"]["nll"] for r in records if r["name"] == name and r["seed"] in (0, 3)] for name in names}
    assert pair.summaries["nll"].difference == pytest.approx(np.subtract(of["0.01 to 5"], of["beta 5"]).mean())
    assert pair.summaries["nll"].p == pytest.approx(ttest_rel(of["0.01 to 5"], of["beta 5"]).pvalue)


def test_pairs_of_one_seed(read):
    (pair,) = read(runs(METHODS, 1)).pairs
    assert pair.summaries["nll"].difference != 0 and not has_test(pair.summaries["nll"])


@pytest.mark.parametrize(
    ("base", "own", "difference"),
    [
        ((0.5, 0.75), (0.75, 1.0), 0.25),
        ((0.1, 0.2), (0.3, 0.4), 0.2),  # 0.3 - 0.1 is not 0.4 - 0.2 in binary: a p-value would be that of rounding
        ((355 / 360, 11 / 360, 111 / 360), (356 / 360, 12 / 360, 112 / 360), 1 / 360),
    ],
)
def test_equal_differences_have_no_p(read, base, own, difference):
    """Nor do they count among the comparisons that p is corrected for."""
    records = with_final("accuracy", base=base, own=own, other=[x + 0.01 * i for i, x in enumerate(base)])
    _, own, other = read(records).methods
    assert own.summaries["accuracy"].difference == pytest.approx(difference, abs=1e-15)
    assert not has_test(own.summaries["accuracy"]) and has_test(own.summaries["nll"])
    assert has_test(other.summaries["accuracy"])  # whose differences do differ
    assert other.summaries["accuracy"].q == other.summaries["accuracy"].p


def test_small_differences_have_a_p(read):
    """Far below what a table shows, and far above rounding."""
    assert has_test(read(with_final("nll", base=(1.0, 2.0), own=(1.0, 2.0 + 1e-9))).methods[1].summaries["nll"])


# Runs that diverged, and what was not measured ------------------------------------------------------------------------


def test_a_diverged_run_is_left_out(read):
    records = [run for run in runs(METHODS, 4) if (run["name"], run["seed"]) != ("beta 5", 2)]
    study = read([*records, diverged("beta 5", 2, gd=knobs(beta=5.0))], methods=list(METHODS))
    method = study.methods[2]
    assert (method.name, len(method.records), study.missing) == ("beta 5", 4, 0)
    for key in PLAIN:
        summary, own = method.summaries[key], values(records, "beta 5", key)
        assert summary.n == 3 and list(summary.values) == [0, 1, 3]
        assert summary.mean == pytest.approx(statistics.mean(own))
        base = [number for seed, number in enumerate(values(records, "cross-entropy", key)) if seed != 2]
        assert summary.p == pytest.approx(ttest_rel(own, base).pvalue)
    assert 2 not in method.summaries["epochs_to_loss"].values


def test_a_diverged_baseline(read):
    records = [run for run in runs(METHODS, 3) if (run["name"], run["seed"]) != ("cross-entropy", 1)]
    study = read([diverged("cross-entropy", 1), *records])
    assert study.baseline.summaries["nll"].n == 2 and study.missing == 0
    own, base = (values(records, name, "nll") for name in ("beta 5", "cross-entropy"))
    assert study.methods[2].summaries["nll"].p == pytest.approx(ttest_rel([own[0], own[2]], base).pvalue)
    assert list(study.methods[2].summaries["nll"].values) == [0, 1, 2]


def test_a_method_of_which_every_run_diverged(read):
    study = read([*runs({"cross-entropy": {}}, 2), diverged("beta 5", 0), diverged("beta 5", 1)])
    summary = study.methods[1].summaries["nll"]
    assert not summary.n and math.isnan(summary.mean) and math.isnan(summary.difference) and not has_test(summary)


def test_python_writes_nan_as_nan(tmp_path):
    """A record that something else has written."""
    folder = write_study(tmp_path / "study", runs({"cross-entropy": {}}, 2))
    run = record(seed=1)
    run["final"]["nll"] = math.nan
    run_path(folder, "cross-entropy", 1).write_text(json.dumps(run))
    assert list(read_study(folder).baseline.summaries["nll"].values) == [0]


@pytest.mark.parametrize("calibrated", [None, {}, {"temperature": None, "vector": None}])
def test_without_calibration(read, calibrated):
    study = read(runs({"cross-entropy": {"calibrated": calibrated}, "beta 5": {}}, 2))
    for key in PLAIN:
        calibration = "/" in key
        assert study.baseline.summaries[key].n == (0 if calibration else 2)
        assert has_test(study.methods[1].summaries[key]) is not calibration


# Epochs to what the baseline reaches ----------------------------------------------------------------------------------


def epochs_to(read, key: str, base: list[dict], own: list[dict]) -> tuple[float | None, float | None]:
    """Of the baseline and of a method."""
    study = read([record("base", 0, epochs=base), record("own", 0, epochs=own)])
    return tuple(method.summaries[key].values.get(0) for method in study.methods)


@pytest.mark.parametrize(
    ("base", "own", "expected"),
    [
        ((3.0, 2.0, 1.0), (2.5, 0.9, 0.5), (3, 2)),
        ((3.0, 2.0, 1.0), (0.5, 0.4, 0.3), (3, 1)),  # in the first epoch
        ((3.0, 2.0, 1.0), (3.0, 2.0, 1.0), (3, 3)),  # as good is good enough
        ((3.0, 2.0, 1.0), (3.0, 2.0, 1.1), (3, None)),  # never
        ((3.0, 0.5, 1.0), (3.0, 0.9, 2.0), (2, 2)),  # what comes later does not count
        ((3.0, 2.0, 1.0), (None, 0.9, None), (3, 2)),
        ((3.0, 2.0, 1.0), (None, None, None), (3, None)),  # diverged
        ((3.0, 2.0, None), (3.0, 2.0, 1.0), (None, None)),  # a baseline that diverged
        ((3.0, 2.0, 1.0), (), (3, None)),
        ((), (3.0, 2.0, 1.0), (None, None)),
    ],
)
def test_epochs_to_the_baselines_last_loss(read, base, own, expected):
    assert epochs_to(read, "epochs_to_loss", curve(*base), curve(*own)) == expected


@pytest.mark.parametrize(
    ("base", "own", "expected"),
    [
        ((0.5, 0.6, 0.7), (0.5, 0.8, 0.6), (3, 2)),
        ((0.5, 0.6, 0.7), (0.7, 0.8, 0.9), (3, 1)),
        ((0.5, 0.6, 0.7), (0.5, 0.6, 0.69), (3, None)),
        ((0.8, 0.6, 0.7), (0.1, 0.2, 0.7), (1, 3)),
        ((0.5, 0.6, 0.7), (None, None, 0.7), (3, 3)),
        ((0.5, 0.6, None), (0.5, 0.6, 0.7), (None, None)),
    ],
)
def test_epochs_to_the_baselines_last_accuracy(read, base, own, expected):
    base, own = (curve(*[1.0] * 3, accuracies=accuracies) for accuracies in (base, own))
    assert epochs_to(read, "epochs_to_accuracy", base, own) == expected


def test_epochs_to_what_the_baseline_of_the_same_seed_reaches(read):
    base, own = [curve(2.0, 1.0), curve(2.0, 0.1)], curve(3.0, 1.0)
    records = [record("base", seed, epochs=epochs) for seed, epochs in enumerate(base)]
    study = read(records + [record("own", seed, epochs=own) for seed in (0, 1, 2)])  # no baseline for seed 2
    assert study.methods[1].summaries["epochs_to_loss"].values == {0: 2}


def test_a_log_without_evaluations(read):
    """An epoch then has no accuracy at all, rather than an empty one."""
    epochs = [{key: entry[key] for key in ("epoch", "step", "loss", "cross_entropy")} for entry in curve(2.0, 1.0)]
    study = read(runs({"base": {"epochs": epochs}, "own": {"epochs": epochs}}, 1))
    assert study.methods[1].summaries["epochs_to_loss"].values == {0: 2}
    assert not study.methods[1].summaries["epochs_to_accuracy"].n


# What a study is made of ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({}, "fixed beta"),
        ({"gd": knobs(beta=5.0)}, "fixed beta"),
        ({"gd": knobs(beta=5.0, beta_start=0.01, warmup_ratio=0.5)}, "warm-up"),
        ({"gd": knobs(beta=5.0, beta_start=0.01, warmup_ratio=0.5, schedule="cosine")}, "warm-up"),
        ({"loss": "focal"}, "other loss"),
        ({"loss": "poly1"}, "other loss"),
        ({"config": {"label_smoothing_factor": 0.1}}, "other loss"),
    ],
)
def test_families(read, changes, family):
    method = read([record("x", **changes)]).baseline
    assert method.family == family
    assert method.gd == changes.get("gd", knobs())


def test_a_record_from_before_there_were_other_losses(read):
    run = record()
    del run["loss"]
    assert read([run]).baseline.family == "fixed beta"


def test_what_was_asked_for(read):
    other = {"dataset": record()["dataset"] | {"name": "flowers", "tested_on": "validation"}}
    study = read(runs({"b": other, "a": other}, 2), methods=["b", "c", "a"], seeds=[0, 1, 2])
    assert [method.name for method in study.methods] == ["b", "a"]  # in the order of study.json; nothing of c yet
    assert [list(method.records) for method in study.methods] == [[0, 1], [0, 1]]
    assert (study.dataset, study.tested_on, study.seeds) == ("flowers", "validation", [0, 1, 2])
    assert study.command == "gd-plugin study digits --seeds 3"
    assert study.missing == 3 * 3 - 4


def test_files_that_are_not_of_this_study(read, tmp_path):
    folder = tmp_path / "study"
    for name in ("seed-0", "seed-7"):
        (folder / name).mkdir(parents=True)
    for path in (folder / "seed-0" / "other.json", folder / "seed-7" / "base.json", folder / "base.json"):
        write_json(path, record("base" if path.stem == "base" else "other", 7))
    for name in ("notes.txt", "base.corrupt-0", ".0123.tmp"):
        (folder / "seed-0" / name).write_text("{")
    study = read(runs({"base": {}}, 2))
    assert [(method.name, list(method.records)) for method in study.methods] == [("base", [0, 1])]
    assert study.missing == 0


# What is refused ------------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        read_study(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_no_study(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert refusal(folder) == f"{folder} holds no study.json; give the output folder of gd-plugin study"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("[1]", "ValueError: it is [1], not a mapping"),
        ("{}", "KeyError: 'methods'"),
        ('{"format": 1, "methods": ["a"]}', "KeyError: 'seeds'"),
        ('{"format": 1, "methods": 5, "seeds": [0]}', "ValueError: it.methods is 5, not a list"),
        ('{"format": 1, "methods": [], "seeds": [0]}', "ValueError: it names no method"),
    ],
)
def test_a_damaged_study(tmp_path, text, why):
    path = write_study(tmp_path / "study", [record()]) / "study.json"
    path.write_text(text)
    assert refusal(path.parent) == f"{path} is damaged ({why}); give the study's command again"


def test_a_study_of_another_format(tmp_path):
    folder = write_study(tmp_path / "study", [record()], format=2)
    assert refusal(folder) == f"{folder / 'study.json'} has format 2, this version reads 1"
    folder = write_study(tmp_path / "other", [record()], format=None)
    assert refusal(folder) == f"{folder / 'study.json'} has format None, this version reads 1"


def test_no_run_of_the_first_method(tmp_path):
    folder = write_study(tmp_path / "study", runs({"b": {}}, 2), methods=["a", "b"])
    why = f"{folder} has no run of 'a' yet, with which the others are compared; let it go on"
    assert refusal(folder) == why
    empty = write_study(tmp_path / "empty", [], methods=["a", "b"], seeds=[0])
    assert refusal(empty) == why.replace(str(folder), str(empty))


def test_two_records_of_one_run(tmp_path):
    folder = write_study(tmp_path, runs(METHODS, 2))
    path = run_path(folder, "beta 5", 1)
    path.with_name("zz-copy.json").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"zz-copy.json is a second record of 'beta 5' with seed 1; remove one$"):
        read_study(folder)


def test_records_of_several_data_sets(tmp_path):
    records = runs(METHODS, 2)
    records[3]["dataset"] = records[3]["dataset"] | {"test": 359}
    with pytest.raises(
        ValueError, match=r"\.json is of other data than the records before it, test was 359 and is 360; remove"
    ):
        read_study(write_study(tmp_path, records))


def test_a_record_in_the_folder_of_another_seed(tmp_path):
    folder = write_study(tmp_path / "study", runs({"a": {}}, 2))
    path = run_path(folder, "a", 1)
    write_json(path, record("a", 3))
    assert refusal(folder) == f"{path} is of seed 3; it was moved, move it back"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ('{"format": 2}', "record of format 2, this version reads 1"),
        ('{"format": 1, "name": "a"}', "the record lacks config, seed, dataset, epochs, final, wall_time_s"),
    ],
)
def test_a_corrupt_record(tmp_path, text, why):
    folder = write_study(tmp_path / "study", runs({"a": {}}, 2))
    path = run_path(folder, "a", 1)
    path.write_text(text)
    assert refusal(folder).startswith(f"{path}: {why}; ")
