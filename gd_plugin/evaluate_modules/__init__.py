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

import torch

from ..metrics import ClassificationMetrics, are_probabilities

try:
    import datasets
    import evaluate
    import numpy as np
    import pyarrow as pa
except ModuleNotFoundError as error:
    raise ImportError(f"the package {error.name} is missing: pip install 'gd_plugin[evaluate]'") from error

__all__ = ["NAMES", "load", "measure", "metric_info"]

NAMES = ("brier_score", "calibration_error", "negative_log_likelihood")


def load(name: str, **kwargs) -> evaluate.Metric:
    """The metric ``name`` of `NAMES`.

    Args:
        name: a folder beside this file.
        **kwargs: those of ``evaluate.load``, such as ``num_process``, ``process_id``, ``experiment_id``, ``cache_dir``
            and ``keep_in_memory``.

    Raises:
        ValueError: an unknown name.
        TypeError: a keyword that ``evaluate.load`` does not know.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, not {name!r}")
    # evaluate drops what it does not know: num_processes=2 would measure one process's part, num_bins=10 do nothing.
    known = {**inspect.signature(evaluate.load).parameters, **inspect.signature(evaluate.EvaluationModule).parameters}
    if unknown := sorted(kwargs.keys() - known.keys()):
        raise TypeError(f"load() has no keyword {unknown[0]!r}; what concerns the metric itself is passed to compute()")
    return evaluate.load(str(Path(__file__).parent / name), **kwargs)


def metric_info(**texts) -> evaluate.MetricInfo:
    """What ``_info`` returns: the input features that the metrics here share, and a metric's own ``texts``."""
    scores = datasets.Sequence(datasets.Value("float64"))
    info = evaluate.MetricInfo(features=_Features(predictions=scores, references=datasets.Value("int64")), **texts)
    # Columns reach `measure` as Arrow arrays: lists of Python floats take five times the memory, and "numpy" rounds to
    # fp32. Set afterwards, because MetricInfo refuses every format where a feature is a sequence.
    info.format = "arrow"
    return info


class _Features(datasets.Features):
    """Takes the predictions of a batch as one array, of which evaluate would make a Python object per number."""

    def encode_batch(self, batch):
        scores = batch["predictions"]
        if not isinstance(scores, (np.ndarray, torch.Tensor)) or scores.ndim != 2:
            return super().encode_batch(batch)
        if isinstance(scores, torch.Tensor):
            scores = scores.detach().to("cpu", torch.float64).numpy()
        values = np.asarray(scores, np.float64).reshape(-1)
        offsets = np.arange(len(scores) + 1) * scores.shape[1]
        array = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)
        return {**super().encode_batch({**batch, "predictions": []}), "predictions": array}


def measure(
    predictions: pa.ChunkedArray, references: pa.ChunkedArray, input_type: str, ignore_index: int, **kwargs
) -> ClassificationMetrics:
    """The metrics of all samples; ``kwargs`` are those of `ClassificationMetrics`.

    Raises:
        ValueError: no sample, None in place of a number, another number of scores than before, and what
            `ClassificationMetrics` refuses.

    Warns:
        UserWarning: two or more samples, all of them probabilities, with ``input_type="logits"``.
    """
    metrics = ClassificationMetrics(input_type=input_type, ignore_index=ignore_index, **kwargs)
    rows = predictions.chunks  # a thousand samples each, memory-mapped; `flatten` gives a view
    if predictions.null_count or references.null_count or any(chunk.flatten().null_count for chunk in rows):
        raise ValueError("predictions and references must be numbers throughout, not None; leave such samples out")
    target = torch.tensor(references.to_numpy())
    if (target == ignore_index).all():
        raise ValueError(f"references must hold a class other than ignore_index={ignore_index}; add samples that do")
    lengths = sorted({length for chunk in rows for length in chunk.value_lengths().unique().to_pylist()})
    if len(lengths) > 1:
        raise ValueError(
            f"predictions must hold one score per class for every sample, not {lengths[0]} to {lengths[-1]}"
        )

    look_like_probabilities = input_type == "logits" and len(target) > 1
    for chunk, y in zip(rows, target.split([len(chunk) for chunk in rows]), strict=True):
        z = torch.tensor(chunk.flatten().to_numpy()).view(len(y), lengths[0])
        metrics.update(z, y)
        look_like_probabilities = look_like_probabilities and are_probabilities(z)
    if look_like_probabilities:
        warnings.warn(
            'all predictions look like probabilities, but are taken for logits; pass input_type="probabilities"',
            stacklevel=4,  # who called compute()
        )
    return metrics
