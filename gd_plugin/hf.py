"""The gradient-decay loss inside the Hugging Face `Trainer`. Three ways in:

1. Replace ``Trainer`` by `GradientDecayTrainer` and ``TrainingArguments`` by `GradientDecayTrainingArguments`.
2. Put `GradientDecayMixin` before another Trainer class (TRL's, your own)::

       class MyTrainer(GradientDecayMixin, SFTTrainer): ...
       MyTrainer(..., gd_config=GradientDecayConfig(beta=5.0))

3. Keep your Trainer, and pass a loss object with its callback::

       loss = GradientDecayLossFunc(GradientDecayConfig(beta=5.0))
       Trainer(..., compute_loss_func=loss, callbacks=[GradientDecayCallback(loss)])

**The logged ``loss`` is negative where beta < 1 and samples are confident** (it tends to log(beta)). The plain
``cross_entropy`` is logged beside it, and evaluation is plain cross-entropy in all three ways.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from .config import GradientDecayConfig
from .hf_callback import GradientDecayCallback, with_gd_prefix
from .hf_fused import FusedHead
from .hf_loss import IGNORE_INDEX, GradientDecayLossFunc, check_model, is_language_model, shifted
from .metrics import METRICS, ClassificationMetrics

__all__ = [
    "GradientDecayCallback",
    "GradientDecayLossFunc",
    "GradientDecayMixin",
    "GradientDecayTrainer",
    "GradientDecayTrainingArguments",
]


_HELP = {f.name: f.metadata for f in dataclasses.fields(GradientDecayConfig)}


@dataclass
class GradientDecayTrainingArguments(TrainingArguments):
    """``TrainingArguments`` and the knobs of `GradientDecayConfig`, each with the prefix ``gd_``.

    Through ``HfArgumentParser`` any script gets ``--gd_beta 5 --gd_beta_start 0.01 --gd_warmup_ratio 0.5``.
    In Python one number will do where a flag takes a list: ``gd_beta=5.0``.
    """

    gd_beta: list[float] = field(default_factory=lambda: [1.0], metadata=_HELP["beta"])
    gd_beta_start: list[float] | None = field(default=None, metadata=_HELP["beta_start"])
    gd_schedule: str = field(default="linear", metadata=_HELP["schedule"])
    gd_warmup_ratio: float = field(default=0.0, metadata=_HELP["warmup_ratio"])
    gd_warmup_steps: int = field(default=0, metadata=_HELP["warmup_steps"])
    gd_warmup_epochs: float = field(default=0.0, metadata=_HELP["warmup_epochs"])
    gd_class_weights: list[float] | None = field(default=None, metadata=_HELP["class_weights"])
    gd_fused_linear: bool = field(
        default=False,
        metadata={
            "help": "Language models: compute the loss in the output layer, chunk by chunk, and never hold the logits "
            "of the whole batch in training."
        },
    )

    def __post_init__(self):
        for name in ("gd_beta", "gd_beta_start"):  # a flag that takes one or several numbers yields a list
            value = getattr(self, name)
            if isinstance(value, list) and len(value) == 1:
                setattr(self, name, value[0])
        best = (self.metric_for_best_model or "").removeprefix("eval_")
        if best in METRICS and self.greater_is_better is None:
            # The Trainer would take every metric whose name does not end with "loss" for one to maximise.
            self.greater_is_better = best == "accuracy"
        super().__post_init__()
        if self.gd_fused_linear and self.torch_compile:
            raise ValueError("gd_fused_linear changes the model's forward, which torch_compile keeps; leave one out")
        _ = self.gd_config  # checked here, before a model or a data set is loaded

    @property
    def gd_config(self) -> GradientDecayConfig:
        """The checked configuration. Raises ``ValueError`` naming the ``gd_*`` argument."""
        values = {f.name: getattr(self, f"gd_{f.name}") for f in dataclasses.fields(GradientDecayConfig)}
        try:
            return GradientDecayConfig(**values)
        except ValueError as error:
            raise ValueError(with_gd_prefix(error)) from None


class GradientDecayMixin:
    """Puts the gradient-decay loss, its schedule and calibration metrics into the Trainer class that follows it.

    Args:
        gd_config: the knobs; by default those of ``args`` (`GradientDecayTrainingArguments`).
        *args, **kwargs: the Trainer's own. Without ``compute_metrics``, classifiers are evaluated with
            `gd_plugin.metrics.ClassificationMetrics`, batch by batch, so that no logits are kept; the bins of the
            last reliability diagram are in ``trainer.reliability``.

    Raises:
        ValueError: a model that is not a softmax classifier or language model, per-class knobs of another length
            than the model's classes, several GPUs in one process (DataParallel), labels outside the classes.
    """

    _gd_loss_func: Callable[[GradientDecayConfig], GradientDecayLossFunc] = GradientDecayLossFunc

    def __init__(self, *args, gd_config: GradientDecayConfig | None = None, compute_loss_func=None, **kwargs):
        if compute_loss_func is not None:
            raise ValueError("compute_loss_func is set, and so is the gradient-decay loss; remove one of them")
        follow_args = gd_config is None
        if follow_args:
            gd_config = getattr(kwargs.get("args", args[1] if len(args) > 1 else None), "gd_config", None)
        if gd_config is None:
            raise ValueError(
                "no gradient-decay configuration: use GradientDecayTrainingArguments, or pass "
                "gd_config=GradientDecayConfig(beta=...)"
            )
        self._gd_started = time.time()
        # Given at once, since a Trainer may prepare itself for it: TRL's then keeps the logits.
        super().__init__(*args, compute_loss_func=self._gd_loss_func(gd_config), **kwargs)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False)):
            raise ValueError(
                "context and sequence parallelism split the labels before the loss sees them; set cp_size and sp_size "
                "to 1"
            )
        if not self.label_names:
            raise ValueError(
                f"{type(self.model).__name__} takes no labels: load the model with a head (AutoModelForCausalLM, "
                "AutoModelForSequenceClassification, ...), or name the label column with label_names=['labels'] in the "
                "training arguments"
            )
        if len(self.label_names) != 1:
            raise ValueError(
                f"the gradient-decay loss needs exactly one label column, this model has {self.label_names}; name it "
                "with label_names=['labels'] in the training arguments"
            )
        self._gd_label_name = self.label_names[0]
        fused = (self.args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True)
        if self.args.use_liger_kernel and fused and is_language_model(self.model):
            raise ValueError(
                "use_liger_kernel puts its own loss into the model, in place of logits; add "
                'liger_kernel_config={"fused_linear_cross_entropy": False} to keep its other kernels'
            )
        num_classes = check_model(self.model)
        if num_classes is not None:
            try:
                gd_config.check_num_classes(num_classes)
            except ValueError as error:
                raise ValueError(with_gd_prefix(error)) from None
        self._gd_num_classes = num_classes
        if getattr(self.args, "gd_fused_linear", False):
            self.compute_loss_func.head = FusedHead(self.model, self.compute_loss_func)
        # Decided once: unwrapping the model in every step would cost.
        encoder_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        self._gd_decodes = encoder_decoder and is_language_model(self.model)

        callback = GradientDecayCallback(self.compute_loss_func, follow_args)
        # First, so that every reporter sees what it adds to the logs.
        self.callback_handler.callbacks.insert(0, callback)
        callback.on_init_end(self.args, self.state, self.control, model=self.model)

        self._gd_metrics: ClassificationMetrics | None = None
        if self.compute_metrics is None and not self.args.prediction_loss_only and not is_language_model(self.model):
            self._gd_metrics = ClassificationMetrics(ignore_index=IGNORE_INDEX)
            self.compute_metrics = self._gd_compute_metrics
        self.reliability: list[dict] | None = None

    @property
    def gd_config(self) -> GradientDecayConfig:
        return self.compute_loss_func.config

    def get_train_dataloader(self):
        with self._gd_checked_labels():
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        with self._gd_checked_labels():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        with self._gd_checked_labels():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _gd_checked_labels(self):
        # Not for good: the Trainer saves the tokenizer that it finds in its collator.
        collator = self.data_collator
        self.data_collator = _CheckedCollator(collator, self._gd_label_name, self._gd_num_classes)
        try:
            yield
        finally:
            self.data_collator = collator

    def hyperparameter_search(self, hp_space=None, compute_objective=None, *args, **kwargs):
        # By default the Trainer minimises the sum of all metrics, accuracy among them, where there are any.
        if compute_objective is None and self._gd_metrics is not None:
            compute_objective = _eval_loss
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = self._gd_with_decoder_inputs(model, self._gd_with_labels(inputs))
        fused = self._gd_fused(inputs)
        if return_outputs and fused is not None:
            raise ValueError(
                "gd_fused_linear: in training the logits are never made, and compute_loss was asked for the model's "
                "outputs; leave one out"
            )
        with fused or nullcontext():
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        if not return_outputs:
            return result
        loss, outputs = result
        # `prediction_step` reads the first entry as the logits, and drops a tuple's first, the model's own loss.
        if isinstance(outputs, dict):
            first = next((key for key in outputs if key != "loss"), None)
            return loss, outputs if first == "logits" else {"logits": outputs["logits"], **outputs}
        return loss, (loss, *outputs) if isinstance(outputs, (tuple, list)) else (loss, outputs)

    def _gd_fused(self, inputs: dict):
        """In training with ``gd_fused_linear``: the loss in place of the logits."""
        loss = self.compute_loss_func
        if loss.head is None or "labels" not in inputs or not torch.is_grad_enabled():
            return None
        if self.model.get_output_embeddings() is not loss.head.head:  # by model_init, or resized
            loss.head = FusedHead(self.model, loss)
        return loss.head.instead_of_logits(shifted(inputs["labels"]) if loss.shift_labels else inputs["labels"])

    def _gd_with_decoder_inputs(self, model, inputs: dict) -> dict:
        """An encoder-decoder makes its decoder's input from the labels, which the loss takes away from it."""
        fed = not self._gd_decodes or "labels" not in inputs
        if fed or {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
            return inputs
        model = self.accelerator.unwrap_model(model)
        return {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """How many targets the update has on all processes, or the sum of their weights with class weights.

        The Trainer's own count looks under the key ``labels`` only, and before transformers 5.2 does not leave out
        the first position of a causal language model, which is never predicted.
        """
        batches = [self._gd_with_labels(batch) for batch in batch_samples]
        if self.compute_loss_func.shift_labels and all("labels" in b for b in batches):
            shifted = [b["shift_labels"] if "shift_labels" in b else b["labels"][..., 1:] for b in batches]
            batches = [{"labels": labels, "shift_labels": labels} for labels in shifted]
        count = super()._get_num_items_in_batch(batches, device)
        weight = self.compute_loss_func.loss.weight
        if weight is None or count is None or batches[0]["labels"].is_floating_point():
            return count
        if not torch.is_grad_enabled():
            return count  # evaluation is not weighted
        # Times the mean weight of the update's targets, over the same processes.
        sums = torch.zeros(1, 2, device=device)
        for batch in batches:
            labels = batch["labels"].to(device)
            counted = labels != IGNORE_INDEX
            weights = weight[labels.masked_fill(~counted, 0)].masked_fill(~counted, 0.0)
            sums[0] += torch.stack([weights.sum(), counted.sum()])
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            sums = self.accelerator.gather(sums)
        total, targets = sums.sum(0)
        return count * total / targets

    def _gd_with_labels(self, inputs: dict) -> dict:
        """The batch with its labels under the key that the Trainer takes away before the model's forward."""
        if self._gd_label_name == "labels" or self._gd_label_name not in inputs:
            return inputs
        renamed = {key: value for key, value in inputs.items() if key != self._gd_label_name}
        return {**renamed, "labels": inputs[self._gd_label_name]}

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write the model card with its evidence into ``args.output_dir``, in place of the Trainer's own.

        Arguments as ``Trainer.create_model_card``, and TRL's ``dataset_name``. ``README.md`` shows beta and its
        schedule, the last evaluation with its calibration metrics, versions and hardware; beside it ``record.json``,
        ``curves.png``, ``reliability.png``.
        """
        if not self.is_world_process_zero():
            return
        from .hf_card import write_trainer_card  # and with it what draws

        write_trainer_card(
            self,
            self._gd_started,
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags or dataset_name,
            dataset=dataset,
            dataset_args=dataset_args,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The arguments are pickled beside the weights, and pushed with them: without the token.
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The Trainer writes a card at the end alone; what a push in between shows would be without one, or a stale one.
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self.create_model_card(model_name=self.hub_model_id.split("/")[-1])
        super()._push_from_checkpoint(checkpoint_folder)

    def evaluation_loop(self, *args, **kwargs):
        if self._gd_metrics is None:
            return super().evaluation_loop(*args, **kwargs)
        self._gd_metrics.reset()  # of an evaluation that was interrupted
        before, self.args.batch_eval_metrics = self.args.batch_eval_metrics, True  # of this loop, not of the arguments
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.batch_eval_metrics = before

    def _gd_compute_metrics(self, prediction, compute_result: bool = True) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        self._gd_metrics.update(torch.as_tensor(logits), torch.as_tensor(prediction.label_ids))
        if not compute_result:
            return {}
        if not len(self._gd_metrics):  # every label ignored
            return dict.fromkeys(METRICS, math.nan)
        self.reliability = self._gd_metrics.reliability()
        return self._gd_metrics.compute()


class GradientDecayTrainer(GradientDecayMixin, Trainer):
    """``transformers.Trainer`` with the gradient-decay loss; the one changed line. See `GradientDecayMixin`."""


def _eval_loss(metrics: dict[str, float]) -> float:
    return metrics["eval_loss"]


@dataclass
class _CheckedCollator:
    """Refuses labels outside the classes while they are still on the CPU, before they become a device assert."""

    collator: Any
    label_name: str
    num_classes: int | None  # where the model tells

    def __call__(self, features: list) -> dict:
        batch = self.collator(features)
        labels = batch.get(self.label_name)
        if not isinstance(labels, Tensor) or labels.device.type != "cpu":
            return batch
        if labels.is_floating_point():
            if labels.dim() > 1 and not torch.allclose(labels.sum(-1), labels.new_ones(()), rtol=0, atol=1e-2):
                raise ValueError(
                    "floating-point labels must be probabilities that sum to 1 over the classes; several classes at "
                    "once (multi-label) are not for a softmax: use the ordinary Trainer"
                )
        elif self.num_classes is not None:
            wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= self.num_classes))]
            if wrong.numel():
                raise ValueError(
                    f"label {wrong[0].item()} is outside the model's {self.num_classes} classes (0 to "
                    f"{self.num_classes - 1}; {IGNORE_INDEX} is ignored): load the model with the right num_labels, or "
                    "mend the labels"
                )
        return batch
