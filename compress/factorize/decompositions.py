"""Two thin layers for one wide one, by what their outputs lose: truncated decompositions under a Gram matrix.

A layer gives W x. Instead of the error of W, that of the outputs on calibration data is made small: tr((W - V) G
(W - V)^T) with the second moment G of the inputs x, each output with its weight (whitening, as in Wang et al. 2025,
"SVD-LLM", section 3). All that is needed of the data is G, and singular ones do no harm: bases are taken from W's own
rows, and nothing is divided by an eigenvalue of G.

Every factorisation here is a :class:`Split`: the kernel's axes are dealt to the two factors, V[o, i, y, x] =
sum_a second[o, a, x] first[a, i, y].

Legend: O outputs, C input channels, J columns of the first factor (C times its kernel's axes), X places of the second
factor's kernel, D = J X. All float64.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from compress.errors import PruneError

JITTER = (1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)  # of the mean diagonal: the least with which Cholesky succeeds
SWEEPS = 3  # of alternating least squares
STEPS = 10  # of conjugate gradients in each of them
REFINED_RANKS = 4  # at which one of these sweeps tells what they gain at others
REFINED_GROUPS = 4  # of a grouped convolution: they tell what sweeps gain in the others
MAX_REFINED = 1200  # inputs: of larger layers sweeps take long, and gain little
LEAST_SIZE = 1e-5  # of the largest: smaller rows are not scaled up to 1, which would make noise of rounding
RIDGE = 0.1  # of the mean diagonal of a metric: errors that cost nothing are not small any more, and then they do
LEAST_IMPORTANCE = 1e-6  # of the mean: an output that hardly counts still has to come out finite


@dataclass(frozen=True)
class Problem:
    """A weight (O, C, *K), the mean of x x^T over rows x (D, D) in its order, and what each output counts (O,).

    Of a grouped convolution C is that of a group, and there is a Gram matrix for each: (g, D, D). Where errors of
    different outputs have to do with each other, ``weight`` is ``root`` (g, O / g, O / g) times the layer's.
    """

    weight: Tensor
    gram: Tensor
    importance: Tensor
    root: Tensor | None = None

    @staticmethod
    def of(
        weight: Tensor, gram: Tensor | None = None, importance: Tensor | None = None, *, groups: int = 1
    ) -> "Problem":
        """In double precision; white inputs, and outputs that count alike, where nothing is known of them.

        Raises:
            PruneError: sizes do not fit, or numbers are not finite.
        """
        weight = weight.detach().double().cpu()
        num_outputs, size = weight.shape[0], math.prod(weight.shape[1:])
        expected = (size, size) if groups == 1 else (groups, size, size)
        gram = torch.eye(size, dtype=torch.float64).expand(expected) if gram is None else gram.double().cpu()
        importance = weight.new_ones(num_outputs) if importance is None else importance.double().cpu()
        if gram.shape != expected or importance.shape != (num_outputs,):
            raise PruneError(
                f"a weight of shape {tuple(weight.shape)} needs a Gram matrix {expected} and {num_outputs} "
                f"importances, given are {tuple(gram.shape)} and {tuple(importance.shape)}"
            )
        if not all(bool(tensor.isfinite().all()) for tensor in (weight, gram, importance)):
            raise PruneError("weight, Gram matrix and importances must be finite")
        mean = float(importance.mean())
        floor = LEAST_IMPORTANCE * mean if mean > 0 else 1.0
        # sums in single precision may have lost what makes it positive
        whole = torch.stack([factor @ factor.T for factor in map(_cholesky, gram.reshape(-1, size, size))])
        return Problem(weight, whole.reshape(expected), importance.clamp(min=floor))

    @staticmethod
    def under(weight: Tensor, gram: Tensor, metric: Tensor) -> "Problem":
        """The same for errors e of outputs that cost e^T Q e, with a ``metric`` Q (g, O / g, O / g).

        A part of each error counts whatever its direction.

        Raises:
            PruneError: numbers are not finite.
        """
        if not bool(metric.isfinite().all()):
            raise PruneError("what errors of the outputs cost must be finite")
        level = metric.diagonal(dim1=1, dim2=2).mean(1)
        level = RIDGE * torch.where(level > 0, level, 1 / RIDGE)[:, None, None]
        identity = torch.eye(metric.shape[1], dtype=metric.dtype)
        root = torch.stack([_cholesky(part).T for part in (metric + level * identity) / (1 + RIDGE)])
        matrix = weight.detach().double().cpu().reshape(len(root), metric.shape[1], -1)
        return replace(Problem.of((root @ matrix).reshape(weight.shape), gram, groups=len(root)), root=root)

    def outer(self, values: Tensor) -> Tensor:
        """What gives the layer's outputs, of something (O, ...) that gives those of ``weight``."""
        if self.root is None:
            return values
        matrix = values.reshape(len(self.root), self.root.shape[1], -1)
        return torch.linalg.solve_triangular(self.root, matrix, upper=True).reshape(values.shape)

    @property
    def groups(self) -> int:
        """g."""
        return len(self.gram) if self.gram.dim() == 3 else 1

    @property
    def parts(self) -> "tuple[Problem, ...]":
        """The problems of the groups."""
        if self.groups == 1:
            return (self,)
        chunks = self.weight.chunk(self.groups), self.gram, self.importance.chunk(self.groups)
        return tuple(Problem(*part) for part in zip(*chunks, strict=True))

    def error(self, weight: Tensor) -> float:
        """What the outputs lose with another weight: tr(Q (W - V) G (W - V)^T) with importances Q."""
        difference = (self.weight - weight.to(self.weight)).flatten(1).reshape(self.groups, -1, self.gram.shape[-1])
        lost = ((difference @ self.gram) * difference).sum(-1).flatten()
        return max(float(lost @ self.importance), 0.0)

    @cached_property
    def total(self) -> float:
        """The error of giving nothing at all."""
        return self.error(torch.zeros_like(self.weight))


@dataclass(frozen=True)
class Split:
    """Which axes of the kernel the first factor has; the second has the others.

    All of them: the second is 1 x 1 (Tucker-2 of the outputs; for a matrix, its SVD). None: the first is (Tucker-2 of
    the inputs). One of two: vertical and horizontal kernels.
    """

    inner: tuple[int, ...] = ()

    def order(self, kernel: tuple[int, ...]) -> tuple[int, ...]:
        """The kernel's axes, those of the first factor in front."""
        return (*self.inner, *(axis for axis in range(len(kernel)) if axis not in self.inner))

    def sizes(self, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Kernel sizes of both factors along all axes, 1 along those of the other."""
        first = tuple(k if axis in self.inner else 1 for axis, k in enumerate(kernel))
        return first, tuple(k // f for k, f in zip(kernel, first, strict=True))

    def full_rank(self, shape: tuple[int, ...]) -> int:
        """From this rank on nothing is lost, for a weight (O, C, *K)."""
        first, second = self.sizes(shape[2:])
        return min(shape[1] * math.prod(first), shape[0] * math.prod(second))


class Factorisation:
    """All truncations of one problem by one split: the first r rows of ``first`` for each rank r.

    ``errors`` (R + 1,) are exact for these, with the second factor by least squares; :meth:`factors` lowers them.
    """

    def __init__(self, problem: Problem, split: Split) -> None:
        self.problem, self.split = problem, split
        weight = problem.weight
        self._kernel = tuple(weight.shape[2:])
        first, second = split.sizes(self._kernel)
        self._columns, self._places = weight.shape[1] * math.prod(first), math.prod(second)
        axes = (0, *(1 + axis for axis in split.order(self._kernel)))
        index = torch.arange(len(problem.gram)).reshape(weight.shape[1:]).permute(axes).reshape(-1)
        self._weight = weight.flatten(1)[:, index].reshape(-1, self._columns, self._places)  # (O, J, X)
        self._gram = problem.gram[index][:, index]
        self._root = problem.importance.sqrt()
        self.first = self._basis()
        self._moment, self._cross = self._normal_equations(self.first)
        self.errors = self._errors()

    def full_rank(self) -> int:
        """R."""
        return len(self.first)

    @property
    def num_inputs(self) -> int:
        """D."""
        return len(self._gram)

    def following(self, first: Tensor) -> Problem:
        """What the second factor has to do with outputs of this first one (r, C, *K1): errors of the two add up."""
        first = first.flatten(1)
        moment, cross = self._normal_equations(first)
        kernel = self.split.sizes(self._kernel)[1]
        weight = self._solved(moment, cross).reshape(-1, len(first), *kernel)
        return Problem(weight, moment, self.problem.importance)

    def factors(self, rank: int, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, float]:
        """first (r, C, *K1), second (O, r, *K2), and the error that is left.

        Where both have kernels, refined by alternating least squares; a sweep that does not help is undone.

        Raises:
            PruneError: the rank is below 1 or above the matrix's.
        """
        if not 1 <= rank <= self.full_rank():
            raise PruneError(f"rank {rank} is not between 1 and {self.full_rank()}, the rank of the whole matrix")
        first = self.first[:rank]
        second, error = self._second(first)
        for _ in range(sweeps if self._places > 1 and rank < self.full_rank() else 0):
            refined = self._refined(first, second)
            answer, found = self._second(refined)
            if not found < error:
                break
            first, second, error = refined, answer, found
        scale = _balance(first, second)
        kernel_first, kernel_second = self.split.sizes(self._kernel)
        first, second = first * scale[:, None], second / scale[:, None]
        shaped = first.reshape(rank, -1, *kernel_first), second.reshape(-1, rank, *kernel_second)
        return *shaped, error

    def _basis(self) -> Tensor:
        """Rows (R, J) that span what matters of the weight, seen as one matrix (O X, J): as U^T W, for the left
        singular vectors U of the whitened W."""
        rows = (self._weight * self._root[:, None, None]).movedim(2, 1).reshape(-1, self._columns)
        gram = self._gram.reshape(self._columns, self._places, self._columns, self._places)
        white = gram.diagonal(dim1=1, dim2=3).mean(-1)
        if len(rows) <= self._columns:
            values, vectors = torch.linalg.eigh(rows @ white @ rows.T)
            left, size = vectors.flip(1), values.flip(0).clamp(min=0).sqrt()
        else:
            values, vectors = torch.linalg.eigh(white)
            half = vectors * values.clamp(min=0).sqrt()
            left, size, _ = torch.linalg.svd(rows @ half, full_matrices=False)
        if self._places == 1:
            self._left = left / self._root[:, None]
            return left.T @ rows
        return (left.T @ rows) / size.clamp(min=LEAST_SIZE * float(size[0]) + 1e-300)[:, None]

    def _normal_equations(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """For the second factor: (r X, r X), and (r X, O)."""
        rank, places = len(first), self._places
        half = (first @ self._gram.reshape(self._columns, -1)).reshape(rank, places, self._columns, places)
        moment = torch.einsum("axjy,bj->axby", half, first).reshape(rank * places, -1)
        cross = half.reshape(rank * places, -1) @ self._weight.flatten(1).T
        return (moment + moment.T) / 2, cross

    def _errors(self) -> Tensor:
        """Of a Cholesky factor, the leading part belongs to the leading equations: one gives all ranks."""
        factor = _cholesky(self._moment)
        explained = torch.linalg.solve_triangular(factor, self._cross * self._root, upper=False).square()
        explained = explained.sum(1).reshape(self.full_rank(), -1).sum(1)
        return torch.cat([explained.new_zeros(1), explained.cumsum(0)]).neg().add(self.problem.total).clamp(min=0)

    def _second(self, first: Tensor) -> tuple[Tensor, float]:
        """The best second factor (O, r, X), and the error with it."""
        rank = len(first)
        if self._places == 1:  # without solving: the basis is orthogonal
            second = self._left[:, :rank, None]
        else:
            moment, cross = self._normal_equations(first)
            second = self._solved(moment, cross).reshape(-1, rank, self._places)
        return second, self._error(first, second)

    def _solved(self, moment: Tensor, cross: Tensor) -> Tensor:
        return torch.cholesky_solve(cross, _cholesky(moment)).T

    def _error(self, first: Tensor, second: Tensor) -> float:
        difference = (self._weight - torch.einsum("oax,aj->ojx", second, first)).flatten(1)
        return max(float(((difference @ self._gram) * difference).sum(1) @ self.problem.importance), 0.0)

    def _refined(self, first: Tensor, second: Tensor) -> Tensor:
        """A better first factor (r, J): conjugate gradients, preconditioned by a Kronecker product."""
        weighted = second * self.problem.importance[:, None, None]
        shape = self._weight.shape

        def normal(weight: Tensor) -> Tensor:
            passed = (weight.flatten(1) @ self._gram).reshape(shape)
            return torch.einsum("oax,ojx->aj", weighted, passed)

        outer = _cholesky(torch.einsum("oax,obx->ab", weighted, second))
        gram = self._gram.reshape(self._columns, self._places, self._columns, self._places)
        inner = _cholesky(gram.diagonal(dim1=1, dim2=3).mean(-1))

        def preconditioned(value: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(value, outer).T, inner).T

        residual = normal(self._weight - torch.einsum("oax,aj->ojx", second, first))
        direction = solved = preconditioned(residual)
        size = (residual * solved).sum()
        for _ in range(STEPS):
            passed = normal(torch.einsum("oax,aj->ojx", second, direction))
            curvature = (direction * passed).sum()
            if not (size > 0 and curvature > 0):
                break
            step = size / curvature
            first, residual = first + step * direction, residual - step * passed
            solved = preconditioned(residual)
            size, before = (residual * solved).sum(), size
            direction = solved + size / before * direction
        return first


class Grouped:
    """As :class:`Factorisation`, of all groups of a convolution alike: ranks are those of one group, errors the sum.

    Factors of the groups follow each other on the first axis, as in the weight of a grouped convolution.
    """

    def __init__(self, problem: Problem, split: Split) -> None:
        self._each = [Factorisation(part, split) for part in problem.parts]
        self.errors = torch.stack([each.errors for each in self._each]).sum(0)

    def full_rank(self) -> int:
        """R of a group."""
        return self._each[0].full_rank()

    def refined_errors(self) -> Tensor:
        """``errors`` as :meth:`factors` leaves them, about: known at some ranks, and in proportion in between."""
        full = self.full_rank()
        if self._each[0].num_inputs > MAX_REFINED:
            return self.errors
        ranks = sorted({max(int(rank), 1) for rank in np.linspace(0, full, REFINED_RANKS + 2)[1:-1]})
        some = self._each[:: math.ceil(len(self._each) / REFINED_GROUPS)]
        lost = [(sum(e.factors(r, sweeps=1)[2] for e in some), sum(float(e.errors[r]) for e in some)) for r in ranks]
        parts = [after / max(before, 1e-300) for after, before in lost]
        part = np.interp(np.arange(full + 1), ranks, np.minimum(parts, 1.0))
        return self.errors * torch.from_numpy(part)

    def basis(self, rank: int) -> Tensor:
        """The first factors (g r, J) before any refinement."""
        return torch.cat([each.first[:rank] for each in self._each])

    def following(self, first: Tensor) -> Problem:
        """See :meth:`Factorisation.following`."""
        found = [each.following(part) for each, part in zip(self._each, first.chunk(len(self._each)), strict=True)]
        if len(found) == 1:
            return found[0]
        weights, importances = ([getattr(problem, name) for problem in found] for name in ("weight", "importance"))
        return Problem(torch.cat(weights), torch.stack([problem.gram for problem in found]), torch.cat(importances))

    def factors(self, rank: int, sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, float]:
        """See :meth:`Factorisation.factors`."""
        found = [each.factors(rank, sweeps) for each in self._each]
        return torch.cat([f for f, _, _ in found]), torch.cat([s for _, s, _ in found]), sum(e for _, _, e in found)


def _balance(first: Tensor, second: Tensor) -> Tensor:
    """What the first factor's rows are to be multiplied by, so that both weigh alike: training likes that."""
    norms = second.square().sum((0, 2)).sqrt(), first.square().sum(1).sqrt()
    usable = (norms[0] > 0) & (norms[1] > 0)
    return torch.where(usable, (norms[0] / norms[1].clamp(min=1e-300)).sqrt(), 1.0)


def _cholesky(matrix: Tensor) -> Tensor:
    """Of a positive semi-definite matrix, with as little on the diagonal as it takes."""
    mean = float(matrix.diagonal().mean())
    level = mean if mean > 1e-200 else 1.0
    identity = torch.eye(len(matrix), dtype=matrix.dtype)
    for jitter in JITTER:
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter * level * identity)
        if not bool(failed):
            return factor
    # inputs that hardly vary: rounding is larger than the mean of the diagonal tells
    values, vectors = torch.linalg.eigh(matrix)
    if values[0] < -JITTER[-1] * values[-1]:
        raise PruneError("a Gram matrix has large negative eigenvalues: it is no sum of squares")
    root = vectors * values.clamp(min=JITTER[0] * float(values[-1])).sqrt()
    upper = torch.linalg.qr(root.T).R
    return upper.T * torch.where(upper.diagonal() < 0, -1.0, 1.0)
