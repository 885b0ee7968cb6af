"""Factors of alike size: the same function, equal norms, and training that the dense layer's learning rate suits."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import compress
from compress import Budget
from layers.balancing import balance
from layers.low_rank import LowRankEmbedding, LowRankLinear
from layers.low_rank_conv import SpatialConv, Tucker2Conv

D = torch.float64


def uneven(module: nn.Module) -> nn.Module:
    """Ranks and layers of very different size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, layer in enumerate(module.children()):
            layer.weight.mul_(100.0 ** (number - 1))
            layer.weight.mul_(
                torch.rand(layer.weight.shape[1], generator=generator, dtype=D).view(
                    1, -1, *[1] * (layer.weight.dim() - 2)
                )
                + 0.01
            )  # type: ignore[arg-type]
    return module.to(D)


@pytest.mark.parametrize(
    ("module", "inputs"),
    [
        (LowRankLinear(6, 8, 4), torch.randn(5, 6, dtype=D)),
        (LowRankEmbedding(20, 8, 4, padding_idx=3), torch.arange(20)),
        (SpatialConv(6, 8, (3, 5), 4, groups=2, padding=1), torch.randn(2, 6, 7, 7, dtype=D)),
        (Tucker2Conv(6, 8, (3, 3), (4, None), groups=2), torch.randn(2, 6, 7, 7, dtype=D)),
        (Tucker2Conv(6, 8, (3,), (None, 5)), torch.randn(2, 6, 7, dtype=D)),
        (Tucker2Conv(6, 8, (3, 3, 2), (4, 6), groups=2), torch.randn(2, 6, 7, 7, 4, dtype=D)),
    ],
)
def test_the_function_stays_and_each_rank_is_given_and_taken_at_one_norm(
    module: nn.Module, inputs: torch.Tensor
) -> None:
    module = uneven(module)
    before = module(inputs)
    balance(module)
    torch.testing.assert_close(module(inputs), before, rtol=1e-10, atol=1e-12)
    layers = list(module.children())
    for giver, taker in pairwise(layers):
        groups, weight = getattr(taker, "groups", 1), taker.weight
        gives = giver.weight.T if isinstance(giver, nn.Embedding) else giver.weight
        of_ranks = [
            torch.stack([part[:, rank].norm() for part in weight.chunk(groups) for rank in range(weight.shape[1])]),
            torch.stack([row.norm() for row in gives]),
        ]
        torch.testing.assert_close(*of_ranks, rtol=0.05 if len(layers) > 2 else 1e-9, atol=0.0)


def test_what_gives_nothing_stays_zero() -> None:
    layer = LowRankLinear.from_factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0], [0.0]]))
    balance(layer)
    assert layer.reduce.weight.flatten().tolist() == [2.0, 0.0]
    assert layer.expand.weight.flatten().tolist() == [2.0, 0.0]


def test_what_is_factorised_trains_at_a_learning_rate_for_the_dense_model() -> None:
    """And does not where the same factors are of uneven size."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.Flatten())
    x = nn.functional.interpolate(torch.randn(64, 3, 3, 3), size=(8, 8), mode="bilinear")
    wanted = dense.eval()(x).detach()

    def loss_after(model: nn.Module, steps: int) -> float:
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), wanted).backward()
            optimizer.step()
        return float(nn.functional.mse_loss(model(x), wanted).detach())

    def thin() -> nn.Module:
        options = {"methods": ("spatial",), "calibration": [x], "recover": False}
        return compress.factorize(dense, x[:1], budget=Budget(macs=0.3), **options).model

    even, odd = thin(), thin()
    (changed,) = (
        module for module in odd.modules() if isinstance(module, SpatialConv) and module.first.in_channels > 3
    )
    with torch.no_grad():
        changed.first.weight.div_(10)
        changed.second.weight.mul_(10)
    start = loss_after(even, 0)
    assert loss_after(odd, 0) == pytest.approx(start, rel=1e-3)
    assert loss_after(even, 30) < start
    assert not loss_after(odd, 30) < start
