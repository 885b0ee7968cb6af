"""Learn from a larger model as well as from the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl.batch import Batch, forward
from mtl.taps import tapped
from mtl.task import Task


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Part of the loss of every task: how far the outputs are from those of ``teacher``.

    For classification ``T^2 KL(teacher || model)`` of the softened class probabilities (Hinton et al. 2015, "Distilling
    the Knowledge in a Neural Network", section 2); for every other loss the mean squared difference of the outputs.

    With ``features``, outputs of modules inside are compared too, by their mean squared difference as a part of the
    teacher's mean square (Romero et al. 2015, "FitNets", equation 3; no regressor between them: a pruned model's
    channels are the teacher's own).

    Args:
        teacher: takes the same inputs and gives outputs of the same shapes; it is not trained
        weight: of the teacher in the loss, in [0, 1]; the targets have the rest
        temperature: T > 0; what the logits are divided by
        features: names of modules that both models have, each with the channels (axis 1) of the teacher's that the
            model's are, or None for all of them: after ``compress``, ``{"layer1": plan.kept("layer1.2.bn2.weight")}``
        feature_weight: of the mean over ``features``, added to the loss of every task, >= 0

    Raises:
        ValueError: for a value out of its range, and a module that there is not.
    """

    teacher: nn.Module
    weight: float = 0.5
    temperature: float = 2.0
    features: Mapping[str, Sequence[int] | None] = field(default_factory=dict)
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight is {self.weight}, but it must be in [0, 1]: the part that the teacher has")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, but it must be above 0")
        if not self.feature_weight >= 0:
            raise ValueError(f"feature_weight is {self.feature_weight}, but it must be at least 0")
        self.check(self.teacher, "teacher")

    def check(self, model: nn.Module, who: str = "model") -> None:
        """Raises ``ValueError`` where ``model`` lacks a module of ``features``."""
        parts = {name for name, _ in model.named_modules()}
        if missing := [name for name in self.features if name not in parts]:
            raise ValueError(f"features names {missing[0]!r}, but the {who} has no such module: see named_modules()")

    def watched(self, model: nn.Module) -> AbstractContextManager[dict[str, list[Tensor]]]:
        """What the modules of ``features`` give within the block."""
        return tapped(model, self.features)

    def losses(
        self,
        losses: Mapping[str, Tensor],
        batch: Batch,
        outputs: Mapping[str, Tensor],
        features: Mapping[str, Sequence[Tensor]],
        tasks: Sequence[Task],
    ) -> dict[str, Tensor]:
        """The losses to train on: ``(1 - weight) loss + weight distance``, and that of the features, by task.

        Args:
            losses: those of the targets
            batch: what the teacher is asked
            outputs: what the model gave for it
            features: what its modules gave meanwhile, see :meth:`watched`
            tasks: what is learnt
        """
        with torch.no_grad(), self.watched(self.teacher) as wanted:
            taught = forward(self.teacher, batch, tasks)
        mixed = self.mixed(losses, outputs, taught, tasks)
        if not self.features:
            return mixed
        further = self.feature_weight * self._apart(features, wanted)
        return {name: loss + further for name, loss in mixed.items()}

    def mixed(
        self,
        losses: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        taught: Mapping[str, Tensor],
        tasks: Sequence[Task],
    ) -> dict[str, Tensor]:
        """``(1 - weight) loss + weight distance``, by task."""
        return {
            task.name: (1 - self.weight) * losses[task.name]
            + self.weight * self._distance(outputs[task.name], taught[task.name], task)
            for task in tasks
            if task.name in losses
        }

    def _apart(self, found: Mapping[str, Sequence[Tensor]], wanted: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Mean over the features of their squared differences, as parts of the teacher's squares."""
        distances = []
        for name, channels in self.features.items():
            for mine, theirs in zip(found[name], wanted[name], strict=True):
                target = theirs if channels is None else theirs[:, list(channels)]
                if mine.shape != target.shape:
                    raise ValueError(
                        f"module {name!r} gives {tuple(mine.shape)} in the model and {tuple(target.shape)} in the "
                        "teacher: say in features which of the teacher's channels the model has"
                    )
                scale = target.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
                distances.append(F.mse_loss(mine.float(), target.float()) / scale)
        return torch.stack(distances).mean()

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
