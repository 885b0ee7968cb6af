"""A network of inception blocks for 32 x 32 images.

Szegedy et al.: Going Deeper with Convolutions (2015), table 1, blocks 3a and 4a with a quarter of the channels, and
reductions whose branches have stride 2, as in Ioffe and Szegedy: Batch Normalization (2015), section 4.2.
"""

from torch import Tensor, nn

from layers.conv import ConvBNAct
from layers.inception import ConvStep, Inception, PoolStep
from layers.pool import GlobalPool


class InceptionCifar(nn.Module):
    """Three stages of inception blocks: (batch, 3, 32, 32) -> (batch, num_classes) logits."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        modules: list[nn.Module] = [ConvBNAct(3, 32, 3)]
        channels = 32
        for width in (64, 128):
            reduction = _reduction(width, width)
            modules += [_block(channels, width), reduction]
            channels = reduction.out_channels
        modules.append(_block(channels, 256))
        self.features = nn.Sequential(*modules)
        self.pool = GlobalPool()
        self.classifier = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


def inception_cifar(num_classes: int = 10) -> InceptionCifar:
    """Five inception blocks, two of which halve height and width.

    >>> inception_cifar()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return InceptionCifar(num_classes)


def _block(in_channels: int, width: int) -> Inception:
    """Of `width` output channels: a quarter from 1 x 1, half from 3 x 3, an eighth each from 5 x 5 and from pooling."""
    return Inception(
        in_channels,
        [
            [ConvStep(width // 4)],
            [ConvStep(width // 4), ConvStep(width // 2, 3)],
            [ConvStep(width // 16), ConvStep(width // 8, 5)],
            [PoolStep("max"), ConvStep(width // 8)],
        ],
    )


def _reduction(in_channels: int, width: int) -> Inception:
    """Half the height and width; the channels of two convolutions beside those of the input, pooled."""
    return Inception(
        in_channels,
        [
            [ConvStep(width // 2), ConvStep(width // 2, 3, stride=2)],
            [ConvStep(width // 4), ConvStep(width // 4, 3), ConvStep(width // 4, 3, stride=2)],
            [PoolStep("max", stride=2)],
        ],
    )
