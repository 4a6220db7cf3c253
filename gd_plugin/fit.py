"""One training of `gd-plugin train` or `study`: a run's arguments and prepared data in, its record out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, set_seed

from .arguments import Run
from .baselines import BaselineLossFunc, baseline
from .calibration import fit_temperature, fit_vector_scaling, is_useful
from .data import ClassificationData, PreparedImages, augment, collate_images
from .hf import GradientDecayTrainer
from .hf_card import trainer_record
from .metrics import classification_metrics
from .models import build_model
from .push import hub_errors
from .record import publishable
from .trace import Tracer

__all__ = ["Interrupted", "fit"]

_LOGITS_BYTES = 2**30  # of a split's logits, kept to fit a temperature


class Interrupted(Exception):
    """Training stopped after an update, with a checkpoint. The message says how to go on."""


def fit(
    run: Run,
    data: ClassificationData,
    splits: list[torch.utils.data.Dataset],
    command: str,
    callbacks: list[TrainerCallback],
    checkpoint: str | None = None,
    save_model: bool = True,
) -> dict:
    """Train, evaluate on the last epoch's weights, calibrate on the validation split; returns the record.

    Args:
        splits: training, validation and test split, prepared for the model.
        command: what a reader of the record is to type.
        checkpoint: folder to go on from.
        save_model: into the run's folder, and beside it what was traced.

    Raises:
        Interrupted: a callback ended training before its time.
    """
    args = run.args
    started = time.time()
    set_seed(args.seed)
    model, processor = build_model(run.model, data)
    images = isinstance(splits[0], PreparedImages)
    if images:
        args.remove_unused_columns = False  # whose collator would take a batch for a list of samples
    trainer = _Trainer(
        criterion=None if run.model.loss == "gd" else baseline(run.model.loss),
        augmentation=run.data.augmentation if images else "none",
        model=model,
        args=args,
        train_dataset=splits[0],
        eval_dataset=splits[1],
        processing_class=processor,
        callbacks=[*callbacks, _SaveAfterEvaluation()],
        data_collator=collate_images if images else None,
    )
    trainer.remove_callback(PrinterCallback)  # its lines would tear the progress bar
    tracer = Tracer(run.trace_samples) if run.trace_samples and save_model else None
    if tracer:
        checkpoint = None  # what was traced before it is lost: from the beginning
        tracer.attach(trainer, splits[2])
    with _energy() as energy:
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.control.should_training_stop and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after update {trainer.state.global_step} of {trainer.state.max_steps}, a checkpoint is in "
            f"{args.output_dir}; go on with --resume"
        )
    if save_model:
        trainer.save_model(_internal_call=True)  # not a push, which waits for the card
    record = trainer_record(trainer, started)  # before the evaluations below are logged too
    final, test = trainer.evaluate_and_keep(splits[2], "test")
    reliability, calibrated = trainer.reliability, None
    if data.has_test and test:  # fitted and tested on the same samples, calibration would show nothing
        _, validation = trainer.evaluate_and_keep(splits[1], "eval")
        calibrated = _calibrate(validation, test) if validation else None
    useful = calibrated is not None and is_useful(calibrated["temperature"]["temperature"])
    if useful and save_model and args.process_index == 0:
        trainer.model.config.gd_temperature = calibrated["temperature"]["temperature"]
        trainer.model.config.save_pretrained(run.folder)
    if tracer:
        tracer.save(run.folder)
    return record | {
        "name": run.name,
        "command": command,
        "config": {key: publishable(value) for key, value in run.settings.items()},
        "loss": run.model.loss,
        "wall_time_s": round(time.time() - started, 1),
        **({"energy_kwh": energy[0]} if energy else {}),
        "dataset": data.describe(),
        "model": {**record["model"], "name": publishable(run.model.model)},
        "final": final,
        "calibrated": calibrated,
        "reliability": reliability,
    }


@contextmanager
def _energy() -> Iterator[list[float]]:
    """Where codecarbon is installed, its estimate of what the whole machine used meanwhile, in kWh: the only element at
    the end."""
    used: list[float] = []
    try:
        from codecarbon import OfflineEmissionsTracker
    except ModuleNotFoundError:
        yield used
        return
    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # it speaks before it reads log_level
    # Offline, since the energy does not depend on where it is used; no file, and no lock against a run beside this one.
    tracker = OfflineEmissionsTracker(
        country_iso_code="USA", save_to_file=False, log_level="critical", allow_multiple_runs=True
    )
    tracker.start()
    try:
        yield used
    finally:
        tracker.stop()
    if data := getattr(tracker, "final_emissions_data", None):  # it measures what it can
        used.append(data.energy_consumed)


class _SaveAfterEvaluation(TrainerCallback):
    """With `save_steps` the Trainer saves at the end of an epoch before it evaluates that epoch. A run that goes on
    from there would lack the evaluation, and the random numbers that it draws: it would come to other weights."""

    def __init__(self) -> None:
        self.postponed = False

    def on_step_end(self, args, state, control, **kwargs):
        self.postponed = control.should_save and state.epoch % 1 == 0
        if self.postponed:
            control.should_save = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.postponed:
            control.should_save, self.postponed = True, False


class _Trainer(GradientDecayTrainer):
    """Augments training batches where they lie, and keeps the logits of an evaluation when asked.

    Args:
        criterion: another loss than the gradient-decay loss, per sample of (N, C) logits and (N) class indices.
        augmentation: as for `gd_plugin.data.augment`.
        *args, **kwargs: the Trainer's.
    """

    def __init__(self, *args, criterion: nn.Module | None = None, augmentation: str = "none", **kwargs) -> None:
        if criterion is not None:
            self._gd_loss_func = partial(BaselineLossFunc, criterion=criterion)
        super().__init__(*args, **kwargs)
        self.augmentation = augmentation
        self._augmented = (0, 0)  # the update, and how many of its batches
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def init_hf_repo(self, *args, **kwargs) -> None:
        with hub_errors(self.args.hub_model_id or Path(self.args.output_dir).name):
            super().init_hf_repo(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Each process has its own, and the first one goes on to write the state that makes the checkpoint whole.
        self.accelerator.wait_for_everyone()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        # Not by whether gradients are enabled: the Trainer disables them after it has prepared an evaluation's batch.
        if self.augmentation != "none" and self.model.training:
            pixels = inputs["pixel_values"]
            inputs = {**inputs, "pixel_values": augment(pixels, self.augmentation, self._generator(pixels.device))}
        return inputs

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """Of this process: all have the same seed, and would shift and mirror their images alike."""
        if self.args.world_size == 1:
            return None
        update, batches = self._augmented
        self._augmented = (self.state.global_step, batches + 1 if update == self.state.global_step else 0)
        seed = hash((self.args.seed, self.args.process_index, *self._augmented))
        return torch.Generator(device).manual_seed(seed % 2**63)

    def _gd_compute_metrics(self, prediction, compute_result: bool = True) -> dict[str, float]:
        if self._kept is not None:
            logits = prediction.predictions
            logits = logits[0] if isinstance(logits, (tuple, list)) else logits
            self._kept.append((torch.as_tensor(logits).cpu(), torch.as_tensor(prediction.label_ids).cpu()))
        return super()._gd_compute_metrics(prediction, compute_result)

    def evaluate_and_keep(self, split, prefix: str) -> tuple[dict[str, float], tuple[Tensor, Tensor] | None]:
        """The metrics of a split, and its logits and labels unless they are too many."""
        fits = len(split) * self.model.config.num_labels * 4 <= _LOGITS_BYTES
        self._kept = [] if fits else None
        try:
            metrics = self.evaluate(split, metric_key_prefix=prefix)
            kept = tuple(torch.cat(parts) for parts in zip(*self._kept, strict=True)) if fits else None
        finally:
            self._kept = None
        return {
            key.removeprefix(f"{prefix}_"): value
            for key, value in metrics.items()
            if not key.endswith(("_runtime", "_per_second", "epoch", "_time"))
        }, kept


def _calibrate(validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, dict[str, float]] | None:
    """The test split's metrics after what was fitted to the validation split; None for a model that has diverged."""
    try:
        temperature = fit_temperature(*validation)
        scale, bias = fit_vector_scaling(*validation)
    except ValueError:
        return None
    logits, labels = test[0].double(), test[1]
    scaled = classification_metrics(logits / temperature, labels)
    return {
        "temperature": {"temperature": temperature, **scaled},
        "vector": classification_metrics(logits * scale + bias, labels),
    }
