"""What a run prints: a table a round, and before / after at the end."""

from rich.console import Console
from rich.table import Table

from compress.loop import RunResult
from compress.report import RoundRecord


def print_round(record: RoundRecord, dense: RoundRecord, rounds: int) -> None:
    """One round against the dense model, with the percentage of output channels that every layer has kept."""
    table = Table(title=f"round {record.round} of {rounds}" if record.round else "dense model", title_justify="left")
    for column in ("accuracy", "parameters", "MACs", "latency"):
        table.add_column(column, justify="right", no_wrap=True)
    kept = " ".join(f"{100 * left / total:.0f}" for left, total in record.kept.values())
    table.caption, table.caption_justify = f"kept per layer (%): {kept}", "left"
    table.add_row(
        f"{record.accuracy:.2%}",
        f"{record.params:,} ({record.params / dense.params:.0%})",
        f"{record.macs:,} ({record.macs / dense.macs:.0%})",
        f"{1e3 * record.latency_seconds:.2f} ms",
    )
    Console().print(table)


def print_before_after(result: RunResult) -> None:
    """The dense model beside the result."""
    before, after = result.before, result.after
    table = Table(title="before / after", title_justify="left")
    for column in ("", "before", "after", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    points = 100 * (after.accuracy - before.accuracy)
    table.add_row("accuracy", f"{before.accuracy:.2%}", f"{after.accuracy:.2%}", f"{points:+.2f} pp")
    for name, label in (("params", "parameters"), ("macs", "MACs"), ("bytes", "bytes")):
        old, new = getattr(before, name), getattr(after, name)
        table.add_row(label, f"{old:,}", f"{new:,}", f"{new / old:.1%}")
    old, new = 1e3 * before.latency_seconds, 1e3 * after.latency_seconds
    table.add_row("latency", f"{old:.2f} ms", f"{new:.2f} ms", f"{new / old:.1%}")
    console = Console()
    console.print(table)
    if result.stopped:
        console.print(result.stopped)
