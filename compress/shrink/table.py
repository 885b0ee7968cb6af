"""What shrinking left of a model, for people."""

from rich.table import Table

from compress.factorize.plan import FactorPlan
from compress.factorize.table import factor_table, left_table
from compress.shrink.shrinking import ShrinkResult
from compress.table import cost_table, kept_table, recovery_table, render


def result_table(result: ShrinkResult) -> str:
    """Cost before, after pruning and at the end, what each layer became, and why others were not factorised."""
    tables: list[Table] = []
    if result.pruning is not None:
        tables += [cost_table("pruned", result.before, result.pruning.after), kept_table(result.pruning.kept)]
    tables.append(cost_table("shrunk", result.before, result.after, result.latency))
    tables += [factor_table(step.factors) for step in result.plan.steps if isinstance(step, FactorPlan)]
    tables += [left_table(result.left)] if result.left else []
    tables += [recovery_table(result.recovery)] if result.recovery else []
    return render(*tables) + "".join(f"\nnote: {note}" for note in result.notes)
