"""The loss straight from a linear head's input, for vocabularies and class counts whose logits do not fit.

The logits are made, used and forgotten a few rows at a time; the maths is that of `gradient_decay_cross_entropy`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .by_hand import by_hand, gradient_in_place
from .composed import reduced
from .functional import check
from .gap import compute_dtype, log_of_beta, row_dtype

__all__ = ["linear_gradient_decay_cross_entropy"]

_LOGITS_AT_ONCE = 5 * 2**22  # 80 MiB in fp32; the rows of fewer would not keep a matrix multiplication busy


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
    the logits again, whatever gradient comes from above, and in fp16 it always does so. Besides the gradients it needs
    about 100 MiB at any N. Under autocast the head's tensors are cast as ``F.linear``'s are.

    Args:
        input: what the head is given, shape (N, D).
        linear_weight: of the head, shape (C, D).
        target: class indices, shape (N), any integer dtype.
        beta: gradient-decay coefficient > 0, a number, a 0-dim tensor or shape (C). No gradient is made for it, nor for
            ``weight``.
        linear_bias: of the head, shape (C).
        weight, ignore_index, reduction, label_smoothing, return_cross_entropy: as in `gradient_decay_cross_entropy`.

    Returns:
        The loss: 0-dim, or shape (N) for ``"none"``; fp32 for fp16, bf16 and fp32, fp64 for fp64. With
        ``return_cross_entropy`` a pair.

    Raises:
        ValueError: shapes that do not fit, a beta or weight that requires grad, and what `gradient_decay_cross_entropy`
            refuses.
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
    for name, tensor in (("beta", beta), ("weight", weight)):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(
                f"{name} requires grad, which the linear form does not make; use gradient_decay_cross_entropy"
            )
    logits = torch.empty(len(input), len(linear_weight), dtype=input.dtype, device="meta")
    check(logits, target, beta, weight, ignore_index, reduction, label_smoothing, False)

    kind = input.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and input.dtype != torch.float64:  # once, and not in every chunk
        dtype = torch.get_autocast_dtype(kind)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    for name, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and tensor.dtype != input.dtype:
            raise ValueError(f"{name} must have the dtype of input, {input.dtype}, got {tensor.dtype}")
    target = target.long()  # before the comparison: in uint8, -100 is class 156
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0)
    arguments = (index, ignored, log_of_beta(beta, input.device), label_smoothing)
    # In fp16 gradients need the scale that comes with the backward, so that the smallest are not rounded to 0.
    way = _Rows if reduction == "none" or input.dtype == torch.float16 else _Sum
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        loss, cross_entropy = way.apply(input, linear_weight, linear_bias, weight, arguments, reduction)
        if way is _Rows:
            loss, cross_entropy, _ = reduced(loss, cross_entropy, index, ignored, weight, reduction)
    dtype = compute_dtype(input)
    return (loss.to(dtype), cross_entropy.to(dtype)) if return_cross_entropy else loss.to(dtype)


class _Sum(torch.autograd.Function):
    """The sum over the rows, or their mean: every row's gradient is known but for one factor.

    It is kept, and made again, as in `by_hand`.
    """

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, weight, arguments, reduction):
        ctx.arguments = arguments
        ctx.save_for_backward(input, linear_weight, linear_bias, weight)
        ctx.kept = _Gradients((input, linear_weight, linear_bias), ctx.needs_input_grad)
        losses, cross_entropies = _of_chunks(input, linear_weight, linear_bias, weight, arguments, ctx.kept)
        index, ignored, *_ = arguments
        loss, cross_entropy, ctx.divisor = reduced(losses, cross_entropies, index, ignored, weight, reduction)
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx, grad, _):
        _refuse_second_derivative()
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            kept = _Gradients(ctx.saved_tensors[:3], ctx.needs_input_grad)
            _of_chunks(*ctx.saved_tensors, ctx.arguments, kept)
        if ctx.divisor is not None:
            # The mean of no row is 0 / 0, and its gradient 0: as F.cross_entropy.
            grad = (grad / ctx.divisor).masked_fill(ctx.arguments[1].all(), 0.0)
        of_input, *of_head = kept.result(grad)
        if of_input is not None and ctx.divisor is not None:
            of_input.masked_fill_(ctx.arguments[1].unsqueeze(1), 0.0)  # where the weights of the others sum to 0
        return of_input, *of_head, None, None, None


class _Rows(torch.autograd.Function):
    """A loss per row: its gradient waits for what comes from above, and the logits are made again."""

    @staticmethod
    def forward(ctx, input, linear_weight, linear_bias, weight, arguments, _):
        ctx.arguments = arguments
        ctx.save_for_backward(input, linear_weight, linear_bias, weight)
        loss, cross_entropy = _of_chunks(input, linear_weight, linear_bias, weight, arguments, None)
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx, grad, _):
        _refuse_second_derivative()
        saved = ctx.saved_tensors
        grads = _Gradients(saved[:3], ctx.needs_input_grad)
        _of_chunks(*saved, ctx.arguments, grads, grad)
        return *grads.result(), None, None, None


def _refuse_second_derivative() -> None:
    """Where a graph of the gradient is asked for. (torch's once_differentiable lets it pass as a constant.)"""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_gradient_decay_cross_entropy is not differentiable twice: use gradient_decay_cross_entropy of the "
            "logits"
        )


def _of_chunks(
    input, linear_weight, linear_bias, weight, arguments, grads: _Gradients | None, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and plain cross-entropy of every row; the gradients are added up, those of a row times its ``factor``."""
    index, ignored, log_beta, label_smoothing = arguments
    knobs = (log_beta, weight, label_smoothing)
    rows, needed = row_dtype(input.device), grads is not None and grads.needed
    loss, cross_entropy = torch.empty(2, len(input), dtype=rows, device=input.device)
    at_once = max(1, _LOGITS_AT_ONCE // max(1, len(linear_weight)))
    # Every chunk in the same place: fresh memory, page by page, costs as much time as its matrix multiplication.
    # Its rows begin at multiples of 32 numbers: with 50,257 classes side by side that takes half as long again.
    num_classes = len(linear_weight)
    made = input.new_empty(min(at_once, len(input)), -(-num_classes // 32) * 32)[:, :num_classes]
    same = not needed or made.dtype == compute_dtype(made)
    exact = made if same else torch.empty_like(made, dtype=compute_dtype(made))
    for start in range(0, len(input), at_once):
        part = slice(start, start + at_once)
        of_part = index[part], ignored[part], *knobs
        logits = _linear(input[part], linear_weight, linear_bias, made[: len(index[part])])
        if needed:
            logits = logits if same else exact[: len(logits)].copy_(logits)
            loss[part], cross_entropy[part] = gradient_in_place(logits, *of_part)
            grads.add(
                part, input[part], linear_weight, logits if factor is None else logits.mul_(factor[part].unsqueeze(1))
            )
        else:
            loss[part], cross_entropy[part] = by_hand(logits, *of_part, "none", True)
    return loss, cross_entropy


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """``F.linear``, which has no ``out``."""
    return torch.mm(input, weight.t(), out=out) if bias is None else torch.addmm(bias, input, weight.t(), out=out)


class _Gradients:
    """Of input, weight and bias of the head; None where none is needed.

    What is added up over the chunks, of weight and bias, is so in fp32 at least: bf16 would lose digits.
    """

    def __init__(self, head: tuple[Tensor | None, ...], needed: tuple[bool, ...]) -> None:
        self.needed, self.dtypes = any(needed[:3]), [None if tensor is None else tensor.dtype for tensor in head]
        self.tensors = [
            torch.zeros_like(tensor, dtype=compute_dtype(tensor)) if need else None
            for tensor, need in zip(head, needed, strict=False)
        ]

    def add(self, rows: slice, input: Tensor, linear_weight: Tensor, grad_logits: Tensor) -> None:
        of_input, of_weight, of_bias = self.tensors
        if of_bias is not None:
            of_bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(input.dtype)
        if of_input is not None:
            of_input[rows] = torch.mm(grad_logits, linear_weight)
        if of_weight is not None and of_weight.dtype == grad_logits.dtype:
            of_weight.addmm_(grad_logits.t(), input)
        elif of_weight is not None:
            of_weight += torch.mm(grad_logits.t(), input)

    def result(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """The gradients, which are given away."""
        return [
            None if tensor is None else (tensor if factor is None else tensor.mul_(factor)).to(dtype)
            for tensor, dtype in zip(self.tensors, self.dtypes, strict=True)
        ]
