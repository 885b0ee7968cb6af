"""Press layers towards low rank while training, so that less is lost when thin layers take their place.

The sum of the singular values (Fazel 2002, "Matrix rank minimization with applications", section 5.1.4) is the convex
stand-in for the rank; for convolutions as trained rank pruning does it, Xu et al. 2020, "TRP: Trained rank pruning for
efficient deep neural networks", section 3.3. Its gradient is the polar factor of the weight without the directions that
are rounding already (see :mod:`layers.nuclear`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from compress.errors import PruneError
from compress.names import protected
from layers.nuclear import nuclear_norms

UNFOLDS = ("spatial", "tucker2")
LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Embedding


class NuclearNorm(nn.Module):
    """``penalty(model, progress)``: ``strength * progress * sum of the singular values`` of all layers' weights.

    Every step of gradient descent takes ``lr * strength * progress`` off each singular value, large or small alike. A
    dense layer is one matrix (outputs x inputs), as is a 1 x 1 convolution and an embedding. A k x k convolution is the
    matrix that :func:`compress.factorize` cuts: for "spatial" (outputs x width, inputs x height) and with both
    exchanged, half of each; for "tucker2" (outputs, inputs x kernel) and (inputs, outputs x kernel), half of each.
    Groups are matrices of their own, and convolutions of other than two axes are taken as for "tucker2".

    Args:
        model: that is trained, or one of its class: tells which parameters are weights of layers.
        strength: at ``progress`` 1, >= 0; of the order of 1e-4 for SGD with momentum 0.9.
        unfold: "spatial" or "tucker2".
        protect: shell patterns of parameter or module names that are left alone.

    Raises:
        PruneError: for a strength below 0, an unknown unfolding, a pattern without a match, and a model without layers.

    >>> model = nn.Linear(3, 2, bias=False)
    >>> _ = nn.init.constant_(model.weight, 0.5)  # of rank 1: one singular value, sqrt(6) / 2
    >>> round(NuclearNorm(model, strength=0.1)(model, progress=0.5).item(), 4)
    0.0612
    """

    def __init__(
        self, model: nn.Module, strength: float, *, unfold: str = "spatial", protect: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if not strength >= 0:
            raise PruneError(f"strength is {strength}, and a penalty presses towards zero: give a number such as 1e-4")
        if unfold not in UNFOLDS:
            raise PruneError(f"unfold={unfold!r} is unknown: choose among {', '.join(UNFOLDS)}")
        self.strength, self.unfold = strength, unfold
        names = [name for name, _ in model.named_parameters()]
        left = {name for pattern in protect for name in protected(pattern, names)}
        self._groups = {
            name: getattr(module, "groups", 1)
            for path, module in model.named_modules()
            if isinstance(module, LAYERS) and (name := f"{path}.weight".lstrip(".")) in names and name not in left
        }
        if not self._groups:
            raise PruneError("the model has no dense layer, convolution or embedding whose rank could be pressed")

    def forward(self, model: nn.Module, progress: float) -> Tensor:
        """A scalar; ``progress`` in [0, 1] is how far it has grown."""
        parameters = dict(model.named_parameters())
        if missing := sorted(self._groups.keys() - parameters.keys()):
            raise PruneError(f"the model has no {missing[0]}: make the penalty from the model that is trained")
        found = [
            (matrix, share)
            for name, groups in self._groups.items()
            for weight in parameters[name].chunk(groups)
            for matrix, share in _matrices(weight, self.unfold)
        ]
        norms = nuclear_norms([matrix for matrix, _ in found])
        shares = torch.tensor([share for _, share in found], dtype=norms.dtype, device=norms.device)
        return self.strength * progress * (norms @ shares)


def _matrices(weight: Tensor, unfold: str) -> Iterator[tuple[Tensor, float]]:
    """The unfoldings of a weight (O, I, *K), each with its part in the sum."""
    if weight.dim() == 2 or weight[0, 0].numel() == 1:
        yield weight.flatten(1), 1.0
    elif unfold == "spatial" and weight.dim() == 4:
        yield weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1), 0.5
        yield weight.permute(0, 2, 1, 3).flatten(2).flatten(0, 1), 0.5
    else:
        yield weight.flatten(1), 0.5
        yield weight.transpose(0, 1).flatten(1), 0.5
