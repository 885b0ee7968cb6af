"""Where the labels of a split axis go: reconsider what turned out badly.

Splitting C -> (heads, head size) could keep labels on either axis. The larger one is tried first. Where its channels
turn out frozen, mixed, or contracted between two activations (queries and keys over the head size, with a scale that
depends on it), removing whole heads is the better choice, and exact.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from compress.labels import FIXED, Array, Labels, Mark, Split
from compress.solve import components

Place = tuple[str, int, tuple[int, ...]]


def revised(labels: Labels) -> Mapping[Place, int]:
    """Other choices for the splits that are worth one; empty when all is well, or was tried already."""
    open_places = [split for split in labels.splits if split.place not in labels.decisions and len(split.choices) > 1]
    if not open_places:
        return {}
    component = components(labels)
    bad = np.zeros(int(component.max()) + 1, dtype=bool)
    for marked in (*_labels(labels.frozen), *_labels(labels.mixed), *labels.contracted):
        bad[component[marked[marked != FIXED]]] = True
    decisions: dict[Place, int] = {}
    for split in open_places:
        live = split.labels[split.labels != FIXED]
        if len(live) and bad[component[live]].all() and not _split_again(split, labels.splits):
            others = [axis for axis in split.choices if axis != split.chosen]
            other = max(others, key=lambda axis: split.place[2][axis])
            decisions.update(_alike(split, other, open_places))
    return decisions


def _alike(split: Split, other: int, splits: Sequence[Split]) -> dict[Place, int]:
    """The same turn for all splits of the module into these two lengths: 2 E -> (2, H, D), E -> (H, D) meet later."""
    module, _, lengths = split.place
    turned = {split.place: other}
    for candidate in splits:
        theirs = candidate.place[2]
        if candidate.place[0] == module and theirs[candidate.chosen] == lengths[split.chosen]:
            axes = [axis for axis in candidate.choices if theirs[axis] == lengths[other] and axis != candidate.chosen]
            if axes:
                turned.setdefault(candidate.place, axes[-1])
    return turned


def _labels(marks: list[Mark]) -> list[Array]:
    return [mark.labels for mark in marks]


def _split_again(split: Split, splits: list[Split]) -> bool:
    """Of a chain of splits (3 E -> (3, E) -> (heads, size)) only the last decides."""
    return any(
        other is not split and len(other.merged) == len(split.labels) and (other.merged == split.labels).all()
        for other in splits
    )
