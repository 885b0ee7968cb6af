import random

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from mtl.seeding import epoch_seed, preserved_rng, seed_data, seed_epoch


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_of_neighbours_differ() -> None:
    seeds = {epoch_seed(seed, epoch) for seed in range(20) for epoch in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_callers_random_numbers_go_on_undisturbed() -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draw(), draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = draw()
    with preserved_rng():
        seed_epoch(0, 1)
        draw()
    assert (first, draw()) == expected


def test_the_order_of_a_data_loader_depends_on_seed_and_epoch_alone() -> None:
    dataset = TensorDataset(torch.arange(50))
    for generator in (None, torch.Generator()):
        loader = DataLoader(dataset, batch_size=50, shuffle=True, generator=generator)

        def order(seed: int, epoch: int, loader: DataLoader = loader) -> list[int]:
            seed_epoch(seed, epoch)
            seed_data(loader, seed, epoch)
            return next(iter(loader))[0].tolist()

        assert order(0, 1) == order(0, 1)
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}) == 4
