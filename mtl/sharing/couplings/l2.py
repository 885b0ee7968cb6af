"""L2 coupling: squared distances between the parameters of the tasks (Evgeniou & Pontil 2004; Evgeniou et al. 2005)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl.sharing.couplings.base import Scaled, Stacked

Graph = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class L2Coupling(Scaled):
    """``strength * sum of squared distances``, of each task to the mean over tasks, or between pairs of tasks.

    Args:
        strength: see ``Scaled``
        to: "mean" for the distance of each task to the mean over tasks; "pairwise" for each unordered pair, which is
            the number of tasks times that of "mean"; or a graph, ``{(task, task): weight >= 0}``, for those pairs

    Raises:
        ValueError: for a pair of a task with itself or given twice, a negative weight, or an unknown task.

    Example:
        >>> from torch import nn
        >>> from mtl import SoftShared, Task
        >>> tasks = [Task(name, loss=nn.MSELoss()) for name in ("a", "b")]
        >>> model = SoftShared(lambda task: nn.Linear(1, 1, bias=False), tasks, L2Coupling(0.5), init="different")
        >>> with torch.no_grad():
        ...     _ = model.stacks.weight.copy_(torch.tensor([[[1.0]], [[3.0]]]))
        >>> float(model.penalty().detach())  # each is 1 from the mean: 0.5 * (1 + 1)
        1.0
    """

    to: str | Graph = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.to, str):
            if self.to not in ("mean", "pairwise"):
                raise ValueError(f"to is {self.to!r}, but it must be 'mean', 'pairwise' or {{(task, task): weight}}")
            return
        if len({frozenset(pair) for pair in self.to}) < len(self.to):
            raise ValueError("to: a pair of tasks has two weights: give each pair once")
        for (first, second), weight in self.to.items():
            if first == second or not 0 <= weight < float("inf"):
                raise ValueError(
                    f"to: the pair ({first!r}, {second!r}) has weight {weight!r}: give two tasks and a number >= 0"
                )

    def check(self, stacked: Stacked) -> None:
        super().check(stacked)
        if not isinstance(self.to, str):
            unknown = sorted({task for pair in self.to for task in pair} - set(stacked.tasks))
            if unknown:
                raise ValueError(f"to: there is no task {unknown[0]!r}; there are {', '.join(stacked.tasks)}")

    def penalty(self, stacked: Stacked) -> Tensor | float:
        strengths = self.strengths(stacked.tensors)
        if not strengths:
            return 0.0
        total = sum(
            strength * self._distance(stacked.tensors[name].reshape(len(stacked.tasks), -1), stacked.tasks)
            for name, strength in strengths.items()
        )
        return total * self.warmed(stacked.step)

    def _distance(self, matrix: Tensor, tasks: tuple[str, ...]) -> Tensor:
        # Distances do not change when all tasks move, and differences of small numbers are more precise.
        centred = matrix - matrix.mean(dim=0, keepdim=True)
        if isinstance(self.to, str):
            return centred.square().sum() * (len(tasks) if self.to == "pairwise" else 1)
        laplacian = _laplacian(self.to, tasks).to(matrix)
        return (centred * (laplacian @ centred)).sum()


def _laplacian(graph: Graph, tasks: tuple[str, ...]) -> Tensor:
    """L with sum over pairs of weight * |w_i - w_j|^2 = trace(W^T L W)."""
    laplacian = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for pair, weight in graph.items():
        i, j = map(tasks.index, pair)
        laplacian[i, i] += weight
        laplacian[j, j] += weight
        laplacian[i, j] -= weight
        laplacian[j, i] -= weight
    return laplacian
