"""With beta = 1 the loss is the one that each kind of model computes for itself, and it is used in its place."""

import pytest
import torch
import torch.nn.functional as F
from hf_models import (
    LANGUAGE_MODELS,
    MODELS,
    WAYS,
    as_batch,
    bound_loss,
    make_data,
    make_model,
    train_logs,
)
from torch import nn
from transformers import GPT2LMHeadModel, XLNetConfig, XLNetLMHeadModel

from gd_plugin.functional import gradient_decay_cross_entropy

CLOSE = dict(rtol=1e-6, atol=1e-6)  # fp32 logits of size 1: some ulps


def run(name, **config):
    """The model, its own loss on a batch, and its outputs without the labels, as the Trainer calls it."""
    model = make_model(name, **config).eval()
    batch = as_batch(make_data(name))
    own = model(**batch).loss
    labels = batch.pop("labels")
    return model, own, model(**batch), labels


def gradient(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return torch.cat([g.reshape(-1) for g in grads if g is not None])


@pytest.mark.parametrize("name", MODELS)
def test_beta_1_is_the_models_own_loss(name, tmp_path):
    model, own, outputs, labels = run(name)
    loss = bound_loss(model, tmp_path)
    torch.testing.assert_close(loss(outputs, labels), own, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(loss(outputs, labels), own, **CLOSE)

    j = bound_loss(model, tmp_path, beta=5.0)
    assert (j(outputs, labels) - own).abs() > 0.01
    with torch.no_grad():  # evaluation is cross-entropy whatever beta is
        torch.testing.assert_close(j(outputs, labels), own, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_models_own_loss(name, tmp_path):
    model, own, outputs, labels = run(name)
    losses = [own, *(bound_loss(model, tmp_path, beta=beta)(outputs, labels) for beta in (1.0, 5.0))]
    own, ours, j = (gradient(model, loss) for loss in losses)
    assert (ours - own).norm() < 1e-6 * own.norm()
    assert (j - own).norm() > 0.01 * own.norm()


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_only_decoders_without_an_encoder_are_shifted(name, tmp_path):
    """The shift itself, written out; the other alignment is far away."""
    model, _, outputs, labels = run(name)
    loss = bound_loss(model, tmp_path, beta=5.0)(outputs, labels)
    aligned = gradient_decay_cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), 5.0)
    shifted = gradient_decay_cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), 5.0)
    right, wrong = (shifted, aligned) if name in ("llama", "gpt2") else (aligned, shifted)
    torch.testing.assert_close(loss, right, **CLOSE)
    assert (loss - wrong).abs() > 1e-4


def test_a_users_subclass_of_a_language_model_is_shifted(tmp_path):
    class MyGPT2(GPT2LMHeadModel):
        pass

    parent, own, outputs, labels = run("gpt2")
    model = MyGPT2(parent.config)
    torch.testing.assert_close(bound_loss(model, tmp_path)(outputs, labels), own, **CLOSE)
    unshifted = bound_loss(nn.Linear(1, 1), tmp_path)(outputs, labels)
    assert (unshifted - own).abs() > 1e-3


def test_xlnet_is_in_the_causal_mapping_but_not_shifted(tmp_path):
    config = XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=16)
    model, tokens = XLNetLMHeadModel(config).eval(), torch.randint(5, 30, (2, 8))
    own, outputs = model(tokens, labels=tokens).loss, model(tokens)
    torch.testing.assert_close(bound_loss(model, tmp_path)(outputs, tokens), own, **CLOSE)
    shifted = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert (shifted - own).abs() > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_the_models_own_loss_is_not_used(way, tmp_path):
    """BERT computes a loss whenever it sees labels; what the Trainer logs is J."""
    data = make_data("bert", 8)
    model = make_model("bert")
    batch = as_batch(data)
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
        own = model(**batch).loss.item()
    trainer = WAYS[way](model, tmp_path, dict(beta=5.0), dict(max_steps=1), train_dataset=data)
    trainer.train()
    [(loss, cross_entropy)] = train_logs(trainer, "loss", "cross_entropy")
    assert loss == pytest.approx(gradient_decay_cross_entropy(logits, batch["labels"], 5.0).item(), rel=1e-5)
    assert cross_entropy == pytest.approx(own, rel=1e-5)
    assert abs(loss - own) > 0.1


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "tokens"])
def test_bf16_autocast_trains_with_an_fp32_loss(name, tmp_path):
    losses = {}
    for bf16 in (False, True):
        trainer = WAYS["subclass"](
            make_model(name),
            tmp_path,
            dict(beta=0.1),
            dict(bf16=bf16, learning_rate=0.05),
            train_dataset=make_data(name),
        )
        dtypes, call = [], trainer.compute_loss

        def recorded(*args, call=call, dtypes=dtypes, **kwargs):
            loss = call(*args, **kwargs)
            dtypes.append(loss.dtype)
            return loss

        trainer.compute_loss = recorded
        trainer.train()
        losses[bf16] = torch.tensor(train_logs(trainer, "loss", "cross_entropy", "grad_norm"))
        assert dtypes == [torch.float32] * 3
        assert losses[bf16].isfinite().all()
    torch.testing.assert_close(losses[True], losses[False], rtol=0.05, atol=0.02)
    assert not torch.equal(losses[True], losses[False])  # it was bf16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_lose_nothing_in_the_loss(dtype, tmp_path):
    """As near to fp64 as ``F.cross_entropy`` on the same logits in fp32; in their own dtype it is far away."""
    torch.manual_seed(0)
    logits, labels = (10 * torch.randn(64, 5)).to(dtype), torch.randint(5, (64,))
    exact = F.cross_entropy(logits.double(), labels)
    loss = bound_loss(nn.Linear(1, 1), tmp_path)((logits,), labels)
    assert loss.dtype == torch.float32
    assert (loss - exact).abs() <= (F.cross_entropy(logits.float(), labels) - exact).abs() + 1e-6
    assert (F.cross_entropy(logits, labels) - exact).abs() > 1e-4
