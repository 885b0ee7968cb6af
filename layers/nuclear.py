"""Nuclear norms of wide matrices from small Gram matrices: value, gradient, proximal map, spectrum.

For M (m x n, m <= n) with M M^T = V diag(s^2) V^T the nuclear norm is the sum of s, its gradient V diag(1/s) V^T M, and
its proximal map M - V diag(min(1, threshold / s)) V^T M (Cai, Candes, Shen 2010, "A Singular Value Thresholding
Algorithm", theorem 2.1). Only the m x m matrix is decomposed, and everything is done in float64: a float32 Gram matrix
loses the singular values below 3e-4 of the largest, which is all that nearly identical models differ in.

Singular values below ``max(1e-6 * largest, eps of the dtype * norm)`` count as zero, where the norm is that of the
stored weights: what is below comes from rounding. There the gradient is zero, a subgradient; autograd through
``torch.linalg.svd`` has a gradient of norm sqrt(m) even at M = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RELATIVE_CUTOFF = 1e-6
_EVEN = 100
_ELEMENTS_PER_CHUNK = 2**17  # 1 MiB in float64 stay in a core's cache; no second copy of a large layer is made


def nuclear_norms(matrices: Sequence[Tensor], norms: Sequence[Tensor] | None = None) -> Tensor:
    """Nuclear norm of each matrix, differentiable once.

    Args:
        matrices: two axes each, of any shapes, in any floating dtype
        norms: Frobenius norm of the stored weights that each matrix was made of, where that is not the matrix itself:
            differences of rounded numbers are never more precise than the numbers

    Returns:
        (number of matrices,), float64 for float64 matrices, else float32.

    Example:
        >>> nuclear_norms([torch.diag(torch.tensor([3.0, 4.0]))])
        tensor([7.])
    """
    values: Tensor = _NuclearNorms.apply(norms, *map(_wide, matrices))
    return values


def shrinkages(
    matrices: Sequence[Tensor], thresholds: Sequence[Tensor | float], norms: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """What the proximal map of ``threshold * nuclear norm`` takes away from each matrix, of its shape and dtype."""
    with torch.no_grad():
        wide = [_wide(matrix) for matrix in matrices]
        groups = _spectra(wide, norms)
        removers = []
        for group in groups:
            cuts = torch.stack([torch.as_tensor(thresholds[index]).to(group.values) for index in group.indices])
            fractions = (cuts[:, None] * group.inverse()).clamp(max=1)
            removers.append(group.combined(torch.where(group.kept, fractions, 1.0)))
        taken = _products(groups, removers, wide)
    return [cut if cut.shape == matrix.shape else cut.T for cut, matrix in zip(taken, matrices, strict=True)]


def singular_values(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Singular values of each matrix, falling, in float64; right to 1e-8 of the largest."""
    with torch.no_grad():
        groups = _spectra([_wide(matrix) for matrix in matrices], None)
        return _in_order(groups, [group.values.flip(1) for group in groups])


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007), 0 for a matrix of zeros.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 0.0]))
        2.0
    """
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return round(float(torch.special.entr(shares).sum().exp()), 6)


class _NuclearNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norms: Sequence[Tensor] | None, *matrices: Tensor) -> Tensor:
        groups = _spectra(matrices, norms)
        ctx.save_for_backward(*matrices)
        ctx.groups, ctx.projectors = groups, [group.combined(group.inverse()) for group in groups]
        dtype = torch.float64 if all(matrix.dtype == torch.float64 for matrix in matrices) else torch.float32
        values = [group.values.where(group.kept, 0).sum(1) for group in groups]
        return torch.stack(_in_order(groups, values)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.double().unbind()
        factors = [torch.stack([rows[index] for index in group.indices])[:, None, None] for group in ctx.groups]
        scaled = [projector * factor for projector, factor in zip(ctx.projectors, factors, strict=True)]
        return None, *_products(ctx.groups, scaled, ctx.saved_tensors, allow_float32=True)


@dataclass(frozen=True)
class _Spectra:
    """Of n matrices of one shape, (m, columns): a network has many small ones, and one call for all is faster.

    Args:
        indices: which matrices
        values: (n, m) singular values, rising
        vectors: (n, m, m) eigenvectors of the Gram matrices
        kept: (n, m) whether a singular value counts as more than zero
    """

    indices: list[int]
    values: Tensor
    vectors: Tensor
    kept: Tensor

    def inverse(self) -> Tensor:
        """(n, m) 1/s, 0 where s counts as zero."""
        return torch.where(self.kept, 1 / self.values.where(self.kept, 1), 0)

    def is_even(self) -> bool:
        """Whether all singular values lie within a factor of 100. Only on a CPU, where asking costs no waiting."""
        if self.values.device.type != "cpu":
            return False
        return bool((self.values * _EVEN >= self.values[:, -1:]).all())

    def combined(self, factors: Tensor) -> Tensor:
        """(n, m, m) V diag(factors) V^T."""
        return (self.vectors * factors[:, None]) @ self.vectors.mT


def _spectra(matrices: Sequence[Tensor], norms: Sequence[Tensor] | None) -> list[_Spectra]:
    kinds: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        kinds.setdefault((matrix.shape, matrix.dtype), []).append(index)
    groups = []
    for (_, dtype), indices in kinds.items():
        grams: Tensor | int = 0
        for _, chunk in _chunks([matrices[index] for index in indices]):
            grams = grams + chunk @ chunk.mT
        try:
            squares, vectors = torch.linalg.eigh(grams)
        except torch.linalg.LinAlgError:
            raise ValueError("weights are not finite, so they have no singular values: lower lr") from None
        values = squares.clamp(min=0).sqrt()
        stored = values.square().sum(1).sqrt() if norms is None else torch.stack([norms[index] for index in indices])
        cutoff = torch.maximum(RELATIVE_CUTOFF * values[:, -1], torch.finfo(dtype).eps * stored.double())
        groups.append(_Spectra(indices, values, vectors, values > cutoff[:, None]))
    return groups


def _products(
    groups: Sequence[_Spectra], left: Sequence[Tensor], matrices: Sequence[Tensor], *, allow_float32: bool = False
) -> list[Tensor]:
    """left @ matrix, rounded to the dtype of the matrix.

    In float64, since 1/s of a small s meets nearly equal rows; in float32, where that is allowed, only where the ratio
    of singular values bounds the error by 1e-5.
    """
    results = [torch.empty(0)] * len(matrices)
    for group, factors in zip(groups, left, strict=True):
        if allow_float32 and matrices[group.indices[0]].dtype == torch.float32 and group.is_even():
            for index, factor in zip(group.indices, factors.float(), strict=True):
                results[index] = factor @ matrices[index]
            continue
        for index in group.indices:
            results[index] = torch.empty_like(matrices[index])
        for columns, chunk in _chunks([matrices[index] for index in group.indices]):
            for index, product in zip(group.indices, factors @ chunk, strict=True):
                results[index][:, columns] = product
    return results


def _chunks(matrices: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """Some columns at a time, of all matrices of a shape: which, and (n, m, columns) in float64."""
    num_rows, num_columns = matrices[0].shape
    width = max(1, _ELEMENTS_PER_CHUNK // max(1, len(matrices) * num_rows))
    for start in range(0, num_columns, width):
        columns = slice(start, min(start + width, num_columns))
        chunk = matrices[0].new_empty(len(matrices), num_rows, columns.stop - start, dtype=torch.float64)
        for there, matrix in zip(chunk, matrices, strict=True):
            there.copy_(matrix[:, columns])
        yield columns, chunk


def _in_order(groups: Sequence[_Spectra], values: Sequence[Tensor]) -> list[Tensor]:
    """One entry per matrix, of values with one row per matrix of a group."""
    found = {
        i: row for group, rows in zip(groups, values, strict=True) for i, row in zip(group.indices, rows, strict=True)
    }
    return [found[index] for index in range(len(found))]


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
