"""The mathematics of the gradient-decay softmax (arXiv 2210.17145): tensors in, tensors out, torch only.

With logits z, target class c, ordinary softmax probability p = p_c and coefficient beta > 0 the loss is::

    J_beta(z, c) = log( sum_{i != c} exp(z_i) + beta * exp(z_c) ) - z_c          J_1 = cross-entropy

Everything below rests on the *target gap* ``u = logsumexp_{i != c} z_i - z_c``, of which both losses are functions::

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

__all__ = ["gradient_decay_cross_entropy"]

_BLOCK = 2**18  # logits on a CPU that are worked on at once: 1 MiB in fp32
_KERNELS_ON_CPU = os.environ.get("TRITON_INTERPRET") == "1"  # as the tests of the kernels have it


def gradient_decay_cross_entropy(
    input: Tensor,
    target: Tensor,
    beta: float | Tensor = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    return_cross_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Cross-entropy whose gradient decays with the target's probability at a rate set by ``beta``.

    .. math:: J_\beta(z, c) = \log\Big(\sum_{i \neq c} e^{z_i} + \beta e^{z_c}\Big) - z_c, \qquad
              \frac{\partial J}{\partial z_c} = -\frac{1 - p}{1 + (\beta - 1) p}

    Torch equivalent: ``F.cross_entropy(input, target, weight, ignore_index=ignore_index, reduction=reduction,
    label_smoothing=label_smoothing)``, to which it is equal at ``beta = 1`` in every combination of arguments. For a
    class-index target and any beta it is cross-entropy on logits whose target entry is raised by ``log(beta)``, plus
    ``log(beta)``. It tends to ``log(beta)`` as p -> 1: **it is negative for confident samples when beta < 1.**

    Args:
        input: logits, shape (C), (N, C) or (N, C, d1, ..., dK). fp16 and bf16 are computed in fp32. A
            ``DTensor`` from a tensor-parallel head is taken too, with the other arguments the same on every process (or
            ``DTensor``): sharded classes stay sharded, for class indices without label smoothing, and only numbers per
            sample are exchanged; anything else is gathered. It needs no ``loss_parallel()``, and works inside one.
        target: class indices, shape (), (N) or (N, d1, ..., dK), any integer dtype; or class probabilities, shape
            of ``input``: then J(z, q) = sum_k q_k J(z, k), each class with its own p_k.
        beta: gradient-decay coefficient > 0 (paper, eq. 5): a float, a 0-dim tensor, or shape (C), one per class.
            Tensors are not checked (a check would wait for the device) and may require grad.
        weight: rescaling per class, shape (C).
        ignore_index: class index that counts neither in the loss nor in the gradient (class indices only).
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. As in torch the mean over class indices divides by the sum of
            the weights of the targets, and the mean over probabilities by the number of samples.
        label_smoothing: in [0, 1]; the target becomes (1 - eps) * target + eps / C. As for class probabilities, J of
            every class is then needed: several times the memory of the logits.
        return_cross_entropy: also return the plain cross-entropy of the same targets, without beta, weight and
            label smoothing, detached, in the same reduction. It costs no further pass over the logits.

    Returns:
        The loss: 0-dim, or for ``"none"`` the shape of a class-index target. fp32 for fp16, bf16 and fp32 input (as
        ``F.cross_entropy`` under autocast), fp64 for fp64. With ``return_cross_entropy`` a pair. For a ``DTensor`` an
        ordinary tensor, the same on every process.

    Raises:
        ValueError: shapes that do not fit, ``beta`` not positive and finite, an unknown reduction, label smoothing
            outside [0, 1], ``ignore_index`` >= 0 with class probabilities.
        RuntimeError: a class index outside [0, C) that is not ``ignore_index`` (on CUDA: a device assert); a second
            derivative with respect to logits that stay sharded.

    Source: Zhang, Xie and Chen, *Probability-Dependent Gradient Decay in Large Margin Softmax*, arXiv 2210.17145.

    Example::

        >>> logits = torch.randn(8, 10, requires_grad=True)
        >>> target = torch.randint(10, (8,))
        >>> gradient_decay_cross_entropy(logits, target, beta=5.0).backward()
    """
    dim = 0 if input.dim() == 1 else 1
    soft = input.shape == target.shape
    _check(input, target, beta, weight, ignore_index, reduction, label_smoothing, dim, soft)
    if _is_distributed(input):
        target, beta, weight = _whole(target), _whole(beta), _whole(weight)
        from .sharded import class_shard

        if soft or label_smoothing > 0 or class_shard(input, dim) is None:
            input = _whole(input)
    log_beta = _log_beta(beta, input.device)

    dtype = _compute_dtype(input)
    if soft:
        dtype = torch.promote_types(dtype, target.dtype)
        loss, cross_entropy = _from_probabilities(
            input, target, log_beta, weight, label_smoothing, dim, return_cross_entropy
        )
        divisor = present = torch.ones_like(loss)
    else:
        if input.dim() == 1:
            target = target.reshape(())  # torch takes a lone target of shape (1) too
        target = target.long()  # before the comparison: in uint8, -100 is class 156
        ignored = target == ignore_index
        index = target.masked_fill(ignored, 0)
        loss, cross_entropy = _from_indices(input, index, log_beta, weight, label_smoothing, dim, return_cross_entropy)
        # Masked last, so that neither an infinite loss nor a 0 / 0 mean reaches the gradient of an ignored row.
        loss = loss.masked_fill(ignored, 0.0)
        cross_entropy = cross_entropy.masked_fill(ignored, 0.0) if return_cross_entropy else None
        divisor = present = ~ignored
        if weight is not None:
            divisor = _of_class(weight, index).to(loss.dtype).masked_fill(ignored, 0.0)

    loss = _reduce(loss, reduction, divisor).to(dtype)
    return (loss, _reduce(cross_entropy, reduction, present).to(dtype)) if return_cross_entropy else loss


def _from_indices(logits, index, log_beta, weight, label_smoothing, dim, return_cross_entropy):
    """Per-sample (loss, plain cross-entropy, detached, if asked for) for class indices in [0, C)."""
    if label_smoothing > 0:
        onehot = torch.zeros_like(logits, dtype=_compute_dtype(logits)).scatter(dim, index.unsqueeze(dim), 1.0)
        return _from_probabilities(logits, onehot, log_beta, weight, label_smoothing, dim, return_cross_entropy)
    gap = target_gap(logits, index, dim)
    loss = _log_add(gap, _of_class(log_beta, index))
    if weight is not None:
        loss = loss * _of_class(weight, index)
    return loss, F.softplus(gap.detach(), threshold=40) if return_cross_entropy else None


def _from_probabilities(logits, target, log_beta, weight, label_smoothing, dim, return_cross_entropy):
    """As `_from_indices`, for class probabilities: sum_k q_k J_k.

    With ``gap_k = log(1 - p_k) - log p_k``, exact while p_k <= 1/2. Only the largest logit can be above that: that one
    class goes through the target gap.
    """
    dtype = torch.promote_types(_compute_dtype(logits), target.dtype)
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
    loss_of_top = _log_add(target_gap(logits, top, dim), _of_class(log_beta, top))
    target_of_top = target.gather(dim, top.unsqueeze(dim)).squeeze(dim)

    log_p = log_p.scatter(dim, top.unsqueeze(dim), -1.0)  # any p < 1: log(1 - p) and its gradient must be finite
    log_beta_of_others = log_beta.to(dtype).reshape(per_class) if log_beta.dim() else log_beta
    loss_of_others = _log_add(torch.log1p(-log_p.exp()) - log_p, log_beta_of_others)
    loss_of_others = loss_of_others.scatter(dim, top.unsqueeze(dim), 0.0)
    return target_of_top * loss_of_top + _weighted_sum(target, loss_of_others, dim), cross_entropy


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
        rows = _row_dtype(logits.device)
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
    if _is_distributed(logits):
        from . import sharded

        return sharded.target_gap(logits, target, dim)
    if not _is_eager():
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


def _is_distributed(tensor: Tensor | float | None) -> bool:
    """Whether it is a DTensor, whose module takes a second to import."""
    return type(tensor) is not Tensor and hasattr(tensor, "full_tensor")


def _whole(tensor: Tensor | float | None) -> Tensor | float | None:
    return tensor.full_tensor() if _is_distributed(tensor) else tensor


def _is_eager() -> bool:
    """Neither traced by the compiler nor transformed by `torch.func`."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _others(logits: Tensor, target: Tensor, dim: int) -> Tensor:
    """The logits in at least fp32, out of the running at the target: by the lowest finite number, since a row without
    any finite logit has no softmax."""
    dtype = _compute_dtype(logits)
    return logits.to(dtype).scatter(dim, target.unsqueeze(dim), torch.finfo(dtype).min)


def _in_blocks(logits: Tensor, dim: int) -> bool:
    """Whether there are so many logits on a CPU that blocks which stay in its cache pay: measured from two blocks on.

    Not while a graph is traced, which would repeat the block, nor under `torch.func`, where a block cannot be filled.
    """
    return (
        logits.device.type == "cpu" and logits.dim() == 2 and dim == 1 and logits.numel() > 2 * _BLOCK and _is_eager()
    )


def _others_in_blocks(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of `_others`, block of rows by block: the largest logit, the largest share, the sum of the shares, the shares.

    The logits are read once, and nothing of their size is allocated but the shares.
    """
    count, num_classes = logits.shape
    rows = max(1, _BLOCK // num_classes)
    shares = torch.empty(logits.shape, dtype=_compute_dtype(logits))
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
) -> Tensor:
    """The per-sample loss of logits that are needed no longer: they become its gradient. No graph is made.

    Args:
        logits: shape (N, C), contiguous, fp32 or fp64.
        target: class indices, shape (N), any integer dtype.
        beta, weight, ignore_index: as in `gradient_decay_cross_entropy`.

    Returns:
        Shape (N), in fp64 (fp32 on devices without it).

    Raises:
        ValueError, RuntimeError: as `gradient_decay_cross_entropy`.
    """
    _check(logits, target, beta, weight, ignore_index, "none", 0.0, 1, False)
    target = target.long()
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0)
    log_beta = _of_class(_log_beta(beta, logits.device), index)
    scale = torch.ones_like(index, dtype=_row_dtype(logits.device)) if weight is None else _of_class(weight, index)
    scale = scale.to(_row_dtype(logits.device)).masked_fill(ignored, 0.0)
    if _rows_for_kernel(logits, 1) is not None:
        gap, top, total = _kernels().row_numbers(logits, index)
        slope = ((gap - log_beta).sigmoid() * scale).masked_fill(ignored, 0.0)
        _kernels().write_gradient(logits, index, slope, top, total, out=logits)
        return (_log_add(gap, log_beta) * scale).masked_fill(ignored, 0.0)
    losses = []
    on_cpu = logits.device.type == "cpu"
    rows = max(1, _BLOCK // logits.shape[1]) if on_cpu else max(1, len(logits))
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
        losses.append((_log_add(gap, log_beta_of_part) * scale[part]).masked_fill(left_out, 0.0))
        slope = (gap - log_beta_of_part).sigmoid() * scale[part]  # dJ / dgap
        torch.mul(share, (slope / total).to(z.dtype).unsqueeze(1), out=z)
        z.scatter_(1, c, -slope.to(z.dtype).unsqueeze(1))
        if not on_cpu or left_out.any():  # a GPU would have to be waited for
            z.masked_fill_(left_out.unsqueeze(1), 0.0)
    return torch.cat(losses) if losses else scale


def _log_add(gap: Tensor, log_beta: Tensor) -> Tensor:
    """log(exp(gap) + beta). Softplus, since the second derivative of torch.logaddexp overflows for gaps beyond 709."""
    return log_beta + F.softplus(gap - log_beta, threshold=40)


def _log_beta(beta: float | Tensor, device: torch.device) -> Tensor:
    rows = _row_dtype(device)
    if isinstance(beta, Tensor):
        return beta.to(device=device, dtype=rows).log()
    return torch.full((), math.log(beta), dtype=rows, device=device)


def _of_class(values: Tensor, index: Tensor) -> Tensor:
    """The entry of ``values`` (C) for every index; a scalar as it is. (vmap has no indexing with a 0-dim tensor.)"""
    return values.gather(0, index.reshape(-1)).reshape(index.shape) if values.dim() else values


def _weighted_sum(target: Tensor, values: Tensor, dim: int) -> Tensor:
    """sum_k q_k v_k in row precision; a class of probability 0 adds nothing, even where v_k is infinite."""
    values = values.masked_fill((target == 0) & values.isinf(), 0.0)
    return (target * values).sum(dim, dtype=_row_dtype(values.device))


def _reduce(values: Tensor, reduction: str, divisor: Tensor) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / divisor.sum()


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _row_dtype(device: torch.device) -> torch.dtype:
    """fp64 for numbers of which there is one per sample; Apple's GPUs have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check(input, target, beta, weight, ignore_index, reduction, label_smoothing, dim, soft) -> None:
    """Everything that can be checked without reading a tensor's values."""
    if not input.is_floating_point():
        raise ValueError(f"input must hold floating-point logits, got {input.dtype}")
    if input.dim() == 0 or input.shape[dim] == 0:
        raise ValueError(f"input must have shape (C), (N, C) or (N, C, d1, ...) with C >= 1, got {tuple(input.shape)}")
    num_classes = input.shape[dim]
    if soft:
        if not target.is_floating_point():
            raise ValueError(
                f"target has the shape of input, {tuple(target.shape)}, so it must hold class probabilities, got "
                f"{target.dtype}; class indices leave the class dimension out"
            )
        if ignore_index >= 0:
            raise ValueError(f"ignore_index is for class indices, got {ignore_index} with class probabilities")
    else:
        expected = input.shape[:dim] + input.shape[dim + 1 :]
        if target.shape != expected and not (input.dim() == 1 and target.shape == (1,)):
            raise ValueError(
                f"target must have shape {tuple(expected)} (class indices) or {tuple(input.shape)} (class "
                f"probabilities) for input of shape {tuple(input.shape)}, got {tuple(target.shape)}"
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(f"target must hold integer class indices, got {target.dtype}")
    if not isinstance(beta, (int, float, Tensor)):
        raise ValueError(f"beta must be a number or a tensor, got {type(beta).__name__}")
    if isinstance(beta, Tensor):
        if beta.dim() > 1 or (beta.dim() == 1 and len(beta) != num_classes):
            raise ValueError(f"beta must be a scalar or have one value per class ({num_classes}), got {beta.shape}")
    elif not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}; 1 is cross-entropy")
    if weight is not None and weight.shape != (num_classes,):
        raise ValueError(f"weight must have one value per class, shape ({num_classes},), got {tuple(weight.shape)}")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
