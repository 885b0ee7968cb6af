"""Batch norms folded into the convolutions and linear layers before them."""

import copy
import inspect
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from layers.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from layers.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from layers.norm_act import has_hooks
from layers.replacing import replace_modules
from layers.sync_norm import SyncBatchNorm

_DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Number of axes of a batch that each layer produces, and that each norm takes (None: any).
_OUTPUT_DIMS = dict(zip(_DENSE, (2, 3, 4, 5, 3, 4, 5), strict=True))
_NORM_DIMS = {
    nn.BatchNorm1d: None,
    nn.BatchNorm2d: 4,
    nn.BatchNorm3d: 5,
    nn.SyncBatchNorm: None,
    SyncBatchNorm: None,
    FrozenBatchNorm2d: 4,
}
_KINDS = (*_DENSE, *_NORM_DIMS)
# These only check their input before they do what their base does.
_CHECKED = (
    *(Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d),
    *(BatchNorm1d, BatchNorm2d, BatchNorm3d),
)
# What a subclass may define and still compute what its base does, beside double-underscore names other than these.
_HARMLESS = {"extra_repr", "reset_parameters"}
_HARMFUL = {"__call__", "__getattr__", "__getattribute__", "__setattr__"}


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Copy of `model` in evaluation mode with every batch norm folded that directly follows a layer.

    The layer is a convolution, a transposed convolution, or a linear layer on (batch, features). With s the norm's
    weight / sqrt(running_var + eps), the layer's weight W becomes s W, its bias b becomes s (b - running_mean) + the
    norm's bias, and the norm becomes `nn.Identity`. The copy computes what `model` computes in evaluation mode.

    A norm stays as it is where folding would change the result: the layer's output or parameters are used elsewhere,
    the two are not called together every time, the norm has no running statistics, or one of them carries hooks or
    parametrisations. The dataflow is that of a call with the required arguments only.

    Raises ValueError when the dataflow cannot be traced, as when it depends on the values of tensors.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> fold_batch_norm(model)[1]
    Identity()
    """
    folded = copy.deepcopy(model).eval()
    modules = dict(folded.named_modules())
    if not any(_kind(module) in _NORM_DIMS for module in modules.values()):
        return folded
    replaced: dict[nn.Module, nn.Module] = {}
    # Tracing may leave marks on a module (attributes set in its forward), so it gets a copy of its own.
    for layer_name, norm_name in _foldable_pairs(copy.deepcopy(folded)):
        layer, norm = modules[layer_name], modules[norm_name]
        _fold(layer, norm)
        replaced[norm] = _identity(layer, norm)
    replace_modules(folded, replaced)
    return folded


def _kind(module: nn.Module) -> Any:
    """The class of `_KINDS` whose arithmetic is that of `module`, or None.

    A subclass may do more than its base (timm's BatchNormAct2d also activates, a parametrised layer works out its
    weight), so all that it defines must be known not to matter.
    """
    for cls in type(module).__mro__:
        if cls in _KINDS:
            return None if "forward" in vars(module) else cls
        names = {name for name in vars(cls) if not (name.startswith("__") and name.endswith("__"))} - _HARMLESS
        if cls not in _CHECKED and (names or not _HARMFUL.isdisjoint(vars(cls))):
            return None
    return None


class _Tracer(fx.Tracer):
    """Follows calls down to layers, norms and other modules of torch.nn, and sees who reads their tensors."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Blocks of `layers` read no tensors but their own, so that those with nothing to fold need not be looked into.
        ours = type(m).__module__.startswith("layers.")
        nothing_inside = ours and not any(isinstance(each, _KINDS) for each in m.modules())
        return isinstance(m, _KINDS) or nothing_inside or super().is_leaf_module(m, module_qualified_name)


@dataclass
class _Dataflow:
    """Who follows each layer and who precedes each norm, call by call; None is anything else, or several."""

    followers: dict[nn.Module, list[nn.Module | None]] = field(default_factory=lambda: defaultdict(list))
    predecessors: dict[nn.Module, list[nn.Module | None]] = field(default_factory=lambda: defaultdict(list))


def _foldable_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of (layer, norm) that are only ever used together, in the order of the calls."""
    names = {module: name for name, module in model.named_modules()}
    graph = _trace(model)
    dataflow = _dataflow(model, graph)
    borrowed = _borrowed_tensors(model, graph)
    pairs = []
    for layer, followers in dataflow.followers.items():
        norm = followers[0]
        if (
            norm is not None
            and set(followers) == {norm}
            and set(dataflow.predecessors[norm]) == {layer}
            and _compatible(layer, norm)
            and borrowed.isdisjoint(id(tensor) for module in (layer, norm) for tensor in _tensors(module).values())
        ):
            pairs.append((names[layer], names[norm]))
    return pairs


def _trace(model: nn.Module) -> fx.Graph:
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.fx cannot check whether later calls use these defaults too
            return _Tracer().trace(model, concrete_args=defaults)
    except Exception as error:  # the model's own code runs here, and may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot fold the batch norms of {type(model).__name__}: torch.fx cannot trace its dataflow ({reason}); "
            "fold the submodules that can be traced one by one"
        ) from error


def _dataflow(model: nn.Module, graph: fx.Graph) -> _Dataflow:
    modules = dict(model.named_modules())
    called = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    dataflow = _Dataflow()
    for node, module in called.items():
        if _kind(module) in _OUTPUT_DIMS:
            dataflow.followers[module].append(called.get(next(iter(node.users))) if len(node.users) == 1 else None)
        elif _kind(module) in _NORM_DIMS:
            dataflow.predecessors[module].append(called.get(node.all_input_nodes[0]) if node.all_input_nodes else None)
    return dataflow


def _borrowed_tensors(model: nn.Module, graph: fx.Graph) -> set[int]:
    """Parameters and buffers, by id, that several modules hold, or that are read other than by calling their module."""
    holders = Counter(id(tensor) for module in model.modules() for tensor in _tensors(module, recurse=False).values())
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return {i for i, count in holders.items() if count > 1} | {
        id(tensor) for name, tensor in _tensors(model).items() if name in read
    }


def _tensors(module: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers under every name that they have."""
    return {
        **dict(module.named_parameters(recurse=recurse, remove_duplicate=False)),
        **dict(module.named_buffers(recurse=recurse, remove_duplicate=False)),
    }


def _compatible(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether `norm` is a fixed affine map of the channels that `layer` produces."""
    layer_kind, norm_kind = _kind(layer), _kind(norm)
    if layer_kind not in _OUTPUT_DIMS or norm_kind not in _NORM_DIMS or norm.running_mean is None:
        return False
    if _NORM_DIMS[norm_kind] not in (None, _OUTPUT_DIMS[layer_kind]):
        return False
    return not has_hooks(layer) and not has_hooks(norm)


# Any below: no class declares what these modules have in common, `weight` and `bias`.


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """Change the parameters of `layer` to those of `norm` after `layer`."""
    scale, shift = norm_as_affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    groups = layer.groups if _kind(layer) in _TRANSPOSED else None
    weight, bias = scale_outputs(layer.weight, layer.bias, scale, shift, transposed_groups=groups)
    trainable = layer.weight.requires_grad
    layer.bias = nn.Parameter(bias, requires_grad=trainable)
    layer.weight = nn.Parameter(weight, requires_grad=trainable)


def norm_as_affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Batch norm in evaluation mode is `scale * x + shift` for each channel: both in float64, of shape (channels,)."""
    scale = (_float64(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * _float64(weight)
    shift = -_float64(mean) * scale
    return scale, shift if bias is None else shift + _float64(bias)


def scale_outputs(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, transposed_groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer followed by `scale * y + shift` for each output channel.

    `transposed_groups` are the groups of a transposed convolution, whose weight is (in, out / groups, ...) and not
    (out, in / groups, ...).
    """
    if bias is not None:
        shift = shift + _float64(bias) * scale
    exact = _float64(weight)
    ones = [1] * (weight.dim() - 2)
    if transposed_groups is None:
        exact = exact * scale.reshape(-1, 1, *ones)
    else:  # each group of inputs has outputs of its own
        grouped = exact.unflatten(0, (transposed_groups, -1))
        exact = (grouped * scale.reshape(transposed_groups, 1, -1, *ones)).flatten(0, 1)
    return exact.to(weight), shift.to(weight)


def scale_inputs(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose input is `scale * x + shift` for each channel: (out, in / groups, ...)."""
    grouped = _float64(weight).unflatten(0, (groups, -1))
    per_input = (groups, 1, -1, *[1] * (weight.dim() - 2))
    added = (grouped * shift.reshape(per_input)).flatten(0, 1).flatten(1).sum(1)
    exact = (grouped * scale.reshape(per_input)).flatten(0, 1)
    return exact.to(weight), (added if bias is None else added + _float64(bias)).to(weight)


def _float64(x: Tensor) -> Tensor:
    """Exact copy of `x` to calculate with, on the CPU, since not every device has float64."""
    return x.to("cpu", torch.float64)


class _BatchOf(nn.Identity):
    """Identity that only takes tensors of so many axes.

    BatchNorm1d and SyncBatchNorm take several numbers of axes, and always normalise axis 1. In a batch that is the
    axis of the layer's outputs; in (batch, length, features) from a linear layer, and without a batch, it is not.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.dims:
            raise ValueError(
                f"a folded batch norm takes {self.dims} axes, (batch, channels, ...), and got {tuple(x.shape)}; "
                "use the model that was not folded for this input"
            )
        return x


def _identity(layer: nn.Module, norm: nn.Module) -> nn.Identity:
    return nn.Identity() if _NORM_DIMS[_kind(norm)] is not None else _BatchOf(_OUTPUT_DIMS[_kind(layer)])
