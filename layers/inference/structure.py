"""What a module takes and returns as a flat list, and back: containers of PyTorch's pytrees, and dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Structure:
    """The containers around a flat list of leaves."""

    tree: pytree.TreeSpec

    @cached_property
    def positional(self) -> int:
        """How many arguments a call has that are leaves, by position and alone; -1 where there is anything else."""
        args, kwargs = self.tree.children()
        return (
            len(args.children())
            if not kwargs.num_leaves
            and args.num_leaves == args.num_children
            and all(child.is_leaf() for child in args.children())
            else -1
        )

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        if self._one_leaf:
            return leaves[0]
        return _to_dataclasses(pytree.tree_unflatten(leaves, self.tree))

    @cached_property
    def _one_leaf(self) -> bool:
        return self.tree.is_leaf()


def flatten(value: Any) -> tuple[list[Any], Structure]:
    """The leaves of a value, and the containers around them."""
    leaves, tree = pytree.tree_flatten(_from_dataclasses(value))
    return leaves, Structure(tree)


class _Fields:
    """An instance of a dataclass, as a container of its fields."""

    def __init__(self, kind: type, values: Sequence[Any]) -> None:
        self.kind, self.values = kind, values


pytree.register_pytree_node(
    _Fields, lambda node: (list(node.values), node.kind), lambda values, kind: _Fields(kind, list(values))
)


def _from_dataclasses(value: Any) -> Any:
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor | type) or not is_dataclass(leaf):
            return leaf
        return _Fields(type(leaf), [_from_dataclasses(getattr(leaf, field.name)) for field in fields(leaf)])

    return pytree.tree_map(convert, value)


def _to_dataclasses(value: Any) -> Any:
    def convert(node: Any) -> Any:
        if not isinstance(node, _Fields):
            return node
        made: Any = object.__new__(node.kind)  # its __init__ has run on the original, and may take other arguments
        for field, content in zip(fields(node.kind), node.values, strict=True):
            object.__setattr__(made, field.name, _to_dataclasses(content))
        return made

    return pytree.tree_map(convert, value, is_leaf=lambda node: isinstance(node, _Fields))
