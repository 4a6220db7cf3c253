"""The gradient-decay loss inside a running ``train.py`` of timm: the loss, its warm-up, calibration metrics, a record.

timm's script has no callbacks. What it has had under the same names since timm 1.0.20 are two functions,
``train_one_epoch`` and ``validate``: `TimmRun.attach` wraps them in the script's own namespace, and nothing else.
How the script is started is the business of `gd_plugin.timm_launch` and `gd_plugin.timm_hook`.
"""

from __future__ import annotations

import datetime
import functools
import inspect
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from .config import GradientDecayConfig, rename_fields
from .functional import gradient_decay_cross_entropy
from .loss import GradientDecayLoss
from .metrics import ClassificationMetrics
from .record import RECORD_FORMAT, environment, publishable, read_record, write_json
from .schedule import beta_at
from .timm_options import UsageError, refuse, say

try:
    from timm.task.evaluator import ClassificationEvaluator
except ImportError:  # before timm 1.0.31, whose scripts evaluate with a loss function
    ClassificationEvaluator = None

__all__ = ["TimmRun"]

_logger = logging.getLogger("gd_plugin")


class TimmRun:
    """One training of a ``train.py`` with the gradient-decay loss.

    beta follows timm's count of updates, ``num_updates``: it is set before an epoch to that of its first update,
    ``epoch * updates_per_epoch``, and after every update where timm steps its learning rate. As a pure function of
    that count it needs nothing from a checkpoint. An update that mixed precision skipped is counted, as by timm.

    To what ``train_one_epoch`` returns, and with it to ``summary.csv``, come ``gd_beta`` (of the epoch's last update;
    the mean over the classes where it is per class) and ``cross_entropy``, plain, the mean over the epoch's samples on
    all processes. To what ``validate`` returns come the metrics of `gd_plugin.metrics`. After either the run's
    ``record.json`` is written, whole or not at all, beside ``summary.csv``.

    Args:
        config: checked knobs.
        command: how the run was started, for the record.
        shown: from a field of the configuration to the flag or variable that the user knows, for messages.
    """

    def __init__(self, config: GradientDecayConfig, command: str, shown: Callable[[str], str]) -> None:
        self.config, self.command, self.shown = config, command, shown
        self._loss: _TrainingLoss | None = None
        self._replaced: Any = None  # the criterion whose place the loss has taken
        self._record: dict[str, Any] = {}
        self._output_dir: str | None = None

    def attach(self, namespace: dict[str, Any]) -> None:
        """Wrap ``train_one_epoch`` and ``validate`` in a script's globals, in place of another run's wrapping."""
        self.detach(namespace)
        for name, wrapper in (("train_one_epoch", self._train_one_epoch), ("validate", self._validate)):
            namespace[name] = _wrapped(namespace[name], wrapper)

    @staticmethod
    def detach(namespace: dict[str, Any]) -> None:
        """Undo `attach`, whichever run it was."""
        for name in ("train_one_epoch", "validate"):
            namespace[name] = getattr(namespace[name], "gd_original", namespace[name])

    def _train_one_epoch(self, original: Callable, call: inspect.BoundArguments) -> dict[str, float]:
        given = call.arguments
        epoch, args, loader, task = given["epoch"], given["args"], given["loader"], given.get("task")
        updates_per_epoch = math.ceil(len(loader) / max(1, args.grad_accum_steps))
        criterion = given["loss_fn"] if task is None else task.criterion
        if criterion is not self._loss and criterion is not self._replaced:
            self._begin(criterion, given, updates_per_epoch)
        if task is None:
            given["loss_fn"] = self._loss
        else:
            task.criterion = self._loss

        log = self._record["log"]
        first = epoch * updates_per_epoch
        every = min(args.log_interval, max(1, self._total // 200))  # when timm logs, and enough for a curve
        self._set_beta(first)
        used = self._beta

        def after_update(num_updates: int) -> None:
            nonlocal used
            used = self._beta
            done = num_updates - first
            if (done - 1) % every == 0 or done == updates_per_epoch:
                log.append({"epoch": num_updates / updates_per_epoch, "step": num_updates, "gd_beta": _number(used)})
            self._set_beta(num_updates)

        given["lr_scheduler"] = _Follower(given["lr_scheduler"], after_update)
        metrics = original(*call.args, **call.kwargs)
        metrics["gd_beta"] = _number(used)
        metrics["cross_entropy"] = self._loss.pop_cross_entropy(args.distributed)
        self._record["epochs"].append({"epoch": epoch + 1, "step": first + updates_per_epoch, **metrics})
        self._write_record()
        return metrics

    def _begin(self, criterion: Any, given: dict[str, Any], updates_per_epoch: int) -> None:
        """Once, before the first update: check against model and data what could not be checked before."""
        args = given["args"]
        refuse(args)
        if not updates_per_epoch:
            raise UsageError(f"--batch-size {args.batch_size} is larger than the training data: there is no batch")
        smoothing = _smoothing(criterion)
        try:
            self.config.check_num_classes(args.num_classes)
            self._schedule = self.config.resolve(given["num_updates_total"], updates_per_epoch)
        except ValueError as error:
            raise UsageError(rename_fields(error, self.shown)) from None
        self._total = given["num_updates_total"]
        self._loss = _TrainingLoss.from_config(self.config, label_smoothing=smoothing).to(given["device"])
        self._beta, self._replaced = self.config.beta, criterion
        self._output_dir = given["output_dir"]  # None but on the first process
        self._started = time.time()
        self._record = {"epochs": [], "log": []}
        if self._output_dir is not None:
            self._record |= self._new_record(given)
            first = given["epoch"] * updates_per_epoch
            _logger.info(
                f"Gradient-decay loss in place of {type(criterion).__name__}, label smoothing {smoothing:g}: "
                f"{_describe(self._schedule, self._total)}, from update {first}"
            )
            self._continue_record(given["epoch"], first)

    def _set_beta(self, num_updates: int) -> None:
        beta = beta_at(self._schedule, num_updates / self._total)
        if beta != self._beta:  # nothing at all to do once the warm-up is over
            self._loss.set_beta(beta)
            self._beta = beta

    def _validate(self, original: Callable, call: inspect.BoundArguments) -> dict[str, float]:
        given = call.arguments
        metrics = ClassificationMetrics()
        if "loss_fn" in given:
            observed = given["loss_fn"] = _ObservedLoss(given["loss_fn"], metrics, given["loader"])
            watching = nullcontext(observed)
        else:
            watching = _observed_evaluators(metrics)
        with watching:
            results = original(*call.args, **call.kwargs)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, metrics)
            metrics = ClassificationMetrics()
            for part in parts:
                metrics.merge(part)
        try:
            measured = metrics.compute()
        except ValueError:  # not a sample
            _logger.warning("validate() showed no logits, so there are no calibration metrics of this epoch")
            return results
        results.update(measured)
        if self._record.get("epochs"):
            self._record["epochs"][-1] |= {f"eval_{name}": value for name, value in results.items()}
            self._record |= {"final": dict(results), "reliability": metrics.reliability()}
            if "dataset" in self._record:  # on the first process
                self._record["dataset"]["test"] = len(metrics)
            self._write_record()
        return results

    def _new_record(self, given: dict[str, Any]) -> dict[str, Any]:
        args, loader, model = given["args"], given["loader"], given["model"]
        folder = getattr(args, "data_dir", None) or getattr(args, "data", None) or ""
        try:
            samples = len(loader.dataset)
        except TypeError:  # a stream
            samples = None
        return {
            "format": RECORD_FORMAT,
            "name": Path(self._output_dir).name,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": self.command,
            "config": {key: _plain(value) for key, value in sorted(vars(args).items())},
            "gd": self.config.to_dict(),
            "seed": args.seed,
            **environment(),
            "dataset": {
                "name": publishable(args.dataset or Path(folder).name),
                "train": samples,
                "tested_on": args.val_split,
                "label_names": _label_names(loader),
            },
            "model": {"name": f"timm:{args.model}", "parameters": sum(p.numel() for p in model.parameters())},
            "epochs": [],
            "log": [],
            "final": {},
            "reliability": None,
        }

    def _continue_record(self, epoch: int, first_update: int) -> None:
        """Of a run that is resumed in its own folder, what came before the epoch where it goes on."""
        path = Path(self._output_dir) / "record.json"
        if not epoch or not path.exists():
            return
        try:
            before = read_record(path)
            for part, key, last in (("epochs", "epoch", epoch), ("log", "step", first_update)):
                self._record[part] += [entry for entry in before[part] if entry[key] <= last]
            self._record |= {key: before[key] for key in ("created", "final", "reliability")}
            self._started -= before["wall_time_s"]
        except (OSError, ValueError, KeyError, TypeError) as error:  # cut short, or somebody else's
            aside = path.with_name("record.unreadable.json")
            os.replace(path, aside)
            _logger.warning(f"the record of the run so far cannot be read and is now {aside} ({error})")

    def _write_record(self) -> None:
        if self._output_dir is None:
            return
        self._record["wall_time_s"] = round(time.time() - self._started, 1)
        try:
            write_json(Path(self._output_dir) / "record.json", self._record)
        except OSError as error:  # a full disk must not end a training that timm goes on with
            _logger.error(f"the record could not be written: {error}")


class _TrainingLoss(GradientDecayLoss):
    """The loss, which also adds up the plain cross-entropy of what it has seen, on the device."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        # Sum over the samples, and their number. A buffer, which is added to in place: some scripts compile the whole
        # task, and a Python number that changes would have it compiled anew in every update.
        self.register_buffer("sums", torch.zeros(2), persistent=False)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss, cross_entropy = gradient_decay_cross_entropy(
            input,
            target,
            self.beta,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            return_cross_entropy=True,
        )
        count = torch.full_like(self.sums[0], len(target))
        self.sums += torch.stack([cross_entropy.float() * count, count])
        return loss

    def pop_cross_entropy(self, distributed: bool) -> float:
        """Mean of the samples since the last call, with ``distributed`` on all processes. Waits for the device."""
        if distributed:
            torch.distributed.all_reduce(self.sums)
        total, count = self.sums.tolist()
        self.sums.zero_()
        return total / count if count else math.nan


class _Follower:
    """timm's learning-rate scheduler, or none, as an epoch sees it: beta is stepped first."""

    def __init__(self, scheduler: Any, after_update: Callable[[int], None]) -> None:
        self._scheduler, self._after_update = scheduler, after_update

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        self._after_update(num_updates)
        if self._scheduler is not None:
            self._scheduler.step_update(num_updates, metric)


class _ObservedLoss:
    """The validation loss of scripts up to timm 1.0.29, which is given every batch of logits."""

    def __init__(self, loss_fn: Callable, metrics: ClassificationMetrics, loader: Any) -> None:
        self.loss_fn, self.metrics = loss_fn, metrics
        # Newer samplers tell what a process's share is without the samples that make all shares equally long.
        self.left = getattr(getattr(loader, "sampler", None), "num_valid_samples", None)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        kept = len(target) if self.left is None else min(self.left, len(target))
        self.left = None if self.left is None else self.left - kept
        self.metrics.update(output[:kept], target[:kept])
        return self.loss_fn(output, target)


@contextmanager
def _observed_evaluators(metrics: ClassificationMetrics):
    """The evaluators of scripts since timm 1.0.31, while one of them is at work. It knows how many samples count."""
    original = ClassificationEvaluator.update

    @functools.wraps(original)
    def update(self, output: Tensor, target: Tensor) -> None:
        before = self.num_samples
        original(self, output, target)
        kept = self.num_samples - before
        metrics.update(output[:kept], target[:kept])

    ClassificationEvaluator.update = update
    try:
        yield
    finally:
        ClassificationEvaluator.update = original


def _wrapped(original: Callable, wrapper: Callable) -> Callable:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        try:
            return wrapper(original, bound)
        except UsageError as error:
            say(error)
            raise SystemExit(2) from None

    call.gd_original = original
    return call


def _smoothing(criterion: Any) -> float:
    """The label smoothing of the cross-entropy that timm chose from --smoothing, --mixup and --cutmix.

    With Mixup or CutMix the targets are smoothed already, and timm's criterion does not do it again.
    """
    if type(criterion) in (nn.CrossEntropyLoss, SoftTargetCrossEntropy):
        return 0.0
    if type(criterion) is LabelSmoothingCrossEntropy:
        return criterion.smoothing
    if type(criterion) is GradientDecayLoss:  # made by timm's factory, see `gd_plugin.timm.register`
        return criterion.label_smoothing
    name = getattr(criterion, "__name__", type(criterion).__name__)
    raise UsageError(
        f"the script trains with {name}, which the gradient-decay loss, a softmax, cannot take the place of; remove "
        "the flag that chooses it (--loss, --bce-loss, --jsd-loss)"
    )


def _label_names(loader: Any) -> list[str] | None:
    """Of the classes in their order, where timm's reader knows them."""
    reader = getattr(loader.dataset, "reader", None)
    if names := getattr(reader, "class_to_idx", None):  # folders of images
        return [str(name) for name in sorted(names, key=names.get)]
    features = getattr(getattr(reader, "dataset", None), "features", None) or {}
    return getattr(features.get(getattr(reader, "label_key", None)), "names", None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return publishable(value) if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _number(beta: float | tuple[float, ...]) -> float:
    return sum(beta) / len(beta) if isinstance(beta, tuple) else beta


def _describe(schedule: GradientDecayConfig, total: int) -> str:
    if schedule.beta_start is None:
        return f"beta {schedule.beta}, constant"
    updates = schedule.warmup_ratio * total
    return f"beta {schedule.beta_start} to {schedule.beta}, {schedule.schedule} over {updates:g} of {total} updates"
