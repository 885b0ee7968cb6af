"""Training with fewer stored activations: what is cheap to compute again is not kept for the backward pass.

Autograd keeps the inputs and outputs of most operators. Many of them are a few cheap steps away from another tensor
that it keeps anyway: after convolution, batch norm and ReLU it holds the output of the convolution, which batch norm
needs, and the output of ReLU, which the next convolution needs. The second is the first, normalised and clamped. Here
every operator that runs is seen below autograd, so it is known how each tensor came about, whatever the model's Python
did; and where autograd asks to keep a tensor that follows from kept ones by cheap steps, it gets the steps instead.

The forward pass is untouched, hence bitwise equal, running statistics included; and gradients come from autograd's own
formulas, on tensors computed a second time, or for batch norm of a 1 x 1 convolution that widens, on CPUs, from a
formula that needs less (`layers.pointwise_norm`). Nothing random and no reduction is repeated: batch norm is recomputed
with the statistics that its forward pass found. This is the selective recomputation of Chen, Xu, Zhang, Guestrin:
Training Deep Nets with Sublinear Memory Cost (2016), section 4, decided tensor by tensor as the forward pass goes.
"""

import functools
import math
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.weak import TensorWeakRef

from layers.pointwise_norm import PointwiseNorms
from layers.recipes import Recipe, joined, recipe_of

Model = TypeVar("Model", bound=nn.Module)

# Longest chain of steps from kept tensors. Longer ones save more, but a whole chain lives at once in the backward pass.
MAX_STEPS = 6
_AUTOCAST_DEVICES = ("cpu", "cuda")
_PLAIN = (Tensor, nn.Parameter)


def memory_efficient(model: Model) -> Model:
    """Make `model` keep fewer activations for its backward pass, in place; returns `model`.

    Outputs, running statistics and gradients stay as they are. Only training is affected: where gradients are off,
    nothing is recorded. Class, parameters, hooks and state dict do not change; deep copies, pickles and the replicas of
    `torch.nn.DataParallel` keep as little. To undo it: `del model.forward`.

    Activations, batch norms, sums, products, casts, views and concatenations are computed again in the backward pass,
    and so are 1 x 1 convolutions of at most 256 channels that at least double their number. Regions under
    `torch.utils.checkpoint` stay as they are, and `torch.compile` and `torch.func` ignore this.

    Raises ValueError when this instance already has a `forward` of its own.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    >>> memory_efficient(model)(torch.zeros(1, 3, 9, 9)).shape
    torch.Size([1, 8, 5, 5])
    """
    if not isinstance(vars(model).get("forward", _Forward(model)), _Forward):
        raise ValueError(
            f"this {type(model).__name__} has a forward of its own (set on the instance, not the class), which would "
            "be lost; put it into a module whose class defines forward"
        )
    attributes: Any = model
    attributes.forward = forward = _Forward(model)
    attributes._replicate_for_data_parallel = forward.replicate
    return model


class _Forward:
    """The forward of one instance: an object, so that deep copies and pickles of the model have one of their own.

    What a replica of `torch.nn.DataParallel` gets of the instance is a shallow copy, whose forward would still be that
    of the original, on its parameters and its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def __wrapped__(self) -> Callable[..., Any]:  # whose signature it has
        return types.MethodType(type(self._model).forward, self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with recompute_cheap():
            return type(self._model).forward(self._model, *args, **kwargs)

    def replicate(self) -> Any:
        model: Any = self._model
        replica = type(model)._replicate_for_data_parallel(model)
        if "forward" in vars(model):
            replica.forward = _Forward(replica)
        return replica


@contextmanager
def recompute_cheap() -> Iterator[None]:
    """What runs inside keeps fewer tensors for its backward pass; `memory_efficient` puts a model's forward inside.

    Hooks on saved tensors that are active outside (`torch.autograd.graph.saved_tensors_hooks`, such as those that move
    tensors to the CPU) are called for the tensors that are kept.

    The backward pass raises RuntimeError when a tensor that it needs was modified in place after it was kept, as it
    does without.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        yield
        return
    transforms = torch._C._functorch.peek_interpreter_stack() is not None  # no hooks on saved tensors in there
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    checkpointed = hooks is not None and hooks[0].__module__ == torch.utils.checkpoint.__name__  # keeps nothing at all
    if transforms or checkpointed:
        yield
        return
    history = _History(hooks)
    with torch.autograd.graph.saved_tensors_hooks(history.pack, _unpack), history, PointwiseNorms():
        yield


class _Kept:
    """A tensor as it was when autograd asked to keep it."""

    steps = 0

    def __init__(self, tensor: Tensor, hooks: tuple[Callable[..., Any], Callable[..., Any]] | None) -> None:
        if tensor.grad_fn is not None:  # which would own this object, which would own the function
            tensor = tensor.detach()
        pack: Callable[[Tensor], Any] = _itself
        self._unpack: Callable[[Any], Tensor] = _itself
        if hooks is not None:
            pack, self._unpack = hooks
        self._packed = pack(tensor)
        self._tensor = weakref.ref(tensor)
        self._version = tensor._version

    def value(self) -> Tensor:
        tensor = self._unpack(self._packed)
        if tensor is self._tensor() and tensor._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"shape {tuple(tensor.shape)}, version {tensor._version}, expected version {self._version}"
            )
        return tensor


class _Again:
    """A tensor as the step that computes it from what is kept.

    The value is held from when it is first asked for until all have it who will ask: one step serves the operators that
    read its result as well as the steps that follow it.
    """

    def __init__(self, step: Recipe, inputs: list[Any]) -> None:
        self.readers = 0
        self.steps = step.steps
        self._step = step
        self._inputs = inputs
        self._value: Tensor | None = None
        self._waiting = 0
        for each in _flat(inputs):
            if isinstance(each, _Again):
                each.readers += 1
            if isinstance(each, _Kept | _Again):
                self.steps = max(self.steps, step.steps + each.steps)

    def value(self) -> Tensor:
        value = self._value
        if value is None:
            first = self._inputs[0]
            inputs, function = self._inputs, self._step.function
            if isinstance(first, _Again) and first.readers == 1 and not first._step.is_view:  # nobody else sees it
                both = joined(first._step, self._step)
                inputs, function = (
                    (first._inputs, both) if both is not None else (inputs, self._step.in_place or function)
                )
            value = self._value = function(*_mapped(_value, inputs), **self._step.kwargs)
            self._waiting = self.readers
        self._waiting -= 1
        if self._waiting <= 0:
            self._value = None
        return value


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _value(handle: Any) -> Any:
    return handle.value() if isinstance(handle, _Kept | _Again) else handle


def _unpack(handle: _Kept | _Again) -> Tensor:
    """The tensor that autograd asks for in the backward pass."""
    if isinstance(handle, _Kept):
        return handle.value()
    with ExitStack() as stack:
        if torch.is_grad_enabled():
            stack.enter_context(torch.no_grad())
        for device in _AUTOCAST_DEVICES:  # casts are steps of their own
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        return handle.value()


def _flat(args: list[Any]) -> Iterator[Any]:
    for each in args:
        if isinstance(each, list):
            yield from each
        else:
            yield each


def _mapped(function: Callable[[Any], Any], args: list[Any]) -> list[Any]:
    """`function` of every argument, and of every element of those that are lists (of tensors to concatenate)."""
    return [[function(e) for e in each] if isinstance(each, list) else function(each) for each in args]


class _Node:
    """What is known of a tensor during the forward pass; it keeps none alive."""

    __slots__ = ("handle", "inputs", "recipe", "size", "tensor")

    def __init__(self, tensor: Tensor, recipe: Recipe | None = None, inputs: list[Any] | None = None) -> None:
        self.tensor: Callable[[], Tensor | None] = TensorWeakRef(tensor)
        self.size = tensor.untyped_storage().nbytes()
        self.recipe = recipe
        self.inputs = inputs or []  # of the recipe: nodes in the place of tensors
        self.handle: Callable[[], _Kept | _Again | None] = _nothing

    def overwritten(self) -> None:
        self.tensor = _nothing
        if isinstance(self.handle(), _Kept):
            self.handle = _nothing


def _nothing() -> None:
    return None


class _History(TorchDispatchMode):
    """How the tensors of a forward pass came about."""

    def __init__(self, hooks: tuple[Callable[..., Any], Callable[..., Any]] | None) -> None:
        super().__init__()
        self._hooks = hooks
        # By storage, which a weak reference keeps from being reused, then by the part of it that a tensor is.
        self._storages: dict[int, tuple[StorageWeakRef, dict[Any, _Node]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.detach.default:
            return result
        recipe = recipe_of(func, args, kwargs, result)
        inputs = [] if recipe is None else _mapped(self._known, list(recipe.args))
        if func._schema.is_mutable:
            self._forget_written(func, args, kwargs)
        if recipe is not None:
            output = result if isinstance(result, Tensor) else result[0]
            if _has_storage(output):
                self._parts(output).setdefault(_part(output), _Node(output, recipe.without_tensors(), inputs))
        return result

    def _known(self, argument: Any) -> Any:
        return self._node(argument) if _has_storage(argument) else argument

    def _forget_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if _has_storage(tensor):
                        parts = self._parts(tensor)
                        for node in parts.values():
                            node.overwritten()
                        parts.clear()

    def _parts(self, tensor: Tensor) -> dict[Any, _Node]:
        storage = tensor.untyped_storage()
        found = self._storages.get(storage._cdata)
        if found is None:
            found = self._storages[storage._cdata] = (StorageWeakRef(storage), {})
        return found[1]

    def _node(self, tensor: Tensor) -> _Node:
        parts, part = self._parts(tensor), _part(tensor)
        if part not in parts:
            parts[part] = _Node(tensor)
        return parts[part]

    def pack(self, tensor: Tensor) -> _Kept | _Again:
        """What autograd gets to hold instead of `tensor`."""
        if not _has_storage(tensor):
            return _Kept(tensor, self._hooks)
        node = self._node(tensor)
        node.tensor = TensorWeakRef(tensor)  # the object seen before may be gone while its storage lives on
        handle = self._hold(node, MAX_STEPS)
        if isinstance(handle, _Again):
            handle.readers += 1
        return handle

    def _hold(self, node: _Node, steps: int) -> _Kept | _Again:
        handle = node.handle()
        if handle is None:
            tensor = node.tensor()
            if node.recipe is not None and (tensor is None or self._inputs_missing(node, steps) < node.size):
                left = steps - node.recipe.steps
                hold = functools.partial(self._hold_argument, steps=left)
                handle = _Again(node.recipe, _mapped(hold, node.inputs))
            else:
                assert tensor is not None
                handle = _Kept(tensor, self._hooks)
            node.handle = weakref.ref(handle)
        return handle

    def _hold_argument(self, argument: Any, steps: int) -> Any:
        return self._hold(argument, steps) if isinstance(argument, _Node) else argument

    def _missing(self, node: _Node, steps: int) -> float:
        """Bytes to keep in addition, so that `node` can be had in so many steps; infinite where it cannot."""
        handle = node.handle()
        if handle is not None:
            return 0 if handle.steps <= steps else math.inf
        return min(self._inputs_missing(node, steps), math.inf if node.tensor() is None else node.size)

    def _inputs_missing(self, node: _Node, steps: int) -> float:
        if node.recipe is None or node.recipe.steps > steps:
            return math.inf
        left = steps - node.recipe.steps
        return sum(self._missing(each, left) for each in _flat(node.inputs) if isinstance(each, _Node))


def _has_storage(x: Any) -> bool:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return False
    return type(x) in _PLAIN or not is_traceable_wrapper_subclass(x)  # the latter takes as long as an operator


def _part(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()
