"""Residual networks for 32 x 32 images, with shortcuts that have no parameters.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition (2016), section 4.2, shortcut option A. The names of
modules and parameters are those of github.com/akamaster/pytorch_resnet_cifar10, so that its checkpoints load.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from layers.norm_act import norm_act


class ResNetCifar(nn.Module):
    """Three stages of 16, 32 and 64 channels: (batch, 3, 32, 32) -> (batch, num_classes) logits."""

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = _stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = _stage(32, 64, blocks_per_stage, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = norm_act(self.bn1, self.conv1(x), activation=F.relu)
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20_cifar(num_classes: int = 10) -> ResNetCifar:
    """20 layers, 269,722 parameters for 10 classes."""
    return ResNetCifar(3, num_classes)


def resnet32_cifar(num_classes: int = 10) -> ResNetCifar:
    """32 layers, 464,154 parameters for 10 classes."""
    return ResNetCifar(5, num_classes)


def resnet44_cifar(num_classes: int = 10) -> ResNetCifar:
    """44 layers, 658,586 parameters for 10 classes."""
    return ResNetCifar(7, num_classes)


def resnet56_cifar(num_classes: int = 10) -> ResNetCifar:
    """56 layers, 853,018 parameters for 10 classes."""
    return ResNetCifar(9, num_classes)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else PaddedShortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act(self.bn1, self.conv1(x), activation=F.relu)
        return norm_act(self.bn2, self.conv2(y), self.shortcut(x), activation=F.relu)


class PaddedShortcut(nn.Module):
    """Option A: every `stride`-th pixel, and channels of zeros in front of and behind those of the input.

    The numbers of added channels are stored, and not worked out from the input, so that they can be changed when
    channels are removed: what is cut need not be symmetric.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.channels_before = (out_channels - in_channels) // 2
        self.channels_after = out_channels - in_channels - self.channels_before

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.channels_before, self.channels_after))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, channels_before={self.channels_before}, channels_after={self.channels_after}"


def _stage(in_channels: int, out_channels: int, num_blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))
