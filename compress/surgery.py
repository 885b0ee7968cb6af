"""Carry out a plan on a model: slice parameters and buffers, set integers. Also the masked twin."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compress.containers import Path, changed, part
from compress.errors import PruneError
from compress.labels import Array
from compress.optimizer import Cut, follow
from compress.plan import PrunePlan, StoredValue
from compress.plans import Plan
from compress.sandbox import unwrapped


def apply(model: nn.Module, plan: Plan, *, inplace: bool = False, optimizer: Optimizer | None = None) -> nn.Module:
    """Carry out ``plan`` on a copy of ``model`` unless ``inplace``: remove what it names, factorise layers, or both.

    Args:
        model: the model that the plan was made for, or another instance of its class; wrappers of ``torch.compile`` and
            of data-parallel training are taken off.
        plan: of any result, as of :func:`compress.prune`, or read from JSON. Layers are factorised by
            their own weights alone, as a plan holds no weights.
        inplace: prune ``model`` itself. Its parameters become new objects.
        optimizer: that of ``model``: it is changed to train the pruned model, with its momenta and averages cut alike.

    Raises:
        PruneError: a parameter of the plan is missing or has another size, or the optimizer cannot follow; model and
            optimizer are as before.
    """
    if isinstance(plan, PrunePlan):
        return cut(model, plan, inplace=inplace, optimizer=optimizer)
    if optimizer is not None:
        raise PruneError("an optimizer can follow pruning alone: make a new one for the new parameters")
    return plan.carry_out(model, inplace=inplace)


def cut(model: nn.Module, plan: PrunePlan, *, inplace: bool = False, optimizer: Optimizer | None = None) -> nn.Module:
    """:func:`apply` for a pruning plan."""
    model = unwrapped(model)
    tensors = _checked_tensors(model, plan)
    removed = _cuts(plan)
    sliced = {name: _without(tensors[name], cuts) for name, cuts in removed.items()}
    if optimizer is not None and not inplace:
        pruned = cut(model, plan)
        move_optimizer(optimizer, model, pruned, plan)
        return pruned
    if inplace:
        if optimizer is not None:
            follow(optimizer, _replacements(tensors, {**tensors, **sliced}, removed))()
        _replace(model, {id(tensors[name]): tensor for name, tensor in sliced.items()})
    else:
        # the copy meets the sliced tensors where the originals were, so those are never copied at full size
        model = copied(model, {id(tensors[name]): tensor for name, tensor in sliced.items()})
    for value in plan.integers:
        _set_integer(model, value)
    _describe_modules(model)
    return model


def move_optimizer(optimizer: Optimizer, model: nn.Module, pruned: nn.Module, plan: PrunePlan) -> None:
    """Make the optimizer of ``model`` that of ``pruned``, a copy that ``plan`` was applied to; see :func:`apply`."""
    before, after = dict(_named_tensors(unwrapped(model))), dict(_named_tensors(pruned))
    follow(optimizer, _replacements(before, after, _cuts(plan)))()


def mask(model: nn.Module, plan: PrunePlan) -> nn.Module:
    """A copy of ``model`` of full size in which the removed channels influence nothing.

    The consumers' slices of the removed channels are zero. For an exact plan the copy computes what the pruned model
    computes; else (``plan.exact`` is False) statistics taken over the channels still see the removed ones.

    Raises:
        PruneError: the plan does not fit, or does more than prune: such a model has no twin of full size.
    """
    if not isinstance(plan, PrunePlan):
        raise PruneError(f"only pruning can be masked, not a {type(plan).__name__}: compress.apply gives its model")
    _checked_tensors(unwrapped(model), plan)
    twin = copied(unwrapped(model))
    _silence(_checked_tensors(twin, plan), plan)
    return twin


@contextmanager
def masked(model: nn.Module, plan: PrunePlan) -> Iterator[None]:
    """As :func:`mask`, on ``model`` itself for the time of the block: it costs the masked slices in memory, no more."""
    undo = _silence(_checked_tensors(model, plan), plan)
    try:
        yield
    finally:
        for tensor, axis, index, values in reversed(undo):
            tensor.index_copy_(axis, index, values)


def _silence(tensors: Mapping[str, Tensor], plan: PrunePlan) -> list[tuple[Tensor, int, Tensor, Tensor]]:
    """Set the consumers' slices to zero; what brings them back is returned."""
    undo = []
    for (name, axis), indices in plan.removed(role="consumer").items():
        tensor = tensors[name].data  # autograd need not know: the values come back, or belong to a copy
        index = torch.from_numpy(indices).to(tensor.device)
        undo.append((tensor, axis, index, tensor.index_select(axis, index)))
        tensor.index_fill_(axis, index, 0)
    return undo


def copied(model: nn.Module, replaced: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy with the tensors of ``replaced`` where those with their keys as id were.

    Tensors that modules computed and kept (a cache, the weight of old-style weight norm) may be part of a graph, which
    deepcopy refuses: the copy gets their values.
    """
    memo = dict(replaced or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _cuts(plan: PrunePlan) -> dict[str, list[tuple[int, Array]]]:
    """What each parameter or buffer loses: (axis, indices) for each axis that is touched."""
    removed: dict[str, list[tuple[int, Array]]] = {}
    for (name, axis), indices in plan.removed().items():
        removed.setdefault(name, []).append((axis, indices))
    return removed


def _replacements(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], removed: Mapping[str, list[tuple[int, Array]]]
) -> dict[Tensor, tuple[nn.Parameter, Cut]]:
    found: dict[Tensor, tuple[nn.Parameter, Cut]] = {}
    for name, old in before.items():
        new, cuts = after[name], removed.get(name, [])
        # a tied parameter goes by several names, and the plan knows one
        if isinstance(old, nn.Parameter) and isinstance(new, nn.Parameter) and (cuts or old not in found):
            found[old] = new, partial(_without_on, cuts=cuts)
    return found


def _without_on(tensor: Tensor, axes: tuple[int, ...], cuts: list[tuple[int, Array]]) -> Tensor:
    return _without(tensor, [(axis, indices) for axis, indices in cuts if axis in axes])


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for slot, tensor in slots.items():
                if tensor is not None:
                    yield (f"{prefix}.{slot}" if prefix else slot), tensor


def _checked_tensors(model: nn.Module, plan: PrunePlan) -> dict[str, Tensor]:
    tensors = dict(_named_tensors(model))
    for (name, axis), size in plan.sizes().items():
        if name not in tensors:
            raise PruneError(f"the plan removes part of {name!r}, which the model does not have: is it another class?")
        shape = tuple(tensors[name].shape)
        if axis >= len(shape) or shape[axis] != size:
            raise PruneError(
                f"the plan was made for {name!r} with {size} elements along axis {axis}, here it has shape {shape}: "
                "apply it to an unpruned instance of the same architecture"
            )
    for value in plan.integers:
        try:
            current = getattr(model.get_submodule(value.module), value.name)
            for step in value.path:
                current = part(current, step)
        except (AttributeError, LookupError) as error:
            name = f"{value.module}.{value.name}".lstrip(".")
            raise PruneError(
                f"the plan changes {name!r}, which the model does not have: is it another class?"
            ) from error
    return tensors


def _without(tensor: Tensor, cuts: list[tuple[int, Array]]) -> Tensor:
    result = tensor.detach()
    for axis, indices in cuts:
        kept = np.setdiff1d(np.arange(tensor.shape[axis]), indices)
        result = result.index_select(axis, torch.from_numpy(kept).to(tensor.device))
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        result = result.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(result, tensor.requires_grad) if _is_parameter(tensor) else result


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _replace(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for slot, tensor in slots.items():
                if id(tensor) in new:
                    slots[slot] = new[id(tensor)]  # type: ignore[assignment]
        for value in vars(module).values():  # recurrent layers keep their parameters in a list as well
            if isinstance(value, list):
                value[:] = [new.get(id(item), item) for item in value]


def _set_integer(model: nn.Module, value: StoredValue) -> None:
    module = model.get_submodule(value.module)
    new = _with(getattr(module, value.name), value.path, value.value)
    object.__setattr__(module, value.name, new)


def _with(container: object, path: Path, value: int) -> object:
    if not path:
        return value
    return changed(container, lambda step, item: _with(item, path[1:], value) if step == path[0] else item)


def _describe_modules(model: nn.Module) -> None:
    """Let ``torch.nn`` layers state the sizes that they have: integers that describe and do not compute."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            known = [t for t in (module.weight, module.running_mean) if t is not None]
            module.num_features = known[0].shape[0] if known else module.num_features
        elif isinstance(module, nn.RNNCellBase) and getattr(module, "weight_hh", None) is not None:
            module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]
        elif getattr(module, "weight", None) is None:
            continue  # it has none, or is given one at each call, as in mtl.SoftShared
        elif isinstance(module, nn.modules.conv._ConvNd):
            transposed = 1 if module.transposed else 0
            sizes = (module.weight.shape[0], module.weight.shape[1] * module.groups)
            module.out_channels, module.in_channels = sizes[transposed], sizes[1 - transposed]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = module.weight.shape[0]
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.PReLU):
            module.num_parameters = module.weight.shape[0]
