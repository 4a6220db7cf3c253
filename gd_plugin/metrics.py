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
BINNINGS = ("equal_width", "equal_mass", "classwise")
NORMS = ("l1", "l2", "max")
INPUT_TYPES = ("logits", "probabilities")


class ClassificationMetrics:
    """Streaming metrics of a classifier; any split of the data into updates gives the result of one update.

    It keeps per sample the confidence and the correctness (9 bytes; the equal-mass bins need them) and one table of
    shape (C, num_bins), never the logits.

    Args:
        num_bins: number of confidence bins, >= 1.
        ignore_index: class index of positions to skip (class-index targets only).
        input_type: what `update` is given as ``logits``: ``"logits"`` or ``"probabilities"``, which are taken as they
            are, so that one on the edge of a bin stays there.
        class_counts: keep a second table, the number of samples per class and bin: what
            ``calibration_error("classwise", norm)`` needs for the norms l2 and max.

    Raises:
        ValueError: ``num_bins`` below 1, or an unknown ``input_type``.

    Example::

        >>> metrics = ClassificationMetrics()
        >>> for logits, target in batches:
        ...     metrics.update(logits, target)
        >>> metrics.compute()["ece"]
    """

    def __init__(
        self, num_bins: int = 15, ignore_index: int = -100, *, input_type: str = "logits", class_counts: bool = False
    ) -> None:
        if num_bins < 1:
            raise ValueError(f"num_bins must be at least 1, not {num_bins}")
        _check_choice("input_type", input_type, INPUT_TYPES)
        self.num_bins = num_bins
        self.ignore_index = ignore_index
        self.input_type = input_type
        self.class_counts = class_counts
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
        # ECE needs: the count of a bin cancels. Other norms than l1 need the count too.
        self._residual: Tensor | None = None
        self._count: Tensor | None = None
        self._diverged = False

    def __len__(self) -> int:
        """Samples so far, without those that were ignored."""
        return sum(len(part) for part in self._confidence)

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: shape (..., C), any floating dtype and device; a numpy array will do. -inf masks a class. With
                ``input_type="probabilities"`` rows that are not negative and sum to 1, up to 0.01.
            target: class indices, shape (...), any integer dtype; or class probabilities, shape (..., C), floating.

        Raises:
            ValueError: shapes or dtypes that do not fit, another number of classes than before, a class index
                outside [0, C) that is not ``ignore_index``, or rows that should be probabilities and are not (then a
                part of the batch may have been added).

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
            self._count = torch.zeros_like(self._residual, dtype=torch.int64) if self.class_counts else None

        rows = max(1, _CHUNK_ELEMENTS // num_classes)
        for z, y in zip(logits.split(rows), target.split(rows), strict=True):
            if not soft:
                kept = y != self.ignore_index
                z, y = z[kept.to(z.device)], y[kept]
            self._update_chunk(z.to("cpu", torch.float64), y.to("cpu", torch.float64 if soft else None))

    def merge(self, other: ClassificationMetrics) -> None:
        """Add the samples of ``other``, another process's part of the same data.

        Raises:
            ValueError: another number of bins or classes, or no ``class_counts`` to add to those here.
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
        if self.class_counts and not other.class_counts:
            raise ValueError(
                "cannot merge metrics without class_counts into some that have them; pass class_counts=True to both"
            )
        if self._residual is None:
            self._residual = torch.zeros_like(other._residual)
            self._count = torch.zeros_like(other._count) if self.class_counts else None
        self._confidence += other._confidence
        self._correct += other._correct
        self._nll += other._nll
        self._brier += other._brier
        self._residual = self._residual + other._residual
        if self.class_counts:
            self._count = self._count + other._count
        self._diverged |= other._diverged

    def compute(self) -> dict[str, float]:
        """The metrics of all samples so far.

        With confidence = the largest softmax probability and (lower, upper] bins of equal width unless stated:

        * ``accuracy``: fraction in [0, 1]; of equal logits the first is the prediction.
        * ``nll``: mean plain cross-entropy in nats; infinite only if the logit of a target is -inf.
        * ``brier``: mean over samples of sum_c (p_c - y_c)^2, in [0, 2] (Brier 1950).
        * ``ece``, ``adaptive_ece``, ``classwise_ece``: `calibration_error` over bins of equal width, of equal mass, and
          class by class.
        * ``mce``: `calibration_error` with the norm max: the largest gap of a bin (Guo et al. 2017).
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
        return {
            "accuracy": correct.mean().item(),
            "nll": self._nll / n,
            "brier": self._brier / n,
            "ece": self.calibration_error("equal_width"),
            "adaptive_ece": self.calibration_error("equal_mass"),
            "classwise_ece": self.calibration_error("classwise"),
            "mce": self.calibration_error("equal_width", "max"),
            "confidence_gap": (confidence - correct).mean().item(),
        }

    def calibration_error(self, binning: str = "equal_width", norm: str = "l1") -> float:
        """How far confidence and accuracy are apart, over bins b of n_b among n samples, with
        gap_b = mean confidence in b - accuracy in b. NaN where the model has diverged, see `update`.

        Args:
            binning: ``"equal_width"``: (lower, upper] bins of the confidence (Guo et al. 2017, arXiv 1706.04599).
                ``"equal_mass"``: bins that hold equally many samples (Nguyen and O'Connor 2015, arXiv 1508.05154; Nixon
                et al. 2019, arXiv 1904.01685). Samples of equal confidence share their mean accuracy, so that the order
                of the data has no influence.
                ``"classwise"``: equal-width bins of p_c for every class c, with p_c as confidence and [y = c] as
                accuracy, and n_b / (n * C) in place of n_b / n: the mean over the C classes (Kull et al. 2019, arXiv
                1910.12656; the static calibration error of Nixon et al. 2019).
            norm: ``"l1"``: sum_b n_b / n * abs(gap_b), the expected calibration error (Guo et al. 2017).
                ``"l2"``: sqrt(sum_b n_b / n * gap_b^2) (Kumar et al. 2019, arXiv 1909.10155, without their debiasing).
                ``"max"``: max_b abs(gap_b), the maximum calibration error (Guo et al. 2017); empty bins do not count.

        Raises:
            ValueError: an unknown ``binning`` or ``norm``; l2 or max of ``"classwise"`` without ``class_counts``; no
                sample so far.
        """
        _check_choice("binning", binning, BINNINGS)
        _check_choice("norm", norm, NORMS)
        if binning == "classwise" and norm != "l1" and not self.class_counts:
            raise ValueError(f'the norm {norm} of binning="classwise" needs ClassificationMetrics(class_counts=True)')
        if self._diverged:
            return math.nan
        confidence, correct = self._samples()
        if binning == "equal_width":
            count, confidence_sum, correct_sum = self._bins(confidence, correct)
            residual = confidence_sum - correct_sum
        elif binning == "equal_mass":
            count, residual = _equal_mass_bins(confidence, correct, self.num_bins)
        else:
            count, residual = self._count, self._residual

        weight = len(confidence) * (len(residual) if binning == "classwise" else 1)
        if norm == "l1":
            return residual.abs().sum().item() / weight
        gap = residual.abs() / count.clamp_min(1)
        return gap.max().item() if norm == "max" else math.sqrt((count * gap.square()).sum().item() / weight)

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
        prediction = z.argmax(1, keepdim=True)
        if self.input_type == "probabilities":
            if z.isnan().any():
                self._diverged = True
                return
            if not are_probabilities(z):
                raise ValueError(
                    'input_type="probabilities" needs rows that are not negative and sum to 1; '
                    'pass scores before the softmax with input_type="logits"'
                )
            p, z, log_normaliser = z.clone(), z.log(), z.new_zeros(())
        else:
            log_normaliser = z.logsumexp(1, keepdim=True)
            if not log_normaliser.isfinite().all():
                self._diverged = True
                return
            p = z.softmax(1)
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
        if self.class_counts:
            self._count += torch.bincount(bins.view(-1), minlength=self._count.numel()).view_as(self._count)
        self._nll += nll.item()
        self._brier += (residual.square_().sum() if brier is None else brier).item()

    def _samples(self) -> tuple[Tensor, Tensor]:
        """Confidence and correctness (0 or 1) of every sample, fp64."""
        if not len(self):
            raise ValueError("no sample to measure: call update first, with targets that are not all ignore_index")
        # Joined for good, so that a call per epoch does not copy a growing number of pieces.
        if len(self._confidence) > 1:
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


def are_probabilities(rows: Tensor) -> bool:
    """Whether every row of shape (n, C) is a distribution, up to the rounding of a bf16 softmax."""
    return bool((rows >= 0).all()) and torch.allclose(rows.sum(1), rows.new_ones(()), rtol=0, atol=1e-2)


def _equal_mass_bins(confidence: Tensor, correct: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Number of samples and sum of confidence minus correctness of each bin; the first n mod num_bins bins hold one
    sample more."""
    values, group, size = confidence.unique(return_inverse=True, return_counts=True)
    gap = values - torch.bincount(group, correct) / size
    bins = gap.repeat_interleave(size).tensor_split(num_bins)
    return torch.tensor([len(part) for part in bins], device="cpu"), torch.stack([part.sum() for part in bins])


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
