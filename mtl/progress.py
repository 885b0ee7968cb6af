"""What a run shows while it trains."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtl.history import Epoch

# Reading a loss waits for the device, so it is done now and then only.
STEPS_PER_UPDATE = 10


class Report:
    """One bar over all steps of a run, and a line above it for each epoch; silent where the output is no terminal.

    Args:
        total_steps: of the run
        done_steps: by an earlier process of the same run
        enabled: False for silence in any case
    """

    def __init__(self, total_steps: int, done_steps: int, *, enabled: bool) -> None:
        console = Console()
        self.live = enabled and console.is_terminal
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not self.live)
        self._task = self._bar.add_task("training", total=total_steps, completed=done_steps)

    def __enter__(self) -> Self:
        if self.live:  # (a bar that is disabled ends with an empty line all the same, before rich 14.3)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._bar.stop()

    def steps(self, num_steps: int, text: str) -> None:
        """So many more steps are done."""
        self._bar.update(self._task, advance=num_steps, description=text)

    def epoch(self, row: Epoch, num_epochs: int) -> None:
        """An epoch is done."""
        if not self.live:
            return
        parts = [f"epoch {row.epoch}/{num_epochs}", f"lr {row.lr:.2g}"]
        parts += [f"loss {_numbers(row.loss)}", f"train {_numbers(row.train)}"]
        if row.validation:
            parts.append(f"validation {_numbers(row.validation)}")
        self._bar.console.print("  ".join([*parts, f"{row.seconds:.1f} s"]), highlight=False)


def _numbers(values: dict[str, float]) -> str:
    if len(values) == 1:
        return f"{next(iter(values.values())):.4f}"
    return " ".join(f"{name} {value:.4f}" for name, value in values.items())
