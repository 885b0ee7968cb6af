from typing import Any

import numpy as np
import pytest

from mtl.linear import HierarchicalGP, MixedEffectsRegressor
from mtl.linear.target import PowerTransform

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_data(num_tasks: int = 150, num_rows: int = 12) -> Data:
    """Slopes and intercepts of a task go together; two features multiply."""
    random = np.random.default_rng(0)
    task = np.repeat(np.arange(num_tasks), num_rows)
    features = random.normal(size=(len(task), 2))
    own = random.normal(size=(num_tasks, 1)) * [0.0, 1.0, -0.5] + 0.05 * random.normal(size=(num_tasks, 3))
    target = features[:, 0] - features[:, 0] * features[:, 1] + (features * own[task, :2]).sum(1) + own[task, 2]
    return features, target + 0.5 * random.normal(size=len(task)), task


def test_effects_are_the_posterior_mean_for_the_variances_that_were_found() -> None:
    features, target, task = make_data(num_tasks=6)
    model = MixedEffectsRegressor(max_iter=200, prior_tasks=5).fit(features, target, task)
    # With many steps the variances stand still, so those of the last step gave the effects.
    left, right = model._pairs
    own = model._scaling.columns(features)
    outputs = (target - target.mean()) / target.std()
    shared = np.column_stack([np.ones(len(own)), own[:, :-1], own[:, left] * own[:, right]])
    same = task[:, None] == task
    noise = model.noise_ * np.eye(len(own)) + same * (own @ model.covariance_ @ own.T)
    # the shared intercept has no prior, so nothing pulls it away from generalised least squares
    residual = outputs - shared @ model._shared
    assert abs(shared[:, 0] @ np.linalg.solve(noise, residual)) < 1e-3 * np.abs(residual).sum()
    for number in range(6):
        rows = task == number
        expected = model.covariance_ @ own[rows].T @ np.linalg.solve(noise[np.ix_(rows, rows)], residual[rows])
        assert np.allclose(model._own[number], expected, atol=2e-3)


def test_the_covariance_of_the_effects_is_found() -> None:
    features, target, task = make_data()
    model = MixedEffectsRegressor(prior_tasks=1, max_iter=100).fit(features, target, task)
    spread, scale = target.std(), np.append(model._scaling.scale, 1)
    offset = np.eye(3)
    offset[2, :2] = model._scaling.center / model._scaling.scale  # the intercept moves with the centres
    found = (offset @ (model.covariance_ * spread**2) @ offset.T) / np.outer(scale, scale)
    expected = np.outer([0, 1, -0.5], [0, 1, -0.5])
    assert np.allclose(found, expected, atol=0.25)
    assert np.isclose(model.noise_ * spread**2, 0.25, rtol=0.15)


def test_effects_that_go_together_help_where_rows_are_few() -> None:
    features, target, task = make_data(num_tasks=200, num_rows=8)
    train = np.arange(len(task)) % 2 == 0
    scores = [
        MixedEffectsRegressor(**options)
        .fit(features[train], target[train], task[train])
        .score(features[~train], target[~train], task[~train])
        for options in ({}, {"interactions": False}, {"prior_tasks": 1e9})
    ]
    assert scores[0] > scores[1] + 0.05
    assert scores[0] > scores[2] + 0.02


def test_no_products_within_a_group_and_no_squares_of_indicators() -> None:
    random = np.random.default_rng(0)
    features = np.column_stack([random.integers(0, 2, (50, 2)), random.normal(size=(50, 2))])
    model = MixedEffectsRegressor(groups=[0, 0, 1, 2]).fit(features, features[:, 0], np.zeros(50, int))
    assert {tuple(pair) for pair in model._pairs.T.tolist()} == {(0, 2), (0, 3), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3)}


@pytest.mark.parametrize("build", [MixedEffectsRegressor, lambda **o: HierarchicalGP(num_inducing=20, max_iter=8, **o)])
def test_a_power_predicts_the_mean_of_skewed_targets(build: Any) -> None:
    random = np.random.default_rng(0)
    features, task = random.uniform(-1, 1, (1500, 1)), np.arange(1500) // 50
    target = np.maximum(3 + 2 * features[:, 0] + random.normal(size=1500), 0) ** 2
    found = build(power=0.5).fit(features, target, task).predict(features, task)
    assert abs(found.mean() - target.mean()) < 0.3  # a plain power of the predicted mean is lower by 1, the variance
    assert abs(found - (3 + 2 * features[:, 0]) ** 2 - 1).mean() < 1
    with pytest.raises(ValueError, match=r"y holds -1, but power=0.5 needs targets >= 0"):
        build(power=0.5).fit(features, target - target.min() - 1, task)
    with pytest.raises(ValueError, match=r"power is 0, but it must be in \(0, 1\]"):
        build(power=0).fit(features, target, task)


def test_the_mean_of_a_power_is_an_integral() -> None:
    transform, random = PowerTransform(0.6), np.random.default_rng(0)
    means = np.array([0.5, 3.0, 10.0])
    samples = np.maximum(means + 0.7 * random.normal(size=(200_000, 3)), 0) ** (1 / 0.6)
    assert np.allclose(transform.mean(means, 0.49), samples.mean(0), rtol=0.01)
    targets = np.array([0.0, 1.0, 32.0])
    assert np.allclose(transform.mean(transform.forward(targets), 0.0), targets)
    assert np.array_equal(PowerTransform().forward(-targets), -targets)
