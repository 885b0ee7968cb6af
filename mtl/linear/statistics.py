"""What a linear model needs to know of its data: one Gram matrix per task, of scaled features.

Shapes: N rows, T tasks, F features, D = F + 1 columns with the intercept, which is a constant column of ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sums over the rows of each task; two parts of the data add up, so a fold is one of these too.

    Args:
        gram: (T, D, D), sum of x x^T
        moment: (T, D), sum of x y
        square: (T,), sum of y^2
        count: (T,), rows
    """

    gram: Array
    moment: Array
    square: Array
    count: Array

    def __sub__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.gram - other.gram,
            self.moment - other.moment,
            self.square - other.square,
            self.count - other.count,
        )

    def squared_error(self, weights: Array) -> float:
        """Sum over all rows of (y - x w_t)^2, for weights (T, D)."""
        quadratic = np.einsum("td,tde,te->", weights, self.gram, weights)
        return float(self.square.sum() - 2 * np.vdot(self.moment, weights) + quadratic)


@dataclass(frozen=True, eq=False)
class Scaling:
    """Affine map to columns with mean 0 that one penalty treats alike.

    Numbers are divided by two standard deviations, while a column of two values gets a range of 1: both then weigh as a
    balanced indicator does (Gelman 2008, "Scaling regression inputs by dividing by two standard deviations"). Division
    by the deviation would instead blow up the indicator of a rare attribute. A column that is constant says nothing:
    its scale is infinite, so it becomes 0. All of it is over all rows, whatever their task.

    Args:
        center: (F,)
        scale: (F,)
        offset: mean of y
    """

    center: Array
    scale: Array
    offset: float

    @classmethod
    def of(cls, features: Array, targets: Array) -> Scaling:
        """Measured on rows (N, F) and (N,)."""
        center, low, high = features.mean(0), features.min(0), features.max(0)
        two_values = ((features == low) | (features == high)).all(0)
        scale = np.where(two_values, high - low, 2 * features.std(0))
        constant = scale <= 1e-10 * np.maximum(1, abs(center))
        return cls(center, np.where(constant, np.inf, scale), float(targets.mean()))

    def columns(self, features: Array) -> Array:
        """(N, D): scaled features and a last column of ones."""
        return np.column_stack([self.scaled(features), np.ones(len(features))])

    def scaled(self, features: Array) -> Array:
        """(N, F)."""
        return (features - self.center) / self.scale

    def undo(self, weights: Array) -> tuple[Array, Array]:
        """Coefficients (T, F) and intercepts (T,) for features and targets as they were."""
        coefficients = weights[:, :-1] / self.scale
        return coefficients, weights[:, -1] + self.offset - coefficients @ self.center


def statistics(columns: Array, targets: Array, task: NDArray[np.intp], num_tasks: int) -> Statistics:
    """The sums over rows (N, D) and (N,), by task index (N,)."""
    num_columns = columns.shape[1]
    gram = np.zeros((num_tasks, num_columns, num_columns))
    moment, square, count = np.zeros((num_tasks, num_columns)), np.zeros(num_tasks), np.zeros(num_tasks)
    for index in np.unique(task):
        rows = task == index
        own = columns[rows]
        gram[index], moment[index] = own.T @ own, own.T @ targets[rows]
        square[index], count[index] = targets[rows] @ targets[rows], len(own)
    return Statistics(gram, moment, square, count)
