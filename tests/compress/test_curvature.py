"""What errors of sites cost the outputs, against whole Jacobians and against noise that is really added."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compress
from compress.curvature import LOOKUP, output_curvature, weighed
from compress.gram import GramCollector
from compress.sites import Key, Site, find_sites
from compress.trace import record
from compress.watch import gather


class Functional(nn.Module):
    """Layers as functions, one weight twice, one through a view, one frozen, a branch that the output ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 3, 3, 3))
        self.frozen = nn.Parameter(torch.randn(5, 5, 1, 1), requires_grad=False)
        self.matrix = nn.Parameter(torch.randn(5, 1))
        self.unused = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, stride=2))
        x = torch.tanh(F.conv2d(x, self.frozen))
        x = F.conv2d(x, self.frozen).mean((2, 3))
        self.unused(x)
        return x @ self.matrix


def sites_of(model: nn.Module, x: Tensor) -> list[Site]:
    return find_sites(record(model, x, training=False))


@pytest.fixture
def functional() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Functional().double(), torch.randn(6, 3, 7, 7, dtype=torch.float64)


def by_jacobians(model: nn.Module, x: Tensor) -> dict[Key, Tensor]:
    """Of `Functional`: every site's output is perturbed by itself."""
    assert isinstance(model, Functional)

    def run(x: Tensor, noise: dict[Key, Tensor]) -> tuple[Tensor, dict[Key, Tensor]]:
        made: dict[Key, Tensor] = {}

        def site(key: Key, value: Tensor) -> Tensor:
            made[key] = value
            return value + noise.get(key, 0.0)

        x = F.relu(site(("kernel", 0), F.conv2d(x, model.kernel, stride=2)))
        x = torch.tanh(site(("frozen", 0), F.conv2d(x, model.frozen)))
        x = site(("frozen", 1), F.conv2d(x, model.frozen)).mean((2, 3))
        return site(("matrix", 0), x @ model.matrix), made

    outputs, made = run(x, {})
    spread = (outputs - outputs.mean(0)).square().sum()
    found = {}
    for key, value in made.items():
        jacobian = torch.func.jacrev(lambda e, key=key: run(x, {key: e})[0])(torch.zeros_like(value))
        rows = jacobian.movedim(outputs.dim() + 1, -1).flatten(0, -2).detach()
        found[key] = rows.T @ rows[None] / spread.detach()
    return found


def test_one_number_a_sample_gives_the_matrix_exactly(functional: tuple[nn.Module, Tensor]) -> None:
    model, x = functional
    found = output_curvature(model, [x], sites_of(model, x))
    expected = by_jacobians(model, x)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-6, atol=0)


def test_the_model_is_left_alone(functional: tuple[nn.Module, Tensor]) -> None:
    model, x = functional
    output_curvature(model, [x], sites_of(model, x))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["frozen"]
    assert model.training


def test_noise_costs_what_was_foretold() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    x = torch.randn(256, 3, 8, 8)
    found = output_curvature(model, [*x.split(64)], sites_of(model, x[:1]))
    noise = 0.01 * torch.randn(256, 8, 6, 6) * torch.linspace(0.2, 2, 8)[:, None, None]
    with torch.no_grad():
        before = model(x)
        error = (model[1:](model[0](x) + noise) - before).square().sum() / (before - before.mean(0)).square().sum()
    foretold = (found["0.weight", 0][0].diagonal() * noise.square().mean((0, 2, 3))).sum()
    assert float(foretold) == pytest.approx(float(error), rel=0.1)


def test_outputs_that_autograd_does_not_reach_leave_everything_as_it_was() -> None:
    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    model, x = Detached(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(40, 6)
    trace = record(model, x, training=False)
    (grams,) = gather(model, trace, [x], [lambda: GramCollector(find_sites(trace), 1)])
    found = weighed(grams.sums, output_curvature(model, [x], find_sites(trace)))
    assert all(torch.equal(found[key].output_share, known.output_share) for key, known in grams.sums.items())


def test_a_budget_spares_what_the_outputs_depend_on() -> None:
    """Two branches alike, one of which hardly reaches the output: its layers lose more rank."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.loud(x).tanh() + 0.01 * self.quiet(x).tanh()

    torch.manual_seed(0)
    model, x = Branches(), torch.randn(512, 32)
    result = compress.factorize(model, x[:1], budget=compress.Budget(macs=0.6), calibration=[x], recover=False)
    ranks = {factor.module: factor.ranks[0] for factor in result.plan.factors}
    assert [*ranks] == ["quiet"]
    assert (ranks["quiet"] or 32) <= 4


def test_tables_are_weighed_by_what_follows() -> None:
    """A scalar after each token: e^T w is what an error e does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.Linear(30, 1, bias=False)).double()
    tokens = torch.randint(0, 11, (40, 5))
    found = output_curvature(model, [tokens], [], ["0.weight"])["0.weight", LOOKUP]
    outputs = model(tokens).detach()
    rows = model[2].weight.detach().reshape(5, 6)
    expected = 40 * rows.T @ rows / (outputs - outputs.mean(0)).square().sum()
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)


def test_a_weight_that_is_a_table_and_a_layer_has_both() -> None:
    """Tied weights: the layer's outputs are the model's, the table's errors pass it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.layer.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.table(tokens))

    torch.manual_seed(0)
    model, tokens = Tied().double().eval(), torch.randint(0, 11, (200, 1))
    sites = sites_of(model, tokens)
    found = output_curvature(model, [tokens], sites, ["table.weight"])
    outputs = model(tokens).detach()
    scale = 200 / (outputs - outputs.mean(0)).square().sum()
    weight = model.table.weight.detach()
    torch.testing.assert_close(found[sites[0].key][0].diagonal(), scale.expand(11), rtol=1e-6, atol=0)
    assert found["table.weight", LOOKUP].shape == (1, 6, 6)
    whole = scale * weight.T @ weight
    assert (found["table.weight", LOOKUP][0] - whole).norm() < 0.3 * whole.norm()


def test_models_with_tied_weights_shrink() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.hidden = (
                nn.Embedding(40, 16),
                nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16)),
            )
            self.layer = nn.Linear(16, 40, bias=False)
            self.layer.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.hidden(self.table(tokens)))

    torch.manual_seed(0)
    model = Tagger().eval()
    tokens = [torch.randint(0, 40, (32, 8)) for _ in range(4)]
    result = compress.shrink(model, tokens[0], budget=compress.Budget(macs=0.6), calibration=tokens)
    assert result.after.macs <= 0.6 * result.before.macs
    small = result.model
    assert small.layer.weight is small.table.weight
