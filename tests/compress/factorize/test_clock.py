"""Latency budgets, with a clock that tells what MACs cost: no test here waits for a real one."""

import pytest
import torch
from torch import nn

import compress
from compress import Budget, BudgetError, PruneError
from compress.cost import measure, relative_latency
from compress.factorize import clock
from layers.low_rank import LowRankLinear

OVERHEAD = 1e4  # MACs that a call of a layer takes as long as


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 24)]
    return nn.Sequential(*layers).eval()


def seconds(model: nn.Module, shape: tuple[int, ...]) -> float:
    calls = sum(isinstance(module, nn.Linear) for module in model.modules())
    return 1e-9 * (measure(model, torch.zeros(shape)).macs + shape[0] * OVERHEAD * calls)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of layers and models by that rule; the model's by another factor, as on a real machine."""
    monkeypatch.setattr(clock, "seconds_of_layer", lambda layer, shape, weight: seconds(layer, shape))
    monkeypatch.setattr(clock, "own_seconds", lambda model, inputs: 1.3 * seconds(model, inputs.shape))
    ratio = lambda made, model, inputs: seconds(made, inputs.shape) / seconds(model, inputs.shape)  # noqa: E731
    monkeypatch.setattr(clock, "relative_latency", ratio)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("fraction", [0.9, 0.75])
def test_the_budget_is_met_as_measured_and_layers_that_get_slower_stay(model: nn.Module, fraction: float) -> None:
    x = torch.randn(512, 64) @ torch.randn(64, 64)
    budget = Budget(latency=fraction)
    result = compress.factorize(model, x[:2], budget=budget, calibration=[x], recover=False)
    kept = seconds(result.model, (2, 64)) / seconds(model, (2, 64))
    assert result.latency == pytest.approx(kept)
    assert fraction - 0.12 < kept <= fraction  # ranks are timed at some values only
    assert type(result.model[4]) is nn.Linear  # 256 x 24 has too few MACs to pay for another call
    assert result.left["4.weight"] == "it is faster as it is"
    assert any(isinstance(module, LowRankLinear) for module in result.model)
    assert f"{kept:.1%}" in result.summary()


@pytest.mark.usefixtures("told")
def test_what_cannot_be_reached_is_said(model: nn.Module) -> None:
    x = torch.randn(512, 64)
    with pytest.raises(BudgetError, match=r"latency=0\.05 cannot be reached") as caught:
        compress.factorize(model, x[:2], budget=Budget(latency=0.05), calibration=[x])
    assert 0.05 < (caught.value.smallest or 0) < 1
    whole = compress.factorize(model, x[:2], budget=Budget(latency=1.0), calibration=[x])
    assert whole.plan.factors == ()


def test_where_nothing_gets_faster_it_says_so(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "seconds_of_layer", lambda layer, shape, weight: 1.0 + isinstance(layer, LowRankLinear))
    x = torch.randn(512, 64)
    with pytest.raises(PruneError, match="no factorisation is faster"):
        compress.factorize(model, x[:2], budget=Budget(latency=0.9), calibration=[x])


def test_the_real_clock_tells_a_large_layer_from_a_small_one() -> None:
    """An order of magnitude, which no load of the machine hides."""
    large, small = nn.Linear(1024, 1024), nn.Linear(16, 16)
    weight = large.weight
    assert clock.seconds_of_layer(large, (256, 1024), weight) > clock.seconds_of_layer(small, (4, 16), weight)
    ratio = relative_latency(nn.Sequential(large), nn.Sequential(large), torch.zeros(64, 1024), seconds=0.01)
    assert ratio > 0


def test_ranks_that_are_timed_are_multiples_where_there_are_enough() -> None:
    from compress.factorize.options import Option

    options = [Option("linear", (rank,), "", 1, 1, 0.0) for rank in range(1, 100)]
    ranks = [option.ranks[0] for option in clock._some(options)]
    assert len(ranks) == clock.RANKS
    assert all(rank is not None and rank % 8 == 0 for rank in ranks)
    both = [Option("tucker2", (a, b), "", 1, 1, 0.0) for a in (2, 4) for b in range(1, 6)]
    assert {option.ranks for option in clock._some(both)} == {option.ranks for option in both}
