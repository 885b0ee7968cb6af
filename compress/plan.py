"""A pruning plan as plain data: which elements of which parameters go, and which integers of the model change."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from compress.channels import ChannelGraph
from compress.errors import PruneError
from compress.labels import Array
from compress.plans import document, plan_kind, reading
from compress.provenance import Stored

VERSION = 1


@dataclass(frozen=True)
class PlanMember:
    """Elements ``removed`` of axis ``axis`` (of length ``size``) of ``parameter``; roles as in the channel graph."""

    parameter: str
    axis: int
    removed: tuple[int, ...]
    role: str
    size: int


@dataclass(frozen=True)
class PlanGroup:
    """What one group loses: ``num_removed`` of ``num_units`` channels; ``inexact`` says why that is not exact."""

    name: str
    num_units: int
    num_removed: int
    members: tuple[PlanMember, ...]
    inexact: str = ""


@dataclass(frozen=True)
class StoredValue:
    """The new value of an integer that a module keeps."""

    module: str
    name: str
    path: tuple[int | str, ...]
    value: int


@plan_kind
@dataclass(frozen=True)
class PrunePlan:
    """Everything that surgery needs. Indices are those of the model that the plan was made for.

    >>> PrunePlan.from_json(PrunePlan().to_json()) == PrunePlan()
    True
    """

    kind: ClassVar[str] = "prune"
    groups: tuple[PlanGroup, ...] = ()
    integers: tuple[StoredValue, ...] = ()

    @classmethod
    def empty(cls) -> "PrunePlan":
        """The plan that removes nothing."""
        return cls()

    @property
    def exact(self) -> bool:
        """Whether the pruned model equals the original with the consumers' slices of removed channels set to zero."""
        return not any(group.inexact for group in self.groups)

    def removed(self, role: str | None = None) -> dict[tuple[str, int], Array]:
        """Sorted indices of all removed elements by parameter and axis; of members with ``role`` only, if given."""
        found: dict[tuple[str, int], set[int]] = {}
        for member in self.members():
            if role is not None and member.role != role:
                continue
            found.setdefault((member.parameter, member.axis), set()).update(member.removed)
        return {key: np.array(sorted(indices), dtype=np.int64) for key, indices in found.items()}

    def members(self) -> Iterable[PlanMember]:
        """The members of all groups."""
        return (member for group in self.groups for member in group.members)

    def sizes(self) -> dict[tuple[str, int], int]:
        """Lengths of the touched axes before removal."""
        return {(member.parameter, member.axis): member.size for member in self.members()}

    def kept(self, parameter: str, axis: int = 0) -> list[int] | None:
        """Which elements of ``axis`` of ``parameter`` stay; None where the plan does not touch it.

        For the channels that a layer still gives, such as those to compare with the dense model's.
        """
        gone = self.removed().get((parameter, axis))
        size = self.sizes().get((parameter, axis), 0)
        return None if gone is None else [int(index) for index in np.setdiff1d(np.arange(size), gone)]

    def then(self, following: "PrunePlan") -> "PrunePlan":
        """One plan that does what this one and then ``following`` do, in the indices of the first model.

        Raises:
            PruneError: ``following`` was made for a model that this plan does not lead to.
        """
        removed, sizes = self.removed(), self.sizes()
        kept = {key: np.setdiff1d(np.arange(sizes[key]), gone) for key, gone in removed.items()}
        groups = list(self.groups)
        for group in following.groups:
            members = tuple(_translated(member, kept, sizes) for member in group.members)
            groups.append(PlanGroup(group.name, group.num_units, group.num_removed, members, group.inexact))
        integers = {(value.module, value.name, value.path): value for value in (*self.integers, *following.integers)}
        return PrunePlan(tuple(groups), tuple(integers.values()))

    def carry_out(self, model: nn.Module, *, inplace: bool = False, empty: bool = False) -> nn.Module:
        """See :meth:`compress.plans.Plan.carry_out`; nothing new is made, so that ``empty`` does not matter."""
        from compress.surgery import cut

        return cut(model, self, inplace=inplace)

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return json.dumps({"version": VERSION, "kind": self.kind, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "PrunePlan":
        """Read what :meth:`to_json` wrote.

        Raises:
            PruneError: the text is not a plan, or was written by a later version.
        """
        with reading(what := "a pruning plan"):
            data = document(text, what, cls.kind, VERSION)
            return cls(
                tuple(_group_from(group) for group in data["groups"]),
                tuple(StoredValue(v["module"], v["name"], tuple(v["path"]), int(v["value"])) for v in data["integers"]),
            )


def make_plan(graph: ChannelGraph, removed: Mapping[int, Array], integers: Mapping[Stored, int]) -> PrunePlan:
    """The plan that removes the units ``removed[g]`` of each group index ``g`` and sets ``integers``."""
    groups = []
    for group in graph.groups:
        units = removed.get(group.index)
        if units is None or not len(units):
            continue
        members = tuple(
            PlanMember(m.parameter, m.axis, tuple(np.sort(m.indices[units].reshape(-1)).tolist()), m.role, m.size)
            for m in group.members
        )
        groups.append(PlanGroup(group.name, group.num_units, len(units), members, group.inexact))
    values = tuple(StoredValue(leaf.module, leaf.name, leaf.path, value) for leaf, value in integers.items())
    return PrunePlan(tuple(groups), values)


def _translated(
    member: PlanMember, kept: Mapping[tuple[str, int], Array], sizes: Mapping[tuple[str, int], int]
) -> PlanMember:
    key = (member.parameter, member.axis)
    if key not in kept:
        return member
    if len(kept[key]) != member.size:
        raise PruneError(
            f"plans do not follow each other: {member.parameter} axis {member.axis} has {len(kept[key])} elements "
            f"after the first and {member.size} before the second; make the second for the pruned model"
        )
    return PlanMember(*key, tuple(kept[key][list(member.removed)].tolist()), member.role, sizes[key])


def _group_from(data: Mapping[str, Any]) -> PlanGroup:
    members = tuple(
        PlanMember(m["parameter"], int(m["axis"]), tuple(m["removed"]), m["role"], int(m["size"]))
        for m in data["members"]
    )
    return PlanGroup(data["name"], int(data["num_units"]), int(data["num_removed"]), members, data["inexact"])
