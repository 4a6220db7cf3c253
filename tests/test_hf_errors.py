"""What goes wrong is said in one line, with what to do, before the first update."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hf_models import CLASSES, WAYS, MixedTrainer, TupleClassifier, make_arguments, make_data, make_model
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    HfArgumentParser,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from gd_plugin.config import GradientDecayConfig
from gd_plugin.hf import (
    GradientDecayCallback,
    GradientDecayLossFunc,
    GradientDecayTrainer,
    GradientDecayTrainingArguments,
)

BAD_ARGUMENTS = {
    "gd_beta must be greater than 0, got 0.0": dict(gd_beta=0.0),
    "gd_beta must be greater than 0, got -1.0": dict(gd_beta=[1.0, -1.0]),
    "gd_beta must be finite, got inf": dict(gd_beta=float("inf")),
    "gd_beta_start is 0.1 but the warm-up has no length; set gd_warmup_ratio": dict(gd_beta_start=0.1),
    "gd_beta_start must be greater than 0": dict(gd_beta_start=0.0, gd_warmup_ratio=0.5),
    "gd_beta_start has 2 values for 3 classes": dict(
        gd_beta=[1.0, 2.0, 3.0], gd_beta_start=[1.0, 2.0], gd_warmup_steps=3
    ),
    "gd_warmup_ratio is 0.5 but gd_beta_start is not set": dict(gd_warmup_ratio=0.5),
    "gd_warmup_ratio must be in": dict(gd_beta_start=0.1, gd_warmup_ratio=2.0),
    "gd_warmup_steps must not be negative": dict(gd_beta_start=0.1, gd_warmup_steps=-1),
    "gd_warmup_steps and gd_warmup_ratio both set": dict(gd_beta_start=0.1, gd_warmup_ratio=0.1, gd_warmup_steps=3),
    "gd_schedule must be one of constant, linear": dict(gd_schedule="quadratic"),
    "gd_class_weights must not be negative": dict(gd_class_weights=[1.0, -1.0]),
    "gd_class_weights are all 0": dict(gd_class_weights=[0.0, 0.0]),
}


def message_of(error, kind=ValueError):
    text = str(error.value)
    assert type(error.value) is kind
    assert "\n" not in text and len(text) > 30
    return text


def as_flags(values):
    for name, value in values.items():
        yield f"--{name}"
        yield from map(str, value if isinstance(value, list) else [value])


@pytest.mark.parametrize("start", BAD_ARGUMENTS)
def test_bad_arguments(start, tmp_path):
    values = BAD_ARGUMENTS[start]
    with pytest.raises(ValueError) as direct:
        make_arguments(tmp_path, **values)
    assert message_of(direct).startswith(start)

    parser = HfArgumentParser(GradientDecayTrainingArguments)
    with pytest.raises(ValueError) as parsed:
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", "true", *as_flags(values)])
    assert message_of(parsed) == message_of(direct)
    with pytest.raises(ValueError) as from_dict:
        parser.parse_dict({"output_dir": str(tmp_path), "use_cpu": True} | values)
    assert message_of(from_dict) == message_of(direct)


def test_text_where_yaml_should_have_a_number(tmp_path):
    with pytest.raises(ValueError, match=r"^gd_beta must be a number, got the text '1e-3' \(YAML reads 1e-3 as text"):
        HfArgumentParser(GradientDecayTrainingArguments).parse_dict({"output_dir": str(tmp_path), "gd_beta": "1e-3"})


@pytest.mark.parametrize("way", ["subclass", "mixin"])
@pytest.mark.parametrize(
    "gd",
    [
        dict(beta=[1.0, 2.0]),
        dict(beta_start=[1.0, 2.0], warmup_steps=1),
        dict(class_weights=[1.0] * (CLASSES + 1)),
    ],
    ids=["beta", "beta_start", "class_weights"],
)
def test_lists_of_another_length_than_the_classes(way, gd, tmp_path):
    name, values = next(iter(gd.items()))
    with pytest.raises(ValueError) as error:
        WAYS[way](make_model("bert"), tmp_path, gd, {})
    assert message_of(error).startswith(f"gd_{name} has {len(values)} values for {CLASSES} classes")
    WAYS[way](make_model("bert", num_labels=len(values)), tmp_path, gd, {})


# What a Trainer refuses when it is made: (model, training arguments, text).
REFUSED = {
    "multi-label": ("bert", dict(problem_type="multi_label_classification"), {}, "problem_type is 'multi_label_class"),
    "regression": ("bert", dict(problem_type="regression"), {}, "problem_type is 'regression': the gradient-decay"),
    "one label": ("bert", dict(num_labels=1), {}, "the model has num_labels=1 (regression)"),
    "two label names": ("bert", {}, dict(label_names=["a", "b"]), "the gradient-decay loss needs exactly one label c"),
    "no label name": ("custom", {}, {}, "TupleClassifier takes no labels: load the model with a head"),
}


@pytest.mark.parametrize("way", ["subclass", "mixin"])
@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_softmax_over_one_label(way, name, tmp_path):
    model, config, arguments, text = REFUSED[name]
    with pytest.raises(ValueError) as error:
        WAYS[way](make_model(model, **config), tmp_path, {}, arguments)
    assert message_of(error).startswith(text)


def test_question_answering(tmp_path):
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError) as error:
        GradientDecayTrainer(BertForQuestionAnswering(config), make_arguments(tmp_path))
    assert "this model has ['start_positions', 'end_positions']" in message_of(error)


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (SegformerConfig(), SegformerForSemanticSegmentation),
        (Wav2Vec2Config(num_hidden_layers=1, hidden_size=48), Wav2Vec2ForCTC),
    ],
)
def test_models_of_another_kind_of_loss(config, model, tmp_path):
    with pytest.raises(ValueError) as error:
        GradientDecayTrainer(model(config), make_arguments(tmp_path))
    text = f"{model.__name__} has a loss of another kind: the gradient-decay loss is for classifiers"
    assert message_of(error).startswith(text)


def test_ligers_own_loss(tmp_path):
    """Refused for language models, whose logits it withholds; its other kernels are not our business."""
    arguments = make_arguments(tmp_path)
    arguments.use_liger_kernel = True  # the flag itself asks for the package at once
    with pytest.raises((ValueError, ImportError)) as error:  # 5.0 asks for the package first
        GradientDecayTrainer(make_model("llama"), arguments)
    if error.type is ImportError:
        return
    assert message_of(error).startswith("use_liger_kernel puts its own loss into the model")
    arguments.liger_kernel_config = {"fused_linear_cross_entropy": False}
    GradientDecayTrainer(make_model("llama"), arguments)
    arguments.liger_kernel_config = None
    GradientDecayTrainer(make_model("bert"), arguments)


def test_a_second_loss_function(tmp_path):
    with pytest.raises(ValueError) as error:
        WAYS["subclass"](make_model("bert"), tmp_path, {}, {}, compute_loss_func=lambda outputs, labels, **_: 0)
    assert message_of(error) == "compute_loss_func is set, and so is the gradient-decay loss; remove one of them"


def test_no_configuration(tmp_path):
    with pytest.raises(ValueError) as error:
        MixedTrainer(make_model("bert"), make_arguments(tmp_path, TrainingArguments))
    assert message_of(error).startswith("no gradient-decay configuration: use GradientDecayTrainingArguments, or")


def test_the_configuration_given_wins_over_that_of_the_arguments(tmp_path):
    arguments = make_arguments(tmp_path, gd_beta=2.0)
    assert GradientDecayTrainer(make_model("bert"), arguments).gd_config.beta == 2.0
    config = GradientDecayConfig(beta=3.0)
    assert GradientDecayTrainer(make_model("bert"), arguments, gd_config=config).gd_config is config


@pytest.mark.parametrize("way", WAYS)
def test_several_gpus_in_one_process(way, tmp_path):
    arguments = make_arguments(tmp_path, TrainingArguments)
    arguments._n_gpu = 2  # what torch.cuda.device_count() would say
    loss = GradientDecayLossFunc(GradientDecayConfig())
    with pytest.raises(ValueError) as error:
        if way == "callback":
            callbacks = [GradientDecayCallback(loss)]
            Trainer(make_model("bert"), arguments, compute_loss_func=loss, callbacks=callbacks)
        else:
            kind = GradientDecayTrainer if way == "subclass" else MixedTrainer
            kind(make_model("bert"), arguments, gd_config=GradientDecayConfig())
    assert message_of(error).startswith("2 GPUs in one process (DataParallel) would make the loss 2 times too large")


def test_one_count_per_gpu(tmp_path):
    """What DataParallel would pass, should it come that far."""
    loss = GradientDecayLossFunc(GradientDecayConfig())
    loss.bind(nn.Linear(1, 1), make_arguments(tmp_path))
    logits, labels = torch.randn(4, CLASSES), torch.arange(4)
    with pytest.raises(ValueError) as error:
        loss((logits,), labels, torch.tensor([[4], [4]]))
    assert message_of(error).startswith("2 GPUs in one process")
    expected = F.cross_entropy(logits, labels).item()
    assert loss((logits,), labels, torch.tensor([4])).item() == pytest.approx(expected, rel=1e-6)


def untrained(trainer, kind=ValueError):
    """The message with which a training ends, which must be before its first update."""
    start = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(kind) as error:
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.model.parameters(), strict=True))
    return message_of(error, kind)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("gd", "arguments", "text"),
    [
        (dict(warmup_steps=4), dict(max_steps=3), "gd_warmup_steps is 4, 4 updates, but training has only 3; lower"),
        (dict(warmup_epochs=2.5), dict(num_train_epochs=2.0), "gd_warmup_epochs is 2.5, 5 updates, but training has"),
    ],
    ids=["steps", "epochs"],
)
def test_a_warmup_longer_than_the_training(way, gd, arguments, text, tmp_path):
    data = make_data("bert", 16)
    trainer = WAYS[way](make_model("bert"), tmp_path, gd | dict(beta_start=0.1), arguments, train_dataset=data)
    assert untrained(trainer).startswith(text)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["bert", "tokens", "llama"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_labels(way, name, weighted, tmp_path):
    data = [{"input_ids": s["input_ids"]} for s in make_data(name)]
    gd = dict(class_weights=[1.0] * (32 if name == "llama" else CLASSES)) if weighted else {}
    trainer = WAYS[way](make_model(name), tmp_path, gd, {}, train_dataset=data)
    assert untrained(trainer).startswith("the batch has no labels: the gradient-decay loss needs a column 'labels'")


@pytest.mark.parametrize("way", ["subclass", "mixin"])
@pytest.mark.parametrize("label", [CLASSES, -1, 255])
@pytest.mark.parametrize("name", ["bert", "tokens", "vit"])
def test_labels_outside_the_classes(way, name, label, tmp_path):
    data = make_data(name)
    data[3]["labels"] = torch.full_like(data[3]["labels"], label)
    trainer = WAYS[way](make_model(name), tmp_path, {}, {}, train_dataset=data, eval_dataset=data)
    text = f"label {label} is outside the model's {CLASSES} classes (0 to {CLASSES - 1}; -100 is ignored)"
    assert untrained(trainer).startswith(text)
    with pytest.raises(ValueError, match="is outside the model's"):
        trainer.evaluate()


def test_ignored_labels_are_not_outside_the_classes(tmp_path):
    data = make_data("bert")
    data[3]["labels"] = torch.tensor(-100)
    trainer = WAYS["subclass"](make_model("bert"), tmp_path, {}, {}, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_loss_function_without_its_callback(tmp_path):
    loss = GradientDecayLossFunc(GradientDecayConfig())
    arguments = make_arguments(tmp_path, TrainingArguments)
    trainer = Trainer(make_model("bert"), arguments, compute_loss_func=loss, train_dataset=make_data("bert"))
    text = untrained(trainer, RuntimeError)
    assert "pass callbacks=[GradientDecayCallback(loss)] to the Trainer together with compute_loss_func=loss" in text

    trainer.add_callback(GradientDecayCallback(loss))  # late, but before the training
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_model_without_logits(tmp_path):
    class Headless(TupleClassifier):
        def forward(self, x):
            return {"hidden": self.hidden(x)}

    arguments = dict(label_names=["target"], remove_unused_columns=False)
    trainer = WAYS["subclass"](Headless(), tmp_path, {}, arguments, train_dataset=make_data("custom"))
    assert untrained(trainer) == "the model returned no 'logits', only hidden"


def test_processes_that_would_wait_for_each_other(tmp_path, monkeypatch):
    """One has an update more than the other, and the first evaluation of an epoch would never end."""
    monkeypatch.setattr("gd_plugin.hf_callback.gather", lambda tensor: torch.cat([tensor, tensor - 1]))
    monkeypatch.setattr(GradientDecayTrainingArguments, "world_size", property(lambda self: 2))

    def begin(**more):
        arguments = make_arguments(tmp_path, num_train_epochs=2, **more)
        loss = GradientDecayLossFunc(GradientDecayConfig())
        callback = GradientDecayCallback(loss)
        callback.on_train_begin(
            arguments, SimpleNamespace(max_steps=4, global_step=0), None, make_model("bert"), [0, 1]
        )

    begin(eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="the processes have 1 to 2 updates an epoch, and would wait for each other"):
        begin(eval_strategy="epoch")
