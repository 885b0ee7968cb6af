import itertools
import random
from fractions import Fraction

import pytest

from compress.counts import CountSystem, Linear, NotLinear
from compress.provenance import AxisSize, Computed, Stored, evaluate

WIDTH, HEADS = Stored("m", "width"), Stored("m", "heads")


def _system(sizes: dict[int, int], stored=None, axes=None) -> CountSystem:
    """Groups ``sizes`` with their numbers of units; axis ``AxisSize(g, 0)`` is ``axes[g]`` long (a linear form)."""
    forms = axes or {g: Linear(terms={g: Fraction(1)}) for g in sizes}
    return CountSystem(axis=lambda leaf: forms[leaf.tensor], stored=stored or {}, current=sizes.__getitem__)


def _count(constant: int = 0, **terms: int) -> Linear:
    return Linear(Fraction(constant), {int(name[1:]): Fraction(n) for name, n in terms.items() if n})


def _units(lumps) -> set[tuple[tuple[int, int], ...]]:
    return {tuple(sorted(lump.units.items())) for lump in lumps}


def test_without_equations_every_group_is_a_lump() -> None:
    assert _units(_system({0: 5, 1: 7}).lumps([0, 1])) == {((0, 1),), ((1, 1),)}


def test_an_equation_ties_groups_by_its_coefficients() -> None:
    system = _system({0: 12, 1: 3})  # embedding = 4 heads
    system.balance(_count(g0=1), _count(g1=4))
    assert _units(system.lumps([0, 1])) == {((0, 4), (1, 1))}


def test_a_stored_integer_is_free_and_lowered() -> None:
    system = _system({0: 5, 1: 7}, {WIDTH: 15})
    system.vary([WIDTH])
    system.add(WIDTH, _count(3, g0=1, g1=1))
    lumps = system.lumps([0, 1])
    assert {tuple(lump.units.items()): dict(lump.stored) for lump in lumps} == {
        ((0, 1),): {WIDTH: 1}, ((1, 1),): {WIDTH: 1}}  # fmt: skip


def test_a_pinned_integer_holds_its_groups() -> None:
    system = _system({0: 5, 1: 7}, {WIDTH: 12})
    system.pin([WIDTH])
    system.add(WIDTH, _count(g0=1, g1=1))
    assert system.lumps([0, 1]) == []


def test_one_stored_integer_for_two_axes_ties_them() -> None:
    system = _system({0: 5, 1: 5}, {WIDTH: 5})
    system.vary([WIDTH])
    system.add(WIDTH, _count(g0=1))
    system.add(WIDTH, _count(g1=1))
    (lump,) = system.lumps([0, 1])
    assert dict(lump.units) == {0: 1, 1: 1}
    assert dict(lump.stored) == {WIDTH: 1}


def test_a_quotient_moves_in_whole_steps() -> None:
    """C // 2 elements, where C is the length of group 0: they go two by two."""
    system = _system({0: 8, 1: 4})
    system.add(Computed("//", AxisSize(0, 0), 2), _count(g1=1))
    (lump,) = system.lumps([0, 1])
    assert dict(lump.units) == {0: 2, 1: 1}


def test_two_sizes_that_both_change_are_not_multiplied() -> None:
    system = _system({0: 5, 1: 7})
    with pytest.raises(NotLinear, match="two sizes that can both change"):
        system.add(Computed("*", AxisSize(0, 0), AxisSize(1, 0)), _count(g1=1))


def test_a_constant_factor_is_held() -> None:
    system = _system({0: 6, 1: 3}, {HEADS: 2})  # C == heads * n
    system.add(Computed("*", HEADS, AxisSize(1, 0)), _count(g0=1))
    (lump,) = system.lumps([0, 1])
    assert dict(lump.units) == {0: 2, 1: 1}
    assert not lump.stored


def test_too_tangled_a_system_gives_no_lumps() -> None:
    many = dict.fromkeys(range(100), 3)
    system = _system(many)
    system.balance(_count(**{f"g{g}": 1 for g in range(50)}), _count(**{f"g{g}": 1 for g in range(50, 100)}))
    assert system.lumps(range(100)) == []


def _minimal_removals(equations: list[list[int]], bound: int) -> set[tuple[int, ...]]:
    """Support-minimal, primitive non-negative integer solutions up to ``bound``, by enumeration."""
    width = len(equations[0])
    found = [
        r
        for r in itertools.product(range(bound + 1), repeat=width)
        if any(r) and all(sum(a * n for a, n in zip(row, r, strict=True)) == 0 for row in equations)
    ]
    supports = {frozenset(i for i, n in enumerate(r) if n) for r in found}
    minimal = {s for s in supports if not any(other < s for other in supports)}
    smallest: dict[frozenset[int], tuple[int, ...]] = {}
    for r in found:
        support = frozenset(i for i, n in enumerate(r) if n)
        if support in minimal and (support not in smallest or sum(r) < sum(smallest[support])):
            smallest[support] = r
    return set(smallest.values())


@pytest.mark.parametrize("seed", range(60))
def test_lumps_are_the_smallest_removals_that_brute_force_finds(seed: int) -> None:
    draw = random.Random(seed)
    width = draw.randint(2, 4)
    equations = [[draw.choice([-2, -1, -1, 0, 0, 1, 1, 2]) for _ in range(width)] for _ in range(draw.randint(1, 2))]
    system = _system(dict.fromkeys(range(width), 20))
    for row in equations:
        left = {f"g{g}": a for g, a in enumerate(row) if a > 0}
        right = {f"g{g}": -a for g, a in enumerate(row) if a < 0}
        system.balance(_count(**left), _count(**right))
    found = {tuple(lump.units.get(g, 0) for g in range(width)) for lump in system.lumps(range(width))}
    assert found == _minimal_removals(equations, 8)


@pytest.mark.parametrize("seed", range(30))
def test_after_any_lumps_all_equations_hold(seed: int) -> None:
    """Random expressions over stored integers and lengths stay true when lumps go and stored integers follow."""
    draw = random.Random(seed)
    heads = draw.randint(2, 4)
    sizes = {0: heads * draw.randint(3, 6), 1: draw.randint(5, 9), 2: 0}
    sizes[2] = sizes[0] // heads
    stored = {WIDTH: sizes[0] + sizes[1], HEADS: heads}
    system = _system(sizes, stored)
    equations = [
        (WIDTH, _count(g0=1, g1=1)),
        (Computed("//", AxisSize(0, 0), heads), _count(g2=1)),
        (Computed("-", WIDTH, AxisSize(1, 0)), _count(g0=1)),
        (Computed("+", Computed("*", 2, AxisSize(2, 0)), 1), _count(1, g2=2)),
    ]
    system.vary([WIDTH])
    for expression, count in equations:
        system.add(expression, count)
    lumps = system.lumps([0, 1, 2])
    assert lumps
    kept, integers = dict(sizes), dict(stored)
    for lump in draw.choices(lumps, k=2):
        if all(kept[g] >= n for g, n in lump.units.items()):
            kept = {g: n - lump.units.get(g, 0) for g, n in kept.items()}
            integers = {leaf: n - lump.stored.get(leaf, 0) for leaf, n in integers.items()}
    assert kept != sizes
    values = {**integers, **{AxisSize(g, 0): n for g, n in kept.items()}}
    for expression, count in equations:
        length = count.constant + sum(c * kept[g] for g, c in count.terms.items())
        assert evaluate(expression, values) == length
