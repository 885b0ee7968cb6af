"""Ridge regression of a layer's outputs on its inputs, from sums over rows; what is best is chosen on held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.gram import add_product, with_ones
from compress.recover.targets import Targets

RIDGES = (1e-9, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CAUTIOUS = 1e-2  # the least of them where there are few rows for the number of inputs
FEW = 2  # rows an input
HELD_OUT = 5  # one row in five
SWEEPS = 5  # of the targets behind a ReLU


@dataclass(frozen=True)
class Rows:
    """Inputs (g, R, D) and targets (g, R, O) of one batch."""

    inputs: Tensor
    targets: Targets

    def part(self, *, held_out: bool) -> "Rows":
        """The last rows, which no solution sees, or the others."""
        number = self.inputs.shape[1]
        cut = number - number // HELD_OUT
        chosen = slice(cut, None) if held_out else slice(cut)
        return Rows(self.inputs[:, chosen], self.targets.rows(chosen))


@dataclass(frozen=True)
class Method:
    """``ridge`` is the level of damping towards the present weights; None refits the constant alone."""

    ridge: float | None = None

    def __str__(self) -> str:
        return "bias" if self.ridge is None else f"least squares, ridge {self.ridge:g}"


class Regression:
    """A layer's matrix (g, O, D), to be improved; with a constant for each output if ``free``."""

    def __init__(self, matrix: Tensor, rows: Sequence[Rows], *, free: bool) -> None:
        self._start = torch.cat([matrix, matrix.new_zeros(*matrix.shape[:2], 1)], dim=2)
        self._free = free
        self._fit = [part for r in rows if (part := r.part(held_out=False)).inputs.shape[1]]
        self._held = [part for r in rows if (part := r.part(held_out=True)).inputs.shape[1]]
        self._check = self._held or self._fit
        self._gram = self._products(self._fit)
        self.num_rows = sum(r.inputs.shape[1] for r in rows)

    @property
    def scarce(self) -> bool:
        """Whether there are too few rows for a solution without much damping."""
        return self.num_rows < FEW * self._start.shape[2]

    def best(self, methods: Sequence[Method]) -> tuple[Tensor, Method | None, float, float]:
        """The matrix (g, O, D + 1), how it was found (None: the present one), and its error before and after.

        Errors are on held-out rows, as a part of the targets' variance. What helps there is done again with all rows.
        """
        before = least = self._error(self._start)
        how, sweeps, best = None, 0, self._start
        residual = self._residual(self._start, self._fit)
        for method in methods:
            found = self._step(residual, method)
            if found is not None and (error := self._error(found)) < least:
                best, how, least = found, method, error
        if how is None:
            return self._start, None, before, before
        if how.ridge is not None and self._fit[0].targets.zero is not None:
            swept = self._sweep(best, self._fit, how)
            if swept is not None and self._error(swept, rectified=True) < self._error(best, rectified=True):
                best, sweeps = swept, SWEEPS
        self._gram += self._products(self._held)
        rows = self._fit + self._held
        final = self._step(self._residual(self._start, rows), how)
        if final is not None and sweeps:
            final = self._sweep(final, rows, how)
        return best if final is None else final, how, before, least

    def _sweep(self, matrix: Tensor, rows: Sequence[Rows], method: Method) -> Tensor | None:
        """Targets behind a ReLU depend on what was found: each step lowers a bound of the error (majorisation)."""
        found: Tensor | None = matrix
        for _ in range(SWEEPS):
            found = found if found is None else self._step(self._residual(found, rows), method)
        return found

    def _products(self, rows: Sequence[Rows]) -> Tensor:
        groups, _, size = self._start.shape
        total = torch.zeros(groups, size, size, dtype=torch.float64)
        for part in rows:
            full = with_ones(part.inputs)
            add_product(total, full, full)
        return total

    def _residual(self, matrix: Tensor, rows: Sequence[Rows]) -> Tensor:
        """What the present weights miss of the targets that ``matrix`` leads to, against each input: (g, D + 1, O)."""
        total = torch.zeros(matrix.shape[0], matrix.shape[2], matrix.shape[1], dtype=torch.float64)
        for part in rows:
            targets = part.targets.wanted(_predict(part.inputs, matrix))
            add_product(total, with_ones(part.inputs), targets - _predict(part.inputs, self._start))
        return total

    def _step(self, residual: Tensor, method: Method) -> Tensor | None:
        """From the present weights to the damped least squares; None if that is singular."""
        made = self._start.clone()
        if method.ridge is None:
            made[:, :, -1] += residual[:, -1] / self._gram[:, -1:, -1]
            return made
        num_inputs = made.shape[2] - 1
        size = num_inputs + 1 if self._free else num_inputs
        gram = self._gram[:, :size, :size].clone()
        index = torch.arange(num_inputs)
        diagonal = gram[:, index, index]
        gram[:, index, index] = diagonal + method.ridge * diagonal.mean(1, keepdim=True)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):
            return None
        made[:, :, :size] += torch.cholesky_solve(residual[:, :size], factor).mT
        return made

    def _error(self, matrix: Tensor, *, rectified: bool = False) -> float:
        error = spread = 0.0
        for part in self._check:
            found = _predict(part.inputs, matrix)
            targets = part.targets.wanted(found) if rectified else part.targets.values
            error += float((targets - found).double().square().sum())
            spread += float(part.targets.values.double().var(1, correction=0).sum()) * part.inputs.shape[1]
        return error / max(spread, 1e-30)


def _predict(inputs: Tensor, matrix: Tensor) -> Tensor:
    weights = matrix.to(inputs)
    return torch.baddbmm(weights[:, :, -1].unsqueeze(1), inputs, weights[:, :, :-1].mT)
