"""Seeds follow from their key, and what is seeded inside a block does not leak out of it."""

import random

import numpy as np
import torch

from compress.seeding import preserved_random_state, seed_everything


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_key_gives_its_numbers_whatever_ran_before() -> None:
    draws = {}
    for key in [(0, 1, "train"), (0, 2, "train"), (1, 1, "train"), (0, 1, "prune"), (0, 1, "train")]:
        _draw()
        seed_everything(*key)
        numbers = _draw()
        assert draws.setdefault(key, numbers) == numbers
    assert len(set(draws.values())) == 4
    assert all(len(set(numbers)) == 4 for numbers in zip(*draws.values(), strict=True))


def test_the_state_after_a_block_is_the_state_before_it() -> None:
    seed_everything("outside")
    expected = _draw()

    @preserved_random_state()
    def inside() -> None:
        seed_everything("inside")
        _draw()

    seed_everything("outside")
    inside()
    assert _draw() == expected
