"""Calibration metrics for Hugging Face `evaluate`, one folder each, that need no network::

    from gd_plugin.evaluate_modules import load

    ece = load("calibration_error")
    ece.compute(predictions=logits, references=labels)

The maths is that of `gd_plugin.metrics`; here is only what the folders' scripts share.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..metrics import ClassificationMetrics, are_probabilities

if TYPE_CHECKING:
    import evaluate
    import pyarrow

__all__ = ["NAMES", "load", "measure", "metric_info"]

NAMES = ("brier_score", "calibration_error", "negative_log_likelihood")


def load(name: str, **kwargs) -> evaluate.Metric:
    """The metric ``name`` of `NAMES`.

    Args:
        name: a folder beside this file.
        **kwargs: those of ``evaluate.load``, such as ``num_process``, ``process_id``, ``experiment_id``, ``cache_dir``
            and ``keep_in_memory``.

    Raises:
        ImportError: `evaluate` is not installed.
        ValueError: an unknown name.
        TypeError: a keyword that ``evaluate.load`` does not know.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, not {name!r}")
    try:
        import evaluate
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the package {error.name} is missing: pip install 'gd_plugin[evaluate]'", name=error.name
        ) from error
    # evaluate drops what it does not know: num_processes=2 would measure one process's part, num_bins=10 do nothing.
    known = {**inspect.signature(evaluate.load).parameters, **inspect.signature(evaluate.EvaluationModule).parameters}
    if unknown := sorted(kwargs.keys() - known.keys()):
        raise TypeError(f"load() has no keyword {unknown[0]!r}; what concerns the metric itself is passed to compute()")
    return evaluate.load(str(Path(__file__).parent / name), **kwargs)


def metric_info(**texts) -> evaluate.MetricInfo:
    """What ``_info`` returns: the input features that the metrics here share, and a metric's own ``texts``."""
    import datasets
    import evaluate

    scores = datasets.Sequence(datasets.Value("float64"))
    info = evaluate.MetricInfo(
        features=datasets.Features({"predictions": scores, "references": datasets.Value("int64")}), **texts
    )
    # Columns reach `measure` as Arrow arrays: lists of Python floats take five times the memory, and "numpy" rounds to
    # fp32. Set afterwards, because MetricInfo refuses every format where a feature is a sequence.
    info.format = "arrow"
    return info


def measure(
    predictions: pyarrow.ChunkedArray, references: pyarrow.ChunkedArray, input_type: str = "logits", **kwargs
) -> ClassificationMetrics:
    """The metrics of all samples; ``kwargs`` are those of `ClassificationMetrics`.

    Raises:
        ValueError: no sample, None in place of a number, rows of different length, and what `ClassificationMetrics`
            refuses.

    Warns:
        UserWarning: two or more samples, all of them probabilities, with ``input_type="logits"``.
    """
    metrics = ClassificationMetrics(input_type=input_type, **kwargs)
    classes = {len(row) for row in predictions}
    return metrics
