"""Training of any model on fused operators: batch norms joined with the additions and activations that follow them.

The blocks of `layers` call the operators of `layers.kernels` themselves. Models written in plain PyTorch are traced by
the front end of `torch.compile`, as they run: it knows how each tensor came about whatever the model's Python did, runs
what it cannot trace as it is, and traces anew where a call differs from those before. The graph is changed where it
pays, and then runs operator by operator, under autograd as ever: nothing is generated, so that a call is traced in
seconds rather than minutes, and convolutions stay those of cuDNN.
"""

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from layers.kernels.conv_bn_act import NormArguments, activation_name, batch_norm_act
from layers.kernels.dispatch import uses_triton

Model = TypeVar("Model", bound=nn.Module)

_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")


def optimize_for_training(model: Model) -> Model:
    """Let `model` train on the fused operators of `layers.kernels` where they win, in place; returns `model`.

    Batch norm in training, the addition of a residual after it and the activation after that are one operator, forward
    and backward, wherever they follow each other in the graph of a call; up to rounding the model computes what it did.
    They win on CUDA; where there is no kernel the calls stay as they are. Class, parameters, hooks and state dict do
    not change. To undo it: `model._compiled_call_impl = None`.

    It takes the place of `torch.compile`, and of `memory_efficient`, which a traced call does not see.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> optimize_for_training(model) is model
    True
    """
    model.compile(backend=fuse_batch_norms)
    return model


def fuse_batch_norms(model: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A backend for `torch.compile`: the graph with the operators of `layers.kernels` where they win."""
    for node in list(model.graph.nodes):
        if node.target is F.batch_norm and _has_kernel(node):
            _fuse(model.graph, node)
    model.graph.lint()
    model.recompile()
    forward: Callable[..., Any] = model.forward
    return forward


def _has_kernel(norm: fx.Node) -> bool:
    value = _value(_options(norm)["input"])
    return value is not None and _options(norm)["training"] is True and uses_triton(value)


def _fuse(graph: fx.Graph, norm: fx.Node) -> None:
    """Put one call in the place of the norm, and of the addition and the activation that alone read it."""
    options = _options(norm)
    x, chain, residual = options.pop("input"), [norm], None
    following = _only_user(norm)
    if following is not None and following.target in _ADDITIONS and (added := _added(following, norm)) is not None:
        chain.append(following)
        residual, following = added, _only_user(following)
    activation = "none" if following is None else _activation(following)
    if following is not None and activation != "none" and (residual is None or activation != "silu"):
        chain.append(following)
    else:
        activation = "none"
    if len(chain) == 1 or any(_overwritten(node, norm, chain[-1]) for node in (x, residual)):
        return
    with graph.inserting_before(chain[-1]):
        new = graph.call_function(_norm_act, (x, residual, activation), options)
    new.meta = dict(chain[-1].meta)
    chain[-1].replace_all_uses_with(new)
    for node in reversed(chain):
        graph.erase_node(node)


def _norm_act(x: Tensor, residual: Tensor | None, activation: str, **options: Any) -> Tensor:
    function = None if activation == "none" else getattr(F, activation)
    return batch_norm_act(x, NormArguments(**options), function, residual)


def _options(norm: fx.Node) -> dict[str, Any]:
    """The arguments of a call of `F.batch_norm` by name."""
    bound = inspect.signature(F.batch_norm).bind(*norm.args, **norm.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`, once."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    return user if user is not None and list(user.args).count(node) == 1 else None


def _added(addition: fx.Node, norm: fx.Node) -> fx.Node | None:
    """What is added to the norm, if it is a tensor like it, and is not what the sum is written into."""
    if addition.kwargs or len(addition.args) != 2:
        return None
    other = addition.args[1] if addition.args[0] is norm else addition.args[0]
    if not isinstance(other, fx.Node) or (_in_place(addition) and addition.args[0] is other):
        return None
    mine, its = _value(norm), _value(other)
    alike = mine is not None and its is not None and (mine.shape, mine.dtype) == (its.shape, its.dtype)
    return other if alike else None


def _activation(node: fx.Node) -> str:
    """The operator's name for an activation, by whatever name the model calls it; "none" for anything else."""
    if node.target is F.hardtanh:
        return "relu6" if node.args[1:3] == (0.0, 6.0) else "none"
    return "relu" if node.target in ("relu", "relu_") else activation_name(node.target) or "none"


def _overwritten(node: Any, first: fx.Node, last: fx.Node) -> bool:
    """Whether anything writes into `node` between the two, which what is computed later would see."""
    users = node.users if isinstance(node, fx.Node) else ()
    return any(_in_place(user) and user.args[:1] == (node,) and first < user < last for user in users)


def _in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    operation = getattr(operator, name, None) is node.target and name.startswith("i") and name[1:] in vars(operator)
    return operation or (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))


def _value(node: Any) -> Tensor | None:
    """What was traced in the place of a node."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None
