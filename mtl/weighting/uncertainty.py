"""Weighting by learnt task uncertainty (Kendall, Gal & Cipolla, CVPR 2018, "Multi-Task Learning Using Uncertainty to
Weigh Losses for Scene Geometry and Semantics", equation 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtl.weighting.base import Weighting


class Uncertainty(Weighting):
    """``sum_t exp(-s_t) L_t + s_t / 2`` with a learnt log-variance ``s_t`` per task that starts at 0.

    The paper halves the first term for regression. That only shifts ``s_t`` by log 2: at the optimal ``s_t`` both forms
    weigh the task by ``1 / (2 L_t)``, so one form serves every loss.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()
        self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in tasks})

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        terms = [
            torch.exp(-self.log_variance[name]) * loss + self.log_variance[name] / 2 for name, loss in losses.items()
        ]
        return torch.stack(terms).sum()

    def weights(self) -> dict[str, float] | None:
        """``exp(-s_t)``."""
        return {name: torch.exp(-s).item() for name, s in self.log_variance.items()}
