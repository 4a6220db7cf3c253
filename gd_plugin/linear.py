"""The loss straight from a linear head's input, for vocabularies and class counts whose logits do not fit.

The logits are made, used and forgotten a few rows at a time; the maths is that of `gradient_decay_cross_entropy`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import check, gradient_decay_cross_entropy
from .gap import gradient_in_place

__all__ = ["linear_gradient_decay_cross_entropy"]

_LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32; the rows of fewer would not keep a matrix multiplication busy


def linear_gradient_decay_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    beta: float | Tensor = 1.0,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    return_cross_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`gradient_decay_cross_entropy` of ``F.linear(input, linear_weight, linear_bias)``, never holding all logits.

    Torch equivalent: ``gradient_decay_cross_entropy(F.linear(input, linear_weight, linear_bias), target, beta, weight,
    ...)`` in value and gradient; at ``beta = 1`` that of ``F.linear_cross_entropy`` (torch >= 2.15). With ``"mean"``
    and ``"sum"`` the gradients are made in the forward, while the logits are there; with ``"none"`` the backward makes
    the logits again, whatever gradient comes from above. Besides the gradients it needs about 100 MiB at any N.

    Args:
        input: what the head is given, shape (N, D).
        linear_weight: of the head, shape (C, D).
        target: class indices, shape (N), any integer dtype.
        beta: gradient-decay coefficient > 0, a number, a 0-dim tensor or shape (C). No gradient is made for it.
        linear_bias: of the head, shape (C).
        weight, ignore_index, reduction, label_smoothing, return_cross_entropy: as in `gradient_decay_cross_entropy`.

    Returns:
        The loss: 0-dim, or shape (N) for ``"none"``; fp32 for fp16, bf16 and fp32, fp64 for fp64. With
        ``return_cross_entropy`` a pair.

    Raises:
        ValueError: shapes that do not fit, a beta that requires grad, and what `gradient_decay_cross_entropy` refuses.
        RuntimeError: a second derivative is asked for.

    Example::

        >>> hidden, head = torch.randn(8, 16, requires_grad=True), torch.nn.Linear(16, 50_000)
        >>> linear_gradient_decay_cross_entropy(hidden, head.weight, torch.arange(8), 5.0, head.bias).backward()
    """
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            f"input must have shape (N, D) and linear_weight (C, D), got {tuple(input.shape)} and "
            f"{tuple(linear_weight.shape)}; flatten the positions of a sequence first"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        raise ValueError(f"linear_bias must have shape ({len(linear_weight)},), got {tuple(linear_bias.shape)}")
    if target.shape != input.shape[:1]:
        raise ValueError(f"target must have shape ({len(input)},), class indices, got {tuple(target.shape)}")
    if isinstance(beta, Tensor) and beta.requires_grad:
        raise ValueError("beta requires grad, which the linear form does not make; use gradient_decay_cross_entropy")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")

    target = target.long()  # before the comparison with ignore_index: in uint8, -100 is class 156
    knobs = (beta, weight, ignore_index, "none", label_smoothing)
    if reduction == "none":
        loss, cross_entropy = _Rows.apply(input, linear_weight, linear_bias, target, knobs)
    else:
        divisor = divisor_of_mean(target, weight, ignore_index) if reduction == "mean" else None
        loss, cross_entropy = _Sum.apply(input, linear_weight, linear_bias, target, knobs, divisor)
        if reduction == "mean" and return_cross_entropy:
            cross_entropy = cross_entropy / (target != ignore_index).sum()
    return (loss, cross_entropy) if return_cross_entropy else loss


def divisor_of_mean(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What ``F.cross_entropy`` divides the mean over class indices by."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    weight = weight.to(target.device)[target.masked_fill(~kept, 0).long()].masked_fill(~kept, 0.0)
    return weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))  # in bf16 it would have three digits


class _Sum(torch.autograd.Function):
    """The sum over the rows, divided: every row's gradient is known but for one factor."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, knobs, divisor):
        needed = ctx.needs_input_grad[:3]
        sums, cross_entropies, grads = [], [], _Gradients(input, linear_weight, linear_bias, needed)
        # The mean of no row is 0 / 0, and its gradient 0: as F.cross_entropy.
        scale = None if divisor is None else divisor.masked_fill(divisor == 0, 1)
        for rows in _chunks(input, linear_weight):
            logits = F.linear(input[rows], linear_weight, linear_bias)
            if any(needed):
                loss, cross_entropy, grad_logits = _with_gradient(logits, target[rows], knobs)
                grads.add(rows, grad_logits if scale is None else grad_logits.div_(scale))
                del grad_logits
            else:
                loss, cross_entropy = gradient_decay_cross_entropy(
                    logits, target[rows], *knobs, return_cross_entropy=True
                )
            sums.append(loss.sum())
            cross_entropies.append(cross_entropy.sum())
            del logits
        ctx.save_for_backward(*grads.result())
        dtype = torch.promote_types(input.dtype, torch.float32)
        zero = input.new_zeros((), dtype=dtype)
        total, cross_entropy = (torch.stack(parts).sum() if parts else zero for parts in (sums, cross_entropies))
        cross_entropy = cross_entropy.to(dtype, copy=True)  # without any row both would be one tensor
        ctx.mark_non_differentiable(cross_entropy)
        return (total if divisor is None else total / divisor).to(dtype), cross_entropy

    @staticmethod
    def backward(ctx, grad, _):
        _refuse_second_derivative()
        saved = ctx.saved_tensors
        if grad.device.type != "cpu" or grad != 1:  # as it is after loss.backward(); a GPU would have to be waited for
            saved = [None if tensor is None else tensor * grad.to(tensor.dtype) for tensor in saved]
        return *saved, None, None, None


class _Rows(torch.autograd.Function):
    """A loss per row: its gradient waits for what comes from above, and the logits are made again."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, target, knobs):
        ctx.knobs = knobs
        ctx.save_for_backward(input, linear_weight, linear_bias, target)
        empty = input.new_zeros(0, dtype=torch.promote_types(input.dtype, torch.float32))
        pairs = [(empty, empty)]
        for rows in _chunks(input, linear_weight):
            logits = F.linear(input[rows], linear_weight, linear_bias)
            pairs.append(gradient_decay_cross_entropy(logits, target[rows], *knobs, return_cross_entropy=True))
            del logits
        loss, cross_entropy = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx, grad, _):
        _refuse_second_derivative()
        input, linear_weight, linear_bias, target = ctx.saved_tensors
        grads = _Gradients(input, linear_weight, linear_bias, ctx.needs_input_grad[:3])
        for rows in _chunks(input, linear_weight):
            logits = F.linear(input[rows], linear_weight, linear_bias)
            _, _, grad_logits = _with_gradient(logits, target[rows], ctx.knobs)
            grads.add(rows, grad_logits.mul_(grad[rows].unsqueeze(1)))
            del logits, grad_logits
        return *grads.result(), None, None


def _refuse_second_derivative() -> None:
    """Where a graph of the gradient is asked for. (torch's once_differentiable lets it pass as a constant.)"""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_gradient_decay_cross_entropy is not differentiable twice: use gradient_decay_cross_entropy of the "
            "logits"
        )


def _with_gradient(logits: Tensor, target: Tensor, knobs: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and plain cross-entropy of every row, and the gradient of the loss by the logits, which are used up."""
    beta, weight, ignore_index, _, label_smoothing = knobs
    if label_smoothing == 0:
        check(logits, target, beta, weight, ignore_index, "none", label_smoothing, 1, False)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return *gradient_in_place(logits, target, beta, weight, ignore_index), logits
    with torch.enable_grad():
        loss, cross_entropy = gradient_decay_cross_entropy(
            logits.requires_grad_(), target, *knobs, return_cross_entropy=True
        )
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), cross_entropy, gradient


class _Gradients:
    """Of input, weight and bias of the head; None where none is needed.

    What is added up over the chunks, of weight and bias, is so in fp32 at least: bf16 would lose digits.
    """

    def __init__(self, input, linear_weight, linear_bias, needed) -> None:
        self.input, self.linear_weight = input, linear_weight
        exact = torch.promote_types(input.dtype, torch.float32)
        self.tensors = [
            torch.zeros_like(tensor, dtype=dtype) if need else None
            for tensor, dtype, need in zip(
                (input, linear_weight, linear_bias), (input.dtype, exact, exact), needed, strict=True
            )
        ]

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        grad_logits = grad_logits.to(self.input.dtype)
        of_input, of_weight, of_bias = self.tensors
        if of_input is not None:
            torch.mm(grad_logits, self.linear_weight, out=of_input[rows])
        if of_weight is not None and of_weight.dtype == grad_logits.dtype:
            of_weight.addmm_(grad_logits.t(), self.input[rows])
        elif of_weight is not None:
            of_weight += torch.mm(grad_logits.t(), self.input[rows])
        if of_bias is not None:
            of_bias += grad_logits.sum(0, dtype=of_bias.dtype)

    def result(self) -> list[Tensor | None]:
        return [None if tensor is None else tensor.to(self.input.dtype) for tensor in self.tensors]


def _chunks(input: Tensor, linear_weight: Tensor) -> list[slice]:
    rows = max(1, _LOGITS_AT_ONCE // max(1, len(linear_weight)))
    return [slice(start, start + rows) for start in range(0, len(input), rows)]
