"""One update of 8 samples and one of 4 x 2 accumulated samples are the same update, whatever the labels look like."""

import pytest
import torch
from hf_models import (
    WAYS,
    MeanOfMeans,
    SumOfMeans,
    distance,
    make_arguments,
    make_data,
    make_model,
    train_logs,
    weights,
)
from transformers import Trainer, TrainingArguments

from gd_plugin.hf import GradientDecayTrainer

CLASS_WEIGHTS = dict(class_weights=[0.1, 3.0, 1.0, 0.5, 2.0])
CUSTOM = dict(label_names=["target"], remove_unused_columns=False)

# scenario: (model, gradient-decay knobs, training arguments, soft labels, whether micro-batches weigh unequally)
SCENARIOS = {
    "bert": ("bert", {}, {}, False, False),
    "roberta": ("roberta", {}, {}, False, False),
    "distilbert": ("distilbert", {}, {}, False, False),
    "modernbert": ("modernbert", {}, {}, False, False),
    "choices": ("choices", {}, {}, False, False),
    "vit": ("vit", {}, {}, False, False),
    "tokens": ("tokens", {}, {}, False, True),
    "masked": ("masked", {}, {}, False, True),
    "llama": ("llama", {}, {}, False, True),
    "gpt2": ("gpt2", {}, {}, False, True),
    "t5": ("t5", {}, {}, False, True),
    "class weights": ("bert", CLASS_WEIGHTS, {}, False, True),
    "tokens, class weights": ("tokens", CLASS_WEIGHTS, {}, False, True),
    "llama, class weights": ("llama", dict(class_weights=[0.1, 3.0] * 16), {}, False, True),
    "soft labels": ("bert", {}, {}, True, False),
    "soft labels, class weights": ("bert", CLASS_WEIGHTS, {}, True, False),
    "label smoothing": ("bert", {}, dict(label_smoothing_factor=0.2), False, False),
    "label smoothing, class weights": ("bert", CLASS_WEIGHTS, dict(label_smoothing_factor=0.2), False, True),
    "another label key": ("custom", {}, CUSTOM, False, False),
    "another label key, class weights": ("custom", CLASS_WEIGHTS, CUSTOM, False, True),
    "another label key, soft labels": ("custom", {}, CUSTOM, True, False),
    "beta per class": ("bert", dict(beta=[0.1, 0.5, 1.0, 5.0, 20.0]), {}, False, False),
}


def train(kind, name, path, batch_size, accumulation):
    model_name, gd, arguments, soft, _ = SCENARIOS[name]
    model = make_model(model_name)
    start = weights(model)
    gd = {f"gd_{key}": value for key, value in ({"beta": 0.1} | gd).items()}
    sizes = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    # 22 samples: the third update of an epoch is 6 samples, or 2 + 2 + 2.
    trainer = kind(
        model, make_arguments(path, **arguments, **sizes, **gd), train_dataset=make_data(model_name, 22, soft=soft)
    )
    trainer.train()
    return trainer, start


@pytest.mark.parametrize("name", SCENARIOS)
def test_accumulated_updates_are_the_same_updates(name, tmp_path):
    whole, start = train(GradientDecayTrainer, name, tmp_path, 8, 1)
    accumulated, _ = train(GradientDecayTrainer, name, tmp_path, 2, 4)
    assert distance(weights(accumulated.model), weights(whole.model), start) < 1e-6
    logs = [torch.tensor(train_logs(t, "loss", "cross_entropy", "grad_norm")) for t in (accumulated, whole)]
    torch.testing.assert_close(*logs, rtol=2e-6, atol=1e-6)

    for control in (SumOfMeans, MeanOfMeans) if SCENARIOS[name][-1] else (SumOfMeans,):
        wrong, _ = train(control, name, tmp_path, 2, 4)
        assert distance(weights(wrong.model), weights(whole.model), start) > 1e-3


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_the_stock_trainer_inflates_these_heads(name, tmp_path):
    """Why a fair cross-entropy baseline runs through this package with beta = 1."""
    trained = {}
    for way in ("ours", "stock"):
        for batch_size, accumulation in ((8, 1), (2, 4)):
            model, data = make_model(name), make_data(name)
            sizes = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
            if way == "stock":
                trainer = Trainer(model, make_arguments(tmp_path, TrainingArguments, **sizes), train_dataset=data)
            else:
                trainer = WAYS["subclass"](model, tmp_path, {}, sizes, train_dataset=data)
            trainer.train()
            trained[way, accumulation] = weights(model), train_logs(trainer, "loss")[0][0]

    start = weights(make_model(name))
    reference, loss = trained["stock", 1]  # without accumulation it is right
    for accumulation in (1, 4):
        assert distance(trained["ours", accumulation][0], reference, start) < 1e-6
        assert trained["ours", accumulation][1] == pytest.approx(loss, rel=1e-6)
    stock, inflated = trained["stock", 4]
    assert distance(stock, reference, start) > 0.5
    assert inflated == pytest.approx(4 * loss, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_accumulates(way, tmp_path):
    ends = []
    for sizes in ((8, 1), (2, 4)):
        model = make_model("tokens")
        sizes = dict(zip(("per_device_train_batch_size", "gradient_accumulation_steps"), sizes, strict=True))
        WAYS[way](model, tmp_path, dict(beta=0.1), sizes, train_dataset=make_data("tokens")).train()
        ends.append(weights(model))
    assert distance(*ends, weights(make_model("tokens"))) < 1e-6
