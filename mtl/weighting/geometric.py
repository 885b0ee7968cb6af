"""Geometric loss strategy (Chennupati et al., CVPR Workshops 2019, "MultiNet++: Multi-Stream Feature Aggregation and
Geometric Loss Strategy for Multi-Task Learning", equation 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.weighting.base import Weighting


class GeometricMean(Weighting):
    """``(prod_t L_t)^(1/T)``, which the scale of a loss cannot unbalance. Losses must be positive."""

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """See the class; in logarithms, so that many small losses do not underflow."""
        values = torch.stack(list(losses.values()))
        tiny = torch.finfo(values.dtype).tiny  # a loss of exactly 0 must not stop the other tasks
        return values.clamp(min=tiny).log().mean().exp()
