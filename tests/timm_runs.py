"""What the tests of `gd-plugin timm` share. As a script it is `python -m gd_plugin.timm`, several times in a row, which
writes down the betas; `test_timm_train.py` runs it with two processes:

python -m torch.distributed.run --nproc-per-node 2 timm_runs.py FOLDER '{"name": ["train.py", "--flag", ...], ...}'
"""

import csv
import json
import logging
import math
import os
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from gd_plugin.config import GradientDecayConfig
from gd_plugin.record import read_record
from gd_plugin.schedule import beta_at
from gd_plugin.timm import has_loss_factory
from gd_plugin.timm_options import FIELDS
from gd_plugin.timm_train import _TrainingLoss

# The new one needs timm >= 1.0.31, the old one runs with all that are supported.
SCRIPTS = {
    name: Path(__file__).parent / "timm_scripts" / name / "train.py"
    for name in ("new", "old")
    if name == "old" or has_loss_factory()
}
CLASSES, TRAIN, VALIDATION = 10, 64, 41
# Four updates per epoch of an untrained network without batch norm: with that, the parts of a batch would matter.
SMALL = (
    f"--num-classes {CLASSES} --img-size 32 --model test_vit --model-kwargs img_size=32 depth=2 --workers 0 "
    "--device cpu --batch-size 16 --epochs 2 --warmup-epochs 0 --smoothing 0 --log-interval 1"
).split()


def write_digits(folder: Path) -> Path:
    """An image folder: train/CLASS/*.png and validation/CLASS/*.png."""
    digits = load_digits()
    for index in range(TRAIN + VALIDATION):
        split = "train" if index < TRAIN else "validation"
        path = folder / split / str(digits.target[index]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((digits.images[index] * 15).astype("uint8")).resize((32, 32))
        image.convert("RGB").save(path)
    return folder


class Call(NamedTuple):
    """What one call of the training loss was given and gave."""

    beta: float | list[float]
    input: Tensor
    target: Tensor
    loss: float


@contextmanager
def observed_losses(then=lambda calls: None):
    """The calls of the training loss, in the order of the micro-batches. ``then`` is called after each."""
    original, calls = _TrainingLoss.forward, []

    def forward(self, input, target):
        loss = original(self, input, target)
        calls.append(Call(self.beta.tolist(), input.detach(), target, loss.item()))
        then(calls)
        return loss

    _TrainingLoss.forward = forward
    try:
        yield calls
    finally:
        _TrainingLoss.forward = original


@contextmanager
def own_logging():
    """timm's scripts add a handler to the root logger with every run."""
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def global_state() -> dict[str, Any]:
    """Everything outside of a script's own namespace that a run may change while it lasts, as far as timm has it."""
    state = {"argv": sys.argv, "script": sys.modules.get("train")}
    for place in ("timm.loss", "timm.loss._loss_factory", "timm.task", "timm.task.classification"):
        for name in ("LOSS_TYPES", "create_classification_loss"):
            state[f"{place}.{name}"] = getattr(sys.modules.get(place), name, None)
    evaluator = getattr(sys.modules.get("timm.task.evaluator"), "ClassificationEvaluator", None)
    return state | {"update": getattr(evaluator, "update", None)}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before if before[name] is not after[name]}


def flags(config: GradientDecayConfig) -> list[str]:
    """``--loss gd`` and the flags of a configuration."""
    words = ["--loss", "gd"]
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if value != field.default or name == "beta":
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--gd-{name.replace('_', '-')}", text]
    return words


def expected_betas(config: GradientDecayConfig, epochs: float, micro_batches: list[int], start: int = 0) -> list:
    """beta of every micro-batch from epoch ``start`` on, ``micro_batches``: how many each update of an epoch has."""
    per_epoch = len(micro_batches)
    total = epochs * per_epoch
    resolved = config.resolve(total, per_epoch)
    betas = []
    for update in range(start * per_epoch, total):
        beta = torch.tensor(beta_at(resolved, update / total), dtype=torch.float32).tolist()
        betas += [beta] * micro_batches[update % per_epoch]
    return betas


def read_summary(folder: Path) -> list[dict[str, float]]:
    """The rows of a summary.csv. Scripts before timm 1.0.31 repeat the header when they resume."""
    with open(folder / "summary.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["epoch"] != "epoch"]
    return [{name: float(value) if value else math.nan for name, value in row.items()} for row in rows]


class Run(NamedTuple):
    folder: Path
    code: int
    out: str
    err: str
    calls: list[Call]

    @property
    def betas(self) -> list:
        return [call.beta for call in self.calls]

    @property
    def summary(self) -> list[dict[str, float]]:
        return read_summary(self.folder)

    @property
    def record(self) -> dict[str, Any]:
        return read_record(self.folder / "record.json")

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.summary]


def arguments(data: Path, folder: Path, words) -> list[str]:
    """The words of a run on ``data`` into ``folder``; ``words`` come last, so that they win."""
    words = words.split() if isinstance(words, str) else words
    augmentation = [] if "--aug-splits" in words else ["--no-aug"]  # the splits are differently augmented images
    where = ["--data-dir", data, "--output", folder.parent, "--experiment", folder.name]
    return [str(word) for word in (*where, *augmentation, *SMALL, *words)]


def launch(command, script: str | Path, data: Path, folder: Path, words, then=lambda calls: None) -> Run:
    """`gd-plugin timm` in this process; what it changed in timm and in Python, it has changed back.

    ``script``: a path, or a key of `SCRIPTS`. ``then`` is called after every call of the training loss.
    """
    before, path = global_state(), list(sys.path)
    try:
        with own_logging(), observed_losses(then) as calls:
            outcome = command("timm", SCRIPTS.get(script, script), *arguments(data, folder, words))
    finally:
        assert not changed(before, global_state())
        assert sys.path == path
    return Run(folder, *outcome, calls)


def main(folder: str, runs: str) -> None:
    # One process group for all runs: the keys of one that is destroyed stay where the next would look for its own.
    torch.distributed.init_process_group("gloo")
    torch.distributed.init_process_group = lambda *_, **__: None
    destroy, torch.distributed.destroy_process_group = torch.distributed.destroy_process_group, lambda: None
    betas, codes = {}, []
    for name, words in json.loads(runs).items():
        sys.argv = ["timm", *words]
        with observed_losses() as calls:
            try:
                runpy.run_module("gd_plugin.timm", run_name="__main__")
            except SystemExit as end:
                codes.append(end.code)
        betas[name] = [call.beta for call in calls]
    (Path(folder) / f"betas-{os.environ['RANK']}.json").write_text(json.dumps(betas))
    torch.distributed.barrier()
    destroy()
    sys.exit(any(codes))


if __name__ == "__main__":
    main(*sys.argv[1:])
