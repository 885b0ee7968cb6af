"""Criteria against numpy: weights by hand, activations by hooks."""

import numpy as np
import pytest
import torch
from torch import nn

from compress import CRITERIA, Budget, PruneError, prune, trace
from compress.activations import collect_activations
from compress.criteria import needs, resolve
from compress.evidence import Evidence
from tests.compress.helpers import image, lively

BATCHES = [image(5, 3, 9, 7, seed=1), image(2, 3, 9, 7, seed=2), image(1, 3, 9, 7, seed=3), image(5, 3, 9, 7, seed=4)]


class Net(nn.Module):
    """The stem's channels are read twice, after different activations; the body's once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11)
        self.a, self.b = nn.Conv2d(11, 7, 1), nn.Conv2d(11, 7, 3, padding=1)
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head((self.a(x.relu()) + self.b(x.sigmoid() - 0.5)).relu().mean((2, 3)))


def _scores(criterion: str, model: nn.Module, calibration=BATCHES) -> list[np.ndarray]:
    graph = trace(model, BATCHES[0])
    activations = collect_activations(model, graph, calibration)
    return [np.asarray(CRITERIA[criterion](group, Evidence(model, graph, activations))) for group in graph.groups]


def _inputs_by_hooks(model: nn.Module) -> dict[str, np.ndarray]:
    """What enters each layer over all batches, channels first, as numpy arrays."""
    seen: dict[str, list[np.ndarray]] = {"a": [], "b": [], "head": []}
    handles = [
        getattr(model, name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].transpose(0, 1).flatten(1).numpy())
        )
        for name in seen
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model.eval()(batch)
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(found, axis=1) for name, found in seen.items()}


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_weight_criteria(name: str, power: int) -> None:
    model = lively(Net()).float()
    stem, body = _scores(name, model)
    w = {
        key: np.abs(value.numpy().astype(np.float64)) ** power
        for key, value in model.state_dict().items()
        if "weight" in key
    }
    assert stem == pytest.approx(w["stem.weight"].mean((1, 2, 3)))
    # two producers: the mean over all weights that make the channel
    together = (w["a.weight"].sum((1, 2, 3)) + w["b.weight"].sum((1, 2, 3))) / (11 + 11 * 9)
    assert body == pytest.approx(together)


@pytest.mark.parametrize(
    ("name", "statistic"), [("mean_activation", lambda x: np.abs(x).mean(1)), ("nonzero", lambda x: (x != 0).mean(1))]
)
def test_activation_criteria_over_unequal_batches(name: str, statistic) -> None:
    model = lively(Net()).float()
    stem, body = _scores(name, model)
    inputs = _inputs_by_hooks(model)
    assert stem == pytest.approx((statistic(inputs["a"]) + statistic(inputs["b"])) / 2, rel=1e-6)
    assert body == pytest.approx(statistic(inputs["head"]), rel=1e-6)
    assert len(set(np.round(stem, 6))) > 1, "a constant tests nothing"


@pytest.mark.parametrize("name", ["mean_activation", "nonzero"])
def test_streaming_equals_one_big_batch(name: str) -> None:
    model = lively(Net()).float()
    streamed = _scores(name, model)
    whole = _scores(name, model, [torch.cat(BATCHES)])
    for a, b in zip(streamed, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-6)


def _rows(model: nn.Module, *layers: str) -> list[np.ndarray]:
    """The weights that make each channel of some layers, (channels, weights) each."""
    return [getattr(model, name).weight.detach().double().flatten(1).numpy() for name in layers]


def test_fpgm_is_the_mean_distance_to_all_filters() -> None:
    model = lively(Net()).float()
    stem, body = _scores("fpgm", model)
    (w,) = _rows(model, "stem")
    assert stem == pytest.approx([np.mean([np.linalg.norm(a - b) for b in w]) for a in w])
    w = np.concatenate(_rows(model, "a", "b"), axis=1)  # two layers make the channel: one long filter
    assert body == pytest.approx([np.mean([np.linalg.norm(a - b) for b in w]) for a in w])


def test_fpgm_of_equal_filters_is_zero() -> None:
    model = Net()
    with torch.no_grad():
        model.stem.weight.copy_(1e3 * model.stem.weight[:1].clone())
    assert _scores("fpgm", model)[0] == pytest.approx(0, abs=1e-3)


def test_lamp_is_the_part_of_what_is_not_smaller() -> None:
    model = lively(Net()).float()
    stem, body = _scores("lamp", model)
    for found, rows in ((stem, _rows(model, "stem")), (body, _rows(model, "a", "b"))):
        squares = (np.concatenate(rows, axis=1) ** 2).mean(1)
        assert found == pytest.approx([s / squares[squares >= s].sum() for s in squares])
        assert found.max() == 1


def test_lamp_of_empty_and_equal_channels() -> None:
    model = Net()
    with torch.no_grad():
        model.stem.weight.fill_(1)
        model.stem.weight[:3] = 0
    assert _scores("lamp", model)[0] == pytest.approx([0, 0, 0, *(1 / n for n in range(8, 0, -1))])


def test_bn_scale_is_the_mean_scale_and_falls_back_on_l1() -> None:
    class Normed(Net):
        """The stem's channels pass two norms, one of them a function; the body's pass none."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(11))
            self.register_buffer("mean", torch.zeros(11))
            self.register_buffer("var", torch.ones(11))

        def forward(self, x):
            x = nn.functional.batch_norm(self.norm(self.stem(x)), self.mean, self.var, self.scale)
            return self.head((self.a(x) + self.b(x)).relu().mean((2, 3)))

    model = lively(Normed()).float()
    stem, body = _scores("bn_scale", model)
    gammas = [tensor.detach().double().abs().numpy() for tensor in (model.norm.weight, model.scale)]
    assert stem == pytest.approx(np.mean(gammas, axis=0))
    assert np.array_equal(body, _scores("l1", model)[1])


def test_nonzero_is_the_part_that_is_not_zero() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([-1.0, 1.0, 2.0, -3.0]))
        model[0].weight[3, 0] = 10
    x = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 0, 0], [0.1, 0, 0]])
    graph = trace(model, x)
    evidence = Evidence(model, graph, collect_activations(model, graph, [x[:1], x[1:]]))
    assert CRITERIA["nonzero"](graph.groups[0], evidence).tolist() == [0, 1, 1, 0.5]
    assert CRITERIA["mean_activation"](graph.groups[0], evidence) == pytest.approx([0, 1, 2, 14 / 4])


def test_a_channel_that_no_weight_reads_is_judged_by_its_weights() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 7, bias=False), nn.Linear(3, 7, bias=False)

        def forward(self, x):
            return (self.a(x).unsqueeze(-2) @ self.b(x).unsqueeze(-1)).flatten()

    model, x = Product(), image(5, 3)
    graph = trace(model, x)
    evidence = Evidence(model, graph, collect_activations(model, graph, [x]))
    for group in graph.groups:
        assert np.isfinite(CRITERIA["mean_activation"](group, evidence)).all()


def test_random_is_decided_by_the_seed_alone() -> None:
    model = Net()
    plans = [
        prune(model, BATCHES[0], budget=Budget(channels=0.5), criterion="random", seed=seed).plan for seed in (0, 0, 1)
    ]
    assert plans[0] == plans[1] != plans[2]
    other = prune(lively(Net(), 3).float(), BATCHES[0], budget=Budget(channels=0.5), criterion="random", seed=0).plan
    assert other == plans[0], "weights play no part"
    for values in _scores("random", model):
        assert ((values >= 0) & (values < 1)).all()
        assert len(set(values)) == len(values)


def test_the_lowest_scores_go_first() -> None:
    model = Net()
    result = prune(model, BATCHES[0], budget=Budget(channels=0.5), criterion="l1", scope="uniform")
    for group in result.plan.groups:
        removed = next(m.removed for m in group.members if m.role == "producer")
        (scores,) = (values for name, values in result.scores.items() if name.startswith(f"{group.name}#"))
        assert set(removed) == set(np.argsort(scores)[: len(removed)].tolist())


def test_a_function_is_a_criterion() -> None:
    calls = []

    def later_is_better(group, evidence):
        calls.append(group.name)
        assert isinstance(evidence, Evidence)
        return list(range(group.num_units))

    result = prune(Net(), BATCHES[0], budget=Budget(channels=0.5), criterion=later_is_better, scope="uniform")
    assert calls == ["stem.weight", "a.weight"]
    for group in result.plan.groups:
        assert next(m.removed for m in group.members) == tuple(range(group.num_removed))


def test_a_criterion_that_needs_data_says_so() -> None:
    def by_activation(group, evidence):
        return evidence.activation_mean(group, "magnitude")

    with pytest.raises(PruneError, match="declare `needs"):
        prune(Net(), BATCHES[0], budget=Budget(channels=0.5), criterion=by_activation)
    by_activation.needs = {"activations"}
    assert needs(by_activation) == {"activations"}
    same = prune(Net(), BATCHES[0], budget=Budget(channels=0.5), criterion=by_activation, calibration=BATCHES)
    assert same.plan.groups


def test_targets_reach_a_criterion_through_its_loss() -> None:
    seen = []
    loss = nn.MSELoss()

    def looks(group, evidence):
        seen.append(evidence.loss)
        return np.arange(group.num_units)

    prune(Net(), BATCHES[0], budget=Budget(channels=0.5), criterion=looks, loss=loss)
    assert seen == [loss, loss]


@pytest.mark.parametrize(
    ("criterion", "match"),
    [
        ("l3", r"criterion 'l3' is unknown: choose one of l1, l2, mean_activation, nonzero, random, taylor"),
        (lambda group, evidence: 1.0, r"scores of shape \(\) for group 'stem\.weight', which has 11 units"),
        (lambda group, evidence: np.ones((group.num_units, 2)), r"scores of shape \(11, 2\)"),
        (lambda group, evidence: np.full(group.num_units, np.nan), "not finite for group 'stem.weight'"),
    ],
)
def test_criteria_that_cannot_be_used(criterion, match: str) -> None:
    with pytest.raises(PruneError, match=match):
        prune(Net(), BATCHES[0], budget=Budget(channels=0.5), criterion=criterion)


def test_every_name_is_a_criterion() -> None:
    assert set(CRITERIA) >= {"l1", "l2", "mean_activation", "nonzero", "random"}
    for name, criterion in CRITERIA.items():
        assert resolve(name) is criterion
        assert criterion.__doc__


class Tokens(nn.Module):
    """Attention, then recurrence: which kernels run depends on the device, and on whether there are data."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.position = nn.Conv2d(3, 8, 3, stride=2), nn.Parameter(torch.randn(1, 12, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 14, batch_first=True, norm_first=True)
        self.lstm, self.head = nn.LSTM(8, 9, batch_first=True), nn.Linear(9, 5)

    def forward(self, x):
        x = self.block(self.stem(x).flatten(2).transpose(1, 2) + self.position)
        return self.head(self.lstm(x)[0].mean(1))


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_every_criterion_ranks_the_channels_of_a_transformer(criterion: str) -> None:
    """The example is one image, calibration comes in batches of other sizes."""
    model = lively(Tokens()).float()
    batches = [(image(n, 3, 9, 7, seed=n), torch.arange(n) % 5) for n in (12, 16, 16)]
    result = prune(model, image(1, 3, 9, 7), budget=Budget(macs=0.6), criterion=criterion, calibration=batches)
    assert result.after.macs <= 0.6 * result.before.macs
    assert any(len(np.unique(scores)) > 1 for scores in result.scores.values())
