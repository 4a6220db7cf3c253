"""The loss costs a training nothing that can be measured in time: no recompilation, no waiting for the device.

Times are measured by ``python -m gd_plugin.bench``; here it is what would make them bad.
"""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hf_models import make_arguments, make_data, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import gd_plugin
from gd_plugin import gradient_decay_cross_entropy, linear_gradient_decay_cross_entropy
from gd_plugin.hf import GradientDecayTrainer

OURS = str(Path(gd_plugin.__file__).parent)
WARMUP = dict(gd_beta=5.0, gd_beta_start=0.01, gd_warmup_ratio=1.0)
# What a GPU is waited for: a number, or a size, that Python must know.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount")


class Waits(TorchDispatchMode):
    """Counts the operations among `WAITS`, and copies to Python, that a file of ours asks for, by function."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = Counter()
        for name in ("tolist", "numpy"):
            real = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda *args, real=real, **how: self.note() or real(*args, **how))

    def note(self):
        frame = sys._getframe(1)
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if (function, "features" in frame.f_locals) == ("__call__", True) or function == "_checked":
                return  # the collator's batch and a new beta are looked at while they are still on the CPU
            if file.startswith(OURS):
                self.found[f"{Path(file).name}: {function}"] += 1
                return
            frame = frame.f_back

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name in WAITS or masked:
            self.note()
        return func(*args, **(kwargs or {}))


def steps(folder, trainer_class=GradientDecayTrainer, kind="tokens", **more):
    arguments = make_arguments(folder, max_steps=8, **{**WARMUP, **more})
    trainer = trainer_class(make_model(kind), arguments, train_dataset=make_data(kind))
    trainer.train()
    return trainer


@pytest.mark.parametrize("more", [{}, {"gd_class_weights": "ones"}, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", ["tokens", "vit"])
def test_nothing_waits_for_the_device(kind, more, tmp_path, monkeypatch):
    """Not in an update, whose beta changes every time; a log entry has to wait, as the Trainer's own."""
    if more.get("gd_class_weights"):
        more = {"gd_class_weights": [1.0] * make_model(kind).config.num_labels}
    with Waits(monkeypatch) as waits:
        steps(tmp_path, kind=kind, logging_strategy="no", **more)
    assert not waits.found


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}, {"gd_class_weights": [1.0] * 32}], ids=str)
def test_nothing_waits_for_the_device_in_a_fused_head(more, tmp_path, monkeypatch):
    """Nothing but what the model itself waits for, with the logits too."""
    found = {}
    for fused in (False, True):
        knobs = WARMUP | more | {"gd_fused_linear": fused}
        arguments = make_arguments(tmp_path, max_steps=8, logging_strategy="no", **knobs)
        trainer = GradientDecayTrainer(make_model("llama"), arguments, train_dataset=make_data("llama"))  # tries it
        with Waits(monkeypatch) as waits:
            trainer.train()
        found[fused] = waits.found
        assert trainer.compute_loss_func.calls == 8
    assert found[True] == found[False] and set(found[True]) <= {"hf.py: compute_loss"}


def test_waiting_is_found(tmp_path, monkeypatch):
    with Waits(monkeypatch) as waits:
        steps(tmp_path, logging_strategy="steps", logging_steps=2)
    assert waits.found == {"hf_loss.py: pop_cross_entropy": 4}
    for wait in (lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], lambda x: x.tolist()):

        def loss(input, *args, wait=wait, **kwargs):
            wait(input.detach())
            return gradient_decay_cross_entropy(input, *args, **kwargs)

        monkeypatch.setattr("gd_plugin.hf_loss.gradient_decay_cross_entropy", loss)
        with Waits(monkeypatch) as waits:
            steps(tmp_path, logging_strategy="no")
        assert sum(waits.found.values()) == 8, wait


@pytest.mark.slow
def test_a_changing_beta_compiles_nothing_anew(tmp_path):
    """A thousand updates of a compiled model, each with another beta."""
    from torch._dynamo.utils import counters

    class Watch(TrainerCallback):
        graphs, betas = [], set()

        def on_step_end(self, args, state, control, **kwargs):
            self.graphs.append(counters["stats"]["unique_graphs"])
            self.betas.add(trainer.compute_loss_func.loss.beta.item())

    torch._dynamo.reset()
    counters.clear()
    watch = Watch()
    arguments = make_arguments(
        tmp_path, max_steps=1000, torch_compile=True, torch_compile_backend="eager", logging_strategy="no", **WARMUP
    )
    trainer = GradientDecayTrainer(make_model("vit"), arguments, train_dataset=make_data("vit"), callbacks=[watch])
    loss = trainer.compute_loss_func
    loss.compute = torch.compile(loss.compute, backend="eager")  # the loss too, which the Trainer does not compile
    trainer.train()
    assert len(watch.betas) > 990 and watch.graphs[-1] > 0
    assert watch.graphs[-1] == watch.graphs[20]

    torch._dynamo.reset()
    counters.clear()
    control = torch.compile(gradient_decay_cross_entropy, backend="eager", dynamic=False)
    for i in range(1, 5):  # as a Python number it is part of the graph
        control(torch.zeros(2, 3), torch.tensor([0, 1]), float(i))
    assert counters["stats"]["unique_graphs"] >= 3
    torch._dynamo.reset()


@pytest.mark.gpu
def test_nothing_waits_for_a_gpu(tmp_path):
    logits = torch.randn(64, 1000, device="cuda", requires_grad=True)
    target = torch.randint(1000, (64,), device="cuda")
    beta, weight = torch.tensor(5.0, device="cuda"), torch.rand(1000, device="cuda")
    head = torch.randn(1000, 1000, device="cuda", requires_grad=True)

    def losses():
        for smoothing in (0.0, 0.1):
            gradient_decay_cross_entropy(logits, target, beta, weight, label_smoothing=smoothing).backward()
            linear_gradient_decay_cross_entropy(
                logits, head, target, beta, weight=weight, label_smoothing=smoothing
            ).backward()

    losses()  # what is done once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses()
        with pytest.raises(RuntimeError):
            logits.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
