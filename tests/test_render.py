"""What the README's tables are made of, beyond the reports of single studies: `recipes/render.py`."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t
from test_stats import METHODS, runs, write_study

from gd_plugin.stats import Summary, read_study


@pytest.fixture(scope="module")
def render():
    path = Path(__file__).parents[1] / "recipes/render.py"  # of the checkout: it is not installed
    spec = importlib.util.spec_from_file_location("render", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_difference_of_two_routes(render):
    """Welch 1947, by hand."""
    first, second = [0.90, 0.92, 0.91], [0.85, 0.80, 0.90, 0.87]
    a, b = (np.var(values, ddof=1) / len(values) for values in (first, second))
    freedom = (a + b) ** 2 / (a**2 / 2 + b**2 / 3)
    mean, half = np.mean(first) - np.mean(second), t.ppf(0.975, freedom) * np.sqrt(a + b)
    p = 2 * t.sf(mean / np.sqrt(a + b), freedom)
    expected = f"+{100 * mean:.2f} ({100 * (mean - half):+.2f} to {100 * (mean + half):+.2f}), p {p:.2f}"
    assert render.unpaired("accuracy", first, second) == expected
    assert render.unpaired("accuracy", second, first).startswith(f"-{100 * mean:.2f} (")


def test_what_is_better_and_worse(render, tmp_path):
    methods = read_study(write_study(tmp_path, runs(METHODS, 2))).methods[1:]
    for method, (difference, q) in zip(methods, [(0.1, 0.04), (-0.1, 0.04), (0.1, 0.06), (-0.2, 0.001)], strict=True):
        method.summaries["ece"] = Summary({}, difference=difference, q=q)
    assert render._significant(methods, "ece", -1) == "better: beta 5; focal loss. Worse: beta 0.1"
    assert render._significant(methods, "ece", 1) == "better: beta 0.1. Worse: beta 5; focal loss"
    assert render._significant(methods[2:3], "ece", 1) == "better: none. Worse: none"
    assert render._significant(methods * 4, "ece", 1) == ("better: beta 0.1; beta 0.1; beta 0.1; beta 0.1. Worse: 8")


def test_the_committed_studies_are_found(render):
    assert {"digits", "mnist_mlp", "cifar10_small"} <= render.studies().keys()
    assert Path(render.RESULTS).is_dir()
