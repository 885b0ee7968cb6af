"""Tables for people: the groups of a model, and what pruning left of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from compress.channels import ChannelGraph, FrozenAxis
from compress.cost import Cost
from compress.overview import GroupFacts, Overview, overview, owner_of
from compress.select import FLOOR

if TYPE_CHECKING:
    from compress.pruning import PruneResult
    from compress.recover import Recovery

MODEL = "(model)"  # for the path of the model itself, which is empty


def render(*tables: Table) -> str:
    """Tables as plain text of fixed width, the same on a terminal and in a file."""
    text = io.StringIO()
    console = Console(file=text, width=120, color_system=None)
    for table in tables:
        console.print(table)
    return text.getvalue().rstrip()


def graph_table(graph: ChannelGraph) -> str:
    """One row a group, then what is not exact or is frozen and why, operators without a rule, and what is in reach."""
    facts = overview(graph)
    tables = [_group_table(facts), _inexact_table(facts), _frozen_table(facts), _gap_table(facts)]
    filled = [table for table in tables if table.row_count]
    return "\n".join(
        [*([render(*filled), ""] if filled else []), *(f"note: {note}" for note in facts.notes), reach(facts)]
    )


def reach(facts: Overview) -> str:
    """How few MACs can be reached, in one sentence."""
    if not facts.groups:
        return f"nothing can be removed from the {facts.macs:,} MACs"
    exact = "" if facts.smallest == facts.smallest_exact else f", {facts.smallest_exact:.1%} with exact_only=True"
    floor = f"(every axis keeps at least {FLOOR:.0%} of its length)"
    return f"{facts.macs:,} MACs can be brought down to {facts.smallest:.1%}{exact} {floor}"


def _group_table(facts: Overview) -> Table:
    table = _table("channel groups", "#", "group", ">units", ">MACs", "at once", ">members", "read by", "exact")
    for row in facts.groups:
        group = row.group
        readers = list(dict.fromkeys(owner_of(m.parameter) or MODEL for m in group.members if m.role == "consumer"))
        exact = "yes" if group.exact else "no"
        share, members = f"{row.macs:.1%}", str(len(group.members))
        table.add_row(
            str(group.index), group.name, str(group.num_units), share, at_once(row), members, some(readers, 1), exact
        )
    return table


def _inexact_table(facts: Overview) -> Table:
    table = _table("why removal is not exact", "groups", "reason")
    for reason, groups in facts.inexact.items():
        table.add_row(some([f"#{group}" for group in groups], 8), reason)
    return table


def _frozen_table(facts: Overview) -> Table:
    table = _table("never removed", ">axes", "which", "reason")
    for reason, axes in facts.frozen.items():
        table.add_row(str(len(axes)), some([part_of(axis) for axis in axes]), reason)
    return table


def _gap_table(facts: Overview) -> Table:
    table = _table("operators without a rule", "operator", ">calls", "modules")
    for gap in facts.gaps:
        table.add_row(f"{gap.operator} {gap.why}", str(gap.calls), some([name or MODEL for name in gap.modules]))
    return table


def _table(title: str, *columns: str) -> Table:
    """A table without rows; the numbers of columns that begin with ``>`` are set to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def at_once(row: GroupFacts) -> str:
    """How many units can go at once, with how many of which other groups: ``64 with 1 of #3``."""
    ways = []
    for lump in row.lumps:
        others = [f"{number} of #{group}" for group, number in lump.units.items() if group != row.group.index]
        ways.append(f"{lump.units[row.group.index]}{' with ' if others else ''}{some(others)}")
    return some(ways, separator=", or ")


def part_of(axis: FrozenAxis) -> str:
    """A frozen axis in brief: ``head.weight [0] 3 of 5``."""
    part = "" if axis.num_elements == axis.size else f" {axis.num_elements} of {axis.size}"
    return f"{axis.parameter} [{axis.axis}]{part}"


def some(names: Sequence[str], shown: int = 3, separator: str = ", ") -> str:
    """The first few of many names."""
    return separator.join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def result_table(result: PruneResult) -> str:
    """Cost before and after, and the output channels of every layer."""
    title = "pruned exactly" if result.plan.exact else "pruned (not exactly: see plan.groups[i].inexact)"
    costs = cost_table(title, result.before, result.after)
    tables = [costs, kept_table(result.kept), *([recovery_table(result.recovery)] if result.recovery else [])]
    notes = "".join(f"\nnote: {note}" for note in result.notes)
    return render(*tables) + notes


def kept_table(kept: Mapping[str, tuple[int, int]]) -> Table:
    """The output channels of every layer."""
    layers = Table(title="output channels")
    layers.add_column("layer")
    layers.add_column("kept", justify="right")
    layers.add_column("of", justify="right")
    for name, (number, total) in kept.items():
        layers.add_row(name, str(number), str(total))
    return layers


def cost_table(title: str, before: Cost, after: Cost, latency: float | None = None) -> Table:
    """Both, and the part that is kept; of ``latency`` that alone, where it was measured."""
    costs = Table(title=title)
    for column in ("", "before", "after", "kept"):
        costs.add_column(column, justify="right" if column else "left")
    for name in ("params", "macs", "bytes"):
        old, new = getattr(before, name), getattr(after, name)
        costs.add_row(name, f"{old:,}", f"{new:,}", f"{new / max(old, 1):.1%}")
    if latency is not None:
        costs.add_row("latency", "", "measured", f"{latency:.1%}")
    return costs


def recovery_table(recovery: Recovery) -> Table:
    """Errors as parts of the variance of what the dense model gives, on held-out data."""
    table = _table("recovered without training", "layer", ">error before", ">after", "kept")
    for layer in recovery.layers:
        table.add_row(layer.name, f"{layer.before:.3g}", f"{layer.after:.3g}", layer.method or "as it was")
    table.add_row("(outputs)", f"{recovery.before:.3g}", f"{recovery.after:.3g}", "")
    return table
