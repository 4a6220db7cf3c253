"""`gd-plugin timm`: timm's training with the loss, update by update, resumed, in two processes, and refused."""

import contextlib
import json
import math
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm.models
import timm_runs
import torch
import torch.nn.functional as F
import yaml
from reference import reference
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm_runs import (
    CLASSES,
    SCRIPTS,
    VALIDATION,
    arguments,
    changed,
    expected_betas,
    flags,
    global_state,
    launch,
    own_logging,
    read_summary,
    write_digits,
)

import gd_plugin.timm
from gd_plugin.config import GradientDecayConfig
from gd_plugin.metrics import METRICS
from gd_plugin.record import read_record
from gd_plugin.timm_train import _TrainingLoss

both = pytest.mark.parametrize("script", SCRIPTS)
new = pytest.mark.parametrize("script", SCRIPTS.keys() & {"new"})
FIVE = GradientDecayConfig(beta=5.0)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def run(command, digits, tmp_path_factory):
    """A run that must succeed: script, configuration or None for the script's own loss, other words."""

    def train(script, config, words="", folder=None, **how):
        folder = folder or tmp_path_factory.mktemp("run")
        words = [*words.split(), *(flags(config) if config else [])]
        done = launch(command, script, digits, folder, words, **how)
        assert done.code == 0, done.err
        return done

    return train


@pytest.fixture(scope="session")
def shared(run):
    """The same, once for all tests that only look at the result."""
    done = {}

    def train(script, config, words=""):
        key = script, config, words
        if key not in done:
            done[key] = run(*key)
        return done[key]

    return train


@pytest.fixture(scope="session")
def refused(command, digits, tmp_path_factory):
    """A run that must be refused in one line: that line, and the folder of the run."""

    def train(script, words=""):
        folder = tmp_path_factory.mktemp("refused") / "run"
        done = launch(command, script, digits, folder, words)
        assert (done.code, done.out, done.err.count("\n"), done.calls) == (2, "", 1, []), done.err
        return done.err, folder

    return train


# beta, update by update -----------------------------------------------------------------------------------------------

WARM_UP = dict(beta=5.0, beta_start=0.01)
LINEAR = GradientDecayConfig(**WARM_UP, warmup_epochs=1.5)
# name: (configuration, words, epochs with those of timm's cool-down, micro-batches per update of an epoch, first epoch)
COURSES = {
    "constant": (FIVE, "", 2, [1] * 4, 0),
    "linear, epochs": (LINEAR, "", 2, [1] * 4, 0),
    "geometric, updates": (
        GradientDecayConfig(**WARM_UP, schedule="geometric", warmup_steps=7), "--epochs 3", 3, [1] * 4, 0
    ),
    "cosine, ratio": (GradientDecayConfig(**WARM_UP, schedule="cosine", warmup_ratio=0.75), "", 2, [1] * 4, 0),
    "accumulation": (LINEAR, "--batch-size 8 --grad-accum-steps 3", 2, [3, 3, 2], 0),
    "scheduler on updates": (LINEAR, "--sched-on-updates", 2, [1] * 4, 0),
    "no scheduler": (LINEAR, "--sched none", 2, [1] * 4, 0),
    "timm's warm-up and cool-down": (
        GradientDecayConfig(**WARM_UP, warmup_ratio=0.6), "--warmup-epochs 1 --cooldown-epochs 1", 3, [1] * 4, 0
    ),
    "incomplete batches": (LINEAR, "--batch-size 10 --epochs 3 --log-interval 4", 3, [1] * 6, 0),
    "later start": (GradientDecayConfig(**WARM_UP, warmup_ratio=1.0), "--start-epoch 1", 2, [1] * 4, 1),
}  # fmt: skip


@both
@pytest.mark.parametrize("name", COURSES)
def test_every_update_has_its_beta(script, name, shared):
    config, words, epochs, micro_batches, start = COURSES[name]
    done = shared(script, config, words)
    expected = expected_betas(config, epochs, micro_batches, start)
    assert done.betas == expected
    assert [row["train_gd_beta"] for row in done.summary] == pytest.approx(
        expected[sum(micro_batches) - 1 :: sum(micro_batches)], rel=1e-6
    )
    if config is not FIVE:
        assert len(set(expected)) > 3
        assert done.betas != expected[1:] + expected[-1:]  # those of one update, or micro-batch, later
    if config.warmup_ratio:
        assert done.betas != expected_betas(config, epochs + 1, micro_batches, start)[: len(expected)]


@both
def test_the_scheduler_is_stepped_as_by_the_script_alone(script, shared):
    one = GradientDecayConfig(beta=1.0)
    rates = [shared(script, c, "--sched-on-updates").column("lr") for c in (None, one)]
    assert rates[0] == rates[1]
    assert rates[0] != shared(script, one).column("lr")


# Resuming -------------------------------------------------------------------------------------------------------------

LONG = GradientDecayConfig(**WARM_UP, warmup_epochs=2.5)


class Stopped(Exception):
    pass


@pytest.fixture(scope="session")
def whole(shared):
    return lambda script: shared(script, LONG, "--epochs 3 --recovery-interval 3")


@pytest.fixture(scope="session")
def stopped(run, tmp_path_factory):
    """A run that ended with an exception in the last update of its second epoch."""
    folders = {}

    def stop(calls):
        if len(calls) == 8:
            raise Stopped

    def train(script):
        if script not in folders:
            folders[script] = tmp_path_factory.mktemp("stopped")
            with pytest.raises(Stopped):
                run(script, LONG, "--epochs 3 --recovery-interval 3", folder=folders[script], then=stop)
        return folders[script]

    return train


# name: (checkpoint, epochs that are complete in it, whether the run goes on in its own folder)
CHECKPOINTS = {
    "first": ("checkpoint-0", 1, True),
    "second": ("checkpoint-1", 2, False),
    "last": ("last", 1, True),
    "recovery": ("recovery-1-2", 2, False),
}


@both
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_resumed_run_goes_on_with_its_betas(script, name, run, whole, stopped, tmp_path):
    checkpoint, complete, in_place = CHECKPOINTS[name]
    folder = tmp_path / "run"
    source = whole(script).folder if name in ("first", "second") else stopped(script)
    if in_place:
        shutil.copytree(source, folder)
    path = source / f"{checkpoint}.pth.tar"
    resumed = run(script, LONG, f"--epochs 3 --resume {path}", folder=folder)
    assert resumed.betas == whole(script).betas[4 * complete :]
    assert resumed.betas != whole(script).betas[: 4 * (3 - complete)]

    record, uninterrupted = resumed.record, whole(script).record
    first = 0 if in_place else complete
    assert [e["epoch"] for e in record["epochs"]] == list(range(first + 1, 4))
    assert [e["step"] for e in record["log"]] == list(range(4 * first + 1, 13))
    assert record["log"] == uninterrupted["log"][4 * first :]
    if in_place:
        assert record["epochs"][:complete] == uninterrupted["epochs"][:complete]


@both
def test_a_resumed_record_keeps_what_was_measured(script, run, shared, tmp_path):
    before, folder = shared(script, LONG, "--epochs 3 --recovery-interval 3"), tmp_path / "run"
    shutil.copytree(before.folder, folder)
    record = before.record | {"wall_time_s": 1000.0, "created": "2026-01-01T00:00:00+00:00"}
    (folder / "record.json").write_text(json.dumps(record))
    between = []

    def look(calls):  # in the first update of the third epoch, and of the fourth, before its validation
        between.append(read_record(folder / "record.json"))

    words = f"--epochs 4 --resume {folder}/checkpoint-1.pth.tar"
    resumed = run(script, LONG, words, folder=folder, then=look).record
    assert [entry["epoch"] for entry in resumed["epochs"]] == [1, 2, 3, 4]
    assert resumed["created"] == record["created"] and resumed["wall_time_s"] >= 1000
    assert all(seen["final"] and seen["reliability"] for seen in between)


@both
@pytest.mark.parametrize("part", ["log", "wall_time_s", "all"])
def test_an_unreadable_record_is_set_aside(script, part, run, shared, tmp_path, caplog):
    before, folder = shared(script, LONG, "--epochs 3 --recovery-interval 3"), tmp_path / "run"
    shutil.copytree(before.folder, folder)
    text = "{" if part == "all" else json.dumps({key: value for key, value in before.record.items() if key != part})
    (folder / "record.json").write_text(text)
    resumed = run(script, LONG, f"--epochs 3 --resume {folder}/checkpoint-1.pth.tar", folder=folder)
    assert [entry["epoch"] for entry in resumed.record["epochs"]][-1] == 3
    assert (folder / "record.unreadable.json").read_text() == text


@both
def test_a_record_that_cannot_be_written_ends_no_training(script, run, tmp_path):
    (tmp_path / "run" / "record.json" / "in the way").mkdir(parents=True)
    done = run(script, FIVE, folder=tmp_path / "run")
    assert len(done.summary) == 2 and "train_gd_beta" in done.summary[0]
    assert "the record could not be written" in done.err


# What is trained ------------------------------------------------------------------------------------------------------

TARGETS = {"plain": "", "smoothing": "--smoothing 0.1", "mixup": "--smoothing 0.1 --mixup 0.8"}


@both
@pytest.mark.parametrize("name", TARGETS)
def test_beta_one_is_the_cross_entropy_of_the_script(script, name, shared):
    own, one, half = (
        shared(script, config, TARGETS[name]).column("train_loss")
        for config in (None, GradientDecayConfig(beta=1.0), GradientDecayConfig(beta=0.5))
    )
    assert len(own) == 2
    assert one == pytest.approx(own, rel=1e-6)
    for epoch in range(2):
        assert abs(half[epoch] / own[epoch] - 1) > 1e-3
    # What the names say: the three ways to make targets are different trainings.
    others = [shared(script, None, words).column("train_loss") for n, words in TARGETS.items() if n != name]
    assert all(abs(other[1] / own[1] - 1) > 1e-4 for other in others)


@new
def test_both_scripts_train_the_same(script, shared):
    losses = [shared(name, FIVE).column("train_loss") for name in (script, "old")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(shared("old", GradientDecayConfig(beta=1.0)).column("train_loss"), rel=1e-3)


@both
def test_validation_stays_plain(script, shared):
    done = shared(script, FIVE)
    for row in done.summary:
        assert row["eval_loss"] == pytest.approx(row["eval_nll"], rel=1e-5)
        assert row["eval_top1"] == pytest.approx(100 * row["eval_accuracy"], rel=1e-5)
        assert row["train_loss"] != pytest.approx(row["train_cross_entropy"], rel=1e-2)


@both
def test_cross_entropy_is_what_it_says(script, shared):
    one = shared(script, GradientDecayConfig(beta=1.0))
    assert one.column("train_cross_entropy") == pytest.approx(one.column("train_loss"), rel=1e-6)
    five = shared(script, FIVE)
    means = [sum(F.cross_entropy(c.input, c.target).item() for c in five.calls[i : i + 4]) / 4 for i in (0, 4)]
    assert five.column("train_cross_entropy") == pytest.approx(means, rel=1e-6)
    assert five.column("train_loss") != pytest.approx(means, rel=1e-2)


@both
def test_per_class_betas_and_class_weights(script, run):
    betas = tuple(range(1, CLASSES + 1))
    weights = tuple(0.5 + i / 4 for i in range(CLASSES))
    config = GradientDecayConfig(beta=betas, beta_start=0.5, warmup_epochs=1, class_weights=weights)
    done = run(script, config)
    assert done.betas == expected_betas(config, 2, [1] * 4)
    assert done.betas[0] == [0.5] * CLASSES
    assert done.betas[-1] == list(betas)
    assert done.column("train_gd_beta")[-1] == 5.5
    last = done.calls[-1]
    weight = torch.tensor(weights)
    assert last.loss == pytest.approx(reference(last.input, last.target, betas, weight).item(), rel=1e-6)
    assert last.loss != pytest.approx(reference(last.input, last.target, betas).item(), rel=1e-3)
    assert last.loss != pytest.approx(reference(last.input, last.target, 5.5, weight).item(), rel=1e-3)


# With what else timm offers -------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(script, dtype, shared, run):
    done = run(script, LINEAR, f"--amp --amp-dtype {dtype}")
    assert done.betas == expected_betas(LINEAR, 2, [1] * 4)
    assert done.calls[0].input.dtype == getattr(torch, dtype)
    full = shared(script, LINEAR).column("train_loss")
    assert done.column("train_loss") == pytest.approx(full, rel=2e-2)
    assert done.column("train_loss") != pytest.approx(full, rel=1e-7)


@both
def test_metrics_are_those_of_the_averaged_weights(script, run, shared):
    done, plain = run(script, FIVE, "--model-ema --model-ema-decay 0.9"), shared(script, FIVE)
    first, other = done.summary[0], plain.summary[0]  # later the second validation has drawn random numbers
    assert first["train_loss"] == other["train_loss"]
    assert first["eval_nll"] != pytest.approx(other["eval_nll"], rel=1e-3)
    assert done.column("eval_nll") == pytest.approx(done.column("eval_loss"), rel=1e-5)
    assert done.record["final"]["nll"] == done.column("eval_nll")[-1]
    assert sum(row["count"] for row in done.record["reliability"]) == VALIDATION


@both
@pytest.mark.parametrize("words", ["--cutmix 1", "--mixup 0.8 --cutmix-minmax 0.2 0.8 --no-prefetcher"])
def test_mixed_images(script, words, run):
    done = run(script, LINEAR, f"{words} --smoothing 0.1")
    assert done.betas == expected_betas(LINEAR, 2, [1] * 4)
    first = done.calls[0]
    assert first.target.shape == (16, CLASSES)
    assert first.target.min() == pytest.approx(0.01)  # smoothed once, by timm
    assert first.loss == pytest.approx(reference(first.input, first.target, 0.01).item(), rel=1e-6)
    assert first.loss != pytest.approx(reference(first.input, first.target, 1.0).item(), rel=1e-3)


@both
def test_smoothing_is_that_of_the_script(script, shared):
    calls = shared(script, GradientDecayConfig(beta=0.5), "--smoothing 0.1").calls
    smoothed, plain = ([reference(c.input, c.target, 0.5, label_smoothing=s).item() for c in calls] for s in (0.1, 0))
    assert [c.loss for c in calls] == pytest.approx(smoothed, rel=1e-6)
    assert [c.loss for c in calls] != pytest.approx(plain, rel=1e-3)


@both
def test_augmentation_splits(script, run):
    done = run(script, LINEAR, "--aug-splits 2")
    assert done.betas == expected_betas(LINEAR, 2, [1] * 4)
    assert done.betas[0] != done.betas[-1]
    first = done.calls[0]
    assert first.input.shape == (32, CLASSES)
    assert torch.equal(first.target[:16], first.target[16:])
    assert not torch.equal(first.input[:16], first.input[16:])


@both
def test_a_compiled_model(script, run, shared):
    done, eager = run(script, LINEAR, "--torchcompile eager"), shared(script, LINEAR)
    assert done.betas == eager.betas
    assert done.column("train_loss") == pytest.approx(eager.column("train_loss"), rel=1e-6)
    assert done.column("train_loss") != pytest.approx(shared(script, FIVE).column("train_loss"), rel=1e-3)


class WithNumbers(_TrainingLoss):
    """The control: sums that are Python numbers."""

    number = 0.0

    def forward(self, input, target):
        self.number += 1.0
        return super().forward(input, target) * (self.number / self.number)


@pytest.mark.parametrize(("kind", "compiled_once"), [(_TrainingLoss, True), (WithNumbers, False)])
def test_a_task_that_is_compiled_with_its_loss(kind, compiled_once):
    """As the scripts of timm 1.0.23 to 1.0.26 compile it."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model, loss = torch.nn.Linear(4, 3), kind.from_config(LINEAR)
    step = torch.compile(lambda input, target: loss(model(input), target), backend=counter)
    frames = []
    for update in range(12):
        loss.set_beta(0.1 + update)
        step(torch.randn(8, 4), torch.randint(3, (8,))).backward()
        frames.append(counter.frame_count)
    assert (frames[1] == frames[-1]) is compiled_once
    torch.compiler.reset()


def test_cross_entropy_is_the_mean_over_samples_of_unequal_batches():
    loss = _TrainingLoss.from_config(FIVE)
    logits, target = torch.randn(8, CLASSES), torch.randint(CLASSES, (8,))
    for rows in (slice(0, 3), slice(3, 8)):
        loss(logits[rows], target[rows])
    expected = F.cross_entropy(logits, target).item()
    assert loss.pop_cross_entropy(distributed=False) == pytest.approx(expected, rel=1e-6)
    of_batches = sum(F.cross_entropy(logits[rows], target[rows]).item() for rows in (slice(0, 3), slice(3, 8))) / 2
    assert of_batches != pytest.approx(expected, rel=1e-3)
    assert math.isnan(loss.pop_cross_entropy(distributed=False))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """An untrained teacher, as a name that timm takes."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    arguments = dict(img_size=32, depth=1)
    model = timm.create_model("test_vit", num_classes=CLASSES, **arguments)
    timm.models.save_for_hf(model, folder, model_args=arguments)
    return f"local-dir:{folder}"


@new
def test_distillation_adds_to_the_loss(script, run, shared, teacher):
    done, alone = run(script, LINEAR, f"--kd-model-name {teacher}"), shared(script, LINEAR)
    assert done.betas == alone.betas
    first = done.calls[0]
    assert first.loss == pytest.approx(reference(first.input, first.target, first.beta).item(), rel=1e-6)
    for epoch in range(2):
        task, other = (sum(c.loss for c in r.calls[4 * epoch : 4 * epoch + 4]) / 4 for r in (done, alone))
        assert alone.column("train_loss")[epoch] == pytest.approx(other, rel=1e-6)
        assert done.column("train_loss")[epoch] > task + 1e-3


# What is left behind --------------------------------------------------------------------------------------------------


@both
def test_summary_has_the_metrics(script, shared):
    done = shared(script, LINEAR)
    names = list(done.summary[0])
    assert names == [
        *("epoch", "train_loss", "train_gd_beta", "train_cross_entropy", "eval_loss", "eval_top1", "eval_top5"),
        *(f"eval_{name}" for name in METRICS),
        "lr",
    ]
    assert not any(math.isnan(value) for row in done.summary for value in row.values())


@both
def test_record(script, shared, digits):
    done = shared(script, LINEAR)
    record, summary = read_record(done.folder / "record.json"), done.summary
    assert record["gd"] == LINEAR.to_dict()
    assert (record["name"], record["seed"]) == (done.folder.name, 42)
    assert record["command"].startswith("gd-plugin timm train.py ")
    assert str(done.folder.parent) not in (done.folder / "record.json").read_text()
    settings = record["config"]
    assert (settings["loss"], settings["gd_beta"], settings["model"], settings["lr"]) == ("gd", 5.0, "test_vit", 0.05)
    assert record["dataset"] == {
        "name": digits.name,
        "train": 64,
        "test": 41,
        "tested_on": "validation",
        "label_names": [str(digit) for digit in range(10)],
    }
    assert len(record["epochs"]) == len(summary) == 2
    for index, (epoch, row) in enumerate(zip(record["epochs"], summary, strict=True)):
        assert (epoch.pop("epoch"), epoch.pop("step")) == (index + 1, 4 * (index + 1))
        assert {
            name.removeprefix("train_"): value for name, value in row.items() if name not in ("epoch", "lr")
        } == epoch
    assert record["final"] == {k.removeprefix("eval_"): v for k, v in epoch.items() if k.startswith("eval_")}
    assert record["final"] != {
        k.removeprefix("eval_"): v for k, v in record["epochs"][0].items() if k.startswith("eval_")
    }
    assert [entry["step"] for entry in record["log"]] == list(range(1, 9))
    assert [entry["gd_beta"] for entry in record["log"]] == pytest.approx(done.betas, rel=1e-6)
    reliability = record["reliability"]
    assert sum(row["count"] for row in reliability) == VALIDATION
    accuracy = sum(row["count"] * row["accuracy"] for row in reliability if row["count"]) / VALIDATION
    assert accuracy == pytest.approx(record["final"]["accuracy"])


@both
def test_arguments_are_saved_with_those_of_timm(script, shared):
    saved = yaml.safe_load((shared(script, LINEAR).folder / "args.yaml").read_text())
    assert {name: saved[name] for name in saved if name == "loss" or name.startswith("gd_")} == {
        "loss": "gd",
        "gd_beta": 5.0,
        "gd_beta_start": 0.01,
        "gd_schedule": None,
        "gd_warmup_ratio": None,
        "gd_warmup_steps": None,
        "gd_warmup_epochs": 1.5,
        "gd_class_weights": None,
    }


@both
def test_without_our_loss_the_script_trains_as_by_itself(script, shared, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[script]), *arguments(digits, tmp_path / "run", "")])
    with own_logging():
        runpy.run_path(str(SCRIPTS[script]), run_name="__main__")
    done = shared(script, None)
    assert done.calls == []
    assert (done.folder / "summary.csv").read_text() == (tmp_path / "run" / "summary.csv").read_text()
    assert not (done.folder / "record.json").exists()
    saved = yaml.safe_load((done.folder / "args.yaml").read_text())
    assert {saved[name] for name in saved if name.startswith("gd_")} == {None}
    assert read_summary(shared(script, FIVE).folder) != done.summary


# Configuration files and help -----------------------------------------------------------------------------------------


@both
def test_configuration_file(script, run, shared, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("loss: gd\ngd_beta: 3\ngd_beta_start: 0.01\ngd_warmup_epochs: 1.5\n")
    done = run(script, None, f"--config {path} --gd-beta 5")
    assert done.betas == shared(script, LINEAR).betas
    assert done.column("train_loss") == shared(script, LINEAR).column("train_loss")
    of_file = run(script, None, f"--config {path}")
    assert of_file.betas == expected_betas(GradientDecayConfig(beta=3, beta_start=0.01, warmup_epochs=1.5), 2, [1] * 4)
    assert of_file.betas != done.betas
    assert of_file.record["gd"]["beta"] == 3.0


@both
def test_a_list_in_a_configuration_file(script, run, tmp_path):
    betas = [float(b) for b in range(1, CLASSES + 1)]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"loss": "gd", "gd_beta": betas, "epochs": 9}))
    done = run(script, None, f"--config {tmp_path / 'config.yaml'} --epochs 1")
    assert done.betas == [betas] * 4


@both
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: gd\ngd_betta: 5", "gd_betta is no option of gd_plugin; did you mean gd_beta?"),
        ("loss: gd\ngd_beta: 5\ngd_warm_up_epochs: 5", "did you mean gd_warmup_epochs?"),
        ("gd_beta: 5", "add --loss gd"),
        ("loss: gd\ngd_beta: five", "--gd-beta 'five'"),
        ("loss: gd\ngd_beta: -5", "--gd-beta must be greater than 0"),
        ("loss: gd\ngd_beta: 5\neval_metric: nll", "--eval-metric nll"),
    ],
)
def test_bad_configuration_file(script, text, message, refused, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    error, folder = refused(script, f"--config {path}")
    assert message in error
    assert not folder.exists()


@both
def test_help_shows_timms_options_and_ours(script, command):
    before = global_state()
    done = command("timm", SCRIPTS[script], "--help")
    assert (done.code, done.err) == (0, "")
    for word in (
        "--data-dir",
        "--grad-accum-steps",
        "--loss",
        "--gd-beta B[,B...]",
        "--gd-warmup-epochs",
        "Needs --loss gd",
    ):
        assert word in done.out
    assert not changed(before, global_state())


def test_help_of_the_command(command):
    for words, code in (((), 2), (("--help",), 0), (("-h",), 0)):
        done = command("timm", *words)
        assert (done.code, done.err) == (code, "")
        assert done.out.startswith("usage: gd-plugin timm PATH/TO/train.py")


# Refusals -------------------------------------------------------------------------------------------------------------

BAD = {
    "--loss gd": "--loss gd needs a beta: add --gd-beta",
    "--gd-beta 5": "--gd-beta is set, but the loss is not gd; add --loss gd",
    "--loss ce --gd-warmup-epochs 1": "--gd-warmup-epochs is set",
    "--loss gd --gd-beta five": "--gd-beta 'five': give one number",
    "--loss gd --gd-beta 1,x": "--gd-beta '1,x': give one number, or one per class",
    "--loss gd --gd-beta 0": "--gd-beta must be greater than 0",
    "--loss gd --gd-beta -1": "--gd-beta must be greater than 0",
    "--loss gd --gd-beta nan": "--gd-beta must be finite",
    "--loss gd --gd-beta 5 --gd-beta-start 1": "the warm-up has no length; set --gd-warmup-ratio",
    "--loss gd --gd-beta 5 --gd-warmup-ratio 0.5": "--gd-beta-start is not set",
    "--loss gd --gd-beta 5 --gd-beta-start 1 --gd-warmup-steps 1.5": "--gd-warmup-steps '1.5': give a whole number",
    "--loss gd --gd-beta 5 --gd-beta-start 1 --gd-warmup-ratio 2": "--gd-warmup-ratio must be in [0, 1]",
    "--loss gd --gd-beta 5 --gd-beta-start 1 --gd-warmup-ratio 1 --gd-schedule step": "--gd-schedule must be one of",
    "--loss gd --gd-beta 5 --gd-class-weights 1,x": "--gd-class-weights '1,x'",
    "--loss gd --gd-beta 5 --bce-loss": "remove --bce-loss",
    "--loss gd --gd-beta 5 --jsd-loss --aug-splits 2": "remove --jsd-loss",
    "--loss gd --gd-beta 5 --eval-metric ece": "--eval-metric ece",
    "--loss gd --gd-beta 5 --device-modules gd_plugin.timm_hook": "leave --device-modules gd_plugin.timm_hook out",
}
# Known when the data and the model are there.
LATE = {
    "--loss gd --gd-beta 5 --gd-beta-start 1 --gd-warmup-epochs 2.5": "--gd-warmup-epochs is 2.5, 10 updates",
    "--loss gd --gd-beta 5 --gd-beta-start 1 --gd-warmup-steps 9": "training has only 8",
    "--loss gd --gd-beta 1,2,3": "--gd-beta has 3 values for 10 classes",
    "--loss gd --gd-beta 1 --gd-class-weights 1,2": "--gd-class-weights has 2 values for 10 classes",
}


@both
@pytest.mark.parametrize("words", [*BAD, *LATE])
def test_bad_arguments(script, words, refused):
    error, folder = refused(script, words)
    prefix = "gd_plugin.timm_hook" if "timm_hook" in words else "gd-plugin"
    assert error.startswith(f"{prefix}: error: ")
    assert (BAD | LATE)[words] in error
    assert list(folder.glob("*.pth.tar")) == []


SOURCE = SCRIPTS["old"].read_text()
BAD_SCRIPTS = {
    "none": (None, "there is no script"),
    "not python": ("a text\n", "is not a Python script"),
    "binary": (b"\x89PNG\r\n\xff", "is not a Python script"),
    "another script": ("import timm\nprint(timm)\n", "is not timm's train.py: it has no main"),
    "another library": (SOURCE.replace("from timm import", "from timn import"), "does not import timm"),
    "a launcher": (SOURCE + "\nimport gd_plugin\n", "two cannot be nested"),
    "no validate": (SOURCE.replace("def validate(", "def evaluate("), "it has no validate"),
    "no parser": (SOURCE.replace("parser", "flag_parser"), "it has no parser"),
    "older": (SOURCE.replace(" num_updates_total=None,", ""), "its train_one_epoch has no num_updates_total"),
    "no loss": (
        SOURCE.replace("loss_fn, args, device=None, lr", "args, device=None, lr"),
        "its train_one_epoch has no task",
    ),
    "newer": (SOURCE.replace("import json", "from timm.loss import FutureLoss"), "does not go with timm"),
}


@pytest.mark.parametrize("name", BAD_SCRIPTS)
def test_bad_scripts(name, refused, tmp_path):
    text, message = BAD_SCRIPTS[name]
    path = tmp_path / "train.py"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    error, folder = refused(path, "--loss gd --gd-beta 5")
    assert error.startswith("gd-plugin: error: ")
    assert message in error and str(path) in error
    assert not folder.exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (Path(__file__).parent, "there is no script"),
        (Path("torchrun"), "put torchrun first"),
        (Path(gd_plugin.timm.__file__), "two cannot be nested"),
        (Path(gd_plugin.timm.__file__).with_name("timm_hook.py"), "two cannot be nested"),
    ],
)
def test_bad_paths(path, message, refused):
    assert message in refused(path, "--loss gd --gd-beta 5")[0]


def test_timm_can_be_too_old(refused, monkeypatch):
    monkeypatch.setattr(timm, "__version__", "0.9.16")
    assert "timm 0.9.16 is too old, gd-plugin timm needs timm >= 1.0.20" in refused("old")[0]


def test_bad_loss_in_a_configuration_file(refused, tmp_path):
    (tmp_path / "config.yaml").write_text("loss: gd\ngd_beta: 5\nbce_loss: true")
    assert "remove --bce-loss" in refused("old", f"--config {tmp_path / 'config.yaml'}")[0]


def test_misspelt_loss_in_a_configuration_file(refused, tmp_path):
    """Of the values of a file argparse does not check that they are choices, and --loss is ours before timm 1.0.31."""
    (tmp_path / "config.yaml").write_text("loss: gdd")
    assert "gdd" in refused("old", f"--config {tmp_path / 'config.yaml'}")[0]


@both
def test_usage_names_the_script(script, command):
    usage = command("timm", SCRIPTS[script], "--help").out.splitlines()[0]
    assert usage.startswith("usage: ") and "train.py" in usage


@both
def test_errors_of_the_script_are_its_own(script, command):
    done = command("timm", SCRIPTS[script], "--epochs", "many")
    assert done.code == 2
    assert "argument --epochs: invalid int value: 'many'" in done.err
    assert done.err.startswith("usage: ")


@pytest.mark.parametrize(("end", "code", "err"), [("", 0, ""), ("3", 3, ""), ("'out of luck'", 1, "out of luck\n")])
def test_exit_code_is_that_of_the_script(end, code, err, command, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SOURCE.replace("    utils.setup_default_logging()", f"    raise SystemExit({end})"))
    done = command("timm", path, "--loss", "gd", "--gd-beta", "5")
    assert (done.code, done.err) == (code, err)


def test_a_validation_that_shows_no_logits(run, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SOURCE.replace("measured = [loss_fn(output, target)]", "measured = [output.sum()]"))
    done = run(path, FIVE)
    assert "showed no logits" in done.err
    assert done.record["reliability"] is None and "eval_ece" not in done.summary[0]


@both
def test_more_in_a_batch_than_there_is(script, refused):
    error, _ = refused(script, "--loss gd --gd-beta 5 --batch-size 65")
    assert "--batch-size 65" in error


@both
def test_two_trainings_in_one_script(script, run, tmp_path):
    """The second without the loss."""
    source = SCRIPTS[script].read_text()
    end = 'if __name__ == "__main__":'
    assert end in source
    twice = source.replace("def main():", "def once():").replace(end, TWICE + end)
    (tmp_path / "train.py").write_text(twice)
    done = run(tmp_path / "train.py", FIVE)
    assert len(done.calls) == 8
    assert "train_gd_beta" in done.summary[0]
    assert "train_gd_beta" not in read_summary(done.folder.parent / "second")[0]


TWICE = """
def main():
    import sys

    once()
    gd = sys.argv.index("--loss")
    sys.argv[gd:] = ["--experiment", "second"]
    once()


"""


# Nothing stays changed (`launch` compares before and after every run) -------------------------------------------------


@both
def test_what_is_changed_while_a_script_runs(script, run):
    before, during = global_state(), []
    run(script, FIVE, "--epochs 1", then=lambda calls: during.append(global_state()))
    in_timm = {name for name in before if name.startswith("timm.") and before[name] is not None}
    assert len(in_timm) == (7 if "new" in SCRIPTS else 0)
    assert changed(before, during[0]) == {"argv", "script"} | in_timm


@both
def test_an_exception_in_training_leaves_nothing(script, run):
    def stop(calls):
        raise Stopped

    with pytest.raises(Stopped):
        run(script, FIVE, then=stop)


@new
def test_an_exception_in_validation_leaves_nothing(script, command, digits, tmp_path):
    evaluator = "timm.task.evaluator.ClassificationEvaluator.update"
    fails = f"import timm.task.evaluator; raise RuntimeError(hasattr({evaluator}, '__wrapped__'))"
    path = tmp_path / "train.py"
    path.write_text(SCRIPTS[script].read_text().replace("evaluator.update(output, target)", fails))
    with pytest.raises(RuntimeError, match="True"):
        launch(command, path, digits, tmp_path / "run", flags(FIVE))


# Two processes --------------------------------------------------------------------------------------------------------

# Samplers before timm 1.0.31 cannot be asked which images they have repeated, and repeat none of fewer than 256.
NEW_SAMPLERS = hasattr(OrderedDistributedSampler, "num_valid_samples")
CURVE = GradientDecayConfig(beta=5.0, beta_start=0.1, warmup_epochs=2)


@pytest.fixture(scope="module", autouse=True)
def torchrun(request, digits, tmp_path_factory):
    """Trainings in two processes, with half of every batch each. They are started before the first test, and waited
    for by the last ones: to start takes a process ten seconds."""
    if not any("two" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("two")
    accumulated = "--batch-size 8 --grad-accum-steps 3" + " --aug-repeats 3" * NEW_SAMPLERS
    kinds = {"": "--batch-size 32 --lr 0.2", ", accumulated": accumulated}
    runs = {
        f"{script}{kind}": [
            str(path),
            *arguments(digits, folder / f"{script}{kind}", [*words.split(), "--epochs", "3", *flags(CURVE)]),
        ]
        for script, path in SCRIPTS.items()
        for kind, words in kinds.items()
    }
    module = ["-m", "gd_plugin.timm", *runs["old"], "--experiment", "module"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with open(folder / "output", "w") as output, contextlib.ExitStack() as stack:
        processes = []
        for words in ([timm_runs.__file__, str(folder), json.dumps(runs)], module):
            processes.append(
                subprocess.Popen([*torchrun, *words], stdout=output, stderr=output, cwd=Path(__file__).parent)
            )
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].terminate)
        yield processes, folder


@pytest.fixture(scope="module")
def two(torchrun):
    """The folder with what two processes have trained."""
    processes, folder = torchrun
    for process in processes:
        assert process.wait(timeout=180) == 0, (folder / "output").read_text()[-4000:]
    return folder


@pytest.fixture(scope="module")
def alone(shared):
    return lambda script: shared(script, CURVE, "--epochs 3 --batch-size 64 --lr 0.2")


def betas(folder, name):
    return [json.loads((folder / f"betas-{rank}.json").read_text())[name] for rank in range(2)]


@both
def test_two_processes_have_the_same_betas(script, two, alone):
    assert betas(two, script) == [alone(script).betas] * 2 == [expected_betas(CURVE, 3, [1])] * 2
    assert len(set(alone(script).betas)) == 3
    # A process has 32 of 64 images, so 4 batches of 8: updates of 3 and of 1.
    assert betas(two, f"{script}, accumulated") == [expected_betas(CURVE, 3, [3, 1])] * 2
    assert betas(two, f"{script}, accumulated") != [expected_betas(CURVE, 3, [2, 2])] * 2


@both
def test_two_processes_are_one(script, two, alone, shared):
    one, other = alone(script).summary, shared(script, FIVE, "--epochs 3 --batch-size 64 --lr 0.2").summary
    names = list(one[0])
    if script == "old":  # whose means count the images that make the shares equally long
        names = [name for name in names if name not in ("eval_loss", "eval_top1", "eval_top5")]
    if not NEW_SAMPLERS:
        names = [name for name in names if not name.startswith("eval_")]
    summary = read_summary(two / script)
    assert len(summary) == 3
    for name in names:
        curve = [row[name] for row in summary]
        assert curve == pytest.approx([row[name] for row in one], rel=1e-5), name
        if name.endswith(("loss", "beta", "entropy", "nll", "brier", "ece", "gap")):
            assert curve != pytest.approx([row[name] for row in other], rel=1e-3), name


@both
def test_reliability_counts_every_image_once(script, two, alone, shared):
    assert VALIDATION % 2 == 1  # so that one process has to repeat an image
    records = [
        alone(script).record,
        read_record(two / script / "record.json"),
        shared(script, FIVE, "--epochs 3 --batch-size 64 --lr 0.2").record,
    ]
    counts, confidences = (
        [[row[name] for row in record["reliability"] if row["count"]] for record in records]
        for name in ("count", "confidence")
    )
    assert sum(counts[0]) == VALIDATION
    if NEW_SAMPLERS:
        assert counts[0] == counts[1]
        assert confidences[0] == pytest.approx(confidences[1], rel=1e-5)
    else:
        assert sum(counts[1]) == VALIDATION + 1
    assert confidences[0] != pytest.approx(confidences[2], rel=1e-3)


def test_torchrun_runs_the_module(two):
    runs = [read_summary(two / name) for name in ("module", "old", "old, accumulated")]
    assert runs[0] == runs[1] != runs[2]
    epochs = [read_record(two / name / "record.json")["epochs"] for name in ("module", "old")]
    assert epochs[0] == epochs[1]


@pytest.mark.parametrize(
    ("word", "near"),
    [("--gd-betta", "--gd-beta"), ("--gd-warmup_epoch=3", "--gd-warmup-epochs"), ("--gdx", "--gd-schedule")],
)
def test_a_misspelt_flag(word, near, refused):
    error, _ = refused("old", f"--loss gd --gd-beta 5 {word}")
    assert word in error and near in error


@both
def test_flags_with_underscores(script, shared):
    done = shared(script, None, "--loss gd --gd_beta 5 --gd_beta_start 0.01 --gd_warmup_epochs 1.5")
    assert done.betas == shared(script, LINEAR).betas


def test_variables_of_the_hook_are_not_ignored(refused, monkeypatch):
    monkeypatch.setenv("GD_BETA", "3")
    error, _ = refused("old", "--loss gd --gd-beta 5")
    assert "GD_BETA is set" in error


def test_the_beta_of_a_warm_up_is_logged_closely_enough_to_be_drawn(run):
    log = run("old", LINEAR, "--log-interval 1000").record["log"]
    assert [entry["step"] for entry in log] == list(range(1, 9))
