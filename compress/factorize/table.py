"""What factorisation left of a model, for people."""

from collections.abc import Mapping, Sequence

from rich.table import Table

from compress.factorize.factorizing import FactorResult
from compress.factorize.plan import Factor
from compress.table import cost_table, recovery_table, render


def result_table(result: FactorResult) -> str:
    """Cost before and after, what each layer became, and why others stay."""
    costs = cost_table("factorised", result.before, result.after, result.latency)
    tables = [costs, factor_table(result.plan.factors), *([left_table(result.left)] if result.left else [])]
    tables += [recovery_table(result.recovery)] if result.recovery else []
    return render(*tables) + "".join(f"\nnote: {note}" for note in result.notes)


def factor_table(factors: Sequence[Factor]) -> Table:
    """What each layer became."""
    layers = Table(title="factorised layers")
    for column in ("layer", "became", "ranks", "error"):
        layers.add_column(column, justify="right" if column == "error" else "left")
    for factor in factors:
        layers.add_row(factor.module, _kind(factor), _ranks(factor), f"{factor.error:.3g}")
    return layers


def left_table(left: Mapping[str, str]) -> Table:
    """Why others did not."""
    table = Table(title="left as they are")
    table.add_column("weight")
    table.add_column("reason")
    for name, reason in left.items():
        table.add_row(name, reason)
    return table


def _kind(factor: Factor) -> str:
    return f"spatial, {factor.first} first" if factor.kind == "spatial" else factor.kind


def _ranks(factor: Factor) -> str:
    return " and ".join("whole" if rank is None else str(rank) for rank in factor.ranks)
