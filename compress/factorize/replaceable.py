"""Which layers can be replaced by thin ones, and why others cannot: what the operator does and who calls the layer.

An operator of the trace shows that a weight is used linearly, and its owner is the module to replace. That the owner's
call is nothing but this operator is certain for the layers of ``torch.nn`` in their own ``forward``. For a subclass, a
user's own layer, or a layer whose weight its parent hands to a fused operator, it is tried: two layers that compute
exactly what the one does take its place, and the model must compute the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from compress.errors import first_line
from compress.factorize.plan import Factor, FactorPlan
from compress.factorize.surgery import DENSE, LOW_RANK, insert
from compress.gram import MAX_INPUTS
from compress.recorder import Trace
from compress.rules.registry import base_name
from compress.sandbox import untouched
from compress.sites import Site
from compress.surgery import copied
from compress.trace import ExampleInputs, as_arguments
from compress.uses import Uses
from compress.verify import culprits, same_outputs

THIN = "it is a thin layer already: prune it, or factorise the dense model anew"
ASKED = "the model asks the layer for what a thin one does not have"


def factorable(
    model: nn.Module, trace: Trace, sites: Sequence[Site], example_inputs: ExampleInputs
) -> tuple[list[Site], dict[str, str]]:
    """The sites whose layer can be replaced, and by parameter why others cannot; parameters of no site included."""
    modules, uses = dict(model.named_modules()), Uses(trace)
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    found, reasons = [], _of_no_site(trace, sites, uses)
    for site in sites:
        reason = _why_not(site, modules, trace, uses)
        name, _, slot = site.parameter.rpartition(".")
        if not reason and owners[id(getattr(modules[name], slot))] > 1:
            reason = "its weight is shared with another module"
        if reason:
            reasons[site.parameter] = reason
        else:
            found.append(site)
    failed = _failing([site for site in found if not _is_plain(site, modules)], model, example_inputs)
    failed |= _asked_for_more([site for site in found if _is_plain(site, modules)], model, example_inputs)
    return [site for site in found if site.parameter not in failed], reasons | failed


def owner_of(site: Site) -> str:
    """The path of the module that has the weight."""
    return site.parameter.rpartition(".")[0]


def settings_of(site: Site, model: nn.Module) -> dict[str, Any]:
    """What :class:`Factor` has to know of the layer: nothing where it is one of ``torch.nn``."""
    if isinstance(model.get_submodule(owner_of(site)), DENSE):
        return {}
    if site.is_convolution:
        arguments = site.op.arguments
        return {name: arguments[name] for name in ("stride", "padding", "dilation", "groups")}
    return {"transposed": not site.views}


def _of_no_site(trace: Trace, sites: Sequence[Site], uses: Uses) -> dict[str, str]:
    """Of parameters with two axes or more."""
    known = {site.parameter for site in sites}
    reasons = {}
    for name, ref in trace.parameters.items():
        if name in known or name in trace.buffers or len(ref.shape) < 2:
            continue
        readers = list(dict.fromkeys(base_name(op) for op in uses.of(ref.id)))
        reasons[name] = f"{', '.join(readers)} reads it, and not as the weight of a layer" if readers else "is not used"
        if any(op.arguments.get("transposed") for op in uses.of(ref.id)):
            reasons[name] = "it belongs to a transposed convolution"
    return reasons


def _why_not(site: Site, modules: Mapping[str, nn.Module], trace: Trace, uses: Uses) -> str:
    """What can be told without running the model."""
    name, _, slot = site.parameter.rpartition(".")
    owner = modules.get(name)
    ref = trace.parameters[site.parameter]
    if site.use > 0 or len(uses.of(ref.id)) > 1:
        return "its weight is used more than once"
    if owner is None or slot not in owner._parameters:
        return "its weight is no parameter of a module"
    if not name:
        return "it is the model itself"
    if isinstance(modules[name.rpartition(".")[0]], LOW_RANK):
        return THIN
    more = sorted({*owner.state_dict()} - {"weight", "bias"})
    if slot != "weight" or more or owner._modules:
        also = f" beside {more[0]}" if more and more[0] != slot else ""
        return f"it is a part of {type(owner).__name__}{also}, which is more than one layer"
    if owner._forward_hooks or owner._forward_pre_hooks:
        return "its module has hooks, which the thin layers would not call"
    if getattr(owner, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={owner.padding_mode!r} is not zeros"
    if isinstance(getattr(owner, "padding", None), str) and _lopsided(owner):
        return "its padding differs between the two ends of an axis"
    if not site.is_convolution and site.groups > 1:
        return "it holds the matrices of a batched product"
    if not ref.dtype.is_floating_point:
        return "its weight is not of floating point"
    if site.num_inputs > MAX_INPUTS:
        return f"it has more than {MAX_INPUTS} inputs"
    if any(base_name(op) not in ("t", "transpose") for op in site.views):
        return "its weight is reshaped before it is used"
    return ""


def _lopsided(owner: Any) -> bool:
    ends = owner._reversed_padding_repeated_twice
    return bool(ends[::2] != ends[1::2])


def _is_plain(site: Site, modules: Mapping[str, nn.Module]) -> bool:
    """Whether it is a layer of ``torch.nn`` in its own forward."""
    owner = modules[owner_of(site)]
    return type(owner) in DENSE and "forward" not in vars(owner) and site.op.module == owner_of(site)


def _failing(sites: Sequence[Site], model: nn.Module, example_inputs: ExampleInputs) -> dict[str, str]:
    """The reasons of those that cannot be replaced."""
    if not sites:
        return {}
    dense = _stirred(model, sites)
    same = partial(same_outputs, dense, example_inputs=example_inputs)
    failed = failing(len(sites), lambda some: _doubled(dense, [sites[i] for i in some]), same)
    return {sites[i].parameter: _reason(sites[i], model, error) for i, error in failed.items()}


def _asked_for_more(sites: Sequence[Site], model: nn.Module, example_inputs: ExampleInputs) -> dict[str, str]:
    """The reasons of layers that others ask for what thin ones do not have, ``layer.weight.dtype`` for example."""
    failed = failing(
        len(sites), lambda some: _doubled(model, [sites[i] for i in some]), partial(runs, example_inputs=example_inputs)
    )
    return {sites[i].parameter: f"{ASKED} ({error})" for i, error in failed.items()}


def runs(model: nn.Module, example_inputs: ExampleInputs) -> bool:
    """True, or the error with which it ends."""
    args, kwargs = as_arguments(example_inputs)
    with torch.no_grad(), untouched(model):
        model.eval()(*args, **kwargs)
    return True


def failing(
    number: int, changed: Callable[[Sequence[int]], nn.Module], fine: Callable[[nn.Module], bool]
) -> dict[int, str]:
    """Which of ``number`` changes make a model that is not ``fine``, each with the error that it ends with, if any.

    Args:
        changed: a copy of the model with some of the changes.
    """
    errors: dict[int, str] = {}

    def holds(some: Sequence[int]) -> bool:
        try:
            return fine(changed(some))
        except Exception as error:  # noqa: BLE001  whatever the model does with what it finds in the layer's place
            errors.update({i: first_line(error) for i in some if len(some) == 1})
            return False

    found: list[int] = []
    rest = list(range(number))
    while rest and not holds(rest):
        found += culprits(rest, holds)
        rest = [i for i in rest if i not in found]
    return {i: errors.get(i, "") for i in found}


def _reason(site: Site, model: nn.Module, error: str) -> str:
    name, quoted = owner_of(site), f" ({error})" if error else ""
    if site.op.module == name:
        return f"the forward of {type(model.get_submodule(name)).__name__} does more than apply the weight{quoted}"
    reader = f"{site.op.module!r} reads its weight" if site.op.module else "the model itself reads its weight"
    return f"{reader}, and not through the layer's own call{quoted}"


def _stirred(model: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """A copy with other biases, so that those that are zero and forgotten are noticed."""
    dense, generator = copied(model), torch.Generator().manual_seed(0)
    for site in sites:
        bias = dense.get_submodule(owner_of(site))._parameters.get("bias")
        if bias is not None:
            noise = torch.randn(bias.shape, generator=generator).to(bias)
            bias.data.add_(noise * (bias.detach().abs().mean() + 0.1))
    return dense


def _doubled(model: nn.Module, sites: Sequence[Site]) -> nn.Module:
    """A copy with two layers in the place of each, the weight itself and an identity."""
    made, factors, weights = copied(model), [], {}
    for site in sites:
        name = owner_of(site)
        weight = made.get_submodule(name).get_parameter("weight")
        matrix = site.matrix(weight)
        num_outputs = len(matrix) * site.num_outputs
        weights[name] = (
            matrix.reshape(num_outputs, -1, *site.kernel),
            torch.eye(site.num_outputs).repeat(len(matrix), 1).to(matrix),
        )
        kind, ranks = ("tucker2", (None, num_outputs)) if site.is_convolution else ("linear", (num_outputs,))
        factors.append(Factor(name, kind, ranks, "", tuple(weight.shape), 0.0, settings_of(site, made)))
    insert(made, FactorPlan(tuple(factors)), weights)
    return made
