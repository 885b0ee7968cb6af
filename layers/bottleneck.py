"""The bottleneck block of deep residual networks."""

from torch import Tensor, nn

from layers._checks import check_positive, check_shape
from layers.activation import activation_module
from layers.conv import ConvBNAct
from layers.residual import Residual, projection


class Bottleneck(nn.Module):
    """y = f(x + expand(conv(reduce(x)))): 1 x 1 to few channels, 3 x 3 there, 1 x 1 back, each with batch norm.

    Input (batch, in_channels, height, width), output (batch, out_channels, height', width'); `out_channels` None is 4
    `mid_channels`. The stride is that of the middle convolution, as in torchvision. Where the shape changes, the
    shortcut is a projection. `groups` above 1 makes the block of ResNeXt. Source: He et al.: Deep Residual Learning for
    Image Recognition (2016), figure 5; Xie et al.: Aggregated Residual Transformations (2017), figure 3c.

    Raises ValueError for an even kernel, sizes below 1, and another rank or number of channels.

    >>> Bottleneck(16, 4, stride=2, out_channels=24)(torch.zeros(2, 16, 9, 7)).shape
    torch.Size([2, 24, 5, 4])
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        *,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: str | nn.Module | None = "relu",
    ) -> None:
        super().__init__()
        out_channels = 4 * mid_channels if out_channels is None else out_channels
        check_positive(self, in_channels=in_channels, mid_channels=mid_channels, out_channels=out_channels)
        self.in_channels = in_channels
        body = nn.Sequential(
            ConvBNAct(in_channels, mid_channels, 1, activation=activation),
            ConvBNAct(mid_channels, mid_channels, kernel_size, stride=stride, groups=groups, activation=activation),
            ConvBNAct(mid_channels, out_channels, 1, activation=None),
        )
        same = stride == 1 and in_channels == out_channels
        shortcut = None if same else projection(in_channels, out_channels, stride=stride)
        self.block = Residual(body, shortcut, activation=activation_module(self, activation))

    def forward(self, x: Tensor) -> Tensor:
        check_shape(self, "x", x, ("batch", self.in_channels, "height", "width"))
        return self.block(x)
