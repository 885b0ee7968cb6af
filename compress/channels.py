"""The channel graph: which channels of a model can be removed, what goes with each, and why the others stay."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import nn

from compress.counts import Lump
from compress.labels import FIXED, Array, Labels, Mark, ParameterAxis
from compress.names import protected
from compress.provenance import Stored
from compress.recorder import Trace
from compress.rules import propagate
from compress.sandbox import no_collections, unwrapped
from compress.solve import Lengths, solve
from compress.trace import ExampleInputs, record

KERNEL = "kernel size"  # reasons that begin so are about axes that nobody would call channels


@dataclass(frozen=True)
class Member:
    """Axis ``axis`` of ``parameter``: ``indices[u]`` are the elements that go when unit ``u`` of the group goes.

    ``role`` is "producer" (its channel goes), "carrier" (per-channel values on the way), or "consumer" (the slices
    through which the channel influences anything else). ``size`` is the axis' length.
    """

    parameter: str
    axis: int
    role: str
    size: int
    indices: Array


@dataclass(frozen=True)
class ChannelGroup:
    """Units that are alike: each is a set of parameter elements that can only go together.

    ``inexact`` says why removing a unit changes more than its own channel; empty where removal is exact.
    """

    index: int
    name: str
    num_units: int
    members: tuple[Member, ...]
    inexact: str = ""

    @property
    def exact(self) -> bool:
        """Whether removal equals setting the consumers' slices to zero."""
        return not self.inexact


@dataclass(frozen=True)
class FrozenAxis:
    """``num_elements`` of the ``size`` elements of an axis are never removed."""

    parameter: str
    axis: int
    num_elements: int
    size: int
    reason: str

    def __str__(self) -> str:
        part = "" if self.num_elements == self.size else f" ({self.num_elements} of {self.size})"
        return f"{self.parameter} axis {self.axis}{part}: {self.reason}"


class ChannelGraph:
    """Groups of removable channels of one traced model. ``print(graph)`` shows them as a table."""

    def __init__(self, trace: Trace, labels: Labels, extra: Sequence[Mark] = ()) -> None:
        self.trace = trace
        self.labels = labels
        self._extra = tuple(extra)
        self._solution = solve(labels, trace.stored, self._extra)

    @cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """All groups, in the order of the model's parameters."""
        members: list[list[Member]] = [[] for _ in self.sizes]
        for axis in self.labels.axes:
            for group, member in self._members_on(axis):
                members[group].append(member)
        return tuple(
            ChannelGroup(g, _name(members[g]), int(n), tuple(members[g]), self._inexact.get(g, ""))
            for g, n in enumerate(self.sizes)
        )

    @cached_property
    def frozen(self) -> tuple[FrozenAxis, ...]:
        """Parameter axes with elements that are never removed, each with the first reason found."""
        return tuple(self._frozen_axes())

    @property
    def sizes(self) -> Array:
        """Number of units of each group."""
        return self._solution.sizes

    @property
    def lengths(self) -> Lengths:
        """Axis lengths as functions of the numbers of kept units."""
        return self._solution.lengths

    @property
    def lumps(self) -> list[Lump]:
        """The smallest removals that keep all integers of the model consistent."""
        return self._solution.lumps

    def without(self, groups: Sequence[ChannelGroup], why: str) -> "ChannelGraph":
        """The same graph with ``groups`` frozen."""
        indices = [group.index for group in groups]
        frozen = np.flatnonzero(np.isin(self._solution.group[self._solution.component], indices))
        return ChannelGraph(self.trace, self.labels, (*self._extra, Mark(frozen, why)))

    def protecting(self, patterns: Sequence[str]) -> "ChannelGraph":
        """The same graph with all parameters that match a shell pattern (``"head.*"``) left whole.

        Raises:
            PruneError: a pattern matches no parameter or buffer.
        """
        marks = []
        for pattern in patterns:
            matching = protected(pattern, {axis.parameter for axis in self.labels.axes})
            frozen = [np.arange(a.start, a.start + a.size) for a in self.labels.axes if a.parameter in matching]
            marks.append(Mark(np.concatenate(frozen), f"protected by {pattern!r}"))
        return ChannelGraph(self.trace, self.labels, (*self._extra, *marks)) if marks else self

    def exactly(self) -> "ChannelGraph":
        """The same graph with only those groups whose removal is exact."""
        return self.without([group for group in self.groups if not group.exact], "its removal would not be exact")

    def unit_means(
        self, group: ChannelGroup, totals: npt.NDArray[np.float64], counts: Array
    ) -> npt.NDArray[np.float64]:
        """Values known by label, averaged over the labels of each unit of ``group``; NaN where none is known.

        Args:
            totals: sum of the values of each label, shape (labels,).
            counts: number of values of each label, shape (labels,).
        """
        component = self._solution.component[: len(totals)]
        inside = self._solution.group[component] == group.index
        position = self._solution.position[component[inside]]
        total = np.bincount(position, weights=totals[inside], minlength=group.num_units)
        count = np.bincount(position, weights=counts[inside], minlength=group.num_units)
        return np.divide(total, count, out=np.full(group.num_units, np.nan), where=count > 0)

    def units(self, labels: Array) -> tuple[Array, Array]:
        """The group of each label (-1: never removed), and the unit of that group that it belongs to."""
        component = self._solution.component[labels]
        group = np.where(labels == FIXED, -1, self._solution.group[component])
        return group, self._solution.position[component]

    def elements_of(self, labels: Array) -> dict[int, int]:
        """How many elements of an axis belong to each group; the others stay."""
        group, _ = self.units(labels)
        found, counts = np.unique(group[group >= 0], return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))

    def stored_after(self, removed: Mapping[int, int]) -> dict[Stored, int]:
        """New values of the stored integers that change when lump ``i`` is removed ``removed[i]`` times."""
        lowered: dict[Stored, int] = {}
        for index, times in removed.items():
            for leaf, amount in self.lumps[index].stored.items():
                lowered[leaf] = lowered.get(leaf, 0) + amount * times
        return {leaf: self.trace.stored[leaf] - amount for leaf, amount in lowered.items() if amount}

    def __str__(self) -> str:
        from compress.table import graph_table

        return graph_table(self)

    # -- from labels to parameters -----------------------------------------------------------------------------------

    @cached_property
    def _inexact(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for component, mark in self._solution.mixing.items():
            found.setdefault(int(self._solution.group[component]), mark.why)
        return found

    @cached_property
    def _roles(self) -> Array:
        roles = np.zeros(self.labels.num_labels, dtype=np.int64)
        for made in self.labels.producers:
            roles[made] = 1
        for used in self.labels.consumers:
            roles[used] = 2
        contracted = np.zeros(self.labels.num_labels, dtype=bool)
        for ended in self.labels.contracted:
            contracted[ended] = True
        contracted[FIXED] = False
        for term, made in reversed(self.labels.followers):
            roles[term] = np.where(contracted[made], 2, roles[term])
            contracted[term] |= contracted[made]
        return roles

    def _members_on(self, axis: ParameterAxis) -> Iterator[tuple[int, Member]]:
        labels = np.arange(axis.start, axis.start + axis.size, dtype=np.int64)
        for group, indices in self._by_unit(labels):
            role = ("carrier", "producer", "consumer")[int(self._roles[labels[indices]].max())]
            yield group, Member(axis.parameter, axis.axis, role, axis.size, indices)

    def _by_unit(self, labels: Array) -> Iterator[tuple[int, Array]]:
        """For each group on an axis: the elements of each of its units, shape (units, elements a unit)."""
        component = self._solution.component[labels]
        group = np.where(labels == FIXED, -1, self._solution.group[component])
        position = self._solution.position[component]
        for g in np.unique(group[group >= 0]).tolist():
            elements = np.flatnonzero(group == g)
            ordered = elements[np.argsort(position[elements], kind="stable")]
            yield g, ordered.reshape(int(self.sizes[g]), -1)

    def _frozen_axes(self) -> Iterator[FrozenAxis]:
        for axis in self.labels.axes:
            component = self._solution.component[axis.start : axis.start + axis.size]
            stays = component[self._solution.group[component] < 0]
            reasons = [self._solution.reason[c].why for c in stays.tolist() if c in self._solution.reason]
            if len(stays) and not (reasons and reasons[0].startswith(KERNEL)):
                reason = reasons[0] if reasons else "nothing that is computed depends on it"
                yield FrozenAxis(axis.parameter, axis.axis, len(stays), axis.size, reason)


@no_collections()
def trace(model: nn.Module, example_inputs: ExampleInputs) -> ChannelGraph:
    """Find out which channels of ``model`` can be removed, and what must go with each.

    Args:
        model: any module; it is not changed.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Raises:
        TraceError: the model does not run on its example inputs.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> graph = trace(model, torch.zeros(1, 3))
    >>> [(group.name, group.num_units) for group in graph.groups]
    [('0.weight', 4)]
    """
    recorded = record(unwrapped(model), example_inputs)
    return ChannelGraph(recorded, propagate(recorded))


def _name(members: Sequence[Member]) -> str:
    for role in ("producer", "carrier", "consumer"):
        for member in members:
            if member.role == role:
                return member.parameter
    raise AssertionError("a group without parameters")


__all__ = ["ChannelGraph", "ChannelGroup", "FrozenAxis", "Member", "trace"]
