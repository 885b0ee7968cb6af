import random

import numpy as np
import pytest
import torch
from torch import nn

from compress.labels import FIXED, Labels, Mark
from compress.recorder import TensorRef
from compress.rules import propagate
from compress.solve import components, solve
from compress.trace import record
from tests.compress.helpers import image
from tests.compress.random_networks import RandomNetwork


def _labels(*shapes: tuple[int, ...]) -> tuple[Labels, list[TensorRef]]:
    refs = [TensorRef(i, shape, torch.float32) for i, shape in enumerate(shapes)]
    return Labels([(f"p{ref.id}", ref) for ref in refs]), refs


def _by_union_find(labels: Labels) -> list[set[int]]:
    parent = list(range(labels.num_labels))

    def root(label: int) -> int:
        while parent[label] != label:
            label = parent[label]
        return label

    for left, right in labels.links:
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            parent[root(a)] = root(b)
    sets: dict[int, set[int]] = {}
    for label in range(labels.num_labels):
        sets.setdefault(root(label), set()).add(label)
    return sorted(sets.values(), key=min)


@pytest.mark.parametrize("seed", range(15))
def test_components_are_those_of_union_find(seed: int) -> None:
    labels = propagate(record(RandomNetwork(seed), image(2, 3, 11, 9)))
    found: dict[int, set[int]] = {}
    for label, component in enumerate(components(labels).tolist()):
        found.setdefault(component, set()).add(label)
    assert sorted(found.values(), key=min) == _by_union_find(labels)


@pytest.mark.parametrize("seed", range(15))
def test_lengths_are_linear_in_what_is_kept(seed: int) -> None:
    """Take any units away: the elements left on every parameter axis are as many as the matrix says."""
    trace = record(RandomNetwork(seed), image(2, 3, 11, 9))
    labels = propagate(trace)
    solution = solve(labels, trace.stored)
    draw = random.Random(seed)
    kept = np.array([draw.randint(0, int(n)) for n in solution.sizes], dtype=np.int64)
    group, position = solution.group[solution.component], solution.position[solution.component]
    for axis in labels.axes:
        array = np.arange(axis.start, axis.start + axis.size)
        stays = (group[array] < 0) | (position[array] < kept[group[array]])
        row = solution.lengths.row(array)
        assert solution.lengths.fixed[row] + solution.lengths.matrix[[row]] @ kept == stays.sum()


@pytest.mark.parametrize("seed", range(15))
def test_units_of_a_group_are_alike(seed: int) -> None:
    trace = record(RandomNetwork(seed), image(2, 3, 11, 9))
    labels = propagate(trace)
    solution = solve(labels, trace.stored)
    for axis in labels.axes:
        component = solution.component[axis.start : axis.start + axis.size]
        for g in range(len(solution.sizes)):
            positions = solution.position[component[solution.group[component] == g]]
            assert len(positions) == 0 or (np.bincount(positions) == len(positions) // solution.sizes[g]).all()
    assert {g for lump in solution.lumps for g in lump.units} == set(range(len(solution.sizes)))


def test_what_is_linked_to_a_frozen_element_is_frozen() -> None:
    labels, (a, b) = _labels((5,), (5,))
    labels.link(labels[a][0], labels[b][0], "test")
    labels.freeze(labels[b][0][:2], "a reason")
    solution = solve(labels, {})
    assert solution.sizes.tolist() == [3]
    frozen = solution.component[labels[a][0][:2]]
    assert [solution.reason[c].why for c in frozen.tolist()] == ["a reason"] * 2


def test_a_fixed_element_freezes_its_partner_and_no_other() -> None:
    labels, (a,) = _labels((5,))
    labels.link(labels[a][0], np.array([FIXED, FIXED, *labels.fresh(3)]), "pad")
    assert solve(labels, {}).sizes.tolist() == [3]
    assert labels.frozen[0].why == "pad: meets an axis of fixed length"


def test_an_axis_of_length_one_broadcasts() -> None:
    labels, (a, b) = _labels((5,), (1,))
    labels.link(labels[b][0], labels[a][0][:1], "test")
    assert labels.links == []
    assert labels[b][0].tolist() == [FIXED]


def test_labels_that_do_not_fit_are_an_error_of_the_rule() -> None:
    labels, (a,) = _labels((5, 3))
    with pytest.raises(ValueError, match=r"labels of lengths \[5\] for a tensor of shape \(5, 3\)"):
        labels.set(a, [labels.fixed(5)])


def test_an_in_place_result_is_linked_to_what_was_there() -> None:
    labels, (a, b) = _labels((5,), (5,))
    labels.set(a, labels[b])
    assert solve(labels, {}).sizes.tolist() == [5]


def test_extra_marks_freeze_too() -> None:
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 5))
    trace = record(model, image(2, 3))
    labels = propagate(trace)
    (axis,) = (a for a in labels.axes if (a.parameter, a.axis) == ("0.weight", 0))
    marked = solve(labels, trace.stored, [Mark(np.array([axis.start]), "protected")])
    assert marked.sizes.tolist() == [6]
