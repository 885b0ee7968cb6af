import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from mtl.linear import IndependentRidge, MeanRegularizedRidge, TraceNormRegressor
from mtl.linear.statistics import Array, Scaling, Statistics, statistics
from mtl.linear.trace_norm import Problem, minimize, shrink


def make_problem(num_tasks: int = 12, num_rows: int = 20, num_features: int = 6, rank: int = 2) -> tuple[Array, ...]:
    random = np.random.default_rng(0)
    task = random.permutation(np.repeat(np.arange(num_tasks), num_rows))
    features = random.normal(size=(len(task), num_features))
    weights = random.normal(size=(num_tasks, rank)) @ random.normal(size=(rank, num_features)) + 1
    return features, (features * weights[task]).sum(1) + 0.5 * random.normal(size=len(task)), task


def sums(data: tuple[Array, ...]) -> tuple[Array, Array, Statistics]:
    features, target, task = data
    scaling = Scaling.of(features, target)
    columns, centered = scaling.columns(features), target - target.mean()
    return columns, centered, statistics(columns, centered, task, int(task.max()) + 1)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (4, 4), (3, 1)])
def test_shrinking_lowers_every_singular_value(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    for threshold in (0.0, values[-1] * 1.01, values[0] * 0.7, values[0] * 2):
        expected = left @ np.diag(np.maximum(values - threshold, 0)) @ right
        assert np.allclose(shrink(matrix, threshold), expected, atol=1e-10)
    assert np.array_equal(shrink(np.zeros(shape), 0.5), np.zeros(shape))


@pytest.mark.parametrize("of", ["weights", "deviations"])
@pytest.mark.parametrize("alpha", [3.0, 20.0, 100.0])
def test_the_optimum_has_a_subgradient_of_zero(of: str, alpha: float) -> None:
    data = make_problem()
    columns, centered, everything = sums(data)
    ridge = np.diag([1.0] * 6 + [0.0]) if of == "deviations" else None
    problem = Problem(everything, ridge)
    found = minimize(problem, alpha, np.zeros((12, 7)), tol=1e-13, max_iter=20000)
    weights = found.penalized + problem.shared(found.penalized)
    # minus the gradient, from the rows themselves
    residual = centered - (columns * weights[data[2]]).sum(1)
    pull = np.array([columns[data[2] == number].T @ residual[data[2] == number] for number in range(12)])
    left, values, right = np.linalg.svd(found.penalized, full_matrices=False)
    rank = int((values > 1e-6 * max(values[0], 1e-9)).sum())
    left, right = left[:, :rank], right[:rank]
    # alpha U V^T plus something of norm <= alpha in the rest of the space (Watson 1992)
    tolerance = 1e-4 * alpha
    assert np.allclose(left.T @ pull @ right.T, alpha * np.eye(rank), atol=tolerance)
    assert np.allclose(left.T @ pull @ (np.eye(7) - right.T @ right), 0, atol=tolerance)
    assert np.allclose((np.eye(12) - left @ left.T) @ pull @ right.T, 0, atol=tolerance)
    assert np.linalg.norm(pull, 2) <= alpha + tolerance
    if ridge is not None:  # and the shared weights balance their ridge
        assert np.allclose(pull.sum(0), ridge @ problem.shared(found.penalized), atol=1e-8)


@pytest.mark.parametrize("of", ["weights", "deviations"])
def test_the_gap_bounds_the_distance_to_the_optimum(of: str) -> None:
    _, _, everything = sums(make_problem())
    problem = Problem(everything, np.diag([0.7] * 6 + [0.0]) if of == "deviations" else None)

    def objective(penalized: Array) -> float:
        shared = problem.shared(penalized)
        ridge = 0.0 if problem.ridge is None else shared @ problem.ridge @ shared
        value = everything.squared_error(penalized + shared) + ridge
        return float(value / 2 + 10.0 * np.linalg.norm(penalized, "nuc"))

    best = objective(minimize(problem, 10.0, np.zeros((12, 7)), 1e-13, 20000).penalized)
    unit = everything.square.sum() / 2
    for steps in (0, 1, 3, 10, 30, 100):
        point = minimize(problem, 10.0, np.zeros((12, 7)), 0.0, steps).penalized
        excess = (objective(point) - best) / unit
        assert -1e-12 <= excess <= problem.gap(point, 10.0) + 1e-12
    random = np.random.default_rng(1).normal(size=(12, 7))
    assert (objective(random) - best) / unit <= problem.gap(random, 10.0)


def test_the_gradient_is_that_of_the_objective() -> None:
    _, _, everything = sums(make_problem())
    problem = Problem(everything, np.diag([0.7] * 6 + [0.0]))
    random = np.random.default_rng(1)
    point, direction = random.normal(size=(2, 12, 7))

    def smooth(penalized: Array) -> float:
        shared = problem.shared(penalized)
        return (everything.squared_error(penalized + shared) + 0.7 * float(shared[:-1] @ shared[:-1])) / 2

    slope = (smooth(point + 1e-5 * direction) - smooth(point - 1e-5 * direction)) / 2e-5
    assert np.isclose(slope, np.vdot(problem.gradient(point), direction), rtol=1e-6)


def test_strong_penalties_leave_the_mean_or_the_pooled_model() -> None:
    features, target, task = make_problem()
    nothing = TraceNormRegressor("weights", 1e9).fit(features, target, task)
    assert np.allclose(nothing.predict(features, task), target.mean())
    pooled = TraceNormRegressor("deviations", 1e9, shared_alpha=2.0).fit(features, target, task)
    oracle = MeanRegularizedRidge(1e12, shared_alpha=2.0).fit(features, target, task)
    assert np.allclose(pooled.coef_, oracle.coef_, atol=1e-6)


def test_no_penalty_is_least_squares() -> None:
    features, target, task = make_problem()
    free = TraceNormRegressor("weights", 1e-7, tol=1e-12, max_iter=20000).fit(features, target, task)
    oracle = IndependentRidge(1e-9).fit(features, target, task)
    assert np.allclose(free.coef_, oracle.coef_, atol=1e-4)


def test_one_task_shrinks_the_length_of_its_weights() -> None:
    features, target, task = make_problem(num_tasks=1, num_rows=60)
    found = TraceNormRegressor("weights", 5.0, tol=1e-12).fit(features, target, task)
    columns, centered, _ = sums((features, target, task))
    weights = np.append(found.coef_[0] * Scaling.of(features, target).scale, 0)
    pull = columns.T @ (centered - columns @ weights)  # alpha w / ||w||
    assert np.allclose(pull, 5.0 * weights / np.linalg.norm(weights), atol=1e-3)


def test_the_rank_that_made_the_data_is_found_and_the_mean_costs_none() -> None:
    random = np.random.default_rng(0)
    task = np.repeat(np.arange(25), 40)
    features = random.normal(size=(len(task), 8))
    weights = random.normal(size=8) + random.normal(size=(25, 1)) * random.normal(size=8)  # one direction of deviation
    target = (features * weights[task]).sum(1) + 0.3 * random.normal(size=len(task))
    _, _, everything = sums((features, target, task))
    ranks = []
    for ridge in (None, np.diag([0.1] * 8 + [0.0])):
        found = minimize(Problem(everything, ridge), 40.0, np.zeros((25, 9)), 1e-9, 5000).penalized
        ranks.append(int(np.linalg.matrix_rank(found, tol=1e-6)))
    assert ranks == [2, 1]


def test_steps_that_run_out_are_told() -> None:
    model = TraceNormRegressor("weights", 1.0, max_iter=3)
    with pytest.warns(ConvergenceWarning, match="raise max_iter or tol"):
        model.fit(*make_problem())
    assert model.n_iter_ == 3
    assert model.duality_gap_ > model.tol
    assert TraceNormRegressor("weights", 1.0).fit(*make_problem()).duality_gap_ <= 1e-5
