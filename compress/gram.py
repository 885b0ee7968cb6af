"""Gram matrices of what enters each site, gathered in one pass over the calibration data.

A site (see :mod:`compress.sites`) is a linear regression of its outputs on rows of inputs ``x``. All that least squares
needs to know about those rows is the sum of ``(x, 1).T @ (x, 1)``: how well other channels can stand in for one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress import activations
from compress.calibration import Calibration, num_batches_of
from compress.channels import ChannelGraph
from compress.landing import Landing, find_landings
from compress.recorder import Trace
from compress.rules.registry import base_name
from compress.sites import Key, Site, find_sites
from compress.trace import ExampleInputs
from compress.watch import Look, Looks, gather, traced

__all__ = [
    "MAX_INPUTS",
    "GramSums",
    "Grams",
    "add_product",
    "check_finite",
    "collect_grams",
    "removable_sites",
    "traced",
    "with_ones",
]

BLOCK = 1024  # rows that are multiplied in the data's own precision; the blocks' products are summed in float64
ROWS = 4096  # as many of a convolution are laid out at a time
PANEL, PANELS = 96, 8  # width of a panel of columns, at least, and the most of them (see `_Products`)
MIN_ROWS = 4  # for every input: a regression on fewer rows fits noise
FEW = 2  # rows for every input: with fewer a regression needs much damping
DAMPING = 1e-2  # of the mean square of an input, where there are few rows
# Of sums of squares in single precision: what rounding does to one row of the matrix, which may make it negative, and
# how little about a mean is nothing else.
ROUNDING, FLAT = 1e-6, 1e-5
MAX_INPUTS = 8192  # a site with more (half a gigabyte a matrix) is left out
MOVES = {"permute", "transpose", "t"}
SHARE = 2**18  # elements of an output that tell its variance


@dataclass
class GramSums:
    """What is known of one site; all float64.

    ``gram`` is the sum of ``(x, 1).T @ (x, 1)`` over ``num_rows`` rows x, shape (g, D + 1, D + 1). ``output_share``
    (g, O) is what a squared error of one of each output counts: its part in the total variance of what the site writes
    to, the residual stream where there is one, else its own outputs; or, where ``output_metric`` (g, O, O) is known,
    the diagonal of that: see :mod:`compress.curvature`.
    """

    site: Site
    landing: Landing
    gram: Tensor
    output_share: Tensor
    num_rows: int = 0
    num_batches: int = 0
    output_metric: Tensor | None = None

    @property
    def scarce(self) -> bool:
        """Whether there are too few rows for a solution without much damping."""
        return self.num_rows < FEW * self.gram.shape[1]

    @property
    def mean(self) -> Tensor:
        """The mean over rows instead of the sum; where there are few rows, with more on the diagonal."""
        mean = self.gram / max(self.num_rows, 1)
        if self.scarce:
            diagonal = mean.diagonal(dim1=1, dim2=2)[:, :-1]
            diagonal += DAMPING * diagonal.mean(1, keepdim=True)
        return mean

    def centred(self) -> "GramSums":
        """About the mean of the inputs, if the site has a constant that makes up for what the mean loses."""
        if self.landing.intercept is None:
            return self
        gram, total = self.gram.clone(), self.gram[:, -1:, :-1]
        gram[:, :-1, :-1] -= total.mT @ total / max(self.num_rows, 1)
        left, before = (each[:, :-1, :-1].diagonal(dim1=1, dim2=2).sum(1) for each in (gram, self.gram))
        size = len(gram[0]) - 1
        flat = (left <= FLAT * before)[:, None, None]
        noise = ROUNDING * (before / size**0.5)[:, None, None] * torch.eye(size)
        gram[:, :-1, :-1] = torch.where(flat, 0.0, gram[:, :-1, :-1]) + noise
        return replace(self, gram=gram)


@dataclass(frozen=True)
class Grams:
    """Gram matrices by site, and how many samples they were made of."""

    sums: Mapping[Key, GramSums]
    num_samples: int


def collect_grams(
    model: nn.Module, graph: ChannelGraph, calibration: Calibration, *, row_share: float = 1.0, seed: int = 0
) -> Grams:
    """One pass over ``calibration`` in evaluation mode, for all sites that read what can be removed.

    Args:
        row_share: of a convolution so many positions are looked at that the products of rows cost this part of the
            convolution itself (but not fewer than give four rows an input in all, where there are as many); the same
            for all samples of a batch, drawn anew for each batch. Rows of matrix products are all used.

    Raises:
        CalibrationError: batches of the wrong form or shape, or activations that are not finite.
    """
    number = num_batches_of(calibration)
    make = lambda: GramCollector(removable_sites(graph), number, row_share=row_share, seed=seed)  # noqa: E731
    (grams,) = gather(model, graph.trace, calibration, [make])
    assert isinstance(grams, Grams)
    return grams


def removable_sites(graph: ChannelGraph) -> list[Site]:
    """The sites that read what can be removed."""
    return [site for site in find_sites(graph.trace) if (graph.units(site.columns(graph.labels))[0] >= 0).any()]


class GramCollector:
    """Gathers the Gram matrices of ``sites``, by what names them; see :func:`collect_grams`."""

    def __init__(self, sites: Iterable[Site], num_batches: int, *, row_share: float = 1.0, seed: int = 0) -> None:
        self._wanted = {site.key: site for site in sites if site.num_inputs <= MAX_INPUTS}
        self._num_batches, self._row_share = num_batches, row_share
        self._generator = torch.Generator().manual_seed(seed)
        self._products: dict[Key, _Products] = {}
        self._shares: dict[Key, _Share] = {}
        self._landings: dict[Key, Landing] = {}
        self._batch = self._num_samples = 0

    def watch(self, trace: Trace, looks: Looks) -> None:
        """Look at each site and where it lands."""
        sites = [site for site in find_sites(trace) if site.key in self._wanted]
        landings = find_landings(trace, sites)
        for site in sites:
            self._landings.setdefault(site.key, landings[site.key])
            looks.add_after(site.op.index, self._rows_look(site))
            self._shares.setdefault(site.key, _Share(site)).watch(site, landings[site.key], looks)

    def begin(self, batch: int, inputs: ExampleInputs) -> None:
        """Count the samples."""
        self._batch = batch
        self._num_samples += num_samples_of(inputs)

    def result(self) -> Grams:
        """One matrix a site."""
        sums = {}
        for key in list(self._products):
            products = self._products.pop(key)  # each is of much memory: one after the other
            site, landing = self._wanted[key], self._landings[key]
            sums[key] = GramSums(
                site, landing, products.gram(), self._shares[key].mean, products.num_rows, self._shares[key].num_batches
            )
        return Grams(sums, self._num_samples)

    def _rows_look(self, site: Site) -> Look:
        def look(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            source = args[site.place]
            if not bool(source.sum().isfinite()):  # or only too large a sum
                check_finite(source, site, self._batch)
            products = self._products.get(site.key)
            if products is None:
                products = self._products[site.key] = _Products(site, source.device)
            for rows in self._rows(site, source):
                products.add(rows)

        return look

    def _rows(self, site: Site, source: Tensor) -> Iterator[Tensor]:
        """Rows of a batch as (R, k, g, D / k), a part at a time; of a convolution at some positions."""
        if not site.is_convolution:
            for part in site.rows(source, None).split(ROWS, dim=1):
                yield part.transpose(0, 1).unsqueeze(1)
            return
        wanted, share = site.num_rows(source), self._row_share * site.num_outputs / site.num_inputs
        wanted = max(math.ceil(wanted * share), math.ceil(MIN_ROWS * site.num_inputs / self._num_batches))
        positions = site.positions(source, wanted, self._generator)
        of_a_sample = site.num_rows(source) // len(source) if positions is None else len(positions)
        for samples in source.split(max(1, ROWS // of_a_sample)):
            yield site.patches(samples, positions)


class _Products:
    """The sum of ``(x, 1).T @ (x, 1)`` over rows x: half of it, panels of its rows from the diagonal on.

    Inputs are in the order of :meth:`Site.patches`, the kernel's places first.
    """

    def __init__(self, site: Site, device: torch.device) -> None:
        self._kernel, size = max(math.prod(site.kernel), 1), site.num_inputs
        self._upper = torch.zeros(site.groups, size, size, dtype=torch.float64, device=device)
        self._sum = torch.zeros(site.groups, size, dtype=torch.float64, device=device)
        width = max(PANEL, math.ceil(size / PANELS))
        self._panels = [slice(start, start + width) for start in range(0, size, width)]
        self.num_rows = 0

    def add(self, rows: Tensor) -> None:
        """More rows, shape (R, k, g, D / k)."""
        rows = rows.float() if rows.element_size() < 4 else rows
        rows = rows.permute(2, 0, 1, 3).reshape(self._sum.shape[0], -1, self._sum.shape[1])
        self._sum += rows.sum(1)
        for panel in self._panels:
            add_product(self._upper[:, panel, panel.start :], rows[:, :, panel], rows[:, :, panel.start :])
        self.num_rows += rows.shape[1]

    def gram(self) -> Tensor:
        """All of it, in the order of the weight's inputs, shape (g, D + 1, D + 1), on the CPU. To be asked once."""
        for panel in self._panels:
            self._upper[:, panel.start :, panel] = self._upper[:, panel, panel.start :].mT.clone()
        size, inner = self._sum.shape[1], (self._sum.shape[1] // self._kernel, self._kernel)
        gram = torch.empty(len(self._sum), size + 1, size + 1, dtype=torch.float64)
        by_kernel = self._upper.unflatten(2, inner[::-1]).unflatten(1, inner[::-1])
        gram[:, :size, :size].unflatten(2, inner).unflatten(1, inner).copy_(by_kernel.permute(0, 2, 1, 4, 3))
        gram[:, -1, :size] = self._sum.unflatten(1, inner[::-1]).transpose(1, 2).flatten(1)
        gram[:, :size, -1] = gram[:, -1, :size]
        gram[:, -1, -1] = self.num_rows
        return gram


class _Share:
    """What a squared error of one of each output of a site counts: see :class:`GramSums`."""

    def __init__(self, site: Site) -> None:
        self._groups, self._num_outputs = site.groups, site.num_outputs
        self._total = torch.zeros(site.groups, site.num_outputs, dtype=torch.float64)
        self.num_batches = 0

    @property
    def mean(self) -> Tensor:
        """Over the batches, shape (g, O)."""
        return self._total / max(self.num_batches, 1)

    def watch(self, site: Site, landing: Landing, looks: Looks) -> None:
        """Note the variances of the output, of what becomes of it in the stream, and of the stream's total.

        Of large outputs some rows tell them (samples of a convolution), spread evenly over the batch.
        """
        whole = site.groups > 1 and not site.is_convolution  # its first axis is that of the groups
        whole = whole or any(base_name(step) in MOVES for step in landing.steps)
        output: list[Tensor] = []

        def some(value: Tensor) -> Tensor:
            return value if whole else value[:: max(1, min(value.numel() // SHARE, len(value)))]

        def at_site(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            variance = self._shaped(_variance(some(result), site.output_axes(result)))
            if landing.adds:
                output[:] = [variance]
            else:
                self._add(torch.ones_like(variance), variance.sum())

        def at_end(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            rows, axis = (args[0] if landing.first else args[1], result), landing.axis
            if axis == result.dim() - 1 and not site.is_convolution and not whole:
                rows, axis = (rows[0].reshape(-1, rows[0].shape[-1]), result.reshape(-1, result.shape[-1])), 1
            landed, total = (_variance(some(value), (axis,)) for value in rows)
            self._add(_part(self._shaped(landed), output[0]), total.sum())

        looks.add_after(site.op.index, at_site)
        if landing.adds:
            assert landing.end is not None
            looks.add_after(landing.end.index, at_end)

    def _shaped(self, variance: Tensor) -> Tensor:
        return variance.reshape(-1, self._num_outputs).expand(self._groups, self._num_outputs)

    def _add(self, scale: Tensor, total: Tensor) -> None:
        self._total = self._total + _part(scale, total).cpu()
        self.num_batches += 1


def _part(value: Tensor, whole: Tensor) -> Tensor:
    """The quotient; zero of nothing."""
    return torch.where(whole > 0, value / whole, 0.0)


def _variance(value: Tensor, axes: Sequence[int]) -> Tensor:
    """Over all axes but ``axes``; in two passes, which needs no doubles for the sums (and is ten times as fast)."""
    dims = [d for d in range(value.dim()) if d not in axes]
    value = value.float() if value.element_size() < 4 else value
    return (value - value.mean(dims, keepdim=True)).square_().mean(dims).double()


def num_samples_of(inputs: ExampleInputs) -> int:
    """The length of the first axis of the first tensor."""
    return next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def check_finite(rows: Tensor, site: Site, batch: int) -> None:
    """Raises :class:`CalibrationError`, which names the layer and the batch, for rows that are not finite."""
    activations.check_finite(rows, site.op.module, batch)


def with_ones(rows: Tensor) -> Tensor:
    """(g, R, D) -> (g, R, D + 1), in single precision at least."""
    rows = rows.float() if rows.element_size() < 4 else rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left.T @ right`` for (g, R, A) and (g, R, B), in blocks of rows."""
    for a, b in zip(left.split(BLOCK, dim=1), right.split(BLOCK, dim=1), strict=True):
        total += a.mT @ b
