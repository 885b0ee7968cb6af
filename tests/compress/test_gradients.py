"""Taylor scores against finite differences, and what is said about data that cannot give them."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from compress import CRITERIA, Budget, CalibrationError, prune
from compress.evidence import Evidence
from compress.gradients import collect_gradients
from tests.compress.helpers import image, lively
from tests.compress.test_criteria import Net

BATCHES = [
    (image(n, 3, 9, 7, seed=n).double(), torch.randint(5, (n,), generator=torch.Generator().manual_seed(n)))
    for n in (5, 2, 1, 5)
]


def _scores(model: nn.Module, batches=BATCHES, loss=None, inference: bool = False) -> list[np.ndarray]:
    graph = compress.trace(model, batches[0][0])
    with torch.inference_mode(inference):
        evidence = Evidence(model, graph, gradients=collect_gradients(model, graph, batches, loss))
    return [CRITERIA["taylor"](group, evidence) for group in graph.groups]


def _by_differences(model: nn.Module, group: compress.ChannelGroup, unit: int, loss) -> float:
    """The mean squared derivative of the loss by a factor on everything that reads the unit."""
    values, step = [], 1e-5
    for inputs, target in BATCHES:
        found = []
        for factor in (1 + step, 1 - step):
            twin = copy.deepcopy(model).eval()
            with torch.no_grad():
                for member in group.members:
                    if member.role == "consumer":
                        weight = twin.get_parameter(member.parameter).movedim(member.axis, 0)
                        weight[torch.from_numpy(member.indices[unit])] *= factor
                found.append(float(loss(twin(inputs), target)))
        values.append((found[0] - found[1]) / (2 * step))
    return float(np.mean(np.square(values)))


@pytest.mark.parametrize("loss", [F.cross_entropy, lambda output, target: output.square().sum()])
def test_taylor_is_the_squared_derivative_by_a_factor_on_the_channel(loss) -> None:
    model = lively(Net())
    graph = compress.trace(model, BATCHES[0][0])
    for group, found in zip(graph.groups, _scores(model, loss=loss), strict=True):
        expected = [_by_differences(model, group, unit, loss) for unit in range(group.num_units)]
        assert found == pytest.approx(expected, rel=1e-5)
        assert np.ptp(expected) > 0.01 * max(expected), "a constant tests nothing"


def test_cross_entropy_is_the_default() -> None:
    model = lively(Net())
    for found, expected in zip(_scores(model), _scores(model, loss=F.cross_entropy), strict=True):
        assert np.array_equal(found, expected)


def test_every_batch_counts() -> None:
    model = lively(Net())
    parts = [_scores(model, [batch]) for batch in BATCHES]
    for group, found in enumerate(_scores(model)):
        assert found == pytest.approx(np.mean([part[group] for part in parts], axis=0))


def test_frozen_weights_count_and_nothing_of_the_model_changes() -> None:
    model = lively(Net())
    expected = _scores(model)
    model.train().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    found = _scores(model, inference=True)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert model.training
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_channel_that_the_loss_does_not_see_scores_zero() -> None:
    model = lively(Net())
    with torch.no_grad():
        model.head.weight[:, 3] = 0
    scores = _scores(model)[1]
    assert scores[3] == 0
    assert (np.delete(scores, 3) > 0).all()


def test_a_head_that_runs_in_training_only_scores_zero() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.extra = nn.Linear(3, 11), nn.Linear(11, 5), nn.Linear(11, 7)
            self.last = nn.Linear(7, 5)

        def forward(self, x):
            x = self.stem(x)
            return (self.head(x), self.last(self.extra(x))) if self.training else self.head(x)

    scores = _scores(Auxiliary(), [(image(4, 3), torch.tensor([0, 1, 2, 3]))])
    assert (scores[0] > 0).all()
    assert (scores[1] == 0).all()


def test_prune_by_taylor_takes_the_lowest() -> None:
    model = lively(Net())
    result = prune(
        model, BATCHES[0][0], budget=Budget(channels=0.6), criterion="taylor", calibration=BATCHES, scope="uniform"
    )
    for group, scores in zip(result.plan.groups, _scores(model), strict=True):
        removed = next(m.removed for m in group.members if m.role == "producer")
        assert set(removed) == set(np.argsort(scores)[: len(removed)].tolist())


class Loud(nn.Module):
    """Divides by the second input channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(3, 11), nn.Linear(11, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x) / x[:, 1:2]).relu())


def _x(second: float = 1.0) -> torch.Tensor:
    return image(4, 3).index_fill(1, torch.tensor([1]), second)


Y = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("batches", "loss", "match"),
    [
        ([(_x(), Y), _x()], None, "batch 1 has no target, which gradients need"),
        ([(_x(), Y), (_x(), None)], None, "batch 1 has no target"),
        ([(_x(), Y), (_x(0.0), Y)], None, "not finite in calibration batch 1 .first what 'body' gives"),
        ([(_x(), Y), (_x()[:, :2], Y)], None, r"batch 1 \(\(4, 2\)\) does not fit the model"),
        ([(_x(), Y[:3])], None, r"cross-entropy, the default loss, fails on calibration batch 0.*\(3,\)"),
        ([(_x(), "labels")], None, "fails on calibration batch 0, whose target is no tensors"),
        ([(_x(), Y)], lambda output, target: output, "must be one number that depends on the weights"),
        ([(_x(), Y)], lambda output, target: output.sum().item(), "must be one number that depends on the weights"),
        ([(_x(), Y)] * 2, lambda o, t: (o - o).abs().sum().sqrt(), "gradient of '.*' is not finite in .* batch 0"),
    ],
)  # fmt: skip
def test_data_that_give_no_gradients(batches, loss, match: str) -> None:
    with pytest.raises(CalibrationError, match=match) as caught:
        prune(Loud(), _x(), budget=Budget(channels=0.5), criterion="taylor", calibration=batches, loss=loss)
    assert "\n" not in str(caught.value)


def test_an_output_that_is_no_tensor_needs_a_loss() -> None:
    class Named(Loud):
        def forward(self, x):
            return {"class": super().forward(x)}

    batches = [(_x(), Y)]
    with pytest.raises(CalibrationError, match="gives a dict, which cross-entropy cannot take: pass loss="):
        prune(Named(), _x(), budget=Budget(channels=0.5), criterion="taylor", calibration=batches)
    loss = lambda output, target: F.cross_entropy(output["class"], target)  # noqa: E731
    assert prune(
        Named(), _x(), budget=Budget(channels=0.5), criterion="taylor", calibration=batches, loss=loss
    ).plan.groups


def test_missing_calibration_says_so() -> None:
    with pytest.raises(CalibrationError, match="criterion 'taylor' needs data: pass calibration=batches"):
        prune(Loud(), _x(), budget=Budget(channels=0.5), criterion="taylor")


def test_evidence_without_gradients_says_so() -> None:
    graph = compress.trace(Loud(), _x())
    with pytest.raises(compress.PruneError, match="holds no gradients: declare `needs"):
        Evidence(Loud(), graph).first_order(graph.groups[0])
