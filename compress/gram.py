"""Gram matrices of what enters each site, gathered in one pass over the calibration data.

A site (see :mod:`compress.sites`) is a linear regression of its outputs on rows of inputs ``x``. All that least squares
needs to know about those rows is the sum of ``(x, 1).T @ (x, 1)``: how well other channels can stand in for one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.calibration import Calibration, batches
from compress.channels import ChannelGraph
from compress.errors import CalibrationError, PruneError
from compress.landing import Landing, find_landings
from compress.recorder import Op, Trace
from compress.sandbox import untouched, visible_operators
from compress.sites import Key, Site, find_sites
from compress.trace import ExampleInputs, as_arguments, record
from compress.watch import Watch

BLOCK = 1024  # rows that are multiplied in the data's own precision; the blocks' products are summed in float64
MIN_ROWS = 4  # for every input: a regression on fewer rows fits noise
MAX_INPUTS = 8192  # a site with more (half a gigabyte a matrix) is left out


@dataclass
class GramSums:
    """What is known of one site; all float64.

    ``gram`` is the sum of ``(x, 1).T @ (x, 1)`` over ``num_rows`` rows x, shape (g, D + 1, D + 1). ``output_share``
    (g, O) is what a squared error of one of each output counts: its part in the total variance of what the site writes
    to, the residual stream where there is one, else its own outputs.
    """

    site: Site
    landing: Landing
    gram: Tensor
    output_share: Tensor
    num_rows: int = 0
    num_batches: int = 0

    @property
    def mean(self) -> Tensor:
        """The mean over rows instead of the sum."""
        return self.gram / max(self.num_rows, 1)


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
            convolution itself (but not fewer than give four rows an input over eight batches); the same for all samples
            of a batch. Rows of matrix products are all used.

    Raises:
        CalibrationError: batches of the wrong form or shape, or activations that are not finite.
    """
    wanted = {  # (tensors of another trace than the graph's have no labels)
        site.key: site
        for site in find_sites(graph.trace)
        if site.num_inputs <= MAX_INPUTS and (graph.units(site.columns(graph.labels))[0] >= 0).any()
    }
    sums: dict[Key, GramSums] = {}
    generator = torch.Generator().manual_seed(seed)
    num_samples = 0
    with untouched(model):
        model.eval()
        for batch, (inputs, trace) in enumerate(traced(model, (inputs for inputs, _ in batches(calibration, model)))):
            sites = [site for site in find_sites(trace) if site.key in wanted]
            landings = find_landings(trace, sites)
            looks = _Looks()
            for site in sites:
                known = sums.get(site.key)
                if known is None:
                    size = site.num_inputs + 1
                    gram = torch.zeros(site.groups, size, size, dtype=torch.float64)
                    share = torch.zeros(site.groups, site.num_outputs, dtype=torch.float64)
                    known = sums[site.key] = GramSums(wanted[site.key], landings[site.key], gram, share)
                looks.add(site.op, _rows_look(site, known, batch, row_share, generator))
                _add_share_looks(looks, site, landings[site.key], known)
            run(model, inputs, Watch(trace, batch, looks.functions))
            num_samples += num_samples_of(inputs)
    for known in sums.values():
        known.output_share /= known.num_batches
    return Grams(sums, num_samples)


def traced(model: nn.Module, inputs: Iterator[ExampleInputs] | Sequence[ExampleInputs]) -> Iterator[tuple[Any, Trace]]:
    """Each batch with a trace of its shape: operators may decompose differently at another size."""
    traces: dict[Any, Trace] = {}
    for batch in inputs:
        shapes = tuple(leaf.shape for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        if shapes not in traces:
            try:
                traces[shapes] = record(model, batch, training=False, on_device=True)
            except PruneError as error:
                raise CalibrationError(f"calibration data do not fit the model: {error}") from error
        yield batch, traces[shapes]


def run(model: nn.Module, inputs: ExampleInputs, watch: Watch) -> Any:
    """The model's outputs, without gradients."""
    args, kwargs = as_arguments(inputs)
    with torch.no_grad(), visible_operators(), watch:
        return model(*args, **kwargs)


def num_samples_of(inputs: ExampleInputs) -> int:
    """The length of the first axis of the first tensor."""
    return next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def check_finite(rows: Tensor, site: Site, batch: int) -> None:
    """Raises :class:`CalibrationError`, which names the layer and the batch, for rows that are not finite."""
    if not bool(torch.isfinite(rows).all()):
        raise CalibrationError(
            f"activations that enter {site.op.module or 'the model'!r} are not finite in calibration batch {batch}: "
            "check the data, the normalisation and the weights"
        )


def with_ones(rows: Tensor) -> Tensor:
    """(g, R, D) -> (g, R, D + 1), in single precision at least."""
    rows = rows.float() if rows.element_size() < 4 else rows
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left.T @ right`` for (g, R, A) and (g, R, B), in blocks of rows."""
    for a, b in zip(left.split(BLOCK, dim=1), right.split(BLOCK, dim=1), strict=True):
        total += (a.transpose(1, 2) @ b).to(total)


Look = Callable[[tuple[Any, ...], Mapping[str, Any], Any], None]


class _Looks:
    """Several functions may look at one operator."""

    def __init__(self) -> None:
        self.functions: dict[int, Look] = {}

    def add(self, op: Op, look: Look) -> None:
        before = self.functions.get(op.index)

        def both(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            assert before is not None
            before(args, kwargs, result)
            look(args, kwargs, result)

        self.functions[op.index] = look if before is None else both


def _rows_look(site: Site, known: GramSums, batch: int, row_share: float, generator: torch.Generator) -> Look:
    def look(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        source = args[site.place]
        wanted = site.num_rows(source)
        if site.is_convolution:
            share = row_share * site.num_outputs / site.num_inputs
            wanted = max(math.ceil(wanted * share), math.ceil(MIN_ROWS * site.num_inputs / 8))
        rows = site.rows(source, site.positions(source, wanted, generator))
        check_finite(rows, site, batch)
        rows = with_ones(rows)
        add_product(known.gram, rows, rows)
        known.num_rows += rows.shape[1]

    return look


def _add_share_looks(looks: _Looks, site: Site, landing: Landing, known: GramSums) -> None:
    """Note the variances of the output, of what becomes of it in the stream, and of the stream's total."""
    variance: dict[str, Tensor] = {}

    def at_site(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        variance["output"] = _variance(site, result)
        if not landing.adds:
            known.output_share += _part(torch.ones(()), variance["output"].sum())
            known.num_batches += 1

    def at_end(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        mine = args[0] if landing.first else args[1]
        dims = [d for d in range(result.dim()) if d != landing.axis]
        total = result.double().var(dims, correction=0).sum().cpu()
        landed = mine.double().var(dims, correction=0).reshape(known.output_share.shape).cpu()
        known.output_share += _part(_part(landed, variance["output"]), total)
        known.num_batches += 1

    looks.add(site.op, at_site)
    if landing.adds:
        assert landing.end is not None
        looks.add(landing.end, at_end)


def _part(value: Tensor, whole: Tensor) -> Tensor:
    """The quotient; zero of nothing."""
    return torch.where(whole > 0, value.double() / whole, 0.0)


def _variance(site: Site, result: Tensor) -> Tensor:
    return site.outputs(result, None).double().var(1, correction=0).cpu()
