"""The loss inside a language model's head, so that the logits of its vocabulary are never made. Used through
`gd_plugin.hf`, by ``gd_fused_linear``."""

from __future__ import annotations

import functools
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from .hf_loss import IGNORE_INDEX, GradientDecayLossFunc, is_language_model
from .linear import linear_gradient_decay_cross_entropy

__all__ = ["FusedHead"]

_REFUSED = "gd_fused_linear: {}; leave it out: the training is the same, and holds the logits"


class FusedHead:
    """The output layer of a language model, which computes the loss in place of the logits while `instead_of_logits`.

    In the place of the model's head and not after the model: there DDP, FSDP and ZeRO have the weights at hand, and
    see that they are used.

    Args:
        model: a transformers language model whose output layer is an ``nn.Linear`` and whose logits are that layer's
            output, as they are, which two forwards of a few tokens find out.
        loss: whose beta, weights and label smoothing are read at every call.

    Raises:
        ValueError: another model; one line that names the flag.
    """

    def __init__(self, model: nn.Module, loss: GradientDecayLossFunc) -> None:
        self._loss = loss  # whose `loss` is another one after `configure`
        if type(loss).compute is not GradientDecayLossFunc.compute:
            raise ValueError(_REFUSED.format(f"{type(loss).__name__} computes a loss of its own"))
        self.cross_entropy: Tensor | None = None  # the sum of the last call
        self._target: Tensor | None = None
        model = extract_model_from_parallel(model)
        if not is_language_model(model):
            raise ValueError(_REFUSED.format(f"{type(model).__name__} is no language model"))
        self.head = model.get_output_embeddings()
        if type(self.head) is not nn.Linear:  # not one of LoRA, or quantised
            raise ValueError(_REFUSED.format(f"the model's output layer is a {type(self.head).__name__}, no nn.Linear"))
        if "forward" in vars(self.head):  # of Accelerate's hooks: device_map, offloading
            raise ValueError(
                _REFUSED.format("the model's output layer has a forward of its own, by device_map or hooks")
            )
        if getattr(model.config, "attention_type", None) == "block_sparse":
            raise ValueError(
                _REFUSED.format(
                    f"{type(model).__name__} gives up its sparse attention once it meets the few tokens of a trial"
                )
            )
        try:
            is_last = _is_last(model, self.head)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ValueError(
                _REFUSED.format(f"{type(model).__name__} cannot be tried with four tokens ({reason})")
            ) from error
        if not is_last:
            raise ValueError(
                _REFUSED.format(
                    f"{type(model).__name__} changes what its output layer makes, by a soft cap, a scale or more"
                )
            )

    @property
    def active(self) -> bool:
        return self._target is not None

    @contextmanager
    def instead_of_logits(self, target: Tensor):
        """The model's ``logits`` are the sum of the loss over ``target`` (...), shape (1, 1, 1), meanwhile."""
        self._target = target
        self.head.forward = self._forward
        try:
            yield
        finally:
            del self.head.forward  # of the instance, which hides the class's own
            self._target = None

    def _forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[:-1] != self._target.shape:
            raise ValueError(
                _REFUSED.format(
                    f"the model has {tuple(hidden.shape[:-1])} positions and {tuple(self._target.shape)} labels"
                )
            )
        loss = self._loss.loss
        total, self.cross_entropy = linear_gradient_decay_cross_entropy(
            hidden.flatten(0, -2),
            self.head.weight,
            self._target.reshape(-1).to(hidden.device),
            loss.beta,
            self.head.bias,
            loss.weight,
            IGNORE_INDEX,
            "sum",
            loss.label_smoothing,
            return_cross_entropy=True,
        )
        return total.reshape(1, 1, 1)


def _is_last(model: nn.Module, head: nn.Linear) -> bool:
    """Whether the logits are what the head makes of all tokens, as it is: shown with something else in its place."""
    tokens = torch.zeros(1, 4, dtype=torch.int64, device=head.weight.device)
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    was_training, came, positions = {module: module.training for module in model.modules()}, [], []

    def instead(hidden: Tensor, sent: float) -> Tensor:
        positions.append(hidden.shape[:-1])
        return hidden.new_full((1, 1, 1), sent)

    try:
        with torch.no_grad():
            for sent in (3.0, -7.5):
                head.forward = functools.partial(instead, sent=sent)
                logits = model.eval()(input_ids=tokens, **more).logits
                came.append(logits.item() if logits.numel() == 1 else None)
    finally:
        del head.forward
        for module, training in was_training.items():
            module.training = training
    return came == [3.0, -7.5] and positions == [tokens.shape] * 2
