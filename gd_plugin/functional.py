"""The mathematics of the gradient-decay softmax (arXiv 2210.17145): tensors in, tensors out, torch only.

With logits z, target class c, ordinary softmax probability p = p_c and coefficient beta > 0 the loss is::

    J_beta(z, c) = log( sum_{i != c} exp(z_i) + beta * exp(z_c) ) - z_c          J_1 = cross-entropy

The arguments are those of `torch.nn.functional.cross_entropy`; the arithmetic is in `by_hand`, and in `composed` for
whoever differentiates further.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .by_hand import by_hand, is_eager
from .composed import composed
from .gap import is_distributed, log_of_beta

__all__ = ["gradient_decay_cross_entropy"]


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
            every class is then needed.
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
    soft = input.shape == target.shape
    check(input, target, beta, weight, ignore_index, reduction, label_smoothing, soft)
    if lone := input.dim() == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0) if soft else target.reshape(1)
    if is_distributed(input):
        target, beta, weight = _whole(target), _whole(beta), _whole(weight)
        from .sharded import class_shard

        if soft or label_smoothing > 0 or class_shard(input) is None:
            input = _whole(input)
    ignored = None
    if not soft:
        target = target.long()  # before the comparison: in uint8, -100 is class 156
        ignored = target == ignore_index
        target = target.masked_fill(ignored, 0)
    log_beta = log_of_beta(beta, input.device)

    others_need_gradients = any(tensor is not None and tensor.requires_grad for tensor in (target, log_beta, weight))
    way = by_hand if is_eager() and not is_distributed(input) and not others_need_gradients else composed
    loss, cross_entropy = way(
        input, target, ignored, log_beta, weight, label_smoothing, reduction, return_cross_entropy
    )
    if lone and reduction == "none":
        loss, cross_entropy = loss.squeeze(0), cross_entropy.squeeze(0) if return_cross_entropy else None
    return (loss, cross_entropy) if return_cross_entropy else loss


def _whole(tensor: Tensor | float | None) -> Tensor | float | None:
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def check(input, target, beta, weight, ignore_index, reduction, label_smoothing, soft) -> None:
    """Everything about the arguments that can be checked without reading a tensor's values."""
    if not input.is_floating_point():
        raise ValueError(f"input must hold floating-point logits, got {input.dtype}")
    dim = 0 if input.dim() == 1 else 1
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
