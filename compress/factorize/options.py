"""What each layer can be factorised into, what that costs, and what its outputs lose; why others are left alone."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from compress.errors import PruneError
from compress.factorize.decompositions import Factorisation, Problem, Split
from compress.factorize.surgery import SPLITS
from compress.gram import MAX_INPUTS, GramSums
from compress.recorder import Trace
from compress.rules.registry import base_name
from compress.sites import Key, Site
from compress.uses import Uses

METHODS = ("tucker2", "svd", "spatial")
INNER_RANKS = 8  # ranks of the inputs' side that Tucker-2 on both sides is tried with


@dataclass(frozen=True)
class Option:
    """One factorisation: as in :class:`compress.factorize.plan.Factor`, with its cost.

    ``error`` is the squared error of the outputs, as a part of the variance of what they are added to.
    """

    kind: str
    ranks: tuple[int | None, ...]
    first: str
    macs: int
    params: int
    error: float


@dataclass(frozen=True)
class Layer:
    """A layer that can be factorised: its cost as it is, and its options. ``energy`` is the error of giving nothing."""

    name: str
    problem: Problem
    macs: int
    params: int
    energy: float
    options: tuple[Option, ...]


def factorable(model: nn.Module, trace: Trace, sites: Sequence[Site]) -> tuple[list[Site], dict[str, str]]:
    """The sites whose layer can be replaced, and by parameter why others cannot."""
    modules, uses = dict(model.named_modules()), Uses(trace)
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    often = {site.parameter for site in sites if site.use > 0}
    found, reasons = [], {}
    for site in sites:
        reason = (
            "its weight is used more than once" if site.parameter in often else _why_not(site, modules, trace, uses)
        )
        name, _, slot = site.parameter.rpartition(".")
        weight = getattr(modules.get(name), slot, None)
        if not reason and owners[id(weight)] > 1:
            reason = "its weight is shared with another module"
        if reason:
            reasons[site.parameter] = reason
        else:
            found.append(site)
    return found, reasons


def _why_not(site: Site, modules: Mapping[str, nn.Module], trace: Trace, uses: Uses) -> str:
    name, _, slot = site.parameter.rpartition(".")
    owner = modules.get(name)
    if slot != "weight" or not isinstance(owner, nn.Linear | nn.Conv1d | nn.Conv2d):
        return "its weight does not belong to an nn.Linear, nn.Conv1d or nn.Conv2d"
    plain = next(base for base in (nn.Linear, nn.Conv1d, nn.Conv2d) if isinstance(owner, base))
    own = [method for method in ("forward", "_conv_forward") if _overridden(owner, plain, method)]
    if site.op.module != name or own:
        return "its weight is not used through the module's own forward"
    if not name:
        return "it is the model itself"
    if owner._forward_hooks or owner._forward_pre_hooks:
        return "its module has hooks, which the thin layers would not call"
    if getattr(owner, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={owner.padding_mode!r} is not zeros"
    if isinstance(owner, nn.Conv1d | nn.Conv2d) and isinstance(owner.padding, str) and _lopsided(owner):
        return "its padding differs between the two ends of an axis"
    if site.groups > 1:
        return "it is grouped: its factors would have to be grouped alike"
    if len(uses.of(trace.parameters[site.parameter].id)) > 1:
        return "its weight is used more than once"
    if not owner.weight.is_floating_point():
        return "its weight is not of floating point"
    if site.num_inputs > MAX_INPUTS:
        return f"it has more than {MAX_INPUTS} inputs"
    if any(base_name(op) not in ("t", "transpose") for op in site.views):
        return "its weight is reshaped before it is used"
    return ""


def _overridden(owner: nn.Module, plain: type[nn.Module], method: str) -> bool:
    return getattr(type(owner), method, None) is not getattr(plain, method, None)


def _lopsided(owner: nn.Conv1d | nn.Conv2d) -> bool:
    ends = owner._reversed_padding_repeated_twice
    return ends[::2] != ends[1::2]


def layers_of(
    model: nn.Module, sites: Sequence[Site], sums: Mapping[Key, GramSums], methods: Sequence[str]
) -> tuple[list[Layer], dict[str, str]]:
    """The options of each layer, and by parameter why some have none."""
    layers, reasons = [], {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for site in sites:
        known = sums[site.key]
        gram = known.mean[0, :-1, :-1]
        try:
            problem = Problem.of(parameters[site.parameter], gram, known.output_share[0])
        except PruneError as error:
            reasons[site.parameter] = str(error)
            continue
        price = _Price(site, tuple(problem.weight.shape))
        cheaper = tuple(o for o in _options(problem, price, methods) if o.macs < price.macs or o.params < price.params)
        if not cheaper:
            reasons[site.parameter] = "no factorisation is cheaper"
            continue
        name = site.parameter.removesuffix(".weight")
        layers.append(Layer(name, problem, price.macs, price.params, problem.total, cheaper))
    return layers, reasons


class _Price:
    """MACs and weights of a site, and of what may take its place, from the sizes in the trace."""

    def __init__(self, site: Site, shape: tuple[int, ...]) -> None:
        self.outputs, self.inputs, *self.kernel = shape
        self._conv = site.is_convolution
        self._read = list(site.source.shape[2:]) if self._conv else [1]
        self._given = list(site.result.shape[2:]) if self._conv else [1]
        self._samples = site.source.shape[0]
        self.params = math.prod(shape)
        self.macs = self._samples * math.prod(self._given) * self.params

    def tucker2(self, inner: int | None, outer: int | None) -> tuple[int, int]:
        """MACs and weights."""
        a, b = inner or self.inputs, outer or self.outputs
        reduce = 0 if inner is None else self.inputs * a
        core, expand = a * math.prod(self.kernel) * b, 0 if outer is None else b * self.outputs
        macs = self._samples * (math.prod(self._read) * reduce + math.prod(self._given) * (core + expand))
        return macs, reduce + core + expand

    def spatial(self, rank: int, axis: int) -> tuple[int, int]:
        """MACs and weights if the first factor has the kernel along ``axis``."""
        first = self.inputs * self.kernel[axis] * rank
        second = rank * self.kernel[1 - axis] * self.outputs
        between = math.prod(g if i == axis else r for i, (g, r) in enumerate(zip(self._given, self._read, strict=True)))
        macs = self._samples * (between * first + math.prod(self._given) * second)
        return macs, first + second


def _options(problem: Problem, price: _Price, methods: Sequence[str]) -> Iterator[Option]:
    kernel, outer = price.kernel, Split(tuple(range(len(price.kernel))))
    if math.prod(kernel) == 1:
        if "svd" in methods:
            errors = Factorisation(problem, outer).errors
            for rank, error in _ranks(errors):
                if kernel:
                    yield Option("tucker2", (None, rank), "", *price.tucker2(None, rank), error)
                else:
                    yield Option("linear", (rank,), "", *price.tucker2(None, rank), error)
        return
    if "tucker2" in methods:
        for rank, error in _ranks(Factorisation(problem, outer).errors):
            yield Option("tucker2", (None, rank), "", *price.tucker2(None, rank), error)
        inputs = Factorisation(problem, Split())
        for rank, error in _ranks(inputs.errors):
            yield Option("tucker2", (rank, None), "", *price.tucker2(rank, None), error)
        for inner in _spread(inputs.full_rank()):
            lost = float(inputs.errors[inner])
            for rank, error in _ranks(Factorisation(inputs.following(inputs.first[:inner]), outer).errors):
                yield Option("tucker2", (inner, rank), "", *price.tucker2(inner, rank), lost + error)
    if "spatial" in methods and len(kernel) == 2 and min(kernel) > 1:
        for axis, (first, split) in enumerate(SPLITS.items()):
            for rank, error in _ranks(Factorisation(problem, split).errors):
                yield Option("spatial", (rank,), first, *price.spatial(rank, axis), error)


def _ranks(errors: Tensor) -> Iterator[tuple[int, float]]:
    return ((rank, error) for rank, error in enumerate(errors.tolist()) if rank > 0)


def _spread(full: int) -> list[int]:
    """Some ranks between 1 and ``full``."""
    return sorted({int(rank) for rank in np.linspace(0, full, INNER_RANKS + 2)[1:-1] if rank >= 1})
