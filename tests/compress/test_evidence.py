import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.activations import collect_activations
from compress.evidence import Evidence
from tests.compress.helpers import image, tokens


def test_images_of_several_sizes_count_by_element() -> None:
    """Operators may differ by size; every size is traced once, and means are over all positions."""
    model = nn.Sequential(
        nn.Conv2d(3, 11, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.ReLU(), nn.Conv2d(11, 5, 1)
    )
    batches = [image(2, 3, 9, 7), image(1, 3, 5, 6, seed=1), image(2, 3, 9, 7, seed=2), image(1, 3, 3, 3, seed=3)]
    graph = compress.trace(model, batches[0])
    found = Evidence(model, graph, collect_activations(model, graph, batches)).activation_mean(
        graph.groups[0], "magnitude"
    )
    with torch.no_grad():
        read = torch.cat([model[:4](batch).transpose(0, 1).flatten(1) for batch in batches], 1)
    assert found == pytest.approx(read.abs().mean(1).numpy(), rel=1e-5)


def test_sequences_of_tokens() -> None:
    model = nn.Sequential(nn.Embedding(13, 11), nn.Tanh(), nn.Linear(11, 5))
    batches = [tokens(2, 7), tokens(3, 5, seed=1)]
    graph = compress.trace(model, batches[0])
    found = Evidence(model, graph, collect_activations(model, graph, batches)).activation_mean(
        graph.groups[0], "magnitude"
    )
    with torch.no_grad():
        read = torch.cat([model[:2](batch).flatten(0, 1) for batch in batches])
    assert found == pytest.approx(read.abs().mean(0).numpy(), rel=1e-5)


def test_a_layer_called_twice_is_read_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.head = nn.Linear(3, 11), nn.Linear(11, 11), nn.Linear(11, 5)

        def forward(self, x):
            self.seen = [self.stem(x)]
            for _ in range(2):
                self.seen.append(self.body(self.seen[-1]).relu())
            return self.head(self.seen[-1])

    model, x = Twice(), image(7, 3)
    graph = compress.trace(model, x)
    found = Evidence(model, graph, collect_activations(model, graph, [x])).activation_mean(graph.groups[0], "magnitude")
    with torch.no_grad():
        model(x)
    assert found == pytest.approx(torch.stack([s.abs().mean(0) for s in model.seen]).mean(0).numpy(), rel=1e-5)


def test_statistics_are_of_evaluation_mode() -> None:
    """Dropout would halve them."""
    model = nn.Sequential(nn.Linear(3, 11), nn.Dropout(0.9), nn.Linear(11, 5)).train()
    x = image(7, 3)
    graph = compress.trace(model, x)
    nonzero = Evidence(model, graph, collect_activations(model, graph, [x])).activation_mean(graph.groups[0], "nonzero")
    assert nonzero.tolist() == [1.0] * 11
    assert model.training


def test_another_path_through_the_model_is_an_error() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 11), nn.Linear(11, 5)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x.relu() if float(x.sum()) > 0 else x)

    model = Branches()
    with torch.no_grad():
        model.stem.weight.fill_(1)
        model.stem.bias.zero_()
    graph = compress.trace(model, torch.ones(2, 3))
    with pytest.raises(compress.CalibrationError, match="batch 1 takes another path through the model"):
        collect_activations(model, graph, [torch.ones(2, 3), -torch.ones(2, 3)])


def test_weights_of_groups_without_matrices() -> None:
    """A group that only raw vectors make is judged by those."""

    class Vectors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(11)), nn.Parameter(torch.randn(11))

        def forward(self, x):
            return x + (self.a * self.b).sum()

    graph = compress.trace(Vectors(), image(3))
    for group in graph.groups:
        assert np.isfinite(Evidence(Vectors(), graph).weight_mean(group, 2)).all()


def test_activations_that_were_not_collected() -> None:
    model = nn.Sequential(nn.Linear(3, 11), nn.Linear(11, 5))
    graph = compress.trace(model, image(7, 3))
    with pytest.raises(compress.PruneError, match="holds no activations"):
        Evidence(model, graph).activation_mean(graph.groups[0], "nonzero")


def _magnitudes(model: nn.Module, batches) -> list[np.ndarray]:
    graph = compress.trace(model, batches[0])
    evidence = Evidence(model, graph, collect_activations(model, graph, batches))
    return [evidence.activation_mean(group, "magnitude") for group in graph.groups]


@pytest.mark.parametrize("inplace", [True, False])
def test_what_is_known_to_be_positive_is_forgotten_when_it_is_written_to(inplace: bool) -> None:
    """Reads of the same values share their sums, which need no absolute values after a ReLU: both until a write."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.c = (nn.Conv2d(*n, 1) for n in ((3, 11), (11, 5), (11, 5), (11, 5)))

        def forward(self, x):
            x = nn.functional.relu(self.stem(x), inplace=inplace)
            y = self.a(x) + self.b(x)
            self.first = x.clone()
            x.view(-1).sub_(0.5)  # through a view, and of the same storage
            self.second = x
            return y + self.c(x)

    model, x = Shifted(), image(5, 3, 8, 8)
    (found,) = _magnitudes(model, [x])
    with torch.no_grad():
        model(x)
    first, second = (t.abs().mean((0, 2, 3)) for t in (model.first, model.second))
    assert found == pytest.approx(((2 * first + second) / 3).numpy(), rel=1e-5)
    assert (model.second < 0).any()


def test_a_part_of_a_tensor_that_was_rectified_is_not_the_whole() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(3, 16), nn.Linear(16, 5)

        def forward(self, x):
            self.seen = self.stem(x)
            self.seen[:2].relu_()
            return self.head(self.seen)

    model, x = Half(), image(7, 3)
    (found,) = _magnitudes(model, [x])
    with torch.no_grad():
        model(x)
    assert found == pytest.approx(model.seen.abs().mean(0).numpy(), rel=1e-5)


def test_batches_of_other_sizes_than_the_example() -> None:
    """A batch of one may run other operators; the statistics are those of all images together."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 11), nn.Tanh(), nn.Unflatten(1, (1, 11)), nn.Linear(11, 5))
    data = [image(1, 2, 3, seed=n) for n in range(5)]
    for example in (data[0], torch.cat(data)):
        graph = compress.trace(model, example)
        for calibration in (data, [torch.cat(data)], [torch.cat(data[:2]), *data[2:]]):
            evidence = Evidence(model, graph, collect_activations(model, graph, calibration))
            with torch.no_grad():
                expected = model[:3](torch.cat(data)).abs().mean(0).numpy()
            assert evidence.activation_mean(graph.groups[0], "magnitude") == pytest.approx(expected, rel=1e-5)


def test_endless_values_are_named_by_layer_and_batch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 11, 1), nn.ReLU(), nn.Conv2d(11, 7, 1), nn.ReLU(), nn.Conv2d(7, 5, 1))
    graph = compress.trace(model, image())
    broken = image()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(compress.CalibrationError, match="that enter '2' are not finite in calibration batch 1"):
        collect_activations(model, graph, [image(), broken])


def test_values_whose_sum_is_too_large_for_single_precision_are_finite() -> None:
    model = nn.Sequential(nn.Linear(3, 11), nn.Linear(11, 5))
    with torch.no_grad():
        model[0].weight.fill_(0)
        model[0].bias.fill_(2e38)
    assert _magnitudes(model, [image(16, 3)])[0] == pytest.approx(2e38)
