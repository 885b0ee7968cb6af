"""Weights of tasks such that what the worst of them loses is small, found by playing against the tasks."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from torch import nn

from compress.calibration import batches
from compress.removal import Values
from compress.tasks import View
from compress.trial import Trial

ROUNDS = 8
RATE = 1.0  # of a round, for the task that lost most

Choice = TypeVar("Choice")


class TaskLosses:
    """What each task loses when the model changes: the squared difference of its outputs, as a part of their variance.

    For a squared loss with the dense model's outputs as targets, that is the part of what the task has learnt.
    """

    def __init__(self, model: nn.Module, views: Sequence[View]) -> None:
        self._trials = {
            str(view.task): Trial(model, (inputs for inputs, _ in batches(view.calibration or (), model)), view)
            for view in views
        }

    def of(self, model: nn.Module) -> Values:
        """Of a changed model, shape (tasks,)."""
        return np.array(list(self.by_name(model).values()))

    def by_name(self, model: nn.Module) -> dict[str, float]:
        """The same by the tasks' names."""
        return {task: trial.error(model) for task, trial in self._trials.items()}


def balance(num_tasks: int, play: Callable[[Values], tuple[Choice, Values]], rounds: int = ROUNDS) -> Choice:
    """The choice whose worst task loses least, of those that a few weightings of the tasks lead to.

    Multiplicative weights (Freund & Schapire 1999, "Adaptive game playing using multiplicative weights", section 3):
    each round plays the best choice against the current weights, and tasks gain weight by what they lost in it. As for
    groups of samples in Sagawa et al. (2020), arXiv 1911.08731, algorithm 1.

    Args:
        play: from weights (tasks,), which sum to 1, to a choice and what each task loses by it, (tasks,).
    """
    weights = np.full(num_tasks, 1 / num_tasks)
    found: list[tuple[float, Choice]] = []
    for _ in range(rounds):
        choice, losses = play(weights)
        worst = float(losses.max())
        found.append((worst, choice))
        if not 0 < worst < np.inf:
            break
        weights = weights * np.exp(RATE * losses / worst)
        weights /= weights.sum()
    return min(found, key=lambda each: each[0])[1]
