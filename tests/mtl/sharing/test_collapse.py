import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compress
from mtl import SoftShared, Task
from mtl.sharing.collapse import Collapsed, CollapsePlan, factorise

TASKS = [Task(name, loss=nn.MSELoss()) for name in "abcd"]


class Net(nn.Module):
    """In-place operators, a residual sum in place, and a layer called by function: what user code does."""

    def __init__(self, num_outputs: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.third = nn.Linear(6, 5)
        self.head = nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)), inplace=True)
        y = self.second(x)
        y += x
        y = y.relu_().mean(dim=(2, 3))
        return self.head(F.linear(y, self.third.weight, self.third.bias).relu())


def build(task: Task) -> nn.Module:
    return Net(2 + "abcd".index(task.name))


def stack(rank: int, *shape: int, shared: float = 1.0) -> Tensor:
    """Of all tasks: something in common, and deviations of this rank."""
    common = shared * torch.randn(1, *shape, dtype=torch.float64)
    return common + torch.tensordot(torch.randn(4, rank).double(), torch.randn(rank, *shape).double(), dims=1)


def model_of_ranks(**ranks: int) -> SoftShared:
    """Stacks whose names start with a key have deviations of that rank; the rest are the same for all tasks."""
    torch.manual_seed(0)
    model = SoftShared(build, TASKS).double().eval()
    with torch.no_grad():
        for name, parameter in model.stacks.named_parameters():
            rank = next((rank for key, rank in ranks.items() if name.startswith(key)), 0)
            parameter.copy_(stack(rank, *parameter.shape[1:]))
        for name, buffer in model.stacks.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(6).double() + 0.5)
    return model


def images() -> Tensor:
    return torch.randn(3, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


CASES: list[dict[str, int]] = [
    {},
    {"third": 1},
    {"second": 1, "third": 4},
    {"first": 2, "norm": 1},
    {"first": 4, "norm": 4, "second": 4},
]


@pytest.mark.parametrize("ranks", CASES)
@pytest.mark.parametrize("with_gradients", [True, False])
def test_outputs_stay_the_same(ranks: dict[str, int], with_gradients: bool) -> None:
    model = model_of_ranks(**ranks)
    small = model.collapse()
    with torch.set_grad_enabled(with_gradients):
        torch.testing.assert_close(small(images()), model(images()))
        own = {task.name: images() + index for index, task in enumerate(TASKS)}
        torch.testing.assert_close(small(own), model(own))
        torch.testing.assert_close(small(own["a"]), model(own["a"]))
    for task in TASKS:
        torch.testing.assert_close(small.task(task.name)(images()), model.task(task.name)(images()))
    assert size(small) < size(model)


def test_full_rank_stays_bit_for_bit() -> None:
    torch.manual_seed(0)
    layers = nn.Linear(50, 6), nn.ReLU(), nn.Linear(6, 9)
    model = SoftShared(lambda task: copy.deepcopy(nn.Sequential(*layers)), TASKS)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    small = model.eval().collapse()
    assert size(small) == size(model)
    rows = torch.randn(3, 50)
    torch.testing.assert_close(small(rows), model(rows), rtol=0, atol=0)


def macs(model: nn.Module) -> int:
    return compress.measure(model, images()).macs


def test_what_tasks_have_in_common_is_computed_once() -> None:
    first, second, third = 3 * 25 * 6 * 2 * 9, 3 * 25 * 6 * 3 * 9, 3 * 6 * 5
    heads = sum(3 * 5 * (2 + index) for index in range(4))
    assert macs(model_of_ranks()) == 4 * (first + second + third) + heads
    assert macs(model_of_ranks().collapse()) == first + second + third + heads
    # two bases instead of four convolutions; beyond them every task for itself
    assert macs(model_of_ranks(second=1).collapse()) == first + 2 * second + 4 * third + heads
    assert macs(model_of_ranks(first=1).collapse()) == 2 * first + 4 * (second + third) + heads


def test_outputs_that_are_the_same_for_all_tasks_are_still_each_task_s_own() -> None:
    model = SoftShared(lambda task: nn.Linear(4, 2), TASKS).collapse().eval()
    with torch.no_grad():
        outputs = model(torch.randn(3, 4))
        outputs["a"].zero_()
    assert float(outputs["b"].abs().min()) > 0


def test_random_operators_are_not_shared() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.randn_like(x)

    model = SoftShared(lambda task: Noisy(), TASKS).collapse().eval()
    with torch.no_grad():
        outputs = model(torch.zeros(3, 4))
    assert not torch.equal(outputs["a"], outputs["b"])


def test_an_input_that_the_models_write_to() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            rows = x[:2]
            before = self.linear(rows)
            rows.mul_(2)
            return before + self.linear(x[:2])

    model = SoftShared(lambda task: Writing(), TASKS)
    small = model.eval().collapse()
    with torch.no_grad():
        torch.testing.assert_close(small(torch.ones(3, 4)), model(torch.ones(3, 4)))


def test_rank_is_the_smallest_that_keeps_the_energy_of_the_differences() -> None:
    torch.manual_seed(0)
    weights = stack(4, 30, shared=50.0)
    differences = float((weights - weights.mean(0)).square().sum())
    for energy in (0.5, 0.9, 0.999):
        found = factorise(weights, energy)
        assert found.mixing is not None or energy > 0.99
        if found.mixing is None:
            continue
        error = float((torch.tensordot(found.mixing, found.basis, dims=1) - weights).square().sum())
        assert error <= (1 - energy) * differences
        left, values, right = torch.linalg.svd(weights, full_matrices=False)
        rank = len(found.basis)
        fewer = left[:, : rank - 1] @ torch.diag(values[: rank - 1]) @ right[: rank - 1]
        assert float((fewer - weights).square().sum()) > (1 - energy) * differences


def test_equal_models_become_one_in_float32() -> None:
    torch.manual_seed(0)
    weights = torch.randn(1, 40).repeat(5, 1)
    found = factorise(weights + 1e-7 * torch.randn(5, 40) * weights, 1.0)
    assert found.mixing is None
    assert found.basis.shape == (1, 40)


def test_energy_below_one_costs_no_more_than_it_says() -> None:
    model = model_of_ranks(second=4, third=4)
    sizes = [size(model.collapse(energy=energy)) for energy in (0.3, 0.7, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    with pytest.raises(ValueError, match="energy is 0"):
        model.collapse(energy=0)


def test_saved_and_restored() -> None:
    small = model_of_ranks(first=1, third=2).collapse()
    state = {name: value.clone() for name, value in small.state_dict().items()}  # a plain dict, as from safetensors
    again = Collapsed.restored(SoftShared(build, TASKS, init="different").double().eval(), state)
    assert again.ranks == small.ranks
    torch.testing.assert_close(again(images()), small(images()), rtol=0, atol=0)


def test_it_trains_further() -> None:
    small = model_of_ranks(first=1, second=1).collapse().train()
    before = copy.deepcopy(small.state_dict())
    optimizer = torch.optim.SGD(small.parameters(), lr=0.01)
    losses: list[Any] = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = sum(output.square().mean() for output in small(images()).values())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in small.parameters())
    assert not torch.equal(small.state_dict()["mixings.first.weight"], before["mixings.first.weight"])


@pytest.mark.parametrize("ranks", CASES[:4])
def test_pruning_it_is_exact(ranks: dict[str, int]) -> None:
    small = model_of_ranks(**ranks).collapse()
    assert compress.trace(small, images()).groups
    result = compress.prune(small, images(), budget=compress.Budget(macs=0.6))
    twin = compress.mask(small, result.plan)
    assert result.plan.exact
    with torch.no_grad():
        torch.testing.assert_close(result.model(images()), twin(images()))
    assert result.after.macs <= 0.6 * result.before.macs


# -- as a plan -------------------------------------------------------------------------------------------------------


def test_a_plan_makes_the_same_model_of_the_same_weights() -> None:
    model = model_of_ranks(first=1, third=2)
    small = model.collapse()
    plan = CollapsePlan.from_json(small.made_by.to_json())
    assert plan == small.made_by
    again = compress.apply(model, plan)
    assert again.ranks == small.ranks
    for task, output in small(images()).items():
        torch.testing.assert_close(again(images())[task], output, rtol=0, atol=1e-10)


def test_a_collapsed_and_pruned_stack_is_loaded_into_a_fresh_one(tmp_path: Path) -> None:
    small = model_of_ranks(first=1, third=2).collapse()
    compress.save(small, tmp_path / "collapsed.safetensors")
    result = compress.prune(small, images(), budget=compress.Budget(macs=0.6))
    compress.save(result, tmp_path / "pruned.safetensors")
    fresh = SoftShared(build, TASKS).double()
    for name, expected in {"collapsed": small, "pruned": result.model}.items():
        found = compress.load(fresh, tmp_path / f"{name}.safetensors").eval()
        assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in expected.parameters())
        for task, output in expected(images()).items():
            torch.testing.assert_close(found(images())[task], output, rtol=0, atol=0)
    again = compress.prune(found, images(), budget=compress.Budget(macs=0.6))  # and pruned further
    assert again.plan.exact
    assert again.after.macs <= 0.6 * result.after.macs


def test_a_plan_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    small = model_of_ranks(first=1).collapse()
    compress.save(small, tmp_path / "x.safetensors")
    fewer = SoftShared(build, TASKS[:3]).double()
    with pytest.raises(compress.ArtifactError, match=r"stacks of 4 tasks, which this SoftShared does not have"):
        compress.load(fewer, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="give a fresh SoftShared"):
        compress.apply(nn.Linear(2, 2), small.made_by)
    for text in (
        "{}",
        "[]",
        '{"kind":"prune","version":1}',
        small.made_by.to_json().replace('"version":1', '"version":2'),
    ):
        with pytest.raises(ValueError, match="not a plan of a collapse"):
            CollapsePlan.from_json(text)
