"""Class probabilities, class weights, smoothed labels, labels of another name; and models that return tuples."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_models import CLASSES, WAYS, MeanOfMeans, as_batch, bound_loss, make_data, make_model, train_logs
from torch import nn

from gd_plugin.functional import gradient_decay_cross_entropy

WEIGHTS = [0.1, 3.0, 1.0, 0.5, 2.0]
CUSTOM = dict(label_names=["target"], remove_unused_columns=False)
# One update of all 12 samples, cut into unequal micro-batches: 5 + 5 + 2.
ACCUMULATED = dict(max_steps=1, per_device_train_batch_size=5, gradient_accumulation_steps=3)


def confident(name):
    """A model whose predictions are far from uniform, so that targets make a difference."""
    model = make_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if len(parameter) == CLASSES:
                parameter *= 3 if name == "custom" else 50
    return model


def first_update(name, path, gd, arguments, way="subclass", soft=False, **kwargs):
    """The loss that is logged for the first update, with the logits and labels that it was made of."""
    model, data = confident(name), make_data(name, 12, soft=soft)
    batch = as_batch(data)
    labels = batch.pop("target" if name == "custom" else "labels")
    with torch.no_grad():
        logits = model(**batch)
    logits = logits[0] if isinstance(logits, tuple) else logits.logits
    trainer = WAYS[way](model, path, gd, ACCUMULATED | arguments, train_dataset=data, **kwargs)
    trainer.train()
    [(loss, cross_entropy)] = train_logs(trainer, "loss", "cross_entropy")
    return loss, cross_entropy, logits, labels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beta", [1.0, 0.1, 5.0])
def test_class_probabilities(way, beta, tmp_path):
    loss, cross_entropy, logits, q = first_update("bert", tmp_path, dict(beta=beta), {}, way, soft=True)
    expected = F.cross_entropy(logits, q).item()
    assert loss == pytest.approx(gradient_decay_cross_entropy(logits, q, beta).item(), rel=1e-5)
    assert cross_entropy == pytest.approx(expected, rel=1e-5)
    assert (loss == pytest.approx(expected, rel=1e-5)) is (beta == 1.0)
    # What dividing by the number of entries of the labels would give.
    assert loss != pytest.approx(gradient_decay_cross_entropy(logits, q, beta).item() / CLASSES, rel=0.1)


@pytest.mark.parametrize("name", ["bert", "tokens", "vit", "custom"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_are_averaged_over_the_whole_update(name, smoothing, tmp_path):
    arguments = CUSTOM if name == "custom" else dict(label_smoothing_factor=smoothing)
    smoothing = 0.0 if name == "custom" else smoothing  # the Trainer's own smoother needs a model with a configuration
    loss, cross_entropy, logits, labels = first_update(name, tmp_path, dict(class_weights=WEIGHTS), arguments)

    logits, labels = logits.flatten(0, -2), labels.flatten()
    weighted = F.cross_entropy(logits, labels, weight=torch.tensor(WEIGHTS), label_smoothing=smoothing).item()
    assert loss == pytest.approx(weighted, rel=1e-5)
    assert cross_entropy == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    wrong = first_update(name, tmp_path, dict(class_weights=WEIGHTS), arguments, kind=MeanOfMeans)
    assert abs(wrong[0] - weighted) > 1e-3
    assert wrong[1] == pytest.approx(cross_entropy, rel=1e-5)  # the plain one has nothing to do with it


def test_class_weights_of_an_ordinary_trainer_are_divided_by_the_number_of_labels(tmp_path):
    loss, _, logits, labels = first_update("bert", tmp_path, dict(class_weights=WEIGHTS), {}, "callback")
    summed = F.cross_entropy(logits, labels, weight=torch.tensor(WEIGHTS), reduction="sum").item()
    assert loss == pytest.approx(summed / len(labels), rel=1e-5)
    assert loss != pytest.approx(summed / torch.tensor(WEIGHTS)[labels].sum().item(), rel=1e-3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["bert", "tokens"])
def test_label_smoothing_is_honoured_in_training_only(way, name, tmp_path):
    smoothed = dict(label_smoothing_factor=0.3)
    loss, cross_entropy, logits, labels = first_update(name, tmp_path, {}, smoothed, way)
    logits, labels = logits.flatten(0, -2), labels.flatten()
    plain = F.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(F.cross_entropy(logits, labels, label_smoothing=0.3).item(), rel=1e-5)
    assert cross_entropy == pytest.approx(plain, rel=1e-5)
    assert abs(loss - plain) > 1e-3

    evaluated = WAYS[way](confident(name), tmp_path, {}, dict(per_device_eval_batch_size=16) | smoothed)
    assert evaluated.evaluate(make_data(name, 12))["eval_loss"] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_another_label_key_than_labels(soft, beta, tmp_path):
    loss, cross_entropy, logits, target = first_update("custom", tmp_path, dict(beta=beta), CUSTOM, soft=soft)
    assert loss == pytest.approx(gradient_decay_cross_entropy(logits, target, beta).item(), rel=1e-5)
    assert cross_entropy == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert (loss == pytest.approx(cross_entropy, rel=1e-5)) is (beta == 1.0)


def test_models_are_called_without_the_labels(tmp_path):
    """Under any name: a forward that takes its inputs only must do, in training, evaluation and prediction."""

    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x):
            return (self.head(x),)

    data = make_data("custom", 12)
    trainer = WAYS["subclass"](Strict(), tmp_path, {}, CUSTOM, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_nll"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    assert set(data[0]) == {"x", "target"}  # nobody touched the samples


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert", dict(return_dict=False)),
        ("roberta", dict(return_dict=False)),
        ("custom", {}),
        ("custom", dict(as_tuple=False)),
    ],
    ids=["bert", "roberta", "tuple", "tensor"],
)
def test_models_that_return_tuples_train_and_predict(name, config, tmp_path):
    model, data, arguments = make_model(name, **config), make_data(name, 9), CUSTOM if name == "custom" else {}
    trainer = WAYS["subclass"](model, tmp_path, dict(beta=0.1), arguments, train_dataset=data)
    trainer.train()
    batch = as_batch(data)
    labels = batch.pop("target" if name == "custom" else "labels")
    with torch.no_grad():
        outputs = model.eval()(**batch)
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs[0]

    predicted = trainer.predict(data)  # a batch of 8 and one of 1
    found = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    torch.testing.assert_close(torch.from_numpy(found), logits)
    assert np.array_equal(predicted.label_ids, labels.numpy())
    assert predicted.metrics["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert predicted.metrics["test_nll"] == pytest.approx(predicted.metrics["test_loss"], rel=1e-5)


def test_the_loss_without_a_trainers_count_is_the_mean_of_the_batch(tmp_path):
    """As in a loop of one's own; the logged cross-entropy follows."""
    logits, labels = torch.randn(7, CLASSES, requires_grad=True), torch.tensor([0, 1, -100, 4, 2, -100, 1])
    loss = bound_loss(nn.Linear(1, 1), tmp_path, class_weights=WEIGHTS)
    expected = F.cross_entropy(logits, labels, weight=torch.tensor(WEIGHTS))
    torch.testing.assert_close(loss((logits,), labels), expected)
    assert loss.pop_cross_entropy() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert np.isnan(loss.pop_cross_entropy())  # nothing since
