"""Operators that move, join, cut and pad axes without changing any element."""

from collections.abc import Sequence

import numpy as np

from compress.labels import FIXED, Array, Labels
from compress.origins import origin, origins
from compress.provenance import Computed, Expression
from compress.recorder import Op
from compress.rules import views
from compress.rules.registry import rule


@rule("permute", "permute_copy")
def permute(labels: Labels, op: Op) -> None:
    """Axes in another order."""
    axes = labels[op.tensors[0]]
    labels.set(op.outputs[0], [axes[dim] for dim in op.arguments["dims"]])


@rule("transpose", "transpose_copy", "t")
def transpose(labels: Labels, op: Op) -> None:
    """Two axes change places; ``t`` swaps the axes of a matrix."""
    axes = list(labels[op.tensors[0]])
    first, second = op.arguments.get("dim0", 0), op.arguments.get("dim1", 1)
    if len(axes) > 1:
        axes[first], axes[second] = axes[second], axes[first]
    labels.set(op.outputs[0], axes)


@rule("unsqueeze", "squeeze", "unsqueeze_copy", "squeeze_copy")
def squeeze(labels: Labels, op: Op) -> None:
    """Axes of length one come and go."""
    output = op.outputs[0]
    labels.set(output, views.regroup(labels, labels[op.tensors[0]], output.shape, [None] * len(output.shape), str(op)))


@rule("cat")
def cat(labels: Labels, op: Op) -> None:
    """Labels join along the axis; along the others they meet."""
    output = op.outputs[0]
    dim = op.arguments.get("dim", 0) % len(output.shape)
    parts = [labels[ref] for ref in op.tensors if ref.shape != (0,)]  # cat skips empty vectors of any rank
    if not parts:
        labels.set(output, [labels.fixed(n) for n in output.shape])
        return
    result = list(parts[0])
    for part in parts[1:]:
        for axis, axis_labels in enumerate(part):
            if axis != dim:
                labels.follow(axis_labels, result[axis], str(op))
    result[dim] = np.concatenate([part[dim] for part in parts])
    labels.set(output, result)


@rule("stack")
def stack(labels: Labels, op: Op) -> None:
    """A new, fixed axis; along the others labels meet."""
    output = op.outputs[0]
    result = list(labels[op.tensors[0]])
    for ref in op.tensors[1:]:
        for known, axis_labels in zip(result, labels[ref], strict=True):
            labels.follow(axis_labels, known, str(op))
    dim = op.arguments.get("dim", 0) % len(output.shape)
    result.insert(dim, labels.fixed(len(op.tensors)))
    labels.set(output, result)


@rule("slice", "slice_copy")
def cut(labels: Labels, op: Op) -> None:
    """A range of one axis. Its bounds must follow what is removed before them, or nothing there may be removed."""
    axes = list(labels[op.tensors[0]])
    axis = op.arguments["dim"] % len(axes)
    length = len(axes[axis])
    start, stop, step = slice(op.arguments["start"], op.arguments["end"], op.arguments["step"]).indices(length)
    if step != 1:
        labels.freeze(axes[axis], f"operator {op} takes every {step}th element")
    _bound(labels, op, axes[axis], "start", start)
    _bound(labels, op, axes[axis], "end", stop)
    axes[axis] = axes[axis][start:stop:step]
    labels.set(op.outputs[0], axes)


def _bound(labels: Labels, op: Op, axis: Array, argument: str, position: int) -> None:
    if position in (0, len(axis)) and op.arguments[argument] in (None, 0, 2**63 - 1):
        return
    expression = origin(op, argument)
    if expression is None:
        expression = op.arguments[argument]
    if op.arguments[argument] < 0:  # counted from the end: -k leaves k elements after the bound
        after = axis[position:]
        labels.equate(_negate(expression), after, str(op))
        return
    labels.equate(expression, axis[: min(position, len(axis))], str(op))


def _negate(expression: Expression) -> Expression:
    """Minus the expression, the double minus of ``x[-k:]`` undone."""
    if isinstance(expression, int):
        return -expression
    if isinstance(expression, Computed) and expression.operator == "-" and expression.left == 0:
        return expression.right
    return Computed("-", 0, expression)


@rule("select", "select_copy", "unbind", "unbind_copy")
def select(labels: Labels, op: Op) -> None:
    """One position of an axis, or each in turn: the axis is frozen and goes."""
    axes = list(labels[op.tensors[0]])
    axis = op.arguments["dim"] % len(axes)
    labels.freeze(axes[axis], f"operator {op} picks positions along the axis")
    del axes[axis]
    for output in op.outputs:
        labels.set(output, axes)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "split_copy",
      "split_with_sizes_copy")  # fmt: skip
def split(labels: Labels, op: Op) -> None:
    """Consecutive ranges of one axis: of given lengths, or all equal."""
    axes = list(labels[op.tensors[0]])
    axis = op.arguments["dim"] % len(axes)
    lengths = [output.shape[axis] for output in op.outputs]
    ranges = np.split(axes[axis], np.cumsum(lengths)[:-1])
    if "split_sizes" in op.arguments:
        for size, part in zip(origins(op, "split_sizes"), ranges, strict=True):
            labels.equate(size, part, str(op))
    elif "split_size" in op.arguments and (size := origin(op, "split_size")) is not None and not _is_chunk(op):
        for part in ranges if len(set(lengths)) == 1 else ranges[:-1]:
            labels.equate(size, part, str(op))
    else:
        _keep_equal(labels, op, ranges)
    for output, part in zip(op.outputs, ranges, strict=True):
        labels.set(output, [*axes[:axis], part, *axes[axis + 1 :]])


def _is_chunk(op: Op) -> bool:
    return op.call is not None and op.call.name in ("chunk", "unsafe_chunk", "tensor_split")


def _keep_equal(labels: Labels, op: Op, ranges: Sequence[Array]) -> None:
    if len({len(part) for part in ranges}) > 1:
        for part in ranges:
            labels.freeze(part, f"operator {op} cuts the axis into unequal parts")
        return
    for part in ranges[1:]:
        labels.same_length(ranges[0], part, str(op))


@rule("constant_pad_nd")
def pad(labels: Labels, op: Op) -> None:
    """New elements before and after each axis, from the last backwards; their number must follow what is removed."""
    axes = list(labels[op.tensors[0]])
    amounts, sizes = op.arguments["pad"], origins(op, "pad")
    for pair in range(len(amounts) // 2):
        axis = len(axes) - 1 - pair
        if min(amounts[2 * pair : 2 * pair + 2]) < 0:
            labels.freeze(axes[axis], f"operator {op} crops the axis")
            axes[axis] = labels.fixed(op.outputs[0].shape[axis])
            continue
        ends = []
        for amount, size in zip(amounts[2 * pair :], sizes[2 * pair : 2 * pair + 2], strict=False):
            follows = size is not None and not isinstance(size, int)
            ends.append(labels.fresh(amount) if follows else labels.fixed(amount))
            if follows:
                labels.equate(size, ends[-1], str(op))
        axes[axis] = np.concatenate([ends[0], axes[axis], ends[1]])
    labels.set(op.outputs[0], axes)


@rule("roll")
def roll(labels: Labels, op: Op) -> None:
    """Elements move round an axis: frozen along it."""
    axes = labels[op.tensors[0]]
    for dim in op.arguments["dims"] or range(len(axes)):
        labels.freeze(axes[dim], f"operator {op} moves elements along the axis")
    labels.set(op.outputs[0], axes)


@rule("repeat")
def repeat(labels: Labels, op: Op) -> None:
    """The whole tensor several times along an axis: every copy carries the same labels."""
    output = op.outputs[0]
    axes: list[Array] = [labels.fixed(1)] * (len(output.shape) - len(op.tensors[0].shape)) + list(labels[op.tensors[0]])
    times = [new // max(len(axis), 1) for new, axis in zip(output.shape, axes, strict=True)]
    labels.set(output, [np.tile(axis, n) for axis, n in zip(axes, times, strict=True)])


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(labels: Labels, op: Op) -> None:
    """(N, C r^2, H, W) <-> (N, C, H r, W r): the r^2 channels that make one go together."""
    source, output = op.tensors[0], op.outputs[0]
    axes = labels[source]
    ndim = len(source.shape)
    axis = ndim - 3
    few, many = sorted((source.shape[axis], output.shape[axis]))
    for spatial in axes[-2:]:
        labels.freeze(spatial, f"operator {op} rearranges the axis")
    table = axes[axis].reshape(few, -1) if source.shape[axis] == many else axes[axis].reshape(few, 1)
    for column in table.T[1:]:
        labels.link(table[:, 0], column, str(op))
    channels = table[:, 0] if output.shape[axis] == few else np.repeat(table[:, 0], many // few)
    if (table == FIXED).any():
        labels.freeze(table.reshape(-1), f"operator {op}: part of a channel is fixed")
    labels.set(output, [*axes[:axis], channels, *(labels.fixed(n) for n in output.shape[axis + 1 :])])
