import numpy as np
import pytest
import torch
from torch import nn

import compress
from tests.compress.helpers import Apply, assert_exact, assert_trains, frozen_reasons, image


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11)
        self.body = nn.Conv2d(11, 7, 3)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x)).relu()).mean((2, 3)))


def test_groups_are_named_and_list_all_that_goes() -> None:
    first, second = compress.trace(Net(), image()).groups
    assert (first.name, first.num_units, first.exact, first.inexact) == ("stem.weight", 11, True, "")
    assert {(m.parameter, m.axis): m.role for m in first.members} == {
        ("stem.weight", 0): "producer", ("stem.bias", 0): "carrier", ("norm.weight", 0): "carrier",
        ("norm.bias", 0): "carrier", ("norm.running_mean", 0): "carrier", ("norm.running_var", 0): "carrier",
        ("body.weight", 1): "consumer"}  # fmt: skip
    assert [m.indices.tolist() for m in second.members] == [[[u] for u in range(7)]] * 3


def test_inputs_and_outputs_are_frozen_and_say_so() -> None:
    graph = compress.trace(Net(), image())
    assert "output of the model" in frozen_reasons(graph, "head.weight")
    assert "fixed length" in frozen_reasons(graph, "stem.weight", 1)
    assert not any("kernel" in axis.reason for axis in graph.frozen), (
        "a kernel is no channel that a user would look for"
    )
    assert str(graph.frozen[0]) == f"{graph.frozen[0].parameter} axis {graph.frozen[0].axis}: {graph.frozen[0].reason}"


def test_the_graph_prints_as_a_table() -> None:
    text = str(compress.trace(Net(), image()))
    for part in ("stem.weight", "11", "exact", "head.weight [0]", "output of the model"):
        assert part in text


def test_a_part_of_an_axis_can_be_frozen() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 11), nn.Linear(7, 5)

        def forward(self, x):
            x = self.stem(x)
            return x[..., :4], self.head(x[..., 4:])

    graph = compress.trace(Partly(), image(7, 3))
    (axis,) = (f for f in graph.frozen if (f.parameter, f.axis) == ("stem.weight", 0))
    assert (axis.num_elements, axis.size) == (4, 11)
    assert "(4 of 11)" in str(axis)
    assert graph.groups[0].num_units == 7
    assert_exact(Partly(), image(7, 3))


def test_a_parameter_that_nothing_uses_is_frozen() -> None:
    model = Net()
    model.unused = nn.Parameter(torch.zeros(11))
    assert "no operator uses unused" in frozen_reasons(compress.trace(model, image()), "unused")
    assert_exact(model, image())


@pytest.mark.parametrize("pattern", ["stem.weight", "stem", "st*", "norm.running_mean", "*.bias"])
def test_protected_parameters_stay_whole(pattern: str) -> None:
    graph = compress.trace(Net(), image()).protecting([pattern])
    assert "stem.weight" not in [group.name for group in graph.groups]
    assert "protected by" in frozen_reasons(graph, "stem.weight")


def test_an_unknown_pattern_is_an_error_that_shows_a_name() -> None:
    with pytest.raises(compress.PruneError, match=r"protect='steem\.\*' matches no parameter; names look like 'body"):
        compress.trace(Net(), image()).protecting(["steem.*"])


def test_without_freezes_whole_groups() -> None:
    graph = compress.trace(Net(), image())
    less = graph.without([graph.groups[0]], "a test")
    assert [group.name for group in less.groups] == ["body.weight"]
    assert frozen_reasons(less, "stem.weight") == "a test"
    assert len(graph.groups) == 2, "the graph itself stays"


def test_unit_means_average_over_what_is_known() -> None:
    graph = compress.trace(Net(), image())
    (group, _) = graph.groups
    totals, counts = np.zeros(graph.labels.num_labels), np.zeros(graph.labels.num_labels, dtype=np.int64)
    axes = {(a.parameter, a.axis): a for a in graph.labels.axes}
    a, b = axes[("stem.weight", 0)].start, axes[("body.weight", 1)].start
    totals[a : a + 10], counts[a : a + 10] = np.arange(10), 1
    totals[b : b + 5], counts[b : b + 5] = 100, 2
    means = graph.unit_means(group, totals, counts)
    assert means[:5].tolist() == [(100 + u) / 3 for u in range(5)]
    assert means[5:10].tolist() == [5, 6, 7, 8, 9]
    assert np.isnan(means[10])


def test_channels_that_go_together_over_axes_of_different_length() -> None:
    """A unit of the first layer is 35 columns of the linear layer."""
    model = nn.Sequential(nn.Conv2d(3, 11, 3), Apply(lambda _, x: x.flatten(1)), nn.Linear(11 * 35, 5))
    (group,) = compress.trace(model, image()).groups
    (consumer,) = (m for m in group.members if m.role == "consumer")
    assert consumer.indices.shape == (11, 35)
    assert np.array_equal(consumer.indices, np.arange(11 * 35).reshape(11, 35))


def _weight_normed(norm) -> nn.Module:
    """The middle one of three convolutions under weight norm: each of its filters is scaled to a length of its own."""
    model = nn.Sequential()
    model.add_module("before", nn.Conv2d(3, 13, 1))
    model.add_module("normed", norm(nn.Conv2d(13, 11, 3)))
    model.add_module("after", nn.Conv2d(11, 5, 1))
    with torch.no_grad():
        model(image())  # the old form keeps the computed weight; the tests' own copies refuse one with a graph
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weights_that_are_computed_from_others(norm) -> None:
    """Filters go exactly, with their lengths; inputs of a filter do not: its length is taken over them."""
    exact = {group.num_units: group.exact for group in compress.trace(_weight_normed(norm), image()).groups}
    assert exact == {13: False, 11: True}
    result = assert_exact(_weight_normed(norm), image(), compress.Budget(channels=0.6), exact_only=True)
    assert result.model.after.in_channels < 11
    assert result.model.before.out_channels == 13
    both = compress.prune(_weight_normed(norm), image(), budget=compress.Budget(channels=0.6))
    assert both.model.before.out_channels < 13
    assert_trains(both.model, image())
    assert both.model(image()).shape == (2, 5, 7, 5)


def test_spectral_norm_is_not_exact() -> None:
    """The weight is divided by its largest singular value, which all rows and columns share."""
    model = nn.Sequential(nn.Linear(3, 13), nn.ReLU(), nn.Linear(13, 11), nn.ReLU(), nn.Linear(11, 5))
    nn.utils.parametrizations.spectral_norm(model[2])
    assert not any(group.exact for group in compress.trace(model, image(7, 3)).groups)
    result = compress.prune(model, image(7, 3), budget=compress.Budget(channels=0.8))
    assert result.after.params < result.before.params
    assert_trains(result.model, image(7, 3))


def test_groups_come_in_the_order_of_the_parameters_and_the_same_every_time() -> None:
    names = [[group.name for group in compress.trace(Net(), image()).groups] for _ in range(3)]
    assert names == [["stem.weight", "body.weight"]] * 3
