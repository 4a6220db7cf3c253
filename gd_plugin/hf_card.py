"""The record of a Trainer's training, and the model card that `create_model_card` writes and a push uploads."""

from __future__ import annotations

import datetime
import sys
import time
from pathlib import Path
from typing import Any

from datasets import NamedSplit
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.modelcard import TrainingSummary, extract_hyperparameters_from_trainer
from transformers.trainer_pt_utils import get_model_param_count

from .card import UNKNOWN_DATA, write_run_card
from .record import RECORD_FORMAT, environment, epochs_from_log, publishable, write_json

__all__ = ["trainer_record", "write_trainer_card"]


def trainer_record(trainer: Trainer, started: float) -> dict[str, Any]:
    """What a record says of any training: the loss, the curves, the last evaluation, and where it ran.

    Args:
        trainer: one with `gd_plugin.hf.GradientDecayMixin`; its log may end anywhere.
        started: ``time.time()`` at the beginning.
    """
    log = list(trainer.state.log_history)
    epochs = epochs_from_log(log)
    last = epochs[-1].get("step") if epochs else None
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    if best is not None and best != last and any(epoch.get("step") == best for epoch in epochs):
        last = best
    else:
        best = None
    # Of all evaluation sets: each has an entry of its own at the same update.
    final = {k: v for epoch in epochs if epoch.get("step") == last for k, v in epoch.items() if k.startswith("eval_")}
    trained_for = sum(entry.get("train_runtime", 0.0) for entry in log)
    return {
        "format": RECORD_FORMAT,
        "name": Path(trainer.args.output_dir).resolve().name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        # Without its arguments, which may hold anything, also a password.
        "command": f"python {Path(sys.argv[0]).name}" + (" ..." if sys.argv[1:] else ""),
        "config": {key: publishable(value) for key, value in extract_hyperparameters_from_trainer(trainer).items()},
        "loss": "gd",
        "gd": trainer.gd_config.to_dict(),
        "seed": trainer.args.seed,
        **environment(),
        "wall_time_s": round(trained_for or time.time() - started, 1),
        "model": {
            "name": publishable(getattr(trainer.model.config, "_name_or_path", "") or type(trainer.model).__name__),
            "type": getattr(trainer.model.config, "model_type", None),
            "parameters": get_model_param_count(trainer.model),
        },
        "dataset": {
            "name": UNKNOWN_DATA,
            "train": _length(trainer.train_dataset),
            "test": _length(trainer.eval_dataset),
            "tested_on": _split(trainer.eval_dataset),
        },
        "epochs": epochs,
        "log": [entry for entry in log if "loss" in entry],
        "final": {key.removeprefix("eval_"): value for key, value in final.items()},
        **({} if best is None else {"best_step": best}),
        "calibrated": None,
        "reliability": trainer.reliability,
    }


def write_trainer_card(trainer: Trainer, started: float, **said: Any) -> Path:
    """Write README.md, the record and the pictures that it shows into ``trainer.args.output_dir``; returns the card.

    Args:
        said: arguments of ``Trainer.create_model_card``. What is None is inferred as there.

    Raises:
        ValueError: a model without the ``config`` of transformers, from which the Trainer infers.
    """
    if not hasattr(trainer.model, "config"):
        raise ValueError(f"{type(trainer.model).__name__} has no config, and so no model card of a Trainer can be made")
    summary = TrainingSummary.from_trainer(trainer, **said)
    record, folder = trainer_record(trainer, started), Path(trainer.args.output_dir)
    if names := _listed(summary.dataset):
        record["dataset"]["name"] = ", ".join(names)
    if tags := _listed(summary.dataset_tags):
        record["dataset"]["hub"] = tags
    record["card"] = {
        "language": summary.language,
        "license": summary.license,
        "tags": summary.tags,
        "model_name": summary.model_name,
        "base_model": summary.finetuned_from or None,
        "task": next(iter(_listed(summary.tasks)), None),
        "library": "peft" if hasattr(trainer.model, "peft_config") else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "record.json", record)
    _draw(record, folder)
    return write_run_card(folder)


def _draw(record: dict, folder: Path) -> None:
    try:
        from rich.console import Console

        from .report import draw
    except ModuleNotFoundError:  # of the extra, and no reason to lose a push
        return
    draw([record], folder, Console(quiet=True))


def _split(data: Dataset | dict[str, Dataset] | None) -> str:
    split = getattr(data, "split", None)
    return str(split) if isinstance(split, str | NamedSplit) else "evaluation"


def _length(data: Dataset | dict[str, Dataset] | None) -> int | None:
    try:
        return None if isinstance(data, dict) else len(data)
    except TypeError:  # none, or a stream
        return None


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else [name for name in value or () if name]
