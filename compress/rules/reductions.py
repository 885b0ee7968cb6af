"""Reductions and operators that mix the elements along an axis."""

from compress.labels import Labels
from compress.recorder import Op
from compress.rules.elementwise import pointwise
from compress.rules.registry import base_name, rule

_PICKING = ("argmax", "argmin", "max", "min", "median")  # their integers are positions (or values, of integers)


@rule("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "logsumexp", "linalg_vector_norm",
      "norm", "any", "all", "argmax", "argmin", "max", "min", "median")  # fmt: skip
def reduction(labels: Labels, op: Op) -> None:
    """The reduced axes go. Removing elements along one changes the result, so that is never exact.

    (Of a maximum: a removed channel does not count, one that is set to zero does.)
    """
    source = op.tensors[0]
    if len(op.tensors) > 1:  # max(a, b) is element by element
        pointwise(labels, op)
        return
    axes = labels[source]
    reduced = reduced_axes(op, len(axes))
    for axis in reduced:
        labels.mix(axes[axis], f"operator {op} reduces over the channels")
        for output in op.outputs:
            if not output.dtype.is_floating_point and base_name(op) in _PICKING:
                labels.positions(output, axes[axis], f"operator {op} returns positions along the axis")
    for output in op.outputs:
        if len(output.shape) == len(axes) and reduced:
            kept = [labels.fixed(1) if axis in reduced else axes[axis] for axis in range(len(axes))]
        else:
            kept = [axes[axis] for axis in range(len(axes)) if axis not in reduced]
        labels.set(output, kept)


def reduced_axes(op: Op, ndim: int) -> set[int]:
    """The axes that ``op`` reduces: all of them where none is named."""
    dims = op.arguments.get("dim")
    if dims is None or dims == ():
        return set(range(ndim))
    return {axis % ndim for axis in (dims if isinstance(dims, tuple) else (dims,))} if ndim else set()


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax")
def softmax(labels: Labels, op: Op) -> None:
    """Shape stays; the elements along the axis share their sum."""
    axes = labels[op.tensors[0]]
    labels.mix(axes[op.arguments["dim"] % len(axes)], f"operator {op} normalises over the channels")
    labels.set(op.outputs[0], axes)


@rule("sort", "topk", "kthvalue", "mode")
def ordering(labels: Labels, op: Op) -> None:
    """Order along the axis is what the result is about: the axis is frozen, the others pass."""
    axes = labels[op.tensors[0]]
    axis = op.arguments["dim"] % len(axes)
    labels.freeze(axes[axis], f"operator {op} orders the axis")
    for output in op.outputs:
        kept = [labels.fixed(output.shape[i]) if i == axis else axes[i] for i in range(len(output.shape))]
        labels.set(output, kept)
