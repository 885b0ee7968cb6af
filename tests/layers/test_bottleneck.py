"""The bottleneck block against torchvision's, parameter by parameter."""

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck as Torchvision

import layers


@pytest.mark.parametrize(("in_channels", "stride", "groups"), [(16, 1, 1), (16, 2, 1), (6, 1, 1), (8, 2, 4)])
def test_is_that_of_torchvision(in_channels: int, stride: int, groups: int) -> None:
    changes = stride > 1 or in_channels != 16
    shortcut = nn.Sequential(nn.Conv2d(in_channels, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    downsample = shortcut if changes else None
    theirs = Torchvision(in_channels, 4, stride, downsample, groups, base_width=64 if groups == 1 else 64 // groups)
    width = theirs.conv2.out_channels
    ours = layers.Bottleneck(in_channels, width, out_channels=16, stride=stride, groups=groups)
    kinds = nn.Conv2d | nn.BatchNorm2d
    for mine, other in zip((m for m in ours.modules() if isinstance(m, kinds)), _in_order(theirs), strict=True):
        mine.load_state_dict(other.state_dict())
    x = torch.randn(3, in_channels, 9, 7)
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-5, atol=1e-5)


def _in_order(block: Torchvision) -> list[nn.Module]:
    return [block.conv1, block.bn1, block.conv2, block.bn2, block.conv3, block.bn3, *(block.downsample or ())]


def test_four_times_as_many_channels_come_out() -> None:
    assert layers.Bottleneck(6, 5)(torch.zeros(2, 6, 4, 4)).shape == (2, 20, 4, 4)


def test_even_kernel() -> None:
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        layers.Bottleneck(6, 4, kernel_size=2)
