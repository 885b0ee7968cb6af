import operator
import random

import pytest
import torch

from compress.provenance import (
    OPERATORS,
    AxisSize,
    Computed,
    SizeComparison,
    Stored,
    TracedInt,
    evaluate,
    expression_of,
    leaves,
    observing,
    traced_integers,
    traced_size,
)

C, HEADS = Stored("block", "channels"), Stored("block", "heads")


@pytest.mark.parametrize("seed", range(50))
def test_arithmetic_is_that_of_plain_integers_and_remembers_itself(seed: int) -> None:
    draw = random.Random(seed)
    values = {C: draw.randint(1, 99), HEADS: draw.randint(1, 9), AxisSize(3, 1): draw.randint(1, 50)}
    pool = [(TracedInt(value, leaf), value) for leaf, value in values.items()] + [(5, 5), (2, 2)]
    for _ in range(20):
        (a, x), (b, y) = draw.choice(pool), draw.choice(pool)
        symbol = draw.choice(sorted(OPERATORS))
        if symbol in ("//", "%") and y == 0:
            continue
        traced, plain = OPERATORS[symbol](a, b), OPERATORS[symbol](x, y)
        assert traced == plain
        assert isinstance(traced, int)
        assert hash(traced) == hash(plain)
        assert evaluate(expression_of(traced), values) == plain
        if abs(plain) < 10**6:
            pool.append((traced, plain))


@pytest.mark.parametrize(
    "function", [operator.lt, operator.ge, operator.and_, operator.lshift, operator.truediv, divmod, pow]
)
def test_other_operations_give_plain_results(function) -> None:
    assert function(TracedInt(6, C), 4) == function(6, 4)
    assert function(9, TracedInt(2, C)) == function(9, 2)


def test_it_is_an_integer_to_everyone_else() -> None:
    value = TracedInt(3, C)
    assert f"{value} {value!r} {value:03d}" == "3 3 003"
    assert [10, 20, 30, 40][value] == 40
    assert torch.zeros(value, 2).shape == (3, 2)
    assert list(range(value)) == [0, 1, 2]
    assert {3: "x"}[value] == "x"
    assert -value == -3
    assert evaluate(expression_of(-value), {C: 7}) == -7
    assert isinstance(value + 1.5, float)
    assert value + 1.5 == 4.5
    assert (value + True) == 4


def test_operations_with_strangers_are_refused_as_for_integers() -> None:
    with pytest.raises(TypeError):
        TracedInt(3, C) + "a"
    assert [0] * TracedInt(2, C) == [0, 0]


def test_only_equalities_that_hold_are_noted() -> None:
    a, b = TracedInt(6, C), TracedInt(3, HEADS)
    with observing() as seen:
        assert a == 6
        assert a != b
        assert a == b * 2
        assert a != 7
    assert seen.comparisons == [SizeComparison(C, 6), SizeComparison(C, Computed("*", HEADS, 2))]
    assert a == 6  # nobody is observing any more
    assert len(seen.comparisons) == 2


@pytest.mark.parametrize(
    "use",
    [float, lambda n: n**0.5, lambda n: 1 / n, lambda n: n / 2, lambda n: 2**n, lambda n: n * 0.5, lambda n: n + 0.5],
)
def test_a_size_that_becomes_a_value_is_noted(use) -> None:
    with observing() as seen:
        use(TracedInt(6, C))
    assert [value_use.expression for value_use in seen.value_uses] == [C]


def test_shapes_are_traced_axis_by_axis() -> None:
    shape = traced_size(7, torch.Size([2, 3, 5]))
    assert shape == (2, 3, 5)
    assert [expression_of(n) for n in shape] == [AxisSize(7, 0), AxisSize(7, 1), AxisSize(7, 2)]
    assert [expression_of(n) for n in shape[1:]] == [AxisSize(7, 1), AxisSize(7, 2)]


def test_integers_in_containers_are_traced_to_their_place() -> None:
    given = {"sizes": [3, (4, "a", True)], "name": "x", 2: 5}
    traced = traced_integers(given, Stored("m", "config"))
    assert traced == given
    assert expression_of(traced["sizes"][1][0]) == Stored("m", "config", ("sizes", 1, 0))
    assert expression_of(traced[2]) == Stored("m", "config", (2,))
    assert traced["sizes"][1][2] is True
    assert str(Stored("m", "config", ("sizes", 1))) == "m.config['sizes'][1]"
    assert str(Stored("", "width")) == "width"


def test_leaves_come_in_order_and_evaluation_needs_them_all() -> None:
    expression = Computed("//", Computed("+", C, 1), HEADS)
    assert list(leaves(expression)) == [C, HEADS]
    assert list(leaves(5)) == []
    with pytest.raises(KeyError):
        evaluate(expression, {C: 3})
