"""The public function: one budget, one plan, and no worse than either method alone."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import compress
from compress import Budget, BudgetError, CalibrationError, PruneError, ShrinkPlan
from compress.shrink.allocation import least
from compress.trial import Trial
from tests.compress.factorize.test_factorizing import Net, images
from tests.compress.helpers import assert_same


@pytest.fixture
def net() -> Net:
    """With a depthwise convolution, a residual sum, and layers of all other kinds."""
    torch.manual_seed(0)
    return Net().eval()


class Digits(nn.Module):
    """Residual, for images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.inner, self.outer = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.norms[0](self.stem(x)).relu()
        x = (x + self.norms[2](self.outer(self.norms[1](self.inner(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def digits() -> tuple[Digits, torch.Tensor]:
    """A trained model, and images of which the first 1,200 are for calibration."""
    data = load_digits()
    x, y = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target)
    torch.manual_seed(0)
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        for part in torch.randperm(1200).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return model.eval(), x


@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.7, 0.3])
def test_the_budget_is_met_as_measured_and_the_model_stays(net: Net, metric: str, fraction: float) -> None:
    batches = images()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    budget = Budget(**{metric: fraction})
    result = compress.shrink(net, batches[0][:2], budget=budget, calibration=batches, recover=False)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert result.after == compress.measure(result.model, batches[0][:2])
    kept = getattr(result.after, metric) / getattr(result.before, metric)
    assert fraction - 0.03 < kept <= fraction
    assert result.model(batches[0]).shape == (32, 10)
    assert "shrunk" in result.summary()


def test_one_plan_of_both_makes_the_same_model_of_a_fresh_instance(net: Net, tmp_path) -> None:
    batches = images(6, 64)
    result = compress.shrink(net, batches[0][:1], budget=Budget(macs=0.2), calibration=batches)
    assert [type(step) for step in result.plan.steps] == [compress.PrunePlan, compress.FactorPlan]
    assert ShrinkPlan.from_json(result.plan.to_json()) == result.plan
    applied = compress.apply(net, result.plan)
    shapes = {name: value.shape for name, value in result.model.state_dict().items()}
    assert {name: value.shape for name, value in applied.state_dict().items()} == shapes
    compress.save(result, tmp_path / "small.safetensors")
    loaded = compress.load(Net().eval(), tmp_path / "small.safetensors")
    assert_same(loaded, result.model, batches[0], 0.0)
    back = compress.unfactorize(loaded)
    assert back.state_dict().keys() == net.state_dict().keys()
    assert_same(back, loaded, batches[0], 1e-4)
    assert "depthwise.weight" in dict(back.named_parameters())
    assert back.depthwise.groups == back.depthwise.out_channels


@pytest.mark.parametrize("fraction", [0.35, pytest.param(0.6, marks=pytest.mark.slow)])
def test_both_are_no_worse_than_either_alone_on_images_that_were_not_seen(
    digits: tuple[Digits, torch.Tensor], fraction: float
) -> None:
    model, x = digits
    batches, trial = list(x[:1200].split(200)), Trial(model, [x[1200:]])
    errors = {}
    for methods in (("prune",), ("factorize",), ("prune", "factorize")):
        result = compress.shrink(
            model, x[:1], budget=Budget(macs=fraction), methods=methods, calibration=batches, protect=("stem",)
        )
        errors[methods] = trial.error(result.model)
    assert errors["prune", "factorize"] <= 1.2 * min(errors.values()), errors  # (chosen before recovery)


def test_one_method_alone_gives_its_own_plan(net: Net) -> None:
    batches = images()
    options = {"budget": Budget(macs=0.6), "calibration": batches, "recover": False}
    pruned = compress.shrink(net, batches[0][:1], methods=("prune",), **options)
    alone = compress.prune(net, batches[0][:1], criterion="reconstruction", **options)
    assert pruned.plan.steps == (alone.plan,)
    factorised = compress.shrink(net, batches[0][:1], methods=("factorize",), **options)
    assert factorised.plan.steps == (compress.factorize(net, batches[0][:1], **options).plan,)
    assert factorised.pruning is None


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 24)
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        return self.head(self.body(self.embed(x)).mean(1))


class Tagger(nn.Module):
    """Most of its parameters are an embedding's; attention above it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(400, 24)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, tokens):
        x = self.tokens(tokens)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def test_embeddings_and_attention_share_the_budget() -> None:
    """They are what there is to save: without them the budget is out of reach."""
    torch.manual_seed(0)
    model = Tagger().eval()
    with torch.no_grad():
        model.tokens.weight.copy_(torch.randn(400, 4) @ torch.randn(4, 24) + 0.1 * torch.randn(400, 24))
        for weight in (model.attention.in_proj_weight, model.attention.out_proj.weight):
            weight.mul_(0.7 ** torch.arange(24))
    batches = list(torch.randint(0, 400, (4, 32, 10)))
    options = {"budget": Budget(params=0.3), "calibration": batches}
    both = compress.shrink(model, batches[0][:1], **options)
    kinds = {factor.kind for step in both.plan.steps if step.kind == "factorize" for factor in step.factors}
    assert "embedding" in kinds
    assert both.after.params <= 0.3 * both.before.params
    held_out = Trial(model, [torch.randint(0, 400, (64, 10))])
    alone = compress.factorize(model, batches[0][:1], **options)
    assert held_out.error(both.model) <= 1.2 * held_out.error(alone.model)
    unpruned = compress.shrink(model, batches[0][:1], methods=("factorize",), **options)
    assert unpruned.plan.steps == (alone.plan,)
    assert "attention" in {factor.kind for factor in alone.plan.factors}


@pytest.mark.parametrize("kind", ["transformer", "mlp", "noncontiguous", "tied"])
def test_other_kinds_of_models_go_through_it(kind: str) -> None:
    torch.manual_seed(0)
    shape = (64, 7, 6) if kind == "transformer" else (64, 6)
    model: nn.Module = Transformer()
    if kind != "transformer":
        model = nn.Sequential(
            nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
        )
    if kind == "noncontiguous":
        model[2].weight = nn.Parameter(torch.randn(32, 32).T / 6)
    if kind == "tied":
        model[4].weight = model[2].weight
    model.eval()
    mixing = torch.randn(6, 6)
    batches = [torch.randn(shape) @ mixing for _ in range(4)]
    result = compress.shrink(model, batches[0][:1], budget=Budget(macs=0.5), calibration=batches)
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.after == compress.measure(result.model, batches[0][:1])
    assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())
    assert Trial(model, batches).error(result.model) < 0.5


def test_few_samples_and_inputs_that_never_change_give_numbers_and_a_note(net: Net) -> None:
    constant = [torch.ones(2, 3, 10, 9)]
    with pytest.warns(UserWarning, match="too few calibration samples"):
        result = compress.shrink(net, constant[0][:1], budget=Budget(macs=0.5), calibration=constant)
    assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())
    assert any("too few calibration samples" in note for note in result.notes)


def test_protected_layers_are_neither_pruned_nor_factorised(net: Net) -> None:
    batches = images()
    result = compress.shrink(
        net, batches[0][:1], budget=Budget(macs=0.6), calibration=batches, protect=("inner",), recover=False
    )
    assert torch.equal(result.model.inner.weight, net.inner.weight)
    assert result.left["inner.weight"] == "it is protected"
    with pytest.raises(PruneError, match=r"protect='tail' matches no parameter"):
        compress.shrink(net, batches[0][:1], budget=Budget(macs=0.6), calibration=batches, protect=("tail",))


def test_a_model_that_only_one_method_can_change() -> None:
    x = torch.randn(256, 24, generator=torch.Generator().manual_seed(0)) @ torch.ones(24, 24).tril()
    model = nn.Sequential(nn.Linear(24, 24)).eval()
    result = compress.shrink(model, x[:1], budget=Budget(params=0.6), calibration=[x])
    assert [step.kind for step in result.plan.steps] == ["factorize"]
    with pytest.raises(PruneError, match="nothing can be shrunk: 0.weight"):
        compress.shrink(model, x[:1], budget=Budget(params=0.6), calibration=[x], methods=("prune",))


def test_bad_input_is_said(net: Net) -> None:
    batches = images(3)
    one = batches[0][:1]
    with pytest.raises(BudgetError, match="brings macs down to") as caught:
        compress.shrink(net, one, budget=Budget(macs=0.001), calibration=batches, recover=False)
    reached = caught.value.smallest
    assert reached is not None
    assert compress.shrink(net, one, budget=Budget(macs=reached + 1e-6), calibration=batches, recover=False)
    with pytest.raises(BudgetError, match="macs, params or latency, not channels"):
        compress.shrink(net, one, budget=Budget(channels=0.5), calibration=batches)
    with pytest.raises(CalibrationError, match="shrink needs data"):
        compress.shrink(net, one, budget=Budget(macs=0.5))
    with pytest.raises(PruneError, match="'distil' is unknown"):
        compress.shrink(net, one, budget=Budget(macs=0.5), calibration=batches, methods=("prune", "distil"))
    with pytest.raises(PruneError, match="no method is given"):
        compress.shrink(net, one, budget=Budget(macs=0.5), calibration=batches, methods=())
    with pytest.raises(PruneError, match="meta device"):
        compress.shrink(Net().to("meta"), one, budget=Budget(macs=0.5), calibration=batches)


def test_the_search_comes_close_to_the_best_and_passes_over_what_is_out_of_reach() -> None:
    class Point:
        def __init__(self, x: float) -> None:
            self.x, self.error = x, (x - 0.71) ** 2

    def at(x: float) -> Point:
        if x > 0.8:
            raise BudgetError("too much is left", x)
        return Point(x)

    assert abs(least(at, 0.2, 1.0).x - 0.71) <= 0.8 / 16  # type: ignore[arg-type, attr-defined]
    with pytest.raises(BudgetError, match="too much") as caught:
        least(at, 0.9, 1.0)  # type: ignore[arg-type]
    assert caught.value.smallest == 0.9
    assert least(at, 0.5, 0.5).x == 0.5  # type: ignore[arg-type, attr-defined]
