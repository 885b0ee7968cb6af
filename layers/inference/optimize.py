"""`optimize_for_inference`: the same function, faster."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from layers.clock import seconds
from layers.inference.backends import BACKENDS
from layers.inference.capture import Call, Capture, NotCapturedError, capture
from layers.inference.module import Fast, OptimizedModule
from layers.inference.norms import fold_norms
from layers.inference.report import Piece, Report
from layers.inference.runner import BackendError, Program, Runner
from layers.inference.signature import Signature, TensorSpec
from layers.inference.simplify import simplify
from layers.inference.structure import flatten
from layers.inference.verify import difference

_PASSES = (simplify, fold_norms)
_TIMING = 3.0  # seconds of comparing the backends; most of a call to `auto` goes into making them
_CLOSE = 1.25  # those that take at most so much of the fastest's time are compared once more
_REPARAMETRISATIONS = (WeightNorm, SpectralNorm)  # hooks that are part of what a module computes, and nothing else


def optimize_for_inference(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any], *, backend: str = "torch"
) -> OptimizedModule:
    """A module with the interface of `model` in evaluation mode, and equal outputs, that runs faster.

    Batch norms are folded, layers are fused with the additions and activations after them, all found in the graph of
    operators and not by the classes of modules, and what Python costs for each layer goes. `print(result.report)` says
    what was done. The result is compared with the model on the example; what does not agree is dropped, and reported.

    A model whose Python code depends on the values of tensors, changes its buffers, or carries hooks is left as it is,
    and its submodules are optimised one by one. Calls unlike the example are never wrong: other batch sizes run as
    fast where the model treats them alike, everything else runs as the model does. Gradients are not tracked.

    Args:
        model: stays as it is; its weights are copied, later changes of them do not reach the result
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device
        backend: "torch" is PyTorch alone. "auto" times what is installed of "torch", "inductor" (`torch.compile` with
            freezing), "onnxruntime" and "openvino" on the example, with as many threads as PyTorch has now, and keeps
            the fastest; or one of these names

    Raises:
        ValueError: for an unknown backend, one that does not work for this model, a model that is random in evaluation
            mode, or example inputs that it does not take.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> fast = optimize_for_inference(model, x)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, but it must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model is scripted, and TorchScript has no graph of operators: pass the module it was made from"
        )
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend is {backend!r}, but it must be one of auto, {', '.join(BACKENDS)}")
    try:
        kept = copy.deepcopy(model).eval()
    except Exception as error:
        raise ValueError(f"{type(model).__name__} cannot be copied, which optimising it takes: {error}") from error
    with torch.no_grad():
        call = _call(kept, example_inputs)
        expected = _reference(kept, call)
        work = _Work(backend)
        fast = work.optimise(copy.deepcopy(kept), call, "")
        if backend not in ("auto", "torch") and not work.pieces:
            raise ValueError(f"backend {backend!r} cannot run {type(model).__name__}: {_reasons(work.unchanged)}")
        if isinstance(fast, OptimizedModule):
            return OptimizedModule(fast.__dict__["_model"], work.report(), fast.__dict__["_fast"])
        problem = difference(expected, _tensors(fast(*call.args, **call.kwargs)))
        if problem is not None:  # the parts agree and the whole does not: what they share is not in their graphs
            return OptimizedModule(
                kept, Report((), {**work.unchanged, "": f"its optimised parts give {problem}"}), None
            )
        return OptimizedModule(fast, work.report(), None)


def _call(model: nn.Module, example_inputs: Any) -> Call:
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,), {}
    try:
        return Call.of(model, *args, **kwargs)
    except TypeError as error:
        raise ValueError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error


def _reference(model: nn.Module, call: Call) -> list[Tensor]:
    try:
        first, second = (_tensors(model(*call.args, **call.kwargs)) for _ in range(2))
    except Exception as error:
        raise ValueError(f"{type(model).__name__} does not run on example_inputs: {error}") from error
    problem = difference(first, second)
    if problem is not None:
        raise ValueError(f"{type(model).__name__} gives {problem} in a second call: nothing can be compared with it")
    return first


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, Tensor)]


def _reasons(unchanged: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(unchanged.values()))


@dataclass
class _Work:
    """One call of `optimize_for_inference`: what was optimised, and what was not and why."""

    backend: str
    pieces: list[Piece] = field(default_factory=list)
    unchanged: dict[str, str] = field(default_factory=dict)

    def report(self) -> Report:
        return Report(tuple(self.pieces), dict(self.unchanged))

    def optimise(self, module: nn.Module, call: Call, name: str) -> nn.Module:
        """What stands for the module: an `OptimizedModule`, or itself with children that have been replaced."""
        try:
            if _has_hooks(module):
                raise NotCapturedError("it has hooks, which a graph does not call")
            captured = capture(module, call)
            fast, piece = self._fast(module, captured, call, name)
        except (NotCapturedError, BackendError) as error:
            self.unchanged[name] = str(error)
            self._optimise_children(module, call, name)
            return module
        self.pieces.append(piece)
        return OptimizedModule(module, Report((piece,)), fast)

    def _optimise_children(self, module: nn.Module, call: Call, name: str) -> None:
        calls = _calls_of_submodules(module, call)
        replaced: dict[nn.Module, nn.Module] = {}

        def descend(parent: nn.Module, prefix: str) -> None:
            for child_name, child in list(parent.named_children()):
                path = f"{prefix}.{child_name}" if prefix else child_name
                if child in replaced:
                    parent._modules[child_name] = replaced[child]
                elif child in calls and next(child.children(), None) is not None:
                    parent._modules[child_name] = replaced[child] = self.optimise(child, calls[child], path)
                elif child not in calls:
                    descend(child, path)

        descend(module, name)

    def _fast(self, module: nn.Module, captured: Capture, call: Call, name: str) -> tuple[Fast, Piece]:
        tensors = _tensors((call.args, call.kwargs))
        expected = _tensors(module(*call.args, **call.kwargs))
        graph, passes = _passed(captured.graph, tensors, expected)
        captured = replace(captured, graph=graph)
        programs, skipped = self._programs(graph, tensors, expected)
        if not programs:
            raise BackendError(_reasons(skipped))
        lengths = captured.signature.lengths(flatten((call.args, call.kwargs))[0])
        assert lengths is not None
        contiguous = tuple(x.is_contiguous() for x in expected)
        fast = Fast(captured, tuple(programs.values()), lengths, contiguous)
        times = self._times(module, call, fast, tensors)
        order = sorted(times, key=lambda key: times[key])
        if order[0] == "eager" and self.backend in ("auto", "torch"):
            raise BackendError(f"nothing is faster than it ({', '.join(f'{k} {times[k]:.3g} ms' for k in order)})")
        chosen = next(programs[key] for key in order if key != "eager")
        ordered = (chosen, *(program for program in programs.values() if program.any_batch and program is not chosen))
        verified = _verified(module, captured.signature, ordered, call, lengths)
        fast = replace(fast, capture=replace(captured, signature=replace(captured.signature, verified=verified)))
        return replace(fast, programs=ordered), Piece(name, chosen.name, (*passes, *chosen.notes), times, skipped)

    def _programs(
        self, graph: fx.GraphModule, tensors: list[Tensor], expected: list[Tensor]
    ) -> tuple[dict[str, Program], dict[str, str]]:
        programs, skipped = {}, {}
        for name in BACKENDS if self.backend == "auto" else (self.backend,):
            try:
                program = BACKENDS[name](graph, tensors)
                problem = difference(expected, list(program.run(*tensors)))
            except (BackendError, RuntimeError) as error:
                problem = str(error).strip().splitlines()[0]
            if problem is None:
                programs[name] = program
            else:
                skipped[name] = problem
        return programs, skipped

    def _times(self, module: nn.Module, call: Call, fast: Fast, tensors: list[Tensor]) -> dict[str, float]:
        def run(runner: Runner) -> Any:
            return lambda: runner(*tensors)

        contestants = {"eager": lambda: module(*call.args, **call.kwargs)}
        contestants |= {program.name: run(program.run) for program in fast.programs}
        for contestant in contestants.values():
            for _ in range(3):  # TorchScript prepares itself in its first calls
                contestant()
        times = seconds(contestants, _device(tensors), _TIMING)
        close = {name: run for name, run in contestants.items() if times[name] <= _CLOSE * min(times.values())}
        if len(close) > 1:  # on a busy machine a few runs decide nothing between these
            times |= seconds(close, _device(tensors), _TIMING)
        return {name: 1e3 * value for name, value in times.items()}


def _passed(
    graph: fx.GraphModule, tensors: list[Tensor], expected: list[Tensor]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The graph after the passes that every backend gains from, and what they did."""
    notes: list[str] = []
    for rewrite in _PASSES:
        changed = copy.deepcopy(graph)
        done = rewrite(changed)
        problem = difference(expected, list(changed(*tensors)))
        if problem is None:
            graph, notes = changed, [*notes, *done]
        else:
            notes.append(f"dropped {rewrite.__name__}: it gives {problem}")
    return graph, tuple(notes)


def _verified(
    module: nn.Module, signature: Signature, programs: tuple[Program, ...], call: Call, lengths: dict[str, int]
) -> tuple[dict[str, int], ...]:
    """The example's lengths and, where it agrees, a batch of one: torch.export derives graphs for others only."""
    found = [lengths]
    if signature.ranges and 1 not in lengths.values():
        one = dict.fromkeys(lengths, 1)
        leaves, structure = flatten((call.args, call.kwargs))
        shapes = iter(signature.leaves)
        cut = [
            leaf[:1]
            if isinstance(spec := next(shapes), TensorSpec) and spec.shape and isinstance(spec.shape[0], str)
            else leaf
            for leaf in leaves
        ]
        args, kwargs = structure.rebuild(cut)
        try:
            wanted = _tensors(module(*args, **kwargs))
            tensors = [leaf for leaf in cut if isinstance(leaf, Tensor)]
            able = [program for program in programs if program.any_batch]
            problems = [difference(wanted, list(program.run(*tensors))) for program in able]
        except RuntimeError:
            return (lengths,)
        if able and not any(problems):
            found.append(one)
    return tuple(found)


def _calls_of_submodules(module: nn.Module, call: Call) -> dict[nn.Module, Call]:
    """The first call of each submodule in a call of the module."""
    calls: dict[nn.Module, Call] = {}

    def note(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if child not in calls:
            copied = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
            calls[child] = Call.of(child, *copied[0], **copied[1])

    handles = [
        child.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        for child in module.modules()
        if child is not module and not isinstance(child, torch.jit.ScriptModule)  # they take no hooks
    ]
    try:
        module(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _has_hooks(module: nn.Module) -> bool:
    tables = ("_forward_hooks", "_forward_pre_hooks")
    hooks = (hook for part in module.modules() for table in tables for hook in getattr(part, table).values())
    return any(not isinstance(hook, _REPARAMETRISATIONS) for hook in hooks)


def _device(tensors: list[Tensor]) -> torch.device:
    return tensors[0].device
