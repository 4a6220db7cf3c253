"""`gd-plugin diagnose`, and the traces that it reads."""

import json
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from gd_plugin import GradientDecayConfig, gradient_decay_cross_entropy
from gd_plugin.diagnose import _learned
from gd_plugin.hf import GradientDecayTrainer
from gd_plugin.record import read_record
from gd_plugin.trace import Tracer, find_head, power_iteration, read_trace

RUNS = {
    "reference": {"gd_beta": 1, "seed": 1},
    "cross-entropy": {"gd_beta": 1},
    "beta 0.1": {"gd_beta": 0.1},
    "warm-up": {"gd_beta": 5, "gd_beta_start": 0.01, "gd_warmup_ratio": 0.5},
}


@pytest.fixture(scope="module")
def traced(train, small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traced")
    words = ["--dataset", "digits", *small[:-2], "--num_train_epochs", "2", "--trace_samples", "40"]
    train(*words, "--runs", json.dumps(RUNS), output_dir=folder)
    return folder


# Traces ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_power_iteration_finds_the_eigenvalue(sign):
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    eigenvalues = torch.tensor([sign * 5.0, 3, 1, 1, 0, -1, -2, 0.5], dtype=torch.float64)
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    found = power_iteration(lambda v: matrix @ v, torch.randn(8, dtype=torch.float64), 100)
    assert found == pytest.approx(5.0, rel=1e-6)
    assert power_iteration(lambda v: matrix @ v, torch.randn(8, dtype=torch.float64), 1) < 4.9  # needs its iterations
    assert power_iteration(lambda v: 0 * v, torch.randn(8)) == 0


class Output(dict):
    def __getattr__(self, name):
        return self[name]


class Classifier(nn.Module):
    """Few enough weights for their whole Hessian."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(num_labels=3)
        self.head = nn.Linear(5, 3)

    def forward(self, x, labels=None):
        return Output(logits=self.head(x))


def test_curvature_and_quotient_are_those_of_the_training_loss(tmp_path):
    torch.manual_seed(0)
    samples = [{"x": torch.randn(5), "labels": i % 3} for i in range(32)]
    model = Classifier()
    trainer = GradientDecayTrainer(
        model=model,
        args=TrainingArguments(tmp_path, num_train_epochs=2, report_to=[], disable_tqdm=True, learning_rate=0.1),
        train_dataset=samples,
        gd_config=GradientDecayConfig(beta=0.1),
    )
    tracer = Tracer(32)
    tracer.attach(trainer, samples)
    x, y = torch.stack([s["x"] for s in samples]), torch.tensor([s["labels"] for s in samples])
    weights = []

    def loss(flat, beta=0.1):
        return gradient_decay_cross_entropy(x @ flat[:15].view(3, 5).T + flat[15:], y, beta)

    measure = tracer._measure
    tracer._measure = lambda epoch: (weights.append(flat_weights(model)), measure(epoch))
    trainer.train()
    assert len(weights) == 3
    for i, flat in enumerate(weights):
        eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).abs()
        assert tracer.arrays["curvature"][i] == pytest.approx(eigenvalues.max().item(), rel=0.05)
        plain = torch.autograd.functional.hessian(lambda w: loss(w, 1.0), flat)
        assert torch.linalg.eigvalsh(plain).abs().max() != pytest.approx(eigenvalues.max().item(), rel=0.1)
    gradients = [torch.autograd.functional.jacobian(loss, flat) for flat in weights]
    assert np.isnan(tracer.arrays["quotient"][0])
    for i in (1, 2):
        expected = (gradients[i] - gradients[i - 1]).norm() / (weights[i] - weights[i - 1]).norm()
        assert tracer.arrays["quotient"][i] == pytest.approx(expected.item(), rel=1e-3)

    tracer.save(tmp_path)
    trace = read_trace(tmp_path)
    with torch.no_grad():
        confidence = model(x).logits.softmax(1)[torch.arange(32), y]
    np.testing.assert_allclose(trace["confidence"][-1], confidence, rtol=1e-5)
    np.testing.assert_allclose(trace["features"], x)
    assert trace["test_labels"].tolist() == y.tolist()
    x.requires_grad_()
    each = gradient_decay_cross_entropy(model(x).logits, y, 0.1, reduction="sum")
    (gradient,) = torch.autograd.grad(each, x)
    np.testing.assert_allclose(trace["input_gradient"], gradient.norm(dim=1), rtol=1e-4)


def flat_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_tracing_changes_nothing(traced, train, small, tmp_path):
    words = ["--dataset", "digits", *small[:-2], "--num_train_epochs", "2"]
    train(*words, "--runs", '{"cross-entropy": {"gd_beta": 1}}', output_dir=tmp_path)
    untraced, followed = (read_record(folder / "cross-entropy/record.json") for folder in (tmp_path, traced))
    assert untraced["final"] == followed["final"] and untraced["log"] == followed["log"]
    assert read_record(traced / "reference/record.json")["final"] != followed["final"]


def test_a_trace_holds_every_epoch_and_the_one_before(traced):
    trace = read_trace(traced / "cross-entropy")
    assert trace["epoch"].tolist() == [0, 1, 2]
    assert trace["confidence"].shape == (3, 40) and ((trace["confidence"] > 0) & (trace["confidence"] < 1)).all()
    assert (trace["curvature"] > 0).all() and trace["features"].shape[0] == len(trace["test_labels"]) == 40
    assert np.isfinite(trace["input_gradient"]).all()


def test_a_head_on_every_position_of_texts_of_any_length(train, bert, command, tmp_path):
    """GPT-2 classifies every position and takes the last; its inputs are no numbers to differentiate by."""
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(bert)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=16, vocab_size=len(tokenizer), pad_token_id=0)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "films").mkdir()
    for split, n in (("train", 24), ("test", 12)):
        rows = [f"{'film ' * (1 + i % 7)}{('bad', 'good')[i % 2]},{i % 2}" for i in range(n)]
        (tmp_path / f"films/{split}.csv").write_text("\n".join(["text,label", *rows]))
    runs = {name: RUNS[name] for name in ("reference", "cross-entropy", "beta 0.1")}
    words = [
        "--dataset",
        tmp_path / "films",
        "--model",
        tmp_path / "gpt2",
        "--num_train_epochs",
        1,
        "--use_cpu",
        "true",
    ]
    sizes = ["--per_device_eval_batch_size", 5, "--trace_samples", 11, "--runs", json.dumps(runs)]
    train(*words, *sizes, output_dir=tmp_path / "out")
    trace = read_trace(tmp_path / "out/beta-0.1")
    assert trace["features"].shape == (11, 16) and trace["test_labels"].shape == (11,)
    assert np.isnan(trace["input_gradient"]).all() and np.isfinite(trace["curvature"]).all()
    assert command("diagnose", tmp_path / "out").code == 0


def test_a_head_that_is_not_linear_is_refused():
    model = nn.Conv2d(8, 3, 1)
    model.config = types.SimpleNamespace(num_labels=3)
    with pytest.raises(ValueError, match="--trace_samples: the model's head is not a linear layer"):
        find_head(model)
    assert find_head(Classifier()).out_features == 3


# The command ----------------------------------------------------------------------------------------------------------


def test_diagnose(traced, command):
    code, out, err = command("diagnose", traced)
    assert (code, err) == (0, "")
    written = json.loads((traced / "diagnosis.json").read_text())
    assert written["reference"] == "reference"
    for name in ("curriculum", "features", "smoothness"):
        claim = written["claims"][name]
        assert claim["conclusion"] in out and ("' held here" in claim["conclusion"]) == claim["held"]
        assert set(claim["runs"]) == set(RUNS) - {"reference"}
        assert (traced / f"{name}.png").stat().st_size > 10_000


def test_when_a_sample_counts_as_learned():
    confidence = np.array([[0.1, 0.95, 0.1, 0.95], [0.95, 0.1, 0.2, 0.95], [0.95, 0.95, 0.3, 0.95]])
    assert _learned(confidence).tolist() == [1, 2, 3, 0]


def synthetic(folder, beta, noise, spread, curvature, seed=0, name=None):
    """A run whose trace is made up: noise disturbs the order, spread widens the classes."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(int(beta * 100) + seed)
    epochs, samples = 20, 200
    learned = np.arange(samples) * epochs / samples + noise * random.normal(size=samples)
    confidence = 1 / (1 + np.exp(learned - np.arange(epochs + 1)[:, None]))
    labels = np.arange(90) % 3
    np.savez(
        folder / "trace.npz",
        epoch=np.arange(epochs + 1),
        confidence=confidence,
        curvature=np.full(epochs + 1, curvature),
        quotient=np.r_[np.nan, np.ones(epochs)],
        features=np.eye(3)[labels] + spread * random.normal(size=(90, 3)),
        test_labels=labels,
        input_gradient=random.random(90),
    )
    record = {
        "format": 1, "name": name or f"beta {beta:g}", "config": {}, "seed": seed, "dataset": {}, "epochs": [],
        "final": {}, "wall_time_s": 1, "gd": {"beta": beta, "beta_start": None},
    }  # fmt: skip
    (folder / "record.json").write_text(json.dumps(record))


@pytest.mark.parametrize("held", [True, False])
def test_a_claim_that_holds_is_told_from_one_that_does_not(held, command, tmp_path):
    synthetic(tmp_path / "ref", 1.0, 0.5, 0.1, 1.0, seed=1, name="reference")
    for beta, level in ((0.1, 1), (1.0, 3), (5.0, 6)):
        level = level if held else 7 - level
        synthetic(tmp_path / f"beta-{beta}", beta, level, 0.05 * level, level)
    assert command("diagnose", tmp_path).code == 0
    claims = json.loads((tmp_path / "diagnosis.json").read_text())["claims"]
    assert [claim["held"] for claim in claims.values()] == [held] * 3


def test_bad_input(command, tmp_path):
    def error(folder):
        code, out, err = command("diagnose", folder)
        assert (code, out) == (2, "") and err.startswith("gd-plugin: error: ") and err.count("\n") == 1
        return err.removeprefix("gd-plugin: error: ").strip()

    empty = tmp_path / "empty"
    empty.mkdir()
    assert error(empty) == f"{empty} holds no runs; give the output folder of gd-plugin train with several runs"
    synthetic(tmp_path / "one/a", 1.0, 1, 1, 1)
    assert "fewer than two fixed betas" in error(tmp_path / "one")
    synthetic(tmp_path / "no/a", 0.1, 1, 1, 1)
    synthetic(tmp_path / "no/b", 5.0, 1, 1, 1)
    assert "there is no run with beta 1" in error(tmp_path / "no")
    (tmp_path / "no/a/trace.npz").write_bytes(b"PK\x03\x04cut")
    assert "no/a/trace.npz is damaged" in error(tmp_path / "no")
    (tmp_path / "no/a/trace.npz").unlink()
    assert f"{tmp_path}/no/a has no trace.npz; train it with --trace_samples 1000" == error(tmp_path / "no")
    assert not list(tmp_path.glob("*/*.png"))


def test_a_pickle_is_not_read(tmp_path):
    np.savez(tmp_path / "trace.npz", confidence=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="is damaged"):
        read_trace(tmp_path)


def test_negative_number_of_samples(command, small, tmp_path):
    code, _, err = command("train", "--dataset", "digits", *small, "--trace_samples", "-1", "--output_dir", tmp_path)
    assert code == 2 and "--trace_samples -1" in err
