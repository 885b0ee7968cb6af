"""The metric that a task is judged by when the user names none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import Metric

# torchmetrics takes two seconds to import, which `import mtl` should not cost: it is imported inside functions only.


def default_metric(loss: Callable[[Tensor, Tensor], Tensor]) -> Metric | None:
    """The usual metric of a loss, fed with the same ``(output, target)``; None where there is no usual one.

    Accuracies are fractions in [0, 1] over all elements that the loss counts (``ignore_index`` is left out).
    """
    from torchmetrics import MeanAbsoluteError, MeanSquaredError
    from torchmetrics.classification import MulticlassAccuracy

    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return MulticlassAccuracy(average="micro", ignore_index=loss.ignore_index)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return logit_accuracy()
    if isinstance(loss, nn.MSELoss):
        return MeanSquaredError()
    if isinstance(loss, nn.L1Loss | nn.SmoothL1Loss | nn.HuberLoss):
        return MeanAbsoluteError()
    return None


def logit_accuracy() -> Metric:
    """The fraction of binary labels that the sign of the logit gets right."""
    return _metrics_of_logits()[0]()


def logit_f1() -> Metric:
    """F1 of all binary labels together (micro average), where a positive logit says yes."""
    return _metrics_of_logits()[1]()


@cache
def _metrics_of_logits() -> tuple[type[Metric], type[Metric]]:
    from torchmetrics.classification import BinaryAccuracy, BinaryF1Score

    # torchmetrics takes scores for probabilities when all of a batch happen to lie in [0, 1], so that the decision
    # "logit above 0" is made here.
    class LogitAccuracy(BinaryAccuracy):
        def update(self, preds: Tensor, target: Tensor) -> None:
            super().update((preds > 0).int().flatten(), target.int().flatten())

    class LogitF1(BinaryF1Score):
        def update(self, preds: Tensor, target: Tensor) -> None:
            super().update((preds > 0).int().flatten(), target.int().flatten())

    return LogitAccuracy, LogitF1


def token_accuracy(ignore_index: int) -> Metric:
    """The fraction of tokens whose class is right, from outputs (B, L, K) and targets (B, L)."""
    return _token_accuracy()(average="micro", ignore_index=ignore_index)


@cache
def _token_accuracy() -> Callable[..., Metric]:
    from torchmetrics.classification import MulticlassAccuracy

    class TokenAccuracy(MulticlassAccuracy):
        def update(self, preds: Tensor, target: Tensor) -> None:
            super().update(preds.flatten(0, -2), target.flatten())

    return TokenAccuracy


def delta_m(metrics: Mapping[str, float], reference: Mapping[str, float], directions: Mapping[str, str]) -> float:
    """The mean relative gain over a reference, such as one model per task, in percent.

    ``100 / T * sum_t s_t (M_t - R_t) / |R_t|`` with s_t = 1 where more is better and -1 where less is (Maninis et al.
    2019, "Attentive Single-Tasking of Multiple Tasks", equation 7).

    Args:
        metrics: by task
        reference: by task; tasks of ``metrics`` that it lacks do not count
        directions: "max" or "min" by task

    Raises:
        ValueError: where no task has a reference, or one is 0, of which nothing is a fraction.

    Example:
        >>> delta_m({"digit": 0.9, "depth": 1.1}, {"digit": 0.8, "depth": 1.0}, {"digit": "max", "depth": "min"})
        1.25
    """
    gains = []
    for name in (name for name in metrics if name in reference):
        if reference[name] == 0:
            raise ValueError(f"the reference of task {name!r} is 0, of which nothing is a fraction: leave the task out")
        sign = 1 if directions[name] == "max" else -1
        gains.append(sign * (metrics[name] - reference[name]) / abs(reference[name]))
    if not gains:
        raise ValueError(
            f"the reference names {sorted(reference)}, but the tasks are {sorted(metrics)}: name one of them"
        )
    return round(100 * sum(gains) / len(gains), 10)
