"""Models that are wrapped, that have no values yet, or that compute in half precision."""

import copy

import pytest
import torch
from torch import nn

import compress

BUDGET = compress.Budget(macs=0.5)


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 13, 3), nn.BatchNorm2d(13), nn.ReLU(), nn.Conv2d(13, 7, 3), nn.Flatten())


def test_a_plan_made_on_the_meta_device_is_applied_to_a_real_model() -> None:
    with torch.device("meta"):
        empty = _net()
    result = compress.prune(empty, torch.randn(2, 3, 9, 8), budget=BUDGET, criterion="random")
    assert any("not verified" in note for note in result.notes)
    model = _net().double().eval()
    inputs = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    pruned, masked = compress.apply(model, result.plan), compress.mask(model, result.plan)
    torch.testing.assert_close(pruned(inputs), masked(inputs), rtol=1e-12, atol=1e-12)
    assert compress.measure(pruned, inputs).macs <= 0.5 * compress.measure(model, inputs).macs


def test_weights_without_values_cannot_be_ranked() -> None:
    with torch.device("meta"):
        empty = _net()
    with pytest.raises(compress.PruneError, match=r"no values to rank by.*criterion='random'"):
        compress.prune(empty, torch.randn(2, 3, 9, 8), budget=BUDGET)


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # (PyTorch 2.11's own)
def test_the_wrapper_of_torch_compile_is_taken_off() -> None:
    model = _net().eval()
    result = compress.prune(torch.compile(model), torch.randn(2, 3, 9, 8), budget=BUDGET)
    assert type(result.model) is nn.Sequential
    assert result.plan == compress.prune(model, torch.randn(2, 3, 9, 8), budget=BUDGET).plan
    assert compress.trace(torch.compile(model), torch.randn(2, 3, 9, 8)).groups[0].name == "0.weight"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_prune_and_keep_their_type(dtype: torch.dtype) -> None:
    model = _net().eval().to(dtype)
    before = copy.deepcopy(model.state_dict())
    result = compress.prune(model, torch.randn(2, 3, 9, 8, dtype=dtype), budget=BUDGET)
    assert result.plan.exact
    assert not result.notes
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
