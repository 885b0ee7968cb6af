"""The promise of the package, on networks nobody wrote by hand: what is called exact is."""

import pytest

import compress
from tests.compress.helpers import assert_exact, image
from tests.compress.random_networks import BLOCKS, RandomNetwork


def _check(seed: int) -> None:
    network, inputs = RandomNetwork(seed), image(2, 3, 11, 9)
    budgets = [compress.Budget(params=0.7), compress.Budget(channels=0.9)]
    for budget in budgets:  # the floors of a small network may not allow the first
        try:
            assert_exact(network, inputs, budget, criterion="random", seed=seed)
        except compress.BudgetError:
            continue
        return
    # shuffles that disagree can tie all channels into one
    assert max(compress.trace(RandomNetwork(seed), inputs).sizes) == 1


@pytest.mark.parametrize("seed", range(200))
def test_random_networks(seed: int) -> None:
    _check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 1000))
def test_more_random_networks(seed: int) -> None:
    _check(seed)


def test_the_first_networks_hold_every_kind_of_block() -> None:
    assert {kind for seed in range(30) for kind in RandomNetwork(seed).kinds} == set(BLOCKS)
