"""The loss against torch, against two independent references, and through every transformation torch offers."""

import functools
import itertools
import math
import re
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact, reference, relative_error
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from gd_plugin import by_hand, composed, gradient_decay_cross_entropy

NUM_CLASSES = 5
SHAPES = [(5,), (6, 5), (4, 5, 3), (2, 5, 3, 2)]
REDUCTIONS = ["none", "sum", "mean"]
PER_CLASS = torch.tensor([0.01, 0.3, 1.0, 7.0, 200.0], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0], dtype=torch.float64)
NEG_INF = -math.inf


pytestmark = pytest.mark.usefixtures("one_thread")


def make(shape, *, soft=False, seed=0, scale=3.0, dtype=torch.float64):
    """Logits and a target for them; over class indices every class occurs, and the first is 1."""
    generator = torch.Generator().manual_seed(seed)
    dim = 0 if len(shape) == 1 else 1
    logits = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    if soft:
        return logits.to(dtype), torch.randn(shape, generator=generator, dtype=torch.float64).softmax(dim).to(dtype)
    labels = shape[:dim] + shape[dim + 1 :]
    target = (torch.arange(math.prod(labels)) * 3 + 1) % shape[dim]
    return logits.to(dtype), target.reshape(labels)


def value_and_grad(function, logits, *args, **kwargs):
    """The loss and the gradient of a sum over it in which every sample has its own factor."""
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, *args, **kwargs)
    factors = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    (grad,) = torch.autograd.grad((loss * factors).sum(), logits)
    return loss.detach(), grad


def distance(pair, other):
    return max(relative_error(a.flatten(), b.flatten()).item() for a, b in zip(pair, other, strict=True))


# ---------------------------------------------------------------------------------- every combination of arguments


class Case(NamedTuple):
    shape: tuple[int, ...]
    soft: bool
    weighted: bool
    ignore_index: int | None  # None: -100, which no target has
    reduction: str
    label_smoothing: float
    dtype: torch.dtype

    def __str__(self):
        kind = "soft" if self.soft else "index"
        weight = "weight" if self.weighted else "plain"
        return f"{self.shape}-{kind}-{weight}-{self.ignore_index}-{self.reduction}-{self.label_smoothing}-{self.dtype}"

    def build(self):
        logits, target = make(self.shape, soft=self.soft, dtype=self.dtype)
        kwargs = {"reduction": self.reduction, "label_smoothing": self.label_smoothing}
        if self.weighted:
            kwargs["weight"] = WEIGHT.to(self.dtype)
        if self.ignore_index is not None:
            kwargs["ignore_index"] = self.ignore_index
            if self.ignore_index < 0:  # class 2 is there already
                target.view(-1)[1::4] = self.ignore_index
        return logits, target, kwargs

    @property
    def tolerance(self):
        return 1e-6 if self.dtype == torch.float32 else 1e-10


CASES = [
    Case(*values)
    for values in itertools.product(
        SHAPES,
        [False, True],
        [False, True],
        [None, -100, 2],
        REDUCTIONS,
        [0.0, 0.1],
        [torch.float32, torch.float64],
    )
    if not (values[1] and values[3])  # ignore_index is for class indices
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beta_1_is_cross_entropy(case):
    logits, target, kwargs = case.build()
    expected = value_and_grad(F.cross_entropy, logits, target, **kwargs)
    got = value_and_grad(gradient_decay_cross_entropy, logits, target, **kwargs)
    assert (got[0].shape, got[0].dtype, got[1].dtype) == (expected[0].shape, expected[0].dtype, expected[1].dtype)
    assert distance(got, expected) <= case.tolerance
    other = value_and_grad(gradient_decay_cross_entropy, logits, target, 1.5, **kwargs)
    assert distance(other, expected) > 100 * case.tolerance


@pytest.mark.parametrize("beta", [0.02, torch.tensor(30.0), PER_CLASS], ids=["float", "tensor", "per_class"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_beta_is_the_definition(case, beta):
    logits, target, kwargs = case.build()
    expected = value_and_grad(reference, logits.double(), target, beta, **kwargs)
    got = value_and_grad(gradient_decay_cross_entropy, logits, target, beta, **kwargs)
    assert distance(got, expected) <= case.tolerance
    plain = value_and_grad(F.cross_entropy, logits, target, **kwargs)
    assert distance(plain, expected) > 100 * case.tolerance


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_return_cross_entropy(shape, reduction, label_smoothing, soft):
    logits, target = make(shape, soft=soft)
    if not soft:
        target.view(-1)[1::4] = -1
    logits.requires_grad_()
    loss, plain = gradient_decay_cross_entropy(
        logits, target, 0.1, WEIGHT, -1, reduction, label_smoothing, return_cross_entropy=True
    )
    torch.testing.assert_close(plain, F.cross_entropy(logits, target, ignore_index=-1, reduction=reduction).detach())
    assert loss.requires_grad and not plain.requires_grad
    assert not torch.allclose(loss, plain)
    alone = gradient_decay_cross_entropy(logits, target, 0.1, WEIGHT, -1, reduction, label_smoothing)
    assert torch.equal(loss, alone)


# ------------------------------------------------------------------------------------------------------- exactness

BETAS = [10.0**power for power in range(-6, 7)]
SCALES = [1.0, 10.0, 100.0, 1e3, 1e4]
HARD_SCENARIOS = ["random", "masked", "target ahead", "target behind", "u near log beta"]
SCENARIOS = [*HARD_SCENARIOS, "soft target", "label smoothing"]
BOUND = 1e-6


def textbook(logits, target, beta, label_smoothing=0.0):
    """CE + log(1 - p + beta p) with p from the cross-entropy: the same function, rounded where it hurts."""
    if target.dim() == 1 and not label_smoothing:
        loss = F.cross_entropy(logits, target, reduction="none")
        return loss + torch.log(1 - torch.exp(-loss) + beta * torch.exp(-loss))
    losses = -F.log_softmax(logits, 1)
    losses = losses + torch.log(1 - torch.exp(-losses) + beta * torch.exp(-losses))
    probabilities = probabilities_of(target, logits.shape[1], label_smoothing).to(logits.dtype)
    return (probabilities * losses.masked_fill(probabilities == 0, 0.0)).sum(1)


def probabilities_of(target, num_classes, label_smoothing):
    if target.dim() == 1:
        target = F.one_hot(target, num_classes)
    return (1 - label_smoothing) * target.double() + label_smoothing / num_classes


@functools.cache
def scenario_rows(scenario, scale, beta, num_rows=8, num_classes=10):
    """(fp32 logits within 1e4, target, label smoothing): the difficulties that the logits of a run can hold."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.empty(num_rows, num_classes).uniform_(-scale, scale, generator=generator)
    target = torch.randint(num_classes, (num_rows,), generator=generator)
    index = target.unsqueeze(1)
    if scenario in ("soft target", "label smoothing"):
        if scenario == "label smoothing":
            return logits, target, 0.1
        probabilities = (3 * torch.randn(num_rows, num_classes, generator=generator)).softmax(1)
        # Two classes that no target can have and no model predicts, as in a masked output head.
        absent = torch.tensor([0, 5])
        probabilities = probabilities.index_fill(1, absent, 0.0)
        return logits.index_fill(1, absent, NEG_INF), probabilities / probabilities.sum(1, keepdim=True), 0.0
    if scenario != "random":
        drop = torch.rand(num_rows, num_classes, generator=generator) < 0.3
        logits = logits.masked_fill(drop.scatter(1, index, False), NEG_INF)
    others = logits.double().scatter(1, index, NEG_INF)
    margin = torch.tensor([0.5, 2, 5, 10, 20, 40, 60, 80], dtype=torch.float64)
    if scenario == "target ahead":
        new = others.amax(1) + margin
    elif scenario == "target behind":
        new = others.logsumexp(1) - margin
    elif scenario == "u near log beta":
        new = others.logsumexp(1) - math.log(beta) + torch.linspace(-0.5, 0.5, num_rows, dtype=torch.float64)
    else:
        return logits, target, 0.0
    new = new.clamp(-1e4, 1e4).float()
    return logits.scatter(1, index, new.unsqueeze(1)), target, 0.0


@functools.cache
def exact_rows(scenario, scale, beta):
    logits, target, label_smoothing = scenario_rows(scenario, scale, beta)
    num_classes = logits.shape[1]
    probabilities = probabilities_of(target, num_classes, label_smoothing).tolist()
    rows = [exact(z, q, [beta] * num_classes) for z, q in zip(logits.tolist(), probabilities, strict=True)]
    values, gradients = zip(*rows, strict=True)
    return torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64)


def ours(logits, target, beta, label_smoothing=0.0):
    return gradient_decay_cross_entropy(logits, target, beta, reduction="none", label_smoothing=label_smoothing)


@functools.cache
def largest_errors(route, scenario, beta):
    """Largest relative error of (value, gradient) in fp32, each row against its own norm, over all logit scales."""
    worst = [0.0, 0.0]
    for scale in SCALES:
        logits, target, label_smoothing = scenario_rows(scenario, scale, beta)
        values, gradients = exact_rows(scenario, scale, beta)
        logits = logits.clone().requires_grad_()
        loss = route(logits, target, beta, label_smoothing)
        loss.sum().backward()
        errors = relative_error(loss.detach().unsqueeze(1), values.unsqueeze(1)), relative_error(logits.grad, gradients)
        worst = [max(w, e.max().item()) for w, e in zip(worst, errors, strict=True)]
    return tuple(worst)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_fp32_is_exact(scenario, beta):
    value, gradient = largest_errors(ours, scenario, beta)
    assert value <= BOUND
    assert gradient <= BOUND


@pytest.mark.parametrize("beta", BETAS)
def test_the_textbook_route_is_not(beta):
    # Control of the test above: the same rows, the same bound.
    errors = {scenario: largest_errors(textbook, scenario, beta) for scenario in HARD_SCENARIOS}
    assert errors["target ahead"][1] > 0.5  # p rounds to 1: no gradient at all
    if beta <= 1e-2:
        assert errors["u near log beta"][0] > BOUND and errors["u near log beta"][1] > BOUND


@pytest.mark.parametrize("beta", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_single_row_batches(scenario, beta):
    for scale in SCALES:
        logits, target, label_smoothing = scenario_rows(scenario, scale, beta)
        values, gradients = exact_rows(scenario, scale, beta)
        for i in range(len(logits)):
            row = logits[i : i + 1].clone().requires_grad_()
            loss = gradient_decay_cross_entropy(row, target[i : i + 1], beta, label_smoothing=label_smoothing)
            loss.backward()
            assert relative_error(loss.detach(), values[i]) <= BOUND
            assert relative_error(row.grad[0], gradients[i]) <= BOUND


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 0.5, 0.9])
def test_value_where_it_changes_sign(beta):
    # exp(u) = 1 - beta: the loss crosses 0, where only its absolute error can be bounded.
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(50, 10, generator=generator)
    logits[:, 0] = (logits[:, 1:].double().logsumexp(1) - math.log1p(-beta)).float()
    target = torch.zeros(50, dtype=torch.int64)
    loss = ours(logits, target, beta)
    expected = reference(logits, target, beta, reduction="none")
    assert expected.abs().max() < 1e-5
    assert (loss - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps
    assert F.cross_entropy(logits, target, reduction="none").min() > 0.05


@pytest.mark.parametrize("beta", [1e-3, 1e3])
def test_vocabulary_sized_row(beta):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(1, 50_257, generator=generator)
    logits[0, 123] = 30.0
    one_hot = [0] * 50_257
    one_hot[123] = 1
    value, gradient = exact(logits[0].tolist(), one_hot, [beta] * 50_257)
    got = value_and_grad(ours, logits, torch.tensor([123]), beta)
    # `value_and_grad` gives a lone sample the factor 0.5.
    assert relative_error(got[0], torch.tensor([value], dtype=torch.float64)) <= BOUND
    assert relative_error(got[1][0], 0.5 * torch.tensor(gradient, dtype=torch.float64)) <= BOUND


@pytest.mark.parametrize("soft", [False, True])
def test_the_two_references_agree(soft):
    logits, target = make((6, 5), soft=soft, scale=1.0)
    loss, grad = value_and_grad(reference, logits, target, PER_CLASS, reduction="sum")
    probabilities = probabilities_of(target, 5, 0.0).tolist()
    rows = [exact(z, q, PER_CLASS.tolist()) for z, q in zip(logits.tolist(), probabilities, strict=True)]
    values, gradients = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    assert relative_error(loss, values.sum()) <= 1e-13
    assert relative_error(grad, 0.5 * gradients).max() <= 1e-13
    assert relative_error(loss, reference(logits, target, 1.0, reduction="sum")) > 1e-2


def test_relative_error_sees_what_a_maximum_would_hide():
    expected = torch.tensor([[3.0, 4.0], [1e-30, 0.0], [1.0, 1.0], [1e-40, 0.0]])
    got = torch.tensor([[3.0, 4.5], [2e-30, 0.0], [math.nan, 1.0], [0.0, 0.0]])
    assert relative_error(got, expected).tolist() == pytest.approx([0.1, 1.0, math.inf, 0.0])


# ------------------------------------------------------------------------------------------------------ properties


@st.composite
def calls(draw):
    num_classes = draw(st.sampled_from([1, 2, 3, 7, 123, 252, 507]))
    small = num_classes <= 7  # the reference takes C numbers per logit
    batch = draw(st.sampled_from([None, 0, 1, 2, 3, *([5, 123, 252] if small else [])]))
    extra = draw(st.sampled_from([(), (), (1,), (3,), (2, 2), (0,)])) if small and batch is not None else ()
    shape = (num_classes,) if batch is None else (batch, num_classes, *extra)
    dim = 0 if batch is None else 1
    soft = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    layout = draw(st.sampled_from(["contiguous", "classes last", "strided", "expanded"]))
    scale = draw(st.sampled_from([0.1, 3.0, 30.0]))
    logits = (scale * randn(*shape)).to(dtype)
    if layout == "classes last":
        logits = logits.movedim(dim, -1).contiguous().movedim(-1, dim)
    elif layout == "strided":
        logits = logits.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    elif layout == "expanded" and batch:
        logits = logits[:1].expand(shape)

    ignore_index = -100
    if soft:
        target = randn(*shape).softmax(dim).to(draw(st.sampled_from([torch.float32, dtype])))
    else:
        labels = shape[:dim] + shape[dim + 1 :]
        target = torch.randint(num_classes, labels, generator=generator)
        ignore_index = draw(st.sampled_from([-100, -1, 0, num_classes]))
        target = target.masked_fill(
            torch.rand(labels, generator=generator) < draw(st.sampled_from([0, 0.3])), ignore_index
        )
    beta = draw(st.floats(1e-6, 1e6).filter(lambda b: b > 0))
    kind = draw(st.sampled_from(["float", "tensor", "per class"]))
    if kind == "tensor":
        beta = torch.tensor(beta, dtype=torch.float64)
    elif kind == "per class":
        beta = (3 * randn(num_classes)).exp()
    kwargs = {
        "weight": draw(st.sampled_from([None, randn(num_classes).abs().to(dtype)])),
        "ignore_index": ignore_index,
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    return logits, target, beta, kwargs


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(calls())
def test_random_calls_are_the_definition(call):
    logits, target, beta, kwargs = call
    before = logits.clone(), target.clone()
    logits.requires_grad_()
    loss = gradient_decay_cross_entropy(logits, target, beta, **kwargs)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(logits, before[0]) and torch.equal(target, before[1])
    assert grad.dtype == logits.dtype and grad.shape == logits.shape

    twin = logits.detach().double().requires_grad_()
    expected = reference(twin, target, beta, **kwargs)
    (expected_grad,) = torch.autograd.grad(expected.sum(), twin)
    assert loss.shape == expected.shape
    # The floors: the terms of a loss, of order log(beta), or of a soft target's gradient, of order 1, may cancel.
    rows = logits.numel() // logits.shape[min(1, logits.dim() - 1)]
    terms = rows**-0.5 if kwargs["reduction"] == "mean" and rows else rows**0.5
    hard = target.dim() < logits.dim() and not kwargs["label_smoothing"]
    for got, wanted, floor in (
        (loss.detach(), expected.detach(), terms * (1 + torch.as_tensor(beta).log().abs().max().item())),
        (grad, expected_grad, 1e-4 if hard else terms),
    ):
        assert torch.equal(got.isnan(), wanted.isnan())  # a mean over nothing, as in torch
        relative = {torch.float64: 1e-10, torch.float32: BOUND}.get(got.dtype, torch.finfo(got.dtype).eps)
        error = torch.linalg.vector_norm((got.double() - wanted).nan_to_num())
        size = torch.linalg.vector_norm(wanted.nan_to_num())
        finfo = torch.finfo(got.dtype)
        quantum = finfo.smallest_normal * finfo.eps * got.numel() ** 0.5  # small gradients are subnormal in fp16
        assert error <= relative * (size + floor) + quantum, (kwargs, beta, logits.dtype, target.dtype)


@pytest.mark.parametrize("soft", [False, True])
def test_layout_does_not_matter(soft):
    logits, target = make((4, 5, 3), soft=soft)
    contiguous = value_and_grad(gradient_decay_cross_entropy, logits, target, 0.1)
    strided = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    assert not strided.is_contiguous()
    assert distance(value_and_grad(gradient_decay_cross_entropy, strided, target, 0.1), contiguous) <= 1e-15
    # Control: the classes of a tensor with the wrong strides are other classes.
    wrong = strided.movedim(1, -1).reshape(4, 5, 3)
    assert distance(value_and_grad(gradient_decay_cross_entropy, wrong, target, 0.1), contiguous) > 1e-2


# ----------------------------------------------------------------------------------------------------- derivatives

VARIANTS = {
    "index": (False, {}),
    "ignored": (False, {"ignore_index": 1}),
    "weighted": (False, {"weight": WEIGHT}),
    "smoothed": (False, {"label_smoothing": 0.2}),
    "smoothed weighted": (False, {"label_smoothing": 0.2, "weight": WEIGHT}),
    "soft": (True, {}),
    "soft weighted": (True, {"weight": WEIGHT}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def variant_call(variant, **more):
    soft, kwargs = VARIANTS[variant]
    logits, target = make((3, 5), soft=soft)
    return logits, target, functools.partial(gradient_decay_cross_entropy, **kwargs, **more)


@pytest.mark.parametrize("beta", [0.05, 20.0, PER_CLASS], ids=["small", "large", "per_class"])
@variants
def test_first_and_second_derivatives(variant, beta):
    logits, target, loss = variant_call(variant, reduction="none")
    logits.requires_grad_()
    beta = torch.as_tensor(beta, dtype=torch.float64).clone().requires_grad_()
    assert gradcheck(lambda z, b: loss(z, target, b), (logits, beta))
    assert gradgradcheck(lambda z, b: loss(z, target, b), (logits, beta))


def test_derivatives_with_respect_to_soft_targets():
    logits, target = make((3, 5), soft=True)
    inputs = logits.requires_grad_(), target.requires_grad_()
    assert gradcheck(lambda z, q: gradient_decay_cross_entropy(z, q, 0.1), inputs)
    assert gradgradcheck(lambda z, q: gradient_decay_cross_entropy(z, q, 0.1), inputs)


def test_derivative_with_respect_to_a_zero_probability_is_that_of_cross_entropy():
    logits, _ = make((3, 5))
    target = torch.eye(5, dtype=torch.float64)[[0, 3, 4]].requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), target)
    (got,) = torch.autograd.grad(gradient_decay_cross_entropy(logits, target), target)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("lead", [-2000.0, -800.0, -60.0, 0.0, 60.0, 800.0, 2000.0])
@pytest.mark.parametrize("beta", [1e-6, 1.0, 1e6])
def test_hessian_vector_product_at_any_gap(lead, beta):
    logits, target = make((1, 5))
    logits = logits.scatter(1, target.unsqueeze(1), lead)
    vector = torch.tensor([[0.3, -1.0, 0.7, 0.2, -0.4]], dtype=torch.float64)

    def grad(z):
        z = z.detach().clone().requires_grad_()
        return z, torch.autograd.grad(gradient_decay_cross_entropy(z, target, beta), z, create_graph=True)[0]

    z, first = grad(logits)
    (product,) = torch.autograd.grad((first * vector).sum(), z)
    step = 1e-5
    numeric = (grad(logits + step * vector)[1] - grad(logits - step * vector)[1]) / (2 * step)
    assert product.isfinite().all()
    torch.testing.assert_close(product, numeric.detach(), rtol=1e-6, atol=1e-9)


def test_a_gap_beyond_709_is_where_logaddexp_overflows():
    # Control of the test above: the second derivative of the same formula in torch.logaddexp is not finite there.
    gap = torch.tensor(-800.0, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(torch.logaddexp(gap, torch.zeros_like(gap)), gap, create_graph=True)
    assert not torch.autograd.grad(first, gap)[0].isfinite()


@variants
def test_func_grad_and_hessian(variant):
    logits, target, loss = variant_call(variant)
    _, kwargs = VARIANTS[variant]
    got = torch.func.grad(loss)(logits, target, 0.1)
    slow = functools.partial(reference, **kwargs)
    expected = torch.func.grad(slow)(logits, target, 0.1)
    torch.testing.assert_close(got, expected)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(logits, target, 0.1)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda z: slow(z, target, 0.1), logits))
    assert not torch.allclose(hessian, torch.autograd.functional.hessian(lambda z: slow(z, target, 1.0), logits))


@variants
def test_per_sample_gradients(variant):
    logits, target, loss = variant_call(variant, reduction="sum")
    beta = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    got = torch.func.vmap(torch.func.grad(loss))(logits, target, beta)  # a beta per sample as well
    expected = torch.stack([torch.func.grad(loss)(*row) for row in zip(logits, target, beta, strict=True)])
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, torch.func.vmap(torch.func.grad(loss))(logits, target, beta.flip(0)))


@variants
def test_per_sample_gradients_with_a_beta_per_class(variant):
    logits, target, loss = variant_call(variant, reduction="sum", beta=PER_CLASS)
    got = torch.func.vmap(torch.func.grad(loss))(logits, target)
    torch.testing.assert_close(
        got, torch.stack([torch.func.grad(loss)(*row) for row in zip(logits, target, strict=True)])
    )
    assert not torch.allclose(got, torch.func.vmap(torch.func.grad(loss))(logits, target, beta=PER_CLASS.flip(0)))


@variants
def test_backward_twice_gives_the_same_gradient(variant):
    logits, target, loss = variant_call(variant)
    value = loss(logits.requires_grad_(), target, 0.1)
    first, second = (torch.autograd.grad(value, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):  # without retain_graph torch says so
        once = loss(logits, target, 0.1)
        once.backward()
        once.backward()


@variants
def test_inputs_are_left_alone(variant):
    logits, target, loss = variant_call(variant)
    beta = PER_CLASS.clone()
    kept = [x.clone() for x in (logits, target, beta, WEIGHT)]
    for requires_grad in (False, True):
        loss(logits.requires_grad_(requires_grad), target, beta)
        assert all(map(torch.equal, (logits, target, beta, WEIGHT), kept))


# --------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("variant", ["index", "weighted", "smoothed", "soft"])
def test_one_graph_for_every_value_of_a_tensor_beta(variant):
    logits, target, loss = variant_call(variant)
    counter = CompileCounterWithBackend("aot_eager")  # traces the backward as well
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for beta in (1e-6, 0.1, 1.0, 7.0, 1e6):
        beta = torch.tensor(beta)
        got = value_and_grad(compiled, logits, target, beta)
        assert distance(got, value_and_grad(loss, logits, target, beta)) <= 1e-12
    assert counter.frame_count == 1


def test_a_float_beta_is_compiled_anew():
    # Control of the test above: the counter does count.
    logits, target, loss = variant_call("index")
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for beta in (0.1, 1.0, 7.0):
        compiled(logits, target, beta)
    assert counter.frame_count > 1


# ------------------------------------------------------------------------------------------------------- precision

HALF = [torch.float16, torch.bfloat16]
half = pytest.mark.parametrize("dtype", HALF, ids=str)


@half
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_half_inputs_give_what_cross_entropy_gives_under_autocast(reduction, soft, dtype):
    logits, target = make((6, 5), soft=soft, dtype=dtype)
    kwargs = {"reduction": reduction, "weight": WEIGHT.to(dtype), "label_smoothing": 0.1}
    with torch.autocast("cpu", dtype=dtype):
        expected = value_and_grad(F.cross_entropy, logits, target, **kwargs)
        inside = value_and_grad(gradient_decay_cross_entropy, logits, target, **kwargs)
    outside = value_and_grad(gradient_decay_cross_entropy, logits, target, **kwargs)
    assert expected[0].dtype == torch.float32  # F.cross_entropy outside autocast would answer in half
    for got in (inside, outside):
        assert [x.dtype for x in got] == [x.dtype for x in expected]
        assert relative_error(got[0], expected[0]) <= BOUND
        assert relative_error(got[1].flatten(), expected[1].flatten()) <= torch.finfo(dtype).eps


@half
@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0, 10.0, 1e3])
def test_half_inputs_lose_nothing_more(beta, dtype):
    logits, target = make((40, 10), scale=6.0, dtype=dtype)
    expected = value_and_grad(reference, logits.double(), target, beta, reduction="none")
    got = value_and_grad(ours, logits, target, beta)
    naive = value_and_grad(textbook, logits, target, beta)
    for mine, theirs, wanted, tolerance in zip(got, naive, expected, (1e-6, torch.finfo(dtype).eps), strict=True):
        error, naive_error = (x.double() - wanted for x in (mine, theirs))
        assert (error.abs() <= naive_error.abs() + tolerance * wanted.abs() + torch.finfo(torch.float16).tiny).all()
        # Control: the rule says something, since the naive route in half is worse.
        assert naive_error.norm() > 1.2 * error.norm()


@half
def test_a_model_under_autocast(dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 5)
    features, target = torch.randn(16, 8), torch.randint(5, (16,))
    with torch.autocast("cpu", dtype=dtype):
        logits = model(features)
        loss = gradient_decay_cross_entropy(logits, target, 0.1)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    loss.backward()
    assert model.weight.grad.dtype == torch.float32
    assert relative_error(loss.detach(), reference(logits.detach(), target, 0.1)) <= BOUND


# ---------------------------------------------------------------------------------------------------------- errors

Z, Y, Q = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64), torch.full((4, 5), 0.2)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((Z.long(), Y), {}, "input must hold floating-point logits, got torch.int64"),
        ((torch.tensor(1.0), Y), {}, "input must have shape (C), (N, C) or (N, C, d1, ...) with C >= 1, got ()"),
        ((Z[:, :0], Y), {}, "input must have shape (C), (N, C) or (N, C, d1, ...) with C >= 1, got (4, 0)"),
        (
            (Z, Q.long()),
            {},
            "target has the shape of input, (4, 5), so it must hold class probabilities, got torch.int64; class "
            "indices leave the class dimension out",
        ),
        ((Z, Q), {"ignore_index": 0}, "ignore_index is for class indices, got 0 with class probabilities"),
        (
            (Z, Y[:3]),
            {},
            "target must have shape (4,) (class indices) or (4, 5) (class probabilities) for input of shape (4, 5), "
            "got (3,)",
        ),
        (
            (Z[0], Y[:2]),
            {},
            "target must have shape () (class indices) or (5,) (class probabilities) for input of shape (5,), got (2,)",
        ),
        ((Z, Y.float()), {}, "target must hold integer class indices, got torch.float32"),
        ((Z, Y.bool()), {}, "target must hold integer class indices, got torch.bool"),
        ((Z, Y.cfloat()), {}, "target must hold integer class indices, got torch.complex64"),
        *(
            ((Z, Y, b), {}, f"beta must be positive and finite, got {b}; 1 is cross-entropy")
            for b in (0, -1.0, math.nan, math.inf)
        ),
        *(
            ((Z, Y, torch.ones(s)), {}, f"beta must be a scalar or have one value per class (5), got torch.Size({s})")
            for s in ([4], [1], [1, 5])
        ),
        ((Z, Y), {"weight": torch.ones(4)}, "weight must have one value per class, shape (5,), got (4,)"),
        ((Z, Y), {"reduction": "avg"}, "reduction must be 'none', 'sum' or 'mean', got 'avg'"),
        *(
            ((Z, Y), {"label_smoothing": s}, f"label_smoothing must be in [0, 1], got {s}")
            for s in (-0.1, 1.5, math.nan)
        ),
    ],
)
def test_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gradient_decay_cross_entropy(*args, **kwargs)


@pytest.mark.parametrize("label", [5, -1, -99])
@pytest.mark.parametrize("kwargs", [{}, {"weight": torch.ones(5)}, {"label_smoothing": 0.1}, {"beta": PER_CLASS}])
def test_labels_out_of_range(label, kwargs):
    target = torch.tensor([0, 1, label, 2])
    with pytest.raises(RuntimeError, match="out of bounds"):
        gradient_decay_cross_entropy(Z, target, **kwargs)
    assert gradient_decay_cross_entropy(Z, target, **kwargs, ignore_index=label).isfinite()


# -------------------------------------------------------------------------------------------------- degenerate rows


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    "logits", [[[2.0]], [[2.0, NEG_INF, NEG_INF]], [[-1e4, NEG_INF, NEG_INF]]], ids=["C=1", "alone", "alone, low"]
)
def test_a_target_without_rivals(logits, beta):
    z = torch.tensor(logits, requires_grad=True)
    loss = gradient_decay_cross_entropy(z, torch.tensor([0]), beta)
    assert loss.item() == pytest.approx(math.log(beta), rel=1e-6, abs=0)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    assert torch.equal(grad, torch.zeros_like(grad))
    assert torch.equal(torch.autograd.grad(grad.sum(), z)[0], torch.zeros_like(grad))


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3])
def test_a_target_that_is_masked_out(beta):
    # Impossible by the logits: the loss is infinite for every beta, the gradient that of cross-entropy.
    z = torch.tensor([[NEG_INF, 1.0, 2.0]], requires_grad=True)
    expected = value_and_grad(F.cross_entropy, z, torch.tensor([0]))
    got = value_and_grad(gradient_decay_cross_entropy, z, torch.tensor([0]), beta)
    assert got[0] == expected[0] == math.inf
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_integer_types_of_the_target(dtype):
    logits, target = make((6, 5))
    expected = value_and_grad(gradient_decay_cross_entropy, logits, target, 0.1, ignore_index=2)
    got = value_and_grad(gradient_decay_cross_entropy, logits, target.to(dtype), 0.1, ignore_index=2)
    assert all(map(torch.equal, got, expected))
    assert not torch.equal(got[0], gradient_decay_cross_entropy(logits, target, 0.1))


@pytest.mark.parametrize(("label", "ignore_index"), [(156, -100), (3, 259)])
def test_ignore_index_does_not_wrap_around_in_uint8(label, ignore_index):
    # 256 - 100 = 156 is a class like any other.
    logits, _ = make((2, 200))
    target = torch.tensor([label, 7], dtype=torch.uint8)
    expected = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    got = gradient_decay_cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_lone_sample_with_a_target_of_shape_1(reduction):
    logits, target = make((5,))
    expected = F.cross_entropy(logits, target.reshape(1), reduction=reduction)
    got = gradient_decay_cross_entropy(logits, target.reshape(1), reduction=reduction)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, gradient_decay_cross_entropy(logits, target + 1, reduction=reduction))


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_a_class_of_probability_zero_and_logit_minus_infinity(beta):
    z = torch.tensor([[1.0, 0.5, NEG_INF, -1.0]], requires_grad=True)
    q = torch.tensor([[0.6, 0.3, 0.0, 0.1]])
    kept = [0, 1, 3]
    assert F.cross_entropy(z, q).isnan()  # torch: 0 * inf
    loss, grad = value_and_grad(gradient_decay_cross_entropy, z, q, beta)
    expected, expected_grad = value_and_grad(reference, z[:, kept], q[:, kept], beta)
    assert relative_error(loss, expected) <= BOUND
    assert relative_error(grad[:, kept], expected_grad) <= BOUND
    assert grad[0, 2] == 0
    q = torch.tensor([[0.6, 0.3, 0.1, 0.0]])  # control: a probability there costs infinitely much
    assert gradient_decay_cross_entropy(z, q, beta) == math.inf == F.cross_entropy(z, q + 1e-9)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_everything_ignored(reduction, label_smoothing):
    kwargs = {"reduction": reduction, "label_smoothing": label_smoothing}
    logits, target = make((4, 5))[0], torch.full((4,), -100)
    expected, expected_grad = value_and_grad(F.cross_entropy, logits, target, **kwargs)
    got, grad = value_and_grad(gradient_decay_cross_entropy, logits, target, 0.1, **kwargs)
    assert torch.equal(got.isnan(), expected.isnan()) and got.isnan().any() == (reduction == "mean")
    assert torch.equal(got.nan_to_num(), torch.zeros_like(got))
    assert torch.equal(grad, torch.zeros_like(grad))
    # torch's own mean with smoothing has a NaN gradient here; without, both are zero.
    assert torch.equal(expected_grad.nan_to_num(), grad)


@pytest.mark.parametrize("fill", [NEG_INF, math.inf, math.nan, 1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_an_ignored_row_is_at_least_as_harmless_as_in_torch(fill, label_smoothing):
    logits, _ = make((3, 5))
    logits[1] = fill
    target = torch.tensor([1, -100, 2])
    kwargs = {"label_smoothing": label_smoothing}
    expected, expected_grad = value_and_grad(F.cross_entropy, logits, target, **kwargs)
    got, grad = value_and_grad(gradient_decay_cross_entropy, logits, target, **kwargs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grad[[0, 2]], expected_grad[[0, 2]])
    finite = expected_grad[1].isfinite()
    assert torch.equal(grad[1][finite], torch.zeros_like(grad[1][finite]))
    assert not torch.allclose(got, gradient_decay_cross_entropy(logits[[0, 2]], target[[0, 2]], 2.0, **kwargs))


@pytest.mark.parametrize("column", range(5))
def test_an_ignored_row_with_a_masked_class_has_no_gradient(column):
    logits, _ = make((3, 5))
    logits[1, column] = NEG_INF
    grad = value_and_grad(gradient_decay_cross_entropy, logits, torch.tensor([1, -100, 2]), 0.1)[1]
    assert torch.equal(grad[1], torch.zeros(5, dtype=grad.dtype))
    assert grad[[0, 2]].abs().min() > 0


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0)])
def test_empty_batches(shape, reduction, soft):
    logits, target = make(shape, soft=soft)
    expected = value_and_grad(F.cross_entropy, logits, target, reduction=reduction)
    got = value_and_grad(gradient_decay_cross_entropy, logits, target, 0.1, reduction=reduction)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, equal_nan=True)
    assert got[0].isnan().any() == (reduction == "mean")


# Blocks of rows, on a CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(52, 123), (131, 37), (3, 507), (4, 252), (300, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_blocks_of_rows(shape, dtype, monkeypatch, poisoned_memory):
    """What many logits are worked on in, on few: with blocks of a part of a row, of rows, and a last one cut short."""
    blocks = []
    original = by_hand.gap_of_block
    monkeypatch.setattr(by_hand, "gap_of_block", lambda *args: blocks.append(len(args[0])) or original(*args))
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(shape[::-1], generator=generator)).to(dtype).t()  # not contiguous
    logits[0, 1:] = -math.inf
    target = torch.randint(shape[1], shape[:1], generator=generator)
    target[0], target[1] = 0, -100
    for block in (100, 300, 10**6):
        monkeypatch.setattr(by_hand, "BLOCK", block)
        blocks.clear()
        input = logits.clone().requires_grad_()
        loss = gradient_decay_cross_entropy(input, target, 0.1, reduction="none")
        loss.sum().backward()
        assert sum(blocks) == shape[0] and max(blocks) == min(shape[0], max(1, block // shape[1]))
        exact_input = logits.clone().double().requires_grad_()
        expected = reference(exact_input, target, 0.1, reduction="none")
        expected[2:].sum().backward()  # the first row has the one class: its gradient is 0, the reference's 0 / 0
        bar = 1e-6 if dtype in (torch.float32, torch.float64) else 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double()[1:], expected[1:], rtol=1e-6, atol=1e-6)
        assert loss[0].item() == pytest.approx(math.log(0.1), rel=1e-6)
        torch.testing.assert_close(input.grad.double()[2:], exact_input.grad[2:], rtol=bar, atol=bar)
        assert input.grad[0].tolist() == [0] * shape[1] == input.grad[1].tolist()
    other = gradient_decay_cross_entropy(logits, target, 0.2, reduction="none")
    assert (other - loss.detach()).abs().max() > 1e-3


# The gradient by hand of class probabilities --------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("beta", [0.05, 20.0, PER_CLASS], ids=["small", "large", "per_class"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("soft", "smoothing"), [(False, 0.0), (False, 0.1), (True, 0.0), (True, 0.1)])
@pytest.mark.parametrize("shape", [(252, 5), (4, 5, 3), (2, 5, 3, 2)])
def test_by_hand_as_composed(shape, soft, smoothing, reduction, beta, weight, monkeypatch, poisoned_memory):
    """Block by block, with odd numbers of rows; composed where torch differentiates."""
    monkeypatch.setattr(by_hand, "BLOCK", 7 * 5 * 4)
    logits, target = make(shape, soft=soft)
    logits.select(1, 2).reshape(-1)[:1] = 800.0  # a class far ahead
    ignored = None
    if soft:
        target.select(1, 4).fill_(0.0)
        if smoothing == 0:
            logits.select(1, 4).reshape(-1)[-1:] = NEG_INF  # whose loss is infinite, and counts nothing
    else:
        ignored = torch.zeros_like(target, dtype=torch.bool)
        ignored.view(-1)[1] = True
    log_beta = torch.as_tensor(beta, dtype=torch.float64).log()
    arguments = (target, ignored, log_beta, weight, smoothing, reduction, True)
    results, factors = [], None
    for function in (by_hand.by_hand, composed.composed):
        z = logits.clone().requires_grad_()
        loss, cross_entropy = function(z, *arguments)
        assert (function is by_hand.by_hand) == ("_ByHand" in type(loss.grad_fn).__name__)
        factors = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        results.append((loss.detach(), cross_entropy, *torch.autograd.grad(loss, z, factors)))
        assert not cross_entropy.requires_grad and results[-1][-1].stride() == logits.stride()
    for ours, theirs in zip(*results, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-12, atol=1e-12)
    other, _ = by_hand.by_hand(logits, target, ignored, log_beta + 1e-3, *arguments[3:])
    assert (other - results[0][0]).abs().max() > 1e-5


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_several_gradients_at_once(reduction, soft):
    """As torch makes them for a Jacobian: the backward is vectorised, by either of its means."""
    logits, target = make((6, 5), soft=soft)
    logits.requires_grad_()
    loss = gradient_decay_cross_entropy(logits, target, 0.1, reduction=reduction)
    several = torch.randn(3, *loss.shape, dtype=loss.dtype)
    (at_once,) = torch.autograd.grad(loss, logits, several, retain_graph=True, is_grads_batched=True)
    mapped = torch.vmap(lambda one: torch.autograd.grad(loss, logits, one, retain_graph=True)[0])(several)
    one_by_one = [torch.autograd.grad(loss, logits, one, retain_graph=True)[0] for one in several]
    torch.testing.assert_close(at_once, torch.stack(one_by_one))
    torch.testing.assert_close(mapped, at_once)
    assert at_once[0].abs().max() > 1e-3 and not torch.allclose(at_once[0], at_once[1])


@pytest.mark.parametrize("create_graph", [False, True])
def test_hooks_run_once(create_graph):
    """Of the logits, whichever way the backward goes."""
    gradients = {}
    for loss in (gradient_decay_cross_entropy, F.cross_entropy):
        x, target = make((6, 5))
        x.requires_grad_()
        logits = x * 1
        logits.register_hook(lambda gradient: 2 * gradient)
        logits.retain_grad()
        (gradient,) = torch.autograd.grad(loss(logits, target), x, create_graph=create_graph)
        gradients[loss] = (gradient.detach(), logits.grad)
    torch.testing.assert_close(*gradients.values())
    assert gradient.abs().max() > 1e-2


def test_weights_that_change_before_the_backward():
    """What the loss was made with counts, or a further backward is refused as torch refuses it."""
    logits, target = make((6, 5))
    weight = WEIGHT.clone()
    logits.requires_grad_()
    loss = gradient_decay_cross_entropy(logits, target, 0.1, weight)
    (wanted,) = torch.autograd.grad(loss, logits, retain_graph=True)
    again = gradient_decay_cross_entropy(logits, target, 0.1, weight)
    weight.mul_(torch.arange(1.0, 6.0))
    assert torch.equal(torch.autograd.grad(again, logits, retain_graph=True)[0], wanted)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(again, logits)
    changed = torch.autograd.grad(gradient_decay_cross_entropy(logits, target, 0.1, weight), logits)[0]
    assert (changed - wanted).abs().max() > 1e-3


def test_logits_that_change_before_the_backward():
    x, target = make((6, 5))
    x.requires_grad_()
    logits = x * 1
    wanted = torch.autograd.grad(gradient_decay_cross_entropy(x, target, 0.1), x)[0]
    loss = gradient_decay_cross_entropy(logits, target, 0.1)
    logits.detach().mul_(2)
    assert torch.equal(torch.autograd.grad(loss, x)[0], wanted)


@pytest.mark.parametrize("variant", ["index", "smoothed", "soft"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1])
def test_logits_that_overflow_are_seen(place, value, variant):
    """As by ``F.cross_entropy``: an infinite or missing logit, of the target too, is no loss of 0."""
    soft, kwargs = VARIANTS[variant]
    logits = torch.zeros(1, 5)
    logits[0, place] = value
    target = torch.eye(5)[:1] if soft else torch.tensor([0])
    for loss in (gradient_decay_cross_entropy, F.cross_entropy):
        got, gradient = value_and_grad(loss, logits, target, **kwargs)
        assert got.isnan().all() and gradient.isnan().any(), loss


def test_an_ignored_row_that_overflows_has_no_gradient_with_label_smoothing():
    logits = torch.zeros(3, 5)
    logits[1, 0] = math.inf
    target = torch.tensor([0, -100, 2])
    loss, gradient = value_and_grad(gradient_decay_cross_entropy, logits, target, 0.1, label_smoothing=0.1)
    assert loss.isfinite() and gradient.isfinite().all()
    assert gradient[1].tolist() == [0.0] * 5 and gradient[0].abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["index", "smoothed", "soft"])
def test_inside_a_checkpoint(variant):
    logits, target, loss = variant_call(variant)
    logits.requires_grad_()
    inside = torch.utils.checkpoint.checkpoint(lambda z: loss(2 * z, target, 0.1), logits, use_reentrant=False)
    (wanted,) = torch.autograd.grad(loss(2 * logits, target, 0.1), logits)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(inside, logits, retain_graph=True)[0], wanted)


@variants
def test_by_hand_twice(variant):
    """A graph that is kept, and one of the gradient; beta is a number, with whose gradient nothing would be by hand."""
    logits, target, loss = variant_call(variant, reduction="none")
    logits.requires_grad_()
    assert gradcheck(lambda z: loss(z, target, 0.05), logits) and gradgradcheck(lambda z: loss(z, target, 0.05), logits)
    total = loss(logits, target, 0.05).sum()
    first, second = (torch.autograd.grad(total, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(loss(logits, target, 0.05).sum(), total.detach())


def test_by_hand_where_no_class_is_finite():
    """As torch: an infinite loss, and the gradient is of no use; an ignored row of that kind has none."""
    logits = torch.full((2, 5), NEG_INF, requires_grad=True)
    loss = gradient_decay_cross_entropy(logits, torch.tensor([1, -100]), 0.1, label_smoothing=0.1, reduction="none")
    loss.sum().backward()
    assert not loss[0].isfinite() and loss[1] == 0 and logits.grad[1].tolist() == [0.0] * 5


def test_the_logits_are_not_changed_and_a_graph_can_be_used_twice(monkeypatch):
    monkeypatch.setattr(by_hand, "BLOCK", 16)
    input = torch.randn(9, 7, requires_grad=True)
    before = input.detach().clone()
    loss = gradient_decay_cross_entropy(input, torch.arange(9) % 7, 0.1)
    first = torch.autograd.grad(loss, input, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, input, 3 * torch.ones(()), retain_graph=True)[0]
    assert torch.equal(input.detach(), before)
    torch.testing.assert_close(second, 3 * first)
    (doubled,) = torch.autograd.grad(torch.autograd.grad(loss, input, create_graph=True)[0].square().sum(), input)
    exact_input = before.double().requires_grad_()
    expected = reference(exact_input, torch.arange(9) % 7, 0.1)
    gradient = torch.autograd.grad(expected, exact_input, create_graph=True)[0]
    torch.testing.assert_close(
        doubled.double(), torch.autograd.grad(gradient.square().sum(), exact_input)[0], rtol=1e-5, atol=1e-7
    )
    assert doubled.abs().max() > 1e-4
