"""Accuracy, likelihood and calibration of a classifier: logits in, plain floats out.

Everything is measured on the ordinary softmax, whatever beta the model was trained with, so that runs of different
losses can be compared. Rows are moved to the CPU and computed in fp64, a chunk at a time: one code path for every
device and dtype, results that do not depend on them, and no second copy of a big logits array.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ClassificationMetrics", "classification_metrics"]

# Elements of logits worked on at once: 8 MiB per temporary.
_CHUNK_ELEMENTS = 2**20


METRICS = ("accuracy", "nll", "brier", "ece", "adaptive_ece", "classwise_ece", "mce", "confidence_gap")


class ClassificationMetrics:
    """Streaming metrics of a classifier; any split of the data into updates gives the result of one update.

    It keeps per sample the confidence and the correctness (9 bytes; the equal-mass bins need them) and one table of
    shape (C, num_bins), never the logits.

    Args:
        num_bins: number of confidence bins, >= 1.
        ignore_index: class index of positions to skip (class-index targets only).

    Raises:
        ValueError: ``num_bins`` below 1.

    Example::

        >>> metrics = ClassificationMetrics()
        >>> for logits, target in batches:
        ...     metrics.update(logits, target)
        >>> metrics.compute()["ece"]
    """

    def __init__(self, num_bins: int = 15, ignore_index: int = -100) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, not {num_bins}")
        self.num_bins = num_bins
        self.ignore_index = ignore_index
        # Inner edges only, so that every value in [0, 1] has a bin. i / n and not a linspace: 3 / 15 is then exactly
        # the 0.2 of a uniform prediction over five classes.
        self._edges = torch.arange(1, num_bins, dtype=torch.float64, device="cpu") / num_bins
        self.reset()

    def reset(self) -> None:
        """Forget all samples, and the number of classes."""
        self._confidence: list[Tensor] = []
        self._correct: list[Tensor] = []
        self._nll = 0.0
        self._brier = 0.0
        # Sum of p_c - [y = c] per class and bin of p_c. The difference of the two sums is all that the class-wise
        # ECE needs: the count of a bin cancels.
        self._residual: Tensor | None = None
        self._diverged = False

    def __len__(self) -> int:
        """Samples so far, without those that were ignored."""
        return sum(len(part) for part in self._confidence)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: shape (..., C), any floating dtype and device; a numpy array will do. -inf masks a class.
            target: class indices, shape (...), any integer dtype; or class probabilities, shape (..., C), floating.

        Raises:
            ValueError: shapes or dtypes that do not fit, another number of classes than before, a class index
                outside [0, C) that is not ``ignore_index``, or probabilities that do not sum to 1 (then a part of the
                batch may have been added).

        Logits without a softmax (NaN, +inf or nothing but -inf: a model that has diverged) are no error, since an
        evaluation must not end a training; they make every metric NaN.
        """
        logits, target = torch.as_tensor(logits), torch.as_tensor(target)
        soft = self._check(logits, target)
        num_classes = logits.shape[-1]
        logits = logits.reshape(-1, num_classes)
        if soft:
            target = target.reshape(-1, num_classes)
        else:
            target = target.reshape(-1).long()  # in uint8, ignore_index = -100 would be class 156
            self._check_classes(target, num_classes)
        if self._residual is None:
            self._residual = torch.zeros(num_classes, self.num_bins, dtype=torch.float64, device="cpu")

        rows = max(1, _CHUNK_ELEMENTS // num_classes)
        for z, y in zip(logits.split(rows), target.split(rows), strict=True):
            if not soft:
                kept = y != self.ignore_index
                z, y = z[kept.to(z.device)], y[kept]
            self._update_chunk(z.to("cpu", torch.float64), y.to("cpu", torch.float64 if soft else None))

    def merge(self, other: ClassificationMetrics) -> None:
        """Add the samples of ``other``, another process's part of the same data.

        Raises:
            ValueError: another number of bins or classes.
        """
        if other._residual is None:  # it has seen nothing
            return
        theirs = len(other._residual)
        ours = theirs if self._residual is None else len(self._residual)
        if (ours, self.num_bins) != (theirs, other.num_bins):
            raise ValueError(
                f"cannot merge metrics of {theirs} classes in {other.num_bins} bins into those of {ours} classes in "
                f"{self.num_bins} bins; measure the same model with the same num_bins"
            )
        if self._residual is None:
            self._residual = torch.zeros_like(other._residual)
        self._confidence += other._confidence
        self._correct += other._correct
        self._nll += other._nll
        self._brier += other._brier
        self._residual = self._residual + other._residual
        self._diverged |= other._diverged

    def compute(self) -> dict[str, float]:
        """The metrics of all samples so far.

        With confidence = the largest softmax probability and (lower, upper] bins of equal width unless stated:

        * ``accuracy``: fraction in [0, 1]; of equal logits the first is the prediction.
        * ``nll``: mean plain cross-entropy in nats; infinite only if the logit of a target is -inf.
        * ``brier``: mean over samples of sum_c (p_c - y_c)^2, in [0, 2] (Brier 1950).
        * ``ece``: sum over bins of (n_b / n) * |accuracy_b - confidence_b| (Guo et al. 2017, arXiv 1706.04599).
        * ``adaptive_ece``: the same over bins that hold equally many samples (Nixon et al. 2019, arXiv 1904.01685).
          Samples of equal confidence share their mean accuracy, so that the order of the data has no influence.
        * ``classwise_ece``: the binned gap between p_c and [y = c] over all samples, mean over the classes (Kull et
          al. 2019, arXiv 1910.12656; the static calibration error of Nixon et al. 2019).
        * ``mce``: the largest gap of a bin that is not empty (Guo et al. 2017).
        * ``confidence_gap``: mean confidence minus accuracy; positive = overconfident.

        With class probabilities as targets ``nll`` and ``brier`` are measured against them, the rest against their
        argmax.

        Raises:
            ValueError: no sample so far.
        """
        if self._diverged:
            return dict.fromkeys(METRICS, math.nan)
        confidence, correct = self._samples()
        n = len(confidence)
        count, confidence_sum, correct_sum = self._bins(confidence, correct)
        gap = (confidence_sum - correct_sum).abs()
        return {
            "accuracy": correct.mean().item(),
            "nll": self._nll / n,
            "brier": self._brier / n,
            "ece": gap.sum().item() / n,
            "adaptive_ece": _adaptive_ece(confidence, correct, self.num_bins),
            "classwise_ece": self._residual.abs().sum(1).mean().item() / n,
            "mce": (gap / count.clamp_min(1)).max().item(),
            "confidence_gap": (confidence - correct).mean().item(),
        }

    def reliability(self) -> list[dict]:
        """The reliability diagram: per equal-width bin ``lower``, ``upper``, ``count`` and the mean ``confidence``
        and ``accuracy`` in it (None where the bin is empty).

        Every bin is empty where the model has diverged, see `update`.

        Raises:
            ValueError: no sample so far.
        """
        confidence, correct = (torch.empty(0), torch.empty(0)) if self._diverged else self._samples()
        count, confidence_sum, correct_sum = (column.tolist() for column in self._bins(confidence.double(), correct))
        return [
            {
                "lower": i / self.num_bins,
                "upper": (i + 1) / self.num_bins,
                "count": n,
                "confidence": confidence_sum[i] / n if n else None,
                "accuracy": correct_sum[i] / n if n else None,
            }
            for i, n in enumerate(count)
        ]

    def _update_chunk(self, z: Tensor, y: Tensor) -> None:
        """Add rows of logits (n, C) and their class indices (n) or probabilities (n, C), all on the CPU."""
        log_normaliser = z.logsumexp(1, keepdim=True)
        if not log_normaliser.isfinite().all():
            self._diverged = True
            return
        p = z.softmax(1)
        prediction = z.argmax(1, keepdim=True)
        if y.dim() == 2:
            if not torch.allclose(y.sum(1), y.new_ones(()), rtol=0, atol=1e-2):
                raise ValueError(
                    "target has the shape of logits, but its rows do not sum to 1: pass class probabilities"
                )
            # A class of probability 0 adds nothing, even where its logit is -inf.
            nll = (y * (log_normaliser - z).masked_fill_(y == 0, 0.0)).sum()
            brier = (p - y).square_().sum()
            label = y.argmax(1, keepdim=True)
        else:
            label = y.unsqueeze(1)
            nll = (log_normaliser - z.gather(1, label)).sum()
            brier = None
        self._confidence.append(p.gather(1, prediction).squeeze(1))
        self._correct.append((prediction == label).squeeze(1))

        bins = torch.bucketize(p, self._edges).add_(torch.arange(p.shape[1], device="cpu") * self.num_bins)
        residual = p.scatter_add_(1, label, torch.full_like(label, -1.0, dtype=p.dtype))
        self._residual += torch.bincount(bins.view(-1), residual.view(-1), self._residual.numel()).view_as(
            self._residual
        )
        self._nll += nll.item()
        self._brier += (residual.square_().sum() if brier is None else brier).item()

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Confidence and correctness (0 or 1) of every sample, fp64."""
        if not len(self):
            raise ValueError("no sample to measure: call update first, with targets that are not all ignore_index")
        # Joined for good, so that a call per epoch does not copy a growing number of pieces.
        self._confidence, self._correct = [torch.cat(self._confidence)], [torch.cat(self._correct)]
        return self._confidence[0], self._correct[0].double()

    def _bins(self, confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per bin: number of samples, sum of confidence, number of correct samples."""
        index = torch.bucketize(confidence, self._edges)
        return (
            torch.bincount(index, minlength=self.num_bins),
            torch.bincount(index, confidence, self.num_bins),
            torch.bincount(index, correct, self.num_bins),
        )

    def _check(self, logits: Tensor, target: Tensor) -> bool:
        """Check shapes and dtypes; whether the targets are class probabilities."""
        if not logits.is_floating_point() or logits.dim() == 0 or logits.shape[-1] == 0:
            raise ValueError(
                f"logits must be floating with shape (..., C), not {logits.dtype} with shape {tuple(logits.shape)}; "
                "pass the scores of all classes, not the predicted class"
            )
        if self._residual is not None and logits.shape[-1] != len(self._residual):
            raise ValueError(
                f"logits have {logits.shape[-1]} classes, those before had {len(self._residual)}; "
                "call reset() before measuring another model"
            )
        if target.is_floating_point() and target.shape == logits.shape:
            return True
        if target.is_floating_point() or target.shape != logits.shape[:-1]:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} need integer classes of shape {tuple(logits.shape[:-1])} or "
                f"floating class probabilities of shape {tuple(logits.shape)}, not {target.dtype} of shape "
                f"{tuple(target.shape)}; classes belong in the last dimension of logits"
            )
        return False

    def _check_classes(self, target: Tensor, num_classes: int) -> None:
        wrong = target[((target < 0) | (target >= num_classes)) & (target != self.ignore_index)]
        if len(wrong):
            raise ValueError(
                f"target holds class {wrong[0].item()}, but logits have {num_classes} classes, 0 to {num_classes - 1}; "
                f"mend the label mapping, or pass ignore_index={wrong[0].item()} to skip such positions"
            )


def classification_metrics(
    logits: Tensor, target: Tensor, num_bins: int = 15, ignore_index: int = -100
) -> dict[str, float]:
    """The metrics of one array of logits; arguments, keys and errors as in `ClassificationMetrics`."""
    metrics = ClassificationMetrics(num_bins, ignore_index)
    metrics.update(logits, target)
    return metrics.compute()


def _adaptive_ece(confidence: Tensor, correct: Tensor, num_bins: int) -> float:
    """ECE over bins of equal mass; the first n mod num_bins bins hold one sample more."""
    values, group, size = confidence.unique(return_inverse=True, return_counts=True)
    gap = values - torch.bincount(group, correct) / size
    bins = gap.repeat_interleave(size).tensor_split(num_bins)
    return math.fsum(abs(part.sum().item()) for part in bins) / len(confidence)
