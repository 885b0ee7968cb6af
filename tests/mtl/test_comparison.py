from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from scipy import stats
from torch import nn

from mtl import Comparison, FitOptions, HardShared, Method, Task, compare, evaluate, fit
from mtl.comparison import standard_method
from mtl.data import TensorLoader

TASKS = [Task.classification("a"), Task.regression("b")]
OPTIONS = FitOptions(device="cpu", progress=False, lr=0.05)


def data(seed: int = 0) -> TensorLoader:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, 4, generator=generator)
    return TensorLoader(inputs, {"a": (inputs.sum(1) > 0).long(), "b": inputs.sum(1)}, batch_size=20, shuffle=True)


def trunk() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())


def head(task: Task) -> nn.Module:
    return nn.Linear(8, 2 if task.name == "a" else 1)


def test_every_method_is_trained_with_every_seed_on_its_tasks(tmp_path: Path) -> None:
    calls: list[tuple[list[str], int]] = []

    def build(tasks: list[Task]) -> nn.Module:
        calls.append(([task.name for task in tasks], torch.initial_seed()))
        return HardShared(trunk(), {task.name: head(task) for task in tasks})

    methods = ["single", "hard", "private norms", "soft:l2", Method("mine", build, weighting="uncertainty")]
    found = compare(
        TASKS, data(), methods, test=data(1), trunk=trunk, head=head, seeds=[3, 5], epochs=2, options=OPTIONS,
        folder=tmp_path,
    )  # fmt: skip
    assert calls == [(["a", "b"], 3), (["a", "b"], 5)]
    assert found.reference == "single"
    assert found.delta_m("single") == [0, 0]
    alone = {task.name: HardShared(trunk(), {task.name: head(task)}) for task in TASKS}
    assert found.parameters["single"] == sum(p.numel() for model in alone.values() for p in model.parameters())
    assert found.parameters["hard"] < found.parameters["single"]
    for method in found.metrics:
        assert {task: len(values) for task, values in found.metrics[method].items()} == {"a": 2, "b": 2}
    assert (tmp_path / "single" / "seed-3" / "a" / "fit.pt").exists()

    torch.manual_seed(5)
    model = HardShared(trunk(), {"b": head(TASKS[1])})
    fit(model, TASKS[1], data(), 2, options=FitOptions(device="cpu", progress=False, lr=0.05, seed=5))
    assert evaluate(model, TASKS[1], data(1))["b"] == pytest.approx(found.metrics["single"]["b"][1])

    again = compare(
        TASKS, data(), methods, test=data(1), trunk=trunk, head=head, seeds=[3, 5], epochs=2, options=OPTIONS,
        folder=tmp_path,
    )  # fmt: skip
    for method, row in found.metrics.items():
        for task, values in row.items():
            assert again.metrics[method][task] == pytest.approx(values)


def test_first_layers_are_one_for_all_tasks_and_later_ones_each_tasks_own() -> None:
    def deep() -> nn.Module:
        return nn.Sequential(trunk(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8))

    trained = {}
    for name in ("first layers", "first layers:2"):
        method = standard_method(name, deep, head)
        model = method.build(TASKS)
        assert isinstance(model, HardShared)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        fit(model, TASKS, data(), 1, options=OPTIONS)
        assert all((before[key] != value).any() for key, value in model.state_dict().items() if "weight" in key)
        trained[name] = sum(parameter.numel() for parameter in model.parameters())
    first, second, third, heads = 4 * 8 + 8 + 16, 8 * 8 + 8 + 16, 8 * 8 + 8, 8 * 3 + 3
    assert trained == {
        "first layers": first + 2 * (second + third) + heads,  # one of three layers
        "first layers:2": first + second + 2 * third + heads,
    }


def test_tied_weights_behind_the_first_layers_are_private_too() -> None:
    def tied() -> nn.Module:
        layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        layers[2].weight = layers[1].weight
        return layers

    model = standard_method("first layers", tied, head).build(TASKS)
    assert isinstance(model, HardShared)
    assert {name for name, _ in model.stem.named_parameters()} == {"0.weight", "0.bias"}  # type: ignore[union-attr]
    first, second = model.trunks.values()  # type: ignore[union-attr]
    assert first[0].weight is first[1].weight
    assert first[0].weight is not second[0].weight


def test_one_trunk_and_then_a_copy_for_each_task(tmp_path: Path) -> None:
    found = compare(
        TASKS, data(), "hard then apart:0.3", test=data(1), trunk=trunk, head=head, seeds=[4], epochs=3,
        options=OPTIONS, folder=tmp_path,
    )  # fmt: skip
    options = replace(OPTIONS, seed=4)
    torch.manual_seed(4)
    model = HardShared(trunk(), {task.name: head(task) for task in TASKS})
    fit(model, TASKS, data(), 1, options=options)
    assert model.trunk is not None
    alone = HardShared(model.trunk, model.heads, private=("*",))
    assert sum(p.numel() for p in alone.parameters()) == found.parameters["hard then apart:0.3"]
    fit(alone, TASKS, data(), 2, options=options)
    for task, value in evaluate(alone, TASKS, data(1)).items():
        assert found.metrics["hard then apart:0.3"][task] == [pytest.approx(value)]


def test_tasks_with_data_of_their_own_are_trained_apart_on_theirs() -> None:
    both = data()
    assert isinstance(both.targets, dict)
    own = {name: TensorLoader(both.inputs, target, batch_size=20) for name, target in both.targets.items()}
    found = compare(
        TASKS, own, ["single", "hard"], test=own, trunk=trunk, head=head, seeds=1, epochs=1, options=OPTIONS
    )
    assert set(found.metrics) == {"single", "hard"}


def test_the_table_shows_mean_deviation_and_gain() -> None:
    metrics = {"single": {"a": [0.5, 0.6], "b": [2.0, 4.0]}, "hard": {"a": [0.6, 0.6], "b": [1.0, 4.0]}}
    found = Comparison(metrics, {"a": "max", "b": "min"}, "single", [0, 1])
    gains = [(20 + 50) / 2, 0.0]
    assert found.delta_m("hard") == pytest.approx(gains)
    text = str(found)
    assert "0.55 ± 0.071" in text
    assert f"{mean(gains):+.2f} ± {stdev(gains):.2g}" in text
    assert found.to_json()["delta_m"]["hard"] == pytest.approx(gains)
    expected = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert found.interval("hard") == pytest.approx((expected.low, expected.high))
    assert f"{expected.low:+.2f} to {expected.high:+.2f}" in text
    assert found.better("hard") == 2
    assert "2 of 2" in text


def test_one_seed_has_no_interval_and_says_so() -> None:
    metrics = {"single": {"a": [0.5], "b": [2.0]}, "hard": {"a": [0.4], "b": [1.0]}}
    found = Comparison(metrics, {"a": "max", "b": "min"}, "single", [0])
    assert found.interval("hard") is None
    assert "one seed" in str(found)
    assert "1 of 2" in str(found)


def test_many_tasks_have_a_table_of_their_own() -> None:
    tasks = [f"task{index}" for index in range(12)]
    metrics = {"single": {task: [0.5, 0.7] for task in tasks}, "hard": {task: [0.8, 0.8] for task in tasks}}
    found = Comparison(metrics, dict.fromkeys(tasks, "max"), "single", [0, 1], {"single": 1200, "hard": 100})
    assert "mean of 12 tasks" in str(found)
    assert "1,200" in str(found)
    lines = found.by_task().splitlines()
    (line,) = (line for line in lines if "task11" in line)
    assert "0.6 ± 0.14" in line
    assert "0.8 ± 0" in line


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([], "give at least one"),
        (["hard", "hard"], "each with a name of its own"),
        (["hrad"], "unknown method 'hrad'"),
        (["hard:hard"], "unknown weighting 'hard'"),
        (["hard then apart:2"], r"part is 2.0, but it must be in \[0, 1\]"),
        (["first layers:two"], "unknown method 'first layers:two'"),
        (["first layers:1"], "1 first layers are to be shared, but the trunk has 1"),
    ],
)
def test_bad_methods_are_refused(methods: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(TASKS, data(), methods, test=data(), trunk=trunk, head=head, epochs=1, options=OPTIONS)
    with pytest.raises(ValueError, match="builds its models from trunk= and head="):
        compare(TASKS, data(), "hard", test=data())
