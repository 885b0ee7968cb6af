"""One softmax over the classes of all tasks, learnt beside the tasks."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class UnionSoftmax(nn.Module):
    """Tells all classes of all tasks apart: a task's class k is class ``offset of the task + k`` of the union.

    Its cross-entropy is added to the task's loss. Classes of different tasks then compete, which single tasks never
    ask for; where tasks have inputs of their own, the features learn to tell the tasks' inputs apart as well.

    Args:
        head: from features to one logit per class of the union, tasks in the order of ``classes``
        classes: number of classes by task
        weight: of the added loss, > 0

    Raises:
        ValueError: for no task, or a weight that is not above 0.
    """

    def __init__(self, head: nn.Module, classes: Mapping[str, int], weight: float = 1.0) -> None:
        super().__init__()
        if not classes or not weight > 0:
            raise ValueError(f"classes are {dict(classes)} and weight is {weight}: give a task, and a weight above 0")
        self.head, self.classes, self.weight = head, dict(classes), weight

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, number of all classes)."""
        logits: Tensor = self.head(features)
        return logits

    def losses(self, outputs: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``weight`` times the cross-entropy of the union, by task.

        Args:
            outputs: logits in ``"TASK/union"`` or, for all tasks, in ``"union"``
            targets: (B,) classes by task; negative where unknown

        Raises:
            ValueError: where the head gives another number of logits than there are classes.
        """
        losses, offset = {}, 0
        for name, number in self.classes.items():
            if name in targets:
                logits = outputs[f"{name}/union"] if f"{name}/union" in outputs else outputs["union"]
                if logits.shape[1] != sum(self.classes.values()):
                    raise ValueError(
                        f"the head of the union gives {logits.shape[1]} logits, but the tasks have "
                        f"{sum(self.classes.values())} classes together"
                    )
                known = targets[name] >= 0
                labels = (targets[name] + offset).masked_fill(~known, -100)
                losses[name] = self.weight * F.cross_entropy(logits, labels, ignore_index=-100)
            offset += number
        return losses
