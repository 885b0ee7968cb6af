"""Press channels towards zero while training, so that less is lost when they are removed: a group lasso that grows.

Yuan & Lin (2006), "Model selection and estimation in regression with grouped variables", eq. 2.2, over the units of the
channel graph; growing after Wang et al. (2021), "Neural Pruning via Growing Regularization", section 3.1; weaker units
pressed harder after Fang et al. (2023), "DepGraph: Towards Any Structural Pruning", eq. 4.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.channels import ChannelGraph, ChannelGroup, Member
from compress.errors import PruneError
from compress.labels import Array
from compress.plan import PrunePlan

SPREAD = 4.0  # alpha of DepGraph's eq. 4: the weakest unit of a group is pressed 2^4 times as hard as the strongest


class GroupLasso(nn.Module):
    """``penalty(model, progress)``: ``strength * progress * sum of weight * sqrt(elements) * norm`` over all units.

    The norm of a unit is that of all parameter elements that go with it, in every layer. It is scaled by their number,
    so that one strength fits narrow and wide layers. The weight of a unit is ``2 ** (4 * (max - squares) / (max -
    min))`` with the sum of its squares and the largest and smallest of its group, and no gradient flows through it.
    With ``plan`` it is 1 for the units that the plan removes and 0 for all others.

    Args:
        graph: of the model that is trained, from :func:`compress.trace`; ``graph.protecting(...)`` leaves layers alone.
        strength: at ``progress`` 1, >= 0; of the order of 1e-4.
        plan: made for the model that is trained.

    Raises:
        PruneError: for a strength below 0, a graph without groups, and a plan that removes no unit of the graph.

    >>> import compress
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> penalty = GroupLasso(compress.trace(model, torch.zeros(1, 3)), strength=1e-4)
    >>> penalty(model, progress=0.5).item() > 0
    True
    """

    def __init__(self, graph: ChannelGraph, strength: float, *, plan: PrunePlan | None = None) -> None:
        super().__init__()
        if not strength >= 0:
            raise PruneError(f"strength is {strength}, and a penalty presses towards zero: give a number such as 1e-4")
        if not graph.groups:
            raise PruneError(
                "the graph has no channel that could be removed, so that none is pressed: see graph.frozen"
            )
        self.strength = strength
        removed = None if plan is None else plan.removed()
        self._groups = [_Units(group, removed) for group in graph.groups]
        if removed is not None and not any(units.chosen.any() for units in self._groups if units.chosen is not None):
            raise PruneError("the plan removes no unit of this graph: make both from the model that is trained")

    def forward(self, model: nn.Module, progress: float) -> Tensor:
        """A scalar; ``progress`` in [0, 1] is how far it has grown."""
        parameters = dict(model.named_parameters(remove_duplicate=False))  # the graph knows one name of a tied one
        norms = [units.norm(parameters) for units in self._groups]
        return self.strength * progress * torch.stack(norms).sum()


class _Units:
    """The units of a group: which of them each element along an axis of a parameter belongs to."""

    def __init__(self, group: ChannelGroup, removed: Mapping[tuple[str, int], Array] | None) -> None:
        self.num_units = group.num_units
        self.members = [(member, _unit_of_element(member)) for member in group.members]
        self.chosen = None if removed is None else _removed_units(group, removed)

    def norm(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The sum of the weighted norms, without ``strength``; a scalar."""
        present = [(parameters[m.parameter], m, units) for m, units in self.members if m.parameter in parameters]
        if not present:
            return next(iter(parameters.values())).new_zeros(())
        first = present[0][0]
        dtype = torch.promote_types(first.dtype, torch.float32)  # squares of half precision overflow
        pieces = [_squares_along(parameter, member, dtype) for parameter, member, _ in present]
        owners = torch.cat([units for _, _, units in present]).to(first.device)
        squares = torch.zeros(self.num_units + 1, dtype=dtype, device=first.device)  # the last: of no unit
        squares = squares.index_add(0, owners, torch.cat(pieces))
        num_elements = sum(m.indices.shape[1] * (parameter.numel() // m.size) for parameter, m, _ in present)
        squares = squares[: self.num_units]
        tiny = torch.finfo(squares.dtype).tiny  # the gradient at zero is zero
        return num_elements**0.5 * (self._weights(squares.detach()) * (squares + tiny).sqrt()).sum()

    def _weights(self, squares: Tensor) -> Tensor:
        if self.chosen is not None:
            return self.chosen.to(squares)
        low, high = squares.aminmax()
        return 2 ** (SPREAD * (high - squares) / (high - low).clamp_min(torch.finfo(squares.dtype).tiny))


def _squares_along(parameter: Tensor, member: Member, dtype: torch.dtype) -> Tensor:
    """The sum of squares at each position along the member's axis, shape (size,)."""
    if parameter.shape[member.axis] != member.size:
        raise PruneError(
            f"{member.parameter} has shape {tuple(parameter.shape)} and had {member.size} elements along axis "
            f"{member.axis} when the graph was made: trace the model that is trained"
        )
    squares = parameter.to(dtype).square()
    others = [axis for axis in range(parameter.dim()) if axis != member.axis]
    return squares.sum(others) if others else squares


def _unit_of_element(member: Member) -> Tensor:
    """For each element along the axis the unit that it belongs to, ``num_units`` where it is none, shape (size,)."""
    num_units, each = member.indices.shape
    units = torch.full((member.size,), num_units)
    units[torch.from_numpy(member.indices).flatten()] = torch.arange(num_units).repeat_interleave(each)
    return units


def _removed_units(group: ChannelGroup, removed: Mapping[tuple[str, int], Array]) -> Tensor:
    member = group.members[0]
    gone = torch.zeros(member.size, dtype=torch.bool)
    gone[torch.from_numpy(removed.get((member.parameter, member.axis), member.indices[:0].flatten()))] = True
    return gone[torch.from_numpy(member.indices)].all(1)
