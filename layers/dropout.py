"""Dropout: random values, channels or features are set to zero while training."""

import torch.nn.functional as F
from torch import Tensor, nn

from layers._checks import check_choice, check_shape, fail


class Dropout(nn.Module):
    """Set each value to zero with probability p while training, so that the expectation is the same in both modes.

    `scale_at` says where that is corrected for. "train": y = x m / (1 - p) in training, y = x afterwards (inverted
    dropout, what `torch.nn.Dropout` does). "test": y = x m in training, y = (1 - p) x afterwards (Srivastava et al.:
    Dropout, 2014, section 4). m is 0 with probability p, else 1; `per` says what shares one draw of m:

    - "element": nothing; input of any shape;
    - "channel": all positions of a channel (Tompson et al.: Efficient Object Localization Using Convolutional Networks,
      2015, section 3.2); input (batch, channels, *), also the same mask over time for (batch, channels, time);
    - "time": all steps of a sequence (Gal and Ghahramani: A Theoretically Grounded Application of Dropout in Recurrent
      Neural Networks, 2016, section 4); input (batch, time, features).

    Raises ValueError for p outside [0, 1), another `scale_at` or `per`, an input of a rank that `per` does not take,
    and an empty axis.

    >>> Dropout(0.25, scale_at="test").eval()(torch.ones(3))
    tensor([0.7500, 0.7500, 0.7500])
    """

    def __init__(self, p: float = 0.5, *, scale_at: str = "train", per: str = "element") -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise fail(self, f"p must be in [0, 1), but is {p}")
        check_choice(self, "scale_at", scale_at, ("train", "test"))
        check_choice(self, "per", per, ("element", "channel", "time"))
        self.p, self.scale_at, self.per = p, scale_at, per

    def forward(self, x: Tensor) -> Tensor:
        if self.per == "element":
            check_shape(self, "x", x, ("...",))
        elif self.per == "channel":
            check_shape(self, "x", x, ("batch", "channels", "*", "..."))
        else:
            check_shape(self, "x", x, ("batch", "time", "features"))
        if not self.training:
            return x if self.scale_at == "train" else x * (1 - self.p)
        if self.per == "element":
            y = F.dropout(x, self.p)
        elif self.per == "channel":
            y = x * F.dropout(x.new_ones(x.shape[:2] + (1,) * (x.dim() - 2)), self.p)
        else:
            y = x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.p)
        return y if self.scale_at == "train" else y * (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}, scale_at={self.scale_at!r}, per={self.per!r}"
