"""What was done to a model, to be read by people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Piece:
    """One captured module: ``name`` is its dotted name, empty for the whole model.

    ``milliseconds`` of one call on the example, of everything that was tried; ``skipped`` says why others were not, or
    were not kept.
    """

    name: str
    backend: str
    passes: tuple[str, ...]
    milliseconds: Mapping[str, float]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.name or 'the whole model'}: runs by {self.backend}", *self.passes]
        if self.milliseconds:
            times = sorted(self.milliseconds.items(), key=lambda item: item[1])
            lines.append("milliseconds: " + ", ".join(f"{name} {time:.3g}" for name, time in times))
        lines += [f"without {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n  ".join(lines)


@dataclass(frozen=True)
class Report:
    """``pieces`` that were optimised, and the modules that stay as they are, each with the reason."""

    pieces: tuple[Piece, ...]
    unchanged: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [str(piece) for piece in self.pieces]
        return "\n".join(
            [*lines, *(f"{name or 'the model'}: as it is ({why})" for name, why in self.unchanged.items())]
        )
