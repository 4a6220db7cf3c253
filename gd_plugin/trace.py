"""What a training is followed by, epoch by epoch, for `gd-plugin diagnose`: confidences, features, smoothness."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Trainer, TrainerCallback

from .record import TRACE_FILE, write_atomic

__all__ = ["Tracer", "find_head", "power_iteration", "read_trace"]

_SAMPLES = 64  # the first of the training split, on which curvature is measured
_ITERATIONS = 10
_UNUSED = {"allow_unused": True, "materialize_grads": True}  # parameters that the loss does not depend on


class Tracer(TrainerCallback):
    """Measures, before training and after every epoch, in evaluation mode and without touching the random numbers:

    * ``confidence``, shape (E, N): the probability of the label of N training samples, without augmentation.
    * ``curvature``, shape (E): the largest eigenvalue, in magnitude, of the Hessian of the training loss with respect
      to the weights, on 64 samples: the local Lipschitz constant of the gradient.
    * ``quotient``, shape (E): |difference of the gradients| / |difference of the weights| from one epoch to the next.

    and after training, on at most N test samples, ``features`` (M, D), what the last linear layer is given,
    ``test_labels`` (M), and ``input_gradient`` (M), the norm of the training loss's gradient with respect to the input,
    the local Lipschitz constant of the loss around a test point. NaN where a model has no float input.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.arrays: dict[str, list] = {name: [] for name in ("epoch", "confidence", "curvature", "quotient")}
        self._before: tuple[Tensor, Tensor] | None = None  # weights and gradient of the epoch before

    def attach(self, trainer: Trainer, test: torch.utils.data.Dataset) -> None:
        self.trainer, self.test = trainer, test
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        self._measure(state.epoch or 0.0)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._measure(state.epoch)

    def _measure(self, epoch: float) -> None:
        model = self.trainer.model
        training = model.training
        model.eval()
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # whose second derivative is implemented
            torch.manual_seed(0)
            confidence = []
            for inputs in self._batches(self.trainer.train_dataset, self.samples):
                labels = inputs.pop("labels")
                with torch.no_grad():
                    p = model(**inputs).logits.float().softmax(-1)
                confidence.append(p.gather(1, labels[:, None]).squeeze(1).cpu())
            curvature, quotient = self._smoothness(model)
        model.train(training)
        values = (epoch, torch.cat(confidence).numpy(), curvature, quotient)
        for name, value in zip(self.arrays, values, strict=True):
            self.arrays[name].append(value)

    def _smoothness(self, model: nn.Module) -> tuple[float, float]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        losses, count = 0.0, 0
        for inputs in self._batches(self.trainer.train_dataset, _SAMPLES):
            losses, count = losses + self._loss(model, inputs), count + len(inputs["labels"])
        loss = losses / count
        gradient = torch.autograd.grad(loss, parameters, create_graph=True, **_UNUSED)
        flat = torch.cat([g.detach().flatten() for g in gradient])
        weights = torch.cat([p.detach().flatten() for p in parameters])
        quotient = math.nan
        if self._before is not None:
            moved = (weights - self._before[0]).norm()
            quotient = ((flat - self._before[1]).norm() / moved).item() if moved > 0 else math.nan
        self._before = (weights, flat)

        def product(vector: Tensor) -> Tensor:
            parts = [
                v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)
            ]
            return torch.cat(
                [h.flatten() for h in torch.autograd.grad(gradient, parameters, parts, retain_graph=True, **_UNUSED)]
            )

        return power_iteration(product, torch.randn_like(flat)), quotient

    def _loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """The training loss with the beta of the moment, summed over the batch."""
        labels = inputs["labels"]
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        return self.trainer.compute_loss_func.compute(logits, labels, "sum")[0]

    def _batches(self, split: torch.utils.data.Dataset, samples: int):
        subset = torch.utils.data.Subset(split, range(min(samples, len(split))))
        for inputs in self.trainer.get_eval_dataloader(subset):
            yield dict(self.trainer._prepare_inputs(inputs))

    def save(self, folder: Path) -> None:
        """Measure the test samples, and write everything into ``folder``."""
        features, labels, gradients = self._test_samples()
        file = io.BytesIO()
        np.savez_compressed(
            file,
            **{name: np.asarray(values, dtype=np.float32) for name, values in self.arrays.items()},
            features=features,
            test_labels=labels,
            input_gradient=gradients,
        )
        write_atomic(folder / TRACE_FILE, file.getvalue())

    def _test_samples(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        model = self.trainer.model.eval()
        seen: list[Tensor] = []
        hook = find_head(model).register_forward_hook(lambda head, given, logits: seen.append(given[0].detach().cpu()))
        labels, gradients = [], []
        try:
            for inputs in self._batches(self.test, self.samples):
                key = next((key for key, value in inputs.items() if value.is_floating_point()), None)
                if key is None:
                    with torch.no_grad():
                        self._loss(model, inputs)
                    gradients.append(torch.full((len(inputs["labels"]),), math.nan))
                else:
                    inputs[key] = inputs[key].requires_grad_()
                    loss = self._loss(model, inputs)
                    (gradient,) = torch.autograd.grad(loss, inputs[key])
                    gradients.append(gradient.flatten(1).norm(dim=1).cpu())
                labels.append(inputs["labels"].cpu())
        finally:
            hook.remove()
        # A head on every position of a sequence, whose length differs between batches: the mean over the positions.
        features = torch.cat([x.float().mean(1) if x.dim() == 3 else x.float() for x in seen])
        return features.numpy(), torch.cat(labels).numpy(), torch.cat(gradients).float().numpy()


def find_head(model: nn.Module) -> nn.Linear:
    """The last linear layer with an output for every class, whose input are the features.

    Raises:
        ValueError: there is none.
    """
    found = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    if not found:
        raise ValueError("--trace_samples: the model's head is not a linear layer; leave it out, or use another model")
    return found[-1]


def power_iteration(product, start: Tensor, iterations: int = _ITERATIONS) -> float:
    """The largest eigenvalue in magnitude of a symmetric matrix that is known by its products with vectors.

    Args:
        product: vector (D) to vector (D).
        start: vector (D) that is not orthogonal to the eigenvector; a random one will do.
    """
    vector, value = start / start.norm(), 0.0
    for _ in range(iterations):
        image = product(vector)
        value = image.norm().item()
        if value == 0:
            break
        vector = image / value
    return value


def read_trace(folder: Path) -> dict[str, np.ndarray]:
    """What `Tracer.save` wrote.

    Raises:
        ValueError: there is no such file, or it is damaged; one line.
    """
    path = folder / TRACE_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {TRACE_FILE}; train it with --trace_samples 1000")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # a zip file can be damaged in many ways
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); train it again") from None
