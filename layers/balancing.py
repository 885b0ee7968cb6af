"""Factors of alike size: the same product, and one that can be trained.

The gradient of one factor grows with the size of the other. A decomposition gives one that is near an orthonormal basis
and one that carries the singular values: where these differ by 30 x, the small one takes steps that are 900 x too large
at a learning rate that suits the other. With norms alike, as in "spectral initialisation", one rate suits both. Source:
Khodak et al. 2021, "Initialization and regularization of factorized neural layers", section 3.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

SWEEPS = 10  # over chains of three, in which one pair changes the other


@torch.no_grad()
def balance(module: nn.Module) -> None:
    """Scale the thin layers of one module of :mod:`layers.low_rank`, in place, so that for each rank the norm of what
    gives it is that of what takes it. What they compute together does not change.

    >>> from layers.low_rank import LowRankLinear
    >>> layer = LowRankLinear.from_factors(torch.full((4, 1), 9.0), torch.ones(1, 4))
    >>> balance(layer)
    >>> layer.reduce.weight.norm() == layer.expand.weight.norm()
    tensor(True)
    """
    layers = list(module.children())
    for _ in range(SWEEPS if len(layers) > 2 else 1):
        for giver, taker in pairwise(layers):
            gives, takes = _outputs(giver), _inputs(taker)
            norms = gives.flatten(1).norm(dim=1), takes.movedim(2, 1).flatten(2).norm(dim=2).flatten()
            there = (norms[0] > 0) & (norms[1] > 0)
            scale = torch.where(there, (norms[1] / norms[0].clamp(min=1e-30)).sqrt(), 1.0)
            gives.mul_(scale.view(-1, *[1] * (gives.dim() - 1)))
            takes.div_(scale.view(len(takes), 1, -1, *[1] * (takes.dim() - 3)))


def _outputs(layer: nn.Module) -> Tensor:
    """A view (outputs, ...) of the weight."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(layer, nn.Embedding) else weight


def _inputs(layer: nn.Module) -> Tensor:
    """A view (groups, outputs of a group, inputs of a group, ...) of the weight."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    return weight.unflatten(0, (getattr(layer, "groups", 1), -1))
