"""Fourier transforms and complex numbers."""

from compress.labels import Labels
from compress.recorder import Op
from compress.rules.registry import rule


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(labels: Labels, op: Op) -> None:
    """Axes that are transformed are frozen, whatever their new length; the others pass."""
    axes = list(labels[op.tensors[0]])
    for dim in op.arguments["dim"]:
        axis = dim % len(axes)
        labels.freeze(axes[axis], f"operator {op} transforms the axis")
        axes[axis] = labels.fixed(op.outputs[0].shape[axis])
    labels.set(op.outputs[0], axes)


@rule("view_as_real")
def to_pairs(labels: Labels, op: Op) -> None:
    """(*) complex to (*, 2): real and imaginary parts."""
    labels.set(op.outputs[0], [*labels[op.tensors[0]], labels.fixed(2)])


@rule("view_as_complex")
def from_pairs(labels: Labels, op: Op) -> None:
    """(*, 2) to (*) complex."""
    *axes, pair = labels[op.tensors[0]]
    labels.freeze(pair, f"operator {op} makes one number of two")
    labels.set(op.outputs[0], axes)
