"""Match the integers that an ATen operator received with the traced integers that its caller gave.

C++ turns traced integers into plain numbers on their way to the operator. The torch function that is running was
called with the originals, so each number is looked up among that one call's arguments. A number that is not there was
computed inside PyTorch from shapes (``flatten``, ``linear``): it follows the shapes by itself, and has no origin.
"""

from collections.abc import Sequence

from compress.provenance import Expression, expression_of
from compress.recorder import Op


def origin(op: Op, argument: str) -> Expression | None:
    """The expression behind the integer ``argument`` of ``op``; an ``int`` for a literal, None if computed inside."""
    value = op.arguments[argument]
    if value is None or op.call is None:
        return None
    # the last match: options come last in every torch function (``conv2d(..., stride, padding, dilation, groups)``)
    candidates = [given for given in reversed(op.call.flat) if int(given) == value]
    candidates += [given for group in reversed(op.call.nested) for given in reversed(group) if int(given) == value]
    traced = [expression_of(given) for given in candidates if not isinstance(expression_of(given), int)]
    if traced:
        return traced[0]
    return int(value) if candidates else None


def origins(op: Op, argument: str) -> list[Expression | None]:
    """The expressions behind a list of integers, one each; None where PyTorch computes the entry from shapes."""
    values: Sequence[int] = op.arguments[argument]
    if op.call is None:
        return [None] * len(values)
    groups = [group for group in (op.call.flat, *op.call.nested) if group]
    whole = [group for group in groups if _matches(group, values)]
    if op.call.name == "unflatten":  # sizes of the new axes only, in the place of one old axis
        return _embedded(op.call.nested, values)
    if not whole:  # the axis argument and the like may stand beside the sizes: x.repeat(1, n), torch.zeros(a, b)
        whole = [
            group[start : start + len(values)]
            for group in groups
            for start in range(len(group) - len(values) + 1)
            if _matches(group[start : start + len(values)], values)
        ]
    if not whole:
        return [None] * len(values)
    best = max(whole, key=lambda group: sum(not isinstance(expression_of(given), int) for given in group))
    return [None if int(given) == -1 else expression_of(given) for given in best]


def _matches(given: Sequence[int], values: Sequence[int]) -> bool:
    if len(given) != len(values):
        return False
    return all(int(g) in (-1, v) or v == -1 for g, v in zip(given, values, strict=True))


def _embedded(groups: Sequence[Sequence[int]], values: Sequence[int]) -> list[Expression | None]:
    found: list[Expression | None] = [None] * len(values)
    for group in groups:
        for start in range(len(values) - len(group) + 1):
            if _matches(group, values[start : start + len(group)]):
                for offset, given in enumerate(group):
                    found[start + offset] = None if int(given) == -1 else expression_of(given)
                return found
    return found
