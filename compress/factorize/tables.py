"""Embeddings as a thin table and a dense layer: what is lost counts as often as the tokens occur.

Row v of a table T (V, D) is an output by itself, so the squared error on calibration data is the sum over tokens of
their frequency times the error of their row: the truncated SVD of T with rows scaled by the root of the frequencies is
the best (Chen et al. 2018, "GroupReduce", equation 3, with one group).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compress.curvature import diagonal
from compress.errors import PruneError
from compress.recorder import Op

UNSEEN = 0.5  # occurrences that every token has more than were seen (Krichevsky & Trofimov 1981): none may be lost


@dataclass(frozen=True)
class Table:
    """A table (V, D), how often each token occurs (V,), of all tokens, and what an error of an output counts."""

    weight: Tensor
    frequency: Tensor
    importance: float

    @staticmethod
    def of(weight: Tensor, counts: Tensor | None = None, curvature: Tensor | None = None) -> "Table":
        """In double precision; tokens are alike where none were counted.

        Args:
            curvature: what errors cost the model's outputs (1, D, D), see :mod:`compress.curvature`; of this the mean
                over all directions is used. Else errors are parts of the variance of the table's own outputs.

        Raises:
            PruneError: numbers are not finite.
        """
        weight = weight.detach().double().cpu()
        if not bool(weight.isfinite().all()):
            raise PruneError("the table must be finite")
        counts = weight.new_zeros(len(weight)) if counts is None else counts.double().cpu()
        frequency = (counts + UNSEEN) / (counts + UNSEEN).sum()
        variance = float(frequency @ (weight - frequency @ weight).square().sum(1))
        if curvature is not None:
            return Table(weight, frequency, float(diagonal(curvature).mean()))
        return Table(weight, frequency, 1 / variance if variance > 0 else 1.0)

    def full_rank(self) -> int:
        """From this rank on nothing is lost."""
        return min(self.weight.shape)

    @property
    def total(self) -> float:
        """The error of giving nothing at all."""
        return float(self.errors[0])

    @cached_property
    def errors(self) -> Tensor:
        """(R + 1,) for each rank."""
        tails = self._spectrum[0].flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])[: self.full_rank() + 1] * self.importance

    def factors(self, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
        """The thin table (V, r) and the weight (D, r) of the layer behind it, and the error that is left.

        Raises:
            PruneError: the rank is below 1 or above the table's.
        """
        if not 1 <= rank <= self.full_rank():
            raise PruneError(f"rank {rank} is not between 1 and {self.full_rank()}, the rank of the whole table")
        basis = self._spectrum[1][:, :rank]
        return (self.weight @ basis, basis), float(self.errors[rank])

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Squared singular values, falling, and right singular vectors (D, R) of the weighted table."""
        _, values, right = torch.linalg.svd(self.weight * self.frequency.sqrt()[:, None], full_matrices=False)
        return values.square(), right.T


def price(op: Op, rank: int | None = None) -> tuple[int, int]:
    """MACs and weights of a table, or of a thin one and the layer behind it."""
    tokens, (rows, columns) = math.prod(op.outputs[0].shape[:-1]), op.arguments["weight"].shape
    return (0, rows * columns) if rank is None else (tokens * rank * columns, rank * (rows + columns))
