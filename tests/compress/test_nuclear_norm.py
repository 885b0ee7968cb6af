"""The penalty against numpy's singular values, its gradient's step on them, and a layer that it makes low rank."""

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress import NuclearNorm, PruneError


def nuclear(matrix: torch.Tensor) -> float:
    return float(np.linalg.svd(matrix.detach().numpy(), compute_uv=False).sum())


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, (3, 2)), nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(5, 7)).double()


def expected(model: nn.Module, unfold: str) -> float:
    """Written out for each layer."""
    total = nuclear(model[3].weight.flatten(1)) + nuclear(model[5].weight)
    for weight in (model[0].weight, *model[1].weight.chunk(2)):
        o, i, y, x = weight.shape
        if unfold == "spatial":
            total += nuclear(weight.permute(0, 3, 1, 2).reshape(o * x, i * y)) / 2
            total += nuclear(weight.permute(0, 2, 1, 3).reshape(o * y, i * x)) / 2
        else:
            total += nuclear(weight.reshape(o, -1)) / 2 + nuclear(weight.transpose(0, 1).reshape(i, -1)) / 2
    return total


@pytest.mark.parametrize("unfold", ["spatial", "tucker2"])
def test_is_the_sum_of_singular_values_of_the_matrices_that_factorize_cuts(unfold: str) -> None:
    model = net()
    penalty = NuclearNorm(model, 0.1, unfold=unfold)
    assert penalty(model, progress=0.5).item() == pytest.approx(0.05 * expected(model, unfold), rel=1e-7)
    assert penalty(model, progress=0.0).item() == 0


def test_a_step_takes_the_same_off_every_singular_value() -> None:
    model = nn.Linear(6, 9, bias=False).double()
    before = torch.linalg.svdvals(model.weight.detach())
    NuclearNorm(model, 0.3)(model, 1.0).backward()
    with torch.no_grad():
        model.weight -= 0.1 * model.weight.grad
    torch.testing.assert_close(torch.linalg.svdvals(model.weight.detach()), before - 0.03)


def test_directions_that_are_gone_get_no_gradient_and_zeros_no_nan() -> None:
    model = nn.Linear(6, 9, bias=False)
    nn.init.zeros_(model.weight)
    NuclearNorm(model, 1.0)(model, 1.0).backward()
    assert model.weight.grad.abs().max() == 0


def test_training_with_it_loses_less_when_thin_layers_are_inserted() -> None:
    """A low-rank task with noise: the same training with and without."""
    torch.manual_seed(0)
    true = torch.randn(16, 3) @ torch.randn(3, 16) / 4
    x = torch.randn(96, 16)
    y = x @ true + 0.5 * torch.randn(96, 16)
    errors = []
    for strength in (0.0, 0.1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16))
        penalty, steps = NuclearNorm(model, strength), 150
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().sum(1).mean() / 2 + penalty(model, step / steps)
            loss.backward()
            optimizer.step()
        result = compress.factorize(model, x[:1], budget=compress.Budget(params=0.5), calibration=[x], recover=False)
        errors.append(result.plan.factors[0].error)
    assert errors[1] < 0.7 * errors[0]


def test_bad_input_is_said() -> None:
    model = net()
    with pytest.raises(PruneError, match="strength is -1"):
        NuclearNorm(model, -1)
    with pytest.raises(PruneError, match="unfold='cp' is unknown"):
        NuclearNorm(model, 1, unfold="cp")
    with pytest.raises(PruneError, match="matches no parameter"):
        NuclearNorm(model, 1, protect=("head",))
    with pytest.raises(PruneError, match="no dense layer"):
        NuclearNorm(nn.BatchNorm2d(3), 1)
    with pytest.raises(PruneError, match=r"has no 0\.weight"):
        NuclearNorm(model, 1)(nn.Linear(2, 2), 1.0)
    assert NuclearNorm(model, 1, protect=("0", "1", "3"))(model, 1).item() == pytest.approx(nuclear(model[5].weight))
