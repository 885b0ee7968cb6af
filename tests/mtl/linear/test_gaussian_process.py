import numpy as np
import pytest
import torch

from mtl.linear import HierarchicalGP, MeanRegularizedRidge
from mtl.linear.gaussian_process import _Kernels, _Model, _pad, _spread_over_tasks


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    task = random.permutation(np.repeat(np.arange(3), (5, 9, 14)))
    return random.normal(size=(28, 2)), random.normal(size=28), task


def test_bound_and_posterior_are_the_exact_process_where_all_rows_are_inducing(
    rows: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    features, target, task = rows
    inputs, outputs = torch.from_numpy(features), torch.from_numpy(target)
    groups = torch.tensor([0, 1])
    kernels = _Kernels.of(torch.randn(_Kernels.size(groups), dtype=torch.float64) * 0.3, groups)
    same = torch.from_numpy(task[:, None] == task)
    covariance = kernels.shared(inputs, inputs) + same * kernels.own(inputs, inputs)
    noisy = covariance + kernels.noise * torch.eye(28, dtype=torch.float64)
    constant = 14 * float(np.log(2 * np.pi))
    exact = torch.distributions.MultivariateNormal(torch.zeros(28, dtype=torch.float64), noisy).log_prob(outputs)

    model, padded = _Model(kernels, inputs), _pad(features, target, task)
    assert np.isclose(-float(model.bound(padded)) - constant, float(exact), atol=1e-2)
    fewer = -float(_Model(kernels, inputs[:6]).bound(padded)) - constant
    assert fewer < float(exact)

    posterior = model.posterior(padded)
    mean = model.features(inputs) @ posterior.shared
    for number in range(3):
        own = torch.from_numpy(np.flatnonzero(task == number))
        mean[own] += kernels.own(inputs[own], padded.inputs[number]) @ posterior.own[number]
    assert torch.allclose(mean, covariance @ torch.linalg.solve(noisy, outputs), atol=1e-4)


def test_finds_interactions_and_deviations_that_a_linear_model_cannot() -> None:
    random = np.random.default_rng(0)
    task = np.repeat(np.arange(6), 40)
    features = random.normal(size=(240, 2))
    target = features[:, 0] * features[:, 1] + random.normal(size=6)[task] + 0.1 * random.normal(size=240)
    train = np.arange(240) % 2 == 0
    scores = [
        model.fit(features[train], target[train], task[train]).score(features[~train], target[~train], task[~train])
        for model in (MeanRegularizedRidge("cv"), HierarchicalGP(num_inducing=50))
    ]
    assert scores[1] > 0.95
    assert scores[0] < 0.7


def test_tuning_on_fewer_rows_takes_some_of_every_task() -> None:
    task = np.repeat(np.arange(5), (10, 20, 40, 80, 50))
    chosen = _spread_over_tasks(task, 40, np.random.default_rng(0))
    assert len(set(chosen.tolist())) == 40
    assert np.allclose(np.bincount(task[chosen]), [2, 4, 8, 16, 10], atol=1)
    assert sorted(_spread_over_tasks(task, 1000, np.random.default_rng(0))) == list(range(200))
