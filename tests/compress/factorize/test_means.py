"""Constants behind thin layers keep the means of the dense ones."""

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.gram import GramCollector
from compress.sites import find_sites
from compress.trace import record
from compress.watch import gather


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_factorised_layer_has_the_means_of_the_dense_one(bias: bool, groups: int) -> None:
    """By its bias, or by the batch norm behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=bias, groups=groups), nn.BatchNorm2d(8)).eval()
    x = torch.randn(64, 8, 3, 3) + 3 * torch.randn(8)[:, None, None]
    result = compress.factorize(model, x[:1], budget=compress.Budget(macs=0.4), calibration=[x], recover=False)
    assert len(result.plan.factors) == 1
    expected = model(x).mean((0, 2, 3))
    torch.testing.assert_close(result.model(x).mean((0, 2, 3)), expected, rtol=1e-3, atol=1e-3)


def test_means_take_no_rank() -> None:
    """Inputs of rank one about a large mean: one rank is all that the layer needs."""
    torch.manual_seed(0)
    model, x = nn.Linear(12, 10), torch.randn(256, 1) @ torch.randn(1, 12) + 10 * torch.randn(12)
    result = compress.factorize(
        nn.Sequential(model), x[:1], budget=compress.Budget(macs=0.2), calibration=[x], recover=False
    )
    assert result.plan.factors[0].ranks == (1,)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-2, atol=1e-2)


def test_centred_sums_are_the_covariance() -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3, bias=False))
    x = torch.randn(100, 5).double() + 2
    model = model.double()
    trace = record(model, x, training=False)
    (grams,) = gather(model, trace, [x], [lambda: GramCollector(find_sites(trace), 1)])

    def inner(name: str) -> Tensor:
        known = grams.sums[name, 0].centred()
        found: Tensor = known.mean[0, :-1, :-1]
        return found

    torch.testing.assert_close(inner("0.weight"), torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-4)
    hidden = model[0](x).detach()  # type: ignore[index]
    torch.testing.assert_close(inner("1.weight"), hidden.T @ hidden / 100, rtol=1e-6, atol=1e-6)
