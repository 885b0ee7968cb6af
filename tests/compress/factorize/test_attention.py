"""Queries with keys, and values with the output's weights, factorised together: exactness, errors, costs, files."""

import itertools

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

import compress
from compress import Budget, Factor, FactorPlan, PruneError
from compress.factorize.attention import find_attentions, losses
from compress.factorize.heads import Heads, Moments, made_of
from compress.sites import find_sites
from compress.trace import record
from layers import LowRankAttention
from tests.compress.helpers import assert_same

D = torch.float64


def smooth(number: int = 2, size: int = 32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(number, size, 3, 4, 4, generator=generator)
    return [nn.functional.interpolate(batch, size=(24, 24), mode="bilinear") for batch in small]


def vit(num_layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(24, 8, num_layers=num_layers, num_heads=3, hidden_dim=24, mlp_dim=64, num_classes=10)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    return model.eval()


class Crossed(nn.Module):
    """Keys of another width, no biases, heads first, and one attention that adds a key of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cross = nn.MultiheadAttention(12, 3, kdim=5, vdim=5, bias=False)
        self.more = nn.MultiheadAttention(12, 3, add_bias_kv=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x, y):
        x = x + self.cross(x, y, y)[0]
        return self.head(x + self.more(x, x, x)[0]).mean(0)


def cross() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 16, 12), torch.randn(7, 16, 5)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.1)
    return nn.Sequential(nn.Linear(5, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)).eval()


CASES = {
    "vision transformer": (vit, lambda: smooth(1, 4)[0]),
    "encoder": (encoder, lambda: torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))),
    "crossed": (Crossed, cross),
}


def plan_of(model: nn.Module, ranks: tuple[int, int] | None = None) -> FactorPlan:
    """For all attentions but those that add keys; ranks of a head, full ones if None."""
    factors = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.bias_k is None:
            shape = tuple(module.out_proj.weight.shape)
            factors.append(Factor(name, "attention", ranks or (module.head_dim,) * 2, "", shape, 0.0))
    return FactorPlan(tuple(factors))


@pytest.mark.parametrize("case", CASES)
def test_at_full_rank_the_model_computes_the_same_and_merges_back(case: str) -> None:
    make, inputs = CASES[case]
    model = make().eval().double()
    given = torch.utils._pytree.tree_map(lambda t: t.double(), inputs())
    made = compress.apply(model, FactorPlan.from_json(plan_of(model).to_json()))
    assert any(isinstance(module, LowRankAttention) for module in made.modules())
    assert_same(made, model, given, 1e-10)
    back = compress.unfactorize(made)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert_same(back, model, given, 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_prices_are_what_the_new_model_costs(case: str) -> None:
    make, inputs = CASES[case]
    model, given = make().eval(), inputs()
    trace = record(model, given, training=False)
    found, left = find_attentions(model, trace, find_sites(trace), given)
    plan = plan_of(model)
    assert found.keys() == {factor.module for factor in plan.factors}
    assert {name.split(".")[0] for name in left} == ({"more"} if case == "crossed" else set())
    dense = compress.measure(model, given)
    for ranks in ((1, 2), (3, 1)):
        cost = compress.measure(compress.apply(model, plan_of(model, ranks)), given)
        saved = [0, 0]
        for name, attention in found.items():
            layer = model.get_submodule(name)
            whole, part = attention.price(layer, (layer.head_dim,) * 2), attention.price(layer, ranks)
            saved = [total + a - b for total, a, b in zip(saved, whole, part, strict=True)]
        assert (dense.macs - cost.macs, dense.params - cost.params) == tuple(saved)


def moments(layer: nn.MultiheadAttention, x: torch.Tensor) -> tuple[Moments, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of inputs (B, N, E), with queries, keys around their means and values as attended (B, H, N, D)."""
    q, k, v = nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).unflatten(2, (3, 3, -1)).unbind(2)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    sent = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    k = k - k.mean(2, keepdim=True)
    grams = [torch.einsum("bhni,bhnj->hij", each, each) for each in (q, k, sent)]
    return Moments(*grams, torch.ones(layer.embed_dim, dtype=D)), q, k, sent


def test_no_truncation_of_a_head_loses_less_of_scores_or_outputs() -> None:
    """The tails are what is lost, and less than by truncated SVDs of the projections, or of what they give."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, 3, batch_first=True, dtype=D).requires_grad_(False)
    nn.init.normal_(layer.in_proj_bias)
    mixing = torch.randn(12, 12, dtype=D) / torch.arange(1, 13)
    x = torch.randn(20, 9, 12, dtype=D) @ mixing
    known, q, k, sent = moments(layer, x)
    own = Heads.of(layer, known)
    scores, outputs = own.tails()
    whole = torch.einsum("bhni,chmi->hbncm", q, k)  # of all queries with all keys, of any sample
    given = torch.einsum("bhnd,ehd->bnhe", sent, own.output)
    for rank in range(1, 5):
        queries, keys, _ = own.scores_basis
        thin = [(rows.transpose(2, 3).transpose(1, 2), basis) for rows, basis in ((q, queries), (k, keys))]
        q_thin, k_thin = (torch.einsum("hri,bihn->bhnr", basis[:, :rank], rows) for rows, basis in thin)
        lost = (torch.einsum("bhni,chmi->hbncm", q_thin, k_thin) - whole).square().sum()
        torch.testing.assert_close(lost, scores[rank], rtol=1e-5, atol=1e-5)
        raw_q, raw_k = (_truncated(rows, weight, rank) for rows, weight in ((q, own.query), (k, own.key)))
        for left, right in ((raw_q, k), (q, raw_k), (raw_q, raw_k)):
            assert lost <= (torch.einsum("bhni,chmi->hbncm", left, right) - whole).square().sum() + 1e-6
        inner, outer, _ = own.output_basis
        values = torch.einsum("hri,bhni->bhnr", inner[:, :rank], sent)
        found = torch.einsum("bhnr,ehd,hdr->bnhe", values, own.output, outer[:, :, :rank])
        lost = (found - given).square().sum()
        torch.testing.assert_close(lost, outputs[rank], rtol=1e-5, atol=1e-5)
        raw = torch.einsum("bhnd,ehd->bnhe", _truncated(sent, own.value, rank), own.output)
        assert lost <= (raw - given).square().sum() + 1e-6


def _truncated(rows: torch.Tensor, weight: torch.Tensor, rank: int) -> torch.Tensor:
    """Rows (B, H, N, D) projected onto the first left singular vectors of each head's weight (H, D, E + 1)."""
    left = torch.linalg.svd(weight, full_matrices=False)[0][:, :, :rank]
    return torch.einsum("bhni,hir,hjr->bhnj", rows, left, left)


def test_losses_are_measured_and_fall_with_the_rank() -> None:
    model, (batch, *_) = vit(1), smooth(1, 8)
    name = "encoder.layers.encoder_layer_0.self_attention"
    layer = model.get_submodule(name)
    own = Heads.of(layer)
    ((found),) = losses(model, {name: own}, batch).values()
    x = []
    layer.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    with torch.no_grad():
        model(batch)
        expected = layer(x[0], x[0], x[0])[0]
        for side, curve in enumerate(found):
            assert curve[-1] == 0
            assert bool((curve.diff() <= 1e-9 * curve[0]).all())
            for rank in (2, 4):
                ranks = [own.full_rank, own.full_rank]
                ranks[side] = rank
                thin = made_of(layer, own.factors(ranks)).eval()(x[0], x[0], x[0])[0]
                lost = float((thin - expected).square().sum(2).mean())
                assert lost / 2 < float(curve[rank]) < lost * 2


@pytest.mark.parametrize("budget", [Budget(macs=0.8), Budget(params=0.8)])
def test_both_products_together_lose_less_than_layers_alone_at_the_same_budget(budget: Budget, tmp_path) -> None:
    model, batches = vit(), smooth()
    fresh = smooth(1, 64, seed=3)[0]
    errors = {}
    for methods in (("svd",), ("svd", "attention")):
        result = compress.factorize(
            model, batches[0][:2], budget=budget, methods=methods, calibration=batches, recover=False
        )
        kept = getattr(result.after, budget.metric) / getattr(result.before, budget.metric)
        assert budget.fraction - 0.02 < kept <= budget.fraction
        with torch.no_grad():
            errors[methods] = float((result.model(fresh) - model(fresh)).square().mean())
    alone, together = errors.values()
    assert together < 0.7 * alone
    factors = [factor for factor in result.plan.factors if factor.kind == "attention"]
    assert factors
    assert not [name for name in result.left if "self_attention" in name]
    assert "attention" in result.summary()
    compress.save(result, tmp_path / "small.safetensors")
    assert_same(compress.load(vit(), tmp_path / "small.safetensors"), result.model, fresh, 0.0)


def test_recovery_refits_what_thin_attentions_feed() -> None:
    """The last layer of an attention has the dense one's rows in the same order."""
    model, batches = vit(), smooth(4, 64)
    errors = []
    for recover in (False, True):
        result = compress.factorize(
            model,
            batches[0][:2],
            budget=Budget(macs=0.8),
            methods=("attention",),
            calibration=batches[:-1],
            recover=recover,
        )
        with torch.no_grad():
            errors.append(float((result.model(batches[-1]) - model(batches[-1])).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert result.recovery is not None
    assert any("self_attention.out_proj" in layer.name for layer in result.recovery.layers)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("methods", [("svd",), ("attention",)])
def test_encoders_of_torch_leave_their_fused_path_which_reads_weights(methods: tuple[str, ...], tmp_path) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True), 2)

        def forward(self, x):
            return self.encoder(x, src_key_padding_mask=torch.arange(6) > torch.arange(len(x))[:, None] % 5 + 1)

    model = Padded().eval()
    x = torch.randn(64, 6, 16, generator=torch.Generator().manual_seed(0))
    result = compress.factorize(model, x[:8], budget=Budget(macs=0.85), methods=methods, calibration=[x], recover=False)
    compress.save(result, tmp_path / "small.safetensors")
    loaded = compress.load(Padded().eval(), tmp_path / "small.safetensors")
    seen = torch.arange(6) <= torch.arange(64)[:, None] % 5 + 1
    with torch.inference_mode():
        found, expected = loaded(x), model(x)
    assert float((found - expected)[seen].square().mean()) < 0.2 * float(expected[seen].square().mean())


def test_energy_protection_and_further_pruning() -> None:
    model, batches = vit(), smooth()
    first, second = (f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2))
    ranks = {}
    for energy in (0.7, 0.99):
        result = compress.factorize(
            model,
            batches[0][:2],
            energy=energy,
            methods=("attention",),
            calibration=batches,
            recover=False,
            protect=(f"{first}*",),
        )
        assert [factor.module for factor in result.plan.factors] == [second]
        assert result.left[f"{first}.in_proj_weight"] == "it is protected"
        ranks[energy] = sum(result.plan.factors[0].ranks)
    assert ranks[0.7] < ranks[0.99]
    plan = compress.FactorPlan(tuple(Factor(name, "attention", (5, 6), "", (24, 24), 0.0) for name in (first, second)))
    thin = compress.apply(model, plan)
    again = compress.prune(thin, batches[0][:2], budget=Budget(macs=0.9), exact_only=True)
    kept = [again.model.get_submodule(name).ranks for name in (first, second)]
    assert all(r <= 5 and s <= 6 for r, s in kept)
    assert again.plan.exact


def test_batches_may_be_smaller_than_what_losses_are_measured_on() -> None:
    batches = [batch[:3] for batch in smooth(12)]
    result = compress.factorize(vit(1), batches[0][:1], budget=Budget(macs=0.8), calibration=batches, recover=False)
    assert "attention" in {factor.kind for factor in result.plan.factors}


def test_attention_of_another_make_is_said_to_be_left() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            x = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(x.transpose(1, 2).flatten(2)).mean(1)

    x = torch.randn(64, 5, 16, generator=torch.Generator().manual_seed(0))
    result = compress.factorize(Own(), x[:2], budget=Budget(macs=0.8), calibration=[x], recover=False)
    assert {factor.kind for factor in result.plan.factors} == {"linear"}
    assert any("no nn.MultiheadAttention" in note for note in result.notes)


def test_bad_plans_and_weights_are_said() -> None:
    model = vit(1)
    with pytest.raises(PruneError, match="rank 9 is not between 1 and 8"):
        compress.apply(model, plan_of(model, (9, 1)))
    with pytest.raises(PruneError, match="apply it to a dense instance"):
        compress.apply(compress.apply(model, plan_of(model, (2, 2))), plan_of(model, (2, 2)))
    with pytest.raises(PruneError, match="not a factorisation plan"):
        FactorPlan.from_json(plan_of(model).to_json().replace("[8,8]", "[8]"))
    layer = nn.MultiheadAttention(6, 2)
    nn.init.constant_(layer.out_proj.weight, float("nan"))
    with pytest.raises(PruneError, match="must be finite"):
        Heads.of(layer)


@pytest.mark.parametrize("zeroed", ["in_proj_weight", "out_proj.weight"])
def test_heads_that_do_nothing_come_out_finite(zeroed: str) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(6, 2, batch_first=True)
    nn.init.zeros_(layer.get_parameter(zeroed))
    x = torch.randn(3, 4, 6)
    own = Heads.of(layer)
    for ranks in itertools.product((1, 3), repeat=2):
        thin = made_of(layer, own.factors(ranks))
        torch.testing.assert_close(thin(x, x, x)[0], layer(x, x, x)[0], rtol=0, atol=1e-5)
