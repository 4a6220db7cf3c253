"""What `by_hand` does on a GPU, as Triton kernels: imported only where one is used.

Of class indices the forward reads the logits once and keeps three numbers per row; of class probabilities, and with
label smoothing, it reads them three times, twice from the cache. The backward reads them once more and writes the
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
    z = tl.load(of_target + row).to(tl.float64)
    behind = of_row.to(tl.float64) - tl.where(z == float("inf"), float("nan"), z)  # as in `gap.gap_of_block`
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


@triton.jit
def _q(target, index, weight, classes, inside, keep, spread, SOFT: tl.constexpr, WEIGHTED: tl.constexpr):
    """The target probabilities of some classes as they are given, and smoothed and weighted."""
    if SOFT:
        given = tl.load(target + classes, mask=inside, other=0.0).to(tl.float32)
    else:
        given = tl.where(classes == index, 1.0, 0.0)
    q = given * keep + spread
    if WEIGHTED:
        q = q * tl.load(weight + classes, mask=inside, other=0.0)
    return given, tl.where(inside, q, 0.0)


@triton.jit
def _beta_less_one(beta_less_one, classes, inside, PER_CLASS: tl.constexpr):
    if PER_CLASS:
        return tl.load(beta_less_one + classes, mask=inside, other=0.0)
    else:
        return tl.load(beta_less_one)


@triton.jit
def _forward_probabilities(
    logits, row_stride, target, target_stride, weight, beta_less_one, keep, spread, of_top, numbers, numbers_stride,
    num_classes, SOFT: tl.constexpr, WEIGHTED: tl.constexpr, PER_CLASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """In the names of `by_hand`, per row: the largest class, and into ``numbers`` z_top, R, q_top, sum_{k != top} a_k
    and q_k J_k, the sum of the given probabilities, and theirs times z_k - z_top."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target += row * target_stride
    numbers += row
    index = -1
    if not SOFT:
        index = tl.load(target)
    lanes = tl.arange(0, BLOCK)

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_classes, BLOCK):
        classes = start + lanes
        z = tl.load(logits + classes, mask=classes < num_classes, other=float("-inf")).to(tl.float32)
        place = tl.where(z > highest, classes, place)
        highest = tl.where(z > highest, z, highest)
    top = tl.max(highest, 0)
    largest = tl.min(tl.where(highest == top, place, num_classes), 0)
    top = tl.where(top == float("-inf"), 0.0, top)

    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_classes, BLOCK):
        classes = start + lanes
        z = tl.load(logits + classes, mask=classes < num_classes, other=float("-inf")).to(tl.float32)
        at_top = tl.where(z == float("-inf"), 0.0, z - top)  # 0; NaN of a logit that is inf or NaN
        sums += tl.where(classes == largest, at_top, _exp(z - top))
    rest = tl.sum(sums, 0)

    q_of_top = tl.zeros([BLOCK], tl.float32)
    a_of_others = tl.zeros([BLOCK], tl.float32)
    of_others = tl.zeros([BLOCK], tl.float32)
    all_given = tl.zeros([BLOCK], tl.float32)
    given_behind = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_classes, BLOCK):
        classes = start + lanes
        inside = classes < num_classes
        behind = tl.load(logits + classes, mask=inside, other=float("-inf")).to(tl.float32) - top
        given, q = _q(target, index, weight, classes, inside, keep, spread, SOFT, WEIGHTED)
        d = rest + 1.0 + _beta_less_one(beta_less_one, classes, inside, PER_CLASS) * _exp(behind)
        is_top = classes == largest
        d = tl.where(is_top, 1.0, d)
        q_of_top += tl.where(is_top, q, 0.0)
        a_of_others += tl.where(is_top, 0.0, q / d)
        of_others += tl.where(is_top | (q == 0), 0.0, q * (tl.log(d) - behind))
        all_given += given
        given_behind += tl.where(given == 0, 0.0, given * behind)
    tl.store(of_top + row, largest.to(tl.int64))
    tl.store(numbers, top)
    tl.store(numbers + numbers_stride, rest)
    tl.store(numbers + 2 * numbers_stride, tl.sum(q_of_top, 0))
    tl.store(numbers + 3 * numbers_stride, tl.sum(a_of_others, 0))
    tl.store(numbers + 4 * numbers_stride, tl.sum(of_others, 0))
    tl.store(numbers + 5 * numbers_stride, tl.sum(all_given, 0))
    tl.store(numbers + 6 * numbers_stride, tl.sum(given_behind, 0))


@triton.jit
def _backward_probabilities(
    logits, row_stride, target, target_stride, weight, beta_less_one, keep, spread, of_top, numbers, numbers_stride,
    a_of_top, grad, out, out_stride, num_classes,
    SOFT: tl.constexpr, WEIGHTED: tl.constexpr, PER_CLASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target += row * target_stride
    numbers += row
    out += row * out_stride
    index = -1
    if not SOFT:
        index = tl.load(target)
    of_row = tl.load(grad + row)
    to_read = tl.where(of_row == 0, 0, num_classes)  # as in `_backward`
    largest = tl.load(of_top + row)
    top = tl.load(numbers)
    rest = tl.load(numbers + numbers_stride)
    of_others = tl.load(numbers + 3 * numbers_stride)
    of_largest = tl.load(a_of_top + row)
    for start in range(0, num_classes, BLOCK):
        classes = start + tl.arange(0, BLOCK)
        inside = classes < to_read
        e = _exp(tl.load(logits + classes, mask=inside, other=float("-inf")).to(tl.float32) - top)
        _, q = _q(target, index, weight, classes, inside, keep, spread, SOFT, WEIGHTED)
        a = q / (rest + 1.0 + _beta_less_one(beta_less_one, classes, inside, PER_CLASS) * e)
        value = e * (of_others + of_largest) - a * (rest + 1.0)
        value = tl.where(classes == largest, of_others - of_largest * rest, value) * of_row
        value = tl.where(inside, value, 0.0)
        tl.store(out + classes, value.to(out.dtype.element_ty), mask=classes < num_classes)


class OfProbabilities:
    """The loss of class probabilities, or of class indices with label smoothing, of the rows of logits.

    It keeps what it is given but for the logits; of probabilities whose classes do not lie side by side, a copy.

    Args:
        logits: what `as_rows` made of them.
        target: probabilities in their shape, or class indices (N), int64.
        log_beta, weight: 0-dim or (C), and (C) or None.
    """

    def __init__(self, logits: Tensor, target: Tensor, log_beta: Tensor, weight: Tensor | None, label_smoothing: float):
        count, num_classes = logits.shape
        self.soft = target.dim() == 2
        if self.soft:
            target = target.contiguous()
        else:  # as in `row_numbers`
            self.of_target = logits.gather(1, target.unsqueeze(1)).squeeze(1)
        self.of_top = torch.empty(count, dtype=torch.int64, device=logits.device)
        self.numbers = torch.empty(7, count, dtype=torch.float32, device=logits.device)
        weighted, per_class = weight is not None, log_beta.dim() == 1
        beta_less_one = log_beta.expm1().float().contiguous()
        self.given = (
            target, target.stride(0), weight.float().contiguous() if weighted else beta_less_one, beta_less_one,
            1.0 - label_smoothing, label_smoothing / num_classes, self.of_top, self.numbers, count,
        )  # fmt: skip
        self.constants = {"SOFT": self.soft, "WEIGHTED": weighted, "PER_CLASS": per_class}
        _launch(_forward_probabilities, logits, *self.given, **self.constants)
        _, rest, self.q_of_top, _, of_others, _, _ = self.numbers.double()
        self.rest_and_beta = rest + (log_beta[self.of_top] if per_class else log_beta).exp()
        self.loss = of_others + self.q_of_top * self.rest_and_beta.log()

    def cross_entropy(self) -> Tensor:
        top, rest, _, _, _, all_given, given_behind = self.numbers.double()
        if self.soft:
            return all_given * rest.log1p() - given_behind
        return rest.log1p() - (self.of_target.double() - top)

    def write_gradient(self, logits: Tensor, grad: Tensor, out: Tensor) -> Tensor:
        """``out``, filled with the gradient times ``grad`` (N). It may be the logits themselves."""
        a_of_top = (self.q_of_top / self.rest_and_beta).float()
        own = (a_of_top, grad.float().contiguous(), out, out.stride(0))
        _launch(_backward_probabilities, logits, *self.given, *own, **self.constants)
        return out


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


def _launch(kernel, logits: Tensor, *args, **constants: bool) -> None:
    count, num_classes = logits.shape
    block = min(4096, triton.next_power_of_2(num_classes))
    warps = max(1, min(8, block // 512))  # 16 logits per thread
    with torch.cuda.device_of(logits):  # Triton would take the current device
        kernel[(count,)](logits, logits.stride(0), *args, num_classes, **constants, BLOCK=block, num_warps=warps)


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
        of_probabilities = OfProbabilities(logits, index, total[0].double(), None, 0.1)
        of_probabilities.write_gradient(logits, total, torch.empty_like(logits))
    except Exception as error:  # whatever a compiler and a driver raise
        reason = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"the gradient-decay loss runs without its Triton kernel: {type(error).__name__}: {reason[0]}", stacklevel=2
        )
        return False
    return True
