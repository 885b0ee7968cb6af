"""What is known of a layer, and its weights, when some of its inputs and outputs are gone: without a look at data."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.gram import GramSums

RIDGE = 1e-6  # of the mean square of an input


@dataclass(frozen=True)
class Narrow:
    """``sums`` of what stays; the best ``matrix`` (g, O, D + 1) there, the last column a change of constants."""

    sums: GramSums
    matrix: Tensor


def narrow(known: GramSums, weight: Tensor, stays: Tensor) -> Narrow | None:
    """A site with some inputs and outputs less; those inputs that stay stand in for the others by least squares.

    Args:
        known: of the whole site.
        weight: the whole parameter.
        stays: which of its elements stay, shape of the parameter.

    Returns None where groups of a grouped convolution keep different numbers: they are no regression any more.
    """
    matrix, mask = known.site.matrix(weight).double().cpu(), known.site.matrix(stays)
    inputs, outputs = mask.any(1), mask.any(2)
    groups = outputs.any(1)
    inputs, outputs = inputs[groups], outputs[groups]
    if not len(inputs) or len({*inputs.sum(1).tolist()}) > 1 or len({*outputs.sum(1).tolist()}) > 1:
        return None
    columns, rows = (torch.stack([row.nonzero()[:, 0] for row in part]) for part in (inputs, outputs))
    mean, share = known.mean[groups], known.output_share[groups].gather(1, rows)
    matrix = matrix[groups].gather(1, rows[:, :, None].expand(-1, -1, matrix.shape[2]))
    matrix = torch.cat([matrix, matrix.new_zeros(*matrix.shape[:2], 1)], dim=2)
    constant = columns.new_full((len(columns), 1), matrix.shape[2] - 1)
    ends = torch.cat([columns, constant], dim=1)
    gram = known.gram[groups]
    metric = None if known.output_metric is None else _square(known.output_metric[groups], rows)
    sums = replace(known, gram=_square(gram, ends), output_share=share, output_metric=metric)
    free = known.landing.intercept is not None
    kept = ends if free else columns
    if kept.shape[1] == matrix.shape[2] - (0 if free else 1):  # all inputs are there
        return Narrow(sums, matrix)
    found = _stand_in(mean, matrix, kept)
    if not free:
        found = torch.cat([found, found.new_zeros(*found.shape[:2], 1)], dim=2)
    return Narrow(sums, found)


def _stand_in(moment: Tensor, matrix: Tensor, kept: Tensor) -> Tensor:
    """The matrix (g, O, K) on the inputs ``kept`` (g, K)."""
    wanted = (matrix @ moment).gather(2, kept[:, None].expand(-1, matrix.shape[1], -1))
    inner = _square(moment, kept)
    level = RIDGE * inner.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    damped = inner + level[:, None, None] * torch.eye(inner.shape[1], dtype=inner.dtype)
    return torch.linalg.solve(damped, wanted.mT).mT


def _square(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows and columns ``index`` (g, K) of (g, D, D)."""
    rows = matrix.gather(1, index[:, :, None].expand(-1, -1, matrix.shape[2]))
    return rows.gather(2, index[:, None].expand(-1, index.shape[1], -1))
