"""A function that all tasks share and a deviation for each, both Gaussian processes.

Shapes: T tasks, N rows in the largest of them (others are padded, with a mask), F features, M inducing points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from torch import Tensor

from mtl.linear.base import Task, TaskRegressor, feature_groups
from mtl.linear.statistics import Array, Scaling
from mtl.linear.target import PowerTransform

# Log-normal priors of all hyper-parameters, for targets with deviation 1: they keep those that the data say nothing of.
_PRIOR_MEAN, _PRIOR_STD = -1.0, 1.5
_JITTER = 1e-6


class HierarchicalGP(TaskRegressor):
    """y = f(x) + g_t(x) + noise, with f and g_t drawn from Gaussian processes of a kernel each.

    Hensman et al. (2013), "Hierarchical Bayesian modelling of gene expression time series across irregularly sampled
    replicates and clusters", section 2. Each kernel is a constant, a linear and a squared exponential part: f holds
    what all tasks have in common, interactions included, and g_t the intercept, slopes and bends of one task. With
    linear parts alone this is ``MeanRegularizedRidge``.

    Hyper-parameters maximise a lower bound of the marginal likelihood (Titsias 2009, "Variational learning of inducing
    variables in sparse Gaussian processes", equation 9) times weak priors. f has rank M, the g_t are exact: T N^3 + T N
    M^2 operations a step, so tasks may have some thousand rows.

    Args:
        groups: (F,) integers from 0: features of one group share their scales, as the indicators of one attribute
            should; default: all features are one group
        power: the model is of y^power, for targets >= 0 whose spread grows with their size; 1 is of y
        num_inducing: M, points that represent f, drawn from the distinct rows
        tuning_rows: hyper-parameters are found on so many rows at most, taken from all tasks alike
        max_iter: steps of L-BFGS
        random_state: of the draws
    """

    def __init__(
        self,
        *,
        groups: Sequence[int] | None = None,
        power: float = 1.0,
        num_inducing: int = 200,
        tuning_rows: int = 3000,
        max_iter: int = 25,
        random_state: int = 0,
    ) -> None:
        self.groups, self.power, self.num_inducing = groups, power, num_inducing
        self.tuning_rows, self.max_iter, self.random_state = tuning_rows, max_iter, random_state

    def fit(self, X: ArrayLike, y: ArrayLike, task: ArrayLike) -> Self:
        """Find hyper-parameters, then the posterior mean.

        Args:
            X: (N, F), finite
            y: (N,), finite
            task: (N,) integers

        Raises:
            ValueError: for shapes that do not fit, NaN, tasks that are no integers, and groups that are not one per
                feature.
        """
        for name in ("num_inducing", "tuning_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        self._transform = PowerTransform(self.power)
        features, targets, index = self._training_rows(X, y, task)
        targets = self._transform.forward(targets)
        random = np.random.default_rng(self.random_state)
        self._scaling = Scaling.of(features, targets)
        self._spread = float(targets.std()) or 1.0
        inputs = self._scaling.scaled(features)
        outputs = (targets - self._scaling.offset) / self._spread
        distinct = np.unique(inputs, axis=0)
        inducing = torch.from_numpy(distinct[random.permutation(len(distinct))[: self.num_inducing]])
        none = np.zeros(self.n_features_in_, np.intp)
        groups = torch.from_numpy(feature_groups(self.groups, self.n_features_in_, none))
        rows = _spread_over_tasks(index, self.tuning_rows, random)
        self.hyperparameters_ = _tune(_pad(inputs[rows], outputs[rows], index[rows]), inducing, groups, self.max_iter)
        self._model = _Model(_Kernels.of(torch.from_numpy(self.hyperparameters_), groups), inducing)
        self._rows_of_tasks = _pad(inputs, outputs, index)
        with torch.no_grad():
            self._posterior = self._model.posterior(self._rows_of_tasks)
        return self

    @torch.no_grad()
    def predict(self, X: ArrayLike, task: ArrayLike) -> Array:
        """Posterior mean (N,) for rows X (N, F) of tasks (N,).

        Raises:
            ValueError: for shapes that do not fit, NaN, and a task that was not there in training.
        """
        features, index = self._rows(X, task)
        inputs = torch.from_numpy(self._scaling.scaled(features))
        kernels, trained = self._model.kernels, self._rows_of_tasks
        found = self._model.features(inputs) @ self._posterior.shared
        for number in np.unique(index):
            rows = torch.from_numpy(np.flatnonzero(index == number))
            found[rows] += kernels.own(inputs[rows], trained.inputs[number]) @ self._posterior.own[number]
        latent = found.numpy() * self._spread + self._scaling.offset
        return self._transform.mean(latent, float(kernels.noise) * self._spread**2)


@dataclass(frozen=True, eq=False)
class _Rows:
    """inputs (T, N, F), outputs (T, N) that are 0 where padded, mask (T, N) of ones and zeros."""

    inputs: Tensor
    outputs: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class _Kernel:
    """constant + x' diag(linear)^2 x + height^2 exp(-|rates (x - x')|^2 / 2), from logarithms."""

    constant: Tensor
    linear: Tensor
    rates: Tensor
    height: Tensor

    def __call__(self, left: Tensor, right: Tensor) -> Tensor:
        linear = (left * self.linear**2) @ right.mT
        left, right = left * self.rates, right * self.rates
        squares = (left**2).sum(-1)[..., :, None] + (right**2).sum(-1)[..., None, :]
        distance = (squares - 2 * left @ right.mT).clamp(min=0)
        return self.constant**2 + linear + self.height**2 * torch.exp(-distance / 2)

    def diagonal(self, rows: Tensor) -> Tensor:
        return self.constant**2 + ((rows * self.linear) ** 2).sum(-1) + self.height**2


@dataclass(frozen=True, eq=False)
class _Kernels:
    """The kernel of f, the one of the g_t, and the variance of the noise."""

    shared: _Kernel
    own: _Kernel
    noise: Tensor

    @staticmethod
    def size(groups: Tensor) -> int:
        return 4 * (int(groups.max()) + 1) + 5

    @classmethod
    def of(cls, logarithms: Tensor, groups: Tensor) -> _Kernels:
        num_groups = int(groups.max()) + 1
        by_group, rest = logarithms.exp().split([4 * num_groups, 5])
        linear, rates, own_linear, own_rates = by_group.view(4, num_groups)[:, groups]
        shared = _Kernel(rest[0], linear, rates, rest[1])
        return cls(shared, _Kernel(rest[2], own_linear, own_rates, rest[3]), rest[4] ** 2)


@dataclass(frozen=True, eq=False)
class _Posterior:
    """Means: of the weights (M,) of f's features, and (T, N) what each row adds to g_t."""

    shared: Tensor
    own: Tensor


@dataclass(frozen=True, eq=False)
class _Model:
    kernels: _Kernels
    inducing: Tensor

    def features(self, inputs: Tensor) -> Tensor:
        """(..., M) such that their products are f's kernel, projected onto the inducing points."""
        shared = self.kernels.shared
        jitter = _JITTER * shared.diagonal(self.inducing).mean()
        factor = torch.linalg.cholesky(
            shared(self.inducing, self.inducing) + jitter * torch.eye(len(self.inducing), dtype=torch.float64)
        )
        flat = shared(inputs.reshape(-1, inputs.shape[-1]), self.inducing)
        return torch.linalg.solve_triangular(factor, flat.T, upper=False).T.reshape(*inputs.shape[:-1], -1)

    def bound(self, rows: _Rows) -> Tensor:
        """Negative lower bound of the log marginal likelihood, without its constant."""
        features, factor, whitened, target = self._whiten(rows)
        inner, right = _normal_equations(whitened, target)
        solved = torch.linalg.solve_triangular(inner, right[:, None], upper=False)
        fit = ((target**2).sum() - (solved**2).sum()) / 2
        volume = factor.diagonal(dim1=-2, dim2=-1).log().sum() + inner.diagonal().log().sum()
        # What the inducing points miss of f counts as if all of it met the noise alone, which is no tighter.
        missed = (self.kernels.shared.diagonal(rows.inputs) - (features**2).sum(-1)) * rows.mask
        return fit + volume + missed.sum() / (2 * self.kernels.noise)

    def posterior(self, rows: _Rows) -> _Posterior:
        features, factor, whitened, target = self._whiten(rows)
        inner, right = _normal_equations(whitened, target)
        weights = torch.cholesky_solve(right[:, None], inner)[:, 0]
        residual = (rows.outputs - features @ weights) * rows.mask
        return _Posterior(weights, torch.cholesky_solve(residual[..., None], factor)[..., 0] * rows.mask)

    def _whiten(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """f's features, the Cholesky factor of each task's own covariance, and features and outputs divided by it."""
        mask = rows.mask
        features = self.features(rows.inputs) * mask[..., None]
        own = self.kernels.own(rows.inputs, rows.inputs) * mask[:, :, None] * mask[:, None, :]
        factor = torch.linalg.cholesky(own + torch.diag_embed(self.kernels.noise * mask + 1 - mask))
        whitened = torch.linalg.solve_triangular(factor, features, upper=False).flatten(0, 1)
        target = torch.linalg.solve_triangular(factor, rows.outputs[..., None], upper=False).flatten()
        return features, factor, whitened, target


def _normal_equations(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    identity = torch.eye(features.shape[1], dtype=features.dtype)
    return torch.linalg.cholesky(identity + features.T @ features), features.T @ target


def _tune(rows: _Rows, inducing: Tensor, groups: Tensor, max_iter: int) -> Array:
    """Logarithms of the hyper-parameters."""

    def objective(values: Array) -> tuple[float, Array]:
        logarithms = torch.from_numpy(values).requires_grad_()
        prior = ((logarithms - _PRIOR_MEAN) ** 2).sum() / (2 * _PRIOR_STD**2)
        loss = _Model(_Kernels.of(logarithms, groups), inducing).bound(rows) + prior
        (gradient,) = torch.autograd.grad(loss, logarithms)
        return loss.item(), gradient.numpy()

    start = np.full(_Kernels.size(groups), _PRIOR_MEAN)
    # Beyond e^6 or e^-8 of the data's own scale nothing changes but the condition of the matrices.
    bounds = [(-8.0, 6.0)] * len(start)
    return minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": max_iter}).x


def _pad(inputs: Array, outputs: Array, task: Task) -> _Rows:
    num_tasks, most = int(task.max()) + 1, int(np.bincount(task).max())
    order = np.argsort(task, kind="stable")
    row = np.arange(len(task)) - np.searchsorted(task[order], task[order])
    places = torch.from_numpy(task[order]), torch.from_numpy(row)
    padded = torch.zeros(num_tasks, most, inputs.shape[1] + 2, dtype=torch.float64)
    padded[places] = torch.from_numpy(np.column_stack([inputs, outputs, np.ones(len(task))])[order])
    return _Rows(padded[..., :-2], padded[..., -2], padded[..., -1])


def _spread_over_tasks(task: Task, num_rows: int, random: np.random.Generator) -> NDArray[np.intp]:
    """At most so many rows, at equal distances in the order of tasks, so each task gives its share."""
    shuffled = random.permutation(len(task))
    order = shuffled[np.argsort(task[shuffled], kind="stable")]
    return order[np.linspace(0, len(order) - 1, min(num_rows, len(order))).round().astype(int)]
