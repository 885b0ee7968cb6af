import math
import sys

import pytest
import torch

from mtl.weighting import (
    DynamicWeightAverage,
    Equal,
    Fixed,
    GeometricMean,
    GradNorm,
    Jacobian,
    RandomWeighting,
    Uncertainty,
    resolve,
)

LOSSES = {"a": torch.tensor(2.0), "b": torch.tensor(0.5)}


def test_equal_is_the_sum_and_fixed_the_weighted_sum() -> None:
    assert Equal()(LOSSES) == 2.5
    fixed = resolve({"a": 0.5, "b": 4.0}, ["a", "b"])
    assert fixed(LOSSES) == 3.0
    assert fixed.weights() == {"a": 0.5, "b": 4.0}


def test_uncertainty_weighs_each_task_by_half_its_inverse_loss() -> None:
    weighting = Uncertainty(["a", "b"]).double()
    losses = {name: loss.double() for name, loss in LOSSES.items()}
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(losses).backward()
        optimizer.step()
    assert weighting.weights() == pytest.approx({"a": 1 / (2 * 2.0), "b": 1 / (2 * 0.5)}, rel=1e-6)


def test_resolve_refuses_what_it_does_not_know() -> None:
    assert isinstance(resolve("uncertainty", ["a"]), Uncertainty)
    mine = Equal()
    assert resolve(mine, ["a"]) is mine
    with pytest.raises(ValueError, match="unknown weighting 'equl'"):
        resolve("equl", ["a"])
    with pytest.raises(ValueError, match=r"names the tasks \['a', 'c'\], but they are \['a', 'b'\]"):
        resolve({"a": 1.0, "c": 1.0}, ["a", "b"])


@pytest.mark.parametrize("weights", [{"a": -1.0}, {"a": float("nan")}, {"a": 0.0}])
def test_fixed_refuses_factors_that_make_no_sense(weights: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="weighting: "):
        Fixed(weights)


def test_dynamic_weight_average_is_the_formula() -> None:
    weighting = DynamicWeightAverage(["a", "b", "c"], temperature=2.0)
    ones = {"a": 1.0, "b": 1.0, "c": 1.0}
    assert weighting.weights() == pytest.approx(ones)
    first, second = {"a": 2.0, "b": 1.0, "c": 4.0}, {"a": 1.0, "b": 0.9, "c": 6.0}
    weighting.end_epoch(first)
    assert weighting.weights() == pytest.approx(ones)  # there is nothing yet to compare with
    weighting.end_epoch(second)
    exponentials = {name: math.exp(second[name] / first[name] / 2.0) for name in first}
    expected = {name: 3 * value / sum(exponentials.values()) for name, value in exponentials.items()}
    assert weighting.weights() == pytest.approx(expected)
    losses = {"a": torch.tensor(2.0), "c": torch.tensor(0.5)}
    assert weighting(losses).item() == pytest.approx(2.0 * expected["a"] + 0.5 * expected["c"])
    resumed = DynamicWeightAverage(["a", "b", "c"])
    resumed.load_state_dict(weighting.state_dict())
    assert resumed.weights() == weighting.weights()


def test_the_geometric_mean_and_its_factors() -> None:
    losses = {name: loss.double().requires_grad_() for name, loss in LOSSES.items()}
    value = GeometricMean()(losses)
    assert value.item() == pytest.approx(1.0)  # sqrt(2 * 1/2)
    value.backward()
    assert losses["a"].grad == pytest.approx(1.0 / 2 / 2.0)
    assert losses["b"].grad == pytest.approx(1.0 / 2 / 0.5)


def test_random_factors_are_positive_sum_to_one_and_change() -> None:
    draws = []
    for _ in range(2):
        losses = {name: torch.ones((), requires_grad=True) for name in "abc"}
        RandomWeighting()(losses).backward()
        draws.append(torch.stack([loss.grad for loss in losses.values()]))  # type: ignore[misc]
        assert draws[-1].min() > 0
        assert draws[-1].sum().item() == pytest.approx(1.0)
    assert not torch.equal(*draws)


def test_gradnorm_takes_the_gradient_step_of_its_paper() -> None:
    weighting = GradNorm(["a", "b"], alpha=1.5, lr=0.1).double()
    weighting.factors.copy_(torch.tensor([1.2, 0.8]))
    weighting.first.copy_(torch.tensor([4.0, 1.0]))
    norms, values = torch.tensor([3.0, 0.5]).double(), torch.tensor([2.0, 0.9]).double()
    w = weighting.factors.clone().requires_grad_()
    left = values / torch.tensor([4.0, 1.0])
    sizes = w * norms
    target = (sizes.mean() * (left / left.mean()) ** 1.5).detach()
    (sizes - target).abs().sum().backward()
    assert w.grad is not None
    expected = w.detach() - 0.1 * w.grad
    expected = expected * 2 / expected.sum()
    weighted = (weighting.factors * norms).clone()
    ones = weighting.combine(torch.diag(weighted**2), dict(zip("ab", values, strict=True)))
    assert torch.equal(ones, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(weighting.factors, expected)


def test_gradnorm_evens_out_gradients_of_different_size() -> None:
    weighting = GradNorm(["a", "b"], alpha=0.0, lr=0.02)
    for _ in range(300):
        sizes = weighting.factors * torch.tensor([4.0, 1.0])
        weighting.combine(torch.diag(sizes**2), LOSSES)
    weights = weighting.weights()
    assert weights is not None
    assert weights["b"] / weights["a"] == pytest.approx(4.0, rel=0.15)


GRADIENTS = torch.tensor([[1.0, 2.0, 0.0], [-2.0, 0.5, 1.0]], dtype=torch.float64)


def test_pcgrad_projects_each_of_two_gradients_off_the_other() -> None:
    pytest.importorskip("torchjd")
    a, b = GRADIENTS
    assert a @ b < 0
    expected = (a - (a @ b) / (b @ b) * b) + (b - (a @ b) / (a @ a) * a)
    factors = Jacobian("pcgrad").combine(GRADIENTS @ GRADIENTS.T, LOSSES)
    torch.testing.assert_close(factors @ GRADIENTS, expected)


@pytest.mark.parametrize("b", [[-2.0, 0.5, 1.0], [3.0, 6.1, 0.2]])
def test_mgda_finds_the_shortest_vector_between_two_gradients(b: list[float]) -> None:
    pytest.importorskip("torchjd")
    rows = torch.stack([GRADIENTS[0], torch.tensor(b, dtype=torch.float64)])
    difference = rows[1] - rows[0]
    part = float(((rows[1] @ difference) / (difference @ difference)).clamp(0, 1))
    factors = Jacobian("mgda").combine(rows @ rows.T, LOSSES)
    torch.testing.assert_close(factors @ rows, part * rows[0] + (1 - part) * rows[1], rtol=1e-2, atol=1e-2)


def test_what_is_not_installed_is_said_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd", None)
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(ValueError, match=r"weighting 'upgrad' needs .* run: pip install 'prunus\[gradients\]'"):
        resolve("upgrad", ["a", "b"])
