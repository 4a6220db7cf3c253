"""The loss from a linear head's input: as the loss of its logits, in value, gradient and errors."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from gd_plugin import by_hand, gradient_decay_cross_entropy, linear, linear_gradient_decay_cross_entropy

N, D, C = 37, 12, 23


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, poisoned_memory):
    """Five rows at once, the last chunk cut short, in blocks of two rows."""
    monkeypatch.setattr(linear, "_LOGITS_AT_ONCE", 5 * C)
    monkeypatch.setattr(by_hand, "BLOCK", 2 * C)


def problem(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(N, D, generator=generator).to(dtype)
    linear_weight = torch.randn(C, D, generator=generator).to(dtype)
    linear_bias = torch.randn(C, generator=generator).to(dtype) if bias else None
    target = torch.randint(C, (N,), generator=generator)
    target[[3, 4, 5, 6, 7, 36]] = -100
    return [input, linear_weight, linear_bias], target


def with_gradients(function, tensors, upstream):
    tensors = [None if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    loss = function(*tensors)
    upstream = torch.ones_like(loss) if upstream is None else upstream(loss)
    loss.backward(upstream)
    return [loss.detach(), *(tensor.grad for tensor in tensors if tensor is not None)]


def of_logits(target, beta, *knobs):
    """The same by way of all logits, in fp64."""
    return lambda input, weight, bias=None: gradient_decay_cross_entropy(
        F.linear(input.double(), weight.double(), None if bias is None else bias.double()), target, beta, *knobs
    )


BETAS = {"0.01": 0.01, "tensor": torch.tensor(5.0), "per class": torch.linspace(0.1, 3.0, C)}
UPSTREAM = {"one": None, "scaled": lambda loss: 0.3 * torch.arange(1.0, loss.numel() + 1).reshape(loss.shape)}
WEIGHTS = {"plain": None, "weighted": torch.linspace(0.0, 2.0, C)}


@pytest.mark.parametrize(
    ("reduction", "beta", "weight", "smoothing", "upstream", "bias"),
    itertools.product(["mean", "sum", "none"], BETAS, WEIGHTS, [0.0, 0.2], UPSTREAM, [True, False]),
)
def test_as_the_loss_of_the_logits(reduction, beta, weight, smoothing, upstream, bias):
    tensors, target = problem(bias=bias)
    knobs = (WEIGHTS[weight], -100, reduction, smoothing)

    def ours(input, linear_weight, linear_bias=None):
        return linear_gradient_decay_cross_entropy(
            input, linear_weight, target, BETAS[beta], linear_bias, *knobs[:2], reduction, smoothing
        )

    got = with_gradients(ours, tensors, UPSTREAM[upstream])
    expected = with_gradients(of_logits(target, BETAS[beta], *knobs), tensors, UPSTREAM[upstream])
    other = with_gradients(of_logits(target, 1.5, *knobs), tensors, UPSTREAM[upstream])
    assert len(got) == len(expected) == 3 + bias
    for one, two, control in zip(got, expected, other, strict=True):
        torch.testing.assert_close(one, two.float(), rtol=2e-6, atol=2e-6 * two.abs().max().item())
        assert (two - control).abs().max() > 1e-3 * two.abs().max()


def test_ignored_targets_of_eight_bits_leave_out_no_class():
    target, weight = torch.tensor([156, 3], dtype=torch.uint8), torch.randn(200, D)
    input = torch.randn(2, D)
    got = linear_gradient_decay_cross_entropy(input, weight, target)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(input, weight), target.long()))


def test_many_chunks_add_up_in_fp32(monkeypatch):
    """Of bf16: 800 rows with the same gradient, one by one, of which a sum in bf16 would lose the later ones."""
    monkeypatch.setattr(linear, "_LOGITS_AT_ONCE", C)
    input = torch.ones(800, D, dtype=torch.bfloat16)
    weight, bias = torch.zeros(C, D, dtype=torch.bfloat16), torch.zeros(C, dtype=torch.bfloat16)
    leaves = [weight.requires_grad_(), bias.requires_grad_()]
    target = torch.zeros(800, dtype=torch.int64)
    linear_gradient_decay_cross_entropy(input, weight, target, 1.0, bias, reduction="sum").backward()
    for leaf in leaves:
        torch.testing.assert_close(leaf.grad[1:].float(), torch.full_like(leaf.grad[1:], 800 / C, dtype=torch.float32),
                                   rtol=1e-2, atol=0)  # fmt: skip
    one = torch.tensor(1 / C).bfloat16()
    in_bf16 = sum([one] * 800, torch.zeros((), dtype=torch.bfloat16))
    assert abs(in_bf16.float() - 800 / C) > 0.1 * 800 / C


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_plain_cross_entropy_beside_it(reduction, smoothing):
    """With and without a gradient; of no rows at all; and it has none itself."""
    tensors, target = problem()
    plain = F.cross_entropy(F.linear(*tensors), target, reduction=reduction)
    knobs = dict(weight=WEIGHTS["weighted"], reduction=reduction, label_smoothing=smoothing)
    for needs_gradient in (False, True):
        input = tensors[0].clone().requires_grad_(needs_gradient)
        ours, cross_entropy = linear_gradient_decay_cross_entropy(
            input, tensors[1], target, 0.1, tensors[2], **knobs, return_cross_entropy=True
        )
        torch.testing.assert_close(cross_entropy, plain)
        assert not cross_entropy.requires_grad and ours.requires_grad == needs_gradient
        alone = linear_gradient_decay_cross_entropy(input, tensors[1], target, 0.1, tensors[2], **knobs)
        assert torch.equal(alone, ours) and not torch.allclose(ours, plain, atol=1e-2)
    none = linear_gradient_decay_cross_entropy(
        tensors[0][:0], tensors[1], target[:0], reduction=reduction, return_cross_entropy=True
    )
    expected = F.cross_entropy(torch.zeros(0, C), target[:0], reduction=reduction)
    torch.testing.assert_close(none, (expected, expected), equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_beta_one_is_cross_entropy(reduction):
    tensors, target = problem()
    got = linear_gradient_decay_cross_entropy(tensors[0], tensors[1], target, 1.0, tensors[2], reduction=reduction)
    torch.testing.assert_close(got, F.cross_entropy(F.linear(*tensors), target, reduction=reduction))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_dtypes(dtype, reduction):
    tensors, target = problem(dtype)

    def ours(input, linear_weight, linear_bias):
        return linear_gradient_decay_cross_entropy(input, linear_weight, target, 0.1, linear_bias, reduction=reduction)

    got = with_gradients(ours, tensors, None)
    expected = with_gradients(of_logits(target, 0.1, None, -100, reduction), tensors, None)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all(tensor.dtype == dtype for tensor in got[1:])
    bar = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), two.double(), rtol=bar, atol=bar * two.abs().max().item())


def test_gradients_of_a_part_only():
    tensors, target = problem()
    whole = with_gradients(lambda i, w, b: linear_gradient_decay_cross_entropy(i, w, target, 0.1, b), tensors, None)
    for place in range(3):
        parts = [tensor.clone().requires_grad_(i == place) for i, tensor in enumerate(tensors)]
        linear_gradient_decay_cross_entropy(parts[0], parts[1], target, 0.1, parts[2]).backward()
        assert torch.equal(parts[place].grad, whole[1 + place])
        assert [part.grad is None for part in parts].count(False) == 1
    with torch.no_grad():
        assert torch.allclose(linear_gradient_decay_cross_entropy(*tensors[:2], target, 0.1, tensors[2]), whole[0])


def test_a_graph_used_twice():
    tensors, target = problem()
    input, linear_weight, _ = (tensor.clone().requires_grad_() for tensor in tensors)
    loss = linear_gradient_decay_cross_entropy(input, linear_weight, target, 0.1)
    loss.backward(retain_graph=True)
    once = linear_weight.grad.clone()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(linear_weight.grad, 3 * once)
    torch.testing.assert_close(input.detach(), tensors[0])


def test_never_all_logits(monkeypatch):
    """The largest tensor of logits that is made."""
    sizes = []
    original = linear._linear
    monkeypatch.setattr(linear, "_linear", lambda *args: sizes.append(len(args[0])) or original(*args))
    tensors, target = problem()
    for reduction, calls in (("mean", 8), ("none", 16)):
        sizes.clear()
        with_gradients(
            lambda i, w, b, r=reduction: linear_gradient_decay_cross_entropy(i, w, target, 0.1, b, reduction=r),
            tensors,
            None,
        )
        assert max(sizes) == 5 and len(sizes) == calls


def test_ignored_rows():
    (input, linear_weight, bias), target = problem()
    input = input.clone().requires_grad_()
    with torch.no_grad():
        input[3] = float("nan")
    linear_gradient_decay_cross_entropy(input, linear_weight, target, 0.1, bias).backward()
    assert input.grad[3].tolist() == [0] * D and input.grad[0].abs().max() > 0
    assert input.grad.isfinite().all()
    nothing = torch.full_like(target, -100)
    assert linear_gradient_decay_cross_entropy(input, linear_weight, nothing, 0.1).isnan()
    assert linear_gradient_decay_cross_entropy(input, linear_weight, nothing, 0.1, reduction="sum") == 0


def test_no_rows():
    input, linear_weight = torch.randn(0, D, requires_grad=True), torch.randn(C, D, requires_grad=True)
    target = torch.empty(0, dtype=torch.long)
    loss = linear_gradient_decay_cross_entropy(input, linear_weight, target, 0.1, reduction="sum")
    loss.backward()
    assert loss == 0 and linear_weight.grad.abs().max() == 0 and input.grad.shape == (0, D)
    assert linear_gradient_decay_cross_entropy(input, linear_weight, target, reduction="none").shape == (0,)


def test_a_second_derivative_is_refused():
    tensors, target = problem()
    input = tensors[0].clone().requires_grad_()
    loss = linear_gradient_decay_cross_entropy(input, tensors[1], target, 0.1)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(loss, input, create_graph=True)


BAD = {
    "three dimensions": (dict(input=torch.randn(2, N, D)), "flatten the positions"),
    "another width": (dict(linear_weight=torch.randn(C, D + 1)), "linear_weight"),
    "bias": (dict(linear_bias=torch.randn(C + 1)), r"linear_bias must have shape \(23,\)"),
    "target": (dict(target=torch.zeros(N, C)), r"target must have shape \(37,\)"),
    "beta with a gradient": (dict(beta=torch.tensor(1.0, requires_grad=True)), "beta requires grad"),
    "another dtype": (dict(linear_weight=torch.randn(C, D).bfloat16()), "linear_weight must have the dtype of input"),
    "weight with a gradient": (dict(weight=torch.ones(C, requires_grad=True)), "weight requires grad"),
    "beta": (dict(beta=-1.0), "beta must be positive"),
    "beta of other classes": (dict(beta=torch.ones(C + 1)), "one value per class"),
    "weight": (dict(weight=torch.ones(C + 1)), "weight must have one value per class"),
    "reduction": (dict(reduction="max"), "reduction must be"),
    "smoothing": (dict(label_smoothing=2.0), "label_smoothing must be"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(name, grad):
    tensors, target = problem()
    words = dict(input=tensors[0].clone().requires_grad_(grad), linear_weight=tensors[1], target=target)
    changed, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        linear_gradient_decay_cross_entropy(**words | changed)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("wrong", [C, -1])
def test_a_target_outside_the_classes(wrong, smoothing):
    tensors, target = problem()
    target[0] = wrong
    input = tensors[0].clone().requires_grad_()
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_gradient_decay_cross_entropy(input, tensors[1], target, 0.1, label_smoothing=smoothing)


def test_the_mean_of_no_row_has_no_gradient():
    tensors, target = problem()
    loss, *gradients = with_gradients(
        lambda *head: linear_gradient_decay_cross_entropy(*head[:2], torch.full_like(target, -100), 2.0, head[2]),
        tensors,
        None,
    )
    assert loss.isnan()
    assert all((gradient == 0).all() for gradient in gradients)


def test_the_sum_of_the_weights_is_not_rounded_to_their_type():
    tensors, target = problem()
    weight = torch.linspace(0.1, 2.0, C).bfloat16()
    got = with_gradients(
        lambda *head: linear_gradient_decay_cross_entropy(*head[:2], target, 2.0, head[2], weight), tensors, None
    )
    expected = with_gradients(of_logits(target, 2.0, weight), tensors, None)
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two.float(), rtol=2e-6, atol=2e-6 * two.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_autocast(dtype, reduction):
    """As ``F.linear`` there: the head's tensors are rounded, the loss is not, and the gradients are fp32."""
    tensors, target = problem()

    def ours(*head):
        with torch.autocast("cpu", dtype):
            return linear_gradient_decay_cross_entropy(*head[:2], target, 0.1, head[2], reduction=reduction)

    def theirs(*head):
        with torch.autocast("cpu", dtype):
            logits = F.linear(*head)
        assert logits.dtype == dtype
        return gradient_decay_cross_entropy(logits, target, 0.1, reduction=reduction)

    got, expected, exact = (
        with_gradients(way, tensors, None) for way in (ours, theirs, of_logits(target, 0.1, None, -100, reduction))
    )
    for one, two, three in zip(got, expected, exact, strict=True):
        assert one.dtype == torch.float32
        scale = two.abs().max()
        assert (one - two).abs().max() <= 2 * torch.finfo(dtype).eps * scale
        assert (two - three).abs().max() > 1e-6 * scale  # the control: rounding is seen


def test_fp16_gradients_have_the_scale_of_the_backward():
    """A mean over 2,000 rows of shares near fp16's smallest number, times 2**17, which fp16 cannot hold either."""
    generator = torch.Generator().manual_seed(0)
    input, linear_weight = torch.randn(2000, 4, generator=generator).half(), torch.zeros(500, 4).half()
    target = torch.randint(500, (2000,), generator=generator)
    for reduction, factor in (("mean", 2.0**17), ("sum", 2.0**-6)):
        head = [input, linear_weight]
        got = with_gradients(
            lambda i, w, r=reduction: linear_gradient_decay_cross_entropy(i, w, target, 5.0, reduction=r),
            head,
            lambda loss, factor=factor: torch.full_like(loss, factor),
        )
        expected = with_gradients(
            of_logits(target, 5.0, None, -100, reduction),
            head,
            lambda loss, factor=factor: torch.full_like(loss, factor),
        )
        error = (got[2].float() - expected[2].float()).norm() / expected[2].float().norm()
        assert got[2].isfinite().all() and error < 2e-3, error
    unscaled = (expected[2].float() * 2.0**6 / 2000 / 2000).half()
    assert (unscaled == 0).float().mean() > 0.05  # the control: a row's share of the mean is nothing in fp16


def test_a_bf16_gradient_is_rounded_once(monkeypatch):
    """Scaled in fp32, by a factor that is no number of bf16's."""
    tensors, target = problem(torch.bfloat16)
    exact, original = [], linear._Gradients.result
    monkeypatch.setattr(
        linear._Gradients,
        "result",
        lambda self, factor: exact.extend(tensor.clone() for tensor in self.tensors) or original(self, factor),
    )
    factor = 1 + 2.0**-8
    got = with_gradients(
        lambda *head: linear_gradient_decay_cross_entropy(*head[:2], target, 0.1, head[2], reduction="sum"),
        tensors,
        lambda loss: torch.full_like(loss, factor),
    )
    for one, tensor in zip(got[1:], exact, strict=True):
        assert tensor.dtype == torch.float32 and torch.equal(one, (tensor * factor).bfloat16())
    assert not torch.equal(got[2], exact[1].bfloat16() * torch.tensor(factor).bfloat16())


def test_fp64_stays_under_autocast():
    tensors, target = problem(torch.float64)
    expected = linear_gradient_decay_cross_entropy(*tensors[:2], target, 0.1, tensors[2])
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_gradient_decay_cross_entropy(*tensors[:2], target, 0.1, tensors[2])
    assert got.dtype == torch.float64 and torch.equal(got, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_meta_tensors(reduction):
    (input, linear_weight, _), target = problem()
    loss = linear_gradient_decay_cross_entropy(
        input.to("meta"), linear_weight.to("meta"), target.to("meta"), 0.1, reduction=reduction
    )
    assert loss.device.type == "meta" and loss.shape == ((N,) if reduction == "none" else ())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_weights_that_change_before_a_further_backward(reduction):
    tensors, target = problem()
    input, weight = tensors[0].clone().requires_grad_(), torch.linspace(0.5, 2.0, C)
    loss = linear_gradient_decay_cross_entropy(input, tensors[1], target, 0.1, weight=weight, reduction=reduction)
    loss.sum().backward(retain_graph=True)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_weights_of_zero():
    """NaN, as of ``F.cross_entropy``; not the 0 of a batch that has no target."""
    tensors, target = problem()
    got = with_gradients(
        lambda *head: linear_gradient_decay_cross_entropy(*head[:2], target, 0.1, head[2], torch.zeros(C)),
        tensors,
        None,
    )
    assert all(tensor.isnan().any() for tensor in got)
    ignored = target == -100
    assert got[1][~ignored].isnan().all() and got[1][ignored].eq(0).all()
