"""Two slow references for the loss, written from its definition and sharing nothing with the package's algorithm.

* `reference`: fp64 torch, the whole signature of ``F.cross_entropy``, differentiable. Good to some 1e-12 of the
  largest logit, which is enough for logits of ordinary size.
* `exact`: 40 decimal digits in mpmath, one row and its gradient in closed form, for the logits where fp64 itself
  cancels (gaps of 1e4, 1 - p far below 1e-16).
"""

import math

import mpmath
import torch


def all_class_losses(rows, beta):
    """J[n, k] = log(sum_{i != k} exp(z_i) + beta_k exp(z_k)) - z_k for rows z of shape (N, C): the definition."""
    num_classes = rows.shape[-1]
    log_beta = torch.as_tensor(beta, dtype=torch.float64).expand(num_classes).log()
    raised = rows.unsqueeze(-2) + torch.diag(log_beta)  # in copy k the logit of class k is raised by log(beta_k)
    return torch.logsumexp(raised, dim=-1) - rows


def reference(
    input, target, beta=1.0, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):  # the arguments of `gradient_decay_cross_entropy`, computed in fp64
    dim = 0 if input.dim() == 1 else 1
    num_classes = input.shape[dim]
    rows = input.double().movedim(dim, -1).reshape(-1, num_classes)
    soft = input.shape == target.shape
    weight = torch.ones(num_classes, dtype=torch.float64) if weight is None else weight.double()

    if soft:
        probabilities = target.double().movedim(dim, -1).reshape(-1, num_classes)
        kept = torch.ones(len(rows), dtype=torch.bool)
        divisor = torch.tensor(float(len(rows)), dtype=torch.float64)
        shape = input.movedim(dim, -1).shape[:-1]
    else:
        labels = target.reshape(-1).long()
        kept = labels != ignore_index
        labels = torch.where(kept, labels, 0)
        probabilities = torch.eye(num_classes, dtype=torch.float64)[labels]
        divisor = weight[labels][kept].sum()
        shape = () if input.dim() == 1 else target.shape

    probabilities = (1 - label_smoothing) * probabilities + label_smoothing / num_classes
    per_class = probabilities * weight
    losses = all_class_losses(rows[kept], beta)
    losses = torch.where(per_class[kept] == 0, 0.0, losses)  # 0 * inf: a class that does not count adds nothing
    total = torch.zeros(len(rows), dtype=torch.float64).index_put((kept,), (per_class[kept] * losses).sum(-1))

    if reduction == "none":
        return total.reshape(shape)
    return total.sum() if reduction == "sum" else total.sum() / divisor


def exact(logits, probabilities, betas):
    """(J, [dJ/dz_i]) of one row, as floats rounded from 40 digits; for plain numbers, all arguments of length C.

    With e_i = exp(z_i), S_k = sum_{i != k} e_i and D_k = S_k + beta_k e_k, the definition reads J_k = log(D_k / e_k),
    so dJ_k/dz_i = e_i / D_k for i != k and dJ_k/dz_k = -S_k / D_k.
    """
    with mpmath.workdps(40):
        exps = [mpmath.exp(mpmath.mpf(z)) for z in logits]
        value, gradient = mpmath.mpf(0), [mpmath.mpf(0)] * len(exps)
        for k, (q, beta) in enumerate(zip(probabilities, betas, strict=True)):
            if q == 0:
                continue
            others = mpmath.fsum(exps[:k] + exps[k + 1 :])
            if exps[k] == 0:
                value, denominator = mpmath.inf, others
            else:
                # log1p: the loss can be exp(-1e4) at beta = 1, far below the 40th digit of 1 + exp(-1e4).
                value += q * mpmath.log1p(others / exps[k] + (mpmath.mpf(beta) - 1))
                denominator = others + beta * exps[k]
            for i, e in enumerate(exps):
                gradient[i] += q * (-others if i == k else e) / denominator
        return float(value), [float(g) for g in gradient]


def relative_error(got, expected):
    """Norm of the error over the norm of ``expected``, per row for 2-d tensors; inf for NaN or inf in ``got``.

    Below a few times the smallest normal fp32 number fp32 has no digits left: an error of that size counts 0.
    """
    floor = 4 * torch.finfo(torch.float32).tiny
    got, expected = torch.atleast_1d(got.double()), torch.atleast_1d(expected.double())
    error = torch.linalg.vector_norm(got - expected, dim=-1)
    size = torch.linalg.vector_norm(expected, dim=-1)
    relative = torch.where(error <= floor, 0.0, error / size)
    return torch.where(relative.isnan(), math.inf, relative)
