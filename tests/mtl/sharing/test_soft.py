import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import compress
from mtl import FitOptions, L2Coupling, SoftShared, Task, TraceNorm, evaluate, fit
from mtl.data import TensorLoader

NAMES = ("a", "b", "c")
TASKS = [Task(name, loss=nn.CrossEntropyLoss()) for name in NAMES]
CLASSES = {"a": 3, "b": 4, "c": 2}


class Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return self.head(self.hidden(x).relu().mean(dim=(2, 3)))


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def build(task: Task) -> nn.Module:
    return Net(CLASSES[task.name])


def soft(coupling: Any = None, init: Any = "different", run: Any = "auto") -> SoftShared:
    torch.manual_seed(0)
    return SoftShared(build, TASKS, coupling, init=init, run=run)


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("run", ["loop", "stacked"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("by_task", [True, False])
def test_it_computes_what_the_models_compute(run: Any, training: bool, by_task: bool) -> None:
    model = soft(run=run).train(training)
    alone = {name: model.task(name) for name in NAMES}
    inputs = {name: images() + index for index, name in enumerate(NAMES)} if by_task else dict.fromkeys(NAMES, images())
    for _ in range(2):
        outputs = model(inputs if by_task else inputs["a"])
        torch.testing.assert_close(outputs, {name: alone[name](inputs[name]) for name in NAMES})
    for name in NAMES:  # batch-norm statistics too
        torch.testing.assert_close(model.task(name).state_dict(), alone[name].state_dict())
    sum(output.square().sum() for output in outputs.values()).backward()
    sum(alone[name](inputs[name]).square().sum() for name in NAMES).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("run", ["loop", "stacked"])
def test_gradients_are_those_of_the_models(run: Any) -> None:
    model = soft(run=run)
    alone = {name: model.task(name) for name in NAMES}
    sum(output.square().sum() for output in model(images()).values()).backward()
    sum(each(images()).square().sum() for each in alone.values()).backward()
    for index, each in enumerate(alone.values()):
        torch.testing.assert_close(model.stacks.conv.weight.grad[index], each.conv.weight.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model.models[NAMES[index]].head.bias.grad, each.head.bias.grad)


def test_only_the_tasks_that_have_inputs_run() -> None:
    model = soft()
    before = model.stacks.norm.running_mean.clone()
    assert list(model({"b": images()})) == ["b"]
    changed = (model.stacks.norm.running_mean != before).any(dim=1)
    assert changed.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="no task 'z'; there are a, b, c"):
        model({"a": images(), "z": images()})


@pytest.mark.parametrize(("make", "inputs"), [(Sequence, torch.randn(2, 6, 4)), (Tied, torch.randn(3, 4))])
def test_recurrent_layers_and_tied_weights(make: Any, inputs: Tensor) -> None:
    model = SoftShared(lambda task: make(), TASKS, init="different")
    outputs = copy.deepcopy(model)(inputs)
    model(inputs)
    for name, each in copy.deepcopy(model)(inputs).items():
        torch.testing.assert_close(each, outputs[name])
        alone = model.task(name)
        torch.testing.assert_close(each, alone(inputs))
        assert len(list(alone.parameters())) == len(list(make().parameters()))


def test_different_heads_stay_with_their_task_and_the_report_says_so() -> None:
    model = soft()
    assert set(model.matched.parameters) == {"conv.weight", "conv.bias", "norm.weight", "norm.bias"} | {
        "hidden.weight",
        "hidden.bias",
    }
    assert all(set(shapes) == {"head.weight", "head.bias"} for shapes in model.matched.private.values())
    assert "only in 'b': head.weight (4, 5), head.bias (4,)" in str(model.matched)
    assert model.stacks.conv.weight.shape == (3, 6, 2, 3, 3)
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for name in NAMES for p in model.task(name).parameters()
    )


def test_same_init_gives_all_tasks_the_values_of_the_first() -> None:
    stack = soft(init="same").stacks.conv.weight
    assert bool((stack == stack[:1]).all())
    stack = soft(init="different").stacks.conv.weight
    assert not bool((stack == stack[:1]).all())


def test_one_task() -> None:
    model = SoftShared(build, TASKS[0], TraceNorm(2.0))
    torch.testing.assert_close(model(images())["a"], model.task("a")(images()))
    norms = sum(float(parameter.detach().norm()) for parameter in model.stacks.parameters())
    assert float(model.penalty().detach()) == pytest.approx(2 * norms, rel=1e-5)  # of one row: its length
    assert float(SoftShared(build, TASKS[0], TraceNorm(2.0, of="deviations")).penalty().detach()) == 0


def loader() -> TensorLoader:
    generator = torch.Generator().manual_seed(5)
    targets = {name: torch.randint(CLASSES[name], (40,), generator=generator) for name in NAMES}
    return TensorLoader(images(40), targets, batch_size=8, shuffle=True)


OPTIONS = FitOptions(device="cpu", progress=False, lr=0.05, weight_decay=0.01)


@pytest.mark.parametrize("coupling", [None, TraceNorm(0.0), L2Coupling(0.0)])
def test_without_a_penalty_training_is_that_of_the_models_alone(coupling: Any) -> None:
    model = soft(coupling)
    alone = {name: model.task(name) for name in NAMES}
    fit(model, TASKS, loader(), epochs=3, options=OPTIONS)
    for task in TASKS:
        single = loader()
        single.targets = {task.name: single.targets[task.name]}
        fit(alone[task.name], task, single, epochs=3, options=OPTIONS)
        for name, value in alone[task.name].state_dict().items():
            torch.testing.assert_close(model.task(task.name).state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_fit_adds_the_penalty_takes_the_step_and_draws_the_spectra(tmp_path: Path) -> None:
    free, near, low = soft(init="same"), soft(L2Coupling(0.1), "same"), soft(TraceNorm(0.2, proximal=True), "same")
    for model, folder in ((free, "free"), (near, "near"), (low, "low")):
        fit(model, TASKS, loader(), epochs=3, options=OPTIONS, folder=tmp_path / folder)
    far, close = (each.stacks.conv.weight.detach().std(dim=0).norm() for each in (free, near))
    assert close < 0.9 * far
    values = low.spectra()["conv.weight"]
    assert int((values > 1e-5 * values[0]).sum()) < 3
    assert int(low.num_steps) == 15
    events = EventAccumulator(str(tmp_path / "low"))
    events.Reload()
    ranks = [event.value for event in events.Scalars("effective_rank/conv.weight")]
    assert ranks[0] == pytest.approx(1)  # all tasks start alike
    assert [event.step for event in events.Scalars("singular_values/conv.weight/0")] == [0, 1, 2, 3]
    assert set(evaluate(low, TASKS, loader())) == set(NAMES)
    with pytest.raises(ValueError, match="coupling"):
        fit(soft(L2Coupling(0.3)), TASKS, loader(), epochs=3, options=OPTIONS, folder=tmp_path / "near")


def test_state_dict_brings_back_values_statistics_and_steps() -> None:
    model = soft(L2Coupling(1.0, warmup=10))
    model(images())
    model.proximal_step(0.1)
    again = soft(L2Coupling(1.0, warmup=10), init="same")
    again.load_state_dict(dict(model.state_dict()))  # a plain dict, as from safetensors
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert float(again.penalty().detach()) == float(model.penalty().detach()) > 0
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"more\""):
        again.load_state_dict({**model.state_dict(), "more": torch.zeros(1)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_penalty_under_autocast_and_in_other_dtypes(dtype: torch.dtype) -> None:
    model = soft(TraceNorm(0.1) + L2Coupling(0.1)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = model.penalty()
    penalty.backward()
    assert float(penalty.detach()) == pytest.approx(float(soft(model.coupling).penalty().detach()), rel=0.02)
    assert model.stacks.conv.weight.grad.dtype == dtype


def test_pruning_cuts_the_same_channels_of_all_tasks_and_is_exact() -> None:
    model, inputs = soft().double().eval(), images().double()
    result = compress.prune(model, inputs, budget=compress.Budget(macs=0.6))
    twin = compress.mask(model, result.plan)
    assert result.plan.exact
    for name, output in result.model(inputs).items():
        torch.testing.assert_close(output, twin(inputs)[name])
        torch.testing.assert_close(output, result.model.task(name)(inputs))


class Unlike(nn.Module):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.add_module(task.name, nn.Linear(2, 2))


def test_bad_models_are_named() -> None:
    with pytest.raises(ValueError, match=r"no parameter of the same name and shape.*'a' has a.weight \(2, 2\)"):
        SoftShared(Unlike, TASKS)
    one = Net(3)
    with pytest.raises(ValueError, match="tasks 'a' and 'b' share parameter conv.weight"):
        SoftShared(lambda task: one, TASKS)
    with pytest.raises(ValueError, match="returned a str for task 'a'"):
        SoftShared(lambda task: "net", TASKS)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="run the model once in build"):
        SoftShared(lambda task: nn.LazyLinear(3), TASKS)
    with pytest.raises(ValueError, match=r"no matched parameter has a name like 'head\.\*'"):
        soft(TraceNorm({"head.*": 1.0}))
    with pytest.raises(ValueError, match="no task 'z'"):
        soft().task("z")
    with pytest.raises(ValueError, match="init is 'equal'"):
        soft(init="equal")


def test_what_cannot_run_stacked_says_why() -> None:
    model = SoftShared(lambda task: Sequence(), TASKS, run="stacked")
    with pytest.raises(ValueError, match="vmap cannot run them"):
        model(torch.randn(2, 6, 4))

    def dropping(task: Task) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1 if task.name == "a" else 0.5))

    with pytest.raises(ValueError, match="module 1 is set differently"):
        SoftShared(dropping, TASKS, run="stacked")(torch.randn(2, 4))
