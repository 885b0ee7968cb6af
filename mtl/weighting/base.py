"""What a weighting is: how the losses of several tasks become the one number that is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn


class Weighting(nn.Module, ABC):
    """Combines the tasks' losses; a new one is a subclass in a file of its own.

    It is a module, so that its parameters are trained with the model's (without weight decay) and its state is saved
    with the run.
    """

    @abstractmethod
    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """``{task: scalar loss}`` to the scalar to minimise."""

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """The factor on the gradient of each task's loss as it is now, for the curves; empty if they are all 1."""
