"""Calibration error for `evaluate`; the maths is ``gd_plugin.metrics.ClassificationMetrics.calibration_error``."""

import evaluate

from gd_plugin.evaluate_modules import measure, metric_info

_DESCRIPTION = """
How far the confidence of a classifier, its largest probability, is from its accuracy. The n samples are put into bins
by their confidence; bin b holds n_b of them, and gap_b is their mean confidence minus their accuracy:

    norm="l1":   sum_b n_b / n * |gap_b|, the expected calibration error (ECE) of Guo et al. 2017
    norm="l2":   sqrt(sum_b n_b / n * gap_b^2), Kumar et al. 2019, without their debiasing
    norm="max":  max_b |gap_b|, the maximum calibration error (MCE) of Guo et al. 2017

    binning="equal_width":  bins (lower, upper] of equal width between 0 and 1
    binning="equal_mass":   bins of equally many samples (adaptive ECE, Nixon et al. 2019)
    binning="classwise":    bins of equal width of every class's probability against how often that class is right;
                            over all C classes, with n_b / (n * C) in place of n_b / n (Kull et al. 2019; static
                            calibration error, Nixon et al. 2019)

0 is perfect. The value depends on the number of bins and of samples: few samples per bin make it too large.
The mean confidence minus the accuracy over all samples comes with it; it is positive for an overconfident model.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float, or array): for each sample the scores of all classes, logits unless `input_type`
        says otherwise. Those of tokens are flattened to a row per token.
    references (list of int, or array): for each sample the index of its class.
    num_bins (int): number of bins. Default 15.
    binning (str): 'equal_width' (default), 'equal_mass' or 'classwise'.
    norm (str): 'l1' (default), 'l2' or 'max'.
    input_type (str): what `predictions` are: 'logits' (default) or 'probabilities', rows that sum to 1.
    ignore_index (int): class index of samples to skip. Default -100.

Returns:
    calibration_error (float): between 0 and 1; NaN if a score is NaN.
    confidence_gap (float): between -1 and 1; positive: overconfident.

Examples:

    >>> from gd_plugin.evaluate_modules import load
    >>> metric = load("calibration_error")
    >>> logits = [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 2.0], [0.0, 0.5, 0.0]]
    >>> result = metric.compute(predictions=logits, references=[0, 1, 2, 2])
    >>> print({name: round(value, 4) for name, value in result.items()})
    {'calibration_error': 0.2725, 'confidence_gap': -0.0466}

    Two samples of confidence 0.9, half of them right, one of 0.6 and one of 0.8, both right:

    >>> data = dict(
    ...     predictions=[[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], references=[0, 1, 1, 1],
    ...     input_type="probabilities", num_bins=10,
    ... )
    >>> round(metric.compute(**data)["calibration_error"], 4)  # 2/4 * 0.4 + 1/4 * 0.4 + 1/4 * 0.2
    0.35
    >>> round(metric.compute(**data, norm="max")["calibration_error"], 4)
    0.4

    Batch by batch:

    >>> for batch in (slice(0, 2), slice(2, 4)):
    ...     metric.add_batch(predictions=logits[batch], references=[0, 1, 2, 2][batch])
    >>> round(metric.compute()["calibration_error"], 4)
    0.2725
"""

_CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  pages={1321--1330},
  year={2017}
}
@inproceedings{nixon2019measuring,
  title={Measuring Calibration in Deep Learning},
  author={Nixon, Jeremy and Dusenberry, Michael W. and Zhang, Linchuan and Jerfel, Ghassen and Tran, Dustin},
  booktitle={CVPR Workshops},
  year={2019}
}
@inproceedings{kull2019beyond,
  title={Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities with {D}irichlet calibration},
  author={Kull, Meelis and Perello-Nieto, Miquel and K{\\"a}ngsepp, Markus and Silva Filho, Telmo and Song, Hao and
    Flach, Peter},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}
@inproceedings{kumar2019verified,
  title={Verified Uncertainty Calibration},
  author={Kumar, Ananya and Liang, Percy and Ma, Tengyu},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CalibrationError(evaluate.Metric):
    def _info(self):
        return metric_info(
            description=_DESCRIPTION,
            inputs_description=_KWARGS_DESCRIPTION,
            citation=_CITATION,
            reference_urls=[
                "https://arxiv.org/abs/1706.04599",
                "https://arxiv.org/abs/1904.01685",
                "https://arxiv.org/abs/1910.12656",
                "https://arxiv.org/abs/1909.10155",
            ],
        )

    def _compute(
        self,
        predictions,
        references,
        num_bins=15,
        binning="equal_width",
        norm="l1",
        input_type="logits",
        ignore_index=-100,
    ):
        metrics = measure(
            predictions, references, input_type, ignore_index, num_bins=num_bins, class_counts=binning == "classwise"
        )
        return {
            "calibration_error": metrics.calibration_error(binning, norm),
            "confidence_gap": metrics.compute()["confidence_gap"],
        }
