import pytest
import torch
from torch import nn

import layers
from layers import ConvStep, PoolStep


def test_joins_what_its_branches_give() -> None:
    block = layers.Inception(
        6, [[ConvStep(4)], [ConvStep(3), ConvStep(5, 3)], [PoolStep("max"), ConvStep(2)], [PoolStep("average")], []]
    ).eval()
    x = torch.randn(2, 6, 9, 7)
    pooled, average = nn.MaxPool2d(3, 1, 1)(x), nn.AvgPool2d(3, 1, 1)(x)
    convs = [m for m in block.modules() if isinstance(m, layers.ConvBNAct)]
    assert [(c.conv.in_channels, c.conv.out_channels) for c in convs] == [(6, 4), (6, 3), (3, 5), (6, 2)]
    expected = torch.cat([convs[0](x), convs[2](convs[1](x)), convs[3](pooled), average, x], dim=1)
    torch.testing.assert_close(block(x), expected)
    assert block.out_channels == expected.shape[1] == 23


def test_reduction() -> None:
    block = layers.Inception(6, [[ConvStep(4), ConvStep(5, 3, stride=2)], [PoolStep("max", stride=2)]])
    assert block(torch.zeros(2, 6, 9, 7)).shape == (2, 11, 5, 4)


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([], "Inception: branches must hold at least one branch"),
        ([[ConvStep(4, 2)]], "Inception: kernel_size must be odd .* but is 2"),
        ([[ConvStep(4, stride=2)], [PoolStep()]], r"Inception: branches must reduce the size alike.*\[2, 1\]"),
        ([[PoolStep("min")]], "Inception: kind of a PoolStep must be one of 'max', 'average', but is 'min'"),
    ],
)
def test_bad_branches(branches, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers.Inception(6, branches)
