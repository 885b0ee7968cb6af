"""What each ATen operator does to channel labels, one family of operators a file.

>>> import torch, compress
>>> from compress.rules import propagate
>>> from compress.trace import record
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
>>> labels = propagate(record(model, torch.zeros(1, 3)))
>>> [axis.parameter for axis in labels.axes]
['0.weight', '0.weight', '0.bias', '2.weight', '2.weight', '2.bias']

An operator without a rule freezes everything that it touches: it never makes a wrong model, it only prunes less.
"""

import torch

from compress.labels import FIXED, Gap, Labels, SizeEquation
from compress.provenance import AxisSize, Computed, Expression, SizeComparison, Stored, TracedInt, leaves
from compress.recorder import Op, Trace
from compress.rules import (  # noqa: F401  (importing a family registers its rules)
    attention,
    convolution,
    elementwise,
    factories,
    indexing,
    matmul,
    normalization,
    pooling,
    reductions,
    shape,
    spectral,
)
from compress.rules.decisions import Place, revised
from compress.rules.elementwise import pointwise
from compress.rules.registry import RULES, NoRule, Rule, base_name, rule

__all__ = ["NoRule", "propagate", "rule"]


def propagate(trace: Trace) -> Labels:
    """Labels for every axis of every tensor of ``trace``, with all equalities.

    One walk over the operators; where an axis was split and the labels were put where they cannot be used, another.
    """
    labels = _walk(trace, {})
    for _ in range(MAX_REVISIONS):
        decisions = revised(labels)
        if not decisions:
            break
        labels = _walk(trace, {**labels.decisions, **decisions})
    return labels


MAX_REVISIONS = 3


def _walk(trace: Trace, decisions: dict[Place, int]) -> Labels:
    labels = Labels(trace.parameters.items(), decisions, trace.buffers)
    for run, in_training in ((trace.evaluation, False), (trace.training, True)):
        labels.in_training = in_training
        for op in run:
            _apply(labels, op)
    for ref in trace.outputs:
        for axis in labels[ref]:
            labels.freeze(axis, "output of the model")
    _freeze_by_use(labels, trace)
    _keep_comparisons(labels, trace)
    _freeze_values(labels, trace)
    return labels


def _apply(labels: Labels, op: Op) -> None:
    function = _find(op)
    labels.mark_weight(op)
    if function is None:
        _freeze_operator(labels, op, "has no rule")
        return
    counted = len(labels.products)
    try:
        function(labels, op)
    except (NoRule, ValueError, IndexError, KeyError) as gap:  # a use that the rule does not cover
        _freeze_operator(labels, op, f"has no rule for {gap}")
        return
    if op.formula is None:  # what is not measured must not be foretold
        del labels.products[counted:]
    _freeze_scalars(labels, op)


def _find(op: Op) -> Rule | None:
    found = RULES.get(base_name(op))
    if found is None and torch.Tag.pointwise in op.func.tags:
        return pointwise
    return found


def _freeze_operator(labels: Labels, op: Op, why: str) -> None:
    touched = [axis for ref in (*op.tensors, *op.outputs) for axis in labels[ref]]
    if any((axis != FIXED).any() for axis in touched):
        labels.gaps.append(Gap(op, why, labels.in_training))
    for axis in touched:
        labels.freeze(axis, f"operator {op} {why}")


def _freeze_scalars(labels: Labels, op: Op) -> None:
    """A size that an operator takes as a number to compute with (``x / x.shape[1]``) must not change."""
    given = [v for v in (op.call.flat if op.call else ()) if isinstance(v, TracedInt)]
    if not given:
        return
    for argument in op.func._schema.arguments:
        value = op.arguments[argument.name]
        if str(argument.type) not in ("Tensor", "number", "Scalar", "Optional[number]", "Optional[Scalar]"):
            continue
        for traced in given:
            if isinstance(value, int | float) and value == int(traced):
                _keep_value(labels, traced.expression, int(traced), f"a size is a value in operator {op}")


def _freeze_by_use(labels: Labels, trace: Trace) -> None:
    touched = {ref.id for op in trace.ops for ref in op.tensors}
    touched |= {ref.id for ref in trace.outputs}
    labels.frozen += [mark for ref, mark in labels.pointing if ref.id in touched]
    for name, ref in trace.parameters.items():
        if ref.id not in touched:
            for axis in labels[ref]:
                labels.freeze(axis, f"no operator uses {name}")


def _keep_comparisons(labels: Labels, trace: Trace) -> None:
    for comparison in set(trace.observations.comparisons):
        _keep_comparison(labels, comparison)


def _keep_comparison(labels: Labels, comparison: SizeComparison) -> None:
    why = "two sizes are compared while the model runs"
    for this, other in ((comparison.left, comparison.right), (comparison.right, comparison.left)):
        if isinstance(other, AxisSize):
            labels.equate(this, labels.of_axis(other), why)
            return
    for expression in (comparison.left, comparison.right):
        if not any(isinstance(leaf, AxisSize) for leaf in leaves(expression)):
            continue
        _pin(labels, expression, why)


def _freeze_values(labels: Labels, trace: Trace) -> None:
    for use in trace.observations.value_uses:
        _keep_value(labels, use.expression, use.value, f"a size is {use.how} while the model runs")


def _keep_value(labels: Labels, expression: Expression, value: int, why: str) -> None:
    """What is computed with must not change; of ``C // heads`` both may, as long as the quotient stays."""
    if isinstance(expression, Computed) and value >= 0:
        labels.equations.append(SizeEquation(expression, labels.fixed(value), why))
    else:
        _pin(labels, expression, why)


def _pin(labels: Labels, expression: object, why: str) -> None:
    for leaf in leaves(expression):  # type: ignore[arg-type]
        if isinstance(leaf, AxisSize):
            labels.freeze(labels.of_axis(leaf), why)
        elif isinstance(leaf, Stored):
            labels.pinned.add(leaf)
