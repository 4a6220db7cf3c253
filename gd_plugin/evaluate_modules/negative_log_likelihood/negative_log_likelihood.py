"""Negative log-likelihood for `evaluate`; the maths is ``gd_plugin.metrics.ClassificationMetrics``."""

import evaluate

from gd_plugin.evaluate_modules import measure, metric_info

_DESCRIPTION = """
The negative log-likelihood of a classifier in nats, that is its cross-entropy or log loss: the mean over samples of
-log p_y, with the probability p_y of the sample's class y. A strictly proper score (Gneiting and Raftery 2007): only
the true probabilities make it least. It is infinite where the probability of a sample's class is 0; nothing is clipped.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float, or array): for each sample the scores of all classes, logits unless `input_type`
        says otherwise. Those of tokens are flattened to a row per token.
    references (list of int, or array): for each sample the index of its class.
    input_type (str): what `predictions` are: 'logits' (default) or 'probabilities', rows that sum to 1.
    ignore_index (int): class index of samples to skip. Default -100.

Returns:
    negative_log_likelihood (float): 0 or more, in nats; NaN if a score is NaN.

Examples:

    >>> from gd_plugin.evaluate_modules import load
    >>> metric = load("negative_log_likelihood")
    >>> result = metric.compute(predictions=[[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]], references=[0, 2])
    >>> round(result["negative_log_likelihood"], 4)
    1.1672

    (log 2 + log 4) / 2:

    >>> data = dict(predictions=[[0.5, 0.5], [0.25, 0.75]], references=[0, 0])
    >>> round(metric.compute(**data, input_type="probabilities")["negative_log_likelihood"], 4)
    1.0397
"""

_CITATION = """
@article{gneiting2007strictly,
  title={Strictly Proper Scoring Rules, Prediction, and Estimation},
  author={Gneiting, Tilmann and Raftery, Adrian E.},
  journal={Journal of the American Statistical Association},
  volume={102},
  number={477},
  pages={359--378},
  year={2007}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class NegativeLogLikelihood(evaluate.Metric):
    def _info(self):
        return metric_info(
            description=_DESCRIPTION,
            inputs_description=_KWARGS_DESCRIPTION,
            citation=_CITATION,
            reference_urls=["https://doi.org/10.1198/016214506000001437"],
        )

    def _compute(self, predictions, references, input_type="logits", ignore_index=-100):
        return {"negative_log_likelihood": measure(predictions, references, input_type, ignore_index).compute()["nll"]}
