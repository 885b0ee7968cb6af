"""Tables for people: the groups of a model, and what pruning left of it."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from compress.channels import ChannelGraph
    from compress.pruning import PruneResult

MAX_REASONS = 12


def render(*tables: Table) -> str:
    """Tables as plain text of fixed width, the same on a terminal and in a file."""
    text = io.StringIO()
    console = Console(file=text, width=110, color_system=None)
    for table in tables:
        console.print(table)
    return text.getvalue().rstrip()


def graph_table(graph: ChannelGraph) -> str:
    """One row a group, then what is frozen and why."""
    table = Table(title="channel groups")
    for column in ("group", "units", "parameters", "removal"):
        table.add_column(column, justify="right" if column == "units" else "left")
    for group in graph.groups:
        names = sorted({member.parameter for member in group.members})
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        table.add_row(group.name, str(group.num_units), shown, group.inexact or "exact")
    frozen = Table(title="never removed")
    frozen.add_column("axis")
    frozen.add_column("reason")
    for axis in graph.frozen[:MAX_REASONS]:
        part = f"{axis.parameter} [{axis.axis}]"
        part += "" if axis.num_elements == axis.size else f" {axis.num_elements} of {axis.size}"
        frozen.add_row(part, axis.reason)
    if len(graph.frozen) > MAX_REASONS:
        frozen.add_row(f"... and {len(graph.frozen) - MAX_REASONS} more", "see graph.frozen")
    return render(table, frozen)


def result_table(result: PruneResult) -> str:
    """Cost before and after, and the output channels of every layer."""
    costs = Table(title="pruned exactly" if result.plan.exact else "pruned (not exactly: see plan.groups[i].inexact)")
    for column in ("", "before", "after", "kept"):
        costs.add_column(column, justify="right" if column else "left")
    for name in ("params", "macs", "bytes"):
        before, after = getattr(result.before, name), getattr(result.after, name)
        costs.add_row(name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}")
    layers = Table(title="output channels")
    layers.add_column("layer")
    layers.add_column("kept", justify="right")
    layers.add_column("of", justify="right")
    for name, (kept, total) in result.kept.items():
        layers.add_row(name, str(kept), str(total))
    notes = "".join(f"\nnote: {note}" for note in result.notes)
    return render(costs, layers) + notes
