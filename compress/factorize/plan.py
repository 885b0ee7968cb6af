"""A factorisation plan as plain data: which layers are replaced by which thin ones, at which ranks."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from torch import nn

from compress.plans import document, plan_kind, reading
from compress.sandbox import unwrapped

VERSION = 1
LAST = {
    "linear": "expand",
    "embedding": "expand",
    "tucker2": "expand",
    "spatial": "second",
    "attention": "out_proj",
}  # the child that gives the layer's outputs
PAIRS = ("tucker2", "attention")  # kinds of two ranks


@dataclass(frozen=True)
class Factor:
    """The layer ``module``, of a weight with this ``shape``, becomes a layer of :mod:`layers.low_rank`.

    ``kind`` is "linear", "embedding", "tucker2", "spatial" (``first`` says which kernel comes first) or "attention";
    ``ranks`` are those of the inputs' and of the outputs' side for "tucker2" (None: no 1 x 1 convolution there), those
    of a head's scores and values for "attention" (``shape`` is then its last weight's), else one number, each of all
    groups together. ``error`` is what the model's outputs lose on the calibration data, to first order, as a part of
    their variance. ``settings`` are what a layer that is none of ``torch.nn`` does not tell: stride,
    padding, dilation and groups of a convolution, "transposed" of a matrix of shape (inputs, outputs).
    """

    module: str
    kind: str
    ranks: tuple[int | None, ...]
    first: str
    shape: tuple[int, ...]
    error: float
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def last(self) -> str:
        """The child that gives the outputs and has the bias."""
        return "core" if self.kind == "tucker2" and self.ranks[1] is None else LAST[self.kind]


@plan_kind
@dataclass(frozen=True)
class FactorPlan:
    """Everything that surgery needs; names are those of the dense model.

    >>> FactorPlan.from_json(FactorPlan().to_json()) == FactorPlan()
    True
    """

    kind: ClassVar[str] = "factorize"
    factors: tuple[Factor, ...] = ()

    @property
    def origins(self) -> dict[str, str]:
        """Weights of the new model that give the outputs of a weight of the dense one, by name (tables have no inputs
        to refit them by)."""
        weights = (f for f in self.factors if f.kind not in ("embedding", "attention"))  # (whose last keeps its name)
        return {f"{f.module}.{f.last}.weight": f"{f.module}.weight" for f in weights}

    def carry_out(self, model: nn.Module, *, inplace: bool = False, empty: bool = False) -> nn.Module:
        """See :meth:`compress.plans.Plan.carry_out`: layers are factorised by their own weights alone."""
        from compress.factorize.surgery import balanced, insert
        from compress.surgery import copied

        made = unwrapped(model) if inplace else copied(unwrapped(model))
        insert(made, self, empty=empty)
        if not empty:
            balanced(made, self)
        return made

    def to_json(self) -> str:
        """The plan as a JSON document."""
        return json.dumps({"version": VERSION, "kind": self.kind, **asdict(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "FactorPlan":
        """Read what :meth:`to_json` wrote.

        Raises:
            PruneError: the text is not a plan, or was written by a later version.
        """
        with reading(what := "a factorisation plan"):
            data = document(text, what, cls.kind, VERSION)
            return cls(tuple(_factor_from(factor) for factor in data["factors"]))


def _factor_from(data: Mapping[str, Any]) -> Factor:
    kind, ranks, first = data["kind"], data["ranks"], data["first"]
    if kind not in LAST or not isinstance(ranks, list) or len(ranks) != (2 if kind in PAIRS else 1):
        raise ValueError(f"kind {kind!r} with ranks {ranks!r} is unknown")
    if not all(type(rank) is int and rank > 0 for rank in ranks if rank is not None or kind != "tucker2"):
        raise ValueError(f"ranks {ranks!r} are not positive numbers")
    if first not in ("", "vertical", "horizontal"):
        raise ValueError(f"first={first!r} is unknown")
    shape = tuple(int(n) for n in data["shape"])
    settings = {
        name: tuple(value) if isinstance(value, list) else value for name, value in data.get("settings", {}).items()
    }
    return Factor(str(data["module"]), str(kind), tuple(ranks), str(first), shape, float(data["error"]), settings)
