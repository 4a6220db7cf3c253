"""Post-hoc calibration: what is fitted to the logits of the validation split after training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["apply_temperature", "fit_temperature", "fit_vector_scaling", "is_useful"]

_USEFUL = (0.05, 20.0)


def apply_temperature(model: nn.Module) -> nn.Module:
    """Divide a model's logits by the temperature in its configuration from now on, and return the model.

    ``gd-plugin train`` stores the temperature that it fitted to the validation split (Guo et al. 2017, arXiv
    1706.04599) as ``gd_temperature``. Without this call a model gives the plain softmax of its logits::

        pipe = pipeline("image-classification", model="user/name")
        apply_temperature(pipe.model)

    Args:
        model: one of transformers; its outputs have ``logits``, of shape (..., C). Predictions stay the same. In
            training mode, where a loss is to see the logits as they are, nothing is divided; a ``loss`` that the model
            computes itself is of the undivided ones.

    Raises:
        ValueError: there is no temperature in the configuration, or it is not a number above 0.
    """
    if not hasattr(model, "config"):
        raise ValueError(
            f"{type(model).__name__} has no configuration, where the temperature is: load it with transformers "
            "(AutoModelForImageClassification), also a timm model"
        )
    temperature = getattr(model.config, "gd_temperature", None)
    if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
        raise ValueError(
            f"the model's configuration has no temperature (gd_temperature: {temperature!r}); gd-plugin train stores "
            "one where the data have a validation and a test split"
        )

    if not getattr(model, "_gd_temperature_hook", None):  # a second call changes nothing
        model._gd_temperature_hook = model.register_forward_hook(_divide)
    return model


def _divide(module: nn.Module, args, output):  # of this module, so that a model with the hook can be pickled
    temperature = getattr(module.config, "gd_temperature", None)
    if module.training or temperature is None:  # it was trained on, which removes the temperature
        return output
    if isinstance(output, tuple):
        raise TypeError("apply_temperature needs outputs with names: leave out return_dict=False")
    output.logits = output.logits / temperature
    return output


def fit_temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature T > 0 for which ``softmax(logits / T)`` has the smallest NLL (Guo et al. 2017, arXiv 1706.04599).

    Args:
        logits: shape (N, C), of samples that the model was not trained on.
        target: class indices, shape (N).

    Raises:
        ValueError: no sample, or logits that are not finite.

    The NLL is convex in 1 / T. Where every sample is right it has no minimum, T would tend to 0, and the samples say
    nothing about overconfidence: T is then 1.
    """
    logits = _checked(logits)
    if (logits.argmax(1) == target).all():
        return 1.0
    log_scale = _minimise(lambda s: F.cross_entropy(logits * s.exp(), target), torch.zeros((), dtype=torch.float64))
    return (-log_scale).exp().item()


def is_useful(temperature: float) -> bool:
    """Whether a fitted temperature is one to apply. Beyond these the fit is of chance: the logits of a model that has
    learned nothing, or a handful of samples."""
    return _USEFUL[0] <= temperature <= _USEFUL[1]


def fit_vector_scaling(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and bias per class, shapes (C), for which ``logits * scale + bias`` has the smallest NLL (Guo et al. 2017).

    Arguments and errors as `fit_temperature`; 1 and 0 where every sample is right. A ridge of 1e-4 on the difference
    to these keeps it finite where a class is always right.
    """
    logits = _checked(logits)
    if (logits.argmax(1) == target).all():
        return logits.new_ones(logits.shape[1]), logits.new_zeros(logits.shape[1])
    start = torch.zeros(2, logits.shape[1], dtype=torch.float64)
    difference = _minimise(
        lambda d: F.cross_entropy(logits * (1 + d[0]) + d[1], target) + 1e-4 * d.square().sum(), start
    )
    return 1 + difference[0], difference[1]


def _checked(logits: Tensor) -> Tensor:
    if not len(logits) or not logits.isfinite().all():
        raise ValueError("calibration needs finite logits of at least one sample; the model may have diverged")
    return logits.to("cpu", torch.float64)


def _minimise(loss, start: Tensor) -> Tensor:
    parameter = start.requires_grad_()
    optimizer = torch.optim.LBFGS([parameter], max_iter=100, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(parameter)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return parameter.detach()
