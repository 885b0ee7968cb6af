"""Random loss weighting (Lin, Ye, Zhang & Tsang, TMLR 2022, "Reasonable Effectiveness of Random Weighting", section
3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl.weighting.base import Weighting


class RandomWeighting(Weighting):
    """Factors are drawn anew in each step: a softmax of standard normal numbers, which sums to 1."""

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """``sum_t w_t L_t``."""
        values = torch.stack(list(losses.values()))
        return torch.softmax(torch.randn(len(values)), 0).to(values) @ values
