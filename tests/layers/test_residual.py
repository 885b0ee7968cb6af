import pytest
import torch
from torch import nn

import layers


@pytest.mark.parametrize("stride", [1, 2])
def test_is_the_sum(stride: int) -> None:
    body = layers.ConvBNAct(4, 6, 3, stride=stride, activation=None)
    shortcut = layers.projection(4, 6, stride=stride)
    block = layers.Residual(body, shortcut, activation="relu").eval()
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(block(x), (body(x) + shortcut(x)).clamp(min=0))


def test_identity() -> None:
    x = torch.randn(3, 5)
    linear = nn.Linear(5, 5)
    torch.testing.assert_close(layers.Residual(linear)(x), x + linear(x))


def test_the_projection_keeps_every_stride_th_pixel() -> None:
    shortcut = layers.projection(1, 1, stride=3).eval()
    nn.init.ones_(shortcut.conv.weight)
    x = torch.randn(1, 1, 8, 7)
    torch.testing.assert_close(shortcut(x), x[:, :, ::3, ::3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("out_channels", [1, 6])
def test_shapes_that_differ(out_channels: int) -> None:
    """One channel would be broadcast."""
    block = layers.Residual(nn.Conv2d(4, out_channels, 1))
    with pytest.raises(ValueError, match=rf"Residual: .* \(2, {out_channels}, 3, 3\) and \(2, 4, 3, 3\) .*projection"):
        block(torch.zeros(2, 4, 3, 3))
