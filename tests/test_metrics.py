"""The metrics against a slow reference that loops over samples and bins in numpy."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

import gd_plugin.metrics
from gd_plugin.metrics import ClassificationMetrics, classification_metrics

KEYS = {"accuracy", "nll", "brier", "ece", "adaptive_ece", "classwise_ece", "mce", "confidence_gap"}


def reference(logits, target, num_bins=15, ignore_index=-100) -> dict[str, float]:
    logits = np.asarray(logits, dtype=np.float64)
    num_classes = logits.shape[-1]
    rows = logits.reshape(-1, num_classes)
    target = np.asarray(target)
    soft = target.shape == logits.shape
    target = target.reshape(-1, num_classes) if soft else target.reshape(-1)

    confidence, correct, nll, brier, probabilities, labels = [], [], [], [], [], []
    for z, y in zip(rows, target, strict=True):
        if not soft and y == ignore_index:
            continue
        q = np.asarray(y, dtype=np.float64) if soft else np.eye(num_classes)[y]
        e = np.exp(z - z.max())
        p = e / e.sum()
        log_p = z - z.max() - math.log(e.sum())
        confidence.append(p.max())
        correct.append(float(z.argmax() == q.argmax()))
        nll.append(-sum(q[k] * log_p[k] for k in range(num_classes) if q[k] > 0))
        brier.append(sum((p - q) ** 2))
        probabilities.append(p)
        labels.append(q.argmax())

    def gaps(p, hit) -> list[tuple[int, float]]:
        """(count, mean p - mean hit) of every bin that is not empty."""
        result = []
        for b in range(num_bins):
            lower = -1.0 if b == 0 else b / num_bins
            members = [i for i in range(len(p)) if lower < p[i] <= (b + 1) / num_bins]
            if members:
                result.append(
                    (len(members), sum(p[i] for i in members) / len(members) - np.mean([hit[i] for i in members]))
                )
        return result

    n = len(confidence)
    bins = gaps(confidence, correct)
    per_class = [
        sum(m * abs(g) for m, g in gaps([p[c] for p in probabilities], [float(y == c) for y in labels])) / n
        for c in range(num_classes)
    ]
    # Equal mass: of samples with equal confidence, each counts as their mean.
    shared = [np.mean([h for c, h in zip(confidence, correct, strict=True) if c == own]) for own in confidence]
    order = np.argsort(confidence, kind="stable")
    adaptive = sum(abs(sum(confidence[i] - shared[i] for i in part)) for part in np.array_split(order, num_bins)) / n
    return {
        "accuracy": np.mean(correct),
        "nll": np.mean(nll),
        "brier": np.mean(brier),
        "ece": sum(m * abs(g) for m, g in bins) / n,
        "adaptive_ece": adaptive,
        "classwise_ece": np.mean(per_class),
        "mce": max(abs(g) for _, g in bins),
        "confidence_gap": np.mean(confidence) - np.mean(correct),
    }


def assert_equal(result, expected, tolerance=1e-12):
    assert result.keys() == KEYS
    assert all(type(value) is float and math.isfinite(value) for value in result.values())
    assert result == pytest.approx(expected, rel=tolerance, abs=tolerance)


def batch(n=300, num_classes=7, scale=2.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, (n,), generator=generator)
    logits = torch.randn(n, num_classes, generator=generator)
    logits[torch.arange(n), target] += 1
    return (scale * logits).to(dtype), target


@pytest.mark.parametrize("num_bins", [1, 2, 10, 15])
@pytest.mark.parametrize(("n", "num_classes"), [(300, 7), (252, 2), (123, 31), (5, 3), (1, 4), (9, 1)])
def test_equals_the_reference(n, num_classes, num_bins):
    logits, target = batch(n, num_classes)
    assert_equal(classification_metrics(logits, target, num_bins), reference(logits, target, num_bins))


@pytest.mark.parametrize("key", sorted(KEYS))
def test_the_reference_can_tell(key):
    logits, target = batch()
    assert classification_metrics(logits, target)[key] != pytest.approx(
        reference(logits * 1.5, target.roll(1))[key], 1e-3
    )


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        pytest.param([[40.0, 0.0], [0.0, 40.0]], [0, 1], id="all correct and confident"),
        pytest.param([[40.0, 0.0], [0.0, 40.0]], [1, 0], id="all wrong and confident"),
        pytest.param([[900.0, 0.0, 0.0]] * 4, [0, 0, 1, 2], id="one class only, confidence exactly 1"),
        pytest.param([[0.0, -math.inf]] * 3, [0, 0, 0], id="a class masked"),
        pytest.param([[0.0] * 5] * 6, [0, 1, 2, 3, 4, 0], id="uniform over 5, on the edge 3 / 15"),
        pytest.param([[0.0] * 15] * 3, [0, 7, 14], id="uniform over 15, on the first edge"),
        pytest.param([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [0, 1, 1], id="ties"),
        pytest.param([[0.0] * 3, [0.0, 0.0, 50.0]] * 20, [0, 1] * 20, id="two confidences only"),
        pytest.param([[1e4, -1e4], [-1e4, 1e4]], [1, 1], id="far apart"),
        pytest.param([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.25]], [1, 0], id="p_c on the edge 1 / 2"),
    ],
)
@pytest.mark.parametrize("num_bins", [2, 10, 15])
def test_degenerate_inputs(logits, target, num_bins):
    result = classification_metrics(torch.tensor(logits), torch.tensor(target), num_bins)
    assert_equal(result, reference(logits, target, num_bins))


def test_known_values():
    # Two samples at confidence 1, one of them wrong; two at 1/2, both right.
    logits = torch.tensor([[0.0, -math.inf], [0.0, -1e3], [0.0, 0.0], [0.0, 0.0]])
    result = classification_metrics(logits, torch.tensor([0, 1, 0, 0]))
    expected = {
        "accuracy": 0.75,
        "nll": (1000 + 2 * math.log(2)) / 4,
        "brier": (2 + 0.5 + 0.5) / 4,
        "ece": 0.5,
        "adaptive_ece": 0.5,
        # Class 0: one false 1.0, and two 0.5 that are always right; class 1 mirrors it.
        "classwise_ece": 0.5,
        "mce": 0.5,
        "confidence_gap": 0.0,
    }
    assert_equal(result, expected)


def test_upper_edges_belong_to_the_bin_below():
    metrics = ClassificationMetrics(num_bins=10)
    metrics.update(torch.zeros(3, 2), torch.tensor([0, 1, 1]))  # confidence 1/2
    metrics.update(torch.tensor([[1e-11, 0.0]]).double(), torch.tensor([0]))  # barely above 1/2
    metrics.update(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))  # confidence 1
    table = metrics.reliability()
    assert [row["count"] for row in table] == [0, 0, 0, 0, 3, 1, 0, 0, 0, 1]
    assert table[4] == {"lower": 0.4, "upper": 0.5, "count": 3, "confidence": 0.5, "accuracy": pytest.approx(1 / 3)}
    assert table[9] == {"lower": 0.9, "upper": 1.0, "count": 1, "confidence": 1.0, "accuracy": 1.0}
    assert table[0] == {"lower": 0.0, "upper": 0.1, "count": 0, "confidence": None, "accuracy": None}


def test_reliability_holds_the_ece():
    logits, target = batch()
    metrics = ClassificationMetrics()
    metrics.update(logits, target)
    rows = [row for row in metrics.reliability() if row["count"]]
    assert sum(row["count"] for row in rows) == len(target)
    ece = sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(target)
    assert metrics.compute()["ece"] == pytest.approx(ece, abs=1e-12)


def test_token_shaped_input_with_ignored_targets():
    logits, target = batch(24 * 5)
    logits, target = logits.reshape(24, 5, 7), target.reshape(24, 5).clone()
    everything = classification_metrics(logits, target)
    target[:, 3:] = -100
    target[4] = -100
    kept = target != -100
    result = classification_metrics(logits, target)
    assert_equal(result, reference(logits, target))
    assert result == classification_metrics(logits[kept], target[kept])
    assert result != everything
    assert result == classification_metrics(logits, target.masked_fill(~kept, 255), ignore_index=255)


def test_ignore_index_does_not_wrap_in_uint8():
    target = torch.full((4,), 156, dtype=torch.uint8)  # -100 modulo 256
    assert_equal(classification_metrics(batch(4, 200)[0], target), reference(batch(4, 200)[0], target.long()))


def test_class_probabilities():
    logits, target = batch()
    soft = F.softmax(batch(seed=1)[0], -1)
    assert_equal(classification_metrics(logits, soft), reference(logits, soft), tolerance=1e-7)
    assert classification_metrics(logits, soft)["nll"] == pytest.approx(F.cross_entropy(logits, soft).item(), rel=1e-5)
    one_hot = F.one_hot(target, 7).float()
    assert_equal(classification_metrics(logits, one_hot), classification_metrics(logits, target))
    assert classification_metrics(logits, soft)["nll"] != pytest.approx(classification_metrics(logits, target)["nll"])


def test_a_masked_class_of_probability_zero_adds_nothing():
    result = classification_metrics(torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.5, 0.5, 0.0]]))
    assert result["nll"] == pytest.approx(math.log(2))
    assert result["brier"] == 0.0


def test_a_masked_target_has_infinite_nll():
    assert classification_metrics(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))["nll"] == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_computed_in_full_precision(dtype):
    logits, target = batch(dtype=dtype)
    result = classification_metrics(logits, target)
    assert_equal(result, reference(logits.double(), target))
    if dtype != torch.float64:
        assert result["nll"] != pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)


def test_numpy_and_gradients():
    logits, target = batch()
    expected = classification_metrics(logits, target)
    assert classification_metrics(logits.numpy(), target.numpy()) == expected
    assert classification_metrics(logits.clone().requires_grad_(), target.int()) == expected


def test_fp64_logits_are_left_alone():
    logits, target = batch(dtype=torch.float64)
    before = logits.clone(), target.clone()
    classification_metrics(logits, target)
    assert torch.equal(logits, before[0]) and torch.equal(target, before[1])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 80), min_size=1, max_size=6), st.integers(0, 1000))
def test_uneven_pieces_equal_one_shot(sizes, seed):
    logits, target = batch(sum(sizes) + 1, seed=seed)
    metrics = ClassificationMetrics()
    for z, y in zip(logits.split([*sizes, 1]), target.split([*sizes, 1]), strict=True):
        metrics.update(z, y)
    assert_equal(metrics.compute(), classification_metrics(logits, target))


def test_mean_of_batches_is_not_the_ece():
    """What streaming is for: the calibration errors of batches do not average to that of the whole."""
    logits, target = batch()
    parts = [classification_metrics(z, y) for z, y in zip(logits.split(50), target.split(50), strict=True)]
    whole = classification_metrics(logits, target)
    for key in ("ece", "adaptive_ece", "classwise_ece", "mce"):
        assert np.mean([part[key] for part in parts]) > 1.05 * whole[key]
    assert np.mean([part["nll"] for part in parts]) == pytest.approx(whole["nll"])


def test_compute_between_updates_and_reset():
    logits, target = batch()
    metrics = ClassificationMetrics()
    metrics.update(logits[:100], target[:100])
    metrics.compute()
    metrics.update(logits[100:], target[100:])
    assert_equal(metrics.compute(), classification_metrics(logits, target))
    assert metrics.compute() == metrics.compute()
    metrics.reset()
    metrics.update(*batch(50, num_classes=3))
    assert metrics.compute() == classification_metrics(*batch(50, num_classes=3))


def test_the_order_of_samples_has_no_influence():
    logits, target = batch(200)
    logits[::2] = 0.0  # half of the confidences are equal
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert_equal(classification_metrics(logits[order], target[order]), classification_metrics(logits, target))
    assert classification_metrics(logits[order], target) != pytest.approx(classification_metrics(logits, target))


@pytest.mark.parametrize("elements", [1, 7, 50, 1000])
@pytest.mark.parametrize("soft", [False, True])
def test_chunks_do_not_change_the_result(monkeypatch, elements, soft):
    logits, target = batch(120)
    target[::3] = -100
    if soft:
        target = F.softmax(batch(120, seed=1)[0], -1)
    expected = classification_metrics(logits, target)
    monkeypatch.setattr(gd_plugin.metrics, "_CHUNK_ELEMENTS", elements)
    assert_equal(classification_metrics(logits, target), expected)


class LargestAllocation(TorchFunctionMode):
    """The size in bytes of the largest storage that a torch call returns and that is not one of ``inputs``."""

    def __init__(self, *inputs):
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.inputs:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def test_no_temporary_is_larger_than_a_chunk(monkeypatch):
    logits, target = batch(400, num_classes=50)

    def largest(elements):
        monkeypatch.setattr(gd_plugin.metrics, "_CHUNK_ELEMENTS", elements)
        with LargestAllocation(logits, target) as seen:
            ClassificationMetrics().update(logits, target)
        return seen.bytes

    assert largest(1010) == 20 * 50 * 8
    assert largest(10**6) == 400 * 50 * 8


def test_the_state_does_not_grow_with_classes_times_samples():
    def size(n, num_classes):
        metrics = ClassificationMetrics()
        metrics.update(*batch(n, num_classes))
        metrics.compute()
        state = [x for value in vars(metrics).values() for x in (value if isinstance(value, list) else [value])]
        return sum(x.untyped_storage().nbytes() for x in state if isinstance(x, torch.Tensor))

    assert size(1000, 100) - size(10, 100) == 990 * 9
    assert size(10, 200) - size(10, 100) == 100 * 15 * 8


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(5, dtype=torch.long), r"\(4, 3\) need integer classes of shape \(4,\)"),
        (torch.zeros(4, 3, 2), torch.zeros(4, 2, dtype=torch.long), "last dimension"),
        (torch.zeros(4, 3), torch.zeros(4), "need integer classes"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long), "floating class probabilities"),
        (torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.long), "scores of all classes"),
        (torch.tensor(0.0), torch.tensor(0), "logits must be floating"),
        (torch.zeros(4, 0), torch.zeros(4, dtype=torch.long), "logits must be floating"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), "holds class 3, but logits have 3 classes, 0 to 2"),
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, -1]), "ignore_index=-1"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "do not sum to 1"),
        (torch.zeros(2, 3), torch.full((2, 3), math.nan), "do not sum to 1"),
    ],
)
def test_wrong_input_is_refused(logits, target, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(logits, target)


@pytest.mark.parametrize("row", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
def test_a_diverged_model_makes_every_metric_nan(row):
    metrics = ClassificationMetrics()
    metrics.update(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    assert all(math.isfinite(value) for value in metrics.compute().values())
    metrics.update(torch.tensor([row]), torch.tensor([0]))
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert [bin["count"] for bin in metrics.reliability()] == [0] * 15
    metrics.reset()
    metrics.update(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
    assert math.isfinite(metrics.compute()["ece"])


def test_nan_at_an_ignored_position_is_no_error():
    logits, target = batch(10)
    logits[3], target[3] = math.nan, -100
    assert_equal(classification_metrics(logits, target), reference(logits, target))


def test_number_of_classes_may_not_change():
    metrics = ClassificationMetrics()
    metrics.update(*batch(10, 4))
    before = metrics.compute()
    with pytest.raises(ValueError, match=r"5 classes, those before had 4; call reset\(\)"):
        metrics.update(*batch(10, 5))
    assert metrics.compute() == before


def test_nothing_to_measure():
    metrics = ClassificationMetrics()
    for call in (metrics.compute, metrics.reliability):
        with pytest.raises(ValueError, match="no sample"):
            call()
    metrics.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    metrics.update(torch.zeros(2, 3), torch.tensor([-100, -100]))
    with pytest.raises(ValueError, match="no sample"):
        metrics.compute()
    with pytest.raises(ValueError, match="num_bins"):
        ClassificationMetrics(num_bins=0)


# Merging --------------------------------------------------------------------------------------------------------------


def measured(logits, target, **kwargs) -> ClassificationMetrics:
    metrics = ClassificationMetrics(**kwargs)
    metrics.update(logits, target)
    return metrics


def merged(*parts) -> ClassificationMetrics:
    metrics = ClassificationMetrics(parts[0].num_bins)
    for part in parts:
        metrics.merge(part)
    return metrics


def assert_same(one, other):
    assert len(one) == len(other)
    assert_equal(one.compute(), other.compute())
    for row, expected in zip(one.reliability(), other.reliability(), strict=True):
        assert row["count"] == expected["count"]
        assert row == {key: v if v is None else pytest.approx(v, rel=1e-12, abs=1e-12) for key, v in expected.items()}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 80), min_size=1, max_size=6), st.integers(0, 1000), st.sampled_from([1, 10, 15]))
def test_merged_parts_equal_one_shot(sizes, seed, num_bins):
    logits, target = batch(sum(sizes) + 1, seed=seed)
    target[::7] = -100
    target[-1] = 0
    sizes = [*sizes, 1]
    parts = [measured(*part, num_bins=num_bins) for part in zip(logits.split(sizes), target.split(sizes), strict=True)]
    whole = measured(logits, target, num_bins=num_bins)
    assert_same(merged(*parts), whole)
    assert_same(merged(*parts[::-1]), whole)
    # As they come from other processes, and some after others.
    parts = pickle.loads(pickle.dumps(parts))
    parts[0].merge(merged(*parts[1:]))
    assert_same(parts[0], whole)


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_part_that_is_not_merged_is_missed(key):
    logits, target = batch()
    parts = [measured(*part) for part in zip(logits.split(100), target.split(100), strict=True)]
    whole = measured(logits, target)
    assert merged(*parts).compute()[key] == pytest.approx(whole.compute()[key], rel=1e-12)
    assert merged(*parts[:2]).compute()[key] != pytest.approx(whole.compute()[key], rel=1e-6)
    assert merged(*parts[:2]).reliability() != whole.reliability()


def test_merged_class_probabilities():
    logits, target = batch()[0], F.softmax(batch(seed=1)[0], -1)
    assert_same(
        merged(measured(logits[:50], target[:50]), measured(logits[50:], target[50:])), measured(logits, target)
    )


def test_merging_nothing_changes_nothing():
    logits, target = batch()
    metrics = measured(logits, target)
    before = metrics.compute(), metrics.reliability()
    metrics.merge(ClassificationMetrics())
    metrics.merge(measured(logits[:0], target[:0]))
    metrics.merge(measured(logits, torch.full_like(target, -100)))
    assert (metrics.compute(), metrics.reliability()) == before
    metrics.merge(measured(logits[:1], target[:1]))
    assert metrics.compute() != before[0]


def test_merging_into_nothing():
    logits, target = batch()
    for metrics in (ClassificationMetrics(), measured(logits[:0], target[:0])):
        metrics.merge(measured(logits, target))
        assert_same(metrics, measured(logits, target))
    with pytest.raises(ValueError, match="no sample"):
        merged(ClassificationMetrics(), measured(logits[:0], target[:0])).compute()


def test_what_is_merged_stays_as_it_was():
    logits, target = batch()
    first, second = measured(logits[:100], target[:100]), measured(logits[100:200], target[100:200])
    before = first.compute(), second.compute()
    metrics = merged(first, second)
    metrics.compute()
    metrics.update(logits[200:], target[200:])
    assert_same(metrics, measured(logits, target))
    assert (first.compute(), second.compute()) == before
    assert metrics.compute() not in before


@pytest.mark.parametrize("diverged_first", [True, False])
def test_a_diverged_part_makes_every_metric_nan(diverged_first):
    logits, target = batch(10)
    good, bad = measured(logits, target), measured(torch.full_like(logits, math.nan), target)
    parts = [bad, good] if diverged_first else [good, bad]
    metrics = merged(*parts)
    assert metrics.compute().keys() == KEYS
    assert all(math.isnan(value) for value in metrics.compute().values())
    assert [bin["count"] for bin in metrics.reliability()] == [0] * 15
    assert all(math.isfinite(value) for value in merged(good, good).compute().values())
    metrics.reset()
    metrics.merge(good)
    assert_same(metrics, good)


def test_parts_of_other_classes_or_bins_are_refused():
    metrics = measured(*batch(20, 4))
    before = metrics.compute(), metrics.reliability()
    for other, shape in (
        (measured(*batch(20, 5)), "5 classes in 15"),
        (measured(*batch(20, 4), num_bins=10), "4 classes in 10"),
    ):
        with pytest.raises(
            ValueError, match=f"^cannot merge metrics of {shape} bins into those of 4 classes in 15 bins"
        ):
            metrics.merge(other)
        assert (metrics.compute(), metrics.reliability()) == before


def test_parts_of_other_bins_are_refused_before_the_first_sample():
    metrics = ClassificationMetrics(num_bins=10)
    with pytest.raises(ValueError, match="bins"):
        metrics.merge(measured(*batch(20, 4), num_bins=15))
    assert len(metrics) == 0
    metrics.merge(measured(*batch(20, 4), num_bins=10))
    assert_same(metrics, measured(*batch(20, 4), num_bins=10))
