"""The loss of torch's own differentiable functions: for the compiler, for `torch.func`, for a ``DTensor``, and for
gradients of gradients, of beta, of weights and of class probabilities. Everything else is made `by_hand`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .gap import compute_dtype, log_add, of_class, row_dtype, target_gap


def composed(
    logits: Tensor,
    target: Tensor,
    ignored: Tensor | None,
    log_beta: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    return_cross_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the plain cross-entropy, detached, if asked for; both reduced.

    Args:
        logits: shape (N, C, ...).
        target: class indices in [0, C), int64, shape (N, ...); or class probabilities in the shape of ``logits``.
        ignored: which indices do not count, and are 0; ``None`` for probabilities.
        log_beta: 0-dim or (C), in row precision.
    """
    if ignored is None or label_smoothing > 0:
        loss, cross_entropy = _of_probabilities(logits, target, log_beta, weight, label_smoothing, return_cross_entropy)
    else:
        gap = target_gap(logits, target)
        loss = log_add(gap, of_class(log_beta, target))
        if weight is not None:
            loss = loss * of_class(weight, target)
        cross_entropy = F.softplus(gap.detach(), threshold=40) if return_cross_entropy else None
    loss, cross_entropy, _ = reduced(loss, cross_entropy, target, ignored, weight, reduction)
    return as_result(loss, logits, target), as_result(cross_entropy, logits, target)


def reduced(
    loss: Tensor,
    cross_entropy: Tensor | None,
    target: Tensor,
    ignored: Tensor | None,
    weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor | None, Tensor | int | None]:
    """Both of them, which were of every sample, and what the loss was divided by; arguments as of `composed`."""
    if ignored is not None:
        # Masked last, so that neither an infinite loss nor a 0 / 0 mean reaches the gradient of an ignored row.
        loss = loss.masked_fill(ignored, 0.0)
        cross_entropy = None if cross_entropy is None else cross_entropy.masked_fill(ignored, 0.0)
    if reduction == "none":
        return loss, cross_entropy, None
    loss = loss.sum()
    cross_entropy = None if cross_entropy is None else cross_entropy.sum()
    if reduction == "sum":
        return loss, cross_entropy, None
    divisor = divisor_of_mean(target, ignored, weight)
    if cross_entropy is not None:
        cross_entropy = cross_entropy / (divisor if weight is None else divisor_of_mean(target, ignored, None))
    return loss / divisor, cross_entropy, divisor


def as_result(values: Tensor | None, logits: Tensor, target: Tensor) -> Tensor | None:
    """In the dtype that they are returned in."""
    if values is None:
        return None
    dtype = compute_dtype(logits)
    return values.to(torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype)


def divisor_of_mean(target: Tensor, ignored: Tensor | None, weight: Tensor | None) -> Tensor | int:
    """What ``F.cross_entropy`` divides by: the number of samples, or the sum of the weights of the class indices."""
    if ignored is None:
        return target.numel() // target.shape[1] if target.numel() else 0
    if weight is None:
        return (~ignored).sum()
    of_target = of_class(weight, target).masked_fill(ignored, 0.0)
    return of_target.sum(dtype=row_dtype(target.device))  # in bf16 it would have three digits


def _of_probabilities(logits, target, log_beta, weight, label_smoothing, return_cross_entropy):
    """sum_k q_k J(z, k) and sum_k q_k CE(z, k) of every sample, in the names of `by_hand`: e_k = exp(z_k - z_top)."""
    if target.dim() < logits.dim():
        target = torch.zeros_like(logits, dtype=compute_dtype(logits)).scatter(1, target.unsqueeze(1), 1.0)
    dtype = torch.promote_types(compute_dtype(logits), target.dtype)
    logits, target, rows = logits.to(dtype), target.to(dtype), row_dtype(logits.device)
    per_class = (-1, *[1] * (logits.dim() - 2))
    top, of_top = logits.detach().max(1, keepdim=True)
    behind = logits - top.masked_fill(top == -torch.inf, 0.0)
    behind_of_top = behind.gather(1, of_top)  # 0, but for its gradient
    e = behind.scatter(1, of_top, -torch.inf).exp()
    rest = e.sum(1, keepdim=True)
    cross_entropy = None
    if return_cross_entropy:
        each = (rest.to(rows).log1p().to(dtype) - behind).detach()
        cross_entropy = weighted_sum(target, each)
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    if weight is not None:
        target = target * weight.to(dtype).reshape(per_class)

    beta_less_one = log_beta.expm1().to(dtype)
    beta_less_one = beta_less_one.reshape(per_class) if log_beta.dim() else beta_less_one
    of_others = (rest + behind_of_top.exp() + beta_less_one * e).log() - behind
    of_others = of_others.scatter(1, of_top, 0.0)
    # The largest class alone can have a probability near 1, where log D - (z - z_top) would lose its gradient's digits.
    gap = rest.clamp(min=torch.finfo(dtype).tiny).to(rows).log() - behind_of_top.to(rows)
    loss_of_top = target.gather(1, of_top) * log_add(gap, of_class(log_beta, of_top))
    return loss_of_top.squeeze(1) + weighted_sum(target, of_others), cross_entropy


def weighted_sum(target: Tensor, values: Tensor) -> Tensor:
    """sum_k q_k v_k in row precision; a class of probability 0 adds nothing, even where v_k is infinite."""
    values = values.masked_fill((target == 0) & values.isinf(), 0.0)
    return (target * values).sum(1, dtype=row_dtype(values.device))
