"""A network for the 8 x 8 grey digits of scikit-learn."""

from torch import Tensor, nn

from layers.conv import ConvBNAct


class DigitsCNN(nn.Module):
    """Three convolutions and a linear layer: (batch, 1, 8, 8) -> (batch, num_classes) logits.

    2.4 million MACs and 94 thousand parameters, several times what the data need: something for pruning to find.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvBNAct(1, 32, 3),
            ConvBNAct(32, 64, 3),
            nn.MaxPool2d(2),
            ConvBNAct(64, 128, 3),
        )
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def digits_cnn(num_classes: int = 10) -> DigitsCNN:
    """Network for `sklearn.datasets.load_digits`, images as (batch, 1, 8, 8)."""
    return DigitsCNN(num_classes)
