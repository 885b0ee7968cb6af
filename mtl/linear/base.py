"""The interface of every estimator here: ``fit(X, y, task)`` and ``predict(X, task)``, otherwise as in scikit-learn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_array, check_is_fitted

from mtl.linear.statistics import Array, Scaling, Statistics, statistics

Task = NDArray[np.intp]


class TaskRegressor(BaseEstimator, ABC):
    """One number to predict for each row, which belongs to a task that has a name, an integer.

    Rows of different tasks come in one matrix X (N, F), with ``task`` (N,) beside it.
    """

    tasks_: NDArray[Any]
    n_features_in_: int

    @abstractmethod
    def fit(self, X: ArrayLike, y: ArrayLike, task: ArrayLike) -> Self:
        """Learn from rows X (N, F) with targets y (N,) and tasks (N,)."""

    @abstractmethod
    def predict(self, X: ArrayLike, task: ArrayLike) -> Array:
        """Predictions (N,) for rows X (N, F) of tasks (N,) that were there in training."""

    def score(self, X: ArrayLike, y: ArrayLike, task: ArrayLike) -> float:
        """Explained variance 1 - SSE / SST, SSE and SST both over all rows and not by task."""
        targets = np.asarray(y, float)
        error = targets - self.predict(X, task)
        return float(1 - error @ error / ((targets - targets.mean()) ** 2).sum())

    def _training_rows(self, X: ArrayLike, y: ArrayLike, task: ArrayLike) -> tuple[Array, Array, Task]:
        """Checked arrays, tasks as indices into ``tasks_``."""
        features = _features(X)
        targets = np.asarray(y, float)
        if targets.shape != (len(features),):
            raise ValueError(f"y has shape {targets.shape}, but X has {len(features)} rows: give one number for each")
        if not np.isfinite(targets).all():
            raise ValueError("y contains NaN or infinity: drop those rows")
        names = _task_names(task, len(features))
        self.tasks_, index = np.unique(names, return_inverse=True)
        self.n_features_in_ = features.shape[1]
        return features, targets, index

    def _rows(self, X: ArrayLike, task: ArrayLike) -> tuple[Array, Task]:
        """Checked arrays to predict for."""
        check_is_fitted(self, "tasks_")
        features = _features(X)
        if features.shape[1] != self.n_features_in_:
            raise ValueError(f"X has {features.shape[1]} features, but was fitted with {self.n_features_in_}")
        names = _task_names(task, len(features))
        index = np.searchsorted(self.tasks_, names).clip(max=len(self.tasks_) - 1)
        unseen = names[self.tasks_[index] != names]
        if len(unseen):
            raise ValueError(f"task {unseen[0]} was not there in training, so nothing is known about it")
        return features, index


class LinearTaskRegressor(TaskRegressor):
    """A weight vector for each task, chosen by least squares and a penalty of strength ``alpha``.

    The penalty is on the weights of scaled features (numbers divided by two standard deviations, columns of two values
    by their range), so units do not matter; what it says about weights holds for the intercepts too (as deviations from
    the mean of y), unless stated otherwise.

    ``alpha="cv"`` tries a range of strengths by cross-validation inside the training rows. Folds divide the rows of
    each task, and cost no more than their Gram matrices.
    """

    alpha: float | Literal["cv"]
    alphas: Sequence[float] | None
    folds: int
    random_state: int

    coef_: Array
    intercept_: Array
    alpha_: float

    def fit(self, X: ArrayLike, y: ArrayLike, task: ArrayLike) -> Self:
        """Learn a weight vector for each task.

        Args:
            X: (N, F), finite
            y: (N,), finite
            task: (N,) integers

        Raises:
            ValueError: for shapes that do not fit, NaN, tasks that are no integers, and options out of range.
        """
        candidates = self._candidates()
        features, targets, index = self._training_rows(X, y, task)
        scaling = Scaling.of(features, targets)
        columns, targets = scaling.columns(features), targets - scaling.offset
        everything = statistics(columns, targets, index, len(self.tasks_))
        if self.alpha == "cv":
            candidates = self._default_alphas(everything) if candidates is None else candidates
            errors = np.zeros(len(candidates))
            for rows in folds_of(index, self.folds, self.random_state):
                held_out = statistics(columns[rows], targets[rows], index[rows], len(self.tasks_))
                rest = everything - held_out
                errors += [held_out.squared_error(weights) for weights in self._path(rest, candidates)]
            self.cv_alphas_, self.cv_errors_ = candidates, errors / len(targets)
            self.alpha_ = float(candidates[errors.argmin()])
        else:
            self.alpha_ = float(self.alpha)
        (weights,) = self._path(everything, np.array([self.alpha_]))
        self.coef_, self.intercept_ = scaling.undo(weights)
        return self

    def predict(self, X: ArrayLike, task: ArrayLike) -> Array:
        """Predictions (N,) for rows X (N, F) of tasks (N,).

        Raises:
            ValueError: for shapes that do not fit, NaN, and a task that was not there in training.
        """
        features, index = self._rows(X, task)
        return np.einsum("nf,nf->n", features, self.coef_[index]) + self.intercept_[index]

    @abstractmethod
    def _path(self, data: Statistics, alphas: Array) -> Iterator[Array]:
        """Weights (T, D) for each strength, in the order of ``alphas``."""

    def _default_alphas(self, data: Statistics) -> Array:
        """Decreasing, from where nothing but the mean is left to where the penalty hardly shows."""
        return np.logspace(5, -1, 25)

    def _candidates(self) -> Array | None:
        if self.alpha != "cv" and not (isinstance(self.alpha, int | float) and 0 <= self.alpha < np.inf):
            raise ValueError(f'alpha is {self.alpha!r}, but it must be a number >= 0, or "cv"')
        if self.alpha == "cv" and self.folds < 2:
            raise ValueError(f"folds is {self.folds}, but cross-validation needs at least 2")
        if self.alphas is None:
            return None
        candidates = np.sort(np.asarray(self.alphas, float).ravel())[::-1]
        if not len(candidates) or not (np.isfinite(candidates) & (candidates >= 0)).all():
            raise ValueError(f"alphas is {self.alphas!r}, but it must hold at least one number, all of them >= 0")
        return candidates


def feature_groups(groups: Sequence[int] | None, num_features: int, default: NDArray[np.intp]) -> NDArray[np.intp]:
    """(F,) the group of each feature.

    Raises:
        ValueError: where they are not one integer >= 0 per feature.
    """
    if groups is None:
        return default
    found = np.asarray(groups)
    if found.shape != (num_features,) or not np.issubdtype(found.dtype, np.integer) or found.min() < 0:
        raise ValueError(f"groups must be {num_features} integers >= 0, one per feature of X")
    return found.astype(np.intp)


def folds_of(task: Task, num_folds: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Masks (N,) of the rows held out in turn; the rows of each task go to the folds in equal numbers."""
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(task))
    order = shuffled[np.argsort(task[shuffled], kind="stable")]
    fold = np.empty(len(task), int)
    fold[order] = np.arange(len(task)) % num_folds
    for number in range(min(num_folds, len(task))):
        yield fold == number


def _features(X: ArrayLike) -> Array:
    return check_array(X, dtype=np.float64, input_name="X")


def _task_names(task: ArrayLike, num_rows: int) -> NDArray[Any]:
    names = np.asarray(task)
    if names.shape != (num_rows,):
        raise ValueError(f"task has shape {names.shape}, but X has {num_rows} rows: give the task of each row")
    if not np.issubdtype(names.dtype, np.integer):
        raise ValueError(f"task has dtype {names.dtype}, but tasks are integers")
    return names
