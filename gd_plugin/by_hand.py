"""The loss with its gradient by hand: what eager torch runs, in one autograd node.

On a CPU it goes block by block of rows, while a block is in the cache, and what the gradient needs takes the one tensor
of the logits' size that is allocated: the backward scales it in its place and hands it on. (A second tensor of that
size costs more time than the arithmetic.) It is kept beside autograd's saved tensors, whose hooks do not see it; a
further backward through a graph that is retained makes it again. Where Triton's kernels run, a few numbers per row are
kept in place of it.

Of class probabilities, with which label smoothing is computed too, the loss is sum_k q_k J(z, k): J of every class at
once. With the logits behind the largest one, e_k = exp(z_k - z_top), their sum S = R + 1 (R without the largest) and
the weighted probabilities q::

    J_k = log D_k - (z_k - z_top),    D_k = S + (beta_k - 1) e_k,    D_top = R + beta_top
    dJ / dz_i = e_i sum_k a_k - a_i S,    a_k = q_k / D_k;    of the largest: sum_{k != top} a_k - a_top R

No difference of nearly equal numbers is taken in a D: only the largest class has a probability above 1/2, and R is
computed without it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .composed import as_result, composed, reduced, weighted_sum
from .gap import compute_dtype, gap_of_block, log_add, of_class, row_dtype

BLOCK = 2**19  # logits on a CPU that are worked on at once: 2 MiB in fp32
_AT_ONCE = 2**26  # class probabilities where it is not a CPU: a few of their size are needed beside them
_KERNELS_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"  # as the tests of the kernels have it

# From a context that saved the logits, the gradient of the losses before their mean, and whether what was kept may be
# used up: the gradient of the logits.
Finish = Callable[[Any, Tensor, bool], Tensor]


def by_hand(logits: Tensor, target: Tensor, *arguments) -> tuple[Tensor, Tensor | None]:
    """As `composed`, of the same arguments, where only the logits may require a gradient."""
    if logits.requires_grad and torch.is_grad_enabled():
        return _ByHand.apply(logits, target, arguments)
    loss, cross_entropy, _, _ = _forward(logits, target, *arguments, keep=False)
    return loss, cross_entropy


def is_eager() -> bool:
    """Neither traced by the compiler nor transformed by `torch.func`."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, arguments: tuple) -> tuple[Tensor, Tensor | None]:
        loss, cross_entropy, ctx.divisor, ctx.finish = _forward(logits, target, *arguments, keep=True)
        ctx.arguments, ctx.dtype = arguments, logits.dtype
        ctx.save_for_backward(logits, target)
        if cross_entropy is not None:
            ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            logits, target = ctx.saved_tensors
            loss, _ = composed(logits, target, *ctx.arguments)
            (gradient,) = torch.autograd.grad(loss, logits, grad, create_graph=True)
            return gradient, None, None
        last = not torch._C._functorch.is_legacy_batchedtensor(grad)  # of several at once, with is_grads_batched
        finish = ctx.finish
        if last:
            ctx.finish = None
        if finish is None:
            _, _, _, finish = _forward(*ctx.saved_tensors, *ctx.arguments, keep=True)
        if ctx.divisor is not None:
            grad = grad / ctx.divisor
        return finish(ctx, grad, last).to(ctx.dtype), None, None


def _forward(
    logits, target, ignored, log_beta, weight, label_smoothing, reduction, return_cross_entropy, keep
) -> tuple[Tensor, Tensor | None, Tensor | int | None, Finish | None]:
    if ignored is None or label_smoothing > 0:
        loss, cross_entropy, finish = _of_probabilities(
            logits, target, ignored, log_beta, weight, label_smoothing, return_cross_entropy, keep
        )
    else:
        gap, finish = _of_indices(logits, target, ignored, log_beta, weight, keep)
        loss = log_add(gap, of_class(log_beta, target))
        if weight is not None:
            loss = loss * of_class(weight, target)
        cross_entropy = F.softplus(gap, threshold=40) if return_cross_entropy else None
    loss, cross_entropy, divisor = reduced(loss, cross_entropy, target, ignored, weight, reduction)
    return as_result(loss, logits, target), as_result(cross_entropy, logits, target), divisor, finish


def _of_indices(logits, index, ignored, log_beta, weight, keep) -> tuple[Tensor, Finish | None]:
    rows = _rows_for_kernel(logits)
    if rows is not None:
        gap, top, total = _kernels().row_numbers(rows, index.reshape(-1))
        gap, shares = gap.reshape(index.shape), None
    else:
        shares = torch.empty_like(logits, dtype=compute_dtype(logits)) if keep else None
        gaps, totals = [], []
        for z, of_target, out in _blocks(logits, index.unsqueeze(1), shares):
            gap, _, total = gap_of_block(z, of_target, out)
            gaps.append(gap)
            totals.append(total)
        gap, total = _joined(gaps), _joined(totals)

    def finish(ctx, grad: Tensor, last: bool) -> Tensor:
        slope = (gap - of_class(log_beta, index)).sigmoid() * grad  # dJ / dgap
        slope = (slope if weight is None else slope * of_class(weight, index)).masked_fill(ignored, 0.0)
        if shares is None:
            logits, _ = ctx.saved_tensors
            rows = _kernels().as_rows(logits)
            out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
            _kernels().write_gradient(rows, index.reshape(-1), slope.reshape(-1), top, total, out)
            return _as_logits(out, logits)
        scale = (slope / total).to(shares.dtype).unsqueeze(1)
        gradient = shares.mul_(scale) if last else shares * scale
        of_target = -slope.to(shares.dtype).unsqueeze(1)
        return (gradient.scatter_ if last else gradient.scatter)(1, index.unsqueeze(1), of_target)

    return gap, finish if keep else None


def _of_probabilities(
    logits, target, ignored, log_beta, weight, label_smoothing, return_cross_entropy, keep, out=None
) -> tuple[Tensor, Tensor | None, Finish | None]:
    """``out``: where the gradient of every sample's loss is written; it may be the logits."""
    soft = ignored is None
    kernel = _kernel_of_probabilities(logits, target, soft, log_beta, weight, label_smoothing)
    if kernel is not None:
        return _by_kernel(kernel, logits, ignored, return_cross_entropy, keep, out)
    dtype = torch.promote_types(compute_dtype(logits), target.dtype) if soft else compute_dtype(logits)
    per_class = (-1, *[1] * (logits.dim() - 2))
    weight = None if weight is None else weight.to(dtype).reshape(per_class)
    beta_less_one = log_beta.expm1().to(dtype)
    beta_less_one = beta_less_one.reshape(per_class) if log_beta.dim() else beta_less_one
    if keep and out is None:
        out = torch.empty_like(logits, dtype=dtype)
    losses, cross_entropies, rows = [], [], row_dtype(logits.device)
    for z, of_target, of_part in _blocks(logits, target if soft else target.unsqueeze(1), out, at_once=_AT_ONCE):
        z = z.to(dtype)
        top, of_top = z.max(1, keepdim=True)
        behind = z - top.masked_fill(top == -torch.inf, 0.0)
        e = behind.exp().scatter_(1, of_top, 0.0)
        rest = e.sum(1, keepdim=True)

        if soft:
            q = of_target.to(dtype)
            if return_cross_entropy:
                cross_entropies.append(weighted_sum(q, rest.to(rows).log1p().to(dtype) - behind))
            if label_smoothing > 0:
                q = q * (1 - label_smoothing) + label_smoothing / z.shape[1]
        else:
            if return_cross_entropy:
                cross_entropies.append((rest.to(rows).log1p() - behind.gather(1, of_target)).squeeze(1))
            q = torch.full_like(z, label_smoothing / z.shape[1])
            q.scatter_add_(1, of_target, torch.full_like(rest, 1 - label_smoothing))
        if weight is not None:
            q = q * weight

        q_of_top, rest_and_beta = q.gather(1, of_top), rest.to(rows) + of_class(log_beta, of_top).exp()
        others = torch.mul(e, beta_less_one).add_(rest + 1).scatter_(1, of_top, 1.0)  # D_k
        if of_part is not None:
            a = (q / others).scatter_(1, of_top, 0.0)
            a_of_others, a_of_top = a.sum(1, keepdim=True), (q_of_top / rest_and_beta).to(dtype)
            torch.mul(e, a_of_others + a_of_top, out=of_part)
            of_part.addcmul_(a, rest + 1, value=-1)
            of_part.scatter_(1, of_top, a_of_others - a_of_top * rest)
        of_others = others.log_().sub_(behind)
        if label_smoothing > 0 and weight is None:  # no q is 0
            of_others = of_others.mul_(q).sum(1, dtype=rows)
        else:
            of_others = weighted_sum(q, of_others)
        losses.append(of_others + (q_of_top * rest_and_beta.log()).squeeze(1))

    def finish(ctx, grad: Tensor, last: bool) -> Tensor:
        if not soft:
            grad = grad.expand(ignored.shape).masked_fill(ignored, 0.0)
        grad = grad.to(dtype).unsqueeze(1) if grad.dim() else grad.to(dtype)
        return out.mul_(grad) if last else out * grad

    return _joined(losses), _joined(cross_entropies) if return_cross_entropy else None, finish if keep else None


def _kernel_of_probabilities(logits, target, soft, log_beta, weight, label_smoothing):
    """A `triton_kernel.OfProbabilities`, or None where there is none for these tensors."""
    rows = _rows_for_kernel(logits)
    if rows is None or (soft and target.dtype == torch.float64):
        return None
    target = target.movedim(1, -1).reshape(rows.shape) if soft else target.reshape(-1)
    return _kernels().OfProbabilities(rows, target, log_beta, weight, label_smoothing)


def _by_kernel(kernel, logits, ignored, return_cross_entropy, keep, out) -> tuple[Tensor, Tensor | None, Finish | None]:
    shape = logits[:, 0].shape

    def finish(ctx, grad: Tensor, last: bool) -> Tensor:
        logits, _ = ctx.saved_tensors
        rows = _kernels().as_rows(logits)
        grad = grad.expand(shape)
        grad = grad if ignored is None else grad.masked_fill(ignored, 0.0)
        gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        return _as_logits(kernel.write_gradient(rows, grad.reshape(-1), gradient), logits)

    if out is not None:
        kernel.write_gradient(out, (~ignored).reshape(-1), out)
    cross_entropy = kernel.cross_entropy().reshape(shape) if return_cross_entropy else None
    return kernel.loss.reshape(shape), cross_entropy, finish if keep else None


def gradient_in_place(
    logits: Tensor,
    index: Tensor,
    ignored: Tensor,
    log_beta: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The loss of every sample of logits that are needed no longer: they become its gradient. No graph is made.

    Args:
        logits: shape (N, C), the classes side by side, fp32 or fp64.
        index, ignored, log_beta, weight, label_smoothing: as of `composed`.

    Returns:
        The loss and the plain cross-entropy, without beta, weight and label smoothing; shape (N), in fp64 (fp32 on
        devices without it). An ignored row has no gradient, whatever it holds.
    """
    if label_smoothing > 0:
        loss, cross_entropy, _ = _of_probabilities(
            logits, index, ignored, log_beta, weight, label_smoothing, True, False, out=logits
        )
        logits.masked_fill_(ignored.unsqueeze(1), 0.0)
        return reduced(loss, cross_entropy, index, ignored, weight, "none")[:2]
    log_beta = of_class(log_beta, index)
    scale = (~ignored).to(row_dtype(logits.device))
    if weight is not None:
        scale = scale * of_class(weight, index)
    if _rows_for_kernel(logits) is not None:
        gap, top, total = _kernels().row_numbers(logits, index)
        slope = ((gap - log_beta).sigmoid() * scale).masked_fill(ignored, 0.0)
        _kernels().write_gradient(logits, index, slope, top, total, out=logits)
    else:
        gaps = []
        of_rows = (log_beta.expand(index.shape), scale, ignored)
        for z, of_target, beta_of_part, scale_of_part, left_out in _blocks(logits, index.unsqueeze(1), *of_rows):
            gap, shares, total = gap_of_block(z, of_target)
            gaps.append(gap)
            slope = (gap - beta_of_part).sigmoid() * scale_of_part
            torch.mul(shares, (slope / total).to(z.dtype).unsqueeze(1), out=z)
            z.scatter_(1, of_target, -slope.to(z.dtype).unsqueeze(1))
            z.masked_fill_(left_out.unsqueeze(1), 0.0)
        gap = _joined(gaps)
    loss, cross_entropy = log_add(gap, log_beta) * scale, F.softplus(gap, threshold=40)
    return reduced(loss, cross_entropy, index, ignored, weight, "none")[:2]


def _blocks(logits: Tensor, *others: Tensor | None, at_once: int | None = None) -> Iterator[tuple[Tensor | None, ...]]:
    """Of all of them the rows that are worked on at once."""
    at_once = BLOCK if logits.device.type == "cpu" else at_once
    rows = len(logits) if at_once is None else at_once * len(logits) // max(1, logits.numel())
    if rows >= len(logits):
        yield logits, *others
        return
    for start in range(0, len(logits), max(1, rows)):
        part = slice(start, start + max(1, rows))
        yield logits[part], *(None if other is None else other[part] for other in others)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _as_logits(rows: Tensor, logits: Tensor) -> Tensor:
    """(N * ..., C) in the shape (N, C, ...) of the logits."""
    moved = logits.movedim(1, -1)
    return rows.view(moved.shape).movedim(-1, 1)


def _rows_for_kernel(logits: Tensor) -> Tensor | None:
    """The logits as (N, C) where the Triton kernels can work on them: on a GPU, where Triton is installed."""
    if (logits.is_cuda or _KERNELS_ON_CPU) and (kernels := _kernels()) is not None:
        return kernels.as_rows(logits)
    return None


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from . import triton_kernel
    except ImportError:
        return None
    return triton_kernel
