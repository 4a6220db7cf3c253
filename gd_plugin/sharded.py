"""The target gap of `gap` for a ``DTensor`` whose classes are sharded: imported only where one is used."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .gap import compute_dtype, not_infinite, of_class, row_dtype


def target_gap(logits: Tensor, target: Tensor) -> Tensor:
    """`gap.target_gap` of logits that `class_shard` knows; an ordinary tensor, the same on every process."""
    return _TargetGap.apply(logits.to_local(), target, *class_shard(logits))


def class_shard(logits: Tensor) -> tuple[int, int, dist.ProcessGroup] | None:
    """This process's first class, the number of classes and the group that shares them, where every process of one mesh
    dimension has some and the other dimensions do not shard anything."""
    sharded = [axis for axis, placement in enumerate(logits.placements) if not placement.is_replicate()]
    if len(sharded) != 1 or not logits.placements[sharded[0]].is_shard(1):
        return None
    axis, mesh, num_classes = sharded[0], logits.device_mesh, logits.shape[1]
    per_process = math.ceil(num_classes / mesh.size(axis))  # as torch.chunk
    if per_process * (mesh.size(axis) - 1) >= num_classes:
        return None
    return per_process * mesh.get_local_rank(axis), num_classes, mesh.get_group(axis)


class _TargetGap(torch.autograd.Function):
    """That of logits of which every process has some classes: the largest one, their sum and the target's are
    exchanged. ``logits``: this process's, from class ``first`` of ``num_classes`` on."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, first: int, num_classes: int, group) -> Tensor:
        ctx.dtype = logits.dtype
        of_class(target.new_zeros(1).expand(num_classes), target)  # refuses an index outside the classes
        index = (target - first).unsqueeze(1)
        here = (index >= 0) & (index < logits.shape[1])
        index = index.masked_fill(~here, 0)  # where the target is elsewhere, any class, which is put back
        others = logits.to(compute_dtype(logits))
        of_target = not_infinite(others.gather(1, index))
        others = others.scatter(1, index, of_target.masked_fill(here, torch.finfo(others.dtype).min))

        top = others.amax(1, keepdim=True)
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        shares = (others - top).exp()
        sums = torch.cat([shares.sum(1, keepdim=True), of_target.masked_fill(~here, 0.0)], 1)
        sums = sums.to(row_dtype(logits.device))
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        total, of_target = sums.split(1, 1)
        ctx.save_for_backward(shares.div_(total.to(shares.dtype)), index, here)
        return (top.to(sums.dtype) - of_target + total.log()).squeeze(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient-decay loss of sharded logits is not differentiable twice: give it logits.full_tensor()"
            )
        shares, index, here = ctx.saved_tensors
        grad = grad.to(shares.dtype).unsqueeze(1)
        grad_logits = shares * grad
        of_target = torch.where(here, -grad, grad_logits.gather(1, index))
        return grad_logits.scatter_(1, index, of_target).to(ctx.dtype), *[None] * 4
