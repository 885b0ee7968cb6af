"""Weights, data and models that are awkward: a right result or a clear error, and never NaN."""

import pytest
import torch
from torch import nn

import compress
from compress import Budget, BudgetError, CalibrationError, PruneError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32 * 9, 40), nn.ReLU(), nn.Linear(40, 10)).eval()


def factorized(model: nn.Module, images: torch.Tensor, **options: object) -> compress.FactorResult:
    options = {"budget": Budget(macs=0.5), "recover": False, **options}
    result = compress.factorize(model, images[:1], calibration=[images], **options)  # type: ignore[arg-type]
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())
    assert result.model(torch.randn(4, 3, 8, 8)).isfinite().all()
    return result


def test_fewer_samples_than_inputs_are_said_and_give_finite_weights() -> None:
    result = factorized(net(), torch.randn(4, 3, 8, 8))
    assert "too few calibration samples" in " ".join(result.notes)


@pytest.mark.parametrize("kind", ["constant", "zero", "dead channel", "tiny", "huge"])
def test_singular_gram_matrices_give_finite_weights(kind: str) -> None:
    images = torch.randn(64, 3, 8, 8)
    if kind == "constant":
        images = torch.ones_like(images)
    elif kind == "zero":
        images = torch.zeros_like(images)
    elif kind == "dead channel":
        images[:, 1] = 0
    else:
        images *= 1e-18 if kind == "tiny" else 1e15
    factorized(net(), images)


def test_dead_and_repeated_weights_give_finite_factors() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight[:] = model[2].weight[:1].clone()
        model[5].weight[::2] = 0
    factorized(model, torch.randn(64, 3, 8, 8))


def test_the_layout_of_weights_in_memory_changes_nothing() -> None:
    images = torch.randn(64, 3, 8, 8)
    plain, other = net(), net()
    other[2].weight = nn.Parameter(other[2].weight.detach().transpose(0, 1).contiguous().transpose(0, 1))
    other[5].weight = nn.Parameter(other[5].weight.detach().T.contiguous().T)
    assert not other[2].weight.is_contiguous()
    assert not other[5].weight.is_contiguous()
    first, second = factorized(plain, images), factorized(other, images)
    assert [(f.module, f.ranks) for f in first.plan.factors] == [(f.module, f.ranks) for f in second.plan.factors]
    torch.testing.assert_close(second.model(images), first.model(images), rtol=1e-3, atol=1e-4)


def test_tied_weights_stay_and_stay_tied() -> None:
    model = net()
    model.append(nn.Linear(10, 10))
    model[8].weight = nn.Parameter(torch.randn(10, 10))
    model.append(nn.Linear(10, 10))
    model[9].weight = model[8].weight
    result = factorized(model, torch.randn(64, 3, 8, 8))
    assert "more than once" in result.left["8.weight"]
    assert result.model[9].weight is result.model[8].weight


def test_numbers_that_are_not_finite_are_said() -> None:
    model = net()
    with torch.no_grad():
        model[7].weight[0, 0] = float("nan")
    result = compress.factorize(
        model, torch.randn(1, 3, 8, 8), budget=Budget(macs=0.6), calibration=[torch.randn(64, 3, 8, 8)], recover=False
    )
    assert "finite" in result.left["7.weight"]
    with pytest.raises(CalibrationError, match="not finite|NaN|infinite"):
        factorized(net(), torch.full((8, 3, 8, 8), float("nan")))


def test_layers_that_are_too_small_and_budgets_that_are_too_low_are_said() -> None:
    with pytest.raises(PruneError, match="nothing can be factorised"):
        compress.factorize(
            nn.Sequential(nn.Linear(2, 1)), torch.ones(1, 2), budget=Budget(macs=0.5), calibration=[torch.randn(9, 2)]
        )
    with pytest.raises(BudgetError, match="brings macs down to"):
        factorized(net(), torch.randn(64, 3, 8, 8), budget=Budget(macs=0.001))
    wrong = compress.FactorPlan((compress.Factor("0", "spatial", (73,), "vertical", (24, 3, 3, 3), 0.0),))
    with pytest.raises(PruneError, match="rank 73 is not between 1 and 9"):
        compress.apply(net(), wrong)
    odd = compress.FactorPlan((compress.Factor("0", "tucker2", (None, 3), "", (8, 4, 3, 3), 0.0),))
    with pytest.raises(PruneError, match="2 groups, which do not divide"):
        compress.apply(nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)), odd)
