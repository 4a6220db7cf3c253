"""Evaluation: plain cross-entropy and calibration metrics whatever beta is, and no logits are kept for them."""

import pytest
import torch
import torch.nn.functional as F
import transformers.trainer
from hf_models import CLASSES, LANGUAGE_MODELS, METRICS, WAYS, as_batch, make_data, make_model
from transformers.trainer_pt_utils import EvalLoopContainer

from gd_plugin.functional import gradient_decay_cross_entropy
from gd_plugin.metrics import classification_metrics

TRAINED = dict(max_steps=5, learning_rate=0.3)
KNOBS = dict(beta=0.01)


def all_logits(model, samples):
    batch = as_batch(samples)
    labels = batch.pop("labels")
    with torch.no_grad():
        return model.eval()(**batch).logits, labels


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "gd", [dict(beta=0.01), dict(beta=20.0), dict(beta=5.0, class_weights=[0.1, 3.0, 1.0, 0.5, 2.0])], ids=str
)
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_eval_loss_is_plain_cross_entropy(way, gd, soft, tmp_path):
    """Over several batches with a short one at the end; neither beta nor class weights nor smoothing count."""
    data = make_data("bert", 27, seed=1, soft=soft)
    arguments = TRAINED | dict(label_smoothing_factor=0.1)
    trainer = WAYS[way](make_model("bert"), tmp_path, gd, arguments, train_dataset=make_data("bert", soft=soft))
    trainer.train()
    found = trainer.evaluate(data)["eval_loss"]
    logits, labels = all_logits(trainer.model, data)
    assert found == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert abs(gradient_decay_cross_entropy(logits, labels, gd["beta"]).item() - found) > 0.1
    assert trainer.evaluate(data)["eval_loss"] == found


@pytest.mark.parametrize("way", ["subclass", "mixin"])
@pytest.mark.parametrize("name", ["bert", "vit", "tokens", "choices"])
def test_metrics_are_those_of_all_logits_at_once(way, name, tmp_path):
    """Ignored labels of a token classifier included; a second evaluation starts from nothing."""
    trainer = WAYS[way](make_model(name), tmp_path, KNOBS, TRAINED, train_dataset=make_data(name))
    trainer.train()
    data = make_data(name, 27, seed=1)
    logits, labels = all_logits(trainer.model, data)
    for samples in (data, data[:11], data):
        expected = classification_metrics(logits[: len(samples)], labels[: len(samples)])
        found = trainer.evaluate(samples)
        assert {k: found[k] for k in METRICS} == pytest.approx({f"eval_{k}": v for k, v in expected.items()}, abs=1e-6)
        counted = (labels[: len(samples)] != -100).sum().item()
        assert sum(b["count"] for b in trainer.reliability) == counted
        assert len(trainer.reliability) == 15
    # The first 11 samples are something else than all of them.
    assert classification_metrics(logits[:11], labels[:11])["nll"] != pytest.approx(expected["nll"], abs=1e-3)

    predicted = trainer.predict(data)
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits)
    assert predicted.metrics["test_nll"] == pytest.approx(expected["nll"], abs=1e-6)


def test_an_interrupted_evaluation_leaves_nothing_behind(tmp_path):
    data = make_data("bert", 20)
    trainer = WAYS["subclass"](make_model("bert"), tmp_path, {}, {})
    expected = trainer.evaluate(data)

    class Broken(list):
        def __getitem__(self, i):
            if i == 17:
                raise OSError("disk")
            return super().__getitem__(i)

    with pytest.raises(OSError, match="disk"):
        trainer.evaluate(Broken(data))
    again = trainer.evaluate(data)
    assert {k: again[k] for k in METRICS} == {k: expected[k] for k in METRICS}
    assert sum(b["count"] for b in trainer.reliability) == 20


def test_evaluation_during_training_does_not_disturb_it(tmp_path):
    ends = []
    for strategy in ("no", "steps"):
        trainer = WAYS["subclass"](
            make_model("bert"),
            tmp_path,
            KNOBS | dict(class_weights=[0.1, 3.0, 1.0, 0.5, 2.0]),
            TRAINED | dict(eval_strategy=strategy, eval_steps=2),
            train_dataset=make_data("bert"),
            eval_dataset=make_data("bert", 11, seed=1),
        )
        trainer.train()
        ends.append([list(trainer.model.parameters()), [e for e in trainer.state.log_history if "loss" in e]])
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    keys = ("loss", "cross_entropy", "gd_beta", "grad_norm")
    assert [[e[k] for k in keys] for e in ends[0][1]] == [[e[k] for k in keys] for e in ends[1][1]]
    evaluated = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert [e["step"] for e in evaluated][:2] == [2, 4]  # newer transformers evaluate at the end as well
    assert all(set(e) >= METRICS for e in evaluated)


@pytest.fixture
def kept(monkeypatch):
    """Number of entries of everything that an evaluation puts aside."""
    sizes = []

    class Watched(EvalLoopContainer):
        def add(self, tensors):
            sizes.append(tensors.numel())
            super().add(tensors)

    monkeypatch.setattr(transformers.trainer, "EvalLoopContainer", Watched)
    return sizes


def test_evaluation_keeps_no_logits(kept, tmp_path):
    data = make_data("bert", 20)
    WAYS["subclass"](make_model("bert"), tmp_path, {}, {}).evaluate(data)
    assert sum(kept) == 20  # a loss per sample

    kept.clear()
    trainer = WAYS["subclass"](make_model("bert"), tmp_path, {}, {}, compute_metrics=lambda prediction: {})
    trainer.evaluate(data)
    assert sum(kept) == 20 + 20 * CLASSES + 20  # the user's own metrics get everything, as always


@pytest.mark.parametrize("way", WAYS)
def test_the_users_own_metrics_stay(way, tmp_path):
    def own(prediction):
        return {"own": float(prediction.predictions.shape[0])}

    trainer = WAYS[way](make_model("bert"), tmp_path, {}, {}, compute_metrics=own)
    metrics = trainer.evaluate(make_data("bert", 20))
    assert metrics["eval_own"] == 20.0
    assert not METRICS & set(metrics)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_are_not_measured_as_classifiers(name, kept, tmp_path):
    trainer = WAYS["subclass"](make_model(name), tmp_path, KNOBS, {})
    metrics = trainer.evaluate(make_data(name, 8))
    assert "eval_loss" in metrics
    assert not METRICS & set(metrics)
    assert sum(kept) == 8
    logits, labels = all_logits(trainer.model, make_data(name, 8))
    if name in ("llama", "gpt2"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_loss_only_evaluation_has_no_metrics(tmp_path):
    trainer = WAYS["subclass"](make_model("bert"), tmp_path, {}, dict(prediction_loss_only=True))
    metrics = trainer.evaluate(make_data("bert", 20))
    assert "eval_loss" in metrics
    assert not METRICS & set(metrics)


def test_the_best_model_can_be_chosen_by_calibration(tmp_path):
    trainer = WAYS["subclass"](
        make_model("bert"),
        tmp_path,
        KNOBS,
        TRAINED
        | dict(
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="ece",
            greater_is_better=False,
        ),
        train_dataset=make_data("bert"),
        eval_dataset=make_data("bert", 27, seed=1),
    )
    trainer.train()
    calibration = [e["eval_ece"] for e in trainer.state.log_history if "eval_ece" in e]
    assert trainer.state.best_metric == min(calibration) < max(calibration)
    assert trainer.evaluate()["eval_ece"] == pytest.approx(min(calibration), abs=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_prediction_without_labels(way, tmp_path):
    data = [{"input_ids": s["input_ids"]} for s in make_data("bert", 11)]
    trainer = WAYS[way](make_model("bert"), tmp_path, {}, {})
    predicted = trainer.predict(data)
    assert predicted.predictions.shape == (11, CLASSES)
    assert predicted.label_ids is None
    assert "test_loss" not in predicted.metrics
