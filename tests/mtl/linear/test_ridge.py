from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.linear_model import Ridge

from mtl.linear import (
    HierarchicalGP,
    IndependentRidge,
    MeanRegularizedRidge,
    MixedEffectsRegressor,
    PooledRidge,
    TraceNormRegressor,
)
from mtl.linear.base import TaskRegressor, folds_of
from mtl.linear.statistics import Scaling

ESTIMATORS: list[TaskRegressor] = [
    IndependentRidge(),
    PooledRidge(),
    MeanRegularizedRidge(),
    TraceNormRegressor(),
    TraceNormRegressor("deviations"),
    HierarchicalGP(max_iter=3, num_inducing=10),
    MixedEffectsRegressor(max_iter=5),
]
LINEAR = ESTIMATORS[:5]

Data = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]


def make_data(sizes: tuple[int, ...] = (4, 9, 30, 12), num_features: int = 5, noise: float = 0.3) -> Data:
    """Rows of tasks 10, 20, ... in random order; the second feature is an indicator, the last one is constant."""
    random = np.random.default_rng(0)
    task = random.permutation(np.repeat(10 * np.arange(1, len(sizes) + 1), sizes))
    features = random.normal(size=(len(task), num_features)) * [3, 1, 1, 0.1, 1][:num_features] + 2
    features[:, 1] = features[:, 1] > 3
    features[:, -1] = 7
    weights = random.normal(size=num_features) + 0.3 * random.normal(size=(len(sizes) + 1, num_features))
    target = (features * weights[task // 10]).sum(1) + task / 10 + noise * random.normal(size=len(task))
    return features, target, task


def columns(features: NDArray[np.float64], target: NDArray[np.float64]) -> tuple[Any, Any]:
    scaling = Scaling.of(features, target)
    return scaling.columns(features), target - target.mean()


def test_scaling_makes_numbers_and_balanced_indicators_alike() -> None:
    features, target, _ = make_data()
    found = Scaling.of(features, target).columns(features)
    assert np.allclose(found[:, [0, 2, 3]].std(0), 0.5)
    assert np.isclose(np.ptp(found[:, 1]), 1)
    assert np.allclose(found[:, :4].mean(0), 0)
    assert np.all(found[:, 4] == 0)
    assert np.all(found[:, 5] == 1)


def test_independent_ridge_is_ridge_on_each_task() -> None:
    features, target, task = make_data()
    model = IndependentRidge(2.0).fit(features, target, task)
    design, centered = columns(features, target)
    for name in np.unique(task):
        rows = task == name
        oracle = Ridge(2.0, fit_intercept=False).fit(design[rows], centered[rows])
        predicted = model.predict(features[rows], task[rows])
        assert np.allclose(predicted, oracle.predict(design[rows]) + target.mean(), atol=1e-9)


def test_pooled_ridge_is_ridge_on_all_rows() -> None:
    features, target, task = make_data()
    design, _ = columns(features, target)
    oracle = Ridge(2.0).fit(design[:, :-1], target)
    found = PooledRidge(2.0).fit(features, target, task).predict(features, task)
    assert np.allclose(found, oracle.predict(design[:, :-1]), atol=1e-9)


@pytest.mark.parametrize("alpha", [0.01, 1.0, 100.0])
def test_ridge_to_the_mean_solves_the_whole_linear_system(alpha: float) -> None:
    features, target, task = make_data()
    design, centered = columns(features, target)
    index = task // 10 - 1
    num_rows, size = design.shape
    # unknowns w, v_1, ..., v_T with w_t = w + v_t
    big = np.zeros((num_rows, 5 * size))
    big[:, :size] = design
    for row, number in enumerate(index):
        big[row, (1 + number) * size : (2 + number) * size] = design[row]
    penalty = np.concatenate([0.5 * np.ones(size - 1), [0], alpha * np.ones(4 * size)])
    solution = np.linalg.lstsq(big.T @ big + np.diag(penalty), big.T @ centered, rcond=None)[0]
    found = MeanRegularizedRidge(alpha, shared_alpha=0.5).fit(features, target, task)
    assert np.allclose(found.predict(features, task), big @ solution + target.mean(), atol=1e-7)


def test_ridge_to_the_mean_lies_between_the_two_extremes() -> None:
    features, target, task = make_data()
    strong = MeanRegularizedRidge(1e9).fit(features, target, task)
    pooled = PooledRidge(1.0).fit(features, target, task)
    assert np.allclose(strong.coef_, pooled.coef_, atol=1e-4)
    assert np.allclose(strong.intercept_, pooled.intercept_, atol=1e-4)
    weak = MeanRegularizedRidge(1e-9).fit(features, target, task)
    alone = IndependentRidge(1e-9).fit(features, target, task)
    rows = task != 10  # 4 rows do not determine 5 weights
    assert np.allclose(weak.predict(features[rows], task[rows]), alone.predict(features[rows], task[rows]), atol=1e-3)


@pytest.mark.parametrize("estimator", LINEAR, ids=str)
def test_units_and_origins_do_not_matter(estimator: TaskRegressor) -> None:
    features, target, task = make_data()
    expected = clone(estimator).fit(features, target, task).predict(features, task)
    moved = features * [1e3, 2, 1e-3, 5, 1] + [1, -4, 0, 100, 9]
    found = clone(estimator).fit(moved, 10 * target + 5, task)
    if isinstance(estimator, TraceNormRegressor):  # its penalty is not quadratic, so it scales with y
        found = clone(estimator).set_params(alpha=10.0).fit(moved, 10 * target + 5, task)
    assert np.allclose(
        (found.predict(moved, task) - 5) / 10, expected, atol=2e-2 if "Trace" in str(estimator) else 1e-6
    )


@pytest.mark.parametrize("estimator", LINEAR, ids=str)
def test_cross_validation_finds_the_error_that_refitting_has(estimator: Any) -> None:
    features, target, task = make_data((12, 12, 15, 20))
    model = clone(estimator).set_params(alpha="cv", alphas=[30.0, 0.3, 3.0], folds=3).fit(features, target, task)
    assert model.cv_alphas_.tolist() == [30.0, 3.0, 0.3]
    assert model.alpha_ == model.cv_alphas_[model.cv_errors_.argmin()]
    again = clone(estimator).set_params(alpha=model.alpha_).fit(features, target, task)
    assert np.allclose(model.coef_, again.coef_, atol=1e-2)
    assert model.cv_errors_.min() >= 0


def test_cross_validation_errors_are_those_of_held_out_rows() -> None:
    features, target, task = make_data((12, 12, 15, 20))
    design, centered = columns(features, target)
    index = task // 10 - 1
    model = IndependentRidge("cv", alphas=[1.0], folds=4).fit(features, target, task)
    error, seen = 0.0, np.zeros(len(task), int)
    for held_out in folds_of(index, 4, 0):
        seen += held_out
        for number in range(4):
            fit_on, test_on = ~held_out & (index == number), held_out & (index == number)
            oracle = Ridge(1.0, fit_intercept=False).fit(design[fit_on], centered[fit_on])
            error += ((centered[test_on] - oracle.predict(design[test_on])) ** 2).sum()
            assert test_on.sum() in ((index == number).sum() // 4, -(-(index == number).sum() // 4))
    assert seen.tolist() == [1] * len(task)
    assert np.isclose(model.cv_errors_[0], error / len(task))


def test_related_tasks_gain_from_one_another() -> None:
    random = np.random.default_rng(1)
    task = np.repeat(np.arange(30), 12)
    weights = random.normal(size=8) + 0.1 * random.normal(size=(30, 8))
    features = random.normal(size=(len(task), 8))
    target = (features * weights[task]).sum(1) + random.normal(size=len(task))
    test = random.normal(size=(len(task), 8))
    truth = (test * weights[task]).sum(1)
    scores = {
        str(model): model.fit(features, target, task).score(test, truth, task)
        for model in (IndependentRidge("cv"), MeanRegularizedRidge("cv"), TraceNormRegressor("deviations", "cv"))
    }
    alone, *shared = scores.values()
    assert min(shared) > alone + 0.02


# what every estimator promises


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_follows_the_conventions_of_scikit_learn(estimator: TaskRegressor) -> None:
    features, target, task = make_data()
    before = estimator.get_params()
    model = clone(estimator)
    assert model.get_params() == before
    copies = features.copy(), target.copy(), task.copy()
    assert model.fit(features, target, task) is model
    assert model.get_params() == before
    assert all(np.array_equal(*pair) for pair in zip(copies, (features, target, task), strict=True))
    assert model.n_features_in_ == 5
    assert model.tasks_.tolist() == [10, 20, 30, 40]
    predicted = model.predict(features, task)
    assert predicted.shape == target.shape
    assert np.allclose(predicted[::-1], model.predict(features[::-1], task[::-1]))
    error = ((target - predicted) ** 2).sum() / ((target - target.mean()) ** 2).sum()
    assert np.isclose(model.score(features, target, task), 1 - error)
    assert np.array_equal(
        clone(estimator).fit(features.tolist(), target.tolist(), task).predict(features, task), predicted
    )


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_one_task_and_one_row_are_enough(estimator: TaskRegressor) -> None:
    features, target, _ = make_data()
    one = np.zeros(len(target), int)
    model = clone(estimator).fit(features, target, one)
    assert np.isfinite(model.predict(features, one)).all()
    model = clone(estimator).fit(features[:1], target[:1], one[:1])
    assert np.allclose(model.predict(features[:3], one[:3]), target[0])


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_bad_input_is_named(estimator: TaskRegressor) -> None:
    features, target, task = make_data()
    broken = features.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="Input X contains NaN"):
        clone(estimator).fit(broken, target, task)
    with pytest.raises(ValueError, match="y contains NaN"):
        clone(estimator).fit(features, np.where(task == 10, np.nan, target), task)
    with pytest.raises(ValueError, match=r"task has shape \(3,\), but X has 55 rows"):
        clone(estimator).fit(features, target, task[:3])
    with pytest.raises(ValueError, match=r"y has shape \(3,\)"):
        clone(estimator).fit(features, target[:3], task)
    with pytest.raises(ValueError, match="dtype float64, but tasks are integers"):
        clone(estimator).fit(features, target, task / 10)
    with pytest.raises(ValueError, match="not fitted yet"):
        clone(estimator).predict(features, task)
    model = clone(estimator).fit(features, target, task)
    with pytest.raises(ValueError, match="task 25 was not there in training"):
        model.predict(features[:2], [10, 25])
    with pytest.raises(ValueError, match="task 99 was not there in training"):
        model.predict(features[:2], [99, 10])
    with pytest.raises(ValueError, match="X has 4 features, but was fitted with 5"):
        model.predict(features[:, :4], task)


@pytest.mark.parametrize(
    ("estimator", "match"),
    [
        (PooledRidge(-1.0), "alpha is -1.0"),
        (PooledRidge("best"), "alpha is 'best'"),  # type: ignore[arg-type]
        (PooledRidge("cv", alphas=[]), "at least one number"),
        (PooledRidge("cv", alphas=[1, -1]), "all of them >= 0"),
        (PooledRidge("cv", folds=1), "at least 2"),
        (MeanRegularizedRidge(shared_alpha=-1), "shared_alpha is -1"),
        (TraceNormRegressor("rank"), "of is 'rank'"),  # type: ignore[arg-type]
        (HierarchicalGP(groups=[0, 1]), "5 integers"),
        (MixedEffectsRegressor(groups=[-1] * 5), "5 integers"),
        (MixedEffectsRegressor(max_iter=0), "max_iter=0"),
        (HierarchicalGP(num_inducing=0), "num_inducing is 0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_named(estimator: TaskRegressor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        estimator.fit(*make_data())
