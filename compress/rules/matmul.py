"""Matrix products: the contracted axes meet, the result carries the outer axes."""

import math
from collections.abc import Sequence

from compress.labels import Array, Labels
from compress.recorder import Op, TensorRef
from compress.rules.registry import NoRule, rule


@rule("mm", "mv", "dot", "vdot", "bmm")
def product(labels: Labels, op: Op) -> None:
    """``a @ b`` of matrices, batches of matrices, or vectors."""
    left, right = op.tensors
    _contract(labels, op, left, right)


@rule("addmm", "addmv", "baddbmm", "addbmm")
def product_plus(labels: Labels, op: Op) -> None:
    """``bias + a @ b``, the bias broadcast."""
    bias, left, right = op.tensors
    if len(op.outputs[0].shape) != len(left.shape) + len(right.shape) - 2 - (len(left.shape) == 3):
        raise NoRule("a sum over the batch")
    _contract(labels, op, left, right)
    result = labels[op.outputs[0]]
    for axis, bias_labels in zip(result[::-1], labels[bias][::-1], strict=False):
        if len(axis) == len(bias_labels):
            labels.follow(bias_labels, axis, str(op))


@rule("_trilinear")
def trilinear(labels: Labels, op: Op) -> None:
    """Three tensors, each with axes of length 1 inserted, multiplied and summed over some axes: nn.Bilinear."""
    summed, weights = op.arguments["sumdim"], [labels.is_weight(ref) for ref in op.tensors]
    if not any(weights):
        raise NoRule("a product of three activations")
    aligned: dict[int, Array] = {}
    for name, ref, is_weight in zip(("i1", "i2", "i3"), op.tensors, weights, strict=True):
        inserted = op.arguments[f"expand{name[1]}"]
        places = [place for place in range(len(ref.shape) + len(inserted)) if place not in inserted]
        for axis, (place, own) in enumerate(zip(places, labels[ref], strict=True)):
            if place in aligned and len(own) != len(aligned[place]):
                raise NoRule("an axis that is broadcast")
            labels.link(own, aligned.setdefault(place, own), str(op))
            if not is_weight:
                labels.read(op, name, axis, own)
            elif place in summed:
                labels.consume(own)
            else:
                labels.produce(own)
    labels.set(op.outputs[0], [aligned[place] for place in sorted(aligned) if place not in summed])
    axes = list(aligned.values())
    labels.cost(math.prod(map(len, axes)), axes)


def _contract(labels: Labels, op: Op, left: TensorRef, right: TensorRef) -> None:
    a, b = labels[left], labels[right]
    batch: list[Array] = []
    if len(a) == 3:
        labels.link(a[0], b[0], str(op))
        batch.append(a[0])
    inner_a = a[-1]
    inner_b = b[-2] if len(b) > 1 else b[0]
    labels.link(inner_a, inner_b, str(op))
    rows, columns = list(a[len(batch) : -1]), list(b[-1:]) if len(b) > 1 else []
    labels.set(op.outputs[0], [*batch, *rows, *columns])
    _roles(labels, op, ((left, inner_a, rows), (right, inner_b, columns)))
    macs_axes = (*batch, *rows, inner_a, *columns)
    macs = 1
    for axis in macs_axes:
        macs *= len(axis)
    labels.cost(macs, macs_axes)


def _roles(labels: Labels, op: Op, sides: Sequence[tuple[TensorRef, Array, list[Array]]]) -> None:
    """The weight consumes along the contracted axis and produces along its other one; of two activations, the first."""
    weights = [labels.is_weight(ref) for ref, _, _ in sides]
    names = [name for name, value in op.arguments.items() if isinstance(value, TensorRef)][-2:]
    if not any(weights):
        labels.contract(sides[0][1])
        return
    for position, (ref, inner, outer) in enumerate(sides):
        if not weights[position]:
            axis = len(ref.shape) - 1 if position == 0 else max(len(ref.shape) - 2, 0)
            labels.read(op, names[position], axis, inner)
            continue
        labels.consume(inner)
        for axis_labels in outer:
            labels.produce(axis_labels)
