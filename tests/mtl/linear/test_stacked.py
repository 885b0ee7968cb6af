import math

import numpy as np
import pytest
from scipy.optimize import nnls
from sklearn.base import clone

from mtl.linear import IndependentRidge, MeanRegularizedRidge, PooledRidge, StackedRegressor
from mtl.linear.base import folds_of

Data = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_data(num_tasks: int = 12, num_rows: int = 30) -> Data:
    """Tasks that are neither alike nor unlike."""
    random = np.random.default_rng(0)
    task = np.repeat(np.arange(num_tasks) + 5, num_rows)
    features = random.normal(size=(len(task), 4))
    weights = np.array([1.0, -1.0, 0.5, 0.0]) + 0.4 * random.normal(size=(num_tasks, 4))
    target = 3 + (features * weights[task - 5]).sum(1) + random.normal(size=len(task))
    return features, target, task


ESTIMATORS = [("pooled", PooledRidge(1.0)), ("own", IndependentRidge(1.0)), ("mean", MeanRegularizedRidge(3.0))]


def test_the_weights_are_the_best_for_rows_that_were_held_out() -> None:
    features, target, task = make_data()
    model = StackedRegressor(ESTIMATORS, folds=4, spread=math.inf, random_state=3).fit(features, target, task)
    found = np.empty((len(target), 3))
    for held_out in folds_of(task, 4, 3):
        for column, (_, estimator) in enumerate(ESTIMATORS):
            fitted = clone(estimator).fit(features[~held_out], target[~held_out], task[~held_out])
            found[held_out, column] = fitted.predict(features[held_out], task[held_out])
    expected, residual = nnls(found - target.mean(), target - target.mean())
    assert np.allclose(model.weights_, expected, atol=1e-8)
    assert np.allclose(model.cv_errors_, ((found - target[:, None]) ** 2).mean(0))
    assert residual**2 / len(target) <= model.cv_errors_.min()
    alone = [estimator.fit(features, target, task).predict(features, task) for _, estimator in ESTIMATORS]
    combined = target.mean() + (np.stack(alone, 1) - target.mean()) @ expected
    assert np.allclose(model.predict(features, task), combined)


def test_a_prior_draws_the_weights_to_equal_ones() -> None:
    """With a prior deviation d and noise s^2, the weights minimise |y - X w|^2 / s^2 + |w - 1/K|^2 / d^2."""
    few = make_data(num_rows=3)
    weights = {
        spread: StackedRegressor(ESTIMATORS, spread=spread).fit(*few).weights_ for spread in (1e-4, 0.1, math.inf)
    }
    assert weights[1e-4] == pytest.approx([1 / 3] * 3, abs=1e-3)
    to_equal = {spread: np.linalg.norm(found - 1 / 3) for spread, found in weights.items()}
    assert to_equal[1e-4] < to_equal[0.1] < to_equal[math.inf]

    random = np.random.default_rng(1)
    found, targets = random.normal(size=(40, 3)), random.normal(size=40) + 1.0
    found += targets[:, None]
    noise = ((targets - found.mean(1)) ** 2).mean()
    gram = found.T @ found / noise + np.eye(3) / 0.2**2
    expected = np.linalg.solve(gram, found.T @ targets / noise + np.full(3, 1 / 3) / 0.2**2)
    assert (expected > 0).all()
    assert StackedRegressor(ESTIMATORS, spread=0.2)._best_weights(found, targets) == pytest.approx(expected)


def test_a_stack_of_one_is_nearly_that_one_and_estimators_are_copied() -> None:
    features, target, task = make_data()
    ridge = MeanRegularizedRidge(3.0)
    model = StackedRegressor([("ridge", ridge)]).fit(features, target, task)
    assert not hasattr(ridge, "coef_")
    assert model.weights_ == pytest.approx([1.0], abs=0.1)
    assert clone(model).get_params()["folds"] == 5


def test_a_task_with_one_row_is_never_held_out() -> None:
    features, target, task = make_data()
    alone = np.append(np.flatnonzero(task != 5), 0)
    model = StackedRegressor(ESTIMATORS, folds=2).fit(features[alone], target[alone], task[alone])
    assert np.isfinite(model.predict(features, task)).all()


def test_bad_input_is_named() -> None:
    features, target, task = make_data()
    with pytest.raises(ValueError, match="at least one, each with a name of its own"):
        StackedRegressor([]).fit(features, target, task)
    with pytest.raises(ValueError, match="at least one, each with a name of its own"):
        StackedRegressor([ESTIMATORS[0]] * 2).fit(features, target, task)
    with pytest.raises(ValueError, match="folds is 1"):
        StackedRegressor(ESTIMATORS, folds=1).fit(features, target, task)
    with pytest.raises(ValueError, match="spread 0.0"):
        StackedRegressor(ESTIMATORS, spread=0.0).fit(features, target, task)
    first = np.unique(task, return_index=True)[1]
    with pytest.raises(ValueError, match="every task has a single row"):
        StackedRegressor(ESTIMATORS).fit(features[first], target[first], task[first])
    model = StackedRegressor(ESTIMATORS).fit(features, target, task)
    with pytest.raises(ValueError, match="task 99 was not there"):
        model.predict(features[:1], [99])
