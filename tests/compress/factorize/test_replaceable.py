"""Layers of every make: what takes their place computes the same at full rank, and what cannot be replaced says why."""

import pytest
import torch
from torch import nn

import compress
import layers
from compress import Budget, Factor, FactorPlan
from compress.factorize.options import METHODS, layers_of
from compress.factorize.replaceable import factorable
from compress.factorize.surgery import factors_of
from compress.gram import GramCollector
from compress.sites import find_sites
from compress.trace import record
from compress.watch import gather
from tests.compress.helpers import assert_same


class Own(nn.Module):
    """A user's convolution."""

    def __init__(self, *shape: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape) / 4), nn.Parameter(torch.zeros(shape[0]))
        self.stride, self.groups = stride, groups

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 1, 1, self.groups)


class Scaled(Own):
    """It does more."""

    def forward(self, x):
        return 2 * super().forward(x)


class Forgetful(Own):
    """Its bias, zero as it happens, is not used."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, None, padding=1)


class Transposed(nn.Module):
    """The matrix is (inputs, outputs), as in GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 4), nn.Parameter(torch.ones(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).reshape(*x.shape[:-1], -1)


class Gain(nn.Linear):
    """A subclass with a parameter more."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.gain


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = layers.ConvBNAct(3, 16, 3)
        self.own, self.strided = Own(16, 16, 3, 3), Own(16, 8, 3, 3, stride=2, groups=2)
        self.checked = layers.Conv2d(16, 16, 3, padding=1)
        self.scaled, self.forgetful = Scaled(16, 16, 3, 3), Forgetful(16, 16, 3, 3)
        self.dense, self.transposed, self.gain = layers.Dense(16, 16), Transposed(16, 12), Gain(12, 12)
        self.up = nn.ConvTranspose2d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.position, self.unread = nn.Parameter(torch.zeros(1, 12)), nn.Linear(3, 3)

    def forward(self, x):
        x = self.strided(self.checked(self.own(self.stem(x))).relu())
        x = self.up(self.forgetful(self.scaled(x)))
        x = self.gain(self.transposed(self.dense(x.flatten(2).mT)).relu()) + self.position
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.fixture
def zoo() -> Zoo:
    torch.manual_seed(0)
    return Zoo().eval()


REPLACEABLE = ("stem.conv", "own", "strided", "checked", "dense.linear", "transposed")


def test_layers_of_every_make_are_replaced_and_the_others_say_why(zoo: Zoo) -> None:
    x = torch.randn(32, 3, 8, 8)
    result = compress.factorize(zoo, x[:2], energy=0.5, calibration=[x], recover=False)
    assert {factor.module for factor in result.plan.factors} == {*REPLACEABLE, "attention"} - {
        name.removesuffix(".weight") for name in result.left
    }
    assert {*REPLACEABLE} <= {factor.module for factor in result.plan.factors}
    for name, reason in {
        "scaled.weight": "the forward of Scaled does more",
        "forgetful.weight": "the forward of Forgetful does more",
        "gain.weight": "a part of Gain beside gain",
        "up.weight": "transposed convolution",
        "position": "add reads it",
        "unread.weight": "is not used",
    }.items():
        assert reason in result.left[name]


@pytest.mark.parametrize("name", REPLACEABLE)
def test_at_full_rank_each_computes_what_it_did(zoo: Zoo, name: str) -> None:
    """By the layer's own weight alone, from the plan as JSON, and multiplied back."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    zoo = zoo.double()
    trace = record(zoo, x, training=False)
    sites, _ = factorable(zoo, trace, find_sites(trace), x)
    (site,) = (s for s in sites if s.parameter == f"{name}.weight")
    (sums,) = gather(zoo, trace, [x], [lambda: GramCollector([site], 1)])
    ((layer,), _) = layers_of(zoo, [site], sums.sums, METHODS)
    rank = site.groups * min(site.num_inputs, site.num_outputs)
    kind, ranks = ("tucker2", (None, rank)) if site.is_convolution else ("linear", (rank,))
    plan = FactorPlan((Factor(name, kind, ranks, "", layer.shape or (), 0.0, layer.settings),))
    made = compress.apply(zoo, FactorPlan.from_json(plan.to_json()))
    assert type(made.get_submodule(name)).__name__.startswith(("Tucker2", "LowRank"))
    assert_same(made, zoo, x, 1e-10)
    assert_same(compress.unfactorize(made), zoo, x, 1e-10)


def test_a_file_with_layers_of_users_loads_into_their_class(zoo: Zoo, tmp_path) -> None:
    x = torch.randn(32, 3, 8, 8)
    result = compress.factorize(zoo, x[:2], budget=Budget(macs=0.6), calibration=[x], recover=False)
    compress.save(result, tmp_path / "small.safetensors")
    assert_same(compress.load(Zoo().eval(), tmp_path / "small.safetensors"), result.model, x, 0.0)


def test_what_a_fused_parent_reads_is_costed_as_it_runs() -> None:
    model = layers.models.digits_cnn().eval()
    images = [torch.rand(64, 1, 8, 8) for _ in range(2)]
    result = compress.factorize(model, images[0][:1], budget=Budget(macs=0.4), calibration=images, recover=False)
    assert 0.38 < result.after.macs / result.before.macs <= 0.4
    assert result.after == compress.measure(result.model, images[0][:1])
    assert result.left == {}


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.multiplied = nn.Conv2d(8, 16, 3, padding=1, groups=8, stride=2)
        self.grouped = nn.Conv2d(16, 12, 3, padding=1, groups=2)
        self.signal = nn.Conv1d(12, 12, 5, padding=2, groups=3)
        self.volume = nn.Conv3d(4, 6, (2, 3, 3), padding=(1, 1, 1))

    def forward(self, x):
        x = self.grouped(self.multiplied(self.depthwise(x)).relu()).relu()
        x = self.signal(x.flatten(2)).unflatten(2, (2, 2, 4))[:, :4]
        return self.volume(x.relu())


def test_groups_and_other_numbers_of_axes_have_the_costs_and_errors_of_the_plan() -> None:
    """Some options of each layer alone: MACs and weights as measured; the error against the layer's own outputs."""
    torch.manual_seed(0)
    model = Grouped().double().eval()
    x = torch.randn(64, 8, 8, 8, dtype=torch.float64).cumsum(2)
    trace = record(model, x, training=False)
    sites, left = factorable(model, trace, find_sites(trace), x)
    assert left == {}
    (grams,) = gather(model, trace, [x], [lambda: GramCollector(sites, 1, row_share=1e9)])
    found, without = layers_of(model, sites, grams.sums, ("tucker2", "svd", "spatial"))
    assert without == {}
    dense = compress.measure(model, x)
    for layer in found:
        entering = _entering(model, layer.name, x)
        module = model.get_submodule(layer.name)
        for option in layer.options[:: max(1, len(layer.options) // 4)]:
            weights = factors_of(layer.problem, layer.factor(option))
            made = compress.apply(model, FactorPlan((layer.factor(option),)))
            cost = compress.measure(made, x)
            assert (cost.macs - dense.macs, cost.params - dense.params) == (
                option.macs - layer.macs,
                option.params - layer.params,
            )
            thin = made.get_submodule(layer.name)
            with torch.no_grad():
                for parameter, weight in zip((p for p in thin.parameters() if p.dim() > 1), weights[0], strict=True):
                    parameter.copy_(weight.reshape(parameter.shape))
                y = module(entering)
                lost = (thin(entering) - y).square().movedim(1, -1).flatten(0, -2).mean(0)
                spread = (y.movedim(1, -1).flatten(0, -2)).var(0, correction=0).sum()
            assert weights[1] == pytest.approx(float(lost.sum() / spread), rel=1e-3, abs=1e-6)
            assert weights[1] <= option.error * (1 + 1e-6) + 1e-9


def _entering(model: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    return seen[0]


class Asking(nn.Module):
    """It asks its layers for their sizes, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.conv, self.head = nn.Embedding(50, 16), nn.Conv1d(16, 16, 3, padding=1), nn.Linear(64, 12)

    def forward(self, tokens):
        x = self.tokens(tokens % self.tokens.num_embeddings) * self.tokens.embedding_dim**0.5
        x = self.conv(x.mT).reshape(len(x), self.conv.out_channels, -1)
        return self.head(x[..., :4].reshape(-1, self.head.in_features)) / self.conv.kernel_size[0]


def test_a_model_that_asks_its_layers_for_sizes_runs_on_and_thin_layers_are_not_factorised_again() -> None:
    torch.manual_seed(0)
    model, tokens = Asking().eval(), torch.randint(0, 50, (64, 6))
    options = {"calibration": [tokens], "recover": False}
    thin = compress.factorize(model, tokens[:1], budget=Budget(params=0.5), **options)
    assert {factor.module for factor in thin.plan.factors} == {"tokens", "conv", "head"}
    assert thin.model(tokens).shape == (64, 12)
    with pytest.raises(compress.PruneError, match="a thin layer already: prune it"):
        compress.factorize(thin.model, tokens[:1], budget=Budget(params=0.9), **options)
    pruned = compress.prune(thin.model, tokens[:1], budget=Budget(params=0.8))
    assert pruned.model(tokens).shape == (64, 12)


class Typed(nn.Module):
    """It reads dtypes and devices off its layers, as the models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 16), nn.Embedding(50, 16)
        self.wide, self.head = nn.Linear(16, 32), nn.Linear(32, 12)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(tokens.to(self.places.weight.device))
        return self.head(self.wide(x).to(self.head.weight.dtype))


def test_layers_that_are_asked_for_their_weight_are_left_and_say_so() -> None:
    torch.manual_seed(0)
    model, tokens = Typed().eval(), torch.randint(0, 50, (64, 6))
    thin = compress.factorize(model, tokens[:1], budget=Budget(params=0.8), calibration=[tokens], recover=False)
    assert {factor.module for factor in thin.plan.factors} <= {"tokens", "wide"}
    assert thin.model(tokens).shape == (64, 6, 12)
    for name in ("places.weight", "head.weight"):
        assert "asks the layer for what a thin one does not have" in thin.left[name]
        assert "no attribute 'weight'" in thin.left[name]
