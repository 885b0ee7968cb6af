"""The rank that a noisy matrix has, by variational Bayes: an oracle without a budget to compare ranks with.

Empirical variational Bayesian matrix factorisation has a global analytic solution: singular values above a threshold
stay, and the noise variance that sets the threshold is the minimum of a function of one variable. Source: Nakajima,
Sugiyama, Babacan, Tomioka 2013, "Global analytic solution of fully-observed variational Bayesian matrix factorization",
theorems 2 and 3 (threshold) and section 3.3 (noise variance); used for ranks of convolutions by Kim et al. 2016,
"Compression of deep convolutional neural networks", section 3.2.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from compress.errors import PruneError
from compress.factorize.decompositions import Problem
from compress.factorize.heads import Heads
from compress.factorize.options import Layer
from compress.factorize.selection import Choice
from compress.factorize.tables import Table

GRID = 200  # noise variances among which the best is looked for: the function has local minima
ROUNDING = 8  # times the precision of the numbers: what is smaller, by the largest singular value, is no signal

Array = NDArray[np.float64]


def vbmf_rank(matrix: Tensor) -> int:
    """The number of singular values of ``matrix`` (L, M) that are more than white noise of unknown variance.

    0 for noise alone; the rank itself for a matrix without noise.

    Raises:
        PruneError: it has not two axes, or is not finite.

    >>> generator = torch.Generator().manual_seed(0)
    >>> factors = (torch.randn(60, 5, generator=generator), torch.randn(5, 80, generator=generator))
    >>> vbmf_rank(factors[0] @ factors[1] + 0.3 * torch.randn(60, 80, generator=generator))
    5
    """
    if matrix.dim() != 2 or not bool(matrix.isfinite().all()):
        raise PruneError(f"a rank is that of a finite matrix; given is a tensor of shape {tuple(matrix.shape)}")
    small, large = sorted(matrix.shape)
    values: Array = torch.linalg.svdvals(matrix.detach().double().cpu()).numpy()
    if small == 0 or values[0] == 0:
        return 0
    precision = torch.finfo(matrix.dtype).eps
    squares = np.maximum(values, ROUNDING * precision * values[0]) ** 2
    ratio = small / large
    threshold = _threshold(ratio)
    variance = _noise_variance(squares, large, ratio, threshold)
    return int((squares > large * variance * threshold).sum())


def vbmf_inner_rank(problem: Problem) -> int:
    """That of the inputs' side of Tucker-2, of all groups together; 1 for noise alone."""
    parts = [part.weight.transpose(0, 1).flatten(1) for part in problem.parts]
    return len(parts) * max(1, *map(vbmf_rank, parts))


def by_vbmf(layers: Sequence[Layer]) -> Choice:
    """Each layer by itself: the cheapest of its kinds of factorisation at the ranks of its weight's unfoldings."""
    chosen = {}
    for layer in layers:
        if isinstance(layer.problem, Heads):
            continue  # no unfolding of one weight
        known: dict[tuple[str, str], tuple[int | None, ...]] = {}
        for kind, first in {(option.kind, option.first) for option in layer.options}:
            known[kind, first] = _ranks(layer.problem, kind, first)
        good = [option for option in layer.options if option.ranks == known[option.kind, option.first]]
        if good:
            chosen[layer.name] = min(good, key=lambda option: (option.macs, option.params))
    return chosen


def _ranks(problem: Problem | Table, kind: str, first: str) -> tuple[int | None, ...]:
    """As in a plan."""
    if isinstance(problem, Table):
        return (max(1, vbmf_rank(problem.weight)),)
    weights = [part.weight for part in problem.parts]
    if kind == "spatial":
        axes = (0, 3, 1, 2) if first == "vertical" else (0, 2, 1, 3)
        unfolded = [weight.permute(axes).flatten(2).flatten(0, 1) for weight in weights]
        return (len(weights) * max(1, *map(vbmf_rank, unfolded)),)
    outer = len(weights) * max(1, *(vbmf_rank(weight.flatten(1)) for weight in weights))
    if kind == "linear":
        return (outer,)
    if math.prod(problem.weight.shape[2:]) == 1:
        return None, outer
    inner = vbmf_inner_rank(problem)
    num_outputs, num_inputs = len(problem.weight), len(weights) * problem.weight.shape[1]
    return None if inner == num_inputs else inner, None if outer == num_outputs else outer


def _threshold(ratio: float) -> float:
    """What a squared singular value must exceed, in units of M times the noise variance."""

    def balance(tau: float) -> float:
        return _phi(tau) + _phi(tau / ratio)

    tau = brentq(balance, 1e-6 * ratio, 10.0)
    return float((1 + tau) * (1 + ratio / tau))


def _phi(z: float) -> float:
    return math.log1p(z) / z - 0.5


def _noise_variance(squares: Array, large: int, ratio: float, threshold: float) -> float:
    """The global minimum of the free energy over the interval that must contain it."""
    small = len(squares)
    most = min(math.ceil(small / (1 + ratio)) - 1, small - 1)  # so many components can be found at all
    upper = squares.sum() / (small * large)
    lower = max(squares[most] / (large * threshold), squares[most:].mean() / large)
    if not lower < upper:
        return float(lower)

    def energy(log_variance: float) -> float:
        return _free_energy(squares / (large * math.exp(log_variance)), ratio, threshold)

    grid = np.linspace(math.log(lower), math.log(upper), GRID)
    best = int(np.argmin([energy(point) for point in grid]))
    around = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    found = minimize_scalar(energy, bounds=around, method="bounded", options={"xatol": 1e-10})
    return math.exp(found.x if found.fun <= energy(grid[best]) else grid[best])


def _free_energy(x: Array, ratio: float, threshold: float) -> float:
    """Without constants; ``x`` are squared singular values in units of M times the noise variance."""
    kept = x[x > threshold]
    shifted = kept - (1 + ratio)
    tau = (shifted + np.sqrt(np.maximum(shifted**2 - 4 * ratio, 0))) / 2
    found = np.log1p(tau) + ratio * np.log1p(tau / ratio) - tau
    return float((x - np.log(x)).sum() + found.sum())
