"""GradNorm (Chen, Badrinarayanan, Lee & Rabinovich, ICML 2018, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl.weighting.base import GradientWeighting

_SMALLEST = 1e-3  # a factor of 0 would never come back


class GradNorm(GradientWeighting):
    """Learns factors that make the tasks' gradients alike in size, larger for tasks that learn slowly.

    The norm of task t's gradient, ``w_t |g_t|``, is drawn to ``mean norm * r_t^alpha`` by gradient steps on the sum of
    absolute differences; ``r_t`` is the task's part of its first loss that is left, over the mean of the tasks. The
    factors sum to the number of tasks.

    Args:
        tasks: their names
        alpha: >= 0; the larger, the more slow tasks are helped
        lr: > 0, of the factors
    """

    factors: Tensor
    first: Tensor

    def __init__(self, tasks: Sequence[str], alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        if not (alpha >= 0 and lr > 0):
            raise ValueError(f"alpha is {alpha} and lr is {lr}, but alpha must be at least 0 and lr above 0")
        self._tasks, self._alpha, self._lr = list(tasks), alpha, lr
        self.register_buffer("factors", torch.ones(len(tasks)))
        self.register_buffer("first", torch.full((len(tasks),), torch.nan))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """``sum_t w_t L_t``."""
        terms = [self.factors[self._tasks.index(name)].to(loss) * loss for name, loss in losses.items()]
        return torch.stack(terms).sum()

    def weights(self) -> dict[str, float] | None:
        """Those of the next step."""
        return dict(zip(self._tasks, self.factors.tolist(), strict=True))

    def combine(self, gramian: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """Take one step of the factors; the gradients of this one, weighted already, are added up as they are."""
        rows = torch.tensor([self._tasks.index(name) for name in losses], device=self.factors.device)
        values = torch.stack(list(losses.values())).to(self.first)
        self.first[rows] = torch.where(self.first[rows].isnan(), values, self.first[rows])
        norms = gramian.diagonal().clamp(min=0).sqrt().to(self.factors)
        left = values / self.first[rows]
        target = norms.mean() * (left / left.mean()) ** self._alpha
        steps = torch.sign(norms - target) * norms / self.factors[rows]
        self.factors[rows] = (self.factors[rows] - self._lr * steps).clamp(min=_SMALLEST)
        self.factors *= len(self._tasks) / self.factors.sum()
        return torch.ones_like(gramian[0])

    def extra_repr(self) -> str:
        """The hyper-parameters."""
        return f"alpha={self._alpha}, lr={self._lr}"
