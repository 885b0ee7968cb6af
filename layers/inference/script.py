"""A graph of ATen operators as a TorchScript function, whose interpreter takes a microsecond for an operator.

The function is written in TorchScript's own intermediate form: tracing does not know every argument type of oneDNN's
operators, and would fix sizes that depend on the batch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from layers.inference.capture import value_of

_SCALARS = (bool, int, float)
_ARITHMETIC = {operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.floordiv: "floordiv"}
_ENUMS = (torch.dtype, torch.memory_format, torch.layout)
# What TorchScript has for them, from c10/core/ScalarType.h, MemoryFormat.h and Layout.h.
_NUMBERS: dict[Any, int] = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
    torch.strided: 0,
}


class NotScriptableError(Exception):
    """What a graph contains that cannot be written here."""


def script(model: fx.GraphModule) -> Callable[..., Sequence[Tensor]]:
    """The function of the graph's tensors.

    Raises NotScriptableError.
    """
    writer = _Writer(model)
    for node in model.graph.nodes:
        writer.add(node)
    text = f"graph({', '.join(writer.inputs + list(writer.constants))}):\n" + "\n".join(writer.lines)
    try:
        graph = torch._C.parse_ir(text)
        for position, value in reversed(list(enumerate(writer.constants.values(), start=len(writer.inputs)))):
            given = list(graph.inputs())[position]
            holder = graph.create("prim::Constant", [], 1).t_("value", value)
            graph.prependNode(holder)
            given.replaceAllUsesWith(holder.output())
            graph.eraseInput(position)
        torch._C._jit_pass_lint(graph)
        function: Callable[..., Sequence[Tensor]] = torch._C._create_function_from_graph("optimised", graph)
    except RuntimeError as error:
        raise NotScriptableError(str(error).strip().splitlines()[0]) from error
    return function


class _Writer:
    def __init__(self, model: fx.GraphModule) -> None:
        self.model = model
        self.inputs: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self.lines: list[str] = []
        self._names: dict[fx.Node, str] = {}
        self._parts: dict[fx.Node, list[str]] = {}  # of operators that return several values
        self._known: dict[tuple[str, str], str] = {}
        self._count = 0

    def add(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._names[node] = self._fresh()
            self.inputs.append(f"{self._names[node]} : Tensor")
        elif node.op == "get_attr":
            value = value_of(self.model, node)
            assert value is not None
            self._names[node] = self._fresh()
            self.constants[f"{self._names[node]} : Tensor"] = value
        elif node.op == "output":
            (values,) = node.args
            assert isinstance(values, tuple)
            returned = [self._names[value] for value in values if isinstance(value, fx.Node)]
            types = ", ".join(["Tensor"] * len(returned))
            result = self._line(f"({types})", f"prim::TupleConstruct({', '.join(returned)})")
            self.lines.append(f"  return ({result})")
        elif node.target is operator.getitem:
            self._getitem(node)
        elif node.target in _ARITHMETIC:
            left, right = (self._value(value, "int") for value in node.args)
            self._names[node] = self._line("int", f"aten::{_ARITHMETIC[node.target]}({left}, {right})")
        elif isinstance(node.target, torch._ops.OpOverload):
            self._operator(node, node.target)
        else:
            raise NotScriptableError(f"it calls {node.target}")

    def _operator(self, node: fx.Node, target: torch._ops.OpOverload) -> None:
        values = []
        for position, argument in enumerate(target._schema.arguments):
            if position < len(node.args) and not argument.kwarg_only:
                value = node.args[position]
            else:
                value = node.kwargs.get(argument.name, argument.default_value)
            values.append(self._value(value, str(argument.type)))
        kinds = [str(returned.type) for returned in target._schema.returns]
        names = [self._fresh() for _ in kinds]
        left = ", ".join(f"{name} : {_written(kind)}" for name, kind in zip(names, kinds, strict=True))
        self.lines.append(f"  {left} = {target._schema.name}({', '.join(values)})")
        if len(names) == 1:
            self._names[node] = names[0]
        else:
            self._parts[node] = names

    def _getitem(self, node: fx.Node) -> None:
        source, position = node.args
        assert isinstance(source, fx.Node)
        if source in self._parts:
            self._names[node] = self._parts[source][position]  # type: ignore[index]
        else:
            list_, number = self._names[source], self._value(position, "int")
            self._names[node] = self._line("Tensor", f"aten::__getitem__({list_}, {number})")

    def _value(self, value: Any, kind: str) -> str:
        """The name of an argument of this type."""
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, list | tuple):
            element = kind.removeprefix("Optional[").removeprefix("List[").removesuffix("]")
            names = [self._value(item, element) for item in value]
            return self._line(_written(kind), f"prim::ListConstruct({', '.join(names)})")
        if value is None:
            return self._constant("NoneType", "prim::Constant()")
        if isinstance(value, str):
            return self._constant("str", f'prim::Constant[value="{value}"]()')
        if isinstance(value, torch.device):
            return self._constant("Device", f'prim::Constant[value="{value}"]()')
        value = _NUMBERS.get(value, value) if isinstance(value, _ENUMS) else value
        if type(value) not in _SCALARS or value in (math.inf, -math.inf) or value != value:
            raise NotScriptableError(f"it has a constant {value!r}")
        whole = isinstance(value, int) and not (kind.endswith("float") or "[float" in kind)
        kind = "bool" if isinstance(value, bool) else "int" if whole else "float"
        literal = repr(float(value)) if kind == "float" else repr(int(value))
        return self._constant(kind, f"prim::Constant[value={literal}]()")

    def _constant(self, kind: str, text: str) -> str:
        if (kind, text) not in self._known:
            self._known[kind, text] = self._line(kind, text)
        return self._known[kind, text]

    def _line(self, kind: str, text: str) -> str:
        name = self._fresh()
        self.lines.append(f"  {name} : {kind} = {text}")
        return name

    def _fresh(self) -> str:
        self._count += 1
        return f"%v{self._count}"


def _written(kind: str) -> str:
    """A type of a schema as the intermediate form writes it: Optional[List[int]] is int[] where a list is given."""
    kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
    if not kind.startswith("List["):
        return kind
    element = kind[len("List[") : -1].replace("number", "Scalar")
    if element.startswith("Optional["):
        element = element[len("Optional[") : -1] + "?"
    return f"{element}[]"
