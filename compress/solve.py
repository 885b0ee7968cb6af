"""Solve the collected equalities: units of elements that go together, groups of like units, and lumps of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from compress.counts import CountSystem, Linear, Lump, NotLinear
from compress.labels import FIXED, Array, Labels, Mark
from compress.provenance import AxisSize, Stored, leaves


@dataclass(frozen=True)
class Lengths:
    """The kept length of many axes as linear forms in the numbers of kept units: ``fixed + matrix @ kept``."""

    matrix: sparse.csr_matrix
    fixed: Array
    rows: Mapping[bytes, int]

    def row(self, labels: Array) -> int:
        """The row of an axis with these labels."""
        return self.rows[labels.tobytes()]

    def linear(self, labels: Array) -> Linear:
        """The same as a linear form for the count equations."""
        row = self.row(labels)
        part = slice(self.matrix.indptr[row], self.matrix.indptr[row + 1])
        terms = zip(self.matrix.indices[part], self.matrix.data[part], strict=True)
        return Linear(Fraction(int(self.fixed[row])), {int(g): Fraction(int(c)) for g, c in terms})


@dataclass(frozen=True)
class Solution:
    """Components of the equalities.

    ``component`` maps a label to its component, ``group`` and ``position`` a component to its group (-1: not
    removable) and to its unit's place there; ``sizes`` counts the units of each group; ``reason`` maps a frozen
    component to the mark that froze it, ``mixing`` one that cannot be removed exactly to the mark that says why.
    """

    component: Array
    group: Array
    position: Array
    sizes: Array
    reason: Mapping[int, Mark]
    mixing: Mapping[int, Mark]
    lengths: Lengths
    lumps: list[Lump]


def solve(labels: Labels, stored: Mapping[Stored, int], extra: Sequence[Mark] = ()) -> Solution:
    """Components, groups and lumps; ``extra`` marks are frozen as well."""
    component = components(labels)
    marks = [*labels.frozen, *extra]
    mixing = _first_mark(component, labels.mixed)
    arrays = _all_axes(labels)
    while True:  # an equation that cannot be kept freezes its channels, which may simplify others
        reason = _first_mark(component, marks)
        group, position, sizes = _group(labels, component, reason, arrays)
        lengths = _lengths(component, group, sizes, arrays)
        lumps, refused = _lumps(labels, stored, lengths, sizes)
        if not refused:  # a group without a lump, or in too tangled a system
            movable = {g for lump in lumps for g in lump.units}
            stuck = np.array([g not in movable for g in range(len(sizes))] + [False])  # group -1 is not stuck
            refused = _mark(np.flatnonzero(stuck[group[component]]), "the integers in the model leave no way to shrink")
        if not refused:
            return Solution(component, group, position, sizes, reason, mixing, lengths, lumps)
        marks = [*marks, *refused]


def components(labels: Labels) -> Array:
    """The component of each label under the collected equalities, shape (labels,)."""
    if not labels.links:
        return np.arange(labels.num_labels, dtype=np.int64)
    left = np.concatenate([a for a, _ in labels.links])
    right = np.concatenate([b for _, b in labels.links])
    graph = sparse.coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(labels.num_labels,) * 2)
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _first_mark(component: Array, marks: Sequence[Mark]) -> dict[int, Mark]:
    first: dict[int, Mark] = {}
    for mark in marks:
        for c in np.unique(component[mark.labels]).tolist():
            first.setdefault(c, mark)
    return first


def _all_axes(labels: Labels) -> list[Array]:
    """Every axis whose length matters: of parameters, in equations, and in the cost; each once."""
    arrays = [np.arange(axis.start, axis.start + axis.size, dtype=np.int64) for axis in labels.axes]
    for equation in labels.equations:
        arrays.append(equation.labels)
        arrays += [labels.of_axis(leaf) for leaf in leaves(equation.expression) if isinstance(leaf, AxisSize)]
    for balance in labels.balances:
        arrays += [balance.left, balance.right]
    for product in labels.products:
        arrays += product.axes
    return list({array.tobytes(): array for array in arrays}.values())


def _group(
    labels: Labels, component: Array, frozen: Mapping[int, Mark], arrays: Sequence[Array]
) -> tuple[Array, Array, Array]:
    """Units that have the same number of elements on every axis form a group; groups are in order of parameters."""
    num_components = int(component.max()) + 1
    removable = np.zeros(num_components, dtype=bool)
    for axis in labels.axes:
        if not axis.buffer:  # buffers go with parameters, never alone
            removable[component[axis.start : axis.start + axis.size]] = True
    removable[list(frozen)] = False
    removable[component[FIXED]] = False
    # units are compared through random projections of their counts: two 62-bit hashes never meet by accident
    generator = np.random.default_rng(0)
    signature = np.zeros((num_components, 2), dtype=np.int64)
    for array in arrays:
        members = component[array]
        for column in range(2):
            np.add.at(signature[:, column], members, generator.integers(1, 2**62))
    first = np.full(num_components, np.iinfo(np.int64).max)
    np.minimum.at(first, component, np.arange(len(component)))
    units = np.flatnonzero(removable)
    units = units[np.argsort(first[units], kind="stable")]
    _, leader, inverse = np.unique(signature[units], axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(leader), dtype=np.int64)
    rank[np.argsort(leader, kind="stable")] = np.arange(len(leader))
    group = np.full(num_components, -1, dtype=np.int64)
    group[units] = rank[inverse.reshape(-1)]
    position = np.zeros(num_components, dtype=np.int64)
    sizes = np.bincount(group[units], minlength=len(leader)).astype(np.int64)
    for g in range(len(leader)):
        members = units[group[units] == g]
        position[members] = np.arange(len(members))
    return group, position, sizes


def _lengths(component: Array, group: Array, sizes: Array, arrays: Sequence[Array]) -> Lengths:
    rows, columns, data, fixed = [], [], [], []
    for row, array in enumerate(arrays):
        found = group[component[array]]
        found = np.where(array == FIXED, -1, found)
        fixed.append(int((found < 0).sum()))
        counts = np.bincount(found[found >= 0], minlength=len(sizes)) if len(sizes) else np.zeros(0, dtype=np.int64)
        for g in np.flatnonzero(counts):
            rows.append(row)
            columns.append(g)
            data.append(counts[g] // sizes[g])  # every unit of a group has as many elements on the axis
    matrix = sparse.csr_matrix((data, (rows, columns)), shape=(len(arrays), len(sizes)), dtype=np.int64)
    return Lengths(matrix, np.array(fixed, dtype=np.int64), {a.tobytes(): row for row, a in enumerate(arrays)})


def _lumps(
    labels: Labels, stored: Mapping[Stored, int], lengths: Lengths, sizes: Array
) -> tuple[list[Lump], list[Mark]]:
    """The lumps, or the marks of channels that take part in equations which cannot be kept."""
    system = CountSystem(
        axis=lambda leaf: lengths.linear(labels.of_axis(leaf)), stored=stored, current=lambda g: int(sizes[g])
    )
    counted = [(equation, lengths.linear(equation.labels)) for equation in labels.equations]
    held = {e.expression for e, count in counted if isinstance(e.expression, Stored) and not count.terms}
    system.pin(labels.pinned)
    system.pin(held)
    system.vary({e.expression for e, count in counted if isinstance(e.expression, Stored) and count.terms})
    refused: list[Mark] = []
    for equation, count in sorted(counted, key=lambda pair: len(pair[1].terms)):
        try:
            system.add(equation.expression, count)
        except NotLinear as error:
            involved = [labels.of_axis(leaf) for leaf in leaves(equation.expression) if isinstance(leaf, AxisSize)]
            refused += _mark(np.concatenate([equation.labels, *involved]), f"{equation.why}: {error}")
            labels.pinned.update(leaf for leaf in leaves(equation.expression) if isinstance(leaf, Stored))
    for balance in labels.balances:
        system.balance(lengths.linear(balance.left), lengths.linear(balance.right))
    return (system.lumps(range(len(sizes))), []) if not refused else ([], refused)


def _mark(labels: Array, why: str) -> list[Mark]:
    live = labels[labels != FIXED]
    return [Mark(live, why)] if len(live) else []
