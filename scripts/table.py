"""What a run prints: a table a round, and before / after at the end."""

from rich.console import Console
from rich.table import Table

from compress.loop import RunResult
from compress.report import RoundRecord, several


def print_round(record: RoundRecord, dense: RoundRecord, rounds: int) -> None:
    """One round against the dense model, with the percentage of output channels that every layer has kept."""
    table = Table(title=f"round {record.round} of {rounds}" if record.round else "dense model", title_justify="left")
    test = [] if record.test is None else [("test", f"{record.test:.2%}")]
    tasks = several(record)
    cells = [
        ("mean of tasks" if tasks else "accuracy", f"{record.accuracy:.2%}"),
        *test,
        ("parameters", f"{record.params:,} ({record.params / dense.params:.0%})"),
        ("MACs", f"{record.macs:,} ({record.macs / dense.macs:.0%})"),
        ("latency", f"{1e3 * record.latency_seconds:.2f} ms"),
    ]
    for column, _ in cells:
        table.add_column(column, justify="right", no_wrap=True)
    kept = " ".join(f"{100 * left / total:.0f}" for left, total in record.kept.values())
    # (as many columns as there are tasks would not fit)
    by_task = ", ".join(f"{task} {value:.2%}" for task, value in tasks.items())
    table.caption = f"{by_task}\n" * bool(tasks) + f"kept per layer (%): {kept}"
    table.caption_justify = "left"
    table.add_row(*(text for _, text in cells))
    Console().print(table)


def print_before_after(result: RunResult) -> None:
    """The dense model beside the result."""
    before, after = result.before, result.after
    table = Table(title="before / after", title_justify="left")
    for column in ("", "before", "after", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    tasks = [(task, value, after.metrics[task]) for task, value in several(before).items()]
    mean = ("mean of tasks" if tasks else "accuracy", before.accuracy, after.accuracy)
    for label, first, last in (mean, *tasks, ("test", before.test, after.test)):
        if first is not None and last is not None:
            table.add_row(label, f"{first:.2%}", f"{last:.2%}", f"{100 * (last - first):+.2f} pp")
    for name, label in (("params", "parameters"), ("macs", "MACs"), ("bytes", "bytes")):
        old, new = getattr(before, name), getattr(after, name)
        table.add_row(label, f"{old:,}", f"{new:,}", f"{new / old:.1%}")
    old, new = 1e3 * before.latency_seconds, 1e3 * after.latency_seconds
    table.add_row("latency", f"{old:.2f} ms", f"{new:.2f} ms", f"{new / old:.1%}")
    console = Console()
    console.print(table)
    if result.stopped:
        console.print(result.stopped)
