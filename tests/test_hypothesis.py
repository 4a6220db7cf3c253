"""Both forms of the loss on calls that nobody thought of: 20,000 of them against the fp64 reference and against torch.

What is drawn are the knobs of a call and a seed of its numbers, so that a failing call is reduced to simple knobs.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from reference import reference
from torch import Tensor

from gd_plugin import by_hand, gradient_decay_cross_entropy, linear, linear_gradient_decay_cross_entropy

EXAMPLES = 20_000
# The same examples wherever it runs, and none kept in a file. Deadlines would be those of a busy machine.
SAME = dict(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))

# How exact a number of this type must be, relative to the terms that it is the sum of.
EXACT = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
ROUNDING = 1e-12  # of the reference itself


pytestmark = pytest.mark.usefixtures("one_thread")


# Calls ----------------------------------------------------------------------------------------------------------------

# The knobs of a call and the values that each takes, the simplest first: of the logits, and of everything else.
LOGITS = {
    "form": ["logits", "linear"],
    "dtype": list(EXACT),
    "classes": [3, 1, 2, 5, 9],
    "rows": [2, 0, 1, 3, 7],
    "more": [(), None, (2,), (0,), (2, 2)],  # dimensions after (N, C); None: a lone sample, of shape (C)
    "scale": [1.0, 8.0, 64.0],
    "fill": [None, -math.inf, "min", "max", 1e4, 0.0],  # what some of them are
    "filled": [0.3, 0.7, 1.0],
    "layout": ["contiguous", "classes last", "strided", "expanded"],
    "width": [3, 0, 1],  # of a head's input
    "bias": [None, "bias", "some -inf"],
}
OTHERS = {
    "soft": [False, True],  # class probabilities
    "impossible": [False, True],  # some of them 0
    "target": [torch.int64, torch.int32],
    "ignore_index": [-100, -1, 0, "classes"],
    "ignored": [0.0, 0.3, 1.0],
    "weights": [None, "positive", "some 0"],
    "reduction": ["none", "sum", "mean"],
    "label_smoothing": [0.0, 0.1, 1.0],
    "beta": ["number", "tensor", "per class"],
    "log10_beta": sorted((tenth / 10 for tenth in range(-60, 61, 5)), key=abs),
    "at_once": [2**18, 4],  # logits that are worked on at once, in both forms
    "factor": [1.0, 0.25],  # of the gradient from above
}


def one_of_each(knobs: dict[str, list]) -> st.SearchStrategy[dict]:
    """A value of every knob in one draw, which is many times faster than a draw for each."""

    def values(number: int) -> dict:
        chosen = {}
        for name, choices in knobs.items():
            number, place = divmod(number, len(choices))
            chosen[name] = choices[place]
        return chosen

    count = math.prod(map(len, knobs.values()))
    assert count < 2**24  # up to there every number is as likely as any other
    return st.integers(0, count - 1).map(values)


class Call(NamedTuple):
    """What a loss is given. In the linear form, ``head`` is what the logits are made of."""

    logits: Tensor
    target: Tensor
    beta: float | Tensor
    knobs: dict
    head: tuple[Tensor, Tensor, Tensor | None] | None  # input, weight, bias
    at_once: int
    factor: float

    @property
    def soft(self) -> bool:
        return self.target.shape == self.logits.shape

    @property
    def dim(self) -> int:
        """That of the classes."""
        return min(1, self.logits.dim() - 1)


def build(of_logits: dict, others: dict, seed: int) -> Call:
    k, generator = of_logits | others | {"seed": seed}, torch.Generator().manual_seed(seed)
    classes, dtype = k["classes"], k["dtype"]
    if k["form"] == "linear":
        head = build_head(k, generator)
        logits, soft, shape = F.linear(*head), False, (k["rows"], classes)
    else:
        shape = (classes,) if k["more"] is None else (k["rows"], classes, *k["more"])
        head, logits, soft = None, build_logits(k, shape, generator), k["soft"]
    dim = min(1, len(shape) - 1)

    knobs = {name: k[name] for name in ("reduction", "label_smoothing")}
    if soft:
        target = torch.randn(shape, generator=generator).mul(3).softmax(dim)
        if k["impossible"]:
            target = target.masked_fill(target < 0.1, 0.0)
        target = target if k["target"] == torch.int64 else target.to(dtype)
    else:
        labels = shape[:dim] + shape[dim + 1 :]
        knobs["ignore_index"] = classes if k["ignore_index"] == "classes" else k["ignore_index"]
        target = torch.randint(classes, labels, generator=generator)
        ignored = torch.rand(labels, generator=generator) < k["ignored"]
        target = target.masked_fill(ignored, knobs["ignore_index"]).to(k["target"])
    if k["weights"]:
        weight = 3 * torch.rand(classes, generator=generator)
        knobs["weight"] = weight.masked_fill(weight < (k["weights"] == "some 0"), 0.0).to(dtype)

    beta = 10.0 ** k["log10_beta"]
    if k["beta"] == "tensor":
        beta = torch.tensor(beta)
    elif k["beta"] == "per class":
        beta = 10.0 ** (12 * torch.rand(classes, generator=generator, dtype=torch.float64) - 6)
    return Call(logits, target, beta, knobs, head, k["at_once"], k["factor"])


def build_logits(k: dict, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype, dim = k["dtype"], min(1, len(shape) - 1)
    logits = (k["scale"] * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    if k["fill"] is not None:  # of any class, the target's too
        filled = torch.rand(shape, generator=generator) < k["filled"]
        # But for one class: torch has no number for a row without a finite logit, and the lowest number of all is what
        # the loss puts in the place of a target.
        filled.select(dim, k["seed"] % shape[dim]).fill_(False)
        logits[filled] = getattr(torch.finfo(dtype), k["fill"]) if isinstance(k["fill"], str) else k["fill"]
    if k["layout"] == "strided":  # every second place in memory, with a NaN between
        return torch.stack([logits, torch.full_like(logits, math.nan)], -1)[..., 0]
    if k["layout"] == "classes last":
        return logits.movedim(dim, -1).contiguous().movedim(-1, dim)
    if k["layout"] == "expanded" and dim and len(logits):  # one row in memory
        return logits[:1].expand(shape)
    return logits


def build_head(k: dict, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of small whole numbers: their products and sums are exact in every type, whatever adds them up."""

    def whole(*size):
        return torch.randint(-3, 4, size, generator=generator).to(k["dtype"])

    input, weight, bias = whole(k["rows"], k["width"]), whole(k["classes"], k["width"]), whole(k["classes"])
    weight = weight if k["scale"] == 1 else 4 * weight
    if k["layout"] != "contiguous":
        weight = weight.t().contiguous().t()
    if k["bias"] == "some -inf":  # outputs that are switched off
        bias[1:][torch.rand(k["classes"] - 1, generator=generator) < 0.3] = -math.inf
    return input, weight, bias if k["bias"] else None


calls = st.builds(build, one_of_each(LOGITS), one_of_each(OTHERS), st.integers(0, 2**24 - 1))


# The property ---------------------------------------------------------------------------------------------------------


def with_gradients(loss_of, tensors, factor):
    """A loss, and the gradients of a sum over it in which every entry has a factor of its own."""
    tensors = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    loss = loss_of(*tensors)
    given = [tensor for tensor in tensors if tensor is not None]
    return loss.detach(), torch.autograd.grad(loss, given, factors(loss, factor))


def factors(loss: Tensor, factor: float) -> Tensor:
    if not loss.dim():
        return loss.new_tensor(factor)
    return torch.linspace(0.5 * factor, 1.5 * factor, loss.numel(), dtype=loss.dtype).reshape(loss.shape)


def exactly(call: Call) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The value, its gradient by the logits, and those by what the logits are made of, in fp64.

    Of logits without their largest one, which changes no loss and leaves fp64 more digits.
    """
    leaves = [call.logits] if call.head is None else [tensor for tensor in call.head if tensor is not None]
    leaves = [tensor.detach().double().requires_grad_() for tensor in leaves]
    logits = leaves[0] if call.head is None else F.linear(*leaves)
    assert torch.equal(logits, call.logits.double())  # the sums of a head are exact
    shifted = logits - logits.detach().amax(call.dim, keepdim=True) if logits.numel() else logits
    loss = reference(shifted, call.target, call.beta, **call.knobs)
    by_logits, *by_leaves = torch.autograd.grad(loss, [logits, *leaves], factors(loss, call.factor))
    return loss.detach(), by_logits, by_leaves


def torchs(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What F.cross_entropy makes of the same call."""
    target = call.target.to(call.logits.dtype) if call.soft else call.target.long()
    return with_gradients(
        lambda *given: F.cross_entropy(given[0] if call.head is None else F.linear(*given), target, **call.knobs),
        [call.logits] if call.head is None else call.head,
        call.factor,
    )


def holds(loss_of_logits, loss_of_head, call: Call) -> None:
    """No NaN where torch has none, and every finite number is that of the reference."""
    note(call)
    before = by_hand.BLOCK, linear._LOGITS_AT_ONCE
    by_hand.BLOCK = linear._LOGITS_AT_ONCE = call.at_once
    try:
        if call.head is None:
            loss, gradients = with_gradients(
                lambda logits: loss_of_logits(logits, call.target, call.beta, **call.knobs), [call.logits], call.factor
            )
        else:
            loss, gradients = with_gradients(
                lambda input, weight, bias: loss_of_head(input, weight, call.target, call.beta, bias, **call.knobs),
                call.head,
                call.factor,
            )
    finally:
        by_hand.BLOCK, linear._LOGITS_AT_ONCE = before

    expected, by_logits, by_leaves = exactly(call)
    assert (loss.shape, loss.dtype) == (expected.shape, torch.promote_types(call.logits.dtype, torch.float32))
    if any(got.isnan().any() for got in (loss, *gradients)):
        plain, plain_gradients = torchs(call)
        for got, theirs in zip((loss, *gradients), (plain, *plain_gradients), strict=True):
            assert not (got.isnan() & ~theirs.isnan()).any(), "NaN where F.cross_entropy has none"
        if not call.soft:  # 0 * inf: torch has no number for a class that does not count and cannot be
            expected = expected.masked_fill(plain.isnan(), math.nan)
    one = coefficient(call)
    hard = not call.soft and not call.knobs["label_smoothing"]
    # A loss can be wrong by what its target gap is, which counts by the slope; sums by their terms, which may cancel.
    log_beta = abs(math.log(call.beta)) if isinstance(call.beta, float) else call.beta.log().abs().max().item()
    if hard and call.knobs["reduction"] == "none":
        terms = expected.abs() + 2 / call.factor * by_logits.abs().amax(call.dim)
    else:
        terms = expected.abs() + max(1, call.target.numel()) * one * (1 + log_beta)
    close(loss, expected, EXACT[loss.dtype] * terms + ROUNDING * (1 + log_beta))
    infinite = expected.isinf()
    assert torch.equal(loss[infinite], expected[infinite].to(loss.dtype))
    if expected.isnan().any():
        return

    if call.head is None:
        size = torch.linalg.vector_norm(by_logits.nan_to_num(), dim=call.dim, keepdim=True)
        close_gradient(gradients[0], by_logits, size + (0 if hard else one), one)
    else:
        # Every entry is a sum of products: over the classes, or over the rows.
        size = len(call.logits) * (torch.linalg.vector_norm(by_logits.nan_to_num()) + (0 if hard else one))
        for got, wanted, other in zip(gradients, by_leaves, (*call.head[1::-1], torch.ones(1)), strict=False):
            other = 1 + torch.linalg.vector_norm(other.double()).item()
            close_gradient(got, wanted, other * size, other * one)


def coefficient(call: Call) -> float:
    """The most that a unit of a sample's loss counts in what gradients are taken of."""
    weight = call.knobs.get("weight", torch.ones(1)).double()
    largest = 1.5 * max(1.0, weight.max().item())
    if call.knobs["reduction"] != "mean":
        return largest
    classes = call.logits.shape[call.dim]
    if call.soft:
        return largest / max(1, call.target.numel() // classes)
    kept = call.target[call.target != call.knobs["ignore_index"]].long()
    return largest / (weight.expand(classes)[kept].sum().item() or 1.0)


def close_gradient(got: Tensor, expected: Tensor, size: Tensor, one: float) -> None:
    finfo = torch.finfo(got.dtype)
    subnormal = finfo.smallest_normal * finfo.eps * max(1, got.numel())  # a step of the smallest numbers
    close(got, expected, EXACT[got.dtype] * size + ROUNDING * one + subnormal * (1 + one))


def close(got: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """Within the tolerance where the reference is finite, and some weights' distance from the largest number."""
    finite = expected.abs() < torch.finfo(got.dtype).max / 1000
    right = ((got - expected).abs() <= tolerance) | ~finite
    assert right.all(), f"expected {expected}, got {got}"


def test_every_call_is_the_reference(figure):
    ran = Counter()

    @settings(max_examples=EXAMPLES, **SAME)
    @given(calls)
    def every(call):
        holds(gradient_decay_cross_entropy, linear_gradient_decay_cross_entropy, call)
        ran["linear" if call.head else "soft" if call.soft else "hard"] += 1
        ran[call.logits.dtype] += 1

    every()
    assert ran["linear"] + ran["soft"] + ran["hard"] >= EXAMPLES
    assert min(ran.values()) > EXAMPLES / 10, ran
    figure("examples of hypothesis", f"{EXAMPLES:,}")


# Wrong on purpose -----------------------------------------------------------------------------------------------------


def textbook(logits, target, beta, **knobs):
    """The same function, rounded where it hurts."""
    if target.shape == logits.shape or knobs["label_smoothing"] or isinstance(beta, Tensor):
        return gradient_decay_cross_entropy(logits, target, beta, **knobs)
    loss = F.cross_entropy(logits.float(), target.long(), reduction="none", ignore_index=knobs["ignore_index"])
    p = torch.exp(-loss)
    loss = (loss + torch.log(1 - p + beta * p)).to(torch.promote_types(logits.dtype, torch.float32))
    return loss if knobs["reduction"] == "none" and "weight" not in knobs else ours(logits, target, beta, **knobs)


def ours(logits, target, beta, **knobs):
    return gradient_decay_cross_entropy(logits, target, beta, **knobs)


def beta_of_the_others(logits, target, beta, **knobs):
    return ours(logits, target, 1 / beta, **knobs)


def smoothing_without_beta(logits, target, beta, **knobs):
    return ours(logits, target, 1.0 if knobs["label_smoothing"] else beta, **knobs)


def mean_over_ignored_rows(logits, target, beta, **knobs):
    loss = ours(logits, target, beta, **knobs)
    hard = "ignore_index" in knobs and knobs["reduction"] == "mean"
    return loss * (target != knobs["ignore_index"]).float().mean().to(loss.dtype) if hard else loss


def gradient_of_cross_entropy(logits, target, beta, **knobs):
    plain = ours(logits, target, 1.0, **knobs)
    return ours(logits, target, beta, **knobs).detach() + plain - plain.detach()


def rounded_to_half(logits, target, beta, **knobs):
    return ours(logits.half().to(logits.dtype), target, beta, **knobs)


WRONG = [
    textbook,
    beta_of_the_others,
    smoothing_without_beta,
    mean_over_ignored_rows,
    gradient_of_cross_entropy,
    rounded_to_half,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_formula_is_found(wrong):
    """By the same property, in a fraction of the examples, and not for failing to run."""

    @settings(max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False, **SAME)
    @given(calls)
    def every(call):
        holds(wrong, lambda x, w, target, beta, b=None, **knobs: wrong(F.linear(x, w, b), target, beta, **knobs), call)

    with pytest.raises(AssertionError):
        every()


def test_the_way_from_the_logits_passes_for_both_forms():
    """Control of the control: with the right formula it holds."""

    @settings(max_examples=500, **SAME)
    @given(calls)
    def every(call):
        holds(ours, lambda x, w, target, beta, b=None, **knobs: ours(F.linear(x, w, b), target, beta, **knobs), call)

    every()
