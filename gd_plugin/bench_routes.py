"""What `gd_plugin.bench` compares: the loss, its peers, and the ways it is written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import gradient_decay_cross_entropy
from .linear import linear_gradient_decay_cross_entropy

__all__ = ["BETA", "DRAWN", "OURS", "ROUTES", "Case", "Step"]

BETA, SMOOTHING, MARGIN = 5.0, 0.1, 0.35

Step = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One comparison: its routes in a table, the first of them the baseline."""

    part: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    only: tuple[str, ...] = ()  # of its routes, besides the baseline; without them all

    @property
    def name(self) -> str:
        return f"{self.part} {' x '.join(map(str, self.shape))}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def routes(self) -> dict[str, Callable[[Case], Step]]:
        if self.part == "classes":
            return {name: ROUTES["logits"][name] for name in DRAWN}
        routes = ROUTES[self.part]
        base = next(iter(routes))
        return {name: route for name, route in routes.items() if not self.only or name == base or name in self.only}

    @property
    def bytes_moved(self) -> int:
        """The least there is to move: the logits read once, their gradient written once."""
        return 2 * self.shape[0] * self.shape[-1] * self.dtype.itemsize

    def logits(self) -> tuple[Tensor, Tensor]:
        rows, classes = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator, device=self.device).to(self.dtype)
        target = torch.randint(classes, (rows,), generator=generator, device=self.device)
        return logits.requires_grad_(), target

    def head(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, width, classes = self.shape
        generator = torch.Generator(self.device).manual_seed(0)
        input = torch.randn(rows, width, generator=generator, device=self.device).to(self.dtype)
        weight = (torch.randn(classes, width, generator=generator, device=self.device) / 16).to(self.dtype)
        target = torch.randint(classes, (rows,), generator=generator, device=self.device)
        return input.requires_grad_(), weight.requires_grad_(), target


# Routes: a case in, what is timed out. What cannot be had raises ImportError or RuntimeError, one line.


def _of_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        logits, target = case.logits()

        def step() -> None:
            logits.grad = None
            loss(logits, target).backward()

        return step

    return prepare


def _compiled(loss: Callable[..., Tensor]) -> Callable[[Case], Step]:
    return lambda case: _of_logits(torch.compile(loss, dynamic=False))(case)


def _ours(logits: Tensor, target: Tensor) -> Tensor:
    return gradient_decay_cross_entropy(logits, target, BETA)


def _ours_smoothed(logits: Tensor, target: Tensor) -> Tensor:
    return gradient_decay_cross_entropy(logits, target, BETA, label_smoothing=SMOOTHING)


def _smoothed(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=SMOOTHING)


def _margin_by_hand(logits: Tensor, target: Tensor) -> Tensor:
    """As users write it: the margin log(beta) added to a clone of the logits."""
    shifted = logits.clone()
    rows = torch.arange(len(target), device=target.device)
    shifted[rows, target] = shifted[rows, target] + torch.log(torch.tensor(BETA))
    return F.cross_entropy(shifted, target)


def _textbook(logits: Tensor, target: Tensor) -> Tensor:
    """As the paper has it, with one-hot vectors and exponentials."""
    onehot = F.one_hot(target, logits.shape[1])
    exp = (logits - logits.amax(1, keepdim=True)).exp()
    of_target = (exp * onehot).sum(1)
    return -(of_target / (exp.sum(1) + (BETA - 1) * of_target)).log().mean()


def _liger(case: Case) -> Step:
    _needs_gpu(case, "Triton")
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    return _of_logits(lambda logits, target: loss(logits.clone(), target))(case)  # it overwrites what it is given


def _poly(case: Case) -> Step:
    from timm.loss import PolyCrossEntropy  # from timm 1.0.31 on

    return _of_logits(PolyCrossEntropy())(case)


def _timm_smoothing(case: Case) -> Step:
    from timm.loss import LabelSmoothingCrossEntropy

    return _of_logits(LabelSmoothingCrossEntropy(SMOOTHING))(case)


def _of_head(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        input, weight, target = case.head()

        def step() -> None:
            input.grad = weight.grad = None
            loss(input, weight, target).backward()

        return step

    return prepare


def _torch_linear(**options) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError("needs torch >= 2.15")
        if options:
            from torch.nn import LinearCrossEntropyOptions

            more = {"options": LinearCrossEntropyOptions(**options)}
        else:
            more = {}
        return _of_head(lambda input, weight, target: F.linear_cross_entropy(input, weight, target, **more))(case)

    return prepare


def _liger_linear(case: Case) -> Step:
    _needs_gpu(case, "Triton")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _of_head(lambda input, weight, target: loss(weight, input, target))(case)


def _cut(case: Case) -> Step:
    _needs_gpu(case, "Triton")
    from cut_cross_entropy import linear_cross_entropy

    return _of_head(lambda input, weight, target: linear_cross_entropy(input, weight, target, filter_eps=None))(case)


def _metric_learning(case: Case) -> Step:
    from pytorch_metric_learning.losses import CosFaceLoss

    _, width, classes = case.shape
    input, weight, target = case.head()
    loss = CosFaceLoss(num_classes=classes, embedding_size=width, margin=MARGIN)
    loss.W = torch.nn.Parameter(weight.detach().t().contiguous())

    def step() -> None:
        input.grad = loss.W.grad = None
        loss(input, target).backward()

    return step


def _language_model(kind: str) -> Callable[[Case], Step]:
    def prepare(case: Case) -> Step:
        from .bench_step import step_of_language_model  # and with it transformers, which the others can do without

        return step_of_language_model(kind, *case.shape, case.dtype, case.device)

    return prepare


def _needs_gpu(case: Case, what: str) -> None:
    if case.device == "cpu":
        raise RuntimeError(f"{what}: a GPU")


OURS = "gradient-decay"
DRAWN = ("F.cross_entropy", OURS, "by hand: one-hot")  # against the number of classes
ROUTES: dict[str, dict[str, Callable[[Case], Step]]] = {
    "logits": {
        "F.cross_entropy": _of_logits(F.cross_entropy),
        OURS: _of_logits(_ours),
        "F.cross_entropy, compiled": _compiled(F.cross_entropy),
        f"{OURS}, compiled": _compiled(_ours),
        "Liger cross-entropy": _liger,
        "timm PolyCrossEntropy": _poly,
        "by hand: margin on a clone": _of_logits(_margin_by_hand),
        "by hand: one-hot": _of_logits(_textbook),
    },
    "smoothing": {
        "F.cross_entropy, smoothing 0.1": _of_logits(_smoothed),
        f"{OURS}, smoothing 0.1": _of_logits(_ours_smoothed),
        f"{OURS}, smoothing 0.1, compiled": _compiled(_ours_smoothed),
        "timm LabelSmoothingCrossEntropy": _timm_smoothing,
    },
    "linear": {
        "F.linear + F.cross_entropy": _of_head(lambda i, w, t: F.cross_entropy(F.linear(i, w), t)),
        f"{OURS}, linear": _of_head(lambda i, w, t: linear_gradient_decay_cross_entropy(i, w, t, BETA)),
        f"F.linear + {OURS}": _of_head(lambda i, w, t: _ours(F.linear(i, w), t)),
        "F.linear_cross_entropy": _torch_linear(),
        "F.linear_cross_entropy, 512 rows": _torch_linear(batch_chunk_size=512, chunking_method=None),
        "Liger fused linear": _liger_linear,
        "cut-cross-entropy": _cut,
        "pytorch-metric-learning CosFace": _metric_learning,
    },
    "model": {
        "Trainer": _language_model("Trainer"),
        "GradientDecayTrainer": _language_model("GradientDecayTrainer"),
        "GradientDecayTrainer, gd_fused_linear": _language_model("gd_fused_linear"),
    },
}
