"""What can be factorised in a model, found without data: layers, embeddings and attentions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from compress.factorize.attention import Attention, find_attentions, written_out
from compress.factorize.lookups import find_tables
from compress.factorize.replaceable import factorable, owner_of
from compress.names import protected
from compress.recorder import Op, Trace
from compress.sites import Site, find_sites
from compress.trace import ExampleInputs


@dataclass(frozen=True)
class Targets:
    """What can be replaced and may be; ``left`` says by parameter why the rest cannot, ``notes`` what else to know.

    ``sites`` are of convolutions and dense layers; ``tables`` are embeddings by parameter, ``attentions`` by module.
    """

    sites: Sequence[Site] = ()
    tables: Mapping[str, Op] = field(default_factory=dict)
    attentions: Mapping[str, Attention] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.sites or self.tables or self.attentions)

    @property
    def every_site(self) -> list[Site]:
        """Those of attentions' last layers too."""
        return [*self.sites, *(each.site for each in self.attentions.values())]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what each layer reads, by module; of attentions, of queries. Tables read no numbers."""
        layers = {owner_of(site): tuple(site.source.shape) for site in self.sites}
        return layers | {name: each.source for name, each in self.attentions.items()}

    @property
    def places(self) -> dict[str, int]:
        """Which operator runs each of them, by module."""
        layers = {owner_of(site): site.op.index for site in self.sites}
        tables = {name.removesuffix(".weight"): op.index for name, op in self.tables.items()}
        return layers | tables | {name: each.site.op.index for name, each in self.attentions.items()}

    @staticmethod
    def of(
        model: nn.Module,
        trace: Trace,
        methods: Sequence[str],
        protect: Sequence[str],
        example_inputs: ExampleInputs,
    ) -> "Targets":
        """All of a model that ``methods`` can do something with, and ``protect`` does not name."""
        whole = {name for pattern in protect for name in protected(pattern, trace.parameters)}
        free = [site for site in find_sites(trace) if site.parameter not in whole]
        sites, left = factorable(model, trace, free, example_inputs)
        weights = {name for name in whole if len(trace.parameters[name].shape) > 1}
        left |= dict.fromkeys(sorted(weights), "it is protected")
        tables, others = find_tables(model, trace, example_inputs)
        if "svd" not in methods:
            others |= dict.fromkeys(tables, 'a table is factorised by the method "svd"')
        others |= dict.fromkeys(tables.keys() & whole, "it is protected")
        tables = {name: op for name, op in tables.items() if name not in others}
        left = {name: reason for name, reason in left.items() if name not in tables} | others
        if "attention" not in methods:
            return Targets(sites, tables, {}, left)
        attentions, left = _attentions(model, trace, left, whole, example_inputs)
        return Targets(sites, tables, attentions, left, _alone(trace, attentions))


def _attentions(
    model: nn.Module, trace: Trace, left: Mapping[str, str], whole: set[str], example_inputs: ExampleInputs
) -> tuple[dict[str, Attention], dict[str, str]]:
    """The attentions that can be replaced and may be, and by parameter why anything is left."""
    found, others = find_attentions(model, trace, find_sites(trace), example_inputs)
    modules = {name.rpartition(".")[0].removesuffix(".out_proj") for name in whole}
    free = {name: each for name, each in found.items() if name not in modules}
    mine = {name for name in left for module in free if name.startswith(f"{module}.")}
    return free, {name: others.get(name, reason) for name, reason in left.items() if name not in mine}


def _alone(trace: Trace, attentions: Mapping[str, Attention]) -> list[str]:
    """A note where attention is none of :class:`torch.nn.MultiheadAttention`."""
    others = [name for name in written_out(trace) if name not in attentions]
    if not others:
        return []
    return [
        f"{len(others)} attentions ({others[0] or 'of the model itself'} ...) are no nn.MultiheadAttention, or left as "
        "they are: their layers are factorised one by one, not by the products of queries with keys and of values"
    ]
