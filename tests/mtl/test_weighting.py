import pytest
import torch

from mtl.weighting import Equal, Fixed, Uncertainty, resolve

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
