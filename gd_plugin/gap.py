"""The target gap ``u = logsumexp_{i != c} z_i - z_c``, of which the loss is a function, and its gradient.

    J = log(exp(u) + beta)          cross-entropy = log(exp(u) + 1)

The gap is computed from the logits without the target, so no digit is lost where the target is far ahead
(1 - p -> 0), which is where beta < 1 amplifies: ``CE + log(1 - p + beta * p)`` would divide fp32 rounding by beta.
What belongs to a sample (one number, not one per class) is kept in fp64.
"""

from __future__ import annotations

import functools
import math
import os
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**18  # logits on a CPU that are worked on at once: 1 MiB in fp32
_KERNELS_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"  # as the tests of the kernels have it


class _TargetGap(torch.autograd.Function):
    """``logsumexp_{i != c} z_i - z_c`` per sample; see `target_gap`.

    The gradient with respect to the logits is ``softmax_{i != c}(z) - onehot_c``: the softmax of the forward is kept
    and scaled in the backward. Asked for a graph of the gradient (double backward, `torch.func`), the backward computes
    it again, differentiably.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, target: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        if _in_blocks(logits, dim):
            top, largest, total, shares = _others_in_blocks(logits, target)
        else:
            others = _others(logits, target, dim)
            shares = others.softmax(dim)
            top, largest, total = others.amax(dim), shares.amax(dim), shares.sum(dim)
        rows = row_dtype(logits.device)
        # The largest share is exp(0) / (the sum of all exp(z_i - top), as the softmax has it). Where that sum lacks
        # digits, over a vocabulary in fp32, the shares do not add up to 1: by just that factor.
        ahead = top.to(rows) - logits.gather(dim, target.unsqueeze(dim)).squeeze(dim).to(rows)
        return ahead + (total / largest).to(rows).log(), shares, total

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, target, ctx.dim = inputs
        _, shares, total = output
        ctx.mark_non_differentiable(shares, total)
        ctx.set_materialize_grads(False)  # or the backward would be handed zeros for all of the shares
        ctx.save_for_backward(logits, target, shares, total)

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        logits, target, shares, total = ctx.saved_tensors
        if torch.is_grad_enabled():
            shares = _others(logits, target, ctx.dim).softmax(ctx.dim)
            total = shares.sum(ctx.dim)
        return _gap_gradient(grad, shares, total, target, ctx.dim).to(logits.dtype), None, None


class _EagerTargetGap(torch.autograd.Function):
    """`_TargetGap` without what `torch.func` and the compiler need, which would double the time of a small batch.

    The softmax becomes the gradient in its own place: a second tensor of that size costs more time than the arithmetic.
    A further backward through a graph that is kept (``retain_graph``) computes it again.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, dim: int) -> Tensor:
        gap, ctx.shares, total = _TargetGap.forward(logits, target, dim)
        ctx.dim = dim
        ctx.save_for_backward(logits, target, total)
        return gap

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, target, total = ctx.saved_tensors
        again = torch.is_grad_enabled()
        shares = ctx.shares
        if not again:
            ctx.shares = None
        if again or shares is None:
            shares = _others(logits, target, ctx.dim).softmax(ctx.dim)
            total = shares.sum(ctx.dim)
        gradient = _gap_gradient(grad, shares, total, target, ctx.dim, in_place=not again)
        return gradient.to(logits.dtype), None, None


def target_gap(logits: Tensor, target: Tensor, dim: int = 1) -> Tensor:
    """How far the target is behind all other classes: ``logsumexp_{i != c} z_i - z_c``; negative where it leads.

    Args:
        logits: shape (..., C, ...) with the classes in dimension ``dim``.
        target: int64 class indices in [0, C), the shape of ``logits`` without ``dim``.

    Returns:
        The shape of ``target``, in fp64 (fp32 on devices without it). ``sigmoid(-gap)`` is the target's probability.
        About the lowest fp32 number where no other class has a finite logit, +inf where the target's logit is -inf.
    """
    if is_distributed(logits):
        from . import sharded

        return sharded.target_gap(logits, target, dim)
    if not is_eager():
        return _TargetGap.apply(logits, target, dim)[0]  # which the compiler fuses
    if (rows := _rows_for_kernel(logits, dim)) is not None:
        return _kernels().target_gap(rows, target.reshape(-1)).reshape(target.shape)
    return _EagerTargetGap.apply(logits, target, dim)


def _gap_gradient(grad: Tensor, shares: Tensor, total: Tensor, target: Tensor, dim: int, in_place=False) -> Tensor:
    """The gradient of the gaps times ``grad``, from the shares of the other classes, which add up to ``total``."""
    scale = (grad / total).to(shares.dtype).unsqueeze(dim)
    minus_grad = -grad.to(shares.dtype).unsqueeze(dim)
    scaled = shares.mul_(scale) if in_place else shares * scale
    return scaled.scatter_(dim, target.unsqueeze(dim), minus_grad)


def _rows_for_kernel(logits: Tensor, dim: int) -> Tensor | None:
    """The logits as (N, C) where the Triton kernels can work on them: on a GPU, where Triton is installed."""
    if (logits.is_cuda or _KERNELS_ON_CPU) and (kernels := _kernels()) is not None:
        return kernels.as_rows(logits, dim)
    return None


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from . import triton_kernel
    except ImportError:
        return None
    return triton_kernel


def is_distributed(tensor: Tensor | float | None) -> bool:
    """Whether it is a DTensor, whose module takes a second to import."""
    return type(tensor) is not Tensor and hasattr(tensor, "full_tensor")


def is_eager() -> bool:
    """Neither traced by the compiler nor transformed by `torch.func`."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _others(logits: Tensor, target: Tensor, dim: int) -> Tensor:
    """The logits in at least fp32, out of the running at the target: by the lowest finite number, since a row without
    any finite logit has no softmax."""
    dtype = compute_dtype(logits)
    return logits.to(dtype).scatter(dim, target.unsqueeze(dim), torch.finfo(dtype).min)


def _in_blocks(logits: Tensor, dim: int) -> bool:
    """Whether there are so many logits on a CPU that blocks which stay in its cache pay: measured from two blocks on.

    Not while a graph is traced, which would repeat the block, nor under `torch.func`, where a block cannot be filled.
    """
    return logits.device.type == "cpu" and logits.dim() == 2 and dim == 1 and logits.numel() > 2 * BLOCK and is_eager()


def _others_in_blocks(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of `_others`, block of rows by block: the largest logit, the largest share, the sum of the shares, the shares.

    The logits are read once, and nothing of their size is allocated but the shares.
    """
    count, num_classes = logits.shape
    rows = max(1, BLOCK // num_classes)
    shares = torch.empty(logits.shape, dtype=compute_dtype(logits))
    block = torch.empty(min(rows, count), num_classes, dtype=shares.dtype)
    per_row = torch.empty(3, count, dtype=shares.dtype)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        others = block[: min(rows, count - start)].copy_(logits[part])
        others.scatter_(1, target[part].unsqueeze(1), torch.finfo(shares.dtype).min)
        share = torch.softmax(others, 1, out=shares[part])
        torch.amax(others, 1, out=per_row[0, part])
        torch.amax(share, 1, out=per_row[1, part])
        torch.sum(share, 1, out=per_row[2, part])
    return *per_row, shares


def gradient_in_place(
    logits: Tensor, target: Tensor, beta: float | Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The per-sample loss of logits that are needed no longer: they become its gradient. No graph is made.

    Args:
        logits: shape (N, C), contiguous, fp32 or fp64, C >= 1.
        target: class indices, shape (N), any integer dtype.
        beta, weight, ignore_index: as in `gradient_decay_cross_entropy`, by which they are checked.

    Returns:
        The loss and the plain cross-entropy, without beta and weight; shape (N), in fp64 (fp32 on devices without it).

    Raises:
        RuntimeError: as `gradient_decay_cross_entropy`.
    """
    target = target.long()
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0)
    log_beta = of_class(log_of_beta(beta, logits.device), index)
    scale = torch.ones_like(index, dtype=row_dtype(logits.device)) if weight is None else of_class(weight, index)
    scale = scale.to(row_dtype(logits.device)).masked_fill(ignored, 0.0)
    if _rows_for_kernel(logits, 1) is not None:
        gap, top, total = _kernels().row_numbers(logits, index)
        slope = ((gap - log_beta).sigmoid() * scale).masked_fill(ignored, 0.0)
        _kernels().write_gradient(logits, index, slope, top, total, out=logits)
        cross_entropy = F.softplus(gap, threshold=40).masked_fill(ignored, 0.0)
        return (log_add(gap, log_beta) * scale).masked_fill(ignored, 0.0), cross_entropy
    losses, cross_entropies = [], []
    on_cpu = logits.device.type == "cpu"
    rows = max(1, BLOCK // logits.shape[1]) if on_cpu else max(1, len(logits))
    buffer = torch.empty_like(logits[:rows])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        z, c, left_out = logits[part], index[part].unsqueeze(1), ignored[part]
        log_beta_of_part = log_beta[part] if log_beta.dim() else log_beta
        of_target = z.gather(1, c).squeeze(1).to(scale.dtype)
        z.scatter_(1, c, torch.finfo(z.dtype).min)
        share = torch.softmax(z, 1, out=buffer[: len(z)])
        total = share.sum(1)  # as in `_TargetGap`
        gap = z.amax(1).to(scale.dtype) - of_target + (total / share.amax(1)).to(scale.dtype).log()
        losses.append((log_add(gap, log_beta_of_part) * scale[part]).masked_fill(left_out, 0.0))
        cross_entropies.append(F.softplus(gap, threshold=40).masked_fill(left_out, 0.0))
        slope = (gap - log_beta_of_part).sigmoid() * scale[part]  # dJ / dgap
        torch.mul(share, (slope / total).to(z.dtype).unsqueeze(1), out=z)
        z.scatter_(1, c, -slope.to(z.dtype).unsqueeze(1))
        if not on_cpu or left_out.any():  # a GPU would have to be waited for
            z.masked_fill_(left_out.unsqueeze(1), 0.0)
    return (torch.cat(losses), torch.cat(cross_entropies)) if losses else (scale, scale)


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
    return torch.promote_types(logits.dtype, torch.float32)


def row_dtype(device: torch.device) -> torch.dtype:
    """fp64 for numbers of which there is one per sample; Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64
