"""Dynamic weight average (Liu, Johns & Davison, CVPR 2019, "End-to-End Multi-Task Learning with Attention", equation
7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl.weighting.base import Weighting


class DynamicWeightAverage(Weighting):
    """Tasks whose loss falls slowly count more: ``w_t = T softmax_t(r_t / temperature)``.

    ``r_t`` is the mean loss of the last epoch over that of the one before; in the first two epochs all count 1.

    Args:
        tasks: their names
        temperature: > 0; the larger, the more alike the tasks count
    """

    ratios: Tensor
    previous: Tensor

    def __init__(self, tasks: Sequence[str], temperature: float = 2.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, but it must be above 0")
        self._tasks, self._temperature = list(tasks), temperature
        self.register_buffer("previous", torch.full((len(tasks),), torch.nan))
        self.register_buffer("ratios", torch.ones(len(tasks)))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """``sum_t w_t L_t``."""
        weights = self._weights()
        return torch.stack([weights[self._tasks.index(name)] * loss for name, loss in losses.items()]).sum()

    def weights(self) -> dict[str, float] | None:
        """Those of the next step."""
        return dict(zip(self._tasks, self._weights().tolist(), strict=True))

    def end_epoch(self, losses: Mapping[str, float]) -> None:
        """The ratios of the next epoch."""
        now = torch.tensor([losses[name] for name in self._tasks]).to(self.previous)
        ratios = now / self.previous
        self.ratios.copy_(torch.where(torch.isfinite(ratios), ratios, 1.0))
        self.previous.copy_(now)

    def extra_repr(self) -> str:
        """The temperature."""
        return f"temperature={self._temperature}"

    def _weights(self) -> Tensor:
        return len(self._tasks) * torch.softmax(self.ratios / self._temperature, 0)
