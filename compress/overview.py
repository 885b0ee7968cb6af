"""What can be removed from a model, and what cannot: the numbers behind the tables and pictures of a channel graph."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from compress.channels import ChannelGraph, ChannelGroup, FrozenAxis
from compress.cost import CostModel, macs_of
from compress.counts import Lump
from compress.select import smallest

PLACE = re.compile(r"(\w+\.\w+\.\w+) in \S+?(?=[:,]? |$)")  # operators name their module: "aten.add.Tensor in layer1.0"
PARAMETRIZED = ".parametrizations."  # conv.parametrizations.weight.original0 belongs to conv


@dataclass(frozen=True)
class GroupFacts:
    """``macs`` is the fraction of the model's MACs that would go with all units of the group.

    ``lumps`` are the smallest removals that it takes part in.
    """

    group: ChannelGroup
    macs: float
    lumps: tuple[Lump, ...]


@dataclass(frozen=True)
class GapFacts:
    """An operator without a rule: how often it is called, and in which modules."""

    operator: str
    why: str
    calls: int
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """A module that has parameters or costs MACs (a fraction of the model's), with the roles of each group in it."""

    name: str
    shapes: tuple[str, ...]
    macs: float
    roles: Mapping[int, tuple[str, ...]]
    frozen: tuple[FrozenAxis, ...]


@dataclass(frozen=True)
class Overview:
    """``macs`` of one forward pass; groups, and by reason those that are not exact and axes that are frozen.

    ``smallest`` is the fraction of the MACs that the floors of the selection leave, ``smallest_exact`` that with exact
    groups alone.
    """

    macs: int
    groups: tuple[GroupFacts, ...]
    inexact: Mapping[str, tuple[int, ...]]
    frozen: Mapping[str, tuple[FrozenAxis, ...]]
    gaps: tuple[GapFacts, ...]
    smallest: float
    smallest_exact: float
    notes: tuple[str, ...]


def overview(graph: ChannelGraph) -> Overview:
    """Numbers about the groups of ``graph``, what is frozen, and how far pruning can go (before any verification).

    >>> import torch, compress
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    >>> facts = overview(compress.trace(model, torch.zeros(1, 8)))
    >>> facts.macs, facts.groups[0].macs, facts.smallest
    (240, 1.0, 0.1)
    """
    macs = sum(macs_of(op) for op in graph.trace.evaluation)
    reached = _smallest(graph, macs)
    exact = reached if all(group.exact for group in graph.groups) else _smallest(graph.exactly(), macs)
    frozen: dict[str, list[FrozenAxis]] = {}
    for axis in graph.frozen:
        frozen.setdefault(PLACE.sub(r"\1", axis.reason), []).append(axis)
    by_reason = {why: tuple(axes) for why, axes in sorted(frozen.items(), key=lambda item: -len(item[1]))}
    inexact: dict[str, list[int]] = {}
    for group in graph.groups:
        if group.inexact:
            inexact.setdefault(PLACE.sub(r"\1", group.inexact), []).append(group.index)
    mixing = {why: tuple(groups) for why, groups in inexact.items()}
    return Overview(
        macs, _groups(graph, macs), mixing, by_reason, _gaps(graph), reached, exact, tuple(graph.trace.notes)
    )


def layers(graph: ChannelGraph) -> list[Layer]:
    """The modules that have parameters or cost MACs, in the order in which they first run.

    What runs in training mode only comes after the rest, what never runs is last.
    """
    owners = {ref.id: owner_of(name) for name, ref in graph.trace.parameters.items()}
    macs: Counter[str] = Counter()
    for op in graph.trace.evaluation:
        macs[op.module] += macs_of(op)
    ran = [name for op in graph.trace.ops for name in (op.module, *(owners.get(ref.id) for ref in op.tensors))]
    shown = {*owners.values(), *(name for name, count in macs.items() if count)}
    names = [name for name in dict.fromkeys([*ran, *owners.values()]) if name in shown]

    shapes: dict[str, list[str]] = {name: [] for name in names}
    for name, ref in graph.trace.parameters.items():
        if ref.shape:  # a counter is no layer
            shapes[owner_of(name)].append(f"{name.rpartition('.')[2]} {'x'.join(map(str, ref.shape))}")
    roles: dict[str, dict[int, dict[str, None]]] = {name: {} for name in names}
    for group in graph.groups:
        for member in group.members:
            roles[owner_of(member.parameter)].setdefault(group.index, {})[member.role] = None
    frozen: dict[str, list[FrozenAxis]] = {name: [] for name in names}
    for axis in graph.frozen:
        frozen[owner_of(axis.parameter)].append(axis)
    total = max(sum(macs.values()), 1)
    return [
        Layer(
            name,
            tuple(shapes[name]),
            macs[name] / total,
            {group: tuple(found) for group, found in roles[name].items()},
            tuple(frozen[name]),
        )
        for name in names
    ]


def owner_of(parameter: str) -> str:
    """The path of the layer that has a parameter; that of the model itself is empty."""
    return parameter.partition(PARAMETRIZED)[0] if PARAMETRIZED in parameter else parameter.rpartition(".")[0]


def _groups(graph: ChannelGraph, macs: int) -> tuple[GroupFacts, ...]:
    lumps: list[list[Lump]] = [[] for _ in graph.groups]
    for lump in graph.lumps:
        for index in lump.units:
            lumps[index].append(lump)
    price = CostModel(graph, "macs", macs)
    facts = []
    for group in graph.groups:
        kept = graph.sizes.copy()
        kept[group.index] = 0
        facts.append(GroupFacts(group, 1 - price(kept) / max(macs, 1), tuple(lumps[group.index])))
    return tuple(facts)


def _gaps(graph: ChannelGraph) -> tuple[GapFacts, ...]:
    """One entry an operator and reason; a call in both modes counts once."""
    calls: dict[tuple[str, str], dict[str, Counter[bool]]] = {}
    for gap in graph.labels.gaps:
        modules = calls.setdefault((str(gap.op.func), gap.why), {})
        modules.setdefault(gap.op.module, Counter())[gap.in_training] += 1
    return tuple(
        GapFacts(operator, why, sum(max(counts.values()) for counts in modules.values()), tuple(modules))
        for (operator, why), modules in calls.items()
    )


def _smallest(graph: ChannelGraph, macs: int) -> float:
    if not len(graph.sizes):
        return 1.0
    price = CostModel(graph, "macs", macs)
    return smallest(graph, lambda kept: price(kept) / max(macs, 1))
