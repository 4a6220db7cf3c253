"""The recipes that come with the package, and what they and `gd-plugin study` are made of: augmentation, the losses to
compare with, and what is fitted after training."""

import math
from types import SimpleNamespace

import pytest
import timm
import timm.loss
import torch
import torch.nn.functional as F
import yaml
from scipy.optimize import minimize_scalar
from torch import nn
from transformers import default_data_collator

from gd_plugin import GradientDecayConfig, gradient_decay_cross_entropy
from gd_plugin.arguments import DataArguments, parse
from gd_plugin.baselines import BaselineLossFunc, baseline
from gd_plugin.calibration import fit_temperature, fit_vector_scaling
from gd_plugin.cli import recipes_folder
from gd_plugin.data import PreparedImages, augment, collate_images, load_data
from gd_plugin.fit import _Trainer
from gd_plugin.hf import GradientDecayTrainingArguments
from gd_plugin.models import build_model
from gd_plugin.record import read_record

RECIPES = recipes_folder()
DEFAULTS = "defaults"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if path.stem != DEFAULTS)
needs_poly1 = pytest.mark.skipif(
    not hasattr(timm.loss, "PolyCrossEntropy"), reason="timm has the Poly-1 loss from 1.0.31 on"
)
LOSSES = ["focal", pytest.param("poly1", marks=needs_poly1)]

# The recipes ----------------------------------------------------------------------------------------------------------


def read(name):
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def test_there_are_recipes():
    assert {"digits", "mnist_mlp", "mnist_lenet", "cifar10_resnet18"} <= set(NAMES)


@pytest.mark.parametrize("grid", ["runs", "study"])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_one(name, grid):
    runs, options = parse([name], RECIPES, grid)
    names = [run.name for run in runs]
    assert len(names) > 1 and len(set(names)) == len(names) == len({run.folder for run in runs})
    assert options.output_dir == f"{'runs' if grid == 'runs' else 'studies'}/{name}"
    # The first method is what the others are compared with.
    assert runs[0].args.gd_config == GradientDecayConfig()
    assert (runs[0].model.loss, runs[0].args.label_smoothing_factor) == ("gd", 0)
    kinds = [(r.args.gd_config, r.args.label_smoothing_factor, r.model.loss, r.args.seed) for r in runs]
    assert all(kind not in kinds[:i] for i, kind in enumerate(kinds))


@pytest.mark.parametrize("name", NAMES)
def test_the_model_of_every_recipe_takes_its_images(name):
    run = parse([name], RECIPES)[0][0]
    classes = len(run.data.classes or range(10))
    data = SimpleNamespace(name=name, kind="image", label_names=[str(i) for i in range(classes)])
    model, processor = build_model(run.model, data)
    size = processor.data_config["input_size"]
    assert list(size) == [3, run.model.image_size, run.model.image_size]
    with torch.no_grad():
        logits = model.eval()(pixel_values=torch.rand(2, *size)).logits
    assert logits.shape == (2, classes) and logits.isfinite().all()


TWINS = sorted(path.stem for path in (RECIPES / "timm").glob("*.yaml"))


def test_every_image_recipe_has_a_twin_for_timm():
    """But the built-in data, and SVHN, since timm's reader of `datasets` takes no configuration's name."""
    assert {*NAMES} - {*TWINS} == {"digits", "digits_traced", "svhn_resnet18"} and {*TWINS} <= {*NAMES}


@pytest.mark.parametrize("name", TWINS)
def test_the_twin_for_timm_says_the_same(name):
    run = parse([name], RECIPES)[0][0]
    twin = yaml.safe_load((RECIPES / f"timm/{name}.yaml").read_text())
    args, image_size = run.args, run.model.image_size
    assert twin["dataset"] == f"hfds/{run.data.dataset}" and twin["num_classes"] == len(run.data.classes)
    assert (twin["input_size"], twin["crop_pct"]) == ([3, image_size, image_size], 1.0)
    assert twin["train_split"] == f"train[:{run.data.max_train_samples or '90%'}]" and args.seed == 42  # timm's own
    assert twin["val_split"] == "train[90%:]" and run.data.validation_fraction == 0.1
    assert (twin["epochs"], twin["lr"]) == (args.num_train_epochs, args.learning_rate)
    assert (twin["batch_size"], twin["validation_batch_size"]) == (
        args.per_device_train_batch_size,
        args.per_device_eval_batch_size,
    )
    assert (twin["weight_decay"], twin["clip_grad"]) == (args.weight_decay, args.max_grad_norm)
    assert twin["warmup_epochs"] == pytest.approx(args.warmup_steps * args.num_train_epochs)
    assert (twin["opt"], twin["sched"], twin["smoothing"], twin["min_lr"]) == ("adamw", "cosine", 0, 0)
    assert (args.optim, args.lr_scheduler_type) == ("adamw_torch", "cosine")
    if run.data.augmentation == "none":
        assert twin["no_aug"]
    else:
        assert twin["hflip"] == (0.5 if run.data.augmentation == "crop_flip" else 0)

    data = SimpleNamespace(name=name, kind="image", label_names=[str(i) for i in range(twin["num_classes"])])
    ours, _ = build_model(run.model, data)
    theirs = timm.create_model(
        twin["model"], num_classes=twin["num_classes"], global_pool=twin.get("gp"), **twin.get("model_kwargs", {})
    )
    assert [p.shape for p in theirs.parameters()] == [p.shape for p in ours.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_those_of_every_recipe(name):
    said, defaults = read(name), read(DEFAULTS)
    args = parse([name], RECIPES)[0][0].args
    for key in ("weight_decay", "learning_rate", "num_train_epochs", "per_device_train_batch_size"):
        assert getattr(args, key) == said.get(key, defaults[key])
    assert args.weight_decay != GradientDecayTrainingArguments("out").weight_decay


def test_a_flag_goes_before_the_recipe_and_the_recipe_before_the_defaults():
    assert read("digits")["num_train_epochs"] == 12 != read(DEFAULTS)["num_train_epochs"]
    for grid in ("runs", "study"):
        assert parse(["digits"], RECIPES, grid)[0][0].args.num_train_epochs == 12
        flags = ["--num_train_epochs", "3", "--weight_decay=0.5"]
        for run in parse(["digits", *flags], RECIPES, grid)[0]:
            assert (run.args.num_train_epochs, run.args.weight_decay) == (3, 0.5)


def test_a_recipe_elsewhere_has_the_defaults_that_lie_beside_it(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("dataset: digits\nmodel: timm:x\nstudy: {ce: {gd_beta: 1}, b: {gd_beta: 2}}\n")
    plain = GradientDecayTrainingArguments("out").weight_decay
    assert parse([str(recipe)], RECIPES, "study")[0][0].args.weight_decay == plain
    # Neither does one of the package's beside which there are no defaults.
    (tmp_path / "digits.yaml").write_bytes((RECIPES / "digits.yaml").read_bytes())
    assert parse([str(tmp_path / "digits.yaml")], RECIPES)[0][0].args.weight_decay == plain
    (tmp_path / "defaults.yaml").write_text("weight_decay: 0.3\nstudy: {other: {gd_beta: 3}}\n")
    (run, _), _ = parse([str(recipe)], RECIPES, "study")
    assert (run.name, run.args.weight_decay) == ("ce", 0.3)
    assert parse([str(recipe), "--weight_decay", "0.1"], RECIPES, "study")[0][0].args.weight_decay == 0.1


# Augmentation ---------------------------------------------------------------------------------------------------------

SIZES = [(16, 16), (8, 24), (24, 8), (9, 17), (7, 7), (1, 1), (1, 8), (8, 1)]


def numbered(n, height, width, channels=2):
    """Images of which no two pixels have the same value."""
    return torch.arange(n * channels * height * width, dtype=torch.float64).view(n, channels, height, width)


def crops(image):
    """Every image that a shift by up to an eighth can give, by its shift: pixel by pixel, mirrored at the border."""
    _, height, width = image.shape

    def mirrored(i, size):
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    found = {}
    for dy in range(-(height // 8), height // 8 + 1):
        for dx in range(-(width // 8), width // 8 + 1):
            rows = [mirrored(i + dy, height) for i in range(height)]
            columns = [mirrored(i + dx, width) for i in range(width)]
            found[dy, dx] = image[:, rows][:, :, columns]
    return found


def which(image, found):
    """The shift and whether it is mirrored; of an image that is its own mirror image, not mirrored."""
    for mirror in (False, True):
        for shift, crop in found.items():
            if torch.equal(image, crop.flip(2) if mirror else crop):
                return shift, mirror
    raise AssertionError("neither a shift of the image nor a mirrored one")


@pytest.mark.parametrize("augmentation", ["crop", "crop_flip"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_output_is_a_shift_of_its_image(height, width, augmentation):
    n = 200
    pixels = numbered(n, height, width)
    torch.manual_seed(0)
    before = pixels.clone()
    after = augment(pixels, augmentation)
    assert after.shape == pixels.shape and torch.equal(pixels, before)
    drawn = [which(image, crops(original)) for image, original in zip(after, pixels, strict=True)]
    assert {shift for shift, _ in drawn} == crops(pixels[0]).keys()  # of 25 at most, each about 8 times
    mirrored = sum(mirror for _, mirror in drawn)
    assert 70 < mirrored < 130 if augmentation == "crop_flip" and width > 1 else mirrored == 0


def test_none_changes_nothing():
    pixels = numbered(3, 8, 8)
    state = torch.get_rng_state()
    assert augment(pixels, "none") is pixels
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_augmentation_follows_the_seed_and_keeps_the_type(dtype):
    pixels = torch.rand(32, 3, 16, 16).to(dtype)
    torch.manual_seed(3)
    first, other = augment(pixels, "crop_flip"), augment(pixels, "crop_flip")
    torch.manual_seed(3)
    assert torch.equal(augment(pixels, "crop_flip"), first)
    assert first.dtype == dtype and not torch.equal(first, other)


def test_only_training_batches_are_augmented(small, tmp_path, monkeypatch):
    """In a real run of the command: as many images as training sees, and none of validation, test, trace or
    calibration."""
    from gd_plugin import cli, fit

    counts = []
    monkeypatch.setattr(fit, "augment", lambda pixels, *args: (counts.append(len(pixels)), augment(pixels, *args))[1])
    words = ["--dataset", "digits", *small, "--num_train_epochs", "2", "--trace_samples", "16"]
    for kind in ("crop_flip", "none"):
        assert cli.main(["train", *words, "--augmentation", kind, "--output_dir", str(tmp_path / kind)]) == 0
        assert (sum(counts), kind) in ((2 * 128, "crop_flip"), (2 * 128, "none"))
    a, b = (read_record(tmp_path / kind / "record.json") for kind in ("crop_flip", "none"))
    assert a["log"] != b["log"]  # negative control: it does change training


def test_an_evaluation_is_the_same_twice(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.augmentation = "crop_flip"
    first, second = (trainer.evaluate()["eval_nll"] for _ in range(2))
    assert first == second
    trainer.model.train()  # negative control: in training mode the same batch differs
    batch = {"pixel_values": torch.rand(8, 3, 16, 16), "labels": torch.zeros(8, dtype=torch.long)}
    assert not torch.equal(trainer._prepare_inputs(batch)["pixel_values"], batch["pixel_values"])


@pytest.mark.parametrize("kept", [True, False], ids=["in memory", "decoded again"])
def test_a_batch_is_what_its_images_are_one_by_one(kept):
    data = load_data(DataArguments(dataset="digits", max_train_samples=8, max_eval_samples=1))
    model = SimpleNamespace(model="timm:test_efficientnet", image_size=16, model_args=None)
    images = PreparedImages(data.train, build_model(model, data)[1])
    assert images.pixels is not None
    if not kept:
        images.pixels = None
    indices = [5, 0, 5, 7]
    batch = collate_images(images.__getitems__(indices))
    expected = default_data_collator([images[i] for i in indices])
    assert batch.keys() == expected.keys() == {"pixel_values", "labels"}
    for key, value in expected.items():
        assert torch.equal(batch[key], value) and batch[key].dtype == value.dtype
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    loader = torch.utils.data.DataLoader(images, batch_size=4, collate_fn=collate_images)
    assert torch.equal(torch.cat([b["labels"] for b in loader]), data.train.labels)


# Losses to compare with -----------------------------------------------------------------------------------------------


def expected_loss(name, logits, target):
    log_p = logits.double().log_softmax(1)[torch.arange(len(target)), target]
    p = log_p.exp()
    return -((1 - p) ** 2) * log_p if name == "focal" else -log_p + 2 * (1 - p)


@pytest.fixture
def sample():
    """Logits from confidently wrong to confidently right, and their targets."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, (40,), generator=generator)
    logits = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    logits[torch.arange(40), target] += torch.linspace(-8, 8, 40, dtype=torch.float64)
    return logits, target


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_every_sample_and_its_gradient(sample, name):
    logits, target = sample
    logits.requires_grad_()
    losses, expected = baseline(name)(logits, target).double(), expected_loss(name, logits, target)
    tolerance = dict(rtol=1e-12, atol=1e-14) if name == "focal" else dict(rtol=1e-5, atol=1e-6)  # timm's is in fp32
    torch.testing.assert_close(losses, expected, **tolerance)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (losses, expected)]
    torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_as_the_trainer_calls_it(sample, name):
    logits, target = sample
    ignored = target.clone()
    ignored[::3] = -100
    counted = ignored != -100
    expected = expected_loss(name, logits, target)[counted]
    plain = F.cross_entropy(logits, ignored, reduction="sum").item()
    function = BaselineLossFunc(GradientDecayConfig(), criterion=baseline(name))
    function.bind(nn.Linear(1, 1), GradientDecayTrainingArguments("out", use_cpu=True))
    outputs = {"logits": logits.float().requires_grad_()}
    for items, value in ((None, expected.mean()), (50, expected.sum() / 50), (torch.tensor(50), expected.sum() / 50)):
        assert function(outputs, ignored, items).item() == pytest.approx(value.item(), rel=1e-5)
        assert function.pop_cross_entropy() == pytest.approx(plain / counted.sum().item(), rel=1e-5)
    # What is ignored is ignored, whatever is predicted there.
    with torch.no_grad():
        outputs["logits"][~counted] = 1e4
    loss = function(outputs, ignored)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, outputs["logits"])
    assert gradient.isfinite().all() and not gradient[~counted].any() and gradient[counted].any(1).all()
    with torch.no_grad():  # an evaluation is plain cross-entropy
        assert function(outputs, ignored).item() == pytest.approx(plain / counted.sum().item(), rel=1e-5)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, pixel_values=None, labels=None):
        return {"logits": self.layer(pixel_values)}


class Points(torch.utils.data.Dataset):
    """Of three classes, which a linear model can tell apart."""

    def __init__(self, n=64):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(3, (n,), generator=generator)
        self.points = torch.randn(n, 4, generator=generator) + 3 * F.one_hot(self.labels, 4)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.points[index], "labels": self.labels[index]}


def trainer_of(folder, loss=None, **arguments):
    """As `gd_plugin.fit.fit` makes one."""
    torch.manual_seed(0)
    args = GradientDecayTrainingArguments(
        str(folder),
        **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1},
        **{"learning_rate": 0.1, "lr_scheduler_type": "constant", "remove_unused_columns": False, **arguments},
    )
    criterion = None if loss is None else baseline(loss)
    return _Trainer(criterion=criterion, model=Linear(), args=args, train_dataset=Points(), eval_dataset=Points())


@pytest.mark.parametrize("name", LOSSES)
def test_a_training_with_gradient_accumulation(tmp_path, name):
    """It learns, and four batches of 4 are one of 16."""
    histories, weights = [], []
    for batch, steps in ((16, 1), (4, 4)):
        trainer = trainer_of(
            tmp_path, name, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, num_train_epochs=4
        )
        start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.train()
        histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
        weights.append(trainer.model.layer.weight.detach().clone())
    for key in ("loss", "cross_entropy"):
        whole, parts = ([entry[key] for entry in history] for history in histories)
        assert len(whole) == 16 and parts == pytest.approx(whole, rel=1e-4)
        assert sum(whole[-4:]) < 0.5 * sum(whole[:4])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    assert histories[0][0]["loss"] != pytest.approx(histories[0][0]["cross_entropy"], rel=1e-2)
    assert not torch.equal(start["layer.weight"], weights[1])
    # An evaluation measures all losses alike.
    logits, target = trainer.model.layer(Points().points), Points().labels
    assert trainer.evaluate()["eval_loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)


def test_an_additive_margin_is_a_fixed_beta(sample):
    logits, target = sample
    logits.requires_grad_()
    for margin in (-1.0, 0.35, 2.3, 10.0):
        shifted = logits - margin * F.one_hot(target, 5)
        with_margin = F.cross_entropy(shifted, target, reduction="none")
        ours = gradient_decay_cross_entropy(logits, target, math.exp(-margin), reduction="none")
        torch.testing.assert_close(with_margin, ours + margin, rtol=1e-6, atol=1e-6)
        gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (with_margin, ours)]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


# Calibration ----------------------------------------------------------------------------------------------------------


def nll(logits, target):
    return F.cross_entropy(logits.double(), target).item()


def calibrated(n, classes, seed):
    """Logits whose softmax is the distribution of their targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, logits.softmax(1).multinomial(1, generator=generator)[:, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.05, 0.5, 1, 3, 50])
def test_the_temperature_is_the_one_that_scipy_finds(scale, seed):
    logits, target = calibrated(200, (2, 3, 10)[seed % 3], seed)
    logits = scale * logits
    found = minimize_scalar(
        lambda s: nll(logits * math.exp(s), target), bounds=(-8, 8), method="bounded", options={"xatol": 1e-9}
    )
    assert fit_temperature(logits, target) == pytest.approx(math.exp(-found.x), rel=1e-4)


def test_a_temperature_is_recovered_and_takes_any_floating_point_type():
    logits, target = calibrated(4000, 10, 0)
    once = fit_temperature(logits, target)
    assert once == pytest.approx(1, rel=0.1)
    for temperature in (0.1, 0.7, 5, 30):
        scaled = logits * temperature
        before = scaled.clone()
        assert fit_temperature(scaled, target) == pytest.approx(temperature * once, rel=1e-4)
        assert torch.equal(scaled, before)
    assert fit_temperature(logits.float(), target) == pytest.approx(once, rel=1e-4)
    with torch.no_grad():
        assert fit_temperature(logits.bfloat16(), target) == pytest.approx(once, rel=1e-2)


@pytest.mark.parametrize("seed", range(5))
def test_vector_scaling_fits_at_least_as_well_as_a_temperature(seed):
    logits, target = calibrated(300, 4, seed)
    logits = 3 * logits + torch.tensor([1.0, 0, -1, 0], dtype=torch.float64)
    scale, bias = fit_vector_scaling(logits, target)
    assert scale.shape == bias.shape == (4,)
    with_temperature = nll(logits / fit_temperature(logits, target), target)
    assert nll(logits * scale + bias, target) < with_temperature < nll(logits, target)


def test_nothing_is_fitted_where_every_sample_is_right():
    logits, target = 3 * torch.eye(4), torch.arange(4)
    assert fit_temperature(logits, target) == 1
    scale, bias = fit_vector_scaling(logits, target)
    assert torch.equal(scale, torch.ones(4).double()) and torch.equal(bias, torch.zeros(4).double())


@pytest.mark.parametrize(
    ("logits", "target"),
    [
        (3 * torch.eye(4), (torch.arange(4) + 1) % 4),  # every sample wrong
        (torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])),
        (torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1])),  # a draw, so that no temperature is the best
        (torch.tensor([[1e4, 0.0], [0.0, 1e4], [1e4, 0.0]]), torch.tensor([0, 1, 1])),
        (torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) * 1e-6, torch.tensor([0, 1, 2])),
    ],
    ids=["wrong", "zeros", "draw", "huge", "tiny"],
)
def test_odd_logits_have_a_finite_calibration_that_is_no_worse(logits, target):
    temperature = fit_temperature(logits, target)
    scale, bias = fit_vector_scaling(logits, target)
    assert 0 < temperature < math.inf and scale.isfinite().all() and bias.isfinite().all()
    for scaled in (logits / temperature, logits * scale + bias):
        assert nll(scaled, target) <= nll(logits, target) + 1e-9


@pytest.mark.parametrize("fit", [fit_temperature, fit_vector_scaling])
@pytest.mark.parametrize(
    "logits",
    [torch.zeros(0, 3), torch.tensor([[0.0, math.nan], [1.0, 0.0]]), torch.tensor([[0.0, math.inf], [1.0, 0.0]])],
    ids=["none", "NaN", "infinite"],
)
def test_logits_that_cannot_be_calibrated(fit, logits):
    with pytest.raises(ValueError, match=r"^calibration needs finite logits of at least one sample; "):
        fit(logits, torch.zeros(len(logits), dtype=torch.long))
