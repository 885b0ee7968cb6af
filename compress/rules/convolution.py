"""Convolutions of any dimension: plain, grouped, depthwise and transposed.

Shapes: input (N, C_in, *), weight (C_out, C_in / g, *k), transposed weight (C_in, C_out / g, *k).
"""

import math

import numpy as np

from compress.labels import FIXED, Array, Labels
from compress.origins import origin
from compress.recorder import Op, TensorRef
from compress.rules.registry import NoRule, rule


@rule("convolution", "convolution_overrideable", "cudnn_convolution", "mkldnn_convolution", "_convolution")
def convolution(labels: Labels, op: Op) -> None:
    """Contract the input's channels with the weight's input axis; the result carries the weight's output axis."""
    source, weight = _ref(op, "input", "self"), _ref(op, "weight")
    transposed = bool(op.arguments.get("transposed", False))
    groups = op.arguments["groups"]
    if len(source.shape) != len(weight.shape):
        raise NoRule("an input without a batch axis")
    axes = labels[source]
    rows, columns = labels[weight][:2]
    given, made = (rows, columns) if transposed else (columns, rows)
    for spatial in axes[2:]:
        labels.freeze(spatial, f"operator {op} slides along the axis")
    for kernel in labels[weight][2:]:
        labels.freeze(kernel, "kernel size of a convolution")
    if groups == 1:
        labels.link(axes[1], given, str(op))
        labels.consume(given)
        labels.produce(made)
        result = made
    else:
        result = _grouped(labels, op, axes[1], (given, made), transposed=transposed)
    labels.read(op, "input" if "input" in op.arguments else "self", 1, axes[1])
    bias = op.arguments.get("bias")
    if isinstance(bias, TensorRef):
        labels.follow(labels[bias][0], result, str(op))
    output = op.outputs[0]
    labels.set(output, [axes[0], result, *(labels.fixed(n) for n in output.shape[2:])])
    positions = math.prod(source.shape[2:] if transposed else output.shape[2:])
    labels.cost(output.shape[0] * positions * math.prod(weight.shape), (rows, columns))


def _grouped(labels: Labels, op: Op, source: Array, weight: tuple[Array, Array], *, transposed: bool) -> Array:
    """Remove the same positions from every group, or whole groups: whichever gives the finer choice."""
    groups = op.arguments["groups"]
    given, made = weight
    per_group_in, per_group_out = len(source) // groups, op.outputs[0].shape[1] // groups
    inputs = source.reshape(groups, per_group_in)
    # the weight holds one axis for all groups' channels (its rows), and one that the groups share (its columns)
    rows, shared = (given, made) if transposed else (made, given)
    stacked = rows.reshape(groups, -1)
    if min(per_group_in, per_group_out) >= groups:
        for group in inputs[1:]:
            labels.link(inputs[0], group, str(op))
        for group in stacked[1:]:
            labels.link(stacked[0], group, str(op))
        labels.link(inputs[0], given if not transposed else stacked[0], str(op))
        labels.equate(origin(op, "groups"), labels.fixed(groups), str(op))
        labels.consume(given)
        labels.produce(made)
        return rows if not transposed else np.tile(shared, groups)
    labels.freeze(shared, f"operator {op} removes whole groups")
    for blocks in (inputs, stacked):
        for column in blocks.T[1:]:
            labels.link(blocks[:, 0], column, str(op))
    labels.link(inputs[:, 0], stacked[:, 0], str(op))
    labels.equate(origin(op, "groups"), inputs[:, 0], str(op))
    whole = (inputs == FIXED).any(axis=1)
    labels.freeze(inputs[whole].reshape(-1), f"operator {op}: a group holds a fixed channel")
    result = rows if not transposed else np.repeat(stacked[:, 0], per_group_out)
    return np.where(np.repeat(whole, per_group_out), FIXED, result)  # fixed at once: later operators see it


def _ref(op: Op, *names: str) -> TensorRef:
    for name in names:
        found = op.arguments.get(name)
        if isinstance(found, TensorRef):
            return found
    raise NoRule("an argument that is not a tensor")
