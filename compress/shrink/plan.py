"""A plan of several plans, each for the model that those before it make."""

import json
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from compress.errors import PruneError
from compress.plans import Plan, plan_kind, read_plan
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
        try:
            data = json.loads(text)
            if data["kind"] != cls.kind:
                raise PruneError(f"not a plan of several steps but {data['kind']!r}: pass what to_json() gave")
            if data["version"] != VERSION:
                raise PruneError(
                    f"the plan has format version {data['version']}, this prunus reads {VERSION}: upgrade it"
                )
            return cls(tuple(read_plan(json.dumps(step)) for step in data["steps"]))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise PruneError(
                f"not a plan of several steps ({type(error).__name__}: {error}): pass what to_json() gave"
            ) from error
