"""Which layers are factorised, where errors of some count less than those of others."""

import itertools
import math

import pytest
import torch
from torch import nn

import compress
from compress import Budget
from compress.factorize.decompositions import Problem
from compress.factorize.look import MADE_UP, left_by_recovery
from compress.factorize.options import Layer, Option
from compress.factorize.selection import within_budget


def _layer(name: str, counts: float = 1.0, size: int = 8) -> Layer:
    """Dense, with singular values that fall evenly; of rank r it costs r."""
    options = tuple(Option("linear", (r,), "", r, r, float((size - r) ** 2) / size**2) for r in range(1, size))
    return Layer(name, Problem.of(torch.eye(size)), size, size, 1.0, options, counts=counts)


@pytest.mark.parametrize("counts", [(1.0, 1.0, 1.0), (0.2, 1.0, 3.0), (5.0, 0.1, 1.0)])
@pytest.mark.parametrize("fraction", [0.3, 0.55, 0.8])
def test_the_choice_is_about_the_best_by_what_errors_count(counts: tuple[float, ...], fraction: float) -> None:
    layers = [_layer(f"l{i}", count) for i, count in enumerate(counts)]
    total = sum(layer.macs for layer in layers)

    def lost(chosen: list[Option | None]) -> float:
        return sum(
            layer.counts * (option.error if option else 0.0) for layer, option in zip(layers, chosen, strict=True)
        )

    def price(chosen: list[Option | None]) -> int:
        return sum(option.macs if option else layer.macs for layer, option in zip(layers, chosen, strict=True))

    choice = within_budget(layers, "macs", total, fraction)
    mine = [choice.get(layer.name) for layer in layers]
    every = [list(each) for each in itertools.product(*[(None, *layer.options) for layer in layers])]
    best = min(lost(each) for each in every if price(each) <= int(total * fraction))
    assert price(mine) <= int(total * fraction)
    assert lost(mine) == pytest.approx(best, rel=0.1)  # greedy: the last step may be another


def test_errors_count_more_the_later_a_layer_runs() -> None:
    layers = [_layer(name) for name in ("b", "a", "d", "c")]
    counts = {layer.name: layer.counts for layer in left_by_recovery(layers, {"a": 3, "b": 7, "c": 9, "d": 20})}
    assert counts["d"] == 1.0
    assert counts["a"] == pytest.approx(math.exp(-MADE_UP))
    assert counts["a"] < counts["b"] < counts["c"] < counts["d"]
    assert left_by_recovery(layers[:1], {"b": 4})[0].counts == pytest.approx(math.exp(-MADE_UP))


def test_early_layers_get_smaller_ranks_where_recovery_follows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(24, 24), nn.Tanh())]).eval()
    images = [torch.randn(64, 24) for _ in range(8)]
    ranks = {}
    for recover in (True, False):
        result = compress.factorize(
            net,
            images[0][:1],
            budget=Budget(macs=0.6),
            calibration=images,
            recover=["least_squares"] if recover else [],
        )
        found = {int(factor.module): factor.ranks[0] or 24 for factor in result.plan.factors}
        ranks[recover] = [found.get(place, 24) for place in range(0, 12, 2)]
    assert sum(ranks[True][:3]) < sum(ranks[False][:3])
    assert sum(ranks[True][3:]) > sum(ranks[False][3:])
