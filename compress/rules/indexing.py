"""Look-ups: embeddings, gathers and indices. The indexed axis is frozen, the others pass."""

import torch

from compress.labels import Array, Labels
from compress.recorder import Op, TensorRef
from compress.rules.elementwise import broadcast
from compress.rules.registry import NoRule, rule


@rule("embedding")
def embedding(labels: Labels, op: Op) -> None:
    """weight (V, D), indices (*): the result (*, D) carries the weight's width; the vocabulary is frozen."""
    weight, indices = op.tensors
    vocabulary, width = labels[weight]
    labels.freeze(vocabulary, f"operator {op} looks up rows")
    labels.produce(width)
    labels.set(op.outputs[0], [*labels[indices], width])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(labels: Labels, op: Op) -> None:
    """weight (V, D): sums, means or maxima of rows, (bags, D); what else is given only the backward pass reads."""
    vocabulary, width = labels[op.arguments["weight"]]
    labels.freeze(vocabulary, f"operator {op} looks up rows")
    labels.produce(width)
    result, *others = op.outputs
    labels.set(result, [labels.fixed(result.shape[0]), width])
    for other in others:
        labels.set(other, [labels.fixed(n) for n in other.shape])


@rule("index_select")
def index_select(labels: Labels, op: Op) -> None:
    """Picks along one axis by positions that are data."""
    axes = list(labels[op.tensors[0]])
    axis = op.arguments["dim"] % len(axes)
    labels.freeze(axes[axis], f"operator {op} picks positions along the axis")
    axes[axis] = labels[op.arguments["index"]][0]
    labels.set(op.outputs[0], axes)


@rule("index")
def index(labels: Labels, op: Op) -> None:
    """``x[i, :, j]`` with index tensors: indexed axes are frozen, and the axes of the indices take their place."""
    axes, first, num_new = _passing_axes(labels, op)
    shape = op.outputs[0].shape[first : first + num_new]
    indices = [given for given in op.arguments["indices"] if isinstance(given, TensorRef)]
    masks = any(_is_mask(given) for given in indices)  # how many positions those hold is data
    new = [labels.fixed(n) for n in shape] if masks else broadcast(labels, indices, shape, str(op))
    labels.set(op.outputs[0], [*axes[:first], *new, *axes[first:]])


@rule("index_put")
def index_put(labels: Labels, op: Op) -> None:
    """``x[i, :, j] = values``: indexed axes are frozen; the others meet those of the values, which may broadcast."""
    axes, first, num_new = _passing_axes(labels, op)
    place: list[Array | None] = [*axes[:first], *[None] * num_new, *axes[first:]]
    values = labels[op.arguments["values"]]
    for given, axis in zip(values, place[len(place) - len(values) :], strict=True):
        if axis is None:
            labels.freeze(given, f"operator {op} puts positions along the axis")
        elif len(given) != 1:
            labels.link(axis, given, str(op))
    labels.set(op.outputs[0], labels[op.tensors[0]])


def _passing_axes(labels: Labels, op: Op) -> tuple[list[Array], int, int]:
    """Of ``x[indices]``: labels of the axes without an index, where among them new axes go, and how many.

    Indexed axes are frozen. A mask of several axes stands for as many.
    """
    axes = labels[op.tensors[0]]
    used: list[int] = []
    position = num_new = 0
    for given in op.arguments["indices"]:
        width = len(given.shape) if given is not None and _is_mask(given) else 1
        if given is not None:
            used += range(position, position + width)
            num_new = max(num_new, 1 if _is_mask(given) else len(given.shape))
        position += width
    if not used or not num_new:
        raise NoRule("an index without an axis")
    for axis in used:
        labels.freeze(axes[axis], f"operator {op} picks positions along the axis")
    together = used == list(range(used[0], used[-1] + 1))
    return [axis for i, axis in enumerate(axes) if i not in used], used[0] if together else 0, num_new


def _is_mask(index: TensorRef) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


@rule("gather", "scatter", "scatter_add", "index_add", "index_copy", "index_fill")
def along_axis(labels: Labels, op: Op) -> None:
    """The named axis is frozen in every tensor; the others are element by element where their lengths agree."""
    output = op.outputs[0]
    ndim = len(output.shape)
    axis = op.arguments["dim"] % ndim
    result = [labels.fixed(n) for n in output.shape]
    for ref in op.tensors:
        if len(ref.shape) != ndim:
            continue
        for position, axis_labels in enumerate(labels[ref]):
            if position == axis or len(axis_labels) != output.shape[position]:
                labels.freeze(axis_labels, f"operator {op} picks positions along the axis")
            elif ref is op.tensors[0]:
                result[position] = axis_labels
            else:
                labels.link(result[position], axis_labels, str(op))
    labels.set(output, result)
