"""The loss as a module: it holds the numbers and decides nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import GradientDecayConfig
from .functional import gradient_decay_cross_entropy

__all__ = ["GradientDecayLoss"]


class GradientDecayLoss(nn.Module):
    """`gradient_decay_cross_entropy` in the form of ``torch.nn.CrossEntropyLoss``, with beta in a buffer.

    A schedule changes beta with `set_beta`: in place, without waiting for the device and without recompiling anything.
    The loss is negative for confident samples when beta < 1 (it tends to log(beta)); that is not an error.

    Args:
        beta: coefficient > 0, or one per class; 1 is cross-entropy. (All arguments by name: ``CrossEntropyLoss``
            begins with ``weight``.)
        weight, ignore_index, reduction, label_smoothing: as in ``torch.nn.CrossEntropyLoss``.

    Shape:
        input (C), (N, C) or (N, C, d1, ...); target and output as in ``torch.nn.CrossEntropyLoss``.

    The buffer is not part of the ``state_dict``: beta comes from the constructor or from a schedule.
    """

    def __init__(
        self,
        *,
        beta: float | Sequence[float] | Tensor = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_buffer("beta", torch.ones(_checked(beta).shape), persistent=False)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.set_beta(beta)

    @classmethod
    def from_config(cls, config: GradientDecayConfig, **kwargs) -> GradientDecayLoss:
        """With the final beta and the class weights of a configuration; per class where beta is, at either end of the
        warm-up. ``kwargs``: ``ignore_index``, ``reduction``, ``label_smoothing``."""
        per_class = next((b for b in (config.beta, config.beta_start) if isinstance(b, tuple)), None)
        weight = None if config.class_weights is None else torch.tensor(config.class_weights)
        loss = cls(beta=per_class or config.beta, weight=weight, **kwargs)
        loss.set_beta(config.beta)
        return loss

    def set_beta(self, beta: float | Sequence[float] | Tensor) -> None:
        """Change beta in place; one number also fills a per-class buffer. ValueError unless positive and finite."""
        value = _checked(beta)
        if value.dim() and value.shape != self.beta.shape:
            raise ValueError(f"beta has shape {tuple(value.shape)}, this loss was made for {tuple(self.beta.shape)}")
        self.beta.copy_(value, non_blocking=True)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return gradient_decay_cross_entropy(
            input, target, self.beta, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )

    def _apply(self, fn, recurse: bool = True) -> GradientDecayLoss:
        # module.half() and .to(bfloat16) would round beta = 0.01 by 0.4%: follow the device, keep the dtype.
        beta = self.beta
        super()._apply(fn, recurse)
        self.beta = beta.to(self.beta.device)
        return self

    def extra_repr(self) -> str:
        return f"beta={self.beta!r}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"


def _checked(beta: float | Sequence[float] | Tensor) -> Tensor:
    if isinstance(beta, Tensor) and beta.device.type != "cpu":
        return beta.detach()  # reading it to check it would wait for the device
    value = torch.as_tensor(beta, dtype=torch.float32, device="cpu").detach()
    if value.dim() > 1 or not (torch.isfinite(value) & (value > 0)).all():
        raise ValueError(f"beta must be positive and finite, one number or one per class, got {beta}")
    return value
