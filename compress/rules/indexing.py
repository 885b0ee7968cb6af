"""Look-ups: embeddings, gathers and indices. The indexed axis is frozen, the others pass."""

from compress.labels import Labels
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
    source = op.tensors[0]
    axes = labels[source]
    indices = op.arguments["indices"]
    used = [axis for axis, given in enumerate(indices) if isinstance(given, TensorRef)]
    if not used or any(len(indices[axis].shape) == 0 for axis in used):
        raise NoRule("an index without an axis")
    for axis in used:
        labels.freeze(axes[axis], f"operator {op} picks positions along the axis")
    passing = [axis for axis in range(len(axes)) if axis not in used]
    shape = op.outputs[0].shape
    num_new = len(shape) - len(passing)
    together = used == list(range(used[0], used[-1] + 1))
    first = used[0] if together else 0  # where the axes of the indices go
    new = broadcast(labels, [indices[axis] for axis in used], shape[first : first + num_new], str(op))
    kept = [axes[axis] for axis in passing]
    labels.set(op.outputs[0], [*kept[:first], *new, *kept[first:]])


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
