"""Which calls a captured graph is valid for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from layers.inference.structure import Structure

# Values that can be compared, and that a graph may therefore have as constants.
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must be; an axis is a length, or the name of one that several tensors may share."""

    dtype: torch.dtype
    device: torch.device
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """``leaves`` are specifications of tensors and values of everything else.

    ``ranges`` are of the named lengths, and ``verified`` are lengths outside of them that were tried and agreed.
    """

    structure: Structure
    leaves: tuple[Any, ...]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    verified: tuple[Mapping[str, int], ...] = ()

    @classmethod
    def of(
        cls, leaves: Sequence[Any], structure: Structure, traced: Sequence[Tensor], constraints: Mapping[Any, Any]
    ) -> Signature:
        """From the example's leaves and what `torch.export` made of its tensors: lengths that are symbols may vary."""
        fakes = iter(traced)
        specs: list[Any] = []
        ranges: dict[str, tuple[float, float]] = {}
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                specs.append(leaf)
                continue
            shape: list[int | str] = list(leaf.shape)
            for axis, size in enumerate(next(fakes).shape):
                symbol = getattr(getattr(size, "node", None), "expr", None)  # of a torch.SymInt
                if getattr(symbol, "is_Symbol", False):  # and not an expression of others
                    limits = constraints[symbol]
                    # torch.export decides for every length as if it were neither 0 nor 1
                    ranges[str(symbol)] = (max(2.0, float(limits.lower)), float(limits.upper))
                    shape[axis] = str(symbol)
            specs.append(TensorSpec(leaf.dtype, leaf.device, tuple(shape)))
        return cls(structure, tuple(specs), ranges)

    def covers(self, leaves: Sequence[Any]) -> bool:
        """Whether the graph computes what the module would for a call with these leaves."""
        lengths = self.lengths(leaves)
        if lengths is None:
            return False
        within = all(self.ranges[name][0] <= length <= self.ranges[name][1] for name, length in lengths.items())
        return within or lengths in self.verified

    def lengths(self, leaves: Sequence[Any]) -> dict[str, int] | None:
        """The named lengths in a call with these leaves, or None where something else differs."""
        lengths: dict[str, int] = {}
        for leaf, spec in zip(leaves, self.leaves, strict=True):
            if not isinstance(spec, TensorSpec):
                if type(leaf) is not type(spec) or leaf != spec:
                    return None
                continue
            if not isinstance(leaf, Tensor) or leaf.dtype != spec.dtype or leaf.device != spec.device:
                return None
            if leaf.dim() != len(spec.shape) or leaf.layout != torch.strided:
                return None
            for size, wanted in zip(leaf.shape, spec.shape, strict=True):
                if size != (lengths.setdefault(wanted, size) if isinstance(wanted, str) else wanted):
                    return None
        return lengths


def unknown_type(leaves: Sequence[Any]) -> str | None:
    """The type of a leaf that is neither a tensor nor a value that can be compared."""
    return next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))), None)
