"""A plan of several plans, each for the model that those before it make."""

import json
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from compress.plan import PrunePlan
from compress.plans import Plan, document, plan_kind, read_plan, reading
from compress.sandbox import unwrapped
from compress.surgery import copied

VERSION = 1


@plan_kind
@dataclass(frozen=True)
class ShrinkPlan:
    """One plan after the other: a pruning, then a factorisation of what it leaves.

    >>> ShrinkPlan.from_json(ShrinkPlan().to_json()) == ShrinkPlan()
    True
    """

    kind: ClassVar[str] = "shrink"
    steps: tuple[Plan, ...] = ()

    def carry_out(self, model: nn.Module, *, inplace: bool = False, empty: bool = False) -> nn.Module:
        """See :meth:`compress.plans.Plan.carry_out`; in place, a step that does not fit leaves those before it."""
        made = unwrapped(model)
        for number, step in enumerate(self.steps):
            made = step.carry_out(made, inplace=inplace or number > 0, empty=empty)
        return made if inplace or self.steps else copied(made)

    def to_json(self) -> str:
        """The plan as a JSON document."""
        steps = [json.loads(step.to_json()) for step in self.steps]
        return json.dumps({"version": VERSION, "kind": self.kind, "steps": steps}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "ShrinkPlan":
        """Read what :meth:`to_json` wrote.

        Raises:
            PruneError: the text is not a plan, was written by a later version, or holds a step of an unknown kind.
        """
        with reading(what := "a plan of several steps"):
            data = document(text, what, cls.kind, VERSION)
            return cls(tuple(read_plan(json.dumps(step)) for step in data["steps"]))


def joined(first: Plan, second: Plan) -> Plan:
    """One plan that does the ``first`` and then the ``second``, which is for the model that the first one makes."""
    if isinstance(first, PrunePlan) and isinstance(second, PrunePlan):
        return first.then(second)
    steps = [step for plan in (first, second) for step in (plan.steps if isinstance(plan, ShrinkPlan) else (plan,))]
    return ShrinkPlan(tuple(step for step in steps if step != PrunePlan.empty()))
