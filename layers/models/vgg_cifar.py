"""VGG-16 with batch norm for 32 x 32 images.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition (2015), table 1, column D, with
one linear layer in place of three, as is usual for CIFAR.
"""

from torch import Tensor, nn

# Output channels of the 3 x 3 convolutions, stage by stage; each stage ends by halving height and width.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGGCifar(nn.Module):
    """Thirteen convolutions and a linear layer: (batch, 3, 32, 32) -> (batch, num_classes) logits."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = 3
        for stage in _STAGES:
            for width in stage:
                modules += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            modules.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))  # at 32 x 32, one pixel is left


def vgg16_bn_cifar(num_classes: int = 10) -> VGGCifar:
    """VGG-16 with batch norm, 14,728,266 parameters for 10 classes."""
    return VGGCifar(num_classes)
