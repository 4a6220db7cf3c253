"""What a training logs: beta and the plain cross-entropy beside every loss, without waiting for the device."""

import math

import pytest
import torch
import torch.nn.functional as F
from hf_models import CLASSES, WAYS, as_batch, bound_loss, make_arguments, make_data, make_model
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from gd_plugin.config import GradientDecayConfig
from gd_plugin.functional import gradient_decay_cross_entropy
from gd_plugin.hf import GradientDecayCallback, GradientDecayLossFunc, GradientDecayTrainer

EPOCH = dict(per_device_train_batch_size=3, num_train_epochs=2.0)
FROZEN = dict(learning_rate=0.0)  # so that the logits of an epoch can be computed at its end


class Reporter(TrainerCallback):
    """What TensorBoard and the others see."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("way", WAYS)
def test_every_training_log_has_beta_and_cross_entropy(way, tmp_path):
    reporter = Reporter()
    data = make_data("bert", 16)
    trainer = WAYS[way](
        make_model("bert"),
        tmp_path,
        dict(beta=5.0, beta_start=1.0, warmup_steps=4),
        dict(max_steps=7, logging_steps=2, logging_first_step=True, eval_strategy="steps", eval_steps=3),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[reporter],
    )
    trainer.train()
    logs = {e["step"]: e for e in trainer.state.log_history if "loss" in e}
    # beta of the update just made: update k starts with k - 1 made.
    assert [(step, logs[step]["gd_beta"]) for step in (1, 2, 4, 6)] == [(1, 1.0), (2, 2.0), (4, 4.0), (6, 5.0)]
    assert all(0 < log["cross_entropy"] < 5 for log in logs.values())
    for key in ("gd_beta", "cross_entropy"):
        assert not any(key in e for e in trainer.state.log_history if "loss" not in e)  # evaluations, the summary
        assert [e[key] for e in reporter.seen if "loss" in e] == [log[key] for log in logs.values()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("bert", {}), ("tokens", {}), ("llama", {}), ("tokens", dict(gradient_accumulation_steps=2))],
    ids=["bert", "tokens", "llama", "accumulated"],
)
def test_the_logged_numbers_are_those_of_the_interval(way, name, arguments, tmp_path):
    """Every epoch sees all samples once, in some order: the mean over its targets can be computed apart."""
    data, model = make_data(name, 12), make_model(name)
    updates = 4 // arguments.get("gradient_accumulation_steps", 1)
    arguments = EPOCH | FROZEN | arguments | dict(logging_steps=updates, label_smoothing_factor=0.1)
    trainer = WAYS[way](model, tmp_path, dict(beta=0.1), arguments, train_dataset=data)
    trainer.train()

    batch = as_batch(data)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    if name == "llama":
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.flatten(0, -2), labels.flatten()
    expected = F.cross_entropy(logits, labels).item()
    found = [e["cross_entropy"] for e in trainer.state.log_history if "loss" in e]
    assert found == pytest.approx([expected, expected], rel=1e-5)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    j = gradient_decay_cross_entropy(logits, labels, 0.1, label_smoothing=0.1).item()
    if name == "bert":  # elsewhere the Trainer averages updates of unequal numbers of targets
        assert losses == pytest.approx([j, j], rel=1e-5)
    assert all(abs(loss - expected) > 0.01 for loss in losses)


def fitted():
    """A linear classifier that is right and sure about every sample."""
    model = nn.Linear(CLASSES, CLASSES, bias=False)
    with torch.no_grad():
        model.weight.copy_(8 * torch.eye(CLASSES))

    class Fitted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = model

        def forward(self, x):
            return (self.head(x),)

    return Fitted(), [{"x": torch.eye(CLASSES)[i % CLASSES], "target": torch.tensor(i % CLASSES)} for i in range(16)]


@pytest.mark.parametrize("beta", [0.01, 1.0, 100.0])
def test_the_loss_of_a_fitted_model_tends_to_log_beta(beta, tmp_path):
    """Negative for beta < 1, which is why the cross-entropy stands beside it."""
    model, data = fitted()
    arguments = FROZEN | dict(max_steps=1, label_names=["target"], remove_unused_columns=False)
    trainer = WAYS["subclass"](model, tmp_path, dict(beta=beta), arguments, train_dataset=data)
    trainer.train()
    [log] = [e for e in trainer.state.log_history if "loss" in e]
    assert 0 < log["cross_entropy"] < 0.01
    assert log["loss"] == pytest.approx(math.log(beta), abs=0.2)
    assert (log["loss"] < 0) is (beta < 1)


def on_meta(loss):
    """The same loss function on a device that has no values: whoever asks for one gets an error."""
    loss.loss.to("meta")
    loss._cross_entropy = loss._cross_entropy.to("meta")
    return loss


def step(loss, target, num_items):
    logits = torch.randn(4, CLASSES, device="meta", requires_grad=True)
    loss((logits,), target, num_items).backward()
    with torch.no_grad():
        loss((logits,), target, num_items)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("gd", [{}, dict(beta=[0.1] * CLASSES, class_weights=[1.0] * CLASSES)], ids=["plain", "lists"])
@pytest.mark.parametrize("counted", [False, True])
def test_the_loss_does_not_wait_for_the_device(soft, gd, counted, tmp_path):
    loss = on_meta(bound_loss(nn.Linear(1, 1), tmp_path, **gd))
    loss.loss.label_smoothing = 0.1
    target = torch.empty(4, CLASSES, device="meta") if soft else torch.empty(4, dtype=torch.long, device="meta")
    step(loss, target, torch.empty((), dtype=torch.long, device="meta") if counted else None)


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, bool, float]
)
def test_a_loss_that_waits_is_found(read, tmp_path):
    class Reading(GradientDecayLossFunc):
        def __call__(self, *args):
            value = super().__call__(*args)
            read(value.detach())
            return value

    loss = Reading(GradientDecayConfig())
    loss.bind(nn.Linear(1, 1), make_arguments(tmp_path))
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="meta"):
        step(on_meta(loss), torch.empty(4, dtype=torch.long, device="meta"), None)


def test_the_callback_does_not_wait_for_the_device(tmp_path):
    loss = bound_loss(nn.Linear(1, 1), tmp_path, beta=5.0, beta_start=0.1, warmup_steps=3)
    callback, arguments = GradientDecayCallback(loss), make_arguments(tmp_path)
    state = TrainerState(max_steps=6)
    callback.on_train_begin(arguments, state, TrainerControl(), model=nn.Linear(1, 1), train_dataloader=[0] * 6)
    on_meta(loss)
    for state.global_step in range(6):
        callback.on_step_begin(arguments, state, TrainerControl())
        assert loss.loss.beta.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        loss.pop_cross_entropy()  # only a logging step waits


@pytest.mark.parametrize("class_weights", [None, [1.0, 2.0, 3.0, 4.0, 5.0]])
@pytest.mark.parametrize("name", ["tokens", "gpt2"])
def test_counting_the_labels_does_not_wait_for_the_device(name, class_weights, tmp_path):
    if class_weights and name == "gpt2":
        class_weights = [1.0] * make_model(name).config.vocab_size
    arguments = make_arguments(tmp_path, gd_class_weights=class_weights)
    trainer = GradientDecayTrainer(make_model(name), arguments)
    on_meta(trainer.compute_loss_func)
    batches = [{"labels": torch.empty(4, 8, dtype=torch.long, device="meta")}] * 2
    count = trainer._get_num_items_in_batch(batches, torch.device("meta"))
    assert count.numel() == 1 and count.device.type == "meta"
