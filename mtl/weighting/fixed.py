"""Every task counts as much as the user says."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.weighting.base import Weighting


class Fixed(Weighting):
    """A weighted sum of the losses.

    Args:
        weights: a finite factor >= 0 for each task, not all of them 0

    Raises:
        ValueError: for a factor that is negative or not finite, or when all are 0.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weighting: the factor of task {name!r} is {weight}; it must be a finite number >= 0")
        if not any(weights.values()):
            raise ValueError("weighting: every factor is 0, so there is nothing to train; give one task more than 0")
        self._weights = dict(weights)

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """``sum_t w_t L_t``."""
        return torch.stack([self._weights[name] * loss for name, loss in losses.items()]).sum()

    def weights(self) -> dict[str, float] | None:
        """The factors as given."""
        return dict(self._weights)

    def extra_repr(self) -> str:
        """The factors."""
        return ", ".join(f"{name}={weight}" for name, weight in self._weights.items())
