"""What happens around a training: searches, best checkpoints, collators, encoder-decoders, batches without targets."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_models import MixedTrainer, as_batch, bound_loss, make_arguments, make_data, make_model, train_logs
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast, Trainer, TrainingArguments

from gd_plugin import GradientDecayConfig
from gd_plugin.hf import GradientDecayMixin, GradientDecayTrainer, GradientDecayTrainingArguments
from gd_plugin.hf_loss import shifts_labels


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trainer_for(name, tmp_path, gd=None, data=None, **arguments):
    gd = {f"gd_{key}": value for key, value in (gd or {}).items()}
    data = make_data(name) if data is None else data
    args = make_arguments(tmp_path, **gd, **arguments)
    return GradientDecayTrainer(make_model(name), args, train_dataset=data, eval_dataset=data)


def test_a_search_over_beta_trains_with_the_beta_of_the_trial(tmp_path):
    """As `Trainer._hp_search_setup`: the new value is cast to the type of the old one and set on the arguments."""
    trainer = trainer_for("bert", tmp_path)
    trainer.args.gd_beta = type(trainer.args.gd_beta)(7.0)
    trainer.train()
    assert {beta for (beta,) in train_logs(trainer, "gd_beta")} == {7.0}
    assert trainer.gd_config.beta == 7.0


def test_a_search_minimises_the_evaluation_loss(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "hyperparameter_search", lambda self, space, objective, **_: seen.append(objective))
    trainer_for("bert", tmp_path).hyperparameter_search(n_trials=1)
    assert seen[0]({"eval_loss": 2.0, "eval_accuracy": 0.5}) == 2.0  # the Trainer's own would add them up: 2.5
    own = len
    trainer_for("bert", tmp_path).hyperparameter_search(compute_objective=own, n_trials=1)
    assert seen[1] is own


@pytest.mark.parametrize(
    ("metric", "greater"), [("ece", False), ("eval_nll", False), ("brier", False), ("accuracy", True), ("loss", False)]
)
def test_the_best_checkpoint_is_the_best(metric, greater, tmp_path):
    def make(**more):
        return GradientDecayTrainingArguments(
            str(tmp_path), load_best_model_at_end=True, eval_strategy="no", save_strategy="no",
            metric_for_best_model=metric, **more,
        )  # fmt: skip

    assert make().greater_is_better is greater
    assert make(greater_is_better=not greater).greater_is_better is not greater  # what the user says stands
    plain = TrainingArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="no", save_strategy="no", metric_for_best_model=metric
    )
    assert plain.greater_is_better is (metric != "loss")  # the Trainer alone keeps the worst ECE


def test_the_tokenizer_of_a_collator_is_saved(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1})), pad_token="[PAD]"
    )
    collator = DataCollatorWithPadding(tokenizer)
    trainer = GradientDecayTrainer(
        make_model("bert"), make_arguments(tmp_path), data_collator=collator, train_dataset=make_data("bert")
    )
    trainer.train()
    assert trainer.data_collator is collator
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out/tokenizer.json").exists()


def test_multi_label_targets_are_refused(tmp_path):
    data = [{**sample, "labels": torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])} for sample in make_data("bert")]
    with pytest.raises(ValueError, match="must be probabilities that sum to 1 over the classes"):
        trainer_for("bert", tmp_path, data=data).train()
    halves = [{**sample, "labels": torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])} for sample in make_data("bert")]
    trainer_for("bert", tmp_path, data=halves).train()


def test_probabilities_of_tokens_are_refused_for_a_causal_model(tmp_path):
    model = make_model("gpt2")
    loss, batch = bound_loss(model, tmp_path), as_batch(make_data("gpt2"))
    logits = model(batch["input_ids"]).logits
    onehot = F.one_hot(batch["labels"].clamp_min(0), logits.shape[-1]).float()
    with pytest.raises(ValueError, match="a causal language model needs token indices"):
        loss((logits,), onehot)


class FeaturesFirst(nn.Module):
    """Returns its logits after something else."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x, labels=None):
        return {"features": x, "logits": self.head(x)}


def test_metrics_are_those_of_the_logits(tmp_path):
    torch.manual_seed(0)
    data = [{"x": torch.randn(8), "labels": i % 5} for i in range(20)]
    args = make_arguments(tmp_path, remove_unused_columns=False, label_names=["labels"])
    metrics = GradientDecayTrainer(FeaturesFirst(), args, eval_dataset=data).evaluate()
    assert metrics["eval_nll"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    features = torch.stack([sample["x"] for sample in data])[:, :5]
    wrong = F.cross_entropy(features, torch.tensor([sample["labels"] for sample in data])).item()
    assert abs(metrics["eval_nll"] - wrong) > 0.01


def test_an_encoder_decoder_is_fed_with_its_labels(tmp_path):
    data = [{k: v for k, v in sample.items() if k != "decoder_input_ids"} for sample in make_data("t5")]
    assert "labels" in data[0] and len(data[0]) < len(make_data("t5")[0])
    trainer = trainer_for("t5", tmp_path, data=data)
    model, batch = trainer.model.eval(), as_batch(data)
    model.config.decoder_start_token_id = 0
    own = model(**batch).loss
    loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    unfed = model(batch["input_ids"], decoder_input_ids=batch["input_ids"][:, : batch["labels"].shape[1]]).logits
    assert (F.cross_entropy(unfed.flatten(0, 1), batch["labels"].flatten()) - own).abs() > 1e-3


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_model_is_still_known(wrap):
    assert shifts_labels(wrap(make_model("gpt2")))
    assert not shifts_labels(wrap(make_model("bert")))


def test_a_trainer_that_computes_its_own_loss_is_told(tmp_path):
    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    class Mixed(GradientDecayMixin, Own):
        pass

    args = make_arguments(tmp_path, TrainingArguments)
    trainer = Mixed(make_model("bert"), args, train_dataset=make_data("bert"), gd_config=GradientDecayConfig(beta=5.0))
    with pytest.raises(RuntimeError, match="the gradient-decay loss was never called"):
        trainer.train()
    MixedTrainer(
        make_model("bert"), args, train_dataset=make_data("bert"), gd_config=GradientDecayConfig(beta=5.0)
    ).train()


@pytest.mark.parametrize("case", ["all ignored", "all of weight 0"])
def test_an_update_without_targets_leaves_the_model_as_it_was(case, tmp_path):
    data = make_data("tokens" if case == "all ignored" else "bert")
    label = -100 if case == "all ignored" else 0
    data = [{**sample, "labels": torch.full_like(torch.as_tensor(sample["labels"]), label)} for sample in data]
    gd = {} if case == "all ignored" else {"class_weights": [0.0, 1.0, 1.0, 1.0, 1.0]}
    trainer = trainer_for("tokens" if case == "all ignored" else "bert", tmp_path, gd, data, weight_decay=0.0)
    before = weights(trainer.model).clone()
    trainer.train()
    assert torch.equal(weights(trainer.model), before)
    assert torch.isnan(F.cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100])))  # what it would have been


def test_an_evaluation_without_targets_does_not_end_training(tmp_path):
    data = [{**s, "labels": torch.full_like(torch.as_tensor(s["labels"]), -100)} for s in make_data("tokens")]
    trainer = trainer_for("tokens", tmp_path)
    assert math.isnan(trainer.evaluate(data)["eval_ece"])
    assert math.isfinite(trainer.evaluate()["eval_ece"])


def test_the_arguments_of_the_caller_are_not_changed(tmp_path):
    args = make_arguments(tmp_path)
    before = args.to_dict()
    trainer = GradientDecayTrainer(make_model("bert"), args, eval_dataset=make_data("bert"))
    trainer.evaluate()
    assert args.to_dict() == before


def test_arrays_in_the_configuration():
    config = GradientDecayConfig(beta=np.float32(5), class_weights=torch.tensor([1.0, 2.0]), beta_start=None)
    assert config == GradientDecayConfig(beta=5.0, class_weights=[1.0, 2.0])
    assert GradientDecayConfig(class_weights=np.ones(3)).class_weights == (1.0, 1.0, 1.0)
