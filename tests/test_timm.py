"""The loss type of timm's factory, and what is said of a pushed model, through timm's own entry points."""

from __future__ import annotations

import copy
import inspect
import json
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import timm.loss
import timm.models._hub
import timm.optim
import timm.task
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

import gd_plugin
from gd_plugin import GradientDecayConfig, GradientDecayLoss, beta_at, gradient_decay_cross_entropy
from gd_plugin.timm import has_loss_factory, model_card, register, unregister
from gd_plugin.timm_train import TimmRun

NAMES = ("create_classification_loss", "LOSS_TYPES")
N, C = 6, 4
LOGITS = 2 * torch.randn(N, C, generator=torch.Generator().manual_seed(0))
TARGETS = {
    "hard": torch.tensor([0, 1, 2, 3, 1, 0]),
    "soft": torch.randn(N, C, generator=torch.Generator().manual_seed(1)).softmax(1),
    "multi": torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 1]]).float(),
}


@pytest.fixture(autouse=True)
def put_back():
    yield
    unregister()


@pytest.fixture
def registered():
    register()


def create(*args, **kwargs) -> torch.nn.Module:
    return timm.loss.create_classification_loss(*args, **kwargs)


def bindings() -> dict[tuple[str, str], object]:
    """Every place in timm where the factory or the names of its losses can be had."""
    return {
        (place, name): vars(module)[name]
        for place, module in list(sys.modules.items())
        if place.split(".")[0] == "timm" and module is not None
        for name in NAMES
        if name in vars(module)
    }


def one_object(name) -> bool:
    found = [value for (_, bound), value in bindings().items() if bound == name]
    return len(found) > 2 and all(value is found[0] for value in found)


# The loss -------------------------------------------------------------------------------------------------------------

# What timm is told, and what torch is told for the same cross-entropy.
VARIANTS = [
    ("hard", {}, {}),
    ("hard", {"smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("soft", {"soft_targets": True}, {}),
    ("soft", {"soft_targets": True, "smoothing": 0.1}, {}),  # Mixup has smoothed them
]


@pytest.mark.parametrize(("kind", "words", "torchs"), VARIANTS)
@pytest.mark.parametrize("place", [timm.loss, timm.task])
def test_the_loss_is_what_timm_asked_for(registered, place, kind, words, torchs):
    target = TARGETS[kind]
    cross_entropy = F.cross_entropy(LOGITS, target, **torchs)
    torch.testing.assert_close(create("ce", **words)(LOGITS, target), cross_entropy)
    one = place.create_classification_loss("gd", gd_beta=1.0, **words)
    five = place.create_classification_loss(loss_type="gd", gd_beta=5.0, **words)
    assert type(one) is type(five) is GradientDecayLoss
    torch.testing.assert_close(one(LOGITS, target), cross_entropy)
    assert torch.equal(five(LOGITS, target), gradient_decay_cross_entropy(LOGITS, target, 5.0, **torchs))
    assert abs(five(LOGITS, target) - cross_entropy) > 0.1
    assert five.label_smoothing == torchs.get("label_smoothing", 0.0)


def test_smoothing_is_seen(registered):
    """Or the variants above might all be one."""
    hard, soft = TARGETS["hard"], TARGETS["soft"]
    plain, smoothed = create("gd", gd_beta=5.0), create("gd", gd_beta=5.0, smoothing=0.1)
    assert abs(plain(LOGITS, hard) - smoothed(LOGITS, hard)) > 0.01
    assert abs(plain(LOGITS, soft) - smoothed(LOGITS, soft)) > 0.01


def test_without_a_beta_it_is_cross_entropy(registered):
    assert create("gd").beta == 1.0
    torch.testing.assert_close(create("gd")(LOGITS, TARGETS["hard"]), F.cross_entropy(LOGITS, TARGETS["hard"]))


def test_arguments_by_position(registered):
    assert create("gd", False, 0.1, gd_beta=5.0).label_smoothing == 0.1
    assert create("gd", False, 0.1, True, gd_beta=5.0).label_smoothing == 0.0


@pytest.mark.parametrize("form", [list, tuple, torch.tensor])
@pytest.mark.parametrize(("kind", "words", "torchs"), VARIANTS)
def test_a_beta_per_class(registered, form, kind, words, torchs):
    betas, target = [0.5, 1.0, 5.0, 20.0], TARGETS[kind]
    loss = create("gd", gd_beta=form(betas), **words)(LOGITS, target)
    assert torch.equal(loss, gradient_decay_cross_entropy(LOGITS, target, torch.tensor(betas), **torchs))
    assert abs(loss - gradient_decay_cross_entropy(LOGITS, target, torch.tensor(betas[::-1]), **torchs)) > 0.01


@pytest.mark.parametrize(("kind", "words", "torchs"), VARIANTS)
def test_class_weights(registered, kind, words, torchs):
    weights, target = [0.5, 1.0, 2.0, 0.0], TARGETS[kind]
    weight = torch.tensor(weights)
    one, five = (create("gd", gd_beta=beta, gd_class_weights=weights, **words)(LOGITS, target) for beta in (1, 5))
    torch.testing.assert_close(one, F.cross_entropy(LOGITS, target, weight, **torchs))
    assert torch.equal(five, gradient_decay_cross_entropy(LOGITS, target, 5.0, weight, **torchs))
    assert abs(one - F.cross_entropy(LOGITS, target, weight.flip(0), **torchs)) > 0.01
    assert abs(five - one) > 0.01


# What does not fit ----------------------------------------------------------------------------------------------------

WEIGHTS = "Class and positive weights are only supported by bce and multi-label asl losses."
BCE = "BCE target threshold and sum options only apply to the bce loss."
COUNTS = "Class counts are only used by the db loss."
MULTI_LABEL = (
    "Loss type 'gd' does not support multi-label targets, expected one of "
    "('bce', 'asl', 'poly', 'twoway', 'zlpr', 'db')."
)
REFUSED = [
    ({"class_weight": 2.0}, WEIGHTS),
    ({"class_weight": [1.0] * C}, WEIGHTS),
    ({"pos_weight": torch.ones(C)}, WEIGHTS),
    ({"bce_target_thresh": 0.2}, BCE),
    ({"bce_sum": True}, BCE),
    ({"class_counts": [1] * C}, COUNTS),
    ({"num_samples": 9}, COUNTS),
    ({"multi_label": True}, MULTI_LABEL),
    ({"multi_label": True, "smoothing": 0.1, "class_weight": 2.0}, MULTI_LABEL),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_timm_says_what_does_not_fit(registered, words, message):
    with pytest.raises(ValueError) as ours:
        create("gd", gd_beta=5.0, **words)
    with pytest.raises(ValueError) as timms:
        create("ce", **words)
    assert str(ours.value) == message == str(timms.value).replace("'ce'", "'gd'")


def test_multi_label_by_position_and_by_task(registered):
    with pytest.raises(ValueError) as error:
        create("gd", True, gd_beta=5.0)
    assert str(error.value) == MULTI_LABEL
    kwargs = dict(loss_type="gd", gd_beta=5.0)
    with pytest.raises(ValueError) as error:
        timm.task.MultiLabelClassificationTask(torch.nn.Linear(2, C), criterion_kwargs=kwargs)
    assert str(error.value) == MULTI_LABEL


@pytest.mark.parametrize("beta", [0, -1.0, float("nan"), float("inf"), [], [1.0, 0.0], "5", True, torch.tensor(-2.0)])
def test_a_bad_beta(registered, beta):
    with pytest.raises(ValueError, match=r"^gd_beta (must|is) "):
        create("gd", gd_beta=beta)


@pytest.mark.parametrize("weights", [2.0, [], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
def test_bad_class_weights(registered, weights):
    with pytest.raises(ValueError, match=r"^gd_class_weights (must|are) "):
        create("gd", gd_beta=5.0, gd_class_weights=weights)


def test_a_list_for_other_classes(registered):
    for words in ({"gd_beta": [1.0, 2.0]}, {"gd_beta": 5.0, "gd_class_weights": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="2"):
            create("gd", **words)(LOGITS, TARGETS["hard"])


@pytest.mark.parametrize("words", [{"gd_beta": 5.0}, {"gd_class_weights": [1.0] * C}])
@pytest.mark.parametrize("kind", [None, "ce", "bce"])
def test_our_arguments_are_for_our_loss(registered, kind, words):
    with pytest.raises(ValueError, match=r"gd_beta and gd_class_weights only apply to the gd loss\."):
        create(kind, **words)
    assert isinstance(create(kind), torch.nn.Module)


@pytest.mark.parametrize("words", [{"gd_betta": 5.0}, {"smooting": 0.1}])
@pytest.mark.parametrize("kind", ["gd", "ce"])
def test_a_typo(registered, kind, words):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(words))}'"):
        create(kind, **words)


def test_an_unknown_loss():
    with pytest.raises(ValueError, match=r"^Unknown loss type 'gd', expected one of \('ce', .*'db'\)\.$"):
        create("gd")
    register()
    with pytest.raises(ValueError, match=r"^Unknown loss type 'gdd', expected one of \('ce', .*'db', 'gd'\)\.$"):
        create("gdd")


# Everything else of timm ----------------------------------------------------------------------------------------------

MULTI = {"multi_label": True}
OTHERS = [
    (None, "hard", {}),
    (None, "multi", MULTI),
    *[("ce", kind, words) for kind, words, _ in VARIANTS],
    (
        "bce",
        "hard",
        {"smoothing": 0.1, "bce_target_thresh": 0.2, "bce_sum": True, "class_weight": [1.0, 2.0, 3.0, 4.0]},
    ),
    ("bce", "multi", MULTI | {"smoothing": 0.1, "pos_weight": 2.0}),
    ("asl", "hard", {"smoothing": 0.1}),
    ("asl", "multi", MULTI | {"asl_gamma_neg": 2.0}),
    ("poly", "soft", {"soft_targets": True}),
    ("poly", "multi", MULTI | {"poly_gamma": 2.0, "poly_alpha": 0.25}),
    ("jsd", "hard", {"jsd_splits": 3, "smoothing": 0.1}),
    ("twoway", "multi", MULTI),
    ("zlpr", "multi", MULTI),
    ("db", "multi", MULTI | {"class_counts": [3, 2, 2, 3], "num_samples": N}),
]


def test_every_loss_of_timm_is_compared():
    assert {name for name, _, _ in OTHERS} - {None} == set(timm.loss.LOSS_TYPES)


@pytest.mark.parametrize(("name", "kind", "words"), OTHERS)
def test_other_losses_are_as_they_were(name, kind, words):
    target = TARGETS[kind]
    before = create(name, **words)
    register()
    after = [place.create_classification_loss(name, **words) for place in (timm.loss, timm.task)]
    task = timm.task.MultiLabelClassificationTask if words.get("multi_label") else timm.task.ClassificationTask
    kwargs = {key: value for key, value in words.items() if key != "multi_label"}
    after.append(task(torch.nn.Linear(2, C), criterion_kwargs={"loss_type": name, **kwargs}).criterion)
    value = before(LOGITS, target)
    for loss in after:
        assert type(loss) is type(before)
        assert torch.equal(loss(LOGITS, target), value)
        assert not torch.equal(loss(LOGITS, target.roll(1, 0)), value)


WRONG = [
    ("ce", {"class_weight": 2.0}),
    ("bce", {"num_samples": 3}),
    ("twoway", {}),
    ("jsd", {}),
    ("jsd", MULTI),
    ("db", MULTI),
]


@pytest.mark.parametrize(("name", "words"), WRONG)
def test_other_losses_are_refused_as_they_were(name, words):
    with pytest.raises(ValueError) as before:
        create(name, **words)
    register()
    with pytest.raises(ValueError) as after:
        create(name, **words)
    assert str(after.value) == str(before.value)


# Registering ----------------------------------------------------------------------------------------------------------


def test_registered_everywhere_and_put_back():
    before = bindings()
    assert {place for place, _ in before} >= {
        "timm.loss",
        "timm.loss._loss_factory",
        "timm.task",
        "timm.task.classification",
    }
    assert all(map(one_object, NAMES))
    types = timm.loss.LOSS_TYPES
    register()
    assert bindings().keys() == before.keys()
    assert not any(value is before[key] for key, value in bindings().items())
    assert all(map(one_object, NAMES))
    assert (*types, "gd") == timm.loss.LOSS_TYPES
    unregister()
    assert bindings().keys() == before.keys()
    assert all(value is before[key] for key, value in bindings().items())
    with pytest.raises(ValueError, match="Unknown loss type 'gd'"):
        create("gd")


def test_twice_is_once():
    before = bindings()
    register()
    once = bindings()
    register()
    assert all(value is once[key] for key, value in bindings().items())
    assert timm.loss.LOSS_TYPES.count("gd") == 1
    for _ in range(2):
        unregister()
        assert all(value is before[key] for key, value in bindings().items())
    register()
    assert create("gd", gd_beta=5.0).beta == 5.0


def test_not_registered_nothing_is_put_back():
    before = bindings()
    unregister()
    assert all(value is before[key] for key, value in bindings().items())


def test_the_factory_keeps_its_name_and_its_parameters():
    original = timm.loss.create_classification_loss
    signature = inspect.signature(original)
    register()
    assert timm.loss.create_classification_loss is not original
    assert inspect.signature(timm.loss.create_classification_loss) == signature
    assert "class_counts" in signature.parameters
    assert timm.loss.create_classification_loss.__name__ == original.__name__
    assert timm.loss.create_classification_loss.__doc__ == original.__doc__


def test_timm_without_a_factory(monkeypatch):
    assert has_loss_factory()
    with monkeypatch.context() as older:
        older.delattr(timm.loss, "create_classification_loss")
        before = bindings()
        assert not has_loss_factory()
        with pytest.raises(RuntimeError, match=rf"^timm {timm.__version__} has no loss factory .* timm >= 1\.0\.31"):
            register()
        assert bindings().keys() == before.keys()
        assert all(value is before[key] for key, value in bindings().items())
    register()
    assert create("gd", gd_beta=5.0).beta == 5.0


def test_importing_the_module_does_not_import_timm(tmp_path):
    (tmp_path / "timm").mkdir()  # a stand-in, without the seconds that the real one takes
    for name in ("__init__", "loss"):
        (tmp_path / "timm" / f"{name}.py").touch()
    paths = [str(tmp_path), str(Path(gd_plugin.__file__).parents[1])]
    code = f"""
import sys
sys.path[:0] = {paths}
import gd_plugin.timm
print("timm" in sys.modules)
gd_plugin.timm.has_loss_factory()
print("timm" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]  # the second: an import of timm would be seen


# Tasks ----------------------------------------------------------------------------------------------------------------

IMAGES = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def tiny(seed=0) -> torch.nn.Module:
    """A student or teacher of any task: it has features, and a head for distillation."""
    sizes = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=C)
    torch.manual_seed(seed)
    return timm.create_model("deit_tiny_distilled_patch16_224", **sizes)


@pytest.mark.parametrize(
    "make",
    [
        lambda kwargs: timm.task.ClassificationTask(tiny(), criterion_kwargs=kwargs),
        lambda kwargs: timm.task.LogitDistillationTask(tiny(), tiny(1), criterion_kwargs=kwargs),
        lambda kwargs: timm.task.FeatureDistillationTask(tiny(), tiny(1), criterion_kwargs=kwargs),
        lambda kwargs: timm.task.TokenDistillationTask(tiny(), tiny(1), criterion_kwargs=kwargs),
    ],
    ids=["classification", "logits", "features", "token"],
)
@pytest.mark.parametrize(("kind", "words", "torchs"), VARIANTS)
def test_tasks(registered, make, kind, words, torchs):
    target = TARGETS[kind]
    task = make(dict(loss_type="gd", gd_beta=5.0, **words)).train()
    result = task(IMAGES, target)
    loss = result.get("task_loss", result["loss"])
    assert torch.equal(loss, gradient_decay_cross_entropy(result["output"], target, 5.0, **torchs))
    assert abs(loss - F.cross_entropy(result["output"], target, **torchs)) > 0.1
    result["loss"].backward()
    assert any(p.grad is not None and p.grad.any() for p in task.trainable_module.parameters())


def fit(config, updates=20, lr=0.02) -> tuple[list[float], float, float]:
    """Train as timm's loop does; beta of every update, and the loss at the final beta before and after."""
    task = timm.task.ClassificationTask(tiny(), criterion_kwargs=dict(loss_type="gd", gd_beta=config.beta)).train()
    optimizer = timm.optim.create_optimizer_v2(task.trainable_module, opt="adamw", lr=lr)
    target, buffer, betas = TARGETS["hard"], task.criterion.beta, []
    before = task(IMAGES, target)["loss"].item()
    for update in range(updates):
        task.criterion.set_beta(beta_at(config, update / updates))
        betas.append(buffer.item())
        optimizer.zero_grad()
        task(IMAGES, target)["loss"].backward()
        optimizer.step()
    task.criterion.set_beta(config.beta)
    assert task.criterion.beta is buffer
    return betas, before, task(IMAGES, target)["loss"].item()


def test_a_training_with_a_warm_up(registered):
    config = GradientDecayConfig(beta=5.0, beta_start=0.5, warmup_ratio=0.5)
    betas, before, after = fit(config)
    assert betas == pytest.approx([0.5 + 0.45 * update if update < 10 else 5.0 for update in range(20)])
    floor = math.log(5)  # of the loss at beta 5
    assert after - floor < 0.2 * (before - floor)
    constant, same_before, other_after = fit(GradientDecayConfig(beta=5.0))
    assert (constant, same_before) == ([5.0] * 20, before)
    assert after != other_after  # the warm-up reached the gradient


def test_without_learning_the_loss_stays(registered):
    _, before, after = fit(GradientDecayConfig(beta=5.0), updates=3, lr=0.0)
    assert before == after


# The card of a pushed model -------------------------------------------------------------------------------------------

RECORD = {
    "format": 1,
    "name": "20260101-120000-test_efficientnet-32",
    "created": "2026-01-01T12:00:00+00:00",
    "command": "gd-plugin timm train.py --data-dir flowers --loss gd --gd-beta 5 --gd-beta-start 0.01 --lr 0.0625",
    "config": {
        "aa": "rand-m9-mstd0.5",
        "amp": True,
        "batch_size": 48,
        "cutmix": 0.0,
        "epochs": 2,
        "grad_accum_steps": 1,
        "lr": 0.0625,
        "mixup": 0.25,
        "model": "test_efficientnet",
        "model_ema": False,
        "opt": "lamb",
        "sched": "cosine",
        "seed": 42,
        "smoothing": 0.1,
        "weight_decay": 0.02,
    },
    "gd": {
        "beta": 5.0,
        "beta_start": 0.01,
        "schedule": "geometric",
        "warmup_ratio": 0.0,
        "warmup_steps": 0,
        "warmup_epochs": 1.5,
        "class_weights": None,
    },
    "seed": 42,
    "python": "3.11.7",
    "platform": "Linux",
    "versions": {"gd_plugin": "0.1.0", "torch": "2.9.0", "timm": "1.0.31"},
    "commit": "0123456789abcdef",
    "hardware": {"cpu": "A processor", "cpu_count": 2, "gpu": [], "gpu_count": 0, "torch_threads": 1, "processes": 1},
    "dataset": {"name": "flowers", "train": 1020, "tested_on": "validation"},
    "model": {"name": "timm:test_efficientnet", "parameters": 101766},
    "epochs": [
        {
            "epoch": e,
            "step": 22 * e,
            "loss": 2.0 / e,
            "gd_beta": 5.0,
            "cross_entropy": 1.0 / e,
            "eval_loss": 1.5 / e,
            "eval_accuracy": 0.4 * e,
        }
        for e in (1, 2)
    ],
    "log": [{"epoch": 1.0, "step": 22, "gd_beta": 0.3}],
    "final": {"loss": 0.75, "top1": 87.5, "top5": 100.0, "accuracy": 0.875, "ece": 0.03125, "mce": None},
    "reliability": None,
    "wall_time_s": 61.5,
}


@pytest.fixture
def run(tmp_path):
    """Make the folder of a run, with some parts of the record changed."""

    def run(**changes) -> Path:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "record.json").write_text(json.dumps(RECORD | changes))
        return folder

    return run


def read_card(text) -> tuple[dict, str]:
    """The YAML at the top of a card, and the text below it."""
    before, front_matter, body = text.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front_matter), body


def test_the_record_is_like_those_of_a_training():
    args = Namespace(dataset="", data_dir="flowers", val_split="validation", model="test_efficientnet", seed=42)
    of_run = TimmRun(GradientDecayConfig(beta=5.0), "", str)
    of_run._output_dir = "out"
    given = {"args": args, "loader": SimpleNamespace(dataset=[None] * 1020), "model": torch.nn.Linear(2, 2)}
    written = of_run._new_record(given)
    assert written["dataset"]["train"] == 1020
    of_a_stream = of_run._new_record(given | {"loader": SimpleNamespace(dataset=iter([]))})
    assert of_a_stream == written | {
        "created": of_a_stream["created"],
        "dataset": {"name": "flowers", "train": None, "tested_on": "validation", "label_names": None},
    }
    assert RECORD.keys() == written.keys() | {"wall_time_s"}
    for part in ("gd", "hardware", "dataset", "model"):
        assert RECORD[part].keys() == written[part].keys() - {"label_names"}, part


def test_the_card_says_how_the_model_was_trained(run):
    front_matter, body = read_card(timm.models._hub.generate_readme(model_card(run()), "flowers-gd"))
    assert {"image-classification", "timm", "gradient-decay", "calibration", "arxiv:2210.17145"} <= set(
        front_matter["tags"]
    )
    assert (front_matter["library_name"], front_matter["pipeline_tag"]) == ("timm", "image-classification")
    lines = body.split("\n")
    for line in (
        "# Model card for flowers-gd",
        "- **Gradient-decay loss:**",
        "  - beta: 5.0",
        "  - beta_start: 0.01",
        "  - schedule: geometric",
        "  - warmup_epochs: 1.5",
        "  - model: test_efficientnet",
        "  - lr: 0.0625",
        "  - batch_size: 48",
        "  - opt: lamb",
        "  - seed: 42",
        "- **Training data:** flowers",
        "- **Results on the validation split after epoch 2 (n = 1 run):**",
        "  - accuracy: 0.8750",
        "  - ece: 0.0312",
        f"- **Command:** `{RECORD['command']}`",
        "- **Versions:** gd_plugin 0.1.0, torch 2.9.0, timm 1.0.31",
        "- **Hardware:** A processor, 1 thread(s)",
        "- **Commit of gd_plugin:** 0123456789abcdef",
    ):
        assert line in lines, line
    assert "  - mce: not finite" in lines and "class_weights" not in body and "None" not in body
    bibtex = body.split("```bibtex\n")[1].split("\n```")[0]
    assert bibtex.startswith("@article{") and bibtex.endswith("}") and bibtex.count("{") == bibtex.count("}")
    assert "Probability-Dependent Gradient Decay in Large Margin Softmax" in bibtex and "2210.17145" in bibtex


def test_the_card_is_of_its_run(run):
    other = run(
        gd=RECORD["gd"] | {"beta": [1.0, 2.0], "beta_start": None, "warmup_epochs": 0.0},
        config={"lr": 0.5},
        final={"accuracy": 0.25},
        hardware=RECORD["hardware"] | {"gpu": ["A card", "A card"]},
    )
    _, body = read_card(timm.models._hub.generate_readme(model_card(str(other)), "other"))
    for text in (
        "  - beta: [1.0, 2.0]\n",
        "  - lr: 0.5\n",
        "  - accuracy: 0.2500\n",
        "- **Hardware:** A card, A card\n",
    ):
        assert text in body
    for text in ("5.0", "beta_start", "warmup", "0.0625", "0.8750", "A processor"):
        assert text not in body.replace(RECORD["command"], "")


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """Push a model with timm, with a folder in the place of the Hub; that folder, and the model."""
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **_):
            return False

        def upload_folder(self, folder_path, **_):
            shutil.copytree(folder_path, hub, dirs_exist_ok=True)

    def push(card) -> tuple[Path, torch.nn.Module]:
        model = timm.create_model("test_efficientnet", num_classes=3)
        timm.models.push_to_hf_hub(model, "user/flowers-gd", model_card=card)
        return hub, model

    monkeypatch.setattr(timm.models._hub, "HfApi", Api)
    return push


def test_push_to_the_hub(pushed, run):
    card = model_card(run())
    untouched = copy.deepcopy(card)
    hub, model = pushed(card)
    assert card == untouched
    front_matter, body = read_card((hub / "README.md").read_text(encoding="utf-8"))
    assert "gradient-decay" in front_matter["tags"]
    assert "# Model card for flowers-gd\n" in body
    assert "  - beta: 5.0\n" in body and "  - lr: 0.0625\n" in body and "  - accuracy: 0.8750\n" in body
    weights = load_file(hub / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_push_without_the_card_says_nothing(pushed):
    hub, _ = pushed(None)
    front_matter, body = read_card((hub / "README.md").read_text(encoding="utf-8"))
    assert "gradient-decay" not in front_matter["tags"] and "beta" not in body


def test_a_folder_without_a_record(tmp_path, run):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OSError, match=r"record\.json"):
            model_card(folder)
    with pytest.raises(ValueError, match=r"record\.json: record of format 2"):
        model_card(run(format=2))
    folder = run()
    (folder / "record.json").write_text("{")
    with pytest.raises(ValueError, match=r"record\.json: not JSON"):
        model_card(folder)


def test_the_card_names_the_epoch_that_was_measured(run):
    unmeasured = {"epoch": 3, "step": 66, "loss": 0.6, "gd_beta": 5.0, "cross_entropy": 0.3}
    averaged = RECORD["config"] | {"model_ema": True}
    details = model_card(run(epochs=[*RECORD["epochs"], unmeasured], config=averaged))["details"]
    assert "Results on the validation split after epoch 2 (n = 1 run, averaged weights)" in details
    assert "Results on the validation split after epoch 2 (n = 1 run)" in model_card(run())["details"]
