"""The loss with its gradient by hand: what eager torch runs, in one autograd node.

On a CPU it goes block by block of rows, while a block is in the cache, and what the gradient needs takes the one tensor
of the logits' size that is allocated: the backward scales it in its place and hands it on. (A second tensor of that
size costs more time than the arithmetic.) It is kept beside autograd's saved tensors, whose hooks do not see it; a
further backward through a graph that is retained makes it again, for which the logits are saved as well. Where Triton's
kernels run, a few numbers per row are kept in place of it, and the backward needs the logits: changed in place
meanwhile, they are refused there.

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .composed import as_result, composed, reduced, weighted_sum
from .gap import compute_dtype, gap_of_block, log_add, of_class, row_dtype

BLOCK = 2**19  # logits on a CPU that are worked on at once: 2 MiB in fp32
_AT_ONCE = 2**26  # class probabilities where it is not a CPU: a few of their size are needed beside them
_KERNELS_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"  # as the tests of the kernels have it


class _Kept(NamedTuple):
    """What a backward needs."""

    finish: Callable[[Tensor, Tensor | None], Tensor]  # of what comes from above before the mean, and the logits
    reads_logits: bool  # and can be used again; where it does not, what was kept is used up


def by_hand(logits: Tensor, target: Tensor, *arguments) -> tuple[Tensor, Tensor | None]:
    """As `composed`, of the same arguments, where only the logits may require a gradient."""
    if logits.requires_grad and torch.is_grad_enabled():
        ignored, log_beta, weight, *knobs = arguments
        return _ByHand.apply(logits, target, weight, (ignored, log_beta), knobs)
    loss, cross_entropy, _, _ = _forward(logits, target, *arguments, keep=False)
    return loss, cross_entropy


def is_eager() -> bool:
    """Neither traced, by the compiler or `torch.jit`, nor transformed by `torch.func`."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


class _ByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weight, of_its_own, knobs) -> tuple[Tensor, Tensor | None]:
        loss, cross_entropy, ctx.divisor, ctx.kept = _forward(logits, target, *of_its_own, weight, *knobs, keep=True)
        ctx.of_its_own, ctx.knobs, ctx.dtype = of_its_own, knobs, logits.dtype
        ctx.save_for_backward(logits, target, weight)
        if cross_entropy is not None:
            ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        kept, ctx.kept, logits = ctx.kept, None, None
        once_more = torch.is_grad_enabled()  # a graph of the gradient is asked for
        several = torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)
        if once_more or several:
            logits, target, weight = ctx.saved_tensors
            with torch.enable_grad():
                # Not the logits themselves, whose hooks would run here and once more where this gradient goes.
                logits = logits.view_as(logits)
                loss, _ = composed(logits, target, *ctx.of_its_own, weight, *ctx.knobs)
            gradient = torch.autograd.grad(loss, logits, grad, create_graph=once_more)
            return *gradient, None, None, None, None
        if kept is None or kept.reads_logits:
            logits, target, weight = ctx.saved_tensors
        if kept is None:
            *_, kept = _forward(logits, target, *ctx.of_its_own, weight, *ctx.knobs, keep=True)
        if kept.reads_logits:
            ctx.kept = kept
        grad = grad if ctx.divisor is None else grad / ctx.divisor
        return kept.finish(grad, logits).to(ctx.dtype), None, None, None, None


def _forward(
    logits, target, ignored, log_beta, weight, label_smoothing, reduction, return_cross_entropy, keep
) -> tuple[Tensor, Tensor | None, Tensor | int | None, _Kept | None]:
    if ignored is None or label_smoothing > 0:
        loss, cross_entropy, kept = _of_probabilities(
            logits, target, ignored, log_beta, weight, label_smoothing, return_cross_entropy, keep
        )
    else:
        of_weight = None if weight is None else of_class(weight, target)
        gap, kept = _of_indices(logits, target, ignored, log_beta, of_weight, keep)
        loss = log_add(gap, of_class(log_beta, target))
        if weight is not None:
            loss = loss * of_weight
        cross_entropy = F.softplus(gap, threshold=40) if return_cross_entropy else None
    loss, cross_entropy, divisor = reduced(loss, cross_entropy, target, ignored, weight, reduction)
    return as_result(loss, logits, target), as_result(cross_entropy, logits, target), divisor, kept


def _of_indices(logits, index, ignored, log_beta, of_weight, keep) -> tuple[Tensor, _Kept | None]:
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

    def finish(grad: Tensor, logits: Tensor | None) -> Tensor:
        slope = (gap - of_class(log_beta, index)).sigmoid() * grad  # dJ / dgap
        slope = (slope if of_weight is None else slope * of_weight).masked_fill(ignored, 0.0)
        if shares is None:
            rows = _rows(logits)
            out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
            _kernels().write_gradient(rows, index.reshape(-1), slope.reshape(-1), top, total, out)
            return _as_logits(out, logits)
        shares.mul_((slope / total).to(shares.dtype).unsqueeze(1))
        return shares.scatter_(1, index.unsqueeze(1), -slope.to(shares.dtype).unsqueeze(1))

    return gap, _Kept(finish, shares is None) if keep else None


def _of_probabilities(
    logits, target, ignored, log_beta, weight, label_smoothing, return_cross_entropy, keep, in_place=False
) -> tuple[Tensor, Tensor | None, _Kept | None]:
    """``in_place``: of class indices, and the gradient of every sample's loss takes the place of the logits."""
    soft = ignored is None
    kernel = _kernel_of_probabilities(logits, target, soft, log_beta, weight, label_smoothing)
    if kernel is not None:
        return _by_kernel(kernel, logits, ignored, return_cross_entropy, keep, in_place)
    dtype = torch.promote_types(compute_dtype(logits), target.dtype) if soft else compute_dtype(logits)
    per_class = (-1, *[1] * (logits.dim() - 2))
    weight = None if weight is None else weight.to(dtype).reshape(per_class)
    beta_less_one = log_beta.expm1().to(dtype)
    beta_less_one = beta_less_one.reshape(per_class) if log_beta.dim() else beta_less_one
    out = logits if in_place else torch.empty_like(logits, dtype=dtype) if keep else None
    losses, cross_entropies, rows = [], [], row_dtype(logits.device)
    for z, of_target, of_part in _blocks(logits, target if soft else target.unsqueeze(1), out, at_once=_AT_ONCE):
        z = z.to(dtype)
        top, of_top = z.max(1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)
        behind = z - top
        e = behind.exp().scatter_(1, of_top, 0.0)
        rest = e.sum(1, keepdim=True) + (top - top)  # NaN where the largest logit is inf or NaN

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

    def finish(grad: Tensor, _) -> Tensor:
        if not soft:
            grad = grad.expand(ignored.shape).masked_fill(ignored, 0.0)
        out.mul_(grad.to(dtype).unsqueeze(1) if grad.dim() else grad.to(dtype))
        return out if soft else out.masked_fill_(ignored.unsqueeze(1), 0.0)  # whatever the row holds

    kept = _Kept(finish, False) if keep else None
    return _joined(losses), _joined(cross_entropies) if return_cross_entropy else None, kept


def _kernel_of_probabilities(logits, target, soft, log_beta, weight, label_smoothing):
    """A `triton_kernel.OfProbabilities`, or None where there is none for these tensors."""
    rows = _rows_for_kernel(logits)
    if rows is None or (soft and target.dtype == torch.float64):
        return None
    target = target.movedim(1, -1).reshape(rows.shape) if soft else target.reshape(-1)
    return _kernels().OfProbabilities(rows, target, log_beta, weight, label_smoothing)


def _by_kernel(kernel, logits, ignored, return_cross_entropy, keep, in_place):
    shape = logits[:, 0].shape

    def finish(grad: Tensor, logits: Tensor) -> Tensor:
        rows = _rows(logits)
        grad = grad.expand(shape)
        grad = grad if ignored is None else grad.masked_fill(ignored, 0.0)
        gradient = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        return _as_logits(kernel.write_gradient(rows, grad.reshape(-1), gradient), logits)

    if in_place:
        kernel.write_gradient(logits, ~ignored, out=logits)
    cross_entropy = kernel.cross_entropy().reshape(shape) if return_cross_entropy else None
    return kernel.loss.reshape(shape), cross_entropy, _Kept(finish, True) if keep else None


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
            logits, index, ignored, log_beta, weight, label_smoothing, True, False, in_place=True
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


def _rows(logits: Tensor) -> Tensor:
    """(N * ..., C) of logits that a kernel has worked on; hooks of saved tensors may have brought other strides."""
    rows = _kernels().as_rows(logits)
    return logits.movedim(1, -1).reshape(-1, logits.shape[1]).contiguous() if rows is None else rows


def _as_logits(rows: Tensor, logits: Tensor) -> Tensor:
    """(N * ..., C) in the shape (N, C, ...) of the logits."""
    moved = logits.movedim(1, -1)
    return rows.view(moved.shape).movedim(-1, 1)


def _rows_for_kernel(logits: Tensor) -> Tensor | None:
    """The logits as (N, C) where the Triton kernels can work on them: on a GPU, where Triton is installed."""
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return None  # a trace or a dispatch mode would not see what a kernel writes
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
