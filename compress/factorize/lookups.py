"""The embeddings of a model: which can be replaced, and how often each token is asked for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.factorize.replaceable import ASKED, THIN, failing, runs
from compress.recorder import Op, Trace
from compress.rules.registry import base_name
from compress.surgery import copied
from compress.trace import ExampleInputs
from compress.uses import Uses
from compress.watch import Looks
from layers.low_rank import LowRankEmbedding
from layers.replacing import replace_modules


class TokenCounter:
    """Counts tokens by table: a :class:`compress.watch.Collector`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = set(names)
        self._counts: dict[str, Tensor] = {}

    def watch(self, trace: Trace, looks: Looks) -> None:
        """Look at what each table is asked for."""
        for name, op in _lookups(trace).items():
            if name in self._names:
                looks.add_after(op.index, self._look(name))

    def begin(self, batch: int, inputs: ExampleInputs) -> None:
        """Nothing to prepare."""

    def result(self) -> Mapping[str, Tensor]:
        """How often each token was asked for, by table."""
        return self._counts

    def _look(self, name: str) -> Any:
        def look(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            found = torch.bincount(args[1].flatten(), minlength=len(args[0])).cpu()
            self._counts[name] = self._counts.get(name, 0) + found

        return look


def find_tables(model: nn.Module, trace: Trace, example_inputs: ExampleInputs) -> tuple[dict[str, Op], dict[str, str]]:
    """The embeddings that can be replaced, by parameter, and why others cannot."""
    modules, uses, found, reasons = dict(model.named_modules()), Uses(trace), {}, {}
    owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
    for name, op in _lookups(trace).items():
        path, _, slot = name.rpartition(".")
        owner = modules.get(path)
        if type(owner) is not nn.Embedding or slot != "weight" or op.module != path or not path:
            reasons[name] = "it is a table that is not read through the call of an nn.Embedding"
        elif isinstance(modules[path.rpartition(".")[0]], LowRankEmbedding):
            reasons[name] = THIN
        elif owner.max_norm is not None or owner.scale_grad_by_freq or owner.sparse:
            reasons[name] = "its rows are renormalised, or have gradients of another kind"
        elif owners[id(owner.weight)] > 1:
            reasons[name] = "its weight is shared with another module"
        elif len(uses.of(trace.parameters[name].id)) > 1:
            reasons[name] = "its weight is used more than once"
        elif owner._forward_hooks or owner._forward_pre_hooks:
            reasons[name] = "its module has hooks, which the thin layers would not call"
        else:
            found[name] = op
    names = [name.removesuffix(".weight") for name in found]

    def changed(numbers: Sequence[int]) -> nn.Module:
        made = copied(model)
        layers = [made.get_submodule(names[number]) for number in numbers]
        replace_modules(made, {layer: _whole(layer) for layer in layers if isinstance(layer, nn.Embedding)})
        return made

    failed = failing(len(names), changed, partial(runs, example_inputs=example_inputs))
    reasons |= {f"{names[number]}.weight": f"{ASKED} ({error})" for number, error in failed.items()}
    return {name: op for name, op in found.items() if name not in reasons}, reasons


def _whole(table: nn.Embedding) -> LowRankEmbedding:
    """The same in a row with an identity."""
    eye = torch.eye(table.embedding_dim).to(table.weight)
    return LowRankEmbedding.from_factors(table.weight, eye, padding_idx=table.padding_idx)


def _lookups(trace: Trace) -> dict[str, Op]:
    names = {ref.id: name for name, ref in trace.parameters.items()}
    return {
        names[op.arguments["weight"].id]: op
        for op in trace.evaluation
        if base_name(op) == "embedding" and op.arguments["weight"].id in names
    }
