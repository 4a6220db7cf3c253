"""What changes beta while the Trainer trains, and logs it. Used through `gd_plugin.hf`."""

from __future__ import annotations

import math

import torch
from accelerate.utils import gather
from transformers import TrainerCallback, TrainingArguments

from .config import GradientDecayConfig, rename_fields
from .hf_loss import DATA_PARALLEL, GradientDecayLossFunc
from .schedule import beta_at

__all__ = ["GradientDecayCallback"]


class GradientDecayCallback(TrainerCallback):
    """Sets beta before every update and logs it, with the plain cross-entropy, beside every training ``loss``.

    beta is a pure function of ``state.global_step``: a run resumed in the middle of a warm-up needs nothing from the
    checkpoint. After an update that mixed precision skipped, ``global_step`` and with it beta advance all the same.

    Adds to each training log: ``gd_beta``, of the update just made (mean over the classes where it is per class), and
    ``cross_entropy``, plain, mean over the logged interval. ``loss`` is negative for confident samples at beta < 1.
    Reporters (TensorBoard, W&B) see both if this callback stands before theirs, as `GradientDecayMixin` arranges;
    the console and ``state.log_history`` always do.
    """

    def __init__(self, loss: GradientDecayLossFunc, follow_args: bool = False) -> None:
        self.loss = loss
        self.follow_args = follow_args  # read args.gd_config anew when training begins: a search has changed it
        self._schedule: GradientDecayConfig | None = None
        self._beta: float | tuple[float, ...] | None = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._bind(args, model)

    def _bind(self, args, model) -> None:
        refuse_data_parallel(args)
        self.loss.bind(model, args)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if self.follow_args and args.gd_config != self.loss.config:
            self.loss.configure(args.gd_config)
        self._bind(args, model)  # again, or for the first time where add_callback came after the Trainer
        try:
            updates_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
        except TypeError:  # an iterable data set has no length
            updates_per_epoch = None
        if args.world_size > 1:
            updates_per_epoch = _longest(updates_per_epoch, args)
        try:
            self._schedule = self.loss.config.resolve(state.max_steps, updates_per_epoch)
        except ValueError as error:
            raise ValueError(with_gd_prefix(error)) from None
        self._beta = None
        if getattr(getattr(model, "config", None), "gd_temperature", None) is not None:
            del model.config.gd_temperature  # fitted to other weights than these will be
        self.on_step_begin(args, state, control)  # also for who measures the loss before the first update

    def on_step_begin(self, args, state, control, **kwargs):
        beta = beta_at(self._schedule, state.global_step / state.max_steps)
        if beta != self._beta:  # nothing at all to do once the warm-up is over
            self.loss.loss.set_beta(beta)
            self._beta = beta

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs or self._beta is None:
            return
        if not self.loss.calls:
            raise RuntimeError(
                "the gradient-decay loss was never called: this Trainer's compute_loss computes a loss of its own; let "
                "it call super().compute_loss, or use the loss there yourself"
            )
        beta = self._beta if isinstance(self._beta, float) else sum(self._beta) / len(self._beta)
        added = {"gd_beta": beta, "cross_entropy": self.loss.pop_cross_entropy()}
        logs.update(added)
        state.log_history[-1].update(added)


def _longest(updates_per_epoch: int | None, args: TrainingArguments) -> int | None:
    """Of all processes: without ``even_batches`` one may have a batch more than another, and beta must be the same."""
    shortest, longest = gather(torch.tensor([updates_per_epoch or 0], device=args.device)).aminmax()
    if shortest != longest and "epoch" in (args.eval_strategy, args.save_strategy):
        raise ValueError(
            f"the processes have {shortest} to {longest} updates an epoch, and would wait for each other at its end "
            "forever: use eval_strategy and save_strategy 'steps', or even_batches=True in accelerator_config"
        )
    return longest.item() or None


def refuse_data_parallel(args: TrainingArguments) -> None:
    if args.n_gpu > 1:
        raise ValueError(DATA_PARALLEL.format(n=args.n_gpu))


def with_gd_prefix(error: ValueError) -> str:
    """A `GradientDecayConfig` message in the names of the training arguments."""
    return rename_fields(error, "gd_{}".format)
