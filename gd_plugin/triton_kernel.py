"""The target gap of `gap` as two Triton kernels, for a GPU: imported only where one is used.

The forward reads the logits once and keeps three numbers per row. The backward reads them once more and writes the
gradient once, into the only tensor of their size that is allocated: the gradient that autograd has to hand on, in their
dtype. It is not written over the logits: autograd cannot know whether the caller, or the operation that made them (as a
soft cap saves its output), still needs their values. `by_hand.gradient_in_place` owns its logits, and there the
gradient does take their place.

For (N, C) logits in bf16 that is 2 N C bytes besides the logits. ``F.cross_entropy`` holds three such tensors at the
peak of its backward: the saved log-softmax, the gradient with respect to it, and the result.
"""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _exp(x):
    """As torch's own softmax has it. tl.exp rounds x * log2(e) to fp32 on the way: a relative error of up to 6e-8 |x|,
    the same for equal logits, of which a vocabulary has many. (In the interpreter it is numpy's, which does not.)"""
    if _INTERPRETED:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _forward(
    logits, row_stride, target, of_target, gap, top, total, num_classes, BLOCK: tl.constexpr
):  # one program per row
    """Each of ``BLOCK`` lanes keeps the largest logit that it has met and a sum relative to it, in fp32."""
    row = tl.program_id(0).to(tl.int64)  # row * row_stride passes 2**31
    logits += row * row_stride
    index = tl.load(target + row)
    highest = tl.full([BLOCK], _LOWEST, tl.float32)  # finite: -inf - -inf would be NaN
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        z = tl.load(logits + classes, mask=classes < num_classes, other=float("-inf")).to(tl.float32)
        z = tl.where(classes == index, _LOWEST, z)  # as in `gap.gap_of_block`
        ahead = z - highest
        smaller = _exp(-tl.abs(ahead))  # one exponential, whichever of the two is to be scaled down
        sums = tl.where(ahead > 0, sums * smaller + 1.0, sums + smaller)
        highest = tl.where(ahead > 0, z, highest)
    of_row = tl.max(highest, 0)
    sum_of_row = tl.sum(sums * _exp(highest - of_row), 0)
    tl.store(top + row, of_row)
    tl.store(total + row, sum_of_row)
    behind = of_row.to(tl.float64) - tl.load(of_target + row).to(tl.float64)
    tl.store(gap + row, behind + tl.log(sum_of_row.to(tl.float64)))


@triton.jit
def _backward(
    logits, row_stride, target, grad, top, total, out, out_stride, num_classes, BLOCK: tl.constexpr
):  # ``out`` may be ``logits``: every element is read before it is written, by the same program
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    out += row * out_stride
    index = tl.load(target + row)
    of_row = tl.load(grad + row)
    # A row that does not count, as an ignored one, is not read again: its gradient is 0 whatever it holds.
    to_read = tl.where(of_row == 0, 0, num_classes)
    highest = tl.load(top + row)
    scale = (of_row / tl.load(total + row)).to(tl.float32)
    minus_grad = -of_row.to(tl.float32)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        z = tl.load(logits + classes, mask=classes < to_read, other=float("-inf")).to(tl.float32)
        value = tl.where(classes == index, minus_grad, _exp(z - highest) * scale)
        value = tl.where(classes < to_read, value, 0.0)
        tl.store(out + classes, value.to(out.dtype.element_ty), mask=classes < num_classes)


def row_numbers(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row: the gap in fp64, the largest logit but the target's and the sum of exp(z - it) in fp32."""
    # torch refuses an index outside the classes, on a GPU by a device assert. The kernels only compare it.
    of_target = logits.gather(1, target.unsqueeze(1)).squeeze(1)
    gap = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    top, total = torch.empty(2, len(logits), dtype=torch.float32, device=logits.device)
    _launch(_forward, logits, target.contiguous(), of_target.contiguous(), gap, top, total)
    return gap, top, total


def write_gradient(logits: Tensor, target: Tensor, grad: Tensor, top: Tensor, total: Tensor, out: Tensor) -> Tensor:
    """``out``, filled with the gradient of the gaps times ``grad`` (N). It may be the logits themselves."""
    _launch(_backward, logits, target.contiguous(), grad.contiguous(), top, total, out, out.stride(0))
    return out


def _launch(kernel, logits: Tensor, *args) -> None:
    count, num_classes = logits.shape
    block = min(4096, triton.next_power_of_2(num_classes))
    warps = max(1, min(8, block // 512))  # 16 logits per thread
    with torch.cuda.device_of(logits):  # Triton would take the current device
        kernel[(count,)](logits, logits.stride(0), *args, num_classes, BLOCK=block, num_warps=warps)


def as_rows(logits: Tensor) -> Tensor | None:
    """The logits (N, C, ...) as a view (N * ..., C) whose classes lie side by side, where there is one for the kernels.

    Classes apart from each other, as in a segmentation, would be read a cache line per number.
    """
    if type(logits) is not Tensor or logits.numel() == 0:  # a subclass may hold no data, such as a fake tensor
        return None
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    if logits.dim() > 2:
        logits = logits.movedim(1, -1)
        if not logits.is_contiguous():
            return None
        logits = logits.view(-1, logits.shape[-1])
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        return None
    return logits if _works(logits.device) else None


@functools.cache
def _works(device: torch.device) -> bool:
    """Whether Triton can compile for this device: it needs a C compiler, and drops old GPUs."""
    try:
        logits, index = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        _, top, total = row_numbers(logits, index)
        write_gradient(logits, index, total.double(), top, total, torch.empty_like(logits))
    except Exception as error:  # whatever a compiler and a driver raise
        reason = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"the gradient-decay loss runs without its Triton kernel: {type(error).__name__}: {reason[0]}", stacklevel=2
        )
        return False
    return True
