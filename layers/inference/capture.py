"""The computation of a module on example inputs as a flat graph of ATen operators, with its weights as constants."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ExportGraphSignature, InputKind, OutputKind

from layers.inference.signature import Signature, unknown_type
from layers.inference.structure import Structure, flatten


class NotCapturedError(Exception):
    """Why a module cannot be written as one graph."""


@dataclass(frozen=True)
class Call:
    """One call of a module, written in one way: by position where the module's `forward` allows it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module, *args: Any, **kwargs: Any) -> Call:
        """Raises TypeError where `forward` does not take such arguments."""
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        return cls(bound.args, bound.kwargs)


@dataclass(frozen=True)
class Capture:
    """``graph(*tensors)``, of the tensors among the leaves of a call, is a tuple of those among the leaves it returns.

    ``leaves`` are what is returned, with None in the place of tensors, which are at ``positions``.
    """

    graph: fx.GraphModule
    signature: Signature
    outputs: Structure
    leaves: tuple[Any, ...]
    positions: tuple[int, ...]

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """What the module returns, from what the graph returned."""
        leaves = list(self.leaves)
        for position, tensor in zip(self.positions, tensors, strict=True):
            leaves[position] = tensor
        return self.outputs.rebuild(leaves)


def capture(module: nn.Module, call: Call) -> Capture:
    """The graph of ``module(*call.args, **call.kwargs)``, for any batch size where the module allows it.

    Raises NotCapturedError where there is no such graph: Python code that depends on the values of tensors, or a call
    that changes buffers or inputs.
    """
    leaves, structure = flatten((call.args, call.kwargs))
    unknown = unknown_type(leaves)
    if unknown is not None:
        raise NotCapturedError(f"it takes a {unknown}")
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    program, outputs = _export(module, leaves, structure, tensors)
    _check_pure(program.graph_signature)
    fakes = [node.meta["val"] for node in _user_inputs(program)]
    signature = Signature.of(leaves, structure, fakes, program.range_constraints)
    graph = _flat(program)
    returned = _tensors_only(graph)
    positions = tuple(i for i, leaf in enumerate(returned) if isinstance(leaf, fx.Node))
    values = tuple(None if isinstance(leaf, fx.Node) else leaf for leaf in returned)
    return Capture(graph, signature, outputs, values, positions)


def _tensors_only(model: fx.GraphModule) -> list[Any]:
    """Let the graph return its tensors only, and say what it returned."""
    output = next(node for node in model.graph.nodes if node.op == "output")
    returned = list(output.args[0])
    tensors = [leaf for leaf in returned if isinstance(leaf, fx.Node)]
    if not tensors or any(not isinstance(leaf.meta.get("val"), Tensor) for leaf in tensors):
        raise NotCapturedError("it returns no tensor, or sizes of its inputs")
    if any(leaf.op == "get_attr" for leaf in tensors):
        raise NotCapturedError("it returns its own parameters")
    output.args = (tuple(tensors),)
    model.recompile()
    return returned


class _OfTensors(nn.Module):
    """A module as a function from tensors to a list; everything else in the call is fixed."""

    def __init__(
        self, module: nn.Module, leaves: Sequence[Any], structure: Structure, note: Callable[[Structure], None]
    ) -> None:
        super().__init__()
        self.module, self._leaves, self._structure = module, leaves, structure
        self._note = note  # of the outputs' structure: torch.export takes back what a forward sets on its module

    def forward(self, *tensors: Tensor) -> list[Any]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = self._structure.rebuild(leaves)
        values, outputs = flatten(self.module(*args, **kwargs))
        self._note(outputs)
        return values


def _export(
    module: nn.Module, leaves: Sequence[Any], structure: Structure, tensors: Sequence[Tensor]
) -> tuple[torch.export.ExportedProgram, Structure]:
    outputs: list[Structure] = []
    function = _OfTensors(module, leaves, structure, outputs.append)
    # torch.export takes every length of 1 as fixed: a batch of one is doubled to find out about others.
    doubled = [torch.cat((x, x)) if x.dim() and len(x) == 1 else x for x in tensors]
    any_batch = {"tensors": tuple({0: torch.export.Dim.AUTO} if x.dim() else None for x in tensors)}
    reason: Exception = NotCapturedError("it takes no tensor")
    for example, shapes in ((doubled, any_batch), (tensors, None)) if tensors else ():
        try:
            with torch.no_grad(), _quiet():
                program = torch.export.export(function, tuple(example), dynamic_shapes=shapes, strict=False)
                program = program.run_decompositions({})  # no in-place operators, and otherwise as written
        except Exception as error:  # noqa: BLE001 - the model's own code runs here, and may raise anything
            reason = error
            continue
        if shapes is None or not program._guards_code:  # else it depends on more than the range of the batch size
            return program, outputs[-1]
    raise NotCapturedError(_first_line(reason)) from reason


def _check_pure(signature: ExportGraphSignature) -> None:
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise NotCapturedError(f"a call changes {', '.join(name.removeprefix('module.') for name in changed)}")
    kinds = {spec.kind for spec in signature.output_specs} - {OutputKind.USER_OUTPUT}
    if kinds:
        raise NotCapturedError(f"it has side effects: {', '.join(sorted(kind.name for kind in kinds))}")


def _user_inputs(program: torch.export.ExportedProgram) -> list[fx.Node]:
    specs = program.graph_signature.input_specs
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    return [node for node, spec in zip(nodes, specs, strict=True) if spec.kind is InputKind.USER_INPUT]


def _flat(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program's graph as a function of its inputs only."""
    constants = {**program.state_dict, **program.constants}
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    root, graph = nn.Module(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            raise NotCapturedError(f"it contains a graph of its own ({node.target})")
        if node.op != "placeholder" or node.name not in targets:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif node.users:
            value = constants.get(targets[node.name])
            if not isinstance(value, Tensor):
                raise NotCapturedError(f"it reads {targets[node.name]}, which is no tensor")
            copies[node] = constant(root, graph, value.detach())
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next(iter(graph.nodes))
    for node in reversed(inputs):  # parameters come first in a program
        first.prepend(node)
        first = node
    return fx.GraphModule(root, graph)


def constant(root: nn.Module, graph: fx.Graph, value: Tensor) -> fx.Node:
    """A node at the graph's present place that gives ``value``, which ``root`` holds from now on."""
    number = len(root._buffers)
    while hasattr(root, f"constant_{number}"):
        number += 1
    name = f"constant_{number}"
    root.register_buffer(name, value, persistent=False)
    node = graph.create_node("get_attr", name)
    node.meta["val"] = value
    return node


def value_of(root: fx.GraphModule, node: Any) -> Tensor | None:
    """The constant that a node gives, or None where it is none."""
    return getattr(root, str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch reports at length what it fails to trace, and prints how far it got; what it raises is enough."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
