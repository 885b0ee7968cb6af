"""The linear mixed model: effects that all tasks share, and random effects of each task with a covariance of their own.

Shapes: N rows, T tasks, F features, D = F + 1 random effects (slopes and the intercept), P shared effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mtl.linear.base import TaskRegressor, feature_groups
from mtl.linear.statistics import Array, Scaling
from mtl.linear.target import PowerTransform

_INTERCEPT_VARIANCE = 1e6  # the shared intercept is free
# Where the variances start, for targets with deviation 1; EM needs a start above 0, and no more than that.
_SHARED, _PRODUCTS, _OWN, _NOISE = 1.0, 0.05, 0.05, 0.6
# What ``prior_tasks`` say: effects of a task deviate by 0.1, where shared ones that matter are 0.3 to 1.
_PRIOR = 0.01


class MixedEffectsRegressor(TaskRegressor):
    """y = p(x) b + x v_t + noise, with v_t ~ N(0, S) for any covariance S, and b ~ N(0, diag(s)).

    p(x) holds the features and, with ``interactions``, their products: they have variances s of their own. S, s and the
    noise come from the training rows by expectation maximisation (Laird and Ware 1982, "Random-effects models for
    longitudinal data", section 4), so there is no strength to choose. S is what a ridge to the mean lacks: which slopes
    differ between tasks, by how much, and which of them go together.

    Args:
        interactions: products of two features, and squares of those with more than two values
        groups: (F,) integers from 0: no products of features of one group, such as the indicators of one attribute;
            default: every feature is a group
        power: the model is of y^power, for targets >= 0 whose spread grows with their size; 1 is of y
        prior_tasks: S counts this many more tasks, with small and independent effects: few tasks say little of it
        max_iter: steps of expectation maximisation

    After ``fit``: ``covariance_`` (D, D) and ``noise_`` for scaled features and targets with deviation 1.
    """

    covariance_: Array
    noise_: float

    def __init__(
        self,
        *,
        interactions: bool = True,
        groups: Sequence[int] | None = None,
        power: float = 1.0,
        prior_tasks: float = 30.0,
        max_iter: int = 40,
    ) -> None:
        self.interactions, self.groups, self.power = interactions, groups, power
        self.prior_tasks, self.max_iter = prior_tasks, max_iter

    def fit(self, X: ArrayLike, y: ArrayLike, task: ArrayLike) -> Self:
        """Find the variances, then the effects.

        Args:
            X: (N, F), finite
            y: (N,), finite
            task: (N,) integers

        Raises:
            ValueError: for shapes that do not fit, NaN, tasks that are no integers, and options out of range.
        """
        if self.prior_tasks <= 0 or self.max_iter < 1:
            raise ValueError(f"prior_tasks={self.prior_tasks} must be above 0 and max_iter={self.max_iter} at least 1")
        self._transform = PowerTransform(self.power)
        features, targets, index = self._training_rows(X, y, task)
        targets = self._transform.forward(targets)
        self._scaling = Scaling.of(features, targets)
        self._spread = float(targets.std()) or 1.0
        scaled = self._scaling.scaled(features)
        groups = feature_groups(self.groups, self.n_features_in_, np.arange(self.n_features_in_))
        self._pairs = _pairs(scaled, groups) if self.interactions else np.zeros((2, 0), int)
        outputs = (targets - self._scaling.offset) / self._spread
        own = self._scaling.columns(features)
        sums = _Sums(self._shared_columns(scaled), own, outputs, index, len(self.tasks_))
        self._estimate(sums)
        return self

    def predict(self, X: ArrayLike, task: ArrayLike) -> Array:
        """Predictions (N,) for rows X (N, F) of tasks (N,).

        Raises:
            ValueError: for shapes that do not fit, NaN, and a task that was not there in training.
        """
        features, index = self._rows(X, task)
        own = self._scaling.columns(features)
        found = self._shared_columns(own[:, :-1]) @ self._shared + np.einsum("nd,nd->n", own, self._own[index])
        latent = found * self._spread + self._scaling.offset
        return self._transform.mean(latent, self.noise_ * self._spread**2)

    def _shared_columns(self, scaled: Array) -> Array:
        """(N, P): ones, features, products."""
        left, right = self._pairs
        return np.column_stack([np.ones(len(scaled)), scaled, scaled[:, left] * scaled[:, right]])

    def _estimate(self, sums: _Sums) -> None:
        num_own, num_shared = sums.own.shape[-1], len(sums.shared)
        prior = _PRIOR * np.eye(num_own)
        kinds = [slice(0, 1), slice(1, num_own), slice(num_own, num_shared)]  # intercept, features, products
        self.covariance_, self.noise_ = _OWN * np.eye(num_own), _NOISE
        variances = np.empty(num_shared)
        for kind, start in zip(kinds, (_INTERCEPT_VARIANCE, _SHARED, _PRODUCTS), strict=True):
            variances[kind] = start
        for _ in range(self.max_iter):
            # own effects given the shared ones: v_t = inverse_t (c_t - cross_t b), with covariance noise * inverse_t
            inverse = np.linalg.inv(sums.own + self.noise_ * np.linalg.inv(self.covariance_))
            projected = inverse @ sums.cross
            flat = projected.reshape(-1, num_shared)
            precision = sums.shared - sums.cross.reshape(-1, num_shared).T @ flat + np.diag(self.noise_ / variances)
            spread = np.linalg.inv(precision)  # of b, in units of the noise
            self._shared = spread @ (sums.shared_moment - flat.T @ sums.own_moment.ravel())
            self._own = np.einsum("tde,te->td", inverse, sums.own_moment - sums.cross @ self._shared)
            uncertain = self.noise_ * (inverse + projected @ spread @ projected.mT).sum(0)
            diagonal = self.noise_ * spread.diagonal()
            # what of the effects the rows have determined; the rest is still as the prior has it
            determined = num_shared - (diagonal / variances).sum()
            determined += self._own.size - np.trace(np.linalg.solve(self.covariance_, uncertain))
            error = sums.squared_error(self._shared, self._own)
            self.noise_ = max(float(error + self.noise_ * determined) / sums.num_rows, 1e-6)
            scatter = self._own.T @ self._own + uncertain + self.prior_tasks * prior
            self.covariance_ = scatter / (len(self._own) + self.prior_tasks)
            for kind in kinds[1:]:
                if self._shared[kind].size:
                    variances[kind] = max(float((self._shared[kind] ** 2 + diagonal[kind]).mean()), 1e-10)


class _Sums:
    """Sums over rows that the estimates need: of shared (N, P) and own (N, D) columns, and outputs (N,)."""

    def __init__(self, shared: Array, own: Array, outputs: Array, task: NDArray[np.intp], num_tasks: int) -> None:
        self.num_rows = len(outputs)
        self.shared, self.shared_moment, self.square = shared.T @ shared, shared.T @ outputs, float(outputs @ outputs)
        self.own = np.empty((num_tasks, own.shape[1], own.shape[1]))  # (T, D, D)
        self.cross = np.empty((num_tasks, own.shape[1], shared.shape[1]))  # (T, D, P)
        self.own_moment = np.empty((num_tasks, own.shape[1]))  # (T, D)
        for number in range(num_tasks):
            rows = task == number
            columns = own[rows]
            self.own[number], self.cross[number] = columns.T @ columns, columns.T @ shared[rows]
            self.own_moment[number] = columns.T @ outputs[rows]

    def squared_error(self, shared: Array, own: Array) -> float:
        """Sum of (y - p b - x v_t)^2."""
        found = self.square - 2 * (shared @ self.shared_moment + np.vdot(own, self.own_moment))
        found += shared @ self.shared @ shared + 2 * np.einsum("td,tdp,p->", own, self.cross, shared)
        return float(found + np.einsum("td,tde,te->", own, self.own, own))


def _pairs(scaled: Array, groups: NDArray[np.intp]) -> NDArray[np.intp]:
    """(2, K): positions of the features to multiply, a feature with itself where it has more than two values."""
    left, right = np.triu_indices(scaled.shape[1])
    many = np.array([len(np.unique(column)) > 2 for column in scaled.T])
    keep = np.where(left == right, many[left], groups[left] != groups[right])
    return np.stack([left[keep], right[keep]])
