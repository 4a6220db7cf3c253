"""The loss as a module, and what importing the package loads."""

import copy
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gd_plugin
from gd_plugin import GradientDecayConfig, GradientDecayLoss, gradient_decay_cross_entropy

PER_CLASS = [0.01, 0.3, 1.0, 7.0, 200.0]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(6, 5, generator=generator), torch.tensor([0, 1, 2, 3, -1, 1])


@pytest.mark.parametrize("beta", [0.1, PER_CLASS, tuple(PER_CLASS), torch.tensor(0.1), torch.tensor(PER_CLASS)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_it_is_the_function(batch, beta, reduction, label_smoothing):
    weight = torch.arange(1.0, 6.0)
    module = GradientDecayLoss(
        beta=beta, weight=weight, ignore_index=-1, reduction=reduction, label_smoothing=label_smoothing
    )
    expected = gradient_decay_cross_entropy(
        *batch, torch.as_tensor(beta), weight, ignore_index=-1, reduction=reduction, label_smoothing=label_smoothing
    )
    assert torch.equal(module(*batch), expected)
    module.set_beta(2.0)
    assert not torch.allclose(module(*batch), expected)


def test_the_default_is_cross_entropy(batch):
    expected = nn.CrossEntropyLoss(ignore_index=-1)(*batch)
    torch.testing.assert_close(GradientDecayLoss(ignore_index=-1)(*batch), expected)
    assert not torch.allclose(GradientDecayLoss(beta=1.1, ignore_index=-1)(*batch), expected)


def test_set_beta_changes_the_buffer_in_place():
    module = GradientDecayLoss(beta=0.5)
    buffer, address = module.beta, module.beta.data_ptr()
    module.set_beta(3.0)
    assert module.beta is buffer and buffer.data_ptr() == address
    assert buffer.item() == 3.0


def test_set_beta_per_class():
    module = GradientDecayLoss(beta=PER_CLASS)
    module.set_beta(PER_CLASS[::-1])
    assert module.beta.tolist() == pytest.approx(PER_CLASS[::-1])
    module.set_beta(2.0)  # one number for every class
    assert module.beta.tolist() == [2.0] * 5


def test_a_later_change_of_the_given_tensor_changes_nothing():
    beta = torch.tensor(0.5, requires_grad=True)
    module = GradientDecayLoss(beta=beta)
    with torch.no_grad():
        beta.fill_(7.0)
    assert module.beta.item() == 0.5 and not module.beta.requires_grad


@pytest.mark.parametrize(
    "convert",
    [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16), lambda m: m.to("cpu")],
    ids=["half", "bfloat16", "double", "to float16", "to cpu"],
)
def test_beta_stays_fp32(convert):
    module = GradientDecayLoss(beta=PER_CLASS, weight=torch.ones(5))
    model = convert(nn.Sequential(nn.Linear(2, 2), module))
    assert model[1] is module
    assert module.beta.dtype == torch.float32
    assert torch.equal(module.beta, torch.tensor(PER_CLASS))
    assert module.weight.dtype == model[0].weight.dtype  # the weight is converted like any other tensor
    module.set_beta(0.01)
    assert torch.equal(module.beta, torch.full((5,), 0.01))


def test_beta_follows_the_device():
    assert GradientDecayLoss(beta=0.5).to("meta").beta.device.type == "meta"


def test_state_dict_is_that_of_torchs_loss():
    weight = torch.arange(1.0, 6.0)
    module, twin = GradientDecayLoss(beta=0.1, weight=weight), nn.CrossEntropyLoss(weight)
    assert list(module.state_dict()) == list(twin.state_dict()) == ["weight"]
    assert list(GradientDecayLoss(beta=0.1).state_dict()) == list(nn.CrossEntropyLoss().state_dict()) == []
    assert [name for name, _ in module.named_buffers()] == ["beta", "weight"]
    assert not list(module.parameters())
    module.load_state_dict(twin.state_dict())
    assert module.beta.item() == pytest.approx(0.1)


def test_deepcopy_is_independent(batch):
    module = GradientDecayLoss(beta=0.1, ignore_index=-1)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(*batch), module(*batch))
    twin.set_beta(5.0)
    assert module.beta.item() == pytest.approx(0.1)
    assert not torch.allclose(twin(*batch), module(*batch))


def test_a_schedule_compiles_nothing_anew(batch):
    module = GradientDecayLoss(beta=0.1, ignore_index=-1)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for beta in (0.1, 0.5, 1.0, 9.0):
        module.set_beta(beta)
        torch.testing.assert_close(compiled(*batch), module(*batch))
    assert counter.frame_count == 1
    module.reduction = "sum"  # control: what is not in a buffer is compiled in
    compiled(*batch)
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("beta", "shown"),
    [
        (0.0, "0.0"),
        (-1, "-1"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ([1.0, -2.0], "[1.0, -2.0]"),
        ([[1.0]], "[[1.0]]"),
    ],
)
def test_errors_of_beta(beta, shown):
    message = f"^beta must be positive and finite, one number or one per class, got {re.escape(shown)}$"
    with pytest.raises(ValueError, match=message):
        GradientDecayLoss(beta=beta)
    module = GradientDecayLoss(beta=0.5)
    with pytest.raises(ValueError, match=message):
        module.set_beta(beta)
    assert module.beta.item() == 0.5


@pytest.mark.parametrize(("made", "given"), [(0.5, [1.0, 2.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_set_beta_keeps_the_shape(made, given):
    module = GradientDecayLoss(beta=made)
    before = module.beta.clone()
    message = f"beta has shape ({len(given)},), this loss was made for {tuple(before.shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        module.set_beta(given)
    assert torch.equal(module.beta, before)


def test_repr_shows_beta():
    assert repr(GradientDecayLoss(beta=0.5, label_smoothing=0.1)) == (
        "GradientDecayLoss(beta=tensor(0.5000), reduction='mean', label_smoothing=0.1)"
    )


# ---------------------------------------------------------------------------------------------------------- import

HEAVY = ("accelerate", "datasets", "evaluate", "matplotlib", "timm", "transformers")


@pytest.fixture
def loaded_after(tmp_path):
    """Which of `HEAVY` a fresh interpreter has loaded after some statement. Empty stand-ins shadow the real ones, so
    that the answer does not depend on what is installed, nor "not loaded" mean "not there"."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").touch()

    def run(statement):
        root = Path(gd_plugin.__file__).parents[1]
        code = f"import sys; sys.path[:0] = {[str(tmp_path), str(root)]}; {statement}; print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        modules = set(done.stdout.split())
        assert {"torch", "gd_plugin.functional"} <= modules
        return sorted(modules & set(HEAVY))

    return run


def test_importing_the_package_loads_no_trainer(loaded_after):
    assert loaded_after("import gd_plugin") == []


def test_an_import_of_a_trainer_would_be_seen(loaded_after):
    assert loaded_after(f"import gd_plugin, {', '.join(HEAVY)}") == list(HEAVY)


def test_from_a_configuration():
    """Per class where beta is at either end of the warm-up, which a schedule then fills; the final one at first."""
    weights = (1.0, 2.0, 0.5)
    config = GradientDecayConfig(beta=5.0, beta_start=(0.1, 0.2, 0.3), warmup_ratio=0.5, class_weights=weights)
    loss = GradientDecayLoss.from_config(config, ignore_index=1, label_smoothing=0.1)
    assert loss.beta.tolist() == [5.0] * 3 and loss.weight.tolist() == list(weights)
    assert (loss.ignore_index, loss.label_smoothing) == (1, 0.1)
    loss.set_beta((0.1, 0.2, 0.3))
    plain = GradientDecayLoss.from_config(GradientDecayConfig(beta=5.0))
    assert plain.beta.shape == () and plain.beta == 5 and plain.weight is None


@pytest.mark.parametrize("shape", [(7, 123), (600, 1000)], ids=["whole", "in blocks"])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(shape):
    """The first backward uses up what the forward has left, as the gradient's own place."""
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(shape[1], shape[:1])
    loss = gradient_decay_cross_entropy(logits, target, 0.01)
    gradients = []
    for keep in (True, True, False):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=keep)
        gradients.append(gradient.clone())
        gradient.fill_(torch.nan)  # it is the caller's
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(gradients[2], gradients[1], rtol=0, atol=0)
    assert gradients[0].abs().max() > 0
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, logits)


def test_a_second_derivative_and_then_the_first():
    """A graph of the gradient leaves what the first backward uses up."""
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    target = torch.arange(5)
    loss = gradient_decay_cross_entropy(logits, target, 5.0)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), logits, retain_graph=True)
    assert second.abs().max() > 0
    (once_more,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(once_more, gradient.detach())
