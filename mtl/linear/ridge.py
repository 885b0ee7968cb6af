"""Ridge regression over tasks in closed form: each for itself, all as one, or each drawn towards the mean of all.

Shapes: T tasks, D columns (features and intercept).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from mtl.linear.base import LinearTaskRegressor
from mtl.linear.statistics import Array, Statistics


class IndependentRidge(LinearTaskRegressor):
    """Each task for itself: minimises sum_i (y_i - c_t - x_i w_t)^2 + alpha (||w_t||^2 + c_t^2) after scaling.

    y goes about its mean over all tasks, so a strong penalty leaves that mean.

    Args:
        alpha: strength >= 0, the same for all tasks; "cv" chooses it
        alphas: strengths that "cv" tries; default: 25 from 1e5 to 0.1
        folds: of "cv"
        random_state: of the folds
    """

    def __init__(
        self,
        alpha: float | Literal["cv"] = 1.0,
        *,
        alphas: Sequence[float] | None = None,
        folds: int = 5,
        random_state: int = 0,
    ) -> None:
        self.alpha, self.alphas, self.folds, self.random_state = alpha, alphas, folds, random_state

    def _path(self, data: Statistics, alphas: Array) -> Iterator[Array]:
        spectrum = np.linalg.eigh(data.gram)
        for alpha in alphas:
            yield _solve(spectrum, data.moment, alpha)


class PooledRidge(LinearTaskRegressor):
    """All tasks as one: minimises sum over all rows of (y_i - c - x_i w)^2 + alpha ||w||^2.

    Args:
        alpha: strength >= 0; "cv" chooses it
        alphas: strengths that "cv" tries; default: 25 from 1e5 to 0.1
        folds: of "cv"
        random_state: of the folds

    The intercept is not penalised.
    """

    def __init__(
        self,
        alpha: float | Literal["cv"] = 1.0,
        *,
        alphas: Sequence[float] | None = None,
        folds: int = 5,
        random_state: int = 0,
    ) -> None:
        self.alpha, self.alphas, self.folds, self.random_state = alpha, alphas, folds, random_state

    def _path(self, data: Statistics, alphas: Array) -> Iterator[Array]:
        num_tasks, num_columns = data.moment.shape
        penalty = np.diag(np.append(np.ones(num_columns - 1), 0))
        for alpha in alphas:
            weights = _solve(np.linalg.eigh(data.gram.sum(0) + alpha * penalty), data.moment.sum(0))
            yield np.tile(weights, (num_tasks, 1))


class MeanRegularizedRidge(LinearTaskRegressor):
    """Each task near the mean of all: adds alpha sum_t ||w_t - w||^2 + shared_alpha ||w||^2 to the squared error.

    w is free, so it becomes the mean of the w_t where ``shared_alpha`` is 0 (Evgeniou and Pontil 2004, "Regularized
    multi-task learning", equation 6). Tasks are eliminated one by one, so the cost is T systems of D unknowns.

    Args:
        alpha: strength >= 0 of the pull to the mean: 0 is each task for itself, infinity all as one; "cv" chooses it
        shared_alpha: strength >= 0 of the pull of the mean itself to 0, where features of all tasks are collinear
        alphas: strengths that "cv" tries; default: 25 from 1e5 to 0.1
        folds: of "cv"
        random_state: of the folds

    w holds the mean of the intercepts too, and ``shared_alpha`` does not touch that.
    """

    def __init__(
        self,
        alpha: float | Literal["cv"] = 1.0,
        *,
        shared_alpha: float = 1.0,
        alphas: Sequence[float] | None = None,
        folds: int = 5,
        random_state: int = 0,
    ) -> None:
        self.alpha, self.shared_alpha = alpha, shared_alpha
        self.alphas, self.folds, self.random_state = alphas, folds, random_state

    def _path(self, data: Statistics, alphas: Array) -> Iterator[Array]:
        shared_ridge = shared_penalty(self.shared_alpha, data)
        spectrum = np.linalg.eigh(data.gram)
        right = np.concatenate([data.gram, data.moment[..., None]], axis=2)
        for alpha in alphas:
            # w_t = w + v_t with (G_t + alpha) v_t = b_t - G_t w: v_t = target - pull w
            response = _solve(spectrum, right, alpha)
            pull, target = response[..., :-1], response[..., -1]
            left = (right - data.gram @ response).sum(0)  # what the v_t leave for w, and its right-hand side
            shared = _solve(np.linalg.eigh(left[:, :-1] + shared_ridge), left[:, -1])
            yield shared + target - pull @ shared


def shared_penalty(strength: float, data: Statistics) -> Array:
    """(D, D): ridge on the shared weights, not on the shared intercept.

    Raises:
        ValueError: for a strength below 0.
    """
    if not 0 <= strength < np.inf:
        raise ValueError(f"shared_alpha is {strength!r}, but it must be a number >= 0")
    return strength * np.diag(np.append(np.ones(data.moment.shape[1] - 1), 0))


def _solve(spectrum: tuple[Array, Array], right: Array, alpha: float = 0.0) -> Array:
    """(A + alpha)^+ right, from eigenvalues and eigenvectors of A >= 0, which may be singular.

    ``right`` is a vector per matrix, or a matrix.
    """
    values, vectors = spectrum
    values = values.clip(min=0) + alpha
    keep = values > values.max(-1, keepdims=True) * 1e-13
    inverse = np.where(keep, 1 / np.where(keep, values, 1), 0)
    if right.ndim == vectors.ndim:
        return vectors @ (inverse[..., None] * (np.swapaxes(vectors, -1, -2) @ right))
    return _solve(spectrum, right[..., None], alpha)[..., 0]
