"""Reshaping: where labels go when axes are merged and split.

A reshape is cut into independent pieces, in each of which a few axes become a few others of the same product. Axes are
merged first (one label for each pair of elements), then split. Splitting C -> (H, D) must put the labels on one of the
new axes: one along which they vary alone costs nothing (that undoes an earlier merge); otherwise elements at the same
position of the chosen axis are linked, and the axis with most elements leaves most freedom. An axis whose length is a
number written in the code cannot shrink and is chosen last.
"""

import math
from collections.abc import Sequence

import numpy as np

from compress.labels import FIXED, Array, Labels, Split
from compress.origins import origins
from compress.provenance import AxisSize, Computed, Expression, expression_of
from compress.recorder import Op
from compress.rules.registry import NoRule, rule


@rule("view", "_unsafe_view", "_reshape_alias", "_reshape_copy", "view_copy")
def view(labels: Labels, op: Op) -> None:
    """Merge and split axes; the integers of the new shape must follow what is removed."""
    source, output = op.tensors[0], op.outputs[0]
    if 0 in source.shape:
        raise NoRule("an empty tensor")
    if output.dtype != source.dtype:
        raise NoRule("a view as another dtype")
    sizes = origins(op, "size")
    labels.set(output, regroup(labels, labels[source], output.shape, sizes, str(op), op.module))
    for size, axis in zip(sizes, labels[output], strict=True):
        labels.equate(size, axis, str(op))


def regroup(
    labels: Labels,
    axes: Sequence[Array],
    shape: Sequence[int],
    sizes: Sequence[Expression | None],
    why: str,
    module: str = "",
) -> list[Array]:
    """Labels of the axes of ``shape`` after reshaping a tensor whose axes carry ``axes``."""
    result = [labels.fixed(n) for n in shape]
    for old, new in pieces([len(axis) for axis in axes], shape):
        merged = _merge(labels, [axes[i] for i in old], why)
        parts = _split(labels, merged, [(shape[i], sizes[i]) for i in new], why, module)
        for position, part in zip(new, parts, strict=True):
            result[position] = part
    return result


def pieces(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of axis lists, ``old`` to ``new``, of equal products and as short as can be, without axes of length one.

    >>> pieces([2, 12, 5, 1], [2, 3, 4, 5])
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    olds, news = [i for i, n in enumerate(old) if n != 1], [i for i, n in enumerate(new) if n != 1]
    found: list[tuple[list[int], list[int]]] = []
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        a, b = old[left[0]], new[right[0]]
        while a != b:
            if a < b:
                left.append(olds.pop(0))
                a *= old[left[-1]]
            else:
                right.append(news.pop(0))
                b *= new[right[-1]]
        found.append((left, right))
    return found


def _merge(labels: Labels, axes: Sequence[Array], why: str) -> Array:
    live = [i for i, axis in enumerate(axes) if (axis != FIXED).any()]
    if len(axes) == 1:
        return axes[0]
    lengths = [len(axis) for axis in axes]
    if not live:
        return labels.fixed(int(np.prod(lengths)))
    kept = max(live, key=lambda i: len(np.unique(axes[i])))
    for i in live:
        if i != kept:
            labels.freeze(axes[i], f"{why}: two axes that could both shrink become one")
    position = [1] * len(axes)
    position[kept] = lengths[kept]
    return np.broadcast_to(axes[kept].reshape(position), lengths).reshape(-1)


def _split(
    labels: Labels, merged: Array, new: Sequence[tuple[int, Expression | None]], why: str, module: str
) -> list[Array]:
    lengths = [length for length, _ in new]
    result = [labels.fixed(length) for length in lengths]
    if len(new) == 1:
        return [merged]
    if not (merged != FIXED).any():
        return result
    grid = merged.reshape(lengths)
    rows = [np.moveaxis(grid, axis, -1).reshape(-1, length) for axis, length in enumerate(lengths)]
    free = [axis for axis, table in enumerate(rows) if (table == table[0]).all()]
    if free:
        result[free[0]] = rows[free[0]][0]
        return result
    # a literal length cannot follow; of the others the longest links the fewest elements to each other
    able = tuple(axis for axis in range(len(new)) if not isinstance(new[axis][1], int) and lengths[axis] > 1)
    own = tuple(length // _outer(labels, size) for length, size in new)
    place = (module, math.prod(own), own)
    chosen = labels.decisions.get(place, max(able or range(len(new)), key=lambda axis: own[axis]))
    table = rows[chosen]
    for row in table[1:]:
        labels.link(table[0], row, f"{why}: splits an axis")
    result[chosen] = table.max(axis=0)
    labels.splits.append(Split(place, chosen, able, merged, result[chosen]))
    return result


def _outer(labels: Labels, size: Expression | None) -> int:
    """What of ``batch * heads`` is batch: decisions are about the rest, which is alike whatever the batch."""
    if not isinstance(size, Computed) or size.operator != "*":
        return 1
    outer = 1
    for factor in (size.left, size.right):
        if isinstance(factor, AxisSize) and not labels.may_change(factor):
            outer *= len(labels.of_axis(factor)) or 1
        else:
            outer *= _outer(labels, factor)
    return outer


@rule("expand", "expand_copy")
def expand(labels: Labels, op: Op) -> None:
    """An axis that is repeated from length one is new: it follows the size that it was given, if that can change."""
    source, output = op.tensors[0], op.outputs[0]
    offset = len(output.shape) - len(source.shape)
    axes = []
    for position, (length, size) in enumerate(zip(output.shape, origins(op, "size"), strict=True)):
        old = labels[source][position - offset] if position >= offset else labels.fixed(1)
        if len(old) == length:
            axes.append(old)
        elif not _may_change(labels, op, size, length):
            axes.append(labels.fixed(length))
        else:
            axes.append(labels.fresh(length))
            labels.equate(size, axes[-1], str(op))
    labels.set(output, axes)


def _may_change(labels: Labels, op: Op, size: Expression | None, length: int) -> bool:
    given = [expression_of(number) for number in (op.call.flat if op.call else ()) if int(number) == length]
    if size is not None or not given:
        return labels.may_change(size)
    return any(labels.may_change(number) for number in given)  # x.repeat_interleave(n, dim) expands by n inside


@rule("as_strided")
def as_strided(labels: Labels, op: Op) -> None:
    """Only where nothing changes but strides."""
    source, output = op.tensors[0], op.outputs[0]
    if source.shape != output.shape:
        raise NoRule("memory is read in another shape")
    labels.set(output, labels[source])
