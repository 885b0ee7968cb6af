"""The pruned and the dense model side by side on one batch, stopped wherever a layer can be refitted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.gram import check_finite
from compress.landing import find_landings
from compress.recorder import Op, Trace
from compress.recover.chain import find_chains
from compress.recover.lockstep import Run
from compress.sites import Key, by_key, find_sites
from compress.trace import ExampleInputs
from compress.watch import Watch


@dataclass
class _Held:
    """An operator that has run, with what it was called with."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Tensor
    versions: tuple[int, ...]

    def again(self, replaced: Tensor | None = None, by: Tensor | None = None) -> Tensor:
        """Run it again, with another tensor in the place of one argument."""
        with torch.no_grad():  # (autograd refuses views of weights that were written to)
            args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in self.args]
        if replaced is not None:
            args = [by if arg is replaced else new for arg, new in zip(self.args, args, strict=True)]
        return _first(self.func(*args, **self.kwargs))

    @property
    def unchanged(self) -> bool:
        """Whether its arguments are what they were."""
        return self.versions == _versions(self.args)


class Side:
    """One model on one batch. Stops at each site's landing, where there is one, else right behind the site.

    ``chained``: what lies between the two layers of a chain is held as well, to follow what a change of the first does.
    """

    def __init__(
        self, model: nn.Module, inputs: ExampleInputs, trace: Trace, batch: int, *, chained: bool = False
    ) -> None:
        self.sites = by_key(find_sites(trace))
        self.landings = find_landings(trace, list(self.sites.values()))
        self.chains = find_chains(trace, list(self.sites.values())) if chained else {}
        self.batch = batch
        self._model, self._inputs, self._trace = model, inputs, trace
        self._held: dict[int, _Held] = {}
        self._scales: dict[Key, Tensor] = {}  # (no refit of a layer changes what multiplies its outputs)
        self._end: tuple[Any, ...] = ()
        self._at: Key | None = None
        self._run: Run | None = None

    def rename(self, names: Mapping[str, str]) -> None:
        """Know sites by the other model's names of their weights; what they compute is the same."""
        changed = {key: (names.get(key[0], key[0]), key[1]) for key in self.sites}
        self.sites = {changed[key]: site for key, site in self.sites.items()}
        self.landings = {changed[key]: landing for key, landing in self.landings.items()}

    def start(self, lands: Mapping[Key, bool]) -> None:
        """Begin the run; ``lands`` says where each site stops."""
        after: dict[int, Any] = {}
        stops: dict[int, list[Key]] = {}
        self._lands = lands
        for key, landing_too in lands.items():
            site, landing = self.sites[key], self.landings[key]
            after[site.op.index] = self._hold(site.op, None if landing_too else key)
            if landing_too:
                assert landing.end is not None
                after.update({op.index: self._hold(op, None) for op in landing.steps})
                stops.setdefault(landing.end.index, []).append(key)
        for chain in self.chains.values():
            if chain.first in lands and chain.second in lands:
                after.update({op.index: self._hold(op, None) for op in chain.path if op.index not in after})
        before = {index: self._stop(keys) for index, keys in stops.items()}
        self._run = Run(self._model, self._inputs, lambda: Watch(self._trace, self.batch, after, before))

    def advance(self, key: Key | None) -> None:
        """Run until it stops at ``key``; to the end for None."""
        assert self._run is not None
        while not self._run.finished and (key is None or self._at != key):
            self._run.resume()

    def abandon(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.abandon()

    def source(self, key: Key) -> Tensor:
        """What enters the site."""
        site = self.sites[key]
        source = self._held[site.op.index].args[site.place]
        assert isinstance(source, Tensor)
        return source

    def check(self, key: Key) -> None:
        """Raises :class:`CalibrationError` where what enters the site is not finite."""
        check_finite(self.source(key), self.sites[key], self.batch)

    def unchanged(self, key: Key) -> bool:
        """Whether the site can be run again: nothing wrote into its input since."""
        return self._held[self.sites[key].op.index].unchanged

    def output(self, key: Key, source: Tensor | None = None) -> Tensor:
        """What the site gives with its present weights, from another ``source`` if one is given."""
        held = self._held[self.sites[key].op.index]
        return held.again() if source is None else held.again(held.args[self.sites[key].place], source)

    def follow(self, second: Key, start: Tensor) -> Tensor:
        """What enters ``second`` if the layer that feeds it gives ``start``."""
        chain = self.chains[second]
        return self._follow(self.sites[chain.first].op, chain.path, start)

    def landed(self, key: Key) -> tuple[Tensor, Tensor]:
        """What comes of the site's output where it lands (the sum with the stream, if that is added), and the scale of
        the steps up to there, both in the shape of the site's output.

        The steps are affine and elementwise, so their derivative is that scale, and leads back to the output's shape.
        """
        landing, end = self.landings[key], self._landed(key)
        if landing.adds:
            left, right = self._end[:2]
            end = end + (right if landing.first else left)
        if key not in self._scales:
            self._scales[key] = self._pulled_back(key, torch.ones_like(end))
        scale = self._scales[key]
        scaled = self._pulled_back(key, end) / scale if landing.reshaped else end
        return torch.where(scale == 0, 0.0, scaled), scale

    def renew(self, key: Key) -> None:
        """Go on with what the site gives now."""
        new = self.output(key)
        if self._lands[key]:
            self._landed(key).copy_(self._follow(self.sites[key].op, self.landings[key].steps, new))
        else:
            self._held[self.sites[key].op.index].result.copy_(new)

    def release(self, key: Key) -> None:
        """Forget what was held for the site."""
        self._scales.pop(key, None)
        chain = self.chains.get(key)
        for op in (self.sites[key].op, *self.landings[key].steps, *(() if chain is None else chain.path)):
            self._held.pop(op.index, None)

    def _pulled_back(self, key: Key, value: Tensor) -> Tensor:
        """What landed, times the derivative of the steps up to there, in the shape of the site's output."""
        with torch.enable_grad():
            leaf = torch.zeros_like(self._held[self.sites[key].op.index].result).requires_grad_()
            made = self._follow(self.sites[key].op, self.landings[key].steps, leaf.clone())
            return torch.autograd.grad(made, leaf, value)[0]

    def _landed(self, key: Key) -> Tensor:
        steps = self.landings[key].steps
        return self._held[steps[-1].index if steps else self.sites[key].op.index].result

    def _follow(self, first: Op, steps: Sequence[Op], start: Tensor) -> Tensor:
        """What ``steps`` make of ``start`` in the place of the first operator's result."""
        old = self._held[first.index].result
        for step in steps:
            held = self._held[step.index]
            start, old = held.again(old, start), held.result
        return start

    def _hold(self, op: Op, stop: Key | None) -> Callable[..., None]:
        def look(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            self._held[op.index] = _Held(op.func, args, kwargs, _first(result), _versions(args))
            if stop is not None:
                self._pause(stop)

        return look

    def _stop(self, keys: Sequence[Key]) -> Callable[..., None]:
        def look(args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
            self._end = args
            for key in keys:
                self._pause(key)

        return look

    def _pause(self, key: Key) -> None:
        self._at = key
        assert self._run is not None
        self._run.pause()


class Pair:
    """The pruned model (``small``) and the dense one (``large``) on one batch.

    ``order`` names the sites in the order in which they stop; ``lands`` says which of them do so where they land. Of
    several layers that land on one sum, the last corrects it. A weight that is used more than once is left alone.
    ``origins`` names the dense model's weight where a weight of the other one has another name. ``inner`` are sites
    without such a counterpart that feed one that has: the first of two factors.
    """

    def __init__(
        self,
        small: tuple[nn.Module, Trace],
        large: tuple[nn.Module, Trace],
        inputs: ExampleInputs,
        batch: int,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self.small = Side(small[0], inputs, small[1], batch, chained=True)
        self.large = Side(large[0], inputs, large[1], batch)
        self.large.rename({theirs: mine for mine, theirs in (origins or {}).items()})
        last = {landing.end.index: key for key, landing in self.small.landings.items() if landing.end is not None}
        often = {name for name, use in self.small.sites if use > 0}
        stops: dict[Key, int] = {}
        self.lands: dict[Key, bool] = {}
        for key, site in self.small.sites.items():
            if key not in self.large.sites or key[0] in often:
                continue
            mine, theirs = self.small.landings[key], self.large.landings[key]
            alike = mine.end is not None and theirs.end is not None and mine.adds == theirs.adds
            self.lands[key] = alike and mine.end is not None and last[mine.end.index] == key
            stops[key] = mine.end.index if self.lands[key] and mine.end is not None else site.op.index
        known = set(self.large.sites)
        feeding = {chain.first for second, chain in self.small.chains.items() if second in stops}
        self.inner = {key for key in feeding - known if key[0] not in often}
        for key in self.inner:
            self.lands[key], stops[key] = False, self.small.sites[key].op.index
        self.order = sorted(stops, key=lambda key: stops[key])

    def start(self, lands: Mapping[Key, bool]) -> None:
        """Begin both runs."""
        self.small.start(lands)
        self.large.start({key: there for key, there in lands.items() if key not in self.inner})

    def sides_at(self, key: Key) -> tuple[Side, ...]:
        """The models that have this site."""
        return (self.small,) if key in self.inner else self.sides

    @property
    def sides(self) -> tuple[Side, Side]:
        """Both models."""
        return self.small, self.large


def _first(result: Any) -> Tensor:
    found = result[0] if isinstance(result, tuple | list) else result
    assert isinstance(found, Tensor)
    return found


def _versions(args: tuple[Any, ...]) -> tuple[int, ...]:
    """How often each activation among the arguments was written to (weights are, when they are refitted)."""
    return tuple(a._version for a in args if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a.dim() > 1)
