"""The gradient-decay loss as a loss type of timm: `register` it, and say in a pushed model's card how it was trained.

Training with timm's own ``train.py`` is ``gd-plugin timm PATH/TO/train.py ... --loss gd --gd-beta 5``
(`gd_plugin.timm_launch`); ``python -m gd_plugin.timm`` is the same command, for ``torchrun -m``.

timm is imported when it is needed: which one, the installed or that of a checkout, is for the launched script to say.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import GradientDecayConfig, rename_fields
from .loss import GradientDecayLoss
from .record import hardware, read_record

__all__ = ["LOSS_TYPE", "has_loss_factory", "model_card", "register", "unregister"]

LOSS_TYPE = "gd"

# Where timm binds its factory and the names of its losses; the first is where the factory itself looks them up.
_PLACES = ("timm.loss._loss_factory", "timm.loss", "timm.task", "timm.task.classification")
_originals: dict[tuple[str, str], Any] = {}  # (module, name): what `unregister` puts back


def has_loss_factory() -> bool:
    """Whether this timm has ``timm.loss.create_classification_loss``, which came with 1.0.31."""
    return hasattr(importlib.import_module("timm.loss"), "create_classification_loss")


def register() -> None:
    """Add the loss type ``"gd"`` to timm's factory, wherever timm has bound it. A second call changes nothing.

    Afterwards ``timm.loss.create_classification_loss("gd", gd_beta=5.0, smoothing=0.1, soft_targets=False)`` makes a
    `GradientDecayLoss`, and ``ClassificationTask(model, criterion_kwargs=dict(loss_type="gd", gd_beta=5.0))`` trains
    with it. timm's own rules hold: ``smoothing`` is ignored with ``soft_targets`` (Mixup and CutMix have applied it),
    and what a single-label softmax loss does not take raises ``ValueError`` in timm's words. Two arguments are new,
    and only for this type: ``gd_beta`` (> 0, one number or one per class; 1 is cross-entropy) and
    ``gd_class_weights``. A warm-up belongs to the training loop: ``criterion.set_beta(beta_at(config, progress))``.

    Every other loss type is left as it was, and ``timm.loss.LOSS_TYPES`` stays one object in all of timm.

    Raises:
        RuntimeError: timm is older than 1.0.31 and has no factory.
    """
    if _originals:
        return
    import timm.loss

    if not has_loss_factory():
        raise RuntimeError(
            f"timm {timm.__version__} has no loss factory to register with; it needs timm >= 1.0.31: "
            "pip install -U timm (gd-plugin timm works with the train.py of timm >= 1.0.20)"
        )
    ours = {
        "create_classification_loss": _with_gd(timm.loss.create_classification_loss),
        "LOSS_TYPES": (*timm.loss.LOSS_TYPES, LOSS_TYPE),
    }
    for place in _PLACES:
        module = importlib.import_module(place)
        for name, value in ours.items():
            if hasattr(module, name):
                _originals[place, name] = getattr(module, name)
                setattr(module, name, value)


def unregister() -> None:
    """Undo `register`: timm is as it was. Without `register` nothing happens."""
    while _originals:
        (place, name), value = _originals.popitem()
        setattr(importlib.import_module(place), name, value)


def _with_gd(original: Callable) -> Callable:
    """timm's factory, and one loss type more."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create_classification_loss(loss_type=None, *args, gd_beta=None, gd_class_weights=None, **kwargs):
        if loss_type != LOSS_TYPE:
            if gd_beta is not None or gd_class_weights is not None:
                raise ValueError(f"gd_beta and gd_class_weights only apply to the {LOSS_TYPE} loss.")
            return original(loss_type, *args, **kwargs)
        given = signature.bind(loss_type, *args, **kwargs)
        given.apply_defaults()
        # timm refuses what does not fit, in its words: multi-label targets of this type, and of any softmax loss
        # the weights, thresholds and counts that it does not take.
        original(loss_type if given.arguments["multi_label"] else "ce", *args, **kwargs)
        try:
            config = GradientDecayConfig(beta=1.0 if gd_beta is None else gd_beta, class_weights=gd_class_weights)
        except ValueError as error:
            raise ValueError(rename_fields(error, "gd_{}".format)) from None
        smoothing = 0.0 if given.arguments["soft_targets"] else given.arguments["smoothing"]
        return GradientDecayLoss.from_config(config, label_smoothing=smoothing)

    return create_classification_loss


def model_card(run: str | os.PathLike) -> dict[str, Any]:
    """What the run's record says of a model, in the form that timm's ``push_to_hf_hub`` takes::

        timm.models.push_to_hf_hub(model, "user/name", model_card=gd_plugin.timm.model_card("output/train/my-run"))

    Args:
        run: folder of a run of ``gd-plugin timm``.

    Returns:
        timm's ``model_card`` dictionary: tags, description, details (the loss and its schedule, the hyperparameters,
        the measured results), citation.

    Raises:
        ValueError, OSError: the folder holds no record.
    """
    from .card import CITATION, hyperparameters  # and with it huggingface_hub, which comes with timm

    record = read_record(Path(run) / "record.json")
    settings, final, dataset = record["config"], record["final"], record["dataset"]
    gd = {name: value for name, value in record["gd"].items() if value}
    if "beta_start" not in gd:
        del gd["schedule"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    details = {
        "Gradient-decay loss": gd,
        "Hyperparameters": hyperparameters(record),
        "Training data": dataset["name"],
    }
    if final:  # trained with a validation split
        epoch = next(entry["epoch"] for entry in reversed(record["epochs"]) if "eval_loss" in entry)
        weights = ", averaged weights" if settings.get("model_ema") else ""
        measured = f"{dataset['tested_on']} split after epoch {epoch:g} (n = 1 run{weights})"
        details[f"Results on the {measured}"] = {
            name: "not finite" if value is None else f"{value:.4f}" for name, value in final.items()
        }
    details |= {
        "Command": f"`{record['command']}`",
        "Versions": versions,
        "Hardware": hardware(record),
        "Commit of gd_plugin": record["commit"],
    }
    return {
        "tags": ["image-classification", "timm", "transformers", "gradient-decay", "calibration", "arxiv:2210.17145"],
        "description": "Trained with the gradient-decay softmax cross-entropy (arXiv 2210.17145) of gd_plugin.",
        "details": details,
        "citation": [CITATION],
    }


if __name__ == "__main__":  # torchrun --nproc-per-node 2 -m gd_plugin.timm PATH/TO/train.py ...
    from gd_plugin.cli import main

    sys.exit(main(["timm", *sys.argv[1:]]))
