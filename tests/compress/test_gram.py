"""Gram matrices and rows of sites against numpy and against the operators themselves."""

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.gram import collect_grams
from compress.sites import find_sites
from compress.trace import record
from tests.compress.helpers import Apply, image, lively

SITES = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 13)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 9, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 4, 3, 5)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (3, 4, 5, 6)),
    "linear": (nn.Linear(4, 6), (5, 4)),
    "tokens": (nn.Linear(4, 6, bias=False), (2, 3, 4)),
    "batched": (Apply(lambda m, x: x @ m.weight, weight=nn.Parameter(torch.randn(3, 4, 6))), (3, 5, 4)),
}


@pytest.mark.parametrize("name", SITES)
def test_a_site_is_its_operator_as_a_matrix(name: str) -> None:
    """Rows times the matrix give what the operator gives, at all positions and at some of them."""
    model, shape = SITES[name]
    model.double().eval()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (site,) = find_sites(record(model, x, training=False))
    weight = dict(model.named_parameters())[site.parameter]
    bias = dict(model.named_parameters()).get(site.bias or "")
    with torch.no_grad():
        y = model(x)
    source, result = x.reshape(site.source.shape), y.reshape(site.result.shape)
    for positions in (None, site.positions(source, 3, torch.Generator().manual_seed(1))):
        rows, outputs = site.rows(source, positions), site.outputs(result, positions)
        found = rows @ site.matrix(weight).mT
        if bias is not None:
            found = found + bias.detach().reshape(site.groups, 1, -1)
        assert torch.allclose(found, outputs, atol=1e-12)
    assert positions is not None
    assert rows.shape[1] < site.num_rows(source)
    doubled = site.matrix(weight) * 2
    site.write(weight, doubled.clone())
    assert torch.equal(site.matrix(weight), doubled)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 7, 3), nn.Conv2d(7, 6, 3), nn.Linear(6 * 3 * 2, 5)

    def forward(self, x):
        return self.head(nn.functional.max_pool2d(self.body(self.stem(x).relu()).relu(), 2)[:, :, :3, :2].flatten(1))


def test_grams_over_all_batches_are_those_of_numpy() -> None:
    model = lively(Net())
    batches = [image(5, 3, 11, 9, seed=seed).double() for seed in range(3)]
    batches.append(image(2, 3, 11, 9, seed=7).double())
    graph = compress.trace(model, batches[0])
    grams = collect_grams(model, graph, batches, row_share=1e9).sums
    assert {name for name, _ in grams} == {"body.weight", "head.weight"}, "nothing that can go enters the stem"
    with torch.no_grad():
        read = torch.cat([model.stem(batch).relu() for batch in batches])
        patches = nn.functional.unfold(read, 3).transpose(1, 2).reshape(-1, 7 * 9).numpy()
        flat = torch.cat([model.body(r[None]).relu() for r in read])
        flat = nn.functional.max_pool2d(flat, 2)[:, :, :3, :2].flatten(1).numpy()
    for name, rows in (("body.weight", patches), ("head.weight", flat)):
        full = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        known = grams[name, 0]
        assert known.num_rows == len(full)
        np.testing.assert_allclose(known.gram[0].numpy(), full.T @ full, rtol=1e-10, atol=1e-10)


def test_what_an_error_counts_is_its_part_of_the_residual_stream() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 9), nn.Linear(9, 6)
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.stem(x)
            self.stream = x + self.norm(self.b(self.a(x).relu()))
            return self.head(self.stream)

    model, x = lively(Block()), image(40, 3).double()
    graph = compress.trace(model, x)
    share = collect_grams(model, graph, [x]).sums["b.weight", 0].output_share
    with torch.no_grad():
        model.eval()(x)
        total = model.stream.var(0, correction=0).sum()
        scale = model.norm.weight.square() / (model.norm.running_var + model.norm.eps)
    assert torch.allclose(share[0], scale / total)


def _conv_gram(batches, model, **options):
    graph = compress.trace(model, batches[0])
    return collect_grams(model, graph, batches, **options).sums["body.weight", 0]


def test_a_sample_of_the_positions_estimates_the_mean_without_bias() -> None:
    """The mean over many draws is the exact one, and each draw differs from it."""
    batch = image(6, 3, 11, 9).double()
    model = lively(Net()).double()
    exact = _conv_gram([batch], model, row_share=1e9).mean
    draws = [_conv_gram([batch] * 12, model, row_share=1e-9, seed=seed) for seed in range(60)]
    assert draws[0].num_rows < 12 * 6 * 7 * 5 / 3, "few of the positions"
    found = torch.stack([draw.mean for draw in draws])
    spread = found.std(0) / len(draws) ** 0.5
    assert (spread[0, :-1, :-1] > 0).any()
    assert ((found.mean(0) - exact).abs() <= 5 * spread + 1e-12).all()


def test_samples_are_decided_by_the_seed() -> None:
    batches = [image(6, 3, 11, 9, seed=seed).double() for seed in range(12)]
    model = lively(Net()).double()
    first, again, other = (_conv_gram(batches, model, row_share=1e-9, seed=seed).gram for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_wide_layer_is_summed_in_panels() -> None:
    """More inputs than one panel holds: the half that is not computed is the mirror of the other."""
    model = nn.Sequential(nn.Conv2d(3, 70, 1), nn.Tanh(), nn.Conv2d(70, 4, (3, 2), padding=(1, 0))).double()
    x = image(5, 3, 9, 7).double()
    graph = compress.trace(model, x)
    known = collect_grams(model, graph, [x], row_share=1e9).sums["2.weight", 0]
    with torch.no_grad():
        rows = nn.functional.unfold(model[:2](x), (3, 2), padding=(1, 0)).transpose(1, 2).reshape(-1, 70 * 6)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(known.gram[0], rows.T @ rows, rtol=1e-10, atol=1e-10)


def test_single_precision_is_summed_in_double() -> None:
    model = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 4))
    x = image(20000, 3) + 100
    graph = compress.trace(model, x)
    known = collect_grams(model, graph, [x]).sums["1.weight", 0]
    with torch.no_grad():
        rows = torch.cat([model[0](x), torch.ones(len(x), 1)], dim=1).double()
    torch.testing.assert_close(known.gram[0], rows.T @ rows, rtol=1e-6, atol=0)


def test_the_variance_of_a_large_output_is_told_by_some_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 1), nn.Conv2d(9, 6, 3, padding=1)
            self.norm, self.head = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.norm(self.b(self.a(x).relu())))

    model, x = lively(Block()), image(64, 3, 8, 8).double()
    graph = compress.trace(model, x)
    exact = collect_grams(model, graph, [x]).sums
    monkeypatch.setattr(compress.gram, "SHARE", 6 * 64 * 16)
    found = collect_grams(model, graph, [x]).sums
    assert not torch.equal(found["b.weight", 0].output_share, exact["b.weight", 0].output_share)
    for key, known in found.items():
        torch.testing.assert_close(known.output_share, exact[key].output_share, rtol=0.2, atol=0)


def test_too_few_samples_warn_and_damp() -> None:
    batches = [image(5, 3, 11, 9).double()]
    model = lively(Net()).double()
    with pytest.warns(UserWarning, match=r"too few calibration samples for 1 layers \(head has 36 inputs and saw 5"):
        compress.prune(
            model, batches[0], budget=compress.Budget(channels=0.7), criterion="reconstruction", calibration=batches
        )
    known = collect_grams(model, compress.trace(model, batches[0]), batches).sums["head.weight", 0]
    plain = known.gram / known.num_rows
    assert known.scarce
    assert torch.linalg.matrix_rank(plain[0]) < 37
    assert torch.linalg.matrix_rank(known.mean[0]) == 37
    assert torch.equal(known.mean[:, -1], plain[:, -1]), "constants are not damped"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{"criterion": "reconstruction"}, {"recover": True}])
def test_activations_that_are_not_finite_name_layer_and_batch(value: float, options) -> None:
    batches = [image(5, 3, 11, 9), image(5, 3, 11, 9)]
    batches[1][0, 0, 0, 0] = value
    batches.append(image(5, 3, 11, 9, seed=1))
    budget = compress.Budget(channels=0.7)
    with pytest.raises(
        compress.CalibrationError, match=r"enter '(stem|body|head)' are not finite in calibration batch 1"
    ):
        compress.prune(Net(), batches[0], budget=budget, calibration=batches, **options)


def test_a_caller_in_inference_mode_gets_the_same() -> None:
    """There a layer norm is one operator, in a trace it is taken apart."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).eval(), torch.randn(30, 6)
    graph = compress.trace(model, x)
    plain = collect_grams(model, graph, [x]).sums["2.weight", 0].gram
    with torch.inference_mode():
        again = collect_grams(model, graph, [x]).sums["2.weight", 0].gram
    assert torch.equal(plain, again)
