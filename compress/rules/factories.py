"""Tensors made from sizes alone: zeros, ranges, random numbers."""

from compress.labels import Labels
from compress.origins import origins
from compress.recorder import Op
from compress.rules.registry import rule


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
      "empty_strided", "new_empty_strided", "empty_permuted")  # fmt: skip
def factory(labels: Labels, op: Op) -> None:
    """An axis whose length is computed from sizes can follow them; one whose length is a plain number is fixed."""
    output = op.outputs[0]
    axes = []
    for size, expression in zip(output.shape, origins(op, "size"), strict=True):
        axis = labels.fixed(size) if isinstance(expression, int) else labels.fresh(size)
        labels.equate(None if isinstance(expression, int) else expression, axis, str(op))
        axes.append(axis)
    labels.set(output, axes)


@rule("arange", "linspace", "scalar_tensor", "eye", "tril_indices", "triu_indices", "randperm", "randint")
def sequence(labels: Labels, op: Op) -> None:
    """Values depend on the size: fixed (a size given as a number is caught by the check for values)."""
    labels.set(op.outputs[0], [labels.fixed(n) for n in op.outputs[0].shape])
