"""Decompositions against brute force on rows, the raw SVD, and each other."""

import numpy as np
import pytest
import torch

from compress import PruneError
from compress.factorize.decompositions import RIDGE, Factorisation, Grouped, Problem, Split

SPLITS = {
    "matrix": ((9, 7), Split()),
    "tall": ((7, 12), Split()),
    "outputs": ((6, 5, 3, 3), Split((0, 1))),
    "inputs": ((6, 5, 3, 3), Split()),
    "vertical": ((6, 5, 3, 2), Split((0,))),
    "horizontal": ((4, 5, 3, 3), Split((1,))),
    "one axis": ((6, 5, 4), Split((0,))),
}


def example(shape: tuple[int, ...], seed: int = 0, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, correlated inputs (R, D) and importances."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    size = weight[0].numel()
    mixing = torch.randn(size, size, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, size).double()
    inputs = torch.randn(rows, size, dtype=torch.float64, generator=generator) @ mixing.T + 0.3
    return weight, inputs, torch.rand(shape[0], dtype=torch.float64, generator=generator) + 0.1


def merged(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    if first.dim() == 2:
        return second @ first
    return torch.einsum("oa...,ai...->oi...", second, first)  # one of the two has length 1 along each axis


@pytest.mark.parametrize("name", SPLITS)
def test_errors_are_those_of_the_outputs_at_every_rank(name: str) -> None:
    """Brute force: rows through both weights; the second factor by numpy's least squares on the first one's outputs."""
    shape, split = SPLITS[name]
    weight, inputs, importance = example(shape)
    found = Factorisation(Problem.of(weight, inputs.T @ inputs / len(inputs), importance), split)
    assert found.full_rank() == split.full_rank(shape) == len(found.errors) - 1
    assert (found.errors.diff() <= 1e-9 * found.errors[0]).all()
    for rank in range(1, found.full_rank() + 1):
        first, second, error = found.factors(rank, sweeps=0)
        lost = inputs @ (weight - merged(first, second)).flatten(1).T
        expected = float((lost.square().mean(0) * importance).sum())
        assert error == pytest.approx(expected, rel=1e-8, abs=1e-10 * found.problem.total)
        assert float(found.errors[rank]) == pytest.approx(expected, rel=1e-5, abs=1e-8 * found.problem.total)
    assert error <= 1e-10 * found.problem.total
    assert torch.allclose(merged(first, second), weight, atol=1e-6 if "inputs" in name else 1e-5)


@pytest.mark.parametrize("name", ["matrix", "tall", "outputs"])
def test_whitened_truncation_is_the_best_of_its_rank(name: str) -> None:
    """The oracle is Eckart-Young for the whitened matrix; the raw SVD is never better, and worse by far on average."""
    shape, split = SPLITS[name]
    ratios = []
    for seed in range(5):
        weight, inputs, importance = example(shape, seed)
        problem = Problem.of(weight, inputs.T @ inputs / len(inputs), importance)
        half = np.linalg.cholesky(problem.gram.numpy())
        white = importance.sqrt().numpy()[:, None] * weight.flatten(1).numpy() @ half
        singular = np.linalg.svd(white, compute_uv=False)
        left, values, right = np.linalg.svd(weight.flatten(1).numpy(), full_matrices=False)
        found = Factorisation(problem, split)
        for rank in range(1, found.full_rank()):
            _, _, error = found.factors(rank)
            assert error == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-7)
            raw = torch.from_numpy((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(shape)
            assert error <= problem.error(raw) * (1 + 1e-9)
            ratios.append(error / problem.error(raw))
    assert np.mean(ratios) < 0.7


@pytest.mark.parametrize("name", ["inputs", "vertical", "horizontal"])
def test_alternating_least_squares_only_helps_and_ends_where_no_small_step_does(name: str) -> None:
    shape, split = SPLITS[name]
    weight, inputs, importance = example(shape)
    problem = Problem.of(weight, inputs.T @ inputs / len(inputs), importance)
    found = Factorisation(problem, split)
    for rank in (1, 2, found.full_rank() - 1):
        start, refined = found.factors(rank, sweeps=0)[2], found.factors(rank)[2]
        assert refined <= start
        first, second, error = found.factors(rank, sweeps=60)
        assert error <= refined
        first.requires_grad_(), second.requires_grad_()
        difference = (weight - merged(first, second)).flatten(1)
        loss = (((difference @ problem.gram) * difference).sum(1) * importance).sum()
        slopes = torch.autograd.grad(loss, (first, second))
        assert max(float(slope.norm()) for slope in slopes) < 1e-2 * problem.total


def test_errors_of_two_nested_splits_add_up() -> None:
    """Tucker-2 on both sides: the outputs' split of what the inputs' split left."""
    weight, inputs, importance = example((6, 5, 3, 3))
    problem = Problem.of(weight, inputs.T @ inputs / len(inputs), importance)
    outer = Factorisation(problem, Split())
    inner = Factorisation(outer.following(outer.first[:3]), Split((0, 1)))
    reduce = outer.first[:3]
    for rank in (2, 4):
        core, expand, _ = inner.factors(rank)
        made = torch.einsum("oa,abyx,bi->oiyx", expand[..., 0, 0], core, reduce)
        assert problem.error(made) == pytest.approx(float(outer.errors[3] + inner.errors[rank]), rel=1e-6)


@pytest.mark.parametrize("name", SPLITS)
def test_singular_inputs_and_dead_outputs_give_finite_factors(name: str) -> None:
    shape, split = SPLITS[name]
    weight, inputs, importance = example(shape, rows=3)
    importance[0] = 0
    gram = inputs.T @ inputs / len(inputs)
    gram[0], gram[:, 0] = 0, 0
    for kind in (gram, torch.zeros_like(gram)):
        found = Factorisation(Problem.of(weight, kind, importance), split)
        for rank in (1, found.full_rank()):
            first, second, error = found.factors(rank)
            assert first.isfinite().all()
            assert second.isfinite().all()
            assert error >= 0
        assert error <= 1e-8 * found.problem.total
    zero = Factorisation(Problem.of(torch.zeros(shape), gram, torch.zeros(shape[0])), split)
    assert merged(*zero.factors(1)[:2]).abs().max() == 0


def test_bad_ranks_and_numbers_are_said() -> None:
    weight, _, _ = example((9, 7))
    found = Factorisation(Problem.of(weight), Split())
    for rank in (0, 8):
        with pytest.raises(PruneError, match=f"rank {rank} is not between 1 and 7"):
            found.factors(rank)
    with pytest.raises(PruneError, match="must be finite"):
        Problem.of(weight * float("nan"))
    with pytest.raises(PruneError, match=r"needs a Gram matrix \(7, 7\)"):
        Problem.of(weight, torch.eye(6))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["matrix", "vertical", "outputs"])
def test_errors_under_a_metric_are_those_that_it_gives(name: str, groups: int) -> None:
    """e^T Q e of rows through both weights, for a Q with a large part in every direction."""
    shape, split = SPLITS[name]
    weight, inputs, _ = example((shape[0] // 2 * 2, *shape[1:]))
    outputs = len(weight) // groups
    mixing = torch.randn(groups, outputs, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    metric = mixing @ mixing.mT + torch.eye(outputs, dtype=torch.float64)
    gram = (inputs.T @ inputs / len(inputs)).expand(groups, -1, -1)
    problem = Problem.under(weight, gram[0] if groups == 1 else gram, metric)
    assert torch.allclose(problem.outer(problem.weight), weight, atol=1e-10)
    level = metric.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    costs = (metric + RIDGE * level * torch.eye(outputs)) / (1 + RIDGE)
    found = Grouped(problem, split)
    first, second, error = found.factors(2)
    second = problem.outer(second)
    pairs = zip(first.chunk(groups), second.chunk(groups), strict=True)
    lost = [inputs @ (w - merged(a, b)).flatten(1).T for w, (a, b) in zip(weight.chunk(groups), pairs, strict=True)]
    expected = sum(float(((e @ q) * e).sum(1).mean()) for e, q in zip(lost, costs, strict=True))
    assert error == pytest.approx(expected, rel=1e-8)


def test_directions_that_cost_nothing_take_no_rank() -> None:
    weight, inputs, _ = example((8, 6))
    direction = torch.randn(8, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    metric = (direction @ direction.T)[None] * 100
    gram = inputs.T @ inputs / len(inputs)
    second_of_plain = Factorisation(Problem.of(weight, gram), Split()).factors(1)
    problem = Problem.under(weight, gram, metric)
    first, second, _ = Factorisation(problem, Split()).factors(1)

    def along(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((inputs @ (weight - merged(a, b)).T @ direction).square().mean())

    assert along(first, problem.outer(second)) < 0.1 * along(*second_of_plain[:2])


def test_refined_errors_are_about_those_of_the_factors() -> None:
    weight, inputs, importance = example((12, 8, 3, 3))
    found = Grouped(Problem.of(weight, inputs.T @ inputs / len(inputs), importance), SPLITS["vertical"][1])
    refined = found.refined_errors()
    assert (refined <= found.errors + 1e-12).all()
    ranks = list(range(2, found.full_rank() - 1, 3))
    left = torch.tensor([found.factors(rank)[2] for rank in ranks], dtype=torch.float64).log()
    wrong = [float((errors[ranks].log() - left).abs().mean()) for errors in (found.errors, refined)]
    assert wrong[1] < 0.6 * wrong[0]
