"""Attentions in a model: which can be of lower rank, what is gathered of them, and what their outputs lose by it.

What a rank loses of the scores (see :mod:`compress.factorize.heads`) is not what the outputs lose: that is measured.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.factorize.heads import Heads, Moments, made_of
from compress.factorize.replaceable import failing
from compress.gram import GramSums
from compress.recorder import Op, Trace
from compress.rules.registry import base_name
from compress.sandbox import quick_operators, untouched, visible_operators
from compress.sites import Site
from compress.surgery import copied
from compress.trace import ExampleInputs, as_arguments
from compress.uses import Uses
from compress.verify import same_outputs
from compress.watch import Looks
from layers.replacing import replace_modules

TRIED = 4  # ranks of each product at which the loss is measured; between them it follows the singular values
SAMPLES = 8  # on which it is
LEAST = 1e-30  # losses that are compared


@dataclass(frozen=True)
class Attention:
    """An attention in a run: the ``product`` of queries and keys, and the ``site`` of its last layer."""

    name: str
    num_heads: int
    product: Op
    site: Site

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, queries and keys."""
        (batch, queries, _), keys = self.product.tensors[-2].shape, self.product.tensors[-1].shape[-1]
        return batch // self.num_heads, queries, keys

    @property
    def source(self) -> tuple[int, int, int]:
        """The shape of what it reads; where that are several tensors, of queries."""
        batch, queries, _ = self.shape
        return batch, queries, self.site.result.shape[-1]

    def price(self, layer: nn.MultiheadAttention, ranks: Sequence[int]) -> tuple[int, int]:
        """MACs and weights with so many numbers a head."""
        outputs, (batch, queries, keys) = layer.embed_dim, self.shape
        scores, values = (self.num_heads * rank for rank in ranks)
        macs = outputs * queries * (scores + values) + keys * (layer.kdim * scores + layer.vdim * values)
        macs += queries * keys * (scores + values)
        biases = 2 * scores + values + outputs if layer.in_proj_bias is not None else 0
        weights = (outputs + layer.kdim) * scores + (layer.vdim + outputs) * values + biases
        return batch * macs, weights


class MomentsCollector:
    """Gathers second moments of queries, and of keys around their mean: a :class:`compress.watch.Collector`."""

    def __init__(self, attentions: Iterable[Attention]) -> None:
        self._wanted = {each.name: each.num_heads for each in attentions}
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(self, trace: Trace, looks: Looks) -> None:
        """Look at what each product is given."""
        for name, op in _products(trace, self._wanted).items():
            looks.add_after(op.index, self._look(name))

    def begin(self, batch: int, inputs: ExampleInputs) -> None:
        """Nothing to prepare."""

    def result(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Sums (H, D, D) for queries and keys."""
        return self._sums

    def _look(self, name: str) -> Callable[..., None]:
        def look(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            queries, keys = args[-2], args[-1].mT
            pair = queries, keys - keys.mean(1, keepdim=True)
            found = [_moment(rows.unflatten(0, (-1, self._wanted[name]))) for rows in pair]
            known = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = known[0] + found[0], known[1] + found[1]

        return look


def find_attentions(
    model: nn.Module, trace: Trace, sites: Iterable[Site], example_inputs: ExampleInputs
) -> tuple[dict[str, Attention], dict[str, str]]:
    """The attentions that can be replaced, by module, and by parameter why others cannot.

    An attention of the full rank must compute what the layer does, in the model and in float64.
    """
    last, uses = {site.parameter: site for site in sites if site.use == 0}, Uses(trace)
    named = {name: m for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    products = _products(trace, {name: layer.num_heads for name, layer in named.items()})
    found, reasons = dict[str, Attention](), dict[str, str]()
    for name, layer in named.items():
        weight = f"{name}.out_proj.weight"
        reason = _why_not(layer, name)
        if not reason and (name not in products or weight not in last):
            reason = "it is not used, or in another way than its own forward"
        if not reason and len(uses.of(trace.parameters[weight].id)) > 1:
            reason = "it is used more than once"
        if reason:
            reasons |= dict.fromkeys(_weights(name, layer), reason)
            continue
        found[name] = Attention(name, layer.num_heads, products[name], last[weight])
    failed = _failing(list(found), model, example_inputs)
    reasons |= {weight: why for name, why in failed.items() for weight in _weights(name, named[name])}
    return {name: each for name, each in found.items() if name not in failed}, reasons


def moments_of(known: GramSums, pair: tuple[Tensor, Tensor], num_heads: int) -> Moments:
    """From what was gathered at the last layer and at the product."""
    sent = known.mean[0, :-1, :-1].unflatten(1, (num_heads, -1)).unflatten(0, (num_heads, -1))
    blocks = sent.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return Moments(pair[0].cpu(), pair[1].cpu(), blocks.contiguous(), known.output_share.flatten())


def losses(model: nn.Module, heads: Mapping[str, Heads], inputs: ExampleInputs) -> dict[str, tuple[Tensor, Tensor]]:
    """What the outputs lose at each rank from 0 to D of scores and of values, (D + 1,) each.

    The attention is run on what the model gives it for ``inputs`` with a few ranks of either, the other whole; between
    these its loss is taken to grow as the squares of the singular values that are left out.
    """
    found = {}
    for name, (arguments, named) in _calls(model, list(heads), inputs).items():
        layer, own = model.get_submodule(name), heads[name]
        assert isinstance(layer, nn.MultiheadAttention)

        def output(attention: nn.Module, given: tuple[Any, ...] = arguments, more: Any = named) -> Tensor:
            result: Tensor = attention.eval()(*given, **more)[0]
            return result

        with torch.no_grad(), untouched(layer):
            scores, values = (_losses(layer, own, side, tail, output) for side, tail in enumerate(own.tails()))
        found[name] = scores, values
    return found


def _losses(
    layer: nn.MultiheadAttention, own: Heads, side: int, tail: Tensor, output: Callable[[nn.Module], Tensor]
) -> Tensor:
    """One of the two: ``tail`` (D + 1,), scaled to what is measured at some ranks."""
    expected, full = output(layer), own.full_rank
    tried = sorted({int(rank) for rank in np.linspace(0, full, TRIED + 2)[1:-1] if rank >= 1})
    if not tried:
        return tail
    ratios = []
    for rank in tried:
        thin = made_of(layer, own.factors((rank, full) if side == 0 else (full, rank)))
        difference = (output(thin) - expected).double().nan_to_num()  # (of rows in which all is masked)
        lost = float(difference.square().flatten(0, -2).mean(0).cpu() @ own.importance)
        ratios.append(math.log(max(lost, LEAST) / max(float(tail[rank]), LEAST)))
    curve = tail * torch.from_numpy(np.exp(np.interp(np.arange(full + 1), tried, ratios)))
    return curve.flip(0).cummax(0).values.flip(0)


def _calls(
    model: nn.Module, names: Sequence[str], inputs: ExampleInputs
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """With what each of these modules is called in evaluation mode."""
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    args, kwargs = as_arguments(inputs)
    with torch.no_grad(), untouched(model), visible_operators(), quick_operators():  # no fused path around the module
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, given, named, name=name: found.update({name: (given, named)}), with_kwargs=True
            )
        model.eval()(*args, **kwargs)
    return found


def _why_not(layer: nn.MultiheadAttention, name: str) -> str:
    if not name:
        return "it is the model itself"
    if layer.bias_k is not None or layer.add_zero_attn:
        return "it adds a key and a value of its own (add_bias_kv, add_zero_attn)"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "its module has hooks, which another attention would not call"
    return ""


def _weights(name: str, layer: nn.MultiheadAttention) -> list[str]:
    """Its matrices, by parameter."""
    return [f"{name}.{own}" for own, value in layer.named_parameters() if value.dim() > 1]


def _products(trace: Trace, names: Iterable[str]) -> dict[str, Op]:
    """The first product of two activations in each of these modules: that of queries and keys."""
    names, weights = set(names), {ref.id for ref in trace.parameters.values()}
    found: dict[str, Op] = {}
    for op in trace.evaluation:
        if op.tensors and all(ref.id in weights for ref in op.tensors):
            weights.update(ref.id for ref in op.outputs)
        if op.module in names and base_name(op) in ("bmm", "baddbmm") and not _reads(op, weights):
            found.setdefault(op.module, op)
    return found


def written_out(trace: Trace) -> list[str]:
    """The modules in which two activations are multiplied and softmax follows."""
    uses, weights, found = Uses(trace), {ref.id for ref in trace.parameters.values()}, dict[str, None]()
    for op in trace.evaluation:
        if base_name(op) in ("bmm", "baddbmm") and not _reads(op, weights):
            after: Op | None = op
            while after is not None and "softmax" not in base_name(after):
                after = uses.only_reader(after.outputs[0], after)
            if after is not None:
                found[op.module] = None
    return list(found)


def _reads(op: Op, weights: set[int]) -> bool:
    return any(ref.id in weights for ref in op.tensors[-2:])


def _failing(names: Sequence[str], model: nn.Module, example_inputs: ExampleInputs) -> dict[str, str]:
    """Those in whose place another attention does not compute the same."""

    def changed(numbers: Sequence[int]) -> nn.Module:
        made = copied(model)
        chosen = {name: made.get_submodule(name) for name in (names[number] for number in numbers)}
        full = {layer: made_of(layer, Heads.of(layer).whole())
                for layer in chosen.values() if isinstance(layer, nn.MultiheadAttention)}  # fmt: skip
        replace_modules(made, {layer: each.train(layer.training) for layer, each in full.items()})
        return made

    failed = failing(len(names), changed, partial(same_outputs, model, example_inputs=example_inputs))
    return {
        names[number]: "another attention in its place gives something else" + (f" ({error})" if error else "")
        for number, error in failed.items()
    }


def _moment(rows: Tensor) -> Tensor:
    """(B, H, N, D) -> (H, D, D)."""
    flat = rows.transpose(0, 1).flatten(1, 2)
    flat = flat.float() if flat.element_size() < 4 else flat
    return (flat.mT @ flat).double().cpu()
