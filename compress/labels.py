"""One integer label for every element of every axis of every tensor, and the equalities between labels.

Labels say which elements belong together: what carries the same label, or labels that were found equal, must be
removed together. Rules (:mod:`compress.rules`) say where each operator's labels go. Equalities are only collected
here; :mod:`compress.channels` solves them all at once.

Label 0 (:data:`FIXED`) marks an element that cannot be removed: batch and spatial axes, axes of length one, constants.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.provenance import AxisSize, Expression, Stored, leaves
from compress.recorder import Op, TensorRef

Array = npt.NDArray[np.int64]
FIXED = 0


@dataclass(frozen=True)
class ParameterAxis:
    """Axis ``axis`` of a parameter or buffer; its labels are ``start .. start + size - 1``."""

    parameter: str
    axis: int
    start: int
    size: int
    buffer: bool = False


@dataclass(frozen=True)
class SizeEquation:
    """The integer ``expression`` must equal the number of elements of ``labels`` that are kept."""

    expression: Expression
    labels: Array
    why: str


@dataclass(frozen=True)
class Balance:
    """As many elements of ``left`` as of ``right`` must be kept (``chunk`` cuts an axis into equal parts)."""

    left: Array
    right: Array
    why: str


@dataclass(frozen=True)
class Mark:
    """A property of some labels, and why: that they are frozen, or that an operator mixes them."""

    labels: Array
    why: str


@dataclass(frozen=True)
class Read:
    """An activation whose channels ``labels`` on ``axis`` are contracted: where a channel is used.

    ``op`` is the index of the operator in the evaluation run and ``argument`` the name of the activation there.
    """

    op: int
    argument: str
    axis: int
    labels: Array


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates of one operator: ``constant`` times the kept length of each axis in ``axes``."""

    constant: int
    axes: tuple[Array, ...]


@dataclass(frozen=True)
class Gap:
    """An operator without a rule, or used as its rule does not know (``why`` says which): what it touches is frozen."""

    op: Op
    why: str
    in_training: bool


@dataclass(frozen=True)
class Split:
    """An axis was split, and its labels put on the new axis ``chosen`` of ``lengths``; ``choices`` could have been.

    ``place`` names the decision: the module, the old length, the new lengths. What a module splits alike it must
    decide alike, as queries, keys and values meet later.
    """

    place: tuple[str, int, tuple[int, ...]]
    chosen: int
    choices: tuple[int, ...]
    merged: Array
    labels: Array


class Labels:
    """All labels of one trace. Rules call the methods below; nothing else changes the tables.

    ``decisions`` overrides where the labels of a split axis go, by the split's place.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, TensorRef]],
        decisions: Mapping[tuple[str, int, tuple[int, ...]], int] | None = None,
        buffers: Collection[str] = (),
    ) -> None:
        self.decisions = dict(decisions or {})
        self.splits: list[Split] = []
        self.contracted: list[Array] = []
        self.followers: list[tuple[Array, Array]] = []
        self.axes: list[ParameterAxis] = []
        self.links: list[tuple[Array, Array]] = []
        self.frozen: list[Mark] = []
        self.gaps: list[Gap] = []
        self.mixed: list[Mark] = []
        self.equations: list[SizeEquation] = []
        self.balances: list[Balance] = []
        self.producers: list[Array] = []
        self.consumers: list[Array] = []
        self.reads: list[Read] = []
        self.pointing: list[tuple[TensorRef, Mark]] = []
        self.products: list[Product] = []
        self.pinned: set[Stored] = set()
        self.num_labels = 1
        self.in_training = False
        self._of: dict[int, tuple[Array, ...]] = {}
        self._weights: set[int] = set()
        for name, ref in parameters:
            self._register(name, ref, buffer=name in buffers)

    def _register(self, name: str, ref: TensorRef, *, buffer: bool) -> None:
        labels = []
        for axis, size in enumerate(ref.shape):
            array = self.fresh(size)
            if size > 1:
                self.axes.append(ParameterAxis(name, axis, int(array[0]), size, buffer))
            labels.append(array)
        self._of[ref.id] = tuple(labels)
        self._weights.add(ref.id)

    # -- reading -----------------------------------------------------------------------------------------------------

    def __getitem__(self, ref: TensorRef) -> tuple[Array, ...]:
        """The labels of each axis; a tensor that no operator made is a constant, and fixed."""
        known = self._of.get(ref.id)
        return known if known is not None else tuple(self.fixed(size) for size in ref.shape)

    def of_axis(self, leaf: AxisSize) -> Array:
        """The labels of the axis whose length ``leaf`` is; empty for a tensor that took no part."""
        axes = self._of.get(leaf.tensor)
        return axes[leaf.axis] if axes is not None else self.fixed(0)

    def may_change(self, expression: Expression | None) -> bool:
        """Whether an integer of this origin can change: stored on a module, or read off an axis that can shrink."""
        return expression is None or any(
            isinstance(leaf, Stored) or (self.of_axis(leaf) != FIXED).any() for leaf in leaves(expression)
        )

    def is_weight(self, ref: TensorRef) -> bool:
        """Whether the tensor is a parameter or buffer, or computed from nothing else."""
        return ref.id in self._weights

    @staticmethod
    def fixed(size: int) -> Array:
        """Labels of an axis that cannot shrink."""
        return np.full(size, FIXED, dtype=np.int64)

    def fresh(self, size: int) -> Array:
        """New labels; an axis of length one gets none, as it can only be removed whole."""
        if size <= 1:
            return self.fixed(size)
        start = self.num_labels
        self.num_labels += size
        return np.arange(start, start + size, dtype=np.int64)

    # -- writing -----------------------------------------------------------------------------------------------------

    def set(self, ref: TensorRef, axes: Sequence[Array]) -> None:
        """Give ``ref`` its labels; what it has already (an in-place result) is linked to the new ones.

        Raises:
            ValueError: the labels do not fit the shape (the rule is wrong: its operator is frozen).
        """
        if tuple(len(labels) for labels in axes) != ref.shape:
            raise ValueError(f"labels of lengths {[len(labels) for labels in axes]} for a tensor of shape {ref.shape}")
        fitted = tuple(self.fixed(1) if len(labels) == 1 else labels for labels in axes)
        known = self._of.get(ref.id)
        if known is None:
            self._of[ref.id] = fitted
            return
        for old, new in zip(known, fitted, strict=True):
            self.link(old, new, "in-place result")

    def mark_weight(self, op: Op) -> None:
        """Note that the results of ``op`` are weights if all its tensors are."""
        if op.tensors and all(self.is_weight(ref) for ref in op.tensors):
            self._weights.update(ref.id for ref in op.outputs)

    def link(self, left: Array, right: Array, why: str) -> None:
        """Element ``i`` of ``left`` and of ``right`` are removed together; beside a fixed element nothing is."""
        if left is right or len(left) == 1:
            return
        differ = left != right
        if not differ.any():
            return
        left, right = left[differ], right[differ]
        fixed = (left == FIXED) | (right == FIXED)
        if fixed.any():
            self.freeze(np.maximum(left[fixed], right[fixed]), f"{why}: meets an axis of fixed length")
        if not fixed.all():
            self.links.append((left[~fixed], right[~fixed]))

    def freeze(self, labels: Array, why: str) -> None:
        """Never remove ``labels``, nor what is linked to them."""
        live = labels[labels != FIXED]
        if len(live):
            self.frozen.append(Mark(live, why))

    def positions(self, ref: TensorRef, labels: Array, why: str) -> None:
        """``ref`` holds positions among ``labels``: if anything uses it, none of them can go."""
        live = labels[labels != FIXED]
        if len(live):
            self.pointing.append((ref, Mark(live, why)))

    def mix(self, labels: Array, why: str) -> None:
        """An operator mixes these channels in a way that zero does not undo: removing any is not exact."""
        live = labels[labels != FIXED]
        if len(live):
            self.mixed.append(Mark(live, why))

    def equate(self, expression: Expression | None, labels: Array, why: str) -> None:
        """The integer ``expression`` is the length of ``labels``; None follows by itself."""
        if expression is None or len(labels) == 0:
            return
        if isinstance(expression, int):
            self.freeze(labels, f"{why}: the number {expression} is written in the code")
        else:
            self.equations.append(SizeEquation(expression, labels, why))

    def same_length(self, left: Array, right: Array, why: str) -> None:
        """As many elements of ``left`` as of ``right`` are kept."""
        if (left != FIXED).any() or (right != FIXED).any():
            self.balances.append(Balance(left, right, why))

    def produce(self, labels: Array) -> None:
        """Weight rows that make a channel."""
        self.producers.append(labels)

    def consume(self, labels: Array) -> None:
        """Weight slices through which a channel influences anything else."""
        self.consumers.append(labels)

    def contract(self, labels: Array) -> None:
        """Channels that two activations are contracted over (q k^T): they end where the first of them is made."""
        self.contracted.append(labels)
        self.consume(labels)

    def follow(self, part: Array, made: Array, why: str) -> None:
        """A part joins what is made of several (a bias, a term, something stacked): they are removed together, and
        where that ends in a product of activations, the part does."""
        self.link(part, made, why)
        if part is not made and part.any():  # (fixed elements have no role)
            self.followers.append((part, made))

    def read(self, op: Op, argument: str, axis: int, labels: Array) -> None:
        """Note where channels are used, for criteria that look at activations."""
        if not self.in_training and (labels != FIXED).any():
            self.reads.append(Read(op.index, argument, axis, labels))

    def cost(self, macs: int, axes: Sequence[Array]) -> None:
        """``macs`` multiply-accumulates that shrink with each of ``axes``."""
        if not self.in_training:
            lengths = int(np.prod([len(axis) for axis in axes], dtype=np.int64))
            self.products.append(Product(macs // lengths if lengths else 0, tuple(axes)))
