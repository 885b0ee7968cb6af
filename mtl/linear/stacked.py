"""Several regressors as one: a weighted sum of their predictions, weighted by how they do on rows held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import clone
from sklearn.linear_model import LinearRegression

from mtl.linear.base import TaskRegressor, folds_of
from mtl.linear.statistics import Array


class StackedRegressor(TaskRegressor):
    """Sum of the predictions of several regressors with weights >= 0 (Breiman 1996, "Stacked regressions").

    The weights are the most probable ones by the squared error on rows that the regressors were not fitted on: each is
    fitted ``folds`` times without a part of every task, and at last on all rows. Before any row is seen they are near
    equal weights: good regressors are so alike that few rows cannot tell them apart, and their mean is hard to beat.
    What scikit-learn's ``StackingRegressor`` is for ``fit(X, y)``.

    Args:
        estimators: (name, regressor) pairs; they are copied, not changed
        folds: parts of the rows of each task
        spread: deviation of the weights from equal ones, 1 / number of regressors, by a Gaussian prior, > 0;
            ``math.inf`` leaves all to the rows
        random_state: of the division

    After ``fit``: ``weights_`` (number of regressors,), ``estimators_``, and ``cv_errors_``, the mean squared error of
    each regressor on held-out rows.
    """

    weights_: Array
    cv_errors_: Array

    def __init__(
        self,
        estimators: Sequence[tuple[str, TaskRegressor]],
        *,
        folds: int = 5,
        spread: float = 0.1,
        random_state: int = 0,
    ) -> None:
        self.estimators, self.folds, self.spread, self.random_state = estimators, folds, spread, random_state

    def fit(self, X: ArrayLike, y: ArrayLike, task: ArrayLike) -> Self:
        """Find the weights, then fit every regressor on all rows.

        Args:
            X: (N, F), finite
            y: (N,), finite
            task: (N,) integers; a task with a single row has no part in the weights

        Raises:
            ValueError: for no regressors, two of one name, fewer than two folds, and what the regressors refuse.
        """
        names = [name for name, _ in self.estimators]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"estimators are named {names}: give at least one, each with a name of its own")
        if self.folds < 2 or not self.spread > 0:
            raise ValueError(f"folds is {self.folds} and spread {self.spread}: give at least 2, and more than 0")
        features, targets, index = self._training_rows(X, y, task)
        several = np.bincount(index)[index] > 1
        if not several.any():
            raise ValueError("every task has a single row, so there is none to hold out: do not stack")
        found = np.zeros((len(targets), len(names)))
        for fold in folds_of(index, self.folds, self.random_state):
            held_out = fold & several
            if held_out.any():
                for column, (_, estimator) in enumerate(self.estimators):
                    fitted = clone(estimator).fit(features[~held_out], targets[~held_out], index[~held_out])
                    found[held_out, column] = fitted.predict(features[held_out], index[held_out])
        self.cv_errors_ = ((found - targets[:, None]) ** 2)[several].mean(0)
        # deviations from the mean target, so that weights whose sum is not 1 shrink to it and not to 0
        self._offset = float(targets.mean())
        self.weights_ = self._best_weights(found[several] - self._offset, targets[several] - self._offset)
        self.estimators_ = [clone(estimator).fit(features, targets, index) for _, estimator in self.estimators]
        return self

    def _best_weights(self, found: Array, targets: Array) -> Array:
        """The prior is as many more rows as there are weights: each says that a weight is near 1 / K."""
        equal = np.full(found.shape[1], 1 / found.shape[1])
        noise = float(((targets - found @ equal) ** 2).mean())
        prior = np.sqrt(noise) / self.spread * np.eye(len(equal))
        combine = LinearRegression(positive=True, fit_intercept=False)
        combine.fit(np.vstack([found, prior]), np.concatenate([targets, prior @ equal]))
        return np.asarray(combine.coef_)

    def predict(self, X: ArrayLike, task: ArrayLike) -> Array:
        """Weighted sum (N,) for rows X (N, F) of tasks (N,).

        Raises:
            ValueError: for shapes that do not fit, NaN, and a task that was not there in training.
        """
        features, index = self._rows(X, task)
        found = np.column_stack([estimator.predict(features, index) for estimator in self.estimators_])
        return self._offset + (found - self._offset) @ self.weights_
