"""The public function: budgets, exactness, what is left alone, plans and files, recovery."""

import math

import pytest
import torch
from torch import nn

import compress
from compress import Budget, BudgetError, CalibrationError, FactorPlan, PruneError
from compress.factorize import options
from layers.low_rank import LowRankLinear
from layers.low_rank_conv import SpatialConv, Tucker2Conv
from tests.compress.helpers import assert_same

METHODS = options.METHODS


class Net(nn.Module):
    """A residual network with every kind of layer that can be factorised."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.inner = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.outer = nn.Conv2d(2 * channels, 2 * channels, (3, 5), padding=(1, 2), dilation=1)
        self.short = nn.Conv2d(channels, 2 * channels, 1, stride=2)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.signal = nn.Conv1d(2 * channels, channels, 3, padding="same")
        self.wide, self.head = nn.Linear(channels, 40), nn.Linear(40, 10)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.outer(self.inner(x).relu()) + self.short(x)).relu()
        x = self.depthwise(x)
        x = self.signal(x.flatten(2)).relu()
        return self.head(self.wide(x.mean(2)).relu())


def images(number: int = 4, size: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Smooth ones: neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(number, size, 3, 4, 4, generator=generator, dtype=dtype)
    return [nn.functional.interpolate(batch, size=(10, 9), mode="bilinear") for batch in small]


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.8, 0.5])
def test_the_budget_is_met_as_measured_and_the_model_stays(net: Net, metric: str, fraction: float) -> None:
    batches = images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    budget = Budget(**{metric: fraction})
    result = compress.factorize(net, batches[0][:2], budget=budget, calibration=batches, recover=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert result.after == compress.measure(result.model, batches[0][:2])
    kept = getattr(result.after, metric) / getattr(result.before, metric)
    assert fraction - 0.02 < kept <= fraction
    assert result.model(batches[0]).shape == (32, 10)
    assert result.left == {}
    assert result.latency is not None
    assert "latency" in result.summary()


@pytest.mark.parametrize("method", METHODS)
def test_costs_of_all_options_are_those_measured_and_full_ranks_change_nothing(net: Net, method: str) -> None:
    """Each layer by itself, at several ranks: the price that the budget was spent by is what the new model costs."""
    net = net.double()
    batch = images(1, dtype=torch.float64)[0]
    dense = compress.measure(net, batch)
    shapes = {name: tuple(module.weight.shape) for name, module in net.named_modules() if hasattr(module, "weight")}
    for name, shape in shapes.items():
        for factor, exact in _factors(name, shape, method):
            made = compress.apply(net, FactorPlan((factor,)))
            cost = compress.measure(made, batch)
            price = _price(net, name, batch)
            before = price.macs, price.params
            after = price.tucker2(*((None, factor.ranks[0]) if len(factor.ranks) == 1 else factor.ranks))
            if factor.kind == "spatial":
                after = price.spatial(factor.ranks[0], ("vertical", "horizontal").index(factor.first))
            assert (cost.macs - dense.macs, cost.params - dense.params) == (after[0] - before[0], after[1] - before[1])
            if exact:
                assert_same(made, net, batch, 1e-9)
                assert_same(compress.unfactorize(made), net, batch, 1e-9)


def _price(net: Net, name: str, batch: torch.Tensor):
    from compress.sites import find_sites
    from compress.trace import record

    site = next(s for s in find_sites(record(net, batch, training=False)) if s.parameter == f"{name}.weight")
    return options._Price(site)


def _factors(name: str, shape: tuple[int, ...], method: str):
    """(factor, whether it is exact)."""
    kernel = math.prod(shape[2:])
    if name in ("depthwise", "norm") or (method == "svd") != (kernel == 1):
        return
    full = min(shape[0], math.prod(shape[1:]))
    if method == "svd":
        kind = "linear" if len(shape) == 2 else "tucker2"
        for rank in (2, full):
            yield (
                compress.Factor(name, kind, (rank,) if len(shape) == 2 else (None, rank), "", shape, 0.0),
                rank == full,
            )
    elif method == "tucker2":
        inner = min(shape[1], shape[0] * kernel)
        for ranks in ((2, None), (None, 3), (2, 3), (inner, None), (None, full), (inner, full)):
            exact = ranks[0] in (None, inner) and ranks[1] in (None, full)
            yield compress.Factor(name, "tucker2", ranks, "", shape, 0.0), exact
    elif len(shape) == 4:
        for axis, first in enumerate(("vertical", "horizontal")):
            most = min(shape[1] * shape[2 + axis], shape[0] * shape[3 - axis])
            for rank in (2, most):
                yield compress.Factor(name, "spatial", (rank,), first, shape, 0.0), rank == most


def test_what_is_lost_is_what_the_plan_says() -> None:
    """One dense layer: the error of the plan, in parts of the outputs' variance, against the outputs themselves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=False).double())
    x = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    result = compress.factorize(model, x[:1], budget=Budget(macs=0.6), calibration=[x], recover=False)
    (factor,) = result.plan.factors
    with torch.no_grad():
        y, z = model(x), result.model(x)
    lost = float((y - z).square().sum() / (y - y.mean(0)).square().sum())
    assert factor.error == pytest.approx(lost, rel=0.1)  # random signs tell what errors cost
    assert isinstance(result.model[0], LowRankLinear)


def test_recovery_lowers_the_error_on_images_that_were_not_seen(net: Net) -> None:
    batches, fresh = images(6, 64), images(1, 256, seed=7)[0]
    errors = []
    for recover in (False, True):
        result = compress.factorize(
            net,
            batches[0][:1],
            budget=Budget(macs=0.45),
            calibration=batches,
            recover=recover,
            protect=("depthwise",),
        )
        with torch.no_grad():
            errors.append(float((result.model(fresh) - net(fresh)).square().mean()))
    assert errors[1] < 0.95 * errors[0]
    assert result.recovery is not None
    assert {f.module + "." + f.last for f in result.plan.factors} <= {layer.name for layer in result.recovery.layers}


def test_a_file_loads_into_a_fresh_instance_of_the_class(net: Net, tmp_path) -> None:
    batches = images()
    result = compress.factorize(net, batches[0][:1], budget=Budget(macs=0.5), calibration=batches)
    assert FactorPlan.from_json(result.plan.to_json()) == result.plan
    path = tmp_path / "small.safetensors"
    compress.save(result, path)
    loaded = compress.load(Net().eval(), path)
    assert_same(loaded, result.model, batches[0], 0.0)
    kinds = [type(result.model.get_submodule(factor.module)) for factor in result.plan.factors]
    assert set(kinds) <= {LowRankLinear, SpatialConv, Tucker2Conv}
    back = compress.unfactorize(loaded)
    assert back.state_dict().keys() == net.state_dict().keys()
    assert_same(back, loaded, batches[0], 1e-4)
    with pytest.raises(compress.ArtifactError, match="does not fit"):
        compress.load(Net(16), path)


def test_weights_that_cannot_be_replaced_are_left_with_a_reason() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.tied, self.tie = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.tie.weight = self.tied.weight
            self.circular = nn.Conv1d(1, 16, 9, padding=4, padding_mode="circular")
            self.hooked, self.plain, self.functional = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.hooked.register_forward_hook(lambda module, args, output: output * 2)

        def forward(self, x):
            x = self.circular(x[:, None]).mean(2)
            x = self.tie(self.tied(self.twice(self.twice(x)).relu()).relu())
            x = self.plain(self.hooked(x))
            return nn.functional.linear(x, self.functional.weight)

    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    result = compress.factorize(Twice(), x, budget=Budget(params=0.95), calibration=[x], recover=False)
    assert [factor.module for factor in result.plan.factors] == ["plain"]
    reasons = {name.removesuffix(".weight"): reason for name, reason in result.left.items()}
    assert "more than once" in reasons["twice"]
    assert "more than once" in reasons["tied"]
    assert "padding_mode" in reasons["circular"]
    assert "hooks" in reasons["hooked"]
    assert "the model itself reads its weight" in reasons["functional"]


def test_energy_is_kept_by_each_layer_alone(net: Net) -> None:
    batches = images()
    small, large = (
        compress.factorize(net, batches[0][:1], energy=energy, calibration=batches, recover=False)
        for energy in (0.8, 0.999)
    )
    assert small.after.macs < large.after.macs <= large.before.macs
    assert len(small.plan.factors) >= len(large.plan.factors)


def test_protected_and_unasked_layers_stay(net: Net) -> None:
    batches = images()
    result = compress.factorize(
        net, batches[0][:1], energy=0.5, methods=("svd",), calibration=batches, recover=False, protect=("head*",)
    )
    assert result.left["head.weight"] == "it is protected"
    assert {factor.module for factor in result.plan.factors} <= {"short", "wide"}


def test_bad_input_is_said(net: Net) -> None:
    batches = images(1)
    one = batches[0][:1]
    with pytest.raises(BudgetError, match="brings macs down to") as caught:
        compress.factorize(net, one, budget=Budget(macs=0.001), calibration=batches)
    reached = caught.value.smallest
    assert reached is not None
    assert compress.factorize(net, one, budget=Budget(macs=reached + 1e-6), calibration=batches, recover=False)
    with pytest.raises(BudgetError, match="not channels"):
        compress.factorize(net, one, budget=Budget(channels=0.5), calibration=batches)
    with pytest.raises(BudgetError, match="a budget or an energy"):
        compress.factorize(net, one, calibration=batches)
    with pytest.raises(BudgetError, match="between 0 and 1"):
        compress.factorize(net, one, energy=1.5, calibration=batches)
    with pytest.raises(BudgetError, match="energy='evb' is unknown"):
        compress.factorize(net, one, energy="evb", calibration=batches)
    with pytest.raises(CalibrationError, match="factorize needs data"):
        compress.factorize(net, one, budget=Budget(macs=0.5))
    with pytest.raises(PruneError, match="'cp' is unknown"):
        compress.factorize(net, one, budget=Budget(macs=0.5), methods=("cp",), calibration=batches)
    with pytest.raises(PruneError, match="nothing can be factorised"):
        compress.factorize(nn.Linear(4, 4), torch.ones(1, 4), budget=Budget(macs=0.5), calibration=[torch.ones(8, 4)])
    plan = FactorPlan((compress.Factor("head", "linear", (11,), "", (10, 40), 0.0),))
    with pytest.raises(PruneError, match="rank 11 is not between 1 and 10"):
        compress.apply(net, plan)
    with pytest.raises(PruneError, match="not a factorisation plan"):
        FactorPlan.from_json(compress.PrunePlan().to_json())
    with pytest.raises(PruneError, match="are not positive"):
        FactorPlan.from_json(plan.to_json().replace("[11]", "[0]"))


def test_a_pattern_that_protects_nothing_is_an_error_as_in_prune(net: Net) -> None:
    batches = images()
    with pytest.raises(PruneError, match=r"protect='tail' matches no parameter"):
        compress.factorize(net, batches[0][:1], energy=0.5, calibration=batches, protect=("tail",))
