"""The checks of the Triton kernels, run by test_triton_kernel.py in a process of its own, whose environment has
TRITON_INTERPRET=1: there the kernels run on the CPU, on numpy."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import triton
import triton.language as tl
from reference import exact, reference, relative_error

from gd_plugin import by_hand, gap, gradient_decay_cross_entropy, triton_kernel

pytestmark = pytest.mark.filterwarnings("error:the gradient-decay loss runs without")

CLASSES = [1, 2, 123, 252, 507, 1000, 4097]  # the last in two blocks
BETAS = [10.0**power for power in range(-6, 7)]
BOUND = 1e-6
seeds = itertools.count()


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever the kernels are given to fill holds NaN: an element that they leave out shows."""
    real = torch.empty

    def filled(*args, **kwargs):
        tensor = real(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else 2**40)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The kernels that ran: without it a check could pass by the plain way."""
    triton_kernel._works(torch.device("cpu"))  # or its own launches would be among them
    names, real = [], triton_kernel._launch
    monkeypatch.setattr(
        triton_kernel, "_launch", lambda kernel, *args, **how: names.append(kernel) or real(kernel, *args, **how)
    )
    return names


def random(rows, num_classes, dtype=torch.float32, scale=4.0):
    """Fresh logits and targets for every case; two targets are ahead and far behind. (Farther ahead the fp64
    reference is out of digits.)"""
    generator = torch.Generator().manual_seed(next(seeds))
    logits = scale * torch.randn(rows, num_classes, generator=generator)
    target = torch.randint(num_classes, (rows,), generator=generator)
    logits[0, target[0]] += 6.0
    logits[-1, target[-1]] -= 25.0
    return logits.to(dtype), target


def errors(logits, target, beta, loss=gradient_decay_cross_entropy, **kwargs):
    """Relative errors of the loss and, per row, of the gradient against fp64."""
    logits = logits.detach().requires_grad_()
    twin = logits.detach().double().requires_grad_()
    got, expected = loss(logits, target, beta, **kwargs), reference(twin, target, beta, **kwargs)
    upstream = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    (grad,) = torch.autograd.grad((got.double() * upstream).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), twin)
    assert (grad.shape, grad.dtype, got.dtype) == (logits.shape, logits.dtype, torch.float32)
    if logits.shape[1] == 1:  # the reference's 0 / 0
        wanted = torch.zeros_like(wanted)
    # The loss against its terms, of the size of log(beta), which cancel where it crosses 0.
    floor = torch.as_tensor(beta).double().log().abs().max()
    off = (got.detach().double() - expected).abs() / (expected.abs() + floor + 1e-30)
    return off.max().item(), relative_error(grad, wanted).max().item()


def bars(dtype):
    # For bf16 that is twice what a GPU needs: the interpreter cuts off instead of rounding to the nearest.
    return BOUND, BOUND if dtype == torch.float32 else torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_classes", CLASSES)
def test_every_class_count(num_classes, dtype, launches):
    logits, target = random(4, num_classes, dtype)
    # fp16 keeps nothing of gradients below 6e-8, which the rows far ahead have.
    beta = 0.1 if dtype != torch.float16 else 1e-9
    got = errors(logits, target, beta, reduction="none")
    assert got[0] <= bars(dtype)[0] and got[1] <= bars(dtype)[1], got
    assert launches == [triton_kernel._forward, triton_kernel._backward]


@pytest.mark.parametrize("beta", BETAS)
def test_every_beta(beta):
    margins = torch.linspace(-60.0, 60.0, 4)
    for scale in (1.0, 30.0):
        logits, target = random(4, 53, scale=scale)
        others = logits.double().scatter(1, target.unsqueeze(1), -math.inf).logsumexp(1)
        near = (others - math.log(beta) + torch.linspace(-0.5, 0.5, 4)).float()  # gaps around log(beta)
        for of_target in (None, near, (others + margins).float()):
            z = logits if of_target is None else logits.scatter(1, target.unsqueeze(1), of_target.unsqueeze(1))
            z = z.clone().requires_grad_()
            loss = gradient_decay_cross_entropy(z, target, beta, reduction="none")
            loss.sum().backward()
            one_hot = torch.nn.functional.one_hot(target, 53).tolist()
            rows = [exact(row, q, [beta] * 53) for row, q in zip(z.tolist(), one_hot, strict=True)]
            values, gradients = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
            assert relative_error(loss.detach().unsqueeze(1), values.unsqueeze(1)).max() <= BOUND
            assert relative_error(z.grad, gradients).max() <= BOUND


def definition(logits, target, beta):
    """As `reference` for one class per row, which would hold C numbers per logit."""
    raised = logits + math.log(beta) * torch.nn.functional.one_hot(target, logits.shape[1])
    return raised.logsumexp(1) - logits.gather(1, target.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("num_classes", [50_257, 128_256, 300_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vocabularies(num_classes, dtype):
    for scale in (0.0, 1.0, 8.0):
        logits, target = random(2, num_classes, dtype, scale=scale)
        logits.requires_grad_()
        loss = gradient_decay_cross_entropy(logits, target, 1e-3, reduction="none")
        # Scaled as fp16 needs it: a share of 1 / 300,001 is subnormal there.
        (loss.sum() * 1024).backward()
        twin = logits.detach().double().requires_grad_()
        expected = definition(twin, target, 1e-3)
        (expected.sum() * 1024).backward()
        assert relative_error(loss.detach().unsqueeze(1), expected.detach().unsqueeze(1)).max() <= BOUND
        assert relative_error(logits.grad, twin.grad).max() <= bars(dtype)[1]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_arguments(reduction, ignore_index):
    logits, target = random(7, 123)
    target[2], target[4] = ignore_index, 5
    generator = torch.Generator().manual_seed(next(seeds))
    weight = torch.rand(123, generator=generator)
    beta = (3 * torch.randn(123, generator=generator)).exp()
    got = errors(logits, target, beta, weight=weight, ignore_index=ignore_index, reduction=reduction)
    assert max(got) <= BOUND, got


OF_PROBABILITIES = [triton_kernel._forward_probabilities, triton_kernel._backward_probabilities]


def probabilities(rows, num_classes, *more, **how):
    logits, target = random(rows, num_classes, *more, **how)
    soft = torch.randn(rows, num_classes, generator=torch.Generator().manual_seed(next(seeds))).softmax(1)
    soft[0] = F.one_hot(target[0], num_classes)  # a class of probability 0 counts nothing
    return logits, soft


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_classes", CLASSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing_and_soft_targets(soft, smoothing, num_classes, dtype, launches):
    if not soft and smoothing == 0:
        smoothing = 0.5
    logits, target = (probabilities if soft else random)(4, num_classes, dtype)
    label = target[0].argmax() if soft else target[0]
    logits[0, label] = logits[0].max() + 1  # where no class is ahead, beta counts for little
    got = errors(logits, target, 0.1, label_smoothing=smoothing, reduction="none")
    assert got[0] <= 2 * bars(dtype)[0] and got[1] <= 2 * bars(dtype)[1], got
    assert launches == OF_PROBABILITIES
    wrong = errors(
        logits, target, 0.1, loss=lambda z, c, b, **kw: gradient_decay_cross_entropy(z, c, 1.05 * b, **kw),
        label_smoothing=smoothing, reduction="none",
    )  # fmt: skip
    assert wrong[0] > 1e-4  # the control


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_arguments_of_probabilities(soft, per_class, weighted, reduction, launches):
    logits, target = (probabilities if soft else random)(7, 123)
    generator = torch.Generator().manual_seed(next(seeds))
    kwargs = {"reduction": reduction, "label_smoothing": 0.2}
    if weighted:
        kwargs["weight"] = torch.rand(123, generator=generator)
    if not soft:
        target[2], target[4] = 3, -100
    beta = (3 * torch.randn(123, generator=generator)).exp() if per_class else 1e-6
    got = errors(logits, target, beta, **kwargs)
    assert max(got) <= 2 * BOUND, got
    assert launches == OF_PROBABILITIES
    _, plain = gradient_decay_cross_entropy(logits, target, beta, **kwargs, return_cross_entropy=True)
    expected = F.cross_entropy(logits.double(), target.double() if soft else target, reduction=reduction)
    torch.testing.assert_close(plain.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_probabilities_as_the_plain_way(beta, monkeypatch):
    """Rows that are far ahead, far behind, all alike, or without a finite logit; of probabilities and in place."""
    logits, soft = probabilities(7, 53, scale=8.0)
    logits[1] += 60 * soft[1]
    logits[2], logits[3, :52], logits[4, 5] = 0.5, -math.inf, 90.0
    soft[3] = F.one_hot(torch.tensor(52), 53)
    log_beta = torch.tensor(beta, dtype=torch.float64).log()
    index, ignored = soft.argmax(1), torch.arange(7) == 6
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(by_hand, "_rows_for_kernel", lambda logits: None)
        z = logits.clone().requires_grad_()
        loss, cross_entropy = by_hand.by_hand(z, soft, None, log_beta, None, 0.0, "none", True)
        results.append([loss.detach(), cross_entropy, *torch.autograd.grad(loss.sum(), z)])
        torch.manual_seed(0)  # the same weights
        z = logits.clone()
        z[3] = 0.0
        results[-1] += [*by_hand.gradient_in_place(z, index, ignored, log_beta, torch.rand(53), 0.1), z]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6 * theirs.abs().max().item())
    assert results[0][-1][6].eq(0).all() and results[0][2].abs().max() > 1e-3


def test_beta_that_requires_grad_and_the_plain_cross_entropy():
    logits, target = random(5, 40)
    beta, twin = (torch.full((40,), 0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss, plain = gradient_decay_cross_entropy(logits, target, beta, return_cross_entropy=True)
    (got,) = torch.autograd.grad(loss, beta)
    (expected,) = torch.autograd.grad(reference(logits, target, twin), twin)
    assert relative_error(got, expected) <= BOUND
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(logits, target))


def test_layouts(launches):
    logits, target = random(6, 500)
    wide = torch.full((6, 1100), math.nan)
    wide[:, 77:577] = logits
    cases = {
        "part of wider rows": wide[:, 77:577],
        "every other row": logits.repeat_interleave(2, 0)[::2],
        "one row for all": logits[:1].expand(6, -1),
    }
    for name, case in cases.items():
        launches.clear()
        got = errors(case, target, 0.1, reduction="none")
        assert max(got) <= BOUND and len(launches) == 2, (name, got)
    for apart in (logits.t().contiguous().t(), logits.repeat_interleave(2, 1)[:, ::2]):  # these are left to torch
        launches.clear()
        got = errors(apart, target, 0.1, reduction="none")
        assert max(got) <= BOUND and not launches


def test_more_dimensions(launches):
    logits, target = random(6, 123)
    last = logits.reshape(2, 3, 123).movedim(-1, 1)  # (N, C, d), as a sequence's logits are handed on
    got = errors(last, target.reshape(2, 3), 0.1, reduction="none")
    assert max(got) <= BOUND and len(launches) == 2
    launches.clear()
    loss = gradient_decay_cross_entropy(logits[0], target[0], 0.1)
    assert launches and relative_error(loss, reference(logits[0], target[0], 0.1)) <= BOUND
    launches.clear()
    assert max(errors(last.contiguous(), target.reshape(2, 3), 0.1, reduction="none")) <= BOUND and not launches


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ([0.0] * 8, 3),
        ([1e4] * 8, 3),
        ([-1e4, 1e4, 0, 1, 2, 3, 4, 5], 0),
        ([-math.inf] * 4 + [2.0, 1.0, 0.0, -1.0], 5),  # classes that are masked out
        ([-math.inf] * 7 + [2.0], 7),  # all but the target
        ([-math.inf] + [1.0] * 7, 0),  # the target
        ([math.nan] + [1.0] * 7, 3),
        ([math.nan] + [1.0] * 7, 0),
        ([math.inf] + [1.0] * 7, 3),
        ([math.inf] + [1.0] * 7, 0),
    ],
)
@pytest.mark.parametrize("num_classes", [8, 5000])  # 5000: the numbers meet in different blocks
def test_the_same_as_the_plain_way_in_unusual_rows(row, label, num_classes, launches):
    logits = torch.full((2, num_classes), -math.inf)
    logits[:, :4], logits[:, -4:] = torch.tensor(row[:4]), torch.tensor(row[4:])
    logits[1] = 1.0
    target = torch.tensor([label if label < 4 else num_classes - 8 + label, 0])
    factors = torch.tensor([0.7, 2.0], dtype=torch.float64)
    gaps, *numbers = triton_kernel.row_numbers(logits, target)
    gradient = triton_kernel.write_gradient(logits, target, factors, *numbers, torch.empty_like(logits))
    assert len(launches) == 2
    z = logits.clone().requires_grad_()
    plain = gap.target_gap(z, target)
    (wanted,) = torch.autograd.grad((plain * factors).sum(), z)
    torch.testing.assert_close((gaps, gradient), (plain.detach(), wanted), rtol=1e-6, atol=1e-30, equal_nan=True)
    if not math.isnan(sum(row)):
        assert gaps.dtype == torch.float64


def test_an_ignored_row_has_no_gradient_whatever_it_holds():
    for fill in (-math.inf, 1e30, -1e30):
        logits, target = random(3, 9)
        logits[1] = fill
        target[1] = -100
        logits.requires_grad_()
        loss = gradient_decay_cross_entropy(logits, target, 0.1)
        loss.backward()
        assert loss.isfinite() and logits.grad[1].tolist() == [0] * 9 and logits.grad[[0, 2]].abs().max() > 0


@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_labels_out_of_range(label):
    with pytest.raises(RuntimeError, match="out of bounds"):
        gradient_decay_cross_entropy(torch.zeros(2, 5), torch.tensor([1, label]))


def test_the_logits_stay_and_a_graph_can_be_used_twice():
    logits, target = random(4, 30)
    kept = logits.clone()
    loss = gradient_decay_cross_entropy(logits.requires_grad_(), target, 0.1)
    first = torch.autograd.grad(loss, logits, retain_graph=True)[0]
    second = torch.autograd.grad(loss, logits, torch.tensor(3.0))[0]
    assert torch.equal(logits, kept)
    torch.testing.assert_close(second, 3 * first)


def test_second_derivative():
    logits, target = random(4, 30)
    twin = logits.double().requires_grad_()
    results = []
    for z, loss in ((logits.requires_grad_(), gradient_decay_cross_entropy), (twin, reference)):
        (grad,) = torch.autograd.grad(loss(z, target, 0.1), z, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), z)[0].double())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-8)
    assert results[0].abs().max() > 1e-4


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ways_through_autograd(smoothing, launches):
    """Tensors that come back from hooks in another layout, a checkpoint, several gradients at once, a trace."""
    _, target = random(6, 30)
    x = torch.randn(2, 3, 30, requires_grad=True)

    def loss(x):
        return gradient_decay_cross_entropy(x.movedim(-1, 1), target.view(2, 3), 0.1, label_smoothing=smoothing)

    (wanted,) = torch.autograd.grad(loss(x), x)
    assert len(launches) == 2 and wanted.abs().max() > 1e-3
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        kept = loss(x)
    assert torch.equal(torch.autograd.grad(kept, x)[0], wanted)

    inside = torch.utils.checkpoint.checkpoint(lambda x: loss(1 * x), x, use_reentrant=False)
    launches.clear()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(inside, x, retain_graph=True)[0], wanted)
    assert len(launches) == 4  # of each backward: the forward again, which is the checkpoint's, and its own

    value = loss(x)
    both = torch.tensor([1.0, 2.0])
    (at_once,) = torch.autograd.grad(value, x, both, retain_graph=True, is_grads_batched=True)
    mapped = torch.vmap(lambda one: torch.autograd.grad(value, x, one, retain_graph=True)[0])(both)
    for several in (at_once, mapped):
        torch.testing.assert_close(several, torch.stack([wanted, 2 * wanted]), rtol=1e-5, atol=1e-8)
    launches.clear()
    traced = torch.jit.trace(loss, x, check_trace=False)
    torch.testing.assert_close(traced(2 * x), loss(2 * x))
    assert len(launches) == 1  # of the loss itself


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("num_classes", [2, 8, 5000])
@pytest.mark.parametrize("kind", ["index", "smoothed", "soft"])
def test_logits_that_overflow_are_seen(kind, num_classes, place, value, launches):
    logits = torch.zeros(1, num_classes)
    logits[0, place] = value
    target = torch.eye(num_classes)[:1] if kind == "soft" else torch.tensor([0])
    logits.requires_grad_()
    loss = gradient_decay_cross_entropy(logits, target, 0.1, label_smoothing=0.1 * (kind == "smoothed"))
    loss.backward()
    assert loss.isnan() and logits.grad.isnan().any() and len(launches) == 2


def test_transforms_and_graphs_go_the_plain_way(launches):
    logits, target = random(4, 30)
    got = torch.func.grad(gradient_decay_cross_entropy)(logits, target, 0.1)
    assert not launches
    logits.requires_grad_()
    gradient_decay_cross_entropy(logits, target, 0.1).backward()
    assert launches
    torch.testing.assert_close(logits.grad, got)
    launches.clear()
    compiled = torch.compile(gradient_decay_cross_entropy, backend="eager", fullgraph=True)
    compiled(logits, target, 0.1)
    gradient_decay_cross_entropy(logits.double(), target, 0.1)  # nor does fp64 have a kernel
    gradient_decay_cross_entropy(logits[:0], target[:0], 0.1)
    assert not launches


def test_in_place(launches):
    """What the linear form does with logits of its own: their gradient takes their place."""
    logits, target = random(6, 5000)
    logits[3], target[3] = math.nan, -100
    weight = torch.rand(5000, generator=torch.Generator().manual_seed(1))
    twin = logits.double().nan_to_num().requires_grad_()
    index = target.clamp(min=0)
    expected = (definition(twin, index, 0.2) * weight[index]).masked_fill(target < 0, 0.0)
    (wanted,) = torch.autograd.grad(expected.sum(), twin)
    of_target = F.cross_entropy(logits.double(), target, reduction="none")
    log_beta = torch.tensor(0.2, dtype=torch.float64).log()
    loss, cross_entropy = by_hand.gradient_in_place(logits, index, target < 0, log_beta, weight, 0.0)
    assert len(launches) == 2
    assert relative_error(loss.unsqueeze(1), expected.detach().unsqueeze(1)).max() <= BOUND
    assert relative_error(cross_entropy.unsqueeze(1), of_target.unsqueeze(1)).max() <= BOUND
    assert relative_error(logits, wanted).max() <= BOUND


# Controls: these would pass if the checks saw nothing --------------------------------------------------------------


def test_another_beta_is_seen():
    logits, target = random(5, 123)
    logits[0, target[0]] = logits[0].max() + 1  # where the target is far behind beta counts for nothing
    got = errors(logits, target, 0.1, loss=lambda z, c, b, **kw: gradient_decay_cross_entropy(z, c, 1.01 * b, **kw))
    assert got[1] > 100 * BOUND


@triton.jit
def _with_the_target(
    logits, row_stride, target, of_target, gap, top, total, num_classes, BLOCK: tl.constexpr
):  # `_forward` for one block, with the target left among the others
    row = tl.program_id(0)
    classes = tl.arange(0, BLOCK)
    z = tl.load(logits + row * row_stride + classes, mask=classes < num_classes, other=float("-inf")).to(tl.float32)
    highest = tl.max(z, 0)
    sums = tl.sum(tl.exp(z - highest), 0)
    tl.store(top + row, highest)
    tl.store(total + row, sums)
    tl.store(gap + row, highest.to(tl.float64) - tl.load(of_target + row) + tl.log(sums.to(tl.float64)))


def test_a_target_left_in_the_sum_is_seen(monkeypatch):
    logits, target = random(5, 123)
    logits[0, target[0]] = logits[0].max() + 1
    assert max(errors(logits, target, 0.1, reduction="none")) <= BOUND
    monkeypatch.setattr(triton_kernel, "_forward", _with_the_target)
    got = errors(logits, target, 0.1, reduction="none")
    assert min(got) > 1000 * BOUND


@triton.jit
def _one_short(
    logits, row_stride, target, grad, top, total, out, out_stride, num_classes, BLOCK: tl.constexpr
):  # a backward that leaves the last class out
    row = tl.program_id(0)
    classes = tl.arange(0, BLOCK)
    tl.store(out + row * out_stride + classes, tl.zeros([BLOCK], tl.float32), mask=classes < num_classes - 1)


def test_an_element_that_is_not_written_is_seen(monkeypatch):
    monkeypatch.setattr(triton_kernel, "_backward", _one_short)
    logits, target = random(5, 123)
    logits.requires_grad_()
    gradient_decay_cross_entropy(logits, target, 0.1).backward()
    assert logits.grad[:, -1].isnan().all() and logits.grad[:, :-1].eq(0).all()
