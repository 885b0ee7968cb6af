"""Ridge regression of a layer's outputs on its inputs, from sums over rows; what is best is chosen on held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from compress.gram import add_product, with_ones
from compress.recover.targets import Targets

RIDGES = (1e-9, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CAUTIOUS = 1e-2  # the least of them where there are few rows for the number of inputs
FEW = 2  # rows an input
HELD_OUT = 5  # one row in five
SWEEPS = 3  # of the targets behind a ReLU


@dataclass(frozen=True)
class Rows:
    """Inputs and a one (g, R, D + 1), and targets (g, R, O), of one batch."""

    inputs: Tensor
    targets: Targets

    @staticmethod
    def of(inputs: Tensor, targets: Targets) -> "Rows":
        """From inputs (g, R, D)."""
        return Rows(with_ones(inputs), targets)

    def counting(self, weight: float) -> "Rows":
        """Rows whose squared errors count ``weight`` times."""
        if weight == 1:
            return self
        factor = weight**0.5
        targets, zero = self.targets, self.targets.zero
        scaled = replace(targets, values=targets.values * factor, zero=None if zero is None else zero * factor)
        return Rows(self.inputs * factor, scaled)

    def part(self, *, held_out: bool) -> "Rows":
        """The last rows, which no solution sees, or the others."""
        number = self.inputs.shape[1]
        cut = number - number // HELD_OUT
        chosen = slice(cut, None) if held_out else slice(cut)
        return Rows(self.inputs[:, chosen], self.targets.rows(chosen))

    def found(self, matrix: Tensor) -> Tensor:
        """What a matrix (g, O, D + 1) gives: (g, R, O)."""
        return self.inputs @ matrix.to(self.inputs).mT


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
        self.num_rows = sum(r.inputs.shape[1] for r in rows)

    @property
    def scarce(self) -> bool:
        """Whether there are too few rows for a solution without much damping."""
        return self.num_rows < FEW * self._start.shape[2]

    def best(self, methods: Sequence[Method]) -> tuple[Tensor, Method | None, float, float]:
        """The matrix (g, O, D + 1), how it was found (None: the present one), and its error before and after.

        Errors are on held-out rows, as a part of the targets' variance. What helps there is done again with all rows.
        """
        fit, check = _Sums.of(self._fit, self._start), _Sums.of(self._held or self._fit, self._start)
        before = least = check.error(torch.zeros_like(self._start))
        how, best = None, self._start
        for method in methods:
            found = self._step(fit.gram, fit.cross, method)
            if found is not None and (error := check.error(found - self._start)) < least:
                best, how, least = found, method, error
        if how is None:
            return self._start, None, before, before
        whole = fit.plus(check) if self._held else fit
        cross = whole.cross
        if how.ridge is not None and self._fit[0].targets.zero is not None:
            swept = best  # targets behind a ReLU depend on what was found: each step lowers a bound of the error
            for _ in range(SWEEPS):
                swept = _or(self._step(fit.gram, self._missed(swept, self._fit), how), swept)
            if self._rectified(swept) < self._rectified(best):
                best, cross = swept, self._missed(swept, self._fit + self._held)
        return _or(self._step(whole.gram, cross, how), best), how, before, least

    def _missed(self, matrix: Tensor, rows: Sequence[Rows]) -> Tensor:
        """What the present weights miss of the targets that ``matrix`` leads to, against each input: (g, D + 1, O)."""
        total = torch.zeros(matrix.shape[0], matrix.shape[2], matrix.shape[1], dtype=torch.float64)
        for part in rows:
            add_product(total, part.inputs, part.targets.wanted(part.found(matrix)) - part.found(self._start))
        return total

    def _step(self, gram: Tensor, cross: Tensor, method: Method) -> Tensor | None:
        """From the present weights to the damped least squares; None if that is singular."""
        made = self._start.clone()
        if method.ridge is None:
            made[:, :, -1] += cross[:, -1] / gram[:, -1:, -1]
            return made
        num_inputs = made.shape[2] - 1
        size = num_inputs + 1 if self._free else num_inputs
        gram = gram[:, :size, :size].clone()
        index = torch.arange(num_inputs)
        diagonal = gram[:, index, index]
        gram[:, index, index] = diagonal + method.ridge * diagonal.mean(1, keepdim=True)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed.any()):
            return None
        made[:, :, :size] += torch.cholesky_solve(cross[:, :size], factor).mT
        return made

    def _rectified(self, matrix: Tensor) -> float:
        """The squared error behind the ReLU."""
        error = 0.0
        for part in self._held or self._fit:
            found = part.found(matrix)
            error += float((part.targets.wanted(found) - found).double().square().sum())
        return error


@dataclass(frozen=True)
class _Sums:
    """Over rows x: ``gram`` of x x^T, ``cross`` of x times what the start misses, ``square`` of the latter.

    ``spread`` is the sum of the targets' variance.
    """

    gram: Tensor
    cross: Tensor
    square: float
    spread: float

    @staticmethod
    def of(rows: Sequence[Rows], start: Tensor) -> "_Sums":
        groups, num_outputs, size = start.shape
        gram = torch.zeros(groups, size, size, dtype=torch.float64)
        cross = torch.zeros(groups, size, num_outputs, dtype=torch.float64)
        square = spread = 0.0
        for part in rows:
            missed = part.targets.values - part.found(start)
            add_product(gram, part.inputs, part.inputs)
            add_product(cross, part.inputs, missed)
            square += float(missed.double().square().sum())
            spread += float(part.targets.values.double().var(1, correction=0).sum()) * part.inputs.shape[1]
        return _Sums(gram, cross, square, spread)

    def plus(self, other: "_Sums") -> "_Sums":
        """Over the rows of both."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return _Sums(*(a + b for a, b in pairs))

    def error(self, change: Tensor) -> float:
        """The squared error of the start with a change (g, O, D + 1), as a part of the targets' variance."""
        less = 2 * (change * self.cross.mT).sum() - (change @ self.gram * change).sum()
        return max(self.square - float(less), 0.0) / max(self.spread, 1e-30)


def _or(found: Tensor | None, other: Tensor) -> Tensor:
    return other if found is None else found
