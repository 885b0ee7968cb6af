"""Greedy elimination against explicit least squares for every candidate of every step."""

import numpy as np
import pytest
import torch
from torch import nn

import compress
from compress.criteria import elimination
from compress.criteria.elimination import Reader, eliminate
from compress.evidence import Evidence
from compress.gram import collect_grams
from tests.compress.helpers import Apply, image, lively


def _reader(seed: int, units: int, width: int, outputs: int, samples: int = 200) -> tuple[Reader, np.ndarray]:
    """A reader of correlated inputs, and its rows (with a one)."""
    generator = np.random.default_rng(seed)
    size = units * width + 2  # two inputs belong to no unit
    rows = generator.normal(size=(samples, size)) @ generator.normal(size=(size, size)) + 1
    full = np.concatenate([rows, np.ones((samples, 1))], axis=1)
    columns = generator.permutation(size)[: units * width].reshape(units, width)
    matrix = np.concatenate([generator.normal(size=(outputs, size)), np.zeros((outputs, 1))], axis=1)
    reader = Reader(
        gram=torch.from_numpy(full.T @ full / samples),
        matrix=torch.from_numpy(matrix),
        columns=torch.from_numpy(columns),
        weight=torch.from_numpy(generator.random(outputs) + 0.5),
        own=torch.zeros(units, outputs, dtype=torch.bool),
        free=True,
    )
    return reader, full


def _error(reader: Reader, rows: np.ndarray, gone: list[int]) -> float:
    """The error that is left when the outputs are fitted anew without some units, by lstsq."""
    kept = np.setdiff1d(np.arange(rows.shape[1]), reader.columns[gone].numpy().ravel())
    targets = rows @ reader.matrix.numpy().T
    fitted, *_ = np.linalg.lstsq(rows[:, kept], targets, rcond=None)
    squares = np.square(rows[:, kept] @ fitted - targets).mean(0)
    return float(squares @ reader.weight.numpy())


@pytest.mark.parametrize(("units", "width", "readers"), [(6, 1, 1), (5, 3, 1), (5, 2, 3)])
def test_each_step_is_the_best_and_its_loss_is_the_error(
    units: int, width: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elimination, "RIDGE", 1e-12)
    made = [_reader(seed, units, width, outputs=4) for seed in range(readers)]
    removal, matrices = eliminate([reader for reader, _ in made], units, tried=2)
    gone: list[int] = []
    for step, unit in enumerate(removal.order.tolist()):
        errors = {
            u: sum(_error(reader, rows, [*gone, u]) for reader, rows in made) for u in range(units) if u not in gone
        }
        assert unit == min(errors, key=errors.__getitem__)
        assert removal.losses[step + 1] == pytest.approx(errors[unit], rel=1e-6)
        gone.append(unit)
    for (reader, rows), matrix in zip(made, matrices, strict=True):  # the refit that the losses speak of
        targets = rows @ reader.matrix.numpy().T
        left = np.square(rows @ matrix.numpy().T - targets).mean(0) @ reader.weight.numpy()
        assert left == pytest.approx(_error(reader, rows, gone[:2]), rel=1e-6)
        assert not matrix[:, reader.columns[gone[:2]].flatten()].any()


def _removal(model: nn.Module, x: torch.Tensor, group: int = 0) -> compress.Removal:
    graph = compress.trace(model, x)
    evidence = Evidence(model, graph, grams=collect_grams(model, graph, [x], row_share=1e9))
    return elimination.reconstruction(graph.groups[group], evidence)


def test_copies_go_first_and_cost_nothing() -> None:
    model, x = lively(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))), image(200, 4).double()
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[1], model[0].bias[1]
        model[0].weight[4], model[0].bias[4] = -model[0].weight[5], -model[0].bias[5]
    removal = _removal(model, x)
    assert {frozenset(pair) & set(removal.order[:2].tolist()) != set() for pair in ((1, 3), (4, 5))} == {True}
    assert removal.losses[2] < 0.05 * removal.losses[3], "but for the ridge, nothing"


@pytest.mark.parametrize(
    "consumer",
    [
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 5, 1)),
        lambda: nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.Conv2d(6, 5, 1)),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(8 * 63, 5)),
        lambda: nn.Sequential(Apply(lambda _, x: torch.cat([x, x.relu()], 1)), nn.Conv2d(16, 5, 1)),
    ],
)
def test_consumers_of_all_kinds(consumer) -> None:
    """A channel that is always zero goes first, and costs nothing."""
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 1), consumer()))
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2] = 0, 0
    removal = _removal(model, image(60, 3, 9, 7).double())
    assert removal.losses[1] < 1e-2 * removal.losses[-1]
    assert (np.diff(removal.losses) >= 0).all()
    if consumer()[0].__class__ is not nn.Conv2d:  # there, channel 2 is one of a unit, or its filter adds a constant
        assert removal.order[0] == 2
    assert sorted(removal.order.tolist()) == list(range(len(removal.order)))


def test_evidence_without_matrices_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), image(7, 4)
    graph = compress.trace(model, x)
    with pytest.raises(compress.PruneError, match="holds no Gram matrices"):
        elimination.reconstruction(graph.groups[0], Evidence(model, graph))
