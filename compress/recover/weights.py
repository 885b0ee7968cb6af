"""The parameters of one layer as a regression has them: a matrix, and a constant for each output."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from compress.recover.pair import Side
from compress.sites import Key, Site


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, shared ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@dataclass(frozen=True)
class Weights:
    """``shift`` moves the outputs, in the direction of ``sign``; ``constant``: the operator itself adds it."""

    site: Site
    weight: Tensor
    shift: Tensor | None
    sign: int
    constant: bool

    @staticmethod
    def of(side: Side, key: Key, tensors: Mapping[str, Tensor]) -> "Weights":
        """Those of a site, among the model's ``tensors`` by name."""
        site, intercept = side.sites[key], side.landings[key].intercept
        name, sign = (None, 1) if intercept is None else intercept
        shift = None if name is None else tensors[name].detach()
        return Weights(site, tensors[site.parameter].detach(), shift, sign, name is not None and name == site.bias)

    def write(self, matrix: Tensor) -> None:
        """Put (g, O, D + 1) in their place: the last column is added to the constants."""
        self.site.write(self.weight, matrix[:, :, :-1].to(self.weight))
        if self.shift is not None:
            self.shift.add_(matrix[:, :, -1].reshape(self.shift.shape).to(self.shift), alpha=self.sign)

    def values(self) -> tuple[Tensor, Tensor | None]:
        """A copy to go back to."""
        return self.weight.clone(), None if self.shift is None else self.shift.clone()

    def restore(self, values: tuple[Tensor, Tensor | None]) -> None:
        """Back to a copy."""
        self.weight.copy_(values[0])
        if self.shift is not None and values[1] is not None:
            self.shift.copy_(values[1])
