"""Operators that work element by element: labels meet position by position, broadcast axes meet nothing."""

from collections.abc import Callable, Sequence

import numpy as np

from compress.labels import FIXED, Array, Labels
from compress.recorder import Op, TensorRef
from compress.rules.registry import NoRule, rule

Meet = Callable[[Array, Array, str], None]


@rule(
    "where", "copy", "addcmul", "addcdiv", "masked_fill", "lerp", "threshold_backward", "_prelu_kernel",
    "hardswish", "floor_divide",
    "leaky_relu", "elu", "celu", "selu", "hardtanh", "hardsigmoid",  # (some have no tag in PyTorch 2.11)
)  # fmt: skip
def pointwise(labels: Labels, op: Op) -> None:
    """Also every operator that PyTorch tags as pointwise: the result at a position depends on that position alone."""
    if not op.outputs:
        return
    for output in op.outputs:
        labels.set(output, broadcast(labels, op.tensors, output.shape, str(op)))


@rule("add", "sub")
def plus(labels: Labels, op: Op) -> None:
    """Where the sum ends in a product of activations, so does each of its terms."""
    for output in op.outputs:
        labels.set(output, broadcast(labels, op.tensors, output.shape, str(op), meet=labels.follow))


def broadcast(
    labels: Labels, tensors: Sequence[TensorRef], shape: Sequence[int], why: str, *, meet: Meet | None = None
) -> list[Array]:
    """Labels of the result of broadcasting ``tensors`` to ``shape``; axes of full length ``meet``: are linked, if None.

    What meets a fixed element is fixed at once, so that later operators do not take it for one that could shrink.
    """
    result: list[Array | None] = [None] * len(shape)
    for ref in tensors:
        offset = len(shape) - len(ref.shape)
        if offset < 0:
            raise NoRule(f"an operand of shape {ref.shape} for a result of shape {tuple(shape)}")
        for axis, axis_labels in enumerate(labels[ref]):
            length = shape[offset + axis]
            if length == 1 or len(axis_labels) != length:
                continue
            known = result[offset + axis]
            if known is None:
                result[offset + axis] = axis_labels
            else:
                (meet or labels.link)(axis_labels, known, why)
                result[offset + axis] = np.where(axis_labels == FIXED, FIXED, known)
    return [labels.fixed(n) if found is None else found for found, n in zip(result, shape, strict=True)]


@rule("log_sigmoid_forward")
def log_sigmoid(labels: Labels, op: Op) -> None:
    """Element by element; what is kept for the backward pass is empty on some devices."""
    source = op.tensors[0]
    for output in op.outputs:
        labels.set(output, labels[source] if output.shape == source.shape else [labels.fixed(n) for n in output.shape])


@rule("glu")
def gated_linear_unit(labels: Labels, op: Op) -> None:
    """``a * sigmoid(b)`` of the two halves of an axis: element i of one goes with element i of the other."""
    axes = list(labels[op.tensors[0]])
    axis = op.arguments["dim"] % len(axes)
    values, gates = axes[axis].reshape(2, -1)
    labels.link(values, gates, str(op))
    axes[axis] = values
    labels.set(op.outputs[0], axes)


@rule(
    "clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "native_dropout", "_fused_dropout",
    "bernoulli", "uniform", "normal", "random", "exponential", "zero", "fill", "cumsum", "cumprod", "flip",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "_conj", "_neg_view",
)  # fmt: skip
def same_shape(labels: Labels, op: Op) -> None:
    """Results of the shape of the first tensor, whose length along each axis follows it."""
    source = op.tensors[0]
    frozen = _ordered_axes(op, len(source.shape))
    for axis in frozen:
        labels.freeze(labels[source][axis], f"operator {op} depends on the order along the axis")
    for output in op.outputs:
        if output.shape != source.shape:
            raise NoRule("a result of another shape")
        labels.set(output, labels[source])


def _ordered_axes(op: Op, ndim: int) -> list[int]:
    if op.func._schema.name.rstrip("_") in ("aten::cumsum", "aten::cumprod"):
        return [op.arguments["dim"] % ndim] if ndim else []
    if op.func._schema.name == "aten::flip":
        return [axis % ndim for axis in op.arguments["dims"]]
    return []
