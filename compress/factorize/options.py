"""What each layer can be factorised into, what that costs, and what its outputs lose."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from compress.curvature import LOOKUP
from compress.errors import PruneError
from compress.factorize.attention import Attention
from compress.factorize.decompositions import Grouped, Problem, Split
from compress.factorize.heads import Heads
from compress.factorize.plan import Factor
from compress.factorize.replaceable import owner_of, settings_of
from compress.factorize.surgery import SPLITS
from compress.factorize.tables import Table
from compress.factorize.tables import price as price_of_table
from compress.gram import GramSums
from compress.recorder import Op
from compress.sites import Key, Site

METHODS = ("tucker2", "svd", "spatial", "attention")
HEAD_RANKS = 32  # of scores and of values that an attention is looked at with
INNER_RANKS = 8  # ranks of the inputs' side that Tucker-2 on both sides is tried with


@dataclass(frozen=True)
class Option:
    """One factorisation: as in :class:`compress.factorize.plan.Factor`, with its cost.

    ``error`` is the squared error of the outputs, as a part of the variance of the model's; ``latency`` is
    in nanoseconds, where it was timed.
    """

    kind: str
    ranks: tuple[int | None, ...]
    first: str
    macs: int
    params: int
    error: float
    latency: int = 0


@dataclass(frozen=True)
class Layer:
    """A layer that can be factorised: its cost as it is, and its options. ``energy`` is the error of giving nothing.

    ``shape`` and ``settings`` are those of :class:`compress.factorize.plan.Factor`; ``counts`` is what its errors count
    beside those of other layers.
    """

    name: str
    problem: Problem | Table | Heads
    macs: int
    params: int
    energy: float
    options: tuple[Option, ...]
    shape: tuple[int, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    latency: int = 0
    counts: float = 1.0

    def factor(self, option: Option) -> Factor:
        """The entry of a plan."""
        shape = tuple(self.problem.weight.shape) if self.shape is None else self.shape  # type: ignore[union-attr]
        return Factor(self.name, option.kind, option.ranks, option.first, shape, option.error, self.settings)


def layers_of(
    model: nn.Module,
    sites: Sequence[Site],
    sums: Mapping[Key, GramSums],
    methods: Sequence[str],
    inner_rank: Callable[[Problem], int] | None = None,
    *,
    refined: bool = False,
) -> tuple[list[Layer], dict[str, str]]:
    """The options of each layer, and by parameter why some have none.

    Args:
        inner_rank: one more rank of the inputs' side that Tucker-2 on both sides is tried with.
        refined: errors of spatial kernels are those that alternating least squares leave, about; takes longer.
    """
    layers, reasons = [], {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for site in sites:
        try:
            problem = problem_of(site, parameters[site.parameter], sums[site.key])
        except PruneError as error:
            reasons[site.parameter] = str(error)
            continue
        price = _Price(site)
        also = () if inner_rank is None else (inner_rank(problem) // site.groups,)
        found = _options(problem, price, methods, also, refined=refined)
        cheaper = tuple(o for o in found if o.macs < price.macs or o.params < price.params)
        if not cheaper:
            reasons[site.parameter] = "no factorisation by these methods is cheaper"
            continue
        shape = tuple(parameters[site.parameter].shape)
        layers.append(
            Layer(
                owner_of(site),
                problem,
                price.macs,
                price.params,
                problem.total,
                cheaper,
                shape,
                settings_of(site, model),
            )
        )
    return layers, reasons


def table_layers(
    model: nn.Module, tables: Mapping[str, Op], counts: Mapping[str, Tensor], curvature: Mapping[Key, Tensor]
) -> tuple[list[Layer], dict[str, str]]:
    """The same of embeddings."""
    layers, reasons = [], {}
    for name, op in tables.items():
        try:
            table = Table.of(model.get_parameter(name), counts.get(name), curvature.get((name, LOOKUP)))
        except PruneError as error:
            reasons[name] = str(error)
            continue
        macs, params = price_of_table(op)
        found = (Option("embedding", (rank,), "", *price_of_table(op, rank), e) for rank, e in _ranks(table.errors))
        options = tuple(option for option in found if option.params < params)
        if options:
            shape = tuple(table.weight.shape)
            layers.append(Layer(name.removesuffix(".weight"), table, macs, params, table.total, options, shape))
        else:
            reasons[name] = "no factorisation is cheaper"
    return layers, reasons


def attention_layers(
    model: nn.Module,
    attentions: Mapping[str, Attention],
    heads: Mapping[str, Heads],
    losses: Mapping[str, tuple[Tensor, Tensor]],
) -> list[Layer]:
    """The same of attentions: ranks of scores and of values, whose losses add up.

    Args:
        losses: at each rank of either, from :func:`compress.factorize.attention.losses`.
    """
    layers = []
    for name, own in heads.items():
        layer, attention, full = model.get_submodule(name), attentions[name], own.full_rank
        assert isinstance(layer, nn.MultiheadAttention)
        ranks = sorted({*np.linspace(1, full, min(full, HEAD_RANKS)).astype(int).tolist()})
        scores, values = (loss.tolist() for loss in losses[name])
        options = tuple(
            Option("attention", (r, s), "", *attention.price(layer, (r, s)), scores[r] + values[s])
            for r in ranks
            for s in ranks
            if (r, s) != (full, full)
        )
        cost = attention.price(layer, (full, full))
        layers.append(Layer(name, own, *cost, own.total, options, tuple(layer.out_proj.weight.shape)))
    return layers


def problem_of(site: Site, parameter: Tensor, known: GramSums) -> Problem:
    """The weight (O, C, *K) with what is known of its inputs.

    Raises:
        PruneError: numbers are not finite.
    """
    weight = site.matrix(parameter).flatten(0, 1)
    gram = known.mean[:, :-1, :-1]
    if site.is_convolution:
        weight = weight.reshape(len(weight), -1, *site.kernel)
    gram = gram[0] if site.groups == 1 else gram
    if known.output_metric is not None:
        return Problem.under(weight, gram, known.output_metric)
    return Problem.of(weight, gram, known.output_share.flatten(), groups=site.groups)


class _Price:
    """MACs and weights of a site, and of what may take its place, from the sizes in the trace."""

    def __init__(self, site: Site) -> None:
        self.kernel, self.groups = site.kernel, site.groups
        self.inputs = site.groups * site.num_inputs // math.prod(site.kernel)
        self.outputs = site.groups * site.num_outputs
        conv = site.is_convolution
        self._read = list(site.source.shape[2:]) if conv else [1]
        self._given = list(site.result.shape[2:]) if conv else [1]
        self._samples = site.source.shape[0]
        self.params = self._weights(self.inputs, self.outputs, *self.kernel)
        self.macs = self._samples * math.prod(self._given) * self.params

    def tucker2(self, inner: int | None, outer: int | None) -> tuple[int, int]:
        """MACs and weights; ranks count all groups together."""
        a, b = inner or self.inputs, outer or self.outputs
        reduce = 0 if inner is None else self._weights(self.inputs, a)
        core, expand = self._weights(a, b, *self.kernel), 0 if outer is None else self._weights(b, self.outputs)
        macs = self._samples * (math.prod(self._read) * reduce + math.prod(self._given) * (core + expand))
        return macs, reduce + core + expand

    def spatial(self, rank: int, axis: int) -> tuple[int, int]:
        """MACs and weights if the first factor has the kernel along ``axis``."""
        first = self._weights(self.inputs, rank, self.kernel[axis])
        second = self._weights(rank, self.outputs, self.kernel[1 - axis])
        between = math.prod(g if i == axis else r for i, (g, r) in enumerate(zip(self._given, self._read, strict=True)))
        macs = self._samples * (between * first + math.prod(self._given) * second)
        return macs, first + second

    def _weights(self, inputs: int, outputs: int, *kernel: int) -> int:
        return inputs * outputs * math.prod(kernel) // self.groups


def _options(
    problem: Problem, price: _Price, methods: Sequence[str], also: Sequence[int] = (), *, refined: bool
) -> Iterator[Option]:
    """All of them; a kind whose rank 1 is no cheaper is not looked at. ``also`` are more ranks of the inputs' side."""
    kernel, groups, outer = price.kernel, price.groups, Split(tuple(range(len(price.kernel))))

    def saves(cost: tuple[int, int]) -> bool:
        return cost[0] < price.macs or cost[1] < price.params

    def option(kind: str, ranks: tuple[int | None, ...], first: str, cost: tuple[int, int], error: float) -> Option:
        return Option(kind, tuple(r and groups * r for r in ranks), first, *cost, error)

    def tucker2(inner: int | None, rank: int | None, error: float, kind: str = "tucker2") -> Option:
        cost = price.tucker2(inner and groups * inner, rank and groups * rank)
        return option(kind, (inner, rank) if kind == "tucker2" else (rank,), "", cost, error)

    if math.prod(kernel) == 1:
        if "svd" in methods and saves(price.tucker2(None, groups)):
            for rank, error in _ranks(Grouped(problem, outer).errors):
                yield tucker2(None, rank, error, "tucker2" if kernel else "linear")
        return
    if "tucker2" in methods and saves(price.tucker2(groups, groups)):
        for rank, error in _ranks(Grouped(problem, outer).errors):
            yield tucker2(None, rank, error)
        inputs = Grouped(problem, Split())
        for rank, error in _ranks(inputs.errors):
            yield tucker2(rank, None, error)
        for inner in sorted({*_spread(inputs.full_rank()), *also} - {0, inputs.full_rank()}):
            lost = float(inputs.errors[inner])
            for rank, error in _ranks(Grouped(inputs.following(inputs.basis(inner)), outer).errors):
                yield tucker2(inner, rank, lost + error)
    if "spatial" in methods and len(kernel) == 2 and min(kernel) > 1:
        for axis, (first, split) in enumerate(SPLITS.items()):
            if saves(price.spatial(groups, axis)):
                grouped = Grouped(problem, split)
                for rank, error in _ranks(grouped.refined_errors() if refined else grouped.errors):
                    yield option("spatial", (rank,), first, price.spatial(groups * rank, axis), error)


def _ranks(errors: Tensor) -> Iterator[tuple[int, float]]:
    return ((rank, error) for rank, error in enumerate(errors.tolist()) if rank > 0)


def _spread(full: int) -> list[int]:
    """Some ranks between 1 and ``full``."""
    return sorted({int(rank) for rank in np.linspace(0, full, INNER_RANKS + 2)[1:-1] if rank >= 1})
