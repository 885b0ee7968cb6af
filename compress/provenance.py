"""Where an integer came from: stored on a module, read off a tensor's shape, or computed from those.

Code that runs a model is full of sizes: ``x.view(b, self.heads, c // self.heads)``. When channels go, some of these
integers must change, and only their origin tells which. While a model is traced, integers on modules and integers
read from shapes are instances of :class:`TracedInt`, which behaves as an ``int`` and remembers its expression.
(Repair "by equal value" cannot work: in many transformers the width of attention equals the width of the embedding.)
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from compress.containers import Path, Step, changed, parts


@dataclass(frozen=True, slots=True)
class Stored:
    """An integer kept on a module: attribute ``name`` of module ``module``, at ``path`` inside what that is."""

    module: str
    name: str
    path: Path = ()

    def at(self, step: Step) -> "Stored":
        """One step further inside."""
        return Stored(self.module, self.name, (*self.path, step))

    def __str__(self) -> str:
        inside = "".join(f"[{step!r}]" for step in self.path)
        return f"{self.module}.{self.name}{inside}".lstrip(".")


@dataclass(frozen=True, slots=True)
class AxisSize:
    """The length of axis ``axis`` of the recorded tensor ``tensor``."""

    tensor: int
    axis: int


@dataclass(frozen=True, slots=True)
class Computed:
    """An arithmetic operation on expressions; ``operator`` is a key of :data:`OPERATORS`."""

    operator: str
    left: "int | Stored | AxisSize | Computed"
    right: "int | Stored | AxisSize | Computed"


Expression = int | Stored | AxisSize | Computed

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


@dataclass(frozen=True, slots=True)
class SizeComparison:
    """``left == right`` was asked while the model ran, and was true: it must stay true."""

    left: Expression
    right: Expression


@dataclass(frozen=True, slots=True)
class ValueUse:
    """A size became a value (``c ** -0.5``, ``x / c``): removing channels would change what is computed."""

    expression: Expression
    how: str
    value: int


class Observations:
    """What traced integers were used for, apart from sizes of operators."""

    def __init__(self) -> None:
        self.comparisons: list[SizeComparison] = []
        self.value_uses: list[ValueUse] = []


# Integers are created all over a model's own code: there is no object to hand a recorder to, so the active one is here.
_active: list[Observations] = []


@contextmanager
def observing() -> Iterator[Observations]:
    """Collect the comparisons and value uses of traced integers inside the block."""
    observations = Observations()
    _active.append(observations)
    try:
        yield observations
    finally:
        _active.remove(observations)


def expression_of(value: int) -> Expression:
    """The origin of ``value``: its expression, or the number itself for a plain integer."""
    return value.expression if isinstance(value, TracedInt) else int(value)


def leaves(expression: Expression) -> Iterator[Stored | AxisSize]:
    """All stored integers and axis sizes in ``expression``."""
    if isinstance(expression, Computed):
        yield from leaves(expression.left)
        yield from leaves(expression.right)
    elif not isinstance(expression, int):
        yield expression


def evaluate(expression: Expression, values: Mapping[Stored | AxisSize, int]) -> int:
    """The integer that ``expression`` gives when its leaves have ``values``.

    Raises:
        KeyError: a leaf has no value.
        ZeroDivisionError: a divisor became zero.
    """
    if isinstance(expression, Computed):
        return OPERATORS[expression.operator](evaluate(expression.left, values), evaluate(expression.right, values))
    return expression if isinstance(expression, int) else values[expression]


class TracedInt(int):
    """An ``int`` that knows its expression, and keeps it through ``+ - * // %``."""

    expression: Expression

    def __new__(cls, value: int, expression: Expression) -> "TracedInt":
        traced = super().__new__(cls, value)
        traced.expression = expression
        return traced

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)  # a copy that outlives the trace is a plain number

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return self

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and _active and isinstance(other, int):
            _active[-1].comparisons.append(SizeComparison(self.expression, expression_of(other)))
        return bool(equal) if equal is not NotImplemented else NotImplemented

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return NotImplemented if equal is NotImplemented else not equal

    def __neg__(self) -> int:
        return TracedInt(int.__neg__(self), Computed("-", 0, self.expression))

    def __float__(self) -> float:
        _note_value_use(self, "turned into a float")
        return int.__float__(self)


def _note_value_use(value: TracedInt, how: str) -> None:
    if _active:
        _active[-1].value_uses.append(ValueUse(value.expression, how, int.__int__(value)))


def _arithmetic(symbol: str, method: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    plain = getattr(int, method)

    def apply(self: TracedInt, other: Any) -> Any:
        result = plain(self, other)
        if isinstance(other, float):
            _note_value_use(self, "combined with a float")
        if not isinstance(other, int) or isinstance(other, bool) or result is NotImplemented:
            return result
        pair = (expression_of(other), self.expression) if reflected else (self.expression, expression_of(other))
        return TracedInt(result, Computed(symbol, *pair))

    return apply


def _value_arithmetic(method: str) -> Callable[[TracedInt, Any], Any]:
    plain = getattr(int, method)

    def apply(self: TracedInt, other: Any) -> Any:
        result = plain(self, other)
        if result is not NotImplemented or isinstance(other, float):  # a float takes over without asking __float__
            _note_value_use(self, method.strip("_"))
        return result

    return apply


for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(TracedInt, f"__{_name}__", _arithmetic(_symbol, f"__{_name}__", reflected=False))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(_symbol, f"__r{_name}__", reflected=True))
for _name in ("truediv", "pow", "rtruediv", "rpow"):
    setattr(TracedInt, f"__{_name}__", _value_arithmetic(f"__{_name}__"))


def traced_size(tensor: int, shape: torch.Size) -> torch.Size:
    """``shape`` with every length traced to its axis of the recorded tensor ``tensor``."""
    return torch.Size([TracedInt(length, AxisSize(tensor, axis)) for axis, length in enumerate(shape)])


def traced_integers(value: Any, leaf: Stored) -> Any:
    """``value`` with every plain integer in it (also in containers) traced to its place below ``leaf``."""
    if type(value) is int:
        return TracedInt(value, leaf)
    return changed(value, lambda step, item: traced_integers(item, leaf.at(step)))


def stored_integers(value: Any, leaf: Stored) -> Iterator[tuple[Stored, int]]:
    """All plain integers in ``value``, which lies at ``leaf``."""
    if type(value) is int:
        yield leaf, value
    for step, item in parts(value):
        yield from stored_integers(item, leaf.at(step))
