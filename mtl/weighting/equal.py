"""Every task counts the same."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.weighting.base import Weighting


class Equal(Weighting):
    """The sum of the losses."""

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """``sum_t L_t``."""
        return torch.stack(list(losses.values())).sum()

    def weights(self) -> dict[str, float] | None:
        """Nothing to say: all are 1."""
        return {}
