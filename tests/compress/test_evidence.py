import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.evidence import Evidence, collect_activations
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
