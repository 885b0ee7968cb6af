"""The least-squares error that removing a channel leaves in its consumers, by greedy elimination."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.channels import ChannelGroup
from compress.errors import PruneError
from compress.evidence import Evidence
from compress.gram import GramSums
from compress.labels import Array
from compress.plan import make_plan
from compress.removal import Removal, Values, by_score
from compress.surgery import masked

RIDGE = 1e-4  # of the mean square of an input: channels that copy each other must not make the matrix singular
STEPS = 128  # of the elimination of one group, about: each costs the square of the number of inputs
TRIED = 4  # the model is tried with a quarter of a group's channels gone
# Recovery refits a layer together with the one that feeds it, and later layers make up for what a block gives; nothing
# does that for channels that several layers write, such as a residual stream's. So what these lose counts twice:
# 1 and 2 were compared on CIFAR ResNets by its outputs on held-out training images.
SHARED = 2.0


def reconstruction(group: ChannelGroup, evidence: Evidence) -> Removal:
    """The channels in the order in which they can be spared, and the error of the model's output that this leaves.

    The next channel to go is the one that the remaining ones can best stand in for where it is read, after a
    least-squares refit of what reads it: with weights w and inputs of second moment H, removal of the columns c costs
    ``w_c ((H^-1)_cc)^-1 w_c^T`` (optimal brain surgeon, Hassibi & Stork 1992, equation 5; for blocks and layer by
    layer, Frantar & Alistarh 2022, arXiv 2208.11580, section 4). Errors are counted by what they cost the model's
    outputs to first order (see :mod:`compress.curvature`), and summed over consumers. One run of the model with a
    quarter of the channels gone tells what such an error really costs there, so that losses of different groups can be
    compared.
    """
    if evidence.grams is None:
        raise PruneError("this evidence holds no Gram matrices: declare `needs = {'grams'}` on the criterion")
    places = [place for sums in evidence.grams.sums.values() for place in _places(group, evidence, sums)]
    tried = max(group.num_units // TRIED, 1)
    if places:
        removal, matrices = eliminate([place.reader for place in places], group.num_units, tried)
    else:  # nothing that is linear reads it: it is judged by its weights, and by what the model does without it
        removal, matrices = by_score(group, evidence.weight_mean(group, 2)), []
    if evidence.trial is None:
        return removal
    plan = make_plan(evidence.graph, {group.index: removal.order[:tried]}, {})
    with masked(evidence.model, plan), _refitted(evidence, places, matrices):
        error = evidence.trial.error(evidence.model)
    scale = error / removal.losses[tried] if removal.losses[tried] > 0 and np.isfinite(error) else 1.0
    scale *= SHARED if sum(member.role == "producer" for member in group.members) > 1 else 1.0
    return Removal(removal.order, removal.losses * scale)


reconstruction.needs = frozenset({"grams"})  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Reader:
    """One group of one site that reads a channel group: a regression of O outputs on D inputs, and a constant if free.

    ``gram`` (D + 1, D + 1) holds second moments, ``matrix`` (O, D + 1) the weights, ``columns`` (units, k) the inputs
    that go with each unit, ``weight`` (O,) what a squared error of each output counts; ``own`` (units, O) says which
    outputs go with the unit, so that their errors do not count.
    """

    gram: Tensor
    matrix: Tensor
    columns: Tensor
    weight: Tensor
    own: Tensor
    free: bool


def eliminate(readers: Sequence[Reader], num_units: int, tried: int = 0) -> tuple[Removal, list[Tensor]]:
    """Take out unit after unit, always the one whose removal costs least after the readers' best refit.

    Of groups with many units several go in one step: they share its loss.

    Returns the removal, and each reader's refitted matrix when ``tried`` units are gone.
    """
    states = [_State(reader) for reader in readers]
    order, losses, matrices = list[int](), [0.0], list[Tensor]()
    alive = np.arange(num_units)
    while len(alive):
        errors = np.sum([state.errors(alive) for state in states], axis=0)
        number = min(max(num_units // STEPS, 1), len(alive), tried - len(order) if len(order) < tried else len(alive))
        best = np.argsort(errors, kind="stable")[:number]
        chosen = alive[best]
        loss = sum(state.remove(chosen) for state in states)
        losses += (losses[-1] + max(loss, 0.0) * np.arange(1, number + 1) / number).tolist()
        order += chosen.tolist()
        alive = np.delete(alive, best)
        if len(order) == tried:
            matrices = [state.refitted() for state in states]
    return Removal(np.array(order), np.array(losses)), matrices


class _State:
    """A regression from which inputs are taken one block after another; its inverse is downdated, never solved anew."""

    def __init__(self, reader: Reader) -> None:
        level = RIDGE * reader.gram.diagonal()[:-1].mean().clamp(min=1e-10)
        damping = torch.full((len(reader.gram),), float(level), dtype=torch.float64)
        damping[-1] = 0 if reader.free else float(reader.gram[-1, -1]) * 1e12
        self._inverse = torch.linalg.inv(reader.gram + torch.diag(damping))
        self._root = reader.weight.sqrt()[:, None]
        self._reader = reader
        self._matrix = reader.matrix.clone()

    def errors(self, units: Array) -> Values:
        """What the removal of each of ``units`` adds to the error, shape (units,)."""
        columns = self._reader.columns[units]
        inner = self._inverse[columns[:, :, None], columns[:, None, :]]
        mine = (self._root * self._matrix)[:, columns].movedim(1, 0)  # (units, O, k)
        error = (mine * torch.linalg.solve(inner, mine.mT).mT).sum(2)
        return error.masked_fill(self._reader.own[units], 0).sum(1).numpy()

    def remove(self, units: Array) -> float:
        """Take out some units together, and say what that adds to the error."""
        columns = self._reader.columns[units].flatten()
        side, mine = self._inverse[:, columns], self._matrix[:, columns]
        step = torch.linalg.solve(side[columns], side.T)
        own = self._reader.own[units].any(0)
        loss = (self._root * mine * torch.linalg.solve(side[columns], mine.T).T * self._root).sum(1)
        self._matrix -= mine @ step
        self._inverse -= side @ step
        self._matrix[own] = 0
        self._matrix[:, columns] = 0
        self._inverse[:, columns] = 0
        self._inverse[columns] = 0
        return float(loss[~own].sum())

    def refitted(self) -> Tensor:
        return self._matrix.clone()


@dataclass(frozen=True)
class _Place:
    """Where a reader is: a group of a site."""

    reader: Reader
    sums: GramSums
    part: int


def _places(group: ChannelGroup, evidence: Evidence, sums: GramSums) -> list[_Place]:
    graph, site = evidence.graph, sums.site
    groups, units = graph.units(site.columns(graph.labels))
    made, makers = graph.units(site.results(graph.labels))
    matrix = site.matrix(evidence.tensor(site.parameter)).double().cpu()
    places = []
    for part in range(site.groups):
        mine = np.flatnonzero(groups[part] == group.index)
        if not len(mine):
            continue
        present, number = np.unique(units[part][mine], return_counts=True)
        if len(present) < group.num_units or number.min() != number.max():
            continue  # a grouped convolution that loses whole groups: nothing of its outputs stays
        columns = mine[np.argsort(units[part][mine], kind="stable")].reshape(group.num_units, -1)
        own = (made[part] == group.index) & (makers[part] == np.arange(group.num_units)[:, None])
        constant = matrix.new_zeros(site.num_outputs, 1)
        reader = Reader(
            gram=sums.mean[part],
            matrix=torch.cat([matrix[part], constant], dim=1),
            columns=torch.from_numpy(columns),
            weight=sums.output_share[part],
            own=torch.from_numpy(own),
            free=sums.landing.intercept is not None,
        )
        places.append(_Place(reader, sums, part))
    return places


@contextmanager
def _refitted(evidence: Evidence, places: Sequence[_Place], matrices: Sequence[Tensor]) -> Iterator[None]:
    """The model with refitted readers, for the time of the block."""
    undo: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for place, fitted in zip(places, matrices, strict=True):
            site, intercept = place.sums.site, place.sums.landing.intercept
            weight = evidence.tensor(site.parameter)
            undo.append((weight, weight.clone()))
            whole = site.matrix(weight).clone()
            whole[place.part] = fitted[:, :-1].to(whole)
            site.write(weight, whole)
            if intercept is not None:
                shift = evidence.tensor(intercept[0])
                undo.append((shift, shift.clone()))
                outputs = slice(place.part * site.num_outputs, (place.part + 1) * site.num_outputs)
                shift.view(-1)[outputs].add_(fitted[:, -1].to(shift), alpha=intercept[1])
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, values in reversed(undo):
                tensor.copy_(values)
