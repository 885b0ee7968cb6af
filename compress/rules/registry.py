"""The table of rules: what each ATen operator does to channel labels."""

from collections.abc import Callable

from compress.labels import Labels
from compress.recorder import Op

Rule = Callable[[Labels, Op], None]

RULES: dict[str, Rule] = {}


class NoRule(Exception):
    """A rule met a use of its operator that it does not cover: the operator is treated as one without a rule."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators by name; all overloads and in-place forms share it (``add`` and ``add_``)."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"operator {name!r} has two rules: {RULES[name].__name__} and {function.__name__}")
            RULES[name] = function
        return function

    return register


def base_name(op: Op) -> str:
    """The operator's name without overload and in-place mark: ``aten::add_.Tensor`` -> ``add``."""
    name = op.func._schema.name
    namespace, _, short = name.partition("::")
    return short.rstrip("_") if namespace == "aten" else name
