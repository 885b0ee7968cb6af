"""A deep network of highway blocks.

Srivastava, Greff, Schmidhuber: Highway Networks (2015), section 3.1: a plain layer that sets the width, highway blocks,
a linear layer.
"""

from torch import Tensor, nn

from layers.dense import Dense
from layers.highway import Highway


class HighwayMLP(nn.Module):
    """(batch, *) of `in_features` values each -> (batch, num_classes) logits."""

    def __init__(
        self, in_features: int, num_classes: int, *, width: int = 50, num_blocks: int = 8, carry: str = "coupled"
    ) -> None:
        super().__init__()
        self.first = Dense(in_features, width, activation="relu")
        self.blocks = nn.Sequential(*(Highway(width, carry=carry) for _ in range(num_blocks)))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.first(x.flatten(1))))


def highway_mlp(num_classes: int = 10, in_features: int = 64) -> HighwayMLP:
    """Eight blocks of width 50, for `sklearn.datasets.load_digits`, images as (batch, 1, 8, 8).

    >>> highway_mlp()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    return HighwayMLP(in_features, num_classes)
