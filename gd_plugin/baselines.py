"""The losses that the gradient-decay loss is compared with, from timm, in the form that our Trainer calls a loss.

Label smoothing needs none: it is ``label_smoothing_factor`` at beta = 1. Nor does an additive margin m on the target's
logit: its gradient is that of beta = exp(-m), and its value differs by the constant m.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GradientDecayConfig
from .hf_loss import IGNORE_INDEX, GradientDecayLossFunc

__all__ = ["BaselineLossFunc", "baseline"]


def baseline(name: str) -> nn.Module:
    """The loss per sample of (N, C) logits and (N) class indices.

    Args:
        name: ``"focal"``, -(1 - p)^2 log p (Lin et al. 2017, arXiv 1708.02002), or ``"poly1"``, -log p + 2 (1 - p)
            (Leng et al. 2022, arXiv 2204.12511; timm's epsilon).

    Raises:
        ValueError: ``"poly1"`` with a timm before 1.0.31.
    """
    import timm.loss  # an extra of its own

    if name == "focal":
        # Without its weight on the other classes and its smoothing, timm's asymmetric loss is the focal loss.
        return timm.loss.AsymmetricLossSingleLabel(gamma_pos=2, gamma_neg=0, eps=0.0, reduction="none")
    if not hasattr(timm.loss, "PolyCrossEntropy"):
        raise ValueError(
            f"--loss {name} needs timm >= 1.0.31, this is {timm.__version__}; update timm, or leave it out"
        )
    return timm.loss.PolyCrossEntropy(epsilon=2.0, reduction="none")


class BaselineLossFunc(GradientDecayLossFunc):
    """Another loss with the normalisation, logging and evaluation of ours; ``config`` is that of cross-entropy."""

    def __init__(self, config: GradientDecayConfig, criterion: nn.Module) -> None:
        super().__init__(config)
        self.criterion = criterion

    def compute(self, logits: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
        counted = target != IGNORE_INDEX
        with torch.no_grad():
            cross_entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORE_INDEX, reduction=reduction)
        # No boolean index, whose size the host would wait for.
        losses = self.criterion(logits.float(), target.masked_fill(~counted, 0)).masked_fill(~counted, 0.0)
        return losses.sum() / counted.sum() if reduction == "mean" else losses.sum(), cross_entropy
