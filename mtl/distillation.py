"""Learn from a larger model as well as from the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.batch import Batch, forward
from mtl.task import Task


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Part of the loss of every task: how far the outputs are from those of ``teacher``.

    For classification ``T^2 KL(teacher || model)`` of the softened class probabilities (Hinton et al. 2015, "Distilling
    the Knowledge in a Neural Network", section 2); for every other loss the mean squared difference of the outputs.

    Args:
        teacher: takes the same inputs and gives outputs of the same shapes; it is not trained
        weight: of the teacher in the loss, in [0, 1]; the targets have the rest
        temperature: T > 0; what the logits are divided by

    Raises:
        ValueError: for a value out of its range.
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}, but it must be in [0, 1]: the part that the teacher has")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, but it must be above 0")

    def outputs(self, batch: Batch, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """What the teacher says, by task, without a graph."""
        with torch.no_grad():
            return forward(self.teacher, batch, tasks)

    def mixed(
        self,
        losses: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        taught: Mapping[str, Tensor],
        tasks: Sequence[Task],
    ) -> dict[str, Tensor]:
        """The losses to train on: ``(1 - weight) loss + weight distance``, by task."""
        return {
            task.name: (1 - self.weight) * losses[task.name]
            + self.weight * self._distance(outputs[task.name], taught[task.name], task)
            for task in tasks
            if task.name in losses
        }

    def _distance(self, output: Tensor, taught: Tensor, task: Task) -> Tensor:
        if output.shape != taught.shape:
            raise ValueError(
                f"task {task.name!r}: the teacher gives {tuple(taught.shape)}, the model {tuple(output.shape)}; "
                "distil from a model for the same task"
            )
        if not isinstance(task.loss, nn.CrossEntropyLoss):
            return F.mse_loss(output, taught)
        soft, target = (F.log_softmax(logits / self.temperature, dim=1) for logits in (output, taught))
        divergence = F.kl_div(soft, target, reduction="none", log_target=True).sum(dim=1)
        return self.temperature**2 * divergence.mean()
