"""Brier score for `evaluate`; the maths is ``gd_plugin.metrics.ClassificationMetrics``."""

import evaluate

from gd_plugin.evaluate_modules import measure, metric_info

_DESCRIPTION = """
The Brier score of a classifier as Brier (1950) defined it, for any number of classes: the mean over samples of
sum_c (p_c - [y = c])^2, with the probabilities p and the sample's class y; between 0 and 2. With two classes it is
twice the score that counts one class alone. A strictly proper score: only the true probabilities make it least.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float, or array): for each sample the scores of all classes, logits unless `input_type`
        says otherwise. Those of tokens are flattened to a row per token.
    references (list of int, or array): for each sample the index of its class.
    input_type (str): what `predictions` are: 'logits' (default) or 'probabilities', rows that sum to 1.
    ignore_index (int): class index of samples to skip. Default -100.

Returns:
    brier_score (float): between 0 and 2; NaN if a score is NaN.

Examples:

    >>> from gd_plugin.evaluate_modules import load
    >>> metric = load("brier_score")
    >>> result = metric.compute(predictions=[[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]], references=[0, 2])
    >>> round(result["brier_score"], 4)
    0.7207

    (0.5^2 + 0.5^2 + 0.75^2 + 0.75^2) / 2:

    >>> data = dict(predictions=[[0.5, 0.5], [0.25, 0.75]], references=[0, 0])
    >>> metric.compute(**data, input_type="probabilities")
    {'brier_score': 0.8125}
"""

_CITATION = """
@article{brier1950verification,
  title={Verification of Forecasts Expressed in Terms of Probability},
  author={Brier, Glenn W.},
  journal={Monthly Weather Review},
  volume={78},
  number={1},
  pages={1--3},
  year={1950}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BrierScore(evaluate.Metric):
    def _info(self):
        return metric_info(
            description=_DESCRIPTION,
            inputs_description=_KWARGS_DESCRIPTION,
            citation=_CITATION,
            reference_urls=["https://doi.org/10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2"],
        )

    def _compute(self, predictions, references, input_type="logits", ignore_index=-100):
        return {"brier_score": measure(predictions, references, input_type, ignore_index).compute()["brier"]}
