"""`gd_fused_linear`: the loss in a language model's head, equal to that of its logits, which are never made."""

import math
from functools import partial

import pytest
import torch
from hf_models import MODELS, as_batch, distance, make_arguments, make_data, make_model, train_logs, weights
from torch import nn
from transformers import (
    BigBirdConfig,
    BigBirdForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from gd_plugin import linear
from gd_plugin.hf import GradientDecayTrainer

CAUSAL = ["llama", "gpt2"]
LOGGED = ("loss", "cross_entropy", "gd_beta", "grad_norm")
WARMUP = dict(gd_beta=5.0, gd_beta_start=0.01, gd_warmup_steps=4)
TRAINING = dict(max_steps=6, learning_rate=0.05, logging_steps=1, optim="sgd", per_device_train_batch_size=4)


def train(name, folder, fused, **more):
    arguments = make_arguments(folder, gd_fused_linear=fused, **TRAINING | WARMUP | more)
    data = make_data(name, 24)
    trainer = GradientDecayTrainer(make_model(name), arguments, train_dataset=data, eval_dataset=data)
    shapes = []
    trainer.model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    trainer.train()
    return trainer, shapes


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"gd_class_weights": torch.linspace(0.5, 2, 32).tolist()},
        {"gradient_checkpointing": True},
    ],
    ids=lambda more: "-".join(more) or "plain",
)
@pytest.mark.parametrize("name", [*CAUSAL, "masked", "t5"])
def test_it_trains_as_with_logits(name, more, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "_LOGITS_AT_ONCE", 5 * 32)  # five tokens at once
    trainers = {}
    for fused in (False, True):
        trainers[fused], shapes = train(name, tmp_path / str(fused), fused, **more)
        assert all((shape == (1, 1, 1)) == fused for shape in shapes) and len(shapes) >= 6
    plain, fused = (train_logs(trainer, *LOGGED) for trainer in trainers.values())
    assert len(plain) == 6
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    start = weights(make_model(name))
    of_plain, of_fused = (weights(trainer.model) for trainer in trainers.values())
    assert distance(of_fused, of_plain, start) <= 1e-4
    assert trainers[True].evaluate()["eval_loss"] == pytest.approx(trainers[False].evaluate()["eval_loss"], rel=1e-5)
    # Control: what the logs would be with another beta.
    other, _ = train(name, tmp_path / "other", True, **more | {"gd_beta": 4.0})
    assert abs(train_logs(other, "loss")[-1][0] - plain[-1][0]) > 1e-3
    assert distance(weights(other.model), of_plain, start) > 1e-2


@pytest.mark.parametrize("name", CAUSAL)
def test_under_autocast_in_bf16(name, tmp_path):
    fused, plain = (
        train_logs(train(name, tmp_path / str(fused), fused, bf16=True)[0], *LOGGED) for fused in (True, False)
    )
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2, abs=2e-2)


def test_fp16_gradients_have_the_scale_of_the_backward(tmp_path):
    """Of 60,000 classes most have a share below fp16's smallest number; as the Trainer scales the loss, it is above."""
    torch.manual_seed(0)
    model = MODELS["llama"][0](MODELS["llama"][1](**MODELS["llama"][2] | {"vocab_size": 60_000}))
    nn.init.normal_(model.lm_head.weight, std=1.0)
    trainer = GradientDecayTrainer(model, make_arguments(tmp_path, gd_fused_linear=True, **WARMUP))
    gradients = {}
    for way in ("logits", "fused"):
        with torch.autocast("cpu", torch.float16):
            if way == "logits":
                trainer.compute_loss_func.head, head = None, trainer.compute_loss_func.head
            loss = trainer.compute_loss(model, as_batch(make_data("llama", 4)))
            trainer.compute_loss_func.head = head
        (gradients[way],) = torch.autograd.grad(2.0**12 * loss, model.lm_head.weight)
    assert gradients["fused"].isfinite().all()
    unseen = gradients["logits"].abs() < 2.0**-24 * 2.0**12  # what would be nothing without the scale
    assert unseen.float().mean() > 0.1
    error = (gradients["fused"] - gradients["logits"]).norm() / gradients["logits"].norm()
    of_unseen = gradients["fused"][unseen], gradients["logits"][unseen]
    assert error < 1e-2 and (of_unseen[0] - of_unseen[1]).norm() < 0.05 * of_unseen[1].norm()


def test_the_gradient_of_bf16_autocast_is_as_far_from_fp32_as_that_of_the_logits(tmp_path):
    """Against the same step in fp32: what bf16 rounds, it rounds with and without the logits."""
    gradients = {}
    for way in ("fp32", "logits", "fused"):
        model = make_model("llama")
        trainer = GradientDecayTrainer(model, make_arguments(tmp_path, gd_fused_linear=way == "fused", **WARMUP))
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "fp32"):
            loss = trainer.compute_loss(model, as_batch(make_data("llama", 8)))
        gradients[way] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    logits, fused = ((gradients[way] - gradients["fp32"]).norm() for way in ("logits", "fused"))
    assert 0.2 * logits < fused < 1.5 * logits and logits > 1e-4 * gradients["fp32"].norm()


def test_two_trainers_on_one_model(tmp_path):
    """Each with its own beta: the head belongs to whoever computes a loss."""
    model = make_model("llama")
    fused, alone = (
        [
            GradientDecayTrainer(model, make_arguments(tmp_path, gd_fused_linear=flag, gd_beta=beta))
            for beta in (0.1, 5.0)
        ]
        for flag in (True, False)
    )
    alone = [trainer.compute_loss(model, as_batch(make_data("llama", 4))) for trainer in alone]
    for _ in range(2):
        losses = [trainer.compute_loss(model, as_batch(make_data("llama", 4))) for trainer in fused]
        torch.testing.assert_close(losses, alone)
    assert abs(losses[0] - losses[1]) > 0.1


def test_outputs_that_would_have_no_logits_are_refused(tmp_path):
    trainer = GradientDecayTrainer(make_model("llama"), make_arguments(tmp_path, gd_fused_linear=True))
    batch = as_batch(make_data("llama", 4))
    with pytest.raises(ValueError, match=r"gd_fused_linear: in training the logits are never made.*; leave one out"):
        trainer.compute_loss(trainer.model, batch, return_outputs=True)
    with torch.no_grad():
        _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs["logits"].shape == (*batch["input_ids"].shape, 32)


def test_a_step_whose_graph_is_kept(tmp_path):
    trainer = GradientDecayTrainer(make_model("llama"), make_arguments(tmp_path, gd_fused_linear=True, gd_beta=0.1))
    loss = trainer.compute_loss(trainer.model, as_batch(make_data("llama", 4)))
    parameters = list(trainer.model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(3 * loss, parameters)
    torch.testing.assert_close(second, tuple(3 * gradient for gradient in first))


def test_knobs_and_models_that_change_after_the_trainer_is_made(tmp_path):
    """As a search does: another beta in the arguments, another model."""
    losses = {}
    for fused in (False, True):
        arguments = make_arguments(tmp_path, gd_fused_linear=fused, **TRAINING)
        data = make_data("llama", 24)
        trainer = GradientDecayTrainer(model_init=lambda: make_model("llama"), args=arguments, train_dataset=data)
        trainer.args.gd_beta = 20.0
        trainer.train()
        losses[fused] = [value for (value,) in train_logs(trainer, "loss")]
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    plain = GradientDecayTrainer(make_model("llama"), make_arguments(tmp_path, **TRAINING), train_dataset=data)
    plain.train()
    assert abs(train_logs(plain, "loss")[0][0] - losses[True][0]) > 0.1


def test_a_head_with_hooks_is_left_alone(tmp_path):
    model = make_model("llama")
    model.lm_head.forward = model.lm_head.forward
    with pytest.raises(ValueError, match="has a forward of its own"):
        GradientDecayTrainer(model, make_arguments(tmp_path, gd_fused_linear=True), train_dataset=[])
    assert "forward" in vars(model.lm_head)


def test_evaluation_and_generation_see_logits(tmp_path):
    trainer, _ = train("llama", tmp_path, True)
    model = trainer.model.eval()
    batch = as_batch(make_data("llama", 2))
    logits = model(input_ids=batch["input_ids"]).logits
    assert logits.shape == (*batch["input_ids"].shape, 32) and "forward" not in vars(model.lm_head)
    assert model.generate(batch["input_ids"], max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2
    # What fails in the middle of a step leaves the head as it was.
    other = trainer.compute_loss_func.head.instead_of_logits(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"the model has \(2, 8\) positions and \(3, 8\) labels"), other:
        model(input_ids=batch["input_ids"])
    assert "forward" not in vars(model.lm_head)


def test_the_logits_are_never_held(tmp_path, monkeypatch):
    """Counted are the bytes of logits that autograd keeps, and the rows that are made at once."""
    kept, rows, original = {}, [], linear._linear
    monkeypatch.setattr(linear, "_LOGITS_AT_ONCE", 5 * 50_000)
    monkeypatch.setattr(linear, "_linear", lambda *args: rows.append(args[-1].shape) or original(*args))
    for fused in (False, True):
        model = MODELS["llama"][0](MODELS["llama"][1](**MODELS["llama"][2] | {"vocab_size": 50_000}))
        arguments = make_arguments(tmp_path / str(fused), gd_fused_linear=fused, **TRAINING | WARMUP)
        trainer = GradientDecayTrainer(model, arguments, train_dataset=make_data("llama", 4))
        sizes = kept[fused] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(_note, sizes), lambda tensor: tensor):
            trainer.compute_loss(model, as_batch(make_data("llama", 4)))
    assert sum(kept[True]) == 0 and sum(kept[False]) >= 4 * 8 * 50_000 * 4
    assert [tuple(shape) for shape in rows] == [(5, 50_000)] * 6 + [(2, 50_000)]


def _note(sizes, tensor):
    sizes.append(tensor.nbytes if tensor.shape[-1:] == (50_000,) else 0)
    return tensor


def capped(**sizes):
    return Gemma2ForCausalLM(Gemma2Config(head_dim=8, num_key_value_heads=2, final_logit_softcapping=30.0, **sizes))


def scaled(**sizes):
    return GraniteForCausalLM(GraniteConfig(num_key_value_heads=2, logits_scaling=8.0, **sizes))


def sparse(**sizes):
    return BigBirdForMaskedLM(BigBirdConfig(attention_type="block_sparse", block_size=4, num_random_blocks=1, **sizes))


class _Adapted(nn.Linear):
    """As of LoRA: more than a matrix."""


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: make_model("bert"), "BertForSequenceClassification is no language model"),
        (lambda: capped(**MODELS["llama"][2]), "Gemma2ForCausalLM changes what its output layer makes, by a soft cap"),
        (lambda: scaled(**MODELS["llama"][2]), "GraniteForCausalLM changes what its output layer makes, by a soft cap"),
        (lambda: make_model("bart"), "BartForConditionalGeneration changes what its output layer makes"),
        (lambda: sparse(**MODELS["llama"][2]), "BigBirdForMaskedLM gives up its sparse attention once"),
        (lambda: adapted(), "the model's output layer is a _Adapted, no nn.Linear"),
    ],
    ids=["classifier", "soft cap", "scale", "bias", "sparse", "adapter"],
)
def test_models_that_cannot_be_fused(model, why, tmp_path):
    with pytest.raises(ValueError, match=rf"^gd_fused_linear: {why}.*; leave it out"):
        GradientDecayTrainer(model(), make_arguments(tmp_path, gd_fused_linear=True), train_dataset=[])
    GradientDecayTrainer(model(), make_arguments(tmp_path, gd_fused_linear=False), train_dataset=[])


def adapted():
    model = make_model("llama")
    model.lm_head = _Adapted(16, 32, bias=False)
    return model


def test_not_with_torch_compile(tmp_path):
    with pytest.raises(ValueError, match="gd_fused_linear changes the model's forward, which torch_compile keeps"):
        make_arguments(tmp_path, gd_fused_linear=True, torch_compile=True, torch_compile_backend="eager")


def test_labels_that_are_all_ignored(tmp_path):
    data = [{**sample, "labels": torch.full((8,), -100)} for sample in make_data("llama", 8)]
    arguments = make_arguments(tmp_path, gd_fused_linear=True, **TRAINING | WARMUP)
    trainer = GradientDecayTrainer(make_model("llama"), arguments, train_dataset=data)
    trainer.train()
    assert torch.equal(weights(trainer.model), weights(make_model("llama")))
    assert [math.isnan(value) for (value,) in train_logs(trainer, "cross_entropy")] == [True] * 6
