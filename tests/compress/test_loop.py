"""Prune / Train / Repeat reaches its budget, stops when told, and takes the same path when interrupted anywhere."""

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compress
from compress import Budget, StopRule
from compress.errors import BudgetError, PruneError
from compress.loop import RunResult
from compress.rounds import RoundContext

EXAMPLE = torch.zeros(1, 1, 6, 6)
ROUNDS = 3
BUDGET = Budget(macs=0.4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 9, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(9)
        self.conv2 = nn.Conv2d(9, 14, 3, padding=1)
        self.head = nn.Linear(14, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.conv2(x)).mean((2, 3)))


def new_model() -> Net:
    torch.manual_seed(0)
    return Net()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (96,), generator=generator)
    return torch.randn(96, 1, 6, 6, generator=generator) + labels.view(-1, 1, 1, 1), labels


def train(model: nn.Module, context: RoundContext) -> None:
    """Two epochs in an order from the global generator, with a checkpoint in the context's folder after the first."""
    images, labels = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    saved = context.folder / "epoch1.pt"
    for epoch in range(2):
        if epoch == 0 and saved.exists():
            state = torch.load(saved, weights_only=True)
            model.load_state_dict(state["model"])
            torch.set_rng_state(state["random"])
            continue
        for batch in torch.randperm(len(images)).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch == 0:
            torch.save({"model": model.state_dict(), "random": torch.get_rng_state()}, saved)
            if os.environ.get("KILL_IN_ROUND") == str(context.round):
                os.kill(os.getpid(), signal.SIGKILL)


def evaluate(model: nn.Module) -> float:
    images, labels = data()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def run(folder: Path, **changes: object) -> RunResult:
    options = {"train": train, "evaluate": evaluate, "budget": BUDGET, "rounds": ROUNDS} | changes
    return compress.iterate(new_model(), EXAMPLE, folder=folder, **options)


def history(folder: Path) -> list[dict]:
    """The rounds of history.json without latencies, which no two runs share."""
    rounds = json.loads((folder / "history.json").read_text())["rounds"]
    return [{key: value for key, value in entry.items() if key != "latency_seconds"} for entry in rounds]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder)


def test_every_round_follows_the_schedule_down_to_the_budget(undisturbed) -> None:
    _, result = undisturbed
    dense = compress.measure(new_model(), EXAMPLE)
    assert [record.round for record in result.rounds] == list(range(ROUNDS + 1))
    assert (result.before.macs, result.before.params) == (dense.macs, dense.params)
    assert result.before.accuracy == evaluate(new_model().eval())
    for record in result.rounds:
        assert record.macs <= record.target * dense.macs
    assert result.rounds[1].macs > result.rounds[2].macs >= result.rounds[3].macs
    assert result.after.target == BUDGET.fraction
    assert compress.measure(result.model, EXAMPLE).macs == result.after.macs
    assert result.stopped is None
    assert "macs" in result.summary()


def test_the_plan_is_in_coordinates_of_the_dense_model(undisturbed) -> None:
    _, result = undisturbed
    again = compress.apply(new_model(), result.plan)
    again.load_state_dict(result.model.state_dict())
    images, _ = data()
    assert torch.equal(again.eval()(images), result.model(images))
    for name, (left, total) in result.after.kept.items():
        assert left == result.model.get_submodule(name).weight.shape[0]
        assert total == new_model().get_submodule(name).weight.shape[0]


def test_the_saved_model_loads_into_a_fresh_one(undisturbed) -> None:
    folder, result = undisturbed
    loaded = compress.load(Net(), folder / "small.safetensors").eval()
    images, _ = data()
    assert torch.equal(loaded(images), result.model(images))
    assert evaluate(loaded) == result.after.accuracy == history(folder)[-1]["accuracy"]


def test_the_given_model_is_not_changed(tmp_path: Path) -> None:
    model = new_model()
    before = copy.deepcopy(model.state_dict())
    compress.iterate(model, EXAMPLE, train=train, evaluate=evaluate, budget=BUDGET, rounds=1, folder=tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_a_finished_run_returns_its_result_without_training(undisturbed) -> None:
    folder, result = undisturbed
    seen: list[int] = []
    again = run(folder, train=_never, evaluate=_never, on_round=lambda record: seen.append(record.round))
    assert again.rounds == result.rounds
    assert seen == list(range(ROUNDS + 1))
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in result.model.state_dict().items())


def _never(model: nn.Module) -> float:
    raise AssertionError("a finished run must not come here")


class _Crash(BaseException):
    """Like a kill, it is caught by nobody."""


def test_crashes_between_any_two_steps_change_nothing(undisturbed, tmp_path: Path, monkeypatch) -> None:
    expected, _ = undisturbed
    passed: set[object] = set()

    def crash_once(*point: object) -> None:
        if point not in passed:
            passed.add(point)
            raise _Crash

    def interrupted(function: Callable, name: str) -> Callable:
        def call(*arguments: object) -> object:
            result = function(*arguments)
            crash_once(name, *(str(a) for a in arguments if isinstance(a, Path)))
            return result

        return call

    def crashing_train(model: nn.Module, context: RoundContext) -> None:
        crash_once("before train", context.round)
        train(model, context)
        crash_once("after train", context.round)

    monkeypatch.setattr("compress.folder.os.rename", interrupted(os.rename, "committed"))
    attempts = 0
    while True:
        attempts += 1
        torch.manual_seed(attempts)  # what the random states happen to be at a restart must not matter
        try:
            run(tmp_path, train=crashing_train)
            break
        except _Crash:
            continue
    # prune and round commits of four rounds, and two crashes in each training
    assert attempts == 1 + 2 * (ROUNDS + 1) + 2 * ROUNDS
    assert history(tmp_path) == history(expected)
    events = sorted(path.name for path in tmp_path.glob("events*"))
    assert len(events) == ROUNDS + 1
    assert not list(tmp_path.rglob("*.partial"))


def test_a_killed_process_resumes_in_the_middle_of_a_round(undisturbed, tmp_path: Path) -> None:
    expected, _ = undisturbed
    environment = {**os.environ, "KILL_IN_ROUND": "2", "PYTHONPATH": str(Path(compress.__file__).parents[1])}
    killed = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "rounds").glob("0?")) == ["00", "01"]
    assert [path.name for path in (tmp_path / "rounds" / "02.train").iterdir()] == ["epoch1.pt"]
    run(tmp_path)
    assert history(tmp_path) == history(expected)


def test_a_folder_of_another_run_is_left_alone(undisturbed) -> None:
    folder, _ = undisturbed
    content = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for change, message in [
        ({"rounds": 2}, "rounds is 3 there and 2 here"),
        ({"budget": Budget(macs=0.5)}, "budget is"),
        ({"criterion": "l1"}, "criterion is l2 there and l1 here"),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"stop": StopRule(0.1)}, "max_drop is"),
        ({"protect": ("head.*",)}, "protect is"),
    ]:
        with pytest.raises(PruneError, match=message):
            run(folder, **change)
    with pytest.raises(PruneError, match="weights is"):
        compress.iterate(Net(), EXAMPLE, train=train, evaluate=evaluate, budget=BUDGET, rounds=ROUNDS, folder=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == content


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"budget": Budget(macs=0.0001)}, BudgetError, "at least"),
        ({"criterion": "no_such"}, PruneError, "no_such"),
        ({"schedule": "no_such"}, PruneError, "no_such"),
        ({"rounds": 0}, PruneError, "rounds is 0"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_bad_options_fail_before_anything_is_written(tmp_path: Path, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run(tmp_path / "a", **changes)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def falling() -> Callable[[nn.Module], dict[str, float]]:
    values: Iterator[float] = iter([0.9, 0.89, 0.85, 0.5])
    return lambda model: {"digit": 0.9, "even": next(values)}


def test_stops_at_the_last_round_that_was_good_enough(tmp_path: Path, falling) -> None:
    result = run(tmp_path, evaluate=falling, stop=StopRule(max_drop=0.02))
    assert [record.round for record in result.rounds] == [0, 1, 2]
    assert result.after.round == 1
    assert compress.measure(result.model, EXAMPLE).macs == result.after.macs
    assert result.stopped is not None
    assert "round 2" in result.stopped
    assert result.before.metrics == {"digit": 0.9, "even": 0.9}
    again = run(tmp_path, evaluate=_never, train=_never, stop=StopRule(max_drop=0.02))
    assert again.after == result.after


def test_what_is_tested_is_recorded_and_decides_nothing(tmp_path: Path) -> None:
    values = iter([0.9, 0.1, 0.8])
    stop = StopRule(max_drop=0.02)
    result = run(
        tmp_path, evaluate=lambda model: 0.5, test=lambda model: next(values), stop=stop, rounds=2, train=lambda _: None
    )
    assert result.stopped is None
    assert [record.test for record in result.rounds] == [0.9, 0.1, 0.8]
    assert [entry["test"] for entry in history(tmp_path)] == [0.9, 0.1, 0.8]


def test_where_the_first_round_is_too_bad_the_dense_model_comes_back(tmp_path: Path, falling) -> None:
    result = run(tmp_path, evaluate=falling, stop=StopRule(max_drop=0.001))
    assert result.after.round == 0
    images, _ = data()
    assert torch.equal(result.model(images), new_model().eval()(images))


@pytest.mark.parametrize("value", [float("nan"), {}, {"digit": float("inf")}])
def test_an_evaluation_without_a_number_is_an_error(tmp_path: Path, value: object) -> None:
    with pytest.raises(PruneError, match="evaluate returned"):
        run(tmp_path, evaluate=lambda model: value)


def test_a_drop_below_zero_is_an_error() -> None:
    with pytest.raises(PruneError, match="max_drop"):
        StopRule(max_drop=-0.1)


@pytest.mark.parametrize("metric", ["params", "channels"])
def test_other_budgets_are_relative_to_the_dense_model_too(tmp_path: Path, metric: str) -> None:
    result = run(tmp_path, budget=Budget(**{metric: 0.5}), rounds=2, schedule="linear", train=lambda model: None)
    removable = sum(total for _, total in result.after.kept.values())  # in this net every channel is a unit of its own
    left = {
        "params": result.after.params / result.before.params,
        "channels": sum(left for left, _ in result.after.kept.values()) / removable,
    }[metric]
    assert 0.3 < left <= 0.5


def test_recovery_does_not_touch_the_dense_model(tmp_path: Path) -> None:
    images, labels = data()
    seen: list[torch.Tensor] = []

    def remember(model: nn.Module) -> float:
        seen.append(torch.cat([value.flatten().double() for value in model.state_dict().values()]))
        return 0.5

    batches = [(images[:48], labels[:48]), (images[48:], None)]
    run(tmp_path, evaluate=remember, train=lambda model: None, rounds=1, calibration=batches, recover=True)
    assert torch.equal(seen[0], torch.cat([value.flatten().double() for value in new_model().state_dict().values()]))
    assert not torch.isin(seen[1], seen[0]).all(), "a pruned model that was not recovered has only values of the dense"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
