from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from mtl import Task
from mtl.data import TensorLoader
from mtl.sampling import batches_of, num_batches, steps_of

TASKS = [Task.regression("a"), Task.regression("b")]


def own(num_a: int = 12, num_b: int = 4) -> dict[str, TensorLoader]:
    numbers = {"a": torch.arange(float(num_a)), "b": 100 + torch.arange(float(num_b))}
    return {name: TensorLoader(values[:, None], values, batch_size=1, shuffle=True) for name, values in numbers.items()}


def seen(steps: Any, epoch: int = 1) -> dict[str, list[float]]:
    steps.seed(0, epoch)
    found: dict[str, list[float]] = {"a": [], "b": []}
    for batch in steps:
        for name, labels in batch.labels.items():
            found[name] += labels.values.tolist()
            assert torch.equal(batch.inputs[name][:, 0], labels.values)
    return found


def test_proportional_shows_every_sample_once() -> None:
    steps = steps_of(own(), TASKS, "proportional")
    assert len(steps) == 12
    found = seen(steps)
    assert sorted(found["a"]) == list(range(12))
    assert sorted(found["b"]) == [100, 101, 102, 103]


def test_uniform_shows_all_tasks_equally_often_and_repeats_in_another_order() -> None:
    steps = steps_of(own(), TASKS, "uniform")
    found = seen(steps)
    assert len(steps) == len(found["a"]) == len(found["b"]) == 8
    assert max(Counter(found["a"]).values()) == 1
    assert Counter(found["b"]) == dict.fromkeys((100, 101, 102, 103), 2)
    assert found["b"][:4] != found["b"][4:]


def test_square_root_lies_between() -> None:
    # 20 batches in all, shared out as sqrt(16) : sqrt(4)
    assert num_batches([16, 4], "sqrt") == [13, 7]
    assert num_batches([1000, 1], "proportional") == [1000, 1]
    assert num_batches([1000, 1], "sqrt")[1] >= 1


def test_the_rarer_task_is_spread_over_the_epoch() -> None:
    steps = steps_of(own(12, 3), TASKS, "proportional")
    steps.seed(0, 1)
    assert [index for index, batch in enumerate(steps) if "b" in batch.labels] == [3, 7, 11]


def test_the_order_depends_on_the_epoch_alone() -> None:
    data = TensorDataset(torch.arange(6.0)[:, None], torch.arange(6.0))
    steps = steps_of({"a": DataLoader(data, shuffle=True), "b": own()["b"]}, TASKS, "uniform")

    def order(epoch: int) -> dict[str, list[float]]:
        torch.manual_seed(epoch)
        return seen(steps, epoch)

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_evaluation_reads_each_task_in_turn() -> None:
    batches = list(batches_of(own(2, 1), TASKS))
    assert [list(batch.labels) for batch in batches] == [["a"], ["a"], ["b"]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": [1]}, r"task 'b' has no data: there are data for \['a'\]"),
        ({"a": [1], "b": [1], "c": [1]}, "there are data for 'c', which is no task"),
        ({"a": [1], "b": []}, "task 'b': the data hold no batch"),
        ({"a": [1], "b": iter([1])}, "task 'b': the data .* have no length"),
    ],
)
def test_a_task_without_data_is_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steps_of(data, TASKS, "proportional")
