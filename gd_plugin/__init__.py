"""Gradient-decay softmax cross-entropy (arXiv 2210.17145). Importing this loads torch and no trainer."""

from .calibration import apply_temperature
from .config import GradientDecayConfig
from .functional import gradient_decay_cross_entropy
from .linear import linear_gradient_decay_cross_entropy
from .loss import GradientDecayLoss
from .schedule import beta_at

__version__ = "0.1.0"

__all__ = [
    "GradientDecayConfig",
    "GradientDecayLoss",
    "__version__",
    "apply_temperature",
    "beta_at",
    "gradient_decay_cross_entropy",
    "linear_gradient_decay_cross_entropy",
]
