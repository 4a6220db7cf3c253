"""The metrics for Hugging Face `evaluate`, against torchmetrics, netcal and scikit-learn."""

import doctest
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from netcal.metrics import ACE, ECE, MCE
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from gd_plugin.evaluate_modules import NAMES, load
from gd_plugin.metrics import BINNINGS, NORMS, ClassificationMetrics, classification_metrics


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """evaluate's caches, in place of the user's; it reads the environment once, at its import."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(evaluate.config, name, tmp_path_factory.mktemp(name))
        yield


@pytest.fixture(scope="module")
def metrics(caches):
    return {name: load(name, keep_in_memory=True) for name in NAMES}


@pytest.fixture
def calibration_error(metrics):
    def compute(probabilities, target, **kwargs) -> float:
        data = dict(predictions=probabilities, references=target, input_type="probabilities")
        return metrics["calibration_error"].compute(**data, **kwargs)["calibration_error"]

    return compute


def batch(n=300, num_classes=7, seed=0):
    """Logits that are no fp32 numbers, and classes; calibrated but for chance, so that bins have gaps of both signs."""
    random = np.random.default_rng(seed)
    target = random.integers(num_classes, size=n)
    logits = random.normal(size=(n, num_classes)) + 1.5 * np.eye(num_classes)[target]
    return 1.5 * logits, target


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def top(probabilities, target):
    """Confidence and correctness."""
    return probabilities.max(1), (probabilities.argmax(1) == target).astype(float)


def with_confidence(confidence, num_classes=2):
    """Rows that predict class 0."""
    confidence = np.asarray(confidence)[:, None]
    return np.hstack([confidence, np.repeat((1 - confidence) / (num_classes - 1), num_classes - 1, axis=1)])


def case(logits, target):
    return softmax(logits), target


RANDOM = case(*batch())
CASES = {
    "random": RANDOM,
    "many classes": case(*batch(123, 31)),
    "two classes": case(*batch(252, 2)),
    "all right": (RANDOM[0], RANDOM[0].argmax(1)),
    "all wrong": (RANDOM[0], RANDOM[0].argmin(1)),
    "ties": (with_confidence([0.41, 0.57, 0.73] * 20, 4), np.array([0, 1] * 30)),
    "one sample": case(*batch(1)),
}
over_cases = pytest.mark.parametrize("case", CASES)


# The values ----------------------------------------------------------------------------------------------------------


@over_cases
@pytest.mark.parametrize("num_bins", [1, 10, 15])
@pytest.mark.parametrize("norm", NORMS)
def test_equal_width_is_that_of_torchmetrics(case, num_bins, norm, calibration_error):
    p, y = CASES[case]
    expected = multiclass_calibration_error(torch.tensor(p), torch.tensor(y), p.shape[1], num_bins, norm)
    assert calibration_error(p, y, num_bins=num_bins, norm=norm) == pytest.approx(expected.item(), abs=1e-6)


@over_cases
@pytest.mark.parametrize("norm", NORMS)
def test_classwise_is_the_binary_error_of_torchmetrics_over_the_classes(case, norm, calibration_error):
    p, y = CASES[case]
    classes = [
        binary_calibration_error(torch.tensor(p[:, c]), torch.tensor(y == c).int(), 15, norm).item()
        for c in range(p.shape[1])
    ]
    expected = {"l1": np.mean(classes), "l2": np.sqrt(np.mean(np.square(classes))), "max": max(classes)}[norm]
    assert calibration_error(p, y, binning="classwise", norm=norm) == pytest.approx(expected, abs=1e-6)


# netcal is given confidence and correctness: of probabilities it measures, where two classes occur, the second class.
@over_cases
@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_equal_width_is_that_of_netcal(case, num_bins, calibration_error):
    p, y = CASES[case]
    ece, mce = (metric(num_bins).measure(*top(p, y)) for metric in (ECE, MCE))
    assert calibration_error(p, y, num_bins=num_bins) == pytest.approx(ece, abs=1e-6)
    assert calibration_error(p, y, num_bins=num_bins, norm="max") == pytest.approx(mce, abs=1e-6)


# Only where the number of bins divides that of samples and no two confidences are equal. Otherwise netcal's quantiles
# cut elsewhere, and equal confidences, which here share their mean accuracy, lie in one bin. Its ACE counts every bin
# alike, which is the ECE where all are equally full; over bins of equal width it is another metric.
@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_equal_mass_is_that_of_netcal(num_bins, calibration_error):
    value = calibration_error(*RANDOM, num_bins=num_bins, binning="equal_mass")
    for metric in (ECE, ACE):
        expected = metric(num_bins, equal_intervals=False).measure(*top(*RANDOM))
        assert value == pytest.approx(expected, abs=1e-6)
    mce = MCE(num_bins, equal_intervals=False).measure(*top(*RANDOM))
    assert calibration_error(*RANDOM, num_bins=num_bins, binning="equal_mass", norm="max") == pytest.approx(mce)


@pytest.mark.parametrize("norm", NORMS)
def test_an_edge_belongs_to_the_bin_below(norm, calibration_error):
    """As Guo et al. define it; to the bin above in torchmetrics and netcal, and torchmetrics gives 1 a bin of its own.
    With confidences just below the edge all three agree."""
    edges, y = np.array([0.6, 0.75, 0.75, 0.8, 1.0, 0.9]), np.array([0, 1, 1, 0, 0, 1])

    def theirs(confidence):
        p = torch.tensor(with_confidence(confidence))
        return multiclass_calibration_error(p, torch.tensor(y), 2, 4, norm).item()

    value = calibration_error(with_confidence(edges), y, num_bins=4, norm=norm)
    assert value == pytest.approx(theirs(edges - 1e-6), abs=2e-6)
    assert value != pytest.approx(theirs(edges), abs=0.05)
    if norm == "l1":
        confidence, correct = top(with_confidence(edges), y)
        assert value == pytest.approx(ECE(4).measure(confidence - 1e-6, correct), abs=2e-6)
        assert value != pytest.approx(ECE(4).measure(confidence, correct), abs=0.05)


def test_probabilities_stay_on_their_edge(calibration_error):
    """Their softmax after a logarithm is off by a bit, for some of these."""
    p = with_confidence(np.arange(51, 101) / 100)
    again = softmax(np.log(np.clip(p, 1e-300, None)))
    assert (again.max(1) > p.max(1)).any()
    for i in range(len(p)):
        metrics = ClassificationMetrics(100, input_type="probabilities")
        metrics.update(p[i : i + 1], np.array([0]))
        assert metrics.reliability()[50 + i]["count"] == 1


def test_every_choice_gives_another_value(calibration_error):
    values = [
        calibration_error(*RANDOM, binning=binning, norm=norm, num_bins=num_bins)
        for binning, norm, num_bins in itertools.product(BINNINGS, NORMS, (10, 15))
    ]
    assert len({round(value, 6) for value in values}) == 18


@over_cases
def test_likelihood_and_brier_score_are_those_of_scikit_learn(case, metrics):
    p, y = CASES[case]
    labels = list(range(p.shape[1]))
    expected = {
        "negative_log_likelihood": log_loss(y, p, labels=labels),
        "brier_score": brier_score_loss(y, p, labels=labels, scale_by_half=False),
    }
    for name, value in expected.items():
        of_logits = metrics[name].compute(predictions=np.log(p) + 3, references=y)
        of_probabilities = metrics[name].compute(predictions=p, references=y, input_type="probabilities")
        assert of_logits == {name: pytest.approx(value, abs=1e-9)}
        assert of_probabilities == {name: pytest.approx(value, abs=1e-9)}


def test_known_values(metrics):
    """Two samples of confidence 0.9, one of them right; a class of probability 0 comes true."""
    data = dict(predictions=[[0.9, 0.1, 0], [0.9, 0.1, 0]], references=[0, 2], input_type="probabilities")
    result = metrics["calibration_error"].compute(**data)
    assert result == {"calibration_error": pytest.approx(0.4), "confidence_gap": pytest.approx(0.4)}
    result = metrics["calibration_error"].compute(**(data | {"references": [0, 0]}))
    assert result == {"calibration_error": pytest.approx(0.1), "confidence_gap": pytest.approx(-0.1)}
    assert metrics["negative_log_likelihood"].compute(**data) == {"negative_log_likelihood": math.inf}
    assert metrics["brier_score"].compute(**data)["brier_score"] == pytest.approx((0.01 + 0.01 + 0.81 + 0.01 + 1) / 2)


def test_ignored_samples_and_nan(metrics):
    logits, y = batch()
    y[::3] = 255
    kept = metrics["calibration_error"].compute(predictions=logits[y != 255], references=y[y != 255])
    assert metrics["calibration_error"].compute(predictions=logits, references=y, ignore_index=255) == kept
    logits[0, 0] = math.nan
    assert metrics["calibration_error"].compute(predictions=logits, references=y, ignore_index=255) == kept
    logits[1, 0] = math.nan
    for name in NAMES:
        result = metrics[name].compute(predictions=logits, references=y, ignore_index=255)
        assert all(math.isnan(value) for value in result.values())


# Through evaluate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_in_memory", [True, False])
def test_streaming_equals_one_call(keep_in_memory):
    logits, y = batch(2500)
    metric = load("negative_log_likelihood", keep_in_memory=keep_in_memory)
    expected = {"negative_log_likelihood": pytest.approx(classification_metrics(logits, y)["nll"], rel=1e-13)}
    assert metric.compute(predictions=logits, references=y) == expected
    assert metric.compute(predictions=logits.tolist(), references=y.tolist()) == expected
    assert metric.compute(predictions=logits.astype(np.float32), references=y) != expected  # fp32 would be seen

    metric.add_batch(predictions=logits[:1200], references=y[:1200])
    for z, label in zip(logits[1200:1203], y[1200:1203], strict=True):
        metric.add(prediction=z, reference=label)
    metric.add_batch(predictions=torch.tensor(logits[1203:2000]), references=torch.tensor(y[1203:2000]))
    metric.add_batch(predictions=logits[:0], references=y[:0])
    metric.add_batch(predictions=np.asfortranarray(logits[2000:]), references=y[2000:])
    assert metric.compute() == expected


def test_an_array_is_stored_without_a_python_object_per_number(monkeypatch):
    logits, y = batch()
    metric = load("negative_log_likelihood", keep_in_memory=True)
    seen = []
    monkeypatch.setattr(
        "datasets.arrow_writer.ArrowWriter.write_batch", lambda self, batch: seen.append(type(batch["predictions"]))
    )
    for predictions in (logits, torch.tensor(logits), logits.tolist()):
        metric.add_batch(predictions=predictions, references=y)
    assert [kind.__name__ for kind in seen] == ["ListArray", "ListArray", "list"]


def test_combined():
    logits, y = batch()
    expected = {}
    for name in NAMES:
        expected |= load(name, keep_in_memory=True).compute(predictions=logits, references=y)
    assert len(expected) == 4
    together = evaluate.combine([load(name, keep_in_memory=True) for name in NAMES])
    assert together.compute(predictions=logits, references=y) == expected
    for part in (slice(0, 100), slice(100, 300)):
        together.add_batch(predictions=logits[part], references=y[part])
    assert together.compute() == pytest.approx(expected, rel=1e-12)
    # Keywords go to every metric, so those that all have.
    data = dict(predictions=softmax(logits), references=y, input_type="probabilities", ignore_index=0)
    assert together.compute(**data).keys() == expected.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_right(name, metrics, monkeypatch):
    monkeypatch.setattr("gd_plugin.evaluate_modules.load", lambda name: metrics[name])
    examples = doctest.DocTestParser().get_doctest(metrics[name].inputs_description, {}, name, None, 0)
    assert len(examples.examples) >= 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctest.DocTestRunner().run(examples).failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_module_says_what_it_is(name, metrics):
    metric = metrics[name]
    assert metric.name == name and metric.module_type == "metric"
    assert metric.citation.strip().startswith("@") and metric.info.reference_urls
    assert metric.description.strip() in type(metric).__doc__


OTHER_PROCESS = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("the network was asked for")

socket.socket.connect = socket.getaddrinfo = refuse
import numpy as np
import gd_plugin

assert not {"evaluate", "datasets"} & sys.modules.keys()
from gd_plugin.evaluate_modules import load

z, y = (np.load(f"{name}.npy") for name in ("logits", "target"))
metric = load("calibration_error", num_process=2, process_id=1, experiment_id="test", cache_dir="shared", timeout=300)
metric.add_batch(predictions=z[100:], references=y[100:])
assert metric.compute(binning="equal_mass") is None
print(json.dumps(load("calibration_error").compute(predictions=z, references=y, binning="equal_mass")))
"""


def test_two_processes_equal_one(tmp_path, metrics):
    """The second one has nothing but empty caches and no network."""
    logits, y = batch()
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "target.npy", y)
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    packages = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS],
        cwd=tmp_path,
        env=os.environ | offline | {"PYTHONPATH": packages},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        kwargs = dict(num_process=2, process_id=0, experiment_id="test", cache_dir=str(tmp_path / "shared"))
        metric = load("calibration_error", **kwargs, timeout=300)
        metric.add_batch(predictions=logits[:100], references=y[:100])
        both = metric.compute(binning="equal_mass")
        out, err = other.communicate(timeout=300)
    finally:
        other.kill()
    assert other.returncode == 0, err
    one = metrics["calibration_error"].compute(predictions=logits, references=y, binning="equal_mass")
    part = metrics["calibration_error"].compute(predictions=logits[:100], references=y[:100], binning="equal_mass")
    assert both == pytest.approx(one, rel=1e-12) and both != pytest.approx(part, rel=1e-3)
    assert json.loads(out) == pytest.approx(one, rel=1e-12)
    assert (tmp_path / "home/modules/evaluate_modules/metrics/calibration_error").is_dir()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(binning="quantile"), "binning must be one of equal_width, equal_mass, classwise, not 'quantile'"),
        (dict(norm="l3"), "norm must be one of l1, l2, max, not 'l3'"),
        (dict(input_type="softmax"), "input_type must be one of logits, probabilities, not 'softmax'"),
        (dict(num_bins=0), "num_bins must be at least 1, not 0"),
        (dict(input_type="probabilities"), "needs rows that are not negative and sum to 1; pass scores before"),
        (dict(input_type="probabilities", predictions=[[1.5, -0.5], [0.5, 0.5]]), "needs rows that are not negative"),
        (dict(predictions=[[1.0, 2.0], [1.0, 2.0, 3.0]]), "one score per class for every sample, not 2 to 3"),
        (dict(predictions=[[1.0, None], [1.0, 2.0]]), "must be numbers throughout, not None"),
        (dict(predictions=[None, [1.0, 2.0]]), "must be numbers throughout, not None"),
        (dict(references=[0, None]), "must be numbers throughout, not None"),
        (dict(references=[0, 2]), "holds class 2, but logits have 2 classes, 0 to 1"),
        (dict(references=[-100, -100]), "must hold a class other than ignore_index=-100"),
        (dict(predictions=[], references=[]), "must hold a class other than ignore_index=-100"),
        (dict(references=[0]), r"Mismatch in the number of predictions \(2\) and references \(1\)"),
        (dict(predictions=np.zeros((3, 2))), r"Mismatch in the number of predictions \(3\) and references \(2\)"),
        (dict(predictions=[1, 0]), "Expected format"),
    ],
)
def test_wrong_input_is_refused(wrong, message):
    metric = load("calibration_error", keep_in_memory=True)
    right = dict(predictions=[[1.0, 2.0], [2.0, 1.0]], references=[0, 1])
    with pytest.raises(ValueError, match=message):
        metric.compute(**(right | wrong))


def test_after_an_error_the_module_can_be_used(metrics):
    metric = load("calibration_error")
    data = dict(predictions=[[1.0, 2.0], [2.0, 1.0]], references=[0, 1])
    with pytest.raises(ValueError, match="norm"):
        metric.compute(**data, norm="l3")
    assert metric.compute(**data) == metrics["calibration_error"].compute(**data)


def test_probabilities_without_input_type_are_warned_of_once(metrics):
    p, y = case(*batch(2500))
    metric = metrics["calibration_error"]
    with pytest.warns(UserWarning, match='pass input_type="probabilities"') as caught:
        metric.compute(predictions=p, references=y)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.compute(predictions=p, references=y, input_type="probabilities")
        metric.compute(predictions=p[:1], references=y[:1])
        metric.compute(predictions=np.vstack([p, p[:1] + 1]), references=[*y, 0])


def test_what_cannot_be_loaded():
    with pytest.raises(ValueError, match=r"one of brier_score, calibration_error, negative_log_likelihood, not 'ece'"):
        load("ece")
    for keyword in ("num_bins", "num_processes"):
        with pytest.raises(TypeError, match=f"no keyword '{keyword}'"):
            load("calibration_error", **{keyword: 2})


def test_without_evaluate(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    monkeypatch.delitem(sys.modules, "gd_plugin.evaluate_modules")
    with pytest.raises(ImportError, match=r"evaluate is missing: pip install 'gd_plugin\[evaluate\]'"):
        importlib.import_module("gd_plugin.evaluate_modules")


# What gd_plugin.metrics has for them ---------------------------------------------------------------------------------


def test_class_counts_are_needed_and_merged():
    logits, y = batch()
    plain = ClassificationMetrics()
    plain.update(logits, y)
    plain.calibration_error("classwise")
    for norm in ("l2", "max"):
        with pytest.raises(ValueError, match="class_counts=True"):
            plain.calibration_error("classwise", norm)

    whole, *parts = (ClassificationMetrics(class_counts=True) for _ in range(3))
    whole.update(logits, y)
    for part, rows in zip(parts, (slice(0, 100), slice(100, 300)), strict=True):
        part.update(logits[rows], y[rows])
    into = ClassificationMetrics(class_counts=True)
    for part in parts:
        into.merge(part)
    for norm in NORMS:
        assert into.calibration_error("classwise", norm) == pytest.approx(whole.calibration_error("classwise", norm))
    with pytest.raises(ValueError, match="class_counts=True to both"):
        into.merge(plain)
    plain.merge(into)
    assert plain.compute() == pytest.approx(whole.compute())


def test_given_probabilities_are_left_alone():
    p, y = torch.tensor(RANDOM[0]), torch.tensor(RANDOM[1])
    for target in (y, p.clone()):
        before = p.clone()
        metrics = ClassificationMetrics(input_type="probabilities")
        metrics.update(p, target)
        assert torch.equal(p, before)
        assert metrics.compute() == pytest.approx(classification_metrics(p.log(), target), abs=1e-9)
