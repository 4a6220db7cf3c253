"""The target gap ``u = logsumexp_{i != c} z_i - z_c``, of which the loss is a function.

    J = log(exp(u) + beta)          cross-entropy = log(exp(u) + 1)

The gap is computed from the logits without the target, so no digit is lost where the target is far ahead
(1 - p -> 0), which is where beta < 1 amplifies: ``CE + log(1 - p + beta * p)`` would divide fp32 rounding by beta.
What belongs to a sample (one number, not one per class) is kept in fp64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class _TargetGap(torch.autograd.Function):
    """``logsumexp_{i != c} z_i - z_c`` per sample; see `target_gap`.

    The gradient with respect to the logits is ``softmax_{i != c}(z) - onehot_c``: the softmax of the forward is kept
    and scaled in the backward. Asked for a graph of the gradient (double backward, `torch.func`), the backward computes
    it again, differentiably.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return gap_of_block(logits, target.unsqueeze(1))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, target = inputs
        _, shares, total = output
        ctx.mark_non_differentiable(shares, total)
        ctx.set_materialize_grads(False)  # or the backward would be handed zeros for all of the shares
        ctx.save_for_backward(logits, target, shares, total)

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        logits, target, shares, total = ctx.saved_tensors
        index = target.unsqueeze(1)
        if torch.is_grad_enabled():
            shares = _others(logits, index).softmax(1)
            total = shares.sum(1)
        scale = (grad / total).to(shares.dtype).unsqueeze(1)
        gradient = (shares * scale).scatter(1, index, -grad.to(shares.dtype).unsqueeze(1))
        return gradient.to(logits.dtype), None


def target_gap(logits: Tensor, target: Tensor) -> Tensor:
    """How far the target is behind all other classes: ``logsumexp_{i != c} z_i - z_c``; negative where it leads.

    Args:
        logits: shape (N, C, ...).
        target: int64 class indices in [0, C), shape (N, ...).

    Returns:
        The shape of ``target``, in fp64 (fp32 on devices without it). ``sigmoid(-gap)`` is the target's probability.
        About the lowest fp32 number where no other class has a finite logit, +inf where the target's logit is -inf, and
        NaN where it is +inf.
    """
    if is_distributed(logits):
        from . import sharded

        return sharded.target_gap(logits, target)
    return _TargetGap.apply(logits, target)[0]


def gap_of_block(logits: Tensor, index: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gap, the softmax of the other classes, and what its shares add up to.

    Args:
        index: of the targets, shape (N, 1, ...).
        out: for the shares, in at least fp32; it may be the logits themselves.
    """
    rows = row_dtype(logits.device)
    of_target = not_infinite(logits.gather(1, index).squeeze(1))
    others = _others(logits, index)
    shares = others.softmax(1) if out is None else torch.softmax(others, 1, out=out)
    top, largest, total = others.amax(1), shares.amax(1), shares.sum(1)
    # The largest share is exp(0) / (the sum of all exp(z_i - top), as the softmax has it). Where that sum lacks
    # digits, over a vocabulary in fp32, the shares do not add up to 1: by just that factor.
    return top.to(rows) - of_target + (total / largest).to(rows).log(), shares, total


def not_infinite(of_target: Tensor) -> Tensor:
    """NaN in place of +inf, as of ``F.cross_entropy``: a head that overflows must not look like one that is certain."""
    return of_target.masked_fill(of_target == torch.inf, torch.nan)


def _others(logits: Tensor, index: Tensor) -> Tensor:
    """The logits in at least fp32, out of the running at the target: by the lowest finite number, since a row without
    any finite logit has no softmax."""
    dtype = compute_dtype(logits)
    return logits.to(dtype).scatter(1, index, torch.finfo(dtype).min)


def is_distributed(tensor: Tensor | float | None) -> bool:
    """Whether it is a DTensor, whose module takes a second to import."""
    return type(tensor) is not Tensor and hasattr(tensor, "full_tensor")


def log_add(gap: Tensor, log_beta: Tensor) -> Tensor:
    """log(exp(gap) + beta). Softplus, since the second derivative of torch.logaddexp overflows for gaps beyond 709."""
    return log_beta + F.softplus(gap - log_beta, threshold=40)


def log_of_beta(beta: float | Tensor, device: torch.device) -> Tensor:
    rows = row_dtype(device)
    if isinstance(beta, Tensor):
        return beta.to(device=device, dtype=rows).log()
    return torch.full((), math.log(beta), dtype=rows, device=device)


def of_class(values: Tensor, index: Tensor) -> Tensor:
    """The entry of ``values`` (C) for every index; a scalar as it is. (vmap has no indexing with a 0-dim tensor.)"""
    return values.gather(0, index.reshape(-1)).reshape(index.shape) if values.dim() else values


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.dtype.itemsize < 4 else logits.dtype


def row_dtype(device: torch.device) -> torch.dtype:
    """fp64 for numbers of which there is one per sample; Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64
