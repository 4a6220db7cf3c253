"""The loss in the form that the Trainer calls it, and what it must know of the model. Used through `gd_plugin.hf`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, reduce
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.loss.loss_utils import (
    LOSS_MAPPING,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    ForSequenceClassificationLoss,
    ForTokenClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
)

from .composed import divisor_of_mean
from .config import GradientDecayConfig
from .functional import gradient_decay_cross_entropy
from .loss import GradientDecayLoss

__all__ = ["GradientDecayLossFunc"]

IGNORE_INDEX = -100  # the Trainer's: it counts the labels that differ from it
DATA_PARALLEL = (
    "{n} GPUs in one process (DataParallel) would make the loss {n} times too large: start one process per GPU with "
    "`torchrun --nproc-per-node {n} ...` or `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES=0"
)


class GradientDecayLossFunc:
    """The loss in the form of the Trainer's ``compute_loss_func``: called with the model's outputs and the labels.

    Returns ``sum of losses / num_items_in_batch``, so that it is the same whatever the accumulation steps and the
    number of processes. Without gradients (evaluation) it is plain cross-entropy: no beta, weights or smoothing.

    It learns from its `GradientDecayCallback` what the Trainer knows: whether the model's labels are to be shifted
    (causal language models), ``label_smoothing_factor`` and the device; and beta at every update.

    Class weights: `GradientDecayMixin` divides by the sum of the labels' weights in the whole update, which is
    ``F.cross_entropy``'s weighted mean. Used with an ordinary Trainer, which counts labels and not weights, the sum
    is divided by the number of labels: give weights whose mean over the labels is 1.

    Args:
        config: checked knobs; `GradientDecayConfig()` is cross-entropy, with none of the model heads' own
            normalisation errors under gradient accumulation (transformers#47688).
    """

    def __init__(self, config: GradientDecayConfig) -> None:
        self.shift_labels: bool | None = None  # known once the callback has met the model
        self.calls = 0  # in training
        self.head: Any = None  # a `gd_plugin.hf_fused.FusedHead`, where the logits are never made
        self._cross_entropy: Tensor | None = None
        self.configure(config)

    def configure(self, config: GradientDecayConfig) -> None:
        """Take other knobs, before training begins."""
        self.config = config
        self.loss = GradientDecayLoss.from_config(config, ignore_index=IGNORE_INDEX)

    def bind(self, model: nn.Module, args: TrainingArguments) -> None:
        """Take from the model and the Trainer's arguments what the loss depends on; called by the callback."""
        self.shift_labels = shifts_labels(model)
        self.loss.label_smoothing = args.label_smoothing_factor
        self.loss.to(args.device)
        # (sum of plain cross-entropy, number of targets) since the last logging step, on the device.
        self._cross_entropy = torch.zeros(2, dtype=torch.float32, device=args.device)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """
        Args:
            outputs: the model's: a mapping with ``logits`` (..., C), or a tuple that begins with them.
            labels: class indices (...), or class probabilities (..., C).
            num_items_in_batch: how many labels the whole update has; ``None`` for the mean of this batch.
        """
        if self.shift_labels is None:
            raise RuntimeError(
                "the gradient-decay loss does not know its model yet: pass callbacks=[GradientDecayCallback(loss)] to "
                "the Trainer together with compute_loss_func=loss (a callback added later is met when training begins)"
            )
        if labels is None:
            raise ValueError(
                "the batch has no labels: the gradient-decay loss needs a column 'labels' (or 'label'), or "
                "GradientDecayTrainer with label_names=['your_column']"
            )
        if self.head is not None and self.head.active:
            return self._of_head(outputs, labels, num_items_in_batch)
        logits, target = _align(_logits(outputs), labels, self.shift_labels)
        divisor = _divisor(num_items_in_batch, target, logits.shape[-1])
        reduction = "mean" if divisor is None else "sum"
        if not torch.is_grad_enabled():
            loss = gradient_decay_cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction=reduction)
            return loss if divisor is None else loss / divisor

        self.calls += 1
        loss, cross_entropy = self.compute(logits, target, reduction)
        count = _count(target)
        if divisor is None:
            cross_entropy = cross_entropy * count  # from their mean back to the sum
        self._cross_entropy += torch.stack([cross_entropy.float(), count])
        return loss if divisor is None else loss / divisor

    def _of_head(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The same, where the model's head has computed the sums, which stand in the place of the logits."""
        total = _logits(outputs).reshape(())
        target = (shifted(labels) if self.shift_labels else labels).to(total.device)
        self.calls += 1
        self._cross_entropy += torch.stack([self.head.cross_entropy, _count(target)])
        divisor = _divisor(num_items_in_batch, target, 1)
        if divisor is None:
            ignored = target == IGNORE_INDEX
            divisor = divisor_of_mean(target.masked_fill(ignored, 0), ignored, self.loss.weight)
            divisor = divisor.masked_fill(divisor == 0, 1)  # nothing to learn from
        return total / divisor

    def compute(self, logits: Tensor, target: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
        """The training loss and the plain cross-entropy of (N, C) logits, reduced; another loss overrides this."""
        return gradient_decay_cross_entropy(
            logits,
            target,
            self.loss.beta,
            self.loss.weight,
            self.loss.ignore_index,
            reduction,
            self.loss.label_smoothing,
            return_cross_entropy=True,
        )

    def pop_cross_entropy(self) -> float:
        """Mean plain cross-entropy of the training targets since the last call, over all processes. Waits."""
        total, count = reduce(self._cross_entropy, reduction="sum").tolist()
        self._cross_entropy.zero_()
        return total / count if count else float("nan")


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, dict):
        if "logits" not in outputs:
            raise ValueError(f"the model returned no 'logits', only {', '.join(outputs)}")
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


def _align(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """(N, C) logits and (N) or (N, C) targets; the only place where labels are shifted."""
    num_classes = logits.shape[-1]
    soft = labels.shape == logits.shape and labels.is_floating_point()
    if shift and soft:
        raise ValueError("a causal language model needs token indices as labels, got probabilities of every token")
    if shift:
        labels = shifted(labels)
    target = labels.to(logits.device)
    target = target.reshape(-1, num_classes) if soft else target.reshape(-1)
    return logits.reshape(-1, num_classes), target


def shifted(labels: Tensor) -> Tensor:
    """The label of position i + 1 at position i. The labels move, not the logits: a copy of the logits of a large
    vocabulary is what runs out of memory."""
    return nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]


def _count(target: Tensor) -> Tensor:
    """Targets that count, fp32 on their device."""
    if target.is_floating_point():
        return torch.full((), float(len(target)), device=target.device)
    return (target != IGNORE_INDEX).sum().to(torch.float32)


def _divisor(num_items: Tensor | int | None, target: Tensor, num_classes: int) -> Tensor | int | None:
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(DATA_PARALLEL.format(n=num_items.numel()))
        num_items = num_items.to(target.device)
        # Nothing to learn from: all labels ignored, or of weight 0. 0 / 0 would make every parameter NaN.
        num_items = torch.where(num_items > 0, num_items, 1)
    # The Trainer counts every entry of the labels, and class probabilities have one per class.
    return num_items / num_classes if target.is_floating_point() else num_items


def _kind_of_loss(model: nn.Module) -> Any:
    """The function that transformers itself would compute this model's loss with, or None."""
    model = extract_model_from_parallel(model, keep_torch_compile=False)  # FSDP1, DDP
    model = getattr(model, "get_base_model", lambda: model)()  # PEFT
    # GPT2LMHeadModel and its like have no loss type of their own; the Trainer knows them by name.
    if _is_one_of(model, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        # Two of them predict the labels where they stand, whatever the mapping's name says.
        return ForMaskedLMLoss if _is_one_of(model, ("XLNetLMHeadModel", "XLMWithLMHeadModel")) else ForCausalLMLoss
    return LOSS_MAPPING.get(getattr(model, "loss_type", None))


def _is_one_of(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether the model's class, or one that it is derived from, has one of these names."""
    return any(base.__name__ in names for base in type(model).__mro__)


def is_language_model(model: nn.Module) -> bool:
    return _kind_of_loss(model) in (ForCausalLMLoss, ForMaskedLMLoss)


def shifts_labels(model: nn.Module) -> bool:
    """Whether position i predicts label i + 1; an encoder-decoder's labels are aligned with its logits."""
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return _kind_of_loss(model) is ForCausalLMLoss and not encoder_decoder


def check_model(model: nn.Module) -> int | None:
    """The number of classes where the model's configuration tells it; ValueError where softmax does not apply."""
    kind = _kind_of_loss(model)
    supported = (None, ForCausalLMLoss, ForMaskedLMLoss, ForSequenceClassificationLoss, ForTokenClassification)
    # Before transformers 5.2 some of the others had no entry in LOSS_MAPPING: by their names.
    if kind not in supported or re.search(r"For(CTC|\w*Segmentation|\w*Detection)$", type(model).__name__):
        raise ValueError(
            f"{type(model).__name__} has a loss of another kind: the gradient-decay loss is for classifiers and "
            "language models; use the ordinary Trainer"
        )
    config = getattr(model, "config", None)
    if config is None or is_language_model(model):
        return None
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise ValueError(
            f"problem_type is {problem!r}: the gradient-decay loss is a softmax over mutually exclusive classes; "
            "remove problem_type, or use the ordinary Trainer"
        )
    if _is_one_of(model, MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()):
        return None  # its classes are the choices of a question, whatever num_labels says
    num_labels = getattr(config, "num_labels", None)
    if num_labels == 1:
        raise ValueError("the model has num_labels=1 (regression); a softmax needs at least 2 classes")
    return num_labels
