"""What a layer of the pruned model should give, in its own output's terms."""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.recover.pair import Pair
from compress.sites import Key, Site


@dataclass(frozen=True)
class Targets:
    """``values`` (g, R, O) of one batch.

    ``zero`` is where the ReLU behind the output begins and ``sign`` which side of it passes, if there is one; ``scale``
    is what an output is multiplied by until it lands. All of the same shape.
    """

    values: Tensor
    zero: Tensor | None = None
    sign: Tensor | None = None
    scale: Tensor | None = None

    def wanted(self, found: Tensor) -> Tensor:
        """The targets where it matters: what the ReLU cuts off may be anything, as long as it is cut off."""
        if self.zero is None or self.sign is None:
            return self.values
        off = (self.values - self.zero) * self.sign < 0
        silent = torch.where((found - self.zero) * self.sign < 0, found, self.zero)
        return torch.where(off, silent, self.values)

    @property
    def weight(self) -> Tensor:
        """What a squared error of each output counts where it lands."""
        return torch.ones_like(self.values) if self.scale is None else self.scale.square()

    def error(self, found: Tensor) -> Tensor:
        """The sum of squared errors where they land."""
        return (self.weight * (self.wanted(found.detach()) - found).square()).sum()

    def rows(self, chosen: slice) -> "Targets":
        """Some of the rows."""
        parts = (t if t is None else t[:, chosen] for t in (self.zero, self.sign, self.scale))
        return Targets(self.values[:, chosen], *parts)

    def without(self, constant: Tensor) -> "Targets":
        """The same for outputs that ``constant`` (g, 1, O) is added to later."""
        return Targets(
            self.values - constant, None if self.zero is None else self.zero - constant, self.sign, self.scale
        )


def targets_of(pair: Pair, key: Key, lands: bool, kept: Tensor, positions: Tensor | None = None) -> Targets:
    """What the dense model gives at the same positions, or, where it lands, what the stream is short of.

    Args:
        kept: outputs of the dense model's layer that the pruned one has.
    """
    small, large = pair.small, pair.large
    here, there = small.sites[key], large.sites[key]

    def at(value: Tensor, site: Site, chosen: Tensor | None = None) -> Tensor:
        rows = site.outputs(value, positions)
        flat = rows.permute(1, 0, 2).reshape(rows.shape[1], -1)
        flat = flat if chosen is None else flat[:, chosen.to(flat.device)]
        return flat.reshape(len(flat), here.groups, -1).permute(1, 0, 2)

    if not lands:
        return Targets(at(large.output(key), there, kept))
    found = at(small.output(key), here)
    mine, scale = (at(value, here) for value in small.landed(key))
    theirs = at(large.landed(key)[0], there, kept)
    values = found + torch.where(scale == 0, 0.0, (theirs - mine) / scale)
    if not small.landings[key].rectified:
        return Targets(values, scale=scale)
    return Targets(values, found - torch.where(scale == 0, 0.0, mine / scale), scale.sign(), scale)
