from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl import L2Coupling, TraceNorm
from mtl.sharing.couplings import Coupling, Stacked

TASKS = ("a", "b", "c")


def stacked(step: int = 0, **shapes: tuple[int, ...]) -> Stacked:
    torch.manual_seed(1)
    shapes = shapes or {"conv.weight": (4, 3, 2, 2), "conv.bias": (4,), "scale": ()}
    tensors = {name: torch.randn(len(TASKS), *shape, dtype=torch.float64) for name, shape in shapes.items()}
    return Stacked(TASKS, tensors, torch.tensor(step))


def norm(matrix: Tensor) -> float:
    return float(np.linalg.svd(matrix.numpy(), compute_uv=False).sum())


def by_hand(stack: Tensor, unfold: str) -> float:
    array = stack.numpy()
    if unfold == "last":
        matrices = [array.reshape(len(array), -1)]
    elif unfold == "tucker":
        matrices = [np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for axis in range(array.ndim)]
    else:
        sizes = [int(np.prod(array.shape[:axis])) for axis in range(1, max(array.ndim, 2))]
        matrices = [array.reshape(size, -1) for size in sizes]
    return sum(norm(torch.from_numpy(matrix)) for matrix in matrices)


@pytest.mark.parametrize("unfold", ["last", "tucker", "tt"])
@pytest.mark.parametrize("of", ["weights", "deviations"])
def test_trace_norm_is_the_sum_of_singular_values_of_every_unfolding(unfold: Any, of: Any) -> None:
    stacks = stacked()
    base = {name: t - t.mean(0) if of == "deviations" else t for name, t in stacks.tensors.items()}
    expected = 0.5 * sum(by_hand(tensor, unfold) for tensor in base.values())
    assert float(TraceNorm(0.5, unfold=unfold, of=of).penalty(stacks)) == pytest.approx(expected)


@pytest.mark.parametrize("of", ["weights", "deviations"])
@pytest.mark.parametrize("unfold", ["last", "tucker", "tt"])
def test_gradient_of_the_trace_norm_by_finite_differences(unfold: Any, of: Any) -> None:
    coupling = TraceNorm(0.3, unfold=unfold, of=of)
    weight = stacked(w=(2, 3, 2)).tensors["w"].requires_grad_()
    # of deviations: centred rows have a zero singular value, which no perturbation moves
    assert torch.autograd.gradcheck(lambda w: coupling.penalty(Stacked(TASKS, {"w": w}, torch.tensor(0))), weight)


@pytest.mark.parametrize("of", ["weights", "deviations"])
def test_proximal_step_minimises_distance_plus_penalty(of: Any) -> None:
    stacks = stacked(w=(4, 5))
    before, lr, strength = stacks.tensors["w"].clone(), 0.1, 40.0
    coupling = TraceNorm(strength, of=of, proximal=True)
    assert coupling.penalty(stacks) == 0.0
    coupling.proximal_step(stacks, lr)
    after = stacks.tensors["w"]

    def objective(tensor: Tensor) -> float:
        penalty = TraceNorm(strength, of=of).penalty(Stacked(TASKS, {"w": tensor}, torch.tensor(0)))
        return float((tensor - before).square().sum() / 2 + lr * penalty)

    mean = before.mean(0) if of == "deviations" else torch.zeros(())
    left, values, right = np.linalg.svd((before - mean).flatten(1).numpy(), full_matrices=False)
    expected = left @ np.diag(np.maximum(values - lr * strength, 0)) @ right
    np.testing.assert_allclose((after - mean).flatten(1).numpy(), expected, atol=1e-12)
    assert 0 < np.linalg.matrix_rank(expected) < np.linalg.matrix_rank((before - mean).flatten(1).numpy())
    for _ in range(20):
        assert objective(after) <= objective(after + 0.05 * torch.randn_like(after))


@pytest.mark.parametrize("unfold", ["tucker", "tt"])
def test_proximal_steps_of_several_unfoldings_lower_every_one_of_them(unfold: Any) -> None:
    stacks = stacked()
    before = {name: by_hand(tensor, unfold) for name, tensor in stacks.tensors.items()}
    TraceNorm(1.0, unfold=unfold, proximal=True).proximal_step(stacks, lr=0.1)
    assert all(by_hand(tensor, unfold) < before[name] for name, tensor in stacks.tensors.items())


@pytest.mark.parametrize(
    ("to", "weights"),
    [
        ("pairwise", dict.fromkeys(combinations(TASKS, 2), 1.0)),
        ({("a", "b"): 2.0, ("c", "b"): 0.5}, {("a", "b"): 2.0, ("b", "c"): 0.5}),
    ],
)
def test_l2_is_the_sum_over_pairs(to: Any, weights: dict[tuple[str, str], float]) -> None:
    stacks = stacked()
    expected = sum(
        weight * (tensor[TASKS.index(i)] - tensor[TASKS.index(j)]).square().sum()
        for (i, j), weight in weights.items()
        for tensor in stacks.tensors.values()
    )
    torch.testing.assert_close(L2Coupling(0.7, to=to).penalty(stacks), 0.7 * expected)


def test_l2_to_the_mean() -> None:
    stacks = stacked()
    expected = sum(
        (tensor[task] - sum(tensor) / 3).square().sum() for tensor in stacks.tensors.values() for task in range(3)
    )
    torch.testing.assert_close(L2Coupling(0.7).penalty(stacks), 0.7 * expected)


def test_sums_add_penalties_and_take_all_steps() -> None:
    stacks = stacked()
    parts = L2Coupling(0.1), TraceNorm(0.2), TraceNorm(5.0, proximal=True)
    both: Coupling = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(both.penalty(stacks), parts[0].penalty(stacks) + parts[1].penalty(stacks))
    other = stacked()
    both.proximal_step(stacks, 0.1)
    parts[2].proximal_step(other, 0.1)
    torch.testing.assert_close(stacks.tensors, other.tensors)


def test_the_first_pattern_that_matches_gives_the_strength() -> None:
    stacks = stacked()
    coupling = L2Coupling({"*.bias": 0.0, "conv.*": 3.0})
    only = Stacked(TASKS, {"conv.weight": stacks.tensors["conv.weight"]}, stacks.step)
    torch.testing.assert_close(coupling.penalty(stacks), L2Coupling(3.0).penalty(only))
    coupling.check(stacks)
    with pytest.raises(ValueError, match=r"no matched parameter has a name like 'linear.\*'; there are conv.weight"):
        L2Coupling({"linear.*": 1.0}).check(stacks)


def test_warmup_raises_the_strength_linearly() -> None:
    full = float(L2Coupling(1.0).penalty(stacked()))
    values = [float(L2Coupling(1.0, warmup=4).penalty(stacked(step))) for step in (0, 1, 3, 9)]
    assert values == pytest.approx([full / 4, full / 2, full, full])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2Coupling(-1.0), "strength is -1.0"),
        (lambda: TraceNorm(float("nan")), "strength is nan"),
        (lambda: TraceNorm(1.0, warmup=-1), "warmup is -1"),
        (lambda: TraceNorm(1.0, unfold="first"), "unfold is 'first'"),  # type: ignore[arg-type]
        (lambda: TraceNorm(1.0, of="sums"), "of is 'sums'"),  # type: ignore[arg-type]
        (lambda: L2Coupling(1.0, to="median"), "to is 'median'"),
        (lambda: L2Coupling(1.0, to={("a", "a"): 1.0}), r"the pair \('a', 'a'\)"),
        (lambda: L2Coupling(1.0, to={("a", "b"): 1.0, ("b", "a"): 2.0}), "two weights"),
        (lambda: L2Coupling(1.0, to={("a", "z"): 1.0}).check(stacked()), "no task 'z'"),
    ],
)
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
