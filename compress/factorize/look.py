"""What calibration data tell of what can be factorised, and what that makes of each layer."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from compress.calibration import Calibration, batches, num_batches_of
from compress.curvature import output_curvature, weighed
from compress.factorize.attention import SAMPLES, Attention, MomentsCollector, losses, moments_of
from compress.factorize.decompositions import Problem
from compress.factorize.heads import Heads
from compress.factorize.lookups import TokenCounter
from compress.factorize.means import centred
from compress.factorize.options import Layer, attention_layers, layers_of, table_layers
from compress.factorize.targets import Targets
from compress.gram import GramCollector, Grams, GramSums
from compress.recorder import Trace
from compress.sites import Key
from compress.trace import ExampleInputs
from compress.trial import first_samples
from compress.watch import gather

# Recovery refits later layers to what the dense model gives, and so makes up for a part of what earlier ones lose.
# Found on CIFAR ResNets, among 0, 1, 1.5, 2, 3 and 5, by the outputs on held-out training images.
MADE_UP = 1.0


@dataclass(frozen=True)
class Look:
    """Of one model, at its targets.

    ``grams`` are of the inputs of sites, ``counts`` how often each token was looked up, ``pairs`` what meets in each
    attention, ``curvature`` what errors of tables cost the model's outputs (that of sites is part of ``grams``).
    ``samples`` are a few of the data, where there are attentions. ``competing`` layers share one budget: their errors
    are compared, and those of what a constant makes up for do not count. ``recovered`` if recovery follows: errors of
    layers then count as what is left of them after it, about.
    """

    grams: Mapping[Key, GramSums]
    counts: Mapping[str, Tensor]
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    curvature: Mapping[Key, Tensor]
    samples: ExampleInputs | None
    competing: bool
    recovered: bool

    @staticmethod
    def at(
        model: nn.Module,
        trace: Trace,
        targets: Targets,
        calibration: Calibration,
        *,
        known: Mapping[Key, GramSums] | None = None,
        competing: bool = True,
        recovered: bool = False,
        seed: int = 0,
    ) -> "Look":
        """One pass over the data, and where layers are ``competing`` a part of another one.

        Args:
            known: of these sites there are sums already.
        """
        known = known or {}
        sites = [site for site in targets.every_site if site.key not in known]
        if not (sites or targets.tables or targets.attentions):  # no pass over the data that nobody needs
            return Look(known, {}, {}, {}, None, competing, recovered)
        grams, counts, pairs = gather(
            model,
            trace,
            calibration,
            [
                lambda: GramCollector(sites, num_batches_of(calibration), seed=seed),
                lambda: TokenCounter(list(targets.tables)),
                lambda: MomentsCollector(targets.attentions.values()),
            ],
        )
        assert isinstance(grams, Grams)
        curvature = output_curvature(model, calibration, sites, targets.tables, seed=seed) if competing else {}
        samples = None
        if targets.attentions:
            samples = next(iter(first_samples((inputs for inputs, _ in batches(calibration, model)), SAMPLES)))
        of_tables = {key: matrix for key, matrix in curvature.items() if key[0] in targets.tables}
        return Look(
            {**known, **weighed(grams.sums, curvature)}, counts, pairs, of_tables, samples, competing, recovered
        )

    def layers(
        self,
        model: nn.Module,
        targets: Targets,
        methods: Sequence[str],
        inner_rank: Callable[[Problem], int] | None = None,
        *,
        refined: bool,
    ) -> tuple[list[Layer], dict[str, str]]:
        """What each layer can become, and by parameter why nothing. The last two as in :func:`layers_of`."""
        sites = [site for site in targets.sites if site.key in self.grams]
        known = centred(self.grams) if self.competing else self.grams
        layers, without = layers_of(model, sites, known, methods, inner_rank, refined=refined)
        of_tables, more = table_layers(model, targets.tables, self.counts, self.curvature)
        of_attentions = self._of_attentions(model, targets.attentions)
        found = [*layers, *of_tables, *of_attentions]
        if self.recovered:
            found = left_by_recovery(found, targets.places)
        return found, {**targets.left, **without, **more}

    def scarce(self, chosen: Collection[str]) -> list[str]:
        """A note where the layers that were chosen have seen too few samples."""
        few = [key[0] for key, known in self.grams.items() if known.scarce and key[0].removesuffix(".weight") in chosen]
        if not few:
            return []
        return [f"too few calibration samples for {len(few)} layers ({few[0]} ...): a ridge was used; pass more data"]

    def _of_attentions(self, model: nn.Module, attentions: Mapping[str, Attention]) -> list[Layer]:
        """Those whose heads are as they were when they were looked at."""
        heads = {}
        for name, each in attentions.items():
            layer, known, pair = model.get_submodule(name), self.grams.get(each.site.key), self.pairs.get(name)
            assert isinstance(layer, nn.MultiheadAttention)
            if known is not None and pair is not None and pair[0].shape[:2] == (layer.num_heads, layer.head_dim):
                heads[name] = Heads.of(layer, moments_of(known, pair, each.num_heads))
        if not heads:
            return []
        assert self.samples is not None
        return attention_layers(model, attentions, heads, losses(model, heads, self.samples))


def left_by_recovery(layers: Sequence[Layer], places: Mapping[str, int]) -> list[Layer]:
    """With what errors count: of the first to run e^-MADE_UP of those of the last; ``places`` say by name the order."""
    order = sorted(places.values())
    later = {name: 1 - order.index(place) / max(len(order) - 1, 1) for name, place in places.items()}
    return [replace(layer, counts=math.exp(-MADE_UP * later[layer.name])) for layer in layers]
