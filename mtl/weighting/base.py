"""What a weighting is: how the losses, or the gradients, of several tasks become one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Weighting(nn.Module, ABC):
    """Combines the tasks' losses; a new one is a subclass in a file of its own.

    It is a module, so that its parameters are trained with the model's (without weight decay) and its state is saved
    with the run. The trainer needs only the derivatives ``d forward / d loss_t``: the factors of the tasks.
    """

    @abstractmethod
    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """``{task: scalar loss}``, of the tasks that take part in a step, to the scalar to minimise."""

    def weights(self) -> dict[str, float] | None:
        """The factor of each task as it is now, for the curves; None: the mean of those that the epoch used."""
        return None

    def end_epoch(self, losses: Mapping[str, float]) -> None:
        """Take note of the mean loss of each task over an epoch."""


class GradientWeighting(Weighting):
    """Combines the tasks' gradients of what they share, by factors that depend on their inner products.

    What belongs to one task alone, such as its head, gets the gradient of its own loss in ``forward``.
    """

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """``sum_t L_t``: the factors come from the gradients."""
        return torch.stack(list(losses.values())).sum()

    @abstractmethod
    def combine(self, gramian: Tensor, losses: Mapping[str, Tensor]) -> Tensor:
        """The factors of the shared gradients.

        Args:
            gramian: (T, T), inner products of the tasks' gradients, T >= 2, tasks in the order of ``losses``
            losses: values by task, without a graph

        Returns:
            (T,) factors
        """
