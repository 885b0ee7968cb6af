"""Schedules start at the whole model, never grow, and end exactly at the budget."""

import itertools
import math

import pytest

from compress.errors import PruneError
from compress.schedule import SCHEDULES, kept_fraction, prepared


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("final", [0.1, 1 / 3, 0.7, 1.0])
@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_goes_from_one_down_to_the_budget(name: str, final: float, rounds: int) -> None:
    kept = [kept_fraction(name, final, index, rounds) for index in range(rounds + 1)]
    assert kept[0] == 1.0
    assert kept[-1] == final
    assert all(later <= earlier + 1e-15 for earlier, later in itertools.pairwise(kept))


def test_each_formula() -> None:
    def at_half(name: str) -> float:
        return kept_fraction(name, 0.25, 1, 2)

    assert at_half("one_shot") == 0.25
    assert at_half("linear") == pytest.approx(0.625)
    assert at_half("exponential") == pytest.approx(math.sqrt(0.25))
    # Zhu & Gupta (2017) eq. 1 with s_i = 0, s_f = 0.75, t = n / 2
    assert at_half("cubic") == pytest.approx(1 - (0.75 + (0 - 0.75) * (1 - 0.5) ** 3))


def test_a_function_is_a_schedule() -> None:
    assert kept_fraction(lambda final, progress: 1 - (1 - final) * progress**2, 0.5, 1, 2) == pytest.approx(0.875)


def test_bad_schedules() -> None:
    with pytest.raises(PruneError, match="one_shot, linear, cubic, exponential"):
        kept_fraction("cosine", 0.5, 1, 2)
    with pytest.raises(PruneError, match="rounds is 0"):
        kept_fraction("linear", 0.5, 0, 0)
    with pytest.raises(PruneError, match=r"in \(0, 1\]"):
        kept_fraction(lambda final, progress: 0.0, 0.5, 1, 2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_a_prepared_schedule_is_one_round_late(name: str, rounds: int) -> None:
    late = [kept_fraction(prepared(name, rounds), 0.3, index, rounds + 1) for index in range(rounds + 2)]
    assert late == [1.0] + [kept_fraction(name, 0.3, index, rounds) for index in range(rounds + 1)]
