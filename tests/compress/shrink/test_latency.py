"""Latency as the budget of both methods, by seconds that are made up: nothing here is timed."""

import pytest
import torch
from torch import nn

import compress
import compress.attempt
import compress.timing
from compress import Budget, BudgetError
from compress.cost import macs_of, measure
from compress.factorize import clock
from compress.shrink import allocation, shrinking
from compress.trial import Trial

CALL = 5e4  # multiply-accumulates that a call of a layer takes as long as


@pytest.fixture
def model() -> nn.Module:
    """The last hidden layer is of low rank, the others have channels that do next to nothing."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.Linear(256, 24)]
    with torch.no_grad():
        layers[2].weight[::2].mul_(0.01)
        layers[4].weight.copy_(torch.randn(256, 8) @ torch.randn(8, 256) / 40)
    return nn.Sequential(*layers).eval()


def seconds(model: nn.Module, shape: tuple[int, ...]) -> float:
    calls = sum(isinstance(module, nn.Linear) for module in model.modules())
    return 1e-9 * (measure(model, torch.zeros(shape)).macs + CALL * calls)


def ratio(made: nn.Module, dense: nn.Module, inputs: torch.Tensor, **_: float) -> float:
    return seconds(made, inputs.shape) / seconds(dense, inputs.shape)


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_operator(op, shapes, device):
        sizes = [shapes[ref.id] for ref in op.tensors]
        weight = max(sizes[-2:], key=len) if macs_of(op) else ()
        return 1e-9 * (sizes[-2][0] * weight[0] * weight[1] + CALL) if macs_of(op) else 0.0

    monkeypatch.setattr(compress.timing, "seconds_of", of_operator)
    monkeypatch.setattr(clock, "seconds_of_layer", lambda layer, shape, weight: seconds(layer, shape))
    monkeypatch.setattr(clock, "own_seconds", lambda model, inputs: 1.3 * seconds(model, inputs.shape))
    for module in (clock, compress.attempt, allocation, shrinking):
        monkeypatch.setattr(module, "relative_latency", ratio)


@pytest.mark.parametrize("fraction", [0.8, 0.5])
def test_the_budget_is_met_and_both_lose_no_more_than_either(model: nn.Module, fraction: float) -> None:
    x = torch.randn(1200, 64) @ torch.randn(64, 64) / 8
    errors, held_out = {}, Trial(model, [x[1100:]])
    for methods in (("prune",), ("factorize",), ("prune", "factorize")):
        options = {"budget": Budget(latency=fraction), "methods": methods, "calibration": [x[:1100]]}
        try:
            result = compress.shrink(model, x[:16], **options)
        except BudgetError:
            continue
        kept = ratio(result.model, model, x[:16])
        assert fraction - 0.2 < kept <= fraction
        assert result.latency == pytest.approx(kept)
        assert f"{kept:.1%}" in result.summary()
        errors[methods] = held_out.error(result.model)
    assert len(errors) > 1
    assert errors["prune", "factorize"] <= 1.2 * min(errors.values()), errors


def test_what_no_division_reaches_is_said(model: nn.Module) -> None:
    x = torch.randn(600, 64)
    with pytest.raises(BudgetError, match="latency") as caught:
        compress.shrink(model, x[:16], budget=Budget(latency=0.02), calibration=[x])
    assert 0.02 < (caught.value.smallest or 0) < 1
