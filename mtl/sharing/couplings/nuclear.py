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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RELATIVE_CUTOFF = 1e-6
_ELEMENTS_PER_CHUNK = 2**20  # 8 MiB in float64: fits a cache, and no second copy of a large layer is ever made


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
        taken = []
        for matrix, spectrum, threshold in zip(wide, _spectra(wide, norms), thresholds, strict=True):
            fractions = torch.where(spectrum.kept, (threshold * spectrum.inverse()).clamp(max=1), 1.0)
            taken.append(_product(spectrum.projector(fractions), matrix))
        return [cut if cut.shape == matrix.shape else cut.T for cut, matrix in zip(taken, matrices, strict=True)]


def singular_values(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Singular values of each matrix, falling, in float64; right to 1e-8 of the largest."""
    with torch.no_grad():
        return [spectrum.values.flip(0) for spectrum in _spectra([_wide(matrix) for matrix in matrices], None)]


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
        spectra = _spectra(matrices, norms)
        ctx.save_for_backward(*matrices)
        ctx.projectors = [spectrum.projector(spectrum.inverse()) for spectrum in spectra]
        dtype = torch.float64 if all(matrix.dtype == torch.float64 for matrix in matrices) else torch.float32
        return torch.stack([spectrum.values.where(spectrum.kept, 0).sum() for spectrum in spectra]).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        triples = zip(ctx.saved_tensors, ctx.projectors, grad, strict=True)
        return None, *(_product(projector * factor, matrix) for matrix, projector, factor in triples)


class _Spectrum:
    """Eigenvectors (m, m) of a Gram matrix and the singular values (m,) that belong to them, rising."""

    def __init__(self, values: Tensor, vectors: Tensor, floor: Tensor) -> None:
        self.values, self.vectors = values, vectors
        self.kept = values > torch.maximum(RELATIVE_CUTOFF * values[-1], floor)

    def inverse(self) -> Tensor:
        """1/s, 0 where s counts as zero."""
        return torch.where(self.kept, 1 / self.values.where(self.kept, 1), 0)

    def projector(self, factors: Tensor) -> Tensor:
        return (self.vectors * factors) @ self.vectors.T


def _spectra(matrices: Sequence[Tensor], norms: Sequence[Tensor] | None) -> list[_Spectrum]:
    """One decomposition for all matrices of a size: a network has many small Gram matrices."""
    grams = [_gram(matrix) for matrix in matrices]
    by_size: dict[int, list[int]] = {}
    for index, gram in enumerate(grams):
        by_size.setdefault(len(gram), []).append(index)
    spectra: dict[int, _Spectrum] = {}
    for indices in by_size.values():
        try:
            squares, vectors = torch.linalg.eigh(torch.stack([grams[index] for index in indices]))
        except torch.linalg.LinAlgError:
            raise ValueError("weights are not finite, so they have no singular values: lower lr") from None
        for index, values, basis in zip(indices, squares.clamp(min=0).sqrt(), vectors, strict=True):
            norm = grams[index].trace().sqrt() if norms is None else norms[index].double()
            spectra[index] = _Spectrum(values, basis, torch.finfo(matrices[index].dtype).eps * norm)
    return [spectra[index] for index in range(len(matrices))]


def _gram(matrix: Tensor) -> Tensor:
    gram = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    for chunk in _chunks(matrix):
        exact = chunk.double()
        gram.addmm_(exact, exact.T)
    return gram


def _product(left: Tensor, matrix: Tensor) -> Tensor:
    """left @ matrix in float64, rounded to the dtype of the matrix: 1/s of a small s meets nearly equal rows."""
    result = torch.empty_like(matrix)
    for there, chunk in zip(_chunks(result), _chunks(matrix), strict=True):
        there.copy_(left @ chunk.double())
    return result


def _chunks(matrix: Tensor) -> tuple[Tensor, ...]:
    return matrix.split(max(1, _ELEMENTS_PER_CHUNK // max(1, len(matrix))), dim=1)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
