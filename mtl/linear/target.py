"""Targets whose spread grows with their size, such as scores and counts: models see a power of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mtl.linear.statistics import Array

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)


@dataclass(frozen=True)
class PowerTransform:
    """z = y^power, which a model predicts with Gaussian noise, and back to the mean of y (Box and Cox 1964).

    Args:
        power: in (0, 1]; 1 leaves y as it is, anything less needs y >= 0

    Raises:
        ValueError: for a power out of range.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1:
            raise ValueError(f"power is {self.power!r}, but it must be in (0, 1]")

    def forward(self, targets: Array) -> Array:
        """y -> z.

        Raises:
            ValueError: for targets below 0.
        """
        if self.power < 1 and targets.min() < 0:
            raise ValueError(f"y holds {targets.min():.4g}, but power={self.power} needs targets >= 0: use power=1")
        return targets**self.power if self.power < 1 else targets

    def mean(self, latent: Array, variance: float) -> Array:
        """E[y] (N,) where z is Gaussian with these means (N,) and this variance; z below 0 counts as 0."""
        if self.power == 1:
            return latent
        points = latent[:, None] + np.sqrt(variance) * _NODES
        return np.maximum(points, 0) ** (1 / self.power) @ _WEIGHTS / _WEIGHTS.sum()
