"""Trace norm coupling: few directions in which tasks differ (Yang & Hospedales 2017, "Trace Norm Regularised Deep
Multi-Task Learning")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from layers.nuclear import nuclear_norms, shrinkages
from mtl.sharing.couplings.base import Scaled, Stacked

Unfold = Literal["last", "tucker", "tt"]
Of = Literal["weights", "deviations"]


@dataclass(frozen=True)
class TraceNorm(Scaled):
    """``strength * nuclear norm`` of the stacked parameters, unfolded into a matrix in one way or several.

    A stack has the axes (task, axes of the parameter). In the paper's order the task comes last; the unfoldings are the
    same.

    Args:
        strength: see ``Scaled``
        unfold: "last" for (task x all others), so that tasks share a basis; "tucker" for the sum over every axis
            against all others (equation 2); "tt" for the sum over every cut of the axes into a left and a right part
            (equation 3)
        of: "weights", or "deviations" from the mean over tasks, which costs the mean nothing: better where tasks are
            alike
        proximal: instead of a term in the loss, a step after each step of the optimiser: singular values shrink by
            ``lr * strength`` and become zero where they are smaller, which a gradient never brings about. Exact for one
            unfolding, one after the other for several. With SGD of momentum m a term in the loss is ``1 / (1 - m)``
            times as strong.

    Example:
        >>> TraceNorm(0.01, of="deviations", proximal=True)
        TraceNorm(strength=0.01, warmup=0, unfold='last', of='deviations', proximal=True)
    """

    unfold: Unfold = "last"
    of: Of = "weights"
    proximal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in (("unfold", Unfold), ("of", Of)):
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, but it must be one of {', '.join(choices)}")

    def penalty(self, stacked: Stacked) -> Tensor | float:
        strengths = {} if self.proximal else self.strengths(stacked.tensors)
        if not strengths:
            return 0.0
        stacks = [
            (stacked.tensors[name], strength, unfolding)
            for name, strength in strengths.items()
            for unfolding in _unfoldings(stacked.tensors[name].dim(), self.unfold)
        ]
        values = nuclear_norms(
            [unfolding.matrix(self._coupled(stack)) for stack, _, unfolding in stacks],
            self._norms([stack for stack, _, _ in stacks]),
        )
        return (values @ values.new_tensor([strength for _, strength, _ in stacks])) * self.warmed(stacked.step)

    @torch.no_grad()
    def proximal_step(self, stacked: Stacked, lr: float) -> None:
        if not self.proximal:
            return
        warmed = self.warmed(stacked.step)
        rest = [
            (stacked.tensors[name], lr * strength * warmed, _unfoldings(stacked.tensors[name].dim(), self.unfold))
            for name, strength in self.strengths(stacked.tensors).items()
        ]
        while rest:  # the first unfolding of all stacks, then the second, ...: stacks share their decompositions
            matrices = [unfoldings[0].matrix(self._coupled(stack)) for stack, _, unfoldings in rest]
            thresholds = [threshold for _, threshold, _ in rest]
            taken = shrinkages(matrices, thresholds, self._norms([stack for stack, _, _ in rest]))
            for (stack, _, unfoldings), matrix in zip(rest, taken, strict=True):
                stack.sub_(unfoldings[0].folded(matrix, stack.shape))
            rest = [(stack, threshold, later) for stack, threshold, (_, *later) in rest if later]

    def _coupled(self, stack: Tensor) -> Tensor:
        return stack - stack.mean(dim=0, keepdim=True) if self.of == "deviations" else stack

    def _norms(self, stacks: Sequence[Tensor]) -> list[Tensor] | None:
        if self.of == "weights":
            return None
        return [torch.linalg.vector_norm(stack.detach()) for stack in stacks]


@dataclass(frozen=True)
class _Unfolding:
    """Moves an axis to the front, and makes the first ``num_rows`` axes the rows of a matrix, the rest its columns."""

    axis: int
    num_rows: int

    def matrix(self, stack: Tensor) -> Tensor:
        moved = stack.movedim(self.axis, 0) if self.axis else stack  # a step less for autograd
        return moved.reshape(moved.shape[: self.num_rows].numel(), -1)

    def folded(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        moved = (shape[self.axis], *shape[: self.axis], *shape[self.axis + 1 :])
        return matrix.reshape(moved).movedim(0, self.axis)


def _unfoldings(num_axes: int, unfold: Unfold) -> list[_Unfolding]:
    if unfold == "last":
        return [_Unfolding(0, 1)]
    if unfold == "tucker":
        return [_Unfolding(axis, 1) for axis in range(num_axes)]
    return [_Unfolding(0, num_rows) for num_rows in range(1, max(num_axes, 2))]
