"""The metric that a task is judged by when the user names none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import Metric


def default_metric(loss: Callable[[Tensor, Tensor], Tensor]) -> Metric | None:
    """The usual metric of a loss, fed with the same ``(output, target)``; None where there is no usual one.

    Accuracies are fractions in [0, 1] over all elements that the loss counts (``ignore_index`` is left out).
    """
    # torchmetrics takes two seconds to import, which `import mtl` should not cost.
    from torchmetrics import MeanAbsoluteError, MeanSquaredError
    from torchmetrics.classification import MulticlassAccuracy

    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return MulticlassAccuracy(average="micro", ignore_index=loss.ignore_index)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return _logit_accuracy()()
    if isinstance(loss, nn.MSELoss):
        return MeanSquaredError()
    if isinstance(loss, nn.L1Loss | nn.SmoothL1Loss | nn.HuberLoss):
        return MeanAbsoluteError()
    return None


@cache
def _logit_accuracy() -> type[Metric]:
    from torchmetrics.classification import BinaryAccuracy

    class LogitAccuracy(BinaryAccuracy):
        """Binary or multi-label accuracy of logits.

        torchmetrics takes scores for probabilities when all of a batch happen to lie in [0, 1], so the decision
        "logit above 0" is made here.
        """

        def update(self, preds: Tensor, target: Tensor) -> None:
            super().update((preds > 0).int().flatten(), target.int().flatten())

    return LogitAccuracy
