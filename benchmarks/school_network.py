"""A small network with a head for each school, as a regressor like those of ``mtl.linear``."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from mtl.linear.base import TaskRegressor
from mtl.linear.statistics import Array, Scaling
from mtl.linear.target import PowerTransform

_BATCH = 256
_NOISE = 0.62  # variance of what no model explains, for outputs with deviation 1


class NetworkRegressor(TaskRegressor):
    """y^power = h(x) (v + v_t) + c_t: hidden units h that all tasks share, and heads that deviate from a mean head.

    The mean of several networks with different starts, which are trained as one batched computation.

    Args:
        width: hidden units
        deviation: of the prior of v_t and c_t, for outputs with deviation 1
        weight_decay: on the weights that all tasks share
        power: see ``PowerTransform``
        members: networks
        epochs: over the rows, in batches of 256
        lr: of Adam, at its peak
        random_state: of starts and batches
    """

    def __init__(
        self,
        *,
        width: int = 24,
        deviation: float = 0.1,
        weight_decay: float = 1e-3,
        power: float = 0.7,
        members: int = 8,
        epochs: int = 20,
        lr: float = 0.02,
        random_state: int = 0,
    ) -> None:
        self.width, self.deviation, self.weight_decay, self.power = width, deviation, weight_decay, power
        self.members, self.epochs, self.lr, self.random_state = members, epochs, lr, random_state

    def fit(self, X: ArrayLike, y: ArrayLike, task: ArrayLike) -> Self:
        """Train on rows X (N, F) with targets y (N,) and tasks (N,)."""
        self._transform = PowerTransform(self.power)
        features, targets, index = self._training_rows(X, y, task)
        targets = self._transform.forward(targets)
        self._scaling, self._spread = Scaling.of(features, targets), float(targets.std())
        inputs = torch.from_numpy(self._scaling.scaled(features)).float()
        outputs = torch.from_numpy((targets - self._scaling.offset) / self._spread).float()
        generator = torch.Generator().manual_seed(self.random_state)
        self._network = _Heads(inputs.shape[1], self.width, len(self.tasks_), self.members, generator)
        self._train(inputs, outputs, torch.from_numpy(index), generator)
        return self

    def predict(self, X: ArrayLike, task: ArrayLike) -> Array:
        """Predictions (N,) for rows X (N, F) of tasks (N,)."""
        features, index = self._rows(X, task)
        with torch.no_grad():
            found = self._network(torch.from_numpy(self._scaling.scaled(features)).float(), torch.from_numpy(index))
        latent = found.mean(0).double().numpy() * self._spread + self._scaling.offset
        return np.asarray(self._transform.mean(latent, _NOISE * self._spread**2))

    def _train(self, inputs: Tensor, outputs: Tensor, task: Tensor, generator: torch.Generator) -> None:
        """Maximum a posteriori by Adam."""
        network, num_rows = self._network, len(inputs)
        optimizer = torch.optim.Adam(network.parameters(), self.lr)
        num_batches = -(-num_rows // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.epochs * num_batches)
        for _ in range(self.epochs):
            for rows in torch.randperm(num_rows, generator=generator).split(_BATCH):
                error = (network(inputs[rows], task[rows]) - outputs[rows]).square().mean(1).sum() / (2 * _NOISE)
                prior = network.own.square().sum() / (2 * self.deviation**2) / num_rows
                decay = self.weight_decay * (network.inner.square().sum() + network.mean.square().sum())
                optimizer.zero_grad()
                (error + prior + decay).backward()
                optimizer.step()
                schedule.step()


class _Heads(nn.Module):
    """(N, F) inputs and (N,) tasks -> (E, N) outputs of E networks."""

    def __init__(self, features: int, width: int, tasks: int, members: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.randn(members, features, width, generator=generator) / 2)
        self.bias = nn.Parameter(torch.randn(members, 1, width, generator=generator) / 2)
        self.mean = nn.Parameter(torch.randn(members, width, 1, generator=generator) / width**0.5)
        self.own = nn.Parameter(torch.zeros(members, tasks, width + 1))

    def forward(self, inputs: Tensor, task: Tensor) -> Tensor:
        hidden = torch.tanh(torch.baddbmm(self.bias, inputs.expand(len(self.inner), -1, -1), self.inner))
        own = self.own[:, task]
        return (hidden @ self.mean)[..., 0] + (hidden * own[..., :-1]).sum(-1) + own[..., -1]
