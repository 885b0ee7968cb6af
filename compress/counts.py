"""Which numbers of channels may be removed together, so that every integer in the model still fits.

Reshapes and cuts tie the numbers of channels of different groups: ``reshape(b, n, c // heads)`` needs
``n_embedding = head_size * n_heads``, ``chunk(2)`` needs two halves of one size. These are linear equations in the
numbers of kept units ``n_g``. Removing ``r`` units (one number a group) keeps them if ``A r = 0`` and ``r >= 0``. The
smallest such removals are the extreme rays of that cone: *lumps*, from which every selection is made.

Integers stored on modules are unknowns too. They may go up or down, so they are eliminated first, and each lump says by
how much it lowers them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from compress.provenance import AxisSize, Computed, Expression, Stored, evaluate, leaves

MAX_LUMPS = 512  # a connected system with more extreme rays than this is not worth the choice it offers


@dataclass(frozen=True)
class Lump:
    """The smallest removal that keeps all integers consistent.

    ``units`` is how many units of each group (by index) go; ``stored`` by how much each stored integer is lowered.
    """

    units: Mapping[int, int]
    stored: Mapping[Stored, int]


@dataclass
class Linear:
    """``constant + sum(coefficient * unknown)``: unknowns are group indices, stored integers, and quotients."""

    constant: Fraction = Fraction(0)
    terms: dict["Unknown", Fraction] = field(default_factory=dict)

    def plus(self, other: "Linear", factor: Fraction | int = 1) -> "Linear":
        terms = dict(self.terms)
        for unknown, coefficient in other.terms.items():
            terms[unknown] = terms.get(unknown, Fraction(0)) + factor * coefficient
        return Linear(self.constant + factor * other.constant, {u: c for u, c in terms.items() if c})

    def times(self, factor: Fraction | int) -> "Linear":
        return Linear().plus(self, factor)


@dataclass(frozen=True)
class Quotient:
    """An unknown integer that a division introduced."""

    id: int


Unknown = int | Stored | Quotient


class NotLinear(Exception):
    """Two sizes that can both change are multiplied or divided: their channels stay as they are."""


class CountSystem:
    """Collects the equations of one model and finds the lumps.

    Args:
        axis: the length of a recorded axis as a linear form in the groups' numbers of units.
        stored: the current values of integers on modules.
        current: the current value of a linear form's unknown group.
    """

    def __init__(
        self, axis: Callable[[AxisSize], Linear], stored: Mapping[Stored, int], current: Callable[[int], int]
    ) -> None:
        self._axis = axis
        self._stored = stored
        self._current = current
        self._pinned: set[Stored] = set()
        self._varying: set[Stored] = set()
        self._constant: dict[Expression, int] = {}
        self._quotients: dict[object, Quotient] = {}
        self._rows: dict[frozenset[tuple[Unknown, Fraction]], Linear] = {}

    def pin(self, integers: Iterable[Stored]) -> None:
        """These stored integers must not change."""
        self._pinned.update(integers)

    def vary(self, integers: Iterable[Stored]) -> None:
        """These stored integers are the length of something that can shrink (tell before adding equations)."""
        self._varying.update(integers)

    def add(self, expression: Expression, count: Linear) -> None:
        """``expression == count`` must stay true. What is said first to be constant may be multiplied later.

        Raises:
            NotLinear: sizes that can both change are multiplied.
        """
        stays = isinstance(expression, Computed) and not count.terms
        if stays and expression.operator == "//" and self._moves(expression.right):  # type: ignore[union-attr]
            # C // heads == head_size, where the head size stays: C == head_size * heads
            product = Computed("*", int(count.constant), expression.right)  # type: ignore[union-attr]
            self._append(self._linear(expression.left).plus(self._linear(product), -1))  # type: ignore[union-attr]
        else:
            self._append(self._linear(expression).plus(count, -1))
        if stays:
            self._constant[expression] = int(count.constant)

    def balance(self, left: Linear, right: Linear) -> None:
        """Two lengths stay equal."""
        self._append(left.plus(right, -1))

    def _append(self, row: Linear) -> None:
        if row.terms:
            self._rows.setdefault(frozenset(row.terms.items()), row)

    def _moves(self, expression: Expression) -> bool:
        if expression in self._constant:
            return False
        for leaf in leaves(expression):
            if isinstance(leaf, Stored):
                if leaf in self._varying and leaf not in self._pinned:
                    return True
            elif self._axis(leaf).terms:
                return True
        return False

    def _value(self, expression: Expression) -> int:
        values = {leaf: self._leaf_value(leaf) for leaf in leaves(expression)}
        return evaluate(expression, values)

    def _leaf_value(self, leaf: Stored | AxisSize) -> int:
        if isinstance(leaf, Stored):
            return self._stored[leaf]
        form = self._axis(leaf)
        return int(form.constant + sum(c * self._current(g) for g, c in form.terms.items() if isinstance(g, int)))

    def _linear(self, expression: Expression) -> Linear:
        if isinstance(expression, int):
            return Linear(Fraction(expression))
        if expression in self._constant:
            return Linear(Fraction(self._constant[expression]))
        if isinstance(expression, AxisSize):
            return self._axis(expression)
        if isinstance(expression, Stored):
            if expression in self._pinned:
                return Linear(Fraction(self._stored[expression]))
            return Linear(terms={expression: Fraction(1)})
        return self._operation(expression)

    def _operation(self, expression: Computed) -> Linear:
        left, right = expression.left, expression.right
        if expression.operator in ("+", "-"):
            return self._linear(left).plus(self._linear(right), 1 if expression.operator == "+" else -1)
        for this, other in ((left, right), (right, left)):
            if expression.operator == "*" and not self._moves(other):
                return self._linear(this).times(self._held(other))
        if expression.operator in ("//", "%") and not self._moves(right):
            divisor = self._held(right)
            dividend = self._linear(left)
            quotient, remainder = divmod(self._value(left), divisor)
            if not dividend.terms:
                return Linear(Fraction(quotient if expression.operator == "//" else remainder))
            key = (frozenset(dividend.terms.items()), dividend.constant, divisor)
            unknown = self._quotients.setdefault(key, Quotient(len(self._quotients)))
            self._append(dividend.plus(Linear(Fraction(remainder), {unknown: Fraction(divisor)}), -1))
            return Linear(terms={unknown: Fraction(1)}) if expression.operator == "//" else Linear(Fraction(remainder))
        raise NotLinear(f"{expression.operator} of two sizes that can both change")

    def _held(self, expression: Expression) -> int:
        if expression in self._constant:
            return self._constant[expression]
        self._pinned.update(leaf for leaf in leaves(expression) if isinstance(leaf, Stored))
        return self._value(expression)

    # -- solving -----------------------------------------------------------------------------------------------------

    def lumps(self, groups: Iterable[int]) -> list[Lump]:
        """All lumps over ``groups``; connected groups that have too many to list get none."""
        rows = [
            {u: c for u, c in row.terms.items() if not (isinstance(u, Stored) and u in self._pinned)}
            for row in self._rows.values()
        ]
        solved, rows = _eliminate(rows)
        rays = [ray for members, part in _connected(list(groups), rows) for ray in _extreme_rays(members, part)]
        return [_with_unknowns(ray, solved) for ray in rays]


Row = dict[Unknown, Fraction]


def _eliminate(rows: Sequence[Row]) -> tuple[dict[Unknown, Row], list[Row]]:
    """Solve for every unknown that is not a group; what remains ties groups only."""
    solved: dict[Unknown, Row] = {}
    remaining: list[Row] = []
    for given in rows:
        row = _substituted(given, solved)
        free = next((u for u in row if not isinstance(u, int)), None)
        if free is None:
            if row:
                remaining.append(row)
            continue
        factor = row.pop(free)
        definition = {u: -c / factor for u, c in row.items()}
        for unknown, other in solved.items():
            if free in other:
                solved[unknown] = _substituted(other, {free: definition})
        solved[free] = definition
        remaining = [r for r in (_substituted(r, {free: definition}) for r in remaining) if r]
    return solved, remaining


def _substituted(row: Row, solved: Mapping[Unknown, Row]) -> Row:
    result: Row = {}
    for unknown, coefficient in row.items():
        for inner, factor in solved[unknown].items() if unknown in solved else ((unknown, Fraction(1)),):
            result[inner] = result.get(inner, Fraction(0)) + coefficient * factor
    return {u: c for u, c in result.items() if c}


def _connected(groups: Sequence[int], rows: Sequence[Row]) -> list[tuple[list[int], list[Row]]]:
    parent = {group: group for group in groups}

    def root(group: int) -> int:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    for row in rows:
        members = [u for u in row if isinstance(u, int)]
        for member in members[1:]:
            parent[root(member)] = root(members[0])
    parts: dict[int, tuple[list[int], list[Row]]] = {}
    for group in groups:
        parts.setdefault(root(group), ([], []))[0].append(group)
    for row in rows:
        parts[root(next(u for u in row if isinstance(u, int)))][1].append(row)
    return list(parts.values())


def _extreme_rays(groups: Sequence[int], rows: Sequence[Row]) -> list[dict[int, int]]:
    """Extreme rays of ``{r >= 0, rows r = 0}`` by the double description method (Motzkin et al. 1953).

    None are returned where there would be more than :data:`MAX_LUMPS`.
    """
    rays: list[dict[int, int]] = [{group: 1} for group in groups]
    for row in _independent(rows):
        values = [sum((row.get(g, Fraction(0)) * n for g, n in ray.items()), Fraction(0)) for ray in rays]
        kept = [ray for ray, value in zip(rays, values, strict=True) if value == 0]
        above = [(ray, value) for ray, value in zip(rays, values, strict=True) if value > 0]
        below = [(ray, value) for ray, value in zip(rays, values, strict=True) if value < 0]
        if len(above) * len(below) > MAX_LUMPS**2:
            return []
        made = [_combined(up, -down_value, down, up_value) for up, up_value in above for down, down_value in below]
        rays = _minimal(kept + made)
        if len(rays) > MAX_LUMPS:
            return []
    return rays


def _independent(rows: Sequence[Row]) -> list[Row]:
    basis: list[tuple[Unknown, Row]] = []
    for given in rows:
        row = dict(given)
        for pivot, other in basis:
            if pivot in row:
                factor = row[pivot] / other[pivot]
                row = {u: row.get(u, Fraction(0)) - factor * other.get(u, Fraction(0)) for u in {*row, *other}}
                row = {u: c for u, c in row.items() if c}
        if row:
            basis.append((next(iter(row)), row))
    return [row for _, row in basis]


def _combined(left: dict[int, int], a: Fraction, right: dict[int, int], b: Fraction) -> dict[int, int]:
    total = {g: a * left.get(g, 0) + b * right.get(g, 0) for g in {*left, *right}}
    return _whole(total)


def _whole(ray: Mapping[int, Fraction]) -> dict[int, int]:
    scale = math.lcm(*(value.denominator for value in ray.values()))
    whole = {g: int(value * scale) for g, value in ray.items()}
    divisor = math.gcd(*whole.values())
    return {g: value // divisor for g, value in sorted(whole.items())}


def _minimal(rays: Sequence[dict[int, int]]) -> list[dict[int, int]]:
    unique = {tuple(ray.items()): ray for ray in rays}
    supports = [frozenset(ray) for ray in unique.values()]
    smallest = {s for s in supports if not any(other < s for other in supports)}
    return [ray for ray, support in zip(unique.values(), supports, strict=True) if support in smallest]


def _with_unknowns(ray: Mapping[int, int], solved: Mapping[Unknown, Row]) -> Lump:
    changes = {u: sum((c * ray.get(g, 0) for g, c in row.items() if isinstance(g, int)), Fraction(0))
               for u, row in solved.items()}  # fmt: skip
    scale = math.lcm(1, *(change.denominator for change in changes.values()))
    stored = {u: int(change * scale) for u, change in changes.items() if isinstance(u, Stored) and change}
    return Lump({g: n * scale for g, n in ray.items()}, stored)
