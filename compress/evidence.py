"""What criteria judge channels by: weights, and statistics of activations gathered in one pass over all batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.activations import ActivationSums, Values
from compress.channels import ChannelGraph, ChannelGroup, Member
from compress.errors import PruneError
from compress.gradients import FirstOrder
from compress.gram import Grams
from compress.trial import Trial


@dataclass(frozen=True)
class Evidence:
    """Everything a criterion may look at. Weights are read from the model; the rest was collected beforehand."""

    model: nn.Module
    graph: ChannelGraph
    activations: ActivationSums | None = None
    loss: Callable[..., Any] | None = None
    seed: int = 0
    gradients: FirstOrder | None = None
    grams: Grams | None = None
    trial: Trial | None = None
    _tensors: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the model."""
        if not self._tensors:
            self._tensors.update(self.model.named_parameters(remove_duplicate=False))
            self._tensors.update(self.model.named_buffers(remove_duplicate=False))
        return self._tensors[name].detach()

    def members(self, group: ChannelGroup) -> Iterator[tuple[Member, Tensor]]:
        """The members of ``group`` with their tensors."""
        return ((member, self.tensor(member.parameter)) for member in group.members)

    def weight_mean(self, group: ChannelGroup, power: int) -> Values:
        """Mean of ``|w| ** power`` over the weights that make each channel, shape (units,).

        Those are the slices of the group's producers (matrices and kernels); where there are none, of all members.
        """
        total, count = np.zeros(group.num_units), 0
        for member, tensor in self._makers(group):
            sums = _power_sums(tensor, member.axis, power).cpu().numpy()
            total += sums[member.indices].sum(axis=1)
            count += tensor.numel() // tensor.shape[member.axis] * member.indices.shape[1]
        return total / max(count, 1)

    def rows(self, group: ChannelGroup) -> Iterator[Tensor]:
        """The weights that make each channel, one float64 matrix of shape (units, weights) a parameter."""
        for member, tensor in self._makers(group):
            rows = tensor.movedim(member.axis, 0).reshape(tensor.shape[member.axis], -1).double()
            yield rows[torch.from_numpy(member.indices).to(tensor.device)].reshape(group.num_units, -1)

    def _makers(self, group: ChannelGroup) -> list[tuple[Member, Tensor]]:
        """The group's producers (matrices and kernels); where there are none, all members of floating point."""
        found = [(m, t) for m, t in self.members(group) if t.is_floating_point()]
        if any(t.is_meta for _, t in found):
            raise PruneError(
                "weights on the meta device have no values to rank by: load them, or plan with criterion='random'"
            )
        return [(m, t) for m, t in found if m.role == "producer" and t.dim() > 1] or found

    def activation_mean(self, group: ChannelGroup, statistic: str) -> Values:
        """``"magnitude"`` or ``"nonzero"`` of each channel where it is read, shape (units,).

        Raises:
            PruneError: the evidence was collected without activations.
        """
        if self.activations is None:
            raise PruneError("this evidence holds no activations: declare `needs = {'activations'}` on the criterion")
        values = self.graph.unit_means(group, getattr(self.activations, statistic), self.activations.num_reads)
        # a channel that no weight reads (it is only multiplied by others) is judged by its weights instead
        return np.where(np.isnan(values), self.weight_mean(group, 1), values)

    def first_order(self, group: ChannelGroup) -> Values:
        """Mean over batches of the squared sum of gradient x weight where a channel is read, shape (units,).

        Zero for a channel that the loss does not depend on. Raises :class:`PruneError` for evidence without gradients.
        """
        if self.gradients is None:
            raise PruneError("this evidence holds no gradients: declare `needs = {'gradients'}` on the criterion")
        return np.nan_to_num(self.graph.unit_means(group, self.gradients.squared, self.gradients.known))


def _power_sums(tensor: Tensor, axis: int, power: int) -> Tensor:
    """Sums of ``|tensor| ** power`` over all axes but one, in double precision; widened a block at a time."""
    others = [other for other in range(tensor.dim()) if other != axis]
    if not others:
        return tensor.double().abs() ** power
    rows = max(1, BLOCK * tensor.shape[axis] // max(tensor.numel(), 1))
    norms = [torch.linalg.vector_norm(part, power, others, dtype=torch.float64) for part in tensor.split(rows, axis)]
    return torch.cat(norms) ** power


BLOCK = 2**22  # elements that are widened at a time
