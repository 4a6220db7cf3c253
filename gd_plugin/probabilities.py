"""The loss of class probabilities, sum_k q_k J(z, k), which label smoothing also needs: J of every class at once.

With the logits behind the largest one, e_k = exp(z_k - z_top), their sum S = R + 1 (R without the largest) and the
weighted probabilities q::

    J_k = log D_k - (z_k - z_top),    D_k = S + (beta_k - 1) e_k,    D_top = R + beta_top
    dJ / dz_i = e_i sum_k a_k - a_i S,    a_k = q_k / D_k;    of the largest: sum_{k != top} a_k - a_top R

No difference of nearly equal numbers is taken in a D: only the largest class has a probability above 1/2, and R is
computed without it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import gap
from .gap import compute_dtype, is_eager, log_add, of_class, row_dtype, target_gap

_AT_ONCE = 2**26  # logits that are worked on at once where it is not a CPU: a few of their size are needed beside them


def from_probabilities(
    logits: Tensor,
    target: Tensor,
    log_beta: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    dim: int,
    return_cross_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Per-sample (loss, plain cross-entropy, detached, if asked for).

    Args:
        target: class probabilities in the shape of ``logits``, or class indices in [0, C), int64, without ``dim``.
    """
    arguments = (logits, target, log_beta, weight, label_smoothing, dim, return_cross_entropy)
    if is_eager() and not any(t.requires_grad for t in (target, log_beta, weight) if t is not None):
        return _Probabilities.apply(*arguments, logits.requires_grad and torch.is_grad_enabled())
    return _composed(*arguments)


class _Probabilities(torch.autograd.Function):
    """`_composed` with the gradient by hand, block by block of rows, while what it is made of is in the cache.

    As in `gap._EagerTargetGap` the gradient is kept, scaled in its place, and made again where it is needed once more.
    """

    @staticmethod
    def forward(ctx, logits, target, log_beta, weight, label_smoothing, dim, return_cross_entropy, with_gradient):
        knobs = (label_smoothing, dim)
        loss, cross_entropy, ctx.gradient = _by_hand(
            logits, target, log_beta, weight, *knobs, return_cross_entropy, with_gradient
        )
        ctx.save_for_backward(logits, target, log_beta, weight)
        ctx.knobs = knobs
        if return_cross_entropy:
            ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx, grad, _):
        tensors, dim = ctx.saved_tensors, ctx.knobs[1]
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            loss, _ = _composed(*tensors, *ctx.knobs, False)
            (gradient,) = torch.autograd.grad(loss, tensors[0], grad, create_graph=True)
        else:
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:
                _, _, gradient = _by_hand(*tensors, *ctx.knobs, False, True)
            gradient = gradient.mul_(grad.to(gradient.dtype).unsqueeze(dim)).to(tensors[0].dtype)
        return gradient, *(None,) * 7


def _by_hand(logits, target, log_beta, weight, label_smoothing, dim, return_cross_entropy, with_gradient):
    """As `from_probabilities`, and the gradient of every sample's loss, or None."""
    of_samples = logits.movedim(dim, -1)
    num_classes = of_samples.shape[-1]
    rows = of_samples.reshape(-1, num_classes)
    soft = target.dim() == logits.dim()
    target = target.movedim(dim, -1).reshape(-1, num_classes) if soft else target.reshape(-1, 1)
    dtype = torch.promote_types(compute_dtype(logits), target.dtype) if soft else compute_dtype(logits)
    weight = None if weight is None else weight.to(dtype)
    loss = rows.new_empty(len(rows), dtype=row_dtype(rows.device))
    cross_entropy = torch.empty_like(loss) if return_cross_entropy else None
    gradient = torch.empty_like(rows, dtype=dtype, memory_format=torch.contiguous_format) if with_gradient else None
    at_once = max(1, (gap.BLOCK if rows.device.type == "cpu" else _AT_ONCE) // num_classes)
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        z = rows[part].to(dtype)
        top, of_top = z.max(1, keepdim=True)
        behind = z - top.masked_fill(top == -torch.inf, 0.0)
        e = behind.exp().scatter_(1, of_top, 0.0)
        rest = e.sum(1, keepdim=True)

        if soft:
            q = target[part].to(dtype)
            if return_cross_entropy:
                each = rest.to(loss.dtype).log1p().to(dtype) - behind
                cross_entropy[part] = _weighted_sum(q, each, 1)
            if label_smoothing > 0:
                q = q * (1 - label_smoothing) + label_smoothing / num_classes
        else:
            c = target[part]
            if return_cross_entropy:
                cross_entropy[part] = (rest.to(loss.dtype).log1p() - behind.gather(1, c)).squeeze(1)
            q = torch.full_like(z, label_smoothing / num_classes)
            q.scatter_add_(1, c, torch.full_like(rest, 1 - label_smoothing))
        if weight is not None:
            q = q * weight

        q_of_top, rest_and_beta = q.gather(1, of_top), rest.to(loss.dtype) + of_class(log_beta, of_top).exp()
        others = torch.mul(e, log_beta.expm1().to(dtype)).add_(rest + 1).scatter_(1, of_top, 1.0)  # D_k
        if with_gradient:
            a = (q / others).scatter_(1, of_top, 0.0)
            a_of_others, a_of_top = a.sum(1, keepdim=True), (q_of_top / rest_and_beta).to(dtype)
            of_part = torch.mul(e, a_of_others + a_of_top, out=gradient[part])
            of_part.addcmul_(a, rest + 1, value=-1)
            of_part.scatter_(1, of_top, a_of_others - a_of_top * rest)
        of_others = others.log_().sub_(behind)
        if label_smoothing > 0 and weight is None:  # no q is 0
            of_others = of_others.mul_(q).sum(1, dtype=loss.dtype)
        else:
            of_others = _weighted_sum(q, of_others, 1)
        loss[part] = of_others + (q_of_top * rest_and_beta.log()).squeeze(1)

    shape = of_samples.shape[:-1]
    return (
        loss.view(shape),
        cross_entropy.view(shape) if return_cross_entropy else None,
        gradient.view(of_samples.shape).movedim(-1, dim) if with_gradient else None,
    )


def _composed(logits, target, log_beta, weight, label_smoothing, dim, return_cross_entropy):
    """As `from_probabilities`, of torch's functions: differentiable twice and with respect to everything.

    With ``gap_k = log(1 - p_k) - log p_k``, exact while p_k <= 1/2. Only the largest logit can be above that: that one
    class goes through the target gap.
    """
    if target.dim() < logits.dim():
        target = torch.zeros_like(logits, dtype=compute_dtype(logits)).scatter(dim, target.unsqueeze(dim), 1.0)
    dtype = torch.promote_types(compute_dtype(logits), target.dtype)
    logits, target = logits.to(dtype), target.to(dtype)
    per_class = [1] * logits.dim()
    per_class[dim] = -1
    log_p = F.log_softmax(logits, dim)
    cross_entropy = -_weighted_sum(target, log_p.detach(), dim) if return_cross_entropy else None
    if label_smoothing > 0:
        target = target * (1 - label_smoothing) + label_smoothing / logits.shape[dim]
    if weight is not None:
        target = target * weight.to(dtype).reshape(per_class)

    top = logits.detach().argmax(dim)
    loss_of_top = log_add(target_gap(logits, top, dim), of_class(log_beta, top))
    target_of_top = target.gather(dim, top.unsqueeze(dim)).squeeze(dim)

    log_p = log_p.scatter(dim, top.unsqueeze(dim), -1.0)  # any p < 1: log(1 - p) and its gradient must be finite
    log_beta_of_others = log_beta.to(dtype).reshape(per_class) if log_beta.dim() else log_beta
    loss_of_others = log_add(torch.log1p(-log_p.exp()) - log_p, log_beta_of_others)
    loss_of_others = loss_of_others.scatter(dim, top.unsqueeze(dim), 0.0)
    return target_of_top * loss_of_top + _weighted_sum(target, loss_of_others, dim), cross_entropy


def _weighted_sum(target: Tensor, values: Tensor, dim: int) -> Tensor:
    """sum_k q_k v_k in row precision; a class of probability 0 adds nothing, even where v_k is infinite."""
    values = values.masked_fill((target == 0) & values.isinf(), 0.0)
    return (target * values).sum(dim, dtype=row_dtype(values.device))
