"""``fit`` with what several tasks need: data of their own, missing labels, early stops, groups of batches."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from mtl import Callback, Epoch, FitOptions, HardShared, Task, evaluate, fit, restore
from mtl.data import TensorLoader

QUIET = FitOptions(device="cpu", progress=False, momentum=0.0, nesterov=False, weight_decay=0.0, schedule="constant")
TASKS = [Task.classification("a"), Task.regression("b")]


def network(**arguments: Any) -> HardShared:
    torch.manual_seed(1)
    return HardShared(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh()), {"a": nn.Linear(8, 3), "b": nn.Linear(8, 1)}, **arguments
    )


def own_data(shuffle: bool = True) -> dict[str, TensorLoader]:
    generator = torch.Generator().manual_seed(5)
    inputs = {"a": torch.randn(40, 4, generator=generator), "b": torch.randn(12, 4, generator=generator)}
    targets = {"a": (inputs["a"][:, 0] > 0).long() + (inputs["a"][:, 1] > 0).long(), "b": inputs["b"].sum(1)}
    return {name: TensorLoader(inputs[name], targets[name], batch_size=4, shuffle=shuffle) for name in inputs}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), f"{name} differs"


@pytest.mark.parametrize("sampling", ["proportional", "uniform"])
@pytest.mark.parametrize("weighting", ["uncertainty", "dwa", "gradnorm", "random", "geometric"])
def test_tasks_with_data_of_their_own_resume_with_the_same_numbers(
    tmp_path: Path, sampling: Any, weighting: str
) -> None:
    options = replace(QUIET, sampling=sampling, lr=0.1)

    class Crash(Callback):
        def after_epoch(self, model: nn.Module, row: Epoch) -> None:
            if row.epoch == 3:
                raise KeyboardInterrupt

    def train(folder: Path | None, *callbacks: Callback) -> tuple[Any, dict[str, Tensor]]:
        model = network()
        data = own_data()
        return fit(
            model, TASKS, data, 5, weighting=weighting, validation=data, folder=folder, options=options,
            callbacks=callbacks,
        ), state(model)  # fmt: skip

    expected, weights = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Crash())
    history, resumed = train(tmp_path)
    assert history == expected
    assert_same(resumed, weights)
    assert history[-1].loss["b"] < history[0].loss["b"]


def test_a_step_of_two_data_sets_is_the_sum_of_both_losses() -> None:
    twin, data = network(), own_data(shuffle=False)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    batches = {name: list(own) for name, own in data.items()}
    for step in range(3):
        losses = {}
        for task in TASKS:
            inputs, target = batches[task.name][step]
            output = twin(inputs)[task.name]
            losses[task.name] = task.loss(output.squeeze(-1) if task.name == "b" else output, target)
        optimizer.zero_grad()
        (losses["a"] + 0.5 * losses["b"]).backward()
        optimizer.step()
    short = {"a": batches["a"][:3], "b": batches["b"][:3]}
    model = network()
    fit(model, TASKS, short, 1, weighting={"a": 1.0, "b": 0.5}, options=replace(QUIET, lr=0.1))
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_missing_labels_train_what_is_there() -> None:
    inputs = torch.randn(6, 4)
    a, b = torch.tensor([0, -100, 2, -100, 1, 0]), torch.tensor([math.nan, 1.0, math.nan, math.nan, 0.5, math.nan])
    model, twin = network(), network()
    empty = (inputs, {"a": torch.full((6,), -100), "b": torch.full((6,), math.nan)})
    history = fit(model, TASKS, [(inputs, {"a": a, "b": b}), empty], 1, options=replace(QUIET, lr=0.1))
    outputs = twin(inputs)
    loss_a = nn.functional.cross_entropy(outputs["a"][a >= 0], a[a >= 0])
    loss_b = nn.functional.mse_loss(outputs["b"][[1, 4], 0], b[[1, 4]])
    (loss_a + loss_b).backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter -= 0.1 * parameter.grad
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
    assert history[0].loss == pytest.approx({"a": loss_a.item(), "b": loss_b.item()})
    with pytest.raises(ValueError, match="task 'a': no batch of epoch 1 had a labelled sample"):
        fit(network(), TASKS, [(inputs, {"a": empty[1]["a"], "b": b})], 1, options=QUIET)
    with pytest.raises(ValueError, match="task 'b': the data to evaluate on have no label"):
        evaluate(model, TASKS, [(inputs, {"a": a, "b": empty[1]["b"]})])


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    data = own_data(shuffle=False)["a"]
    large = [
        (torch.cat([inputs for inputs, _ in group]), torch.cat([target for _, target in group]))
        for group in (list(data)[start : start + 4] for start in (0, 4, 8))
    ]
    models = [network(), network()]
    steps: list[int] = []

    class Count(Callback):
        def after_step(self, model: nn.Module, step: int) -> None:
            steps.append(step)

    options = replace(QUIET, lr=0.2, schedule="cosine")
    fit(models[0], TASKS[0], data, 2, options=replace(options, accumulate=4), callbacks=[Count()])
    fit(models[1], TASKS[0], large, 2, options=options)
    assert steps == [1, 2, 3, 4, 5, 6]  # ten batches: groups of 4, 4 and 2
    for parameter, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


class Poisoned:
    """One batch of ``b`` has an infinite target."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        for index in range(3):
            b = torch.full((4,), math.inf) if index == 1 else torch.randn(4, generator=generator)
            yield torch.randn(4, 4, generator=generator), {"a": torch.tensor([0, 1, 2, 0]), "b": b}


def test_a_loss_that_is_not_finite_names_task_and_batch(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="task 'b': the loss is inf in epoch 1, batch 2"):
        fit(network(), TASKS, Poisoned(), 1, options=QUIET)
    model = network()
    history = fit(model, TASKS, Poisoned(), 2, options=replace(QUIET, on_nan="skip"))
    assert [row.skipped for row in history] == [{"b": 1}, {"b": 1}]
    assert all(math.isfinite(row.loss["b"]) for row in history)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert "task 'b': the loss is inf in epoch 2, batch 2; the task is left out of this batch" in caplog.text


def test_a_skipped_batch_leaves_no_trace_in_running_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    good = torch.randn(8, 4), torch.randn(8)
    bad = torch.full((8, 4), math.nan), torch.randn(8)
    fit(model, TASKS[1], [good, bad], 1, options=replace(QUIET, on_nan="skip"))
    twin = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    fit(twin, TASKS[1], [good], 1, options=QUIET)
    assert torch.equal(model[0].running_mean, twin[0].running_mean)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task 'b': no batch of epoch 1 had a finite loss"):
        fit(twin, TASKS[1], [bad], 1, options=replace(QUIET, on_nan="skip"))


def test_labels_beyond_the_head_are_named() -> None:
    data = [(torch.randn(2, 4), {"a": torch.tensor([0, 3]), "b": torch.zeros(2)})]
    with pytest.raises(ValueError, match="task 'a': there is a label 3, but the head gives 3 classes"):
        fit(network(), TASKS, data, 1, options=QUIET)


def test_the_best_epoch_is_kept_and_can_be_restored(tmp_path: Path) -> None:
    data, tasks, fixed = own_data(), TASKS, own_data(shuffle=False)
    options = replace(QUIET, lr=0.05, keep="best", patience=2)
    model = network()
    history = fit(model, tasks, data, 20, validation=fixed, folder=tmp_path, options=options, callbacks=[Spoil(3)])
    best = history.best
    assert best is not None
    assert best.epoch == 3
    assert len(history) == 5  # two more without a better score
    assert evaluate(model, tasks, fixed) == best.validation
    other = network()
    restore(other, tmp_path)
    assert_same(state(other), state(model))
    restore(other, tmp_path, "last")
    assert not torch.equal(other.heads["a"].weight, model.heads["a"].weight)
    again = network()
    assert fit(again, tasks, data, 20, validation=fixed, folder=tmp_path, options=options) == history
    assert_same(state(again), state(model))
    with pytest.raises(ValueError, match="holds no run of mtl.fit"):
        restore(other, tmp_path / "nothing")
    with pytest.raises(ValueError, match="another"):
        restore(nn.Linear(2, 2), tmp_path)


class Spoil(Callback):
    """From some epoch on, every step makes the model worse."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.spoiling = epoch, False

    def after_step(self, model: nn.Module, step: int) -> None:
        if self.spoiling:
            for parameter in model.parameters():
                parameter.data.mul_(-1.5)

    def after_epoch(self, model: nn.Module, row: Epoch) -> None:
        self.spoiling = row.epoch >= self.epoch


def test_the_score_is_the_mean_of_what_is_better() -> None:
    data = own_data()
    history = fit(network(), TASKS, data, 3, validation=data, options=replace(QUIET, lr=0.05))
    for row in history:
        expected = (row.validation["a"] - row.validation["b"] / history[0].validation["b"]) / 2
        assert row.score == pytest.approx(expected)
    one = fit(network(), TASKS, data, 1, validation=data, options=replace(QUIET, lr=0.05, monitor="b"))
    assert one[0].score == -one[0].validation["b"]


def test_a_callback_may_end_the_run_and_it_stays_ended(tmp_path: Path) -> None:
    class Enough(Callback):
        def after_epoch(self, model: nn.Module, row: Epoch) -> bool:
            return row.epoch == 2

    for _ in range(2):
        model = network()
        assert len(fit(model, TASKS, own_data(), 9, folder=tmp_path, options=QUIET, callbacks=[Enough()])) == 2


def test_what_belongs_to_a_task_has_its_own_learning_rate() -> None:
    data = [(torch.randn(6, 4), {"a": torch.tensor([0, 1, 2, 0, 1, 2]), "b": torch.randn(6)})]
    before, plain, slow = state(network()), network(), network()
    fit(plain, TASKS, data, 1, options=replace(QUIET, lr=0.1))
    fit(slow, TASKS, data, 1, options=replace(QUIET, lr=0.1, task_lr={"a": 0.5}))
    for name, tensor in state(plain).items():
        factor = 0.5 if name.startswith("heads.a") else 1.0
        torch.testing.assert_close(state(slow)[name] - before[name], factor * (tensor - before[name]))
    with pytest.raises(ValueError, match="task_lr is given, but Linear has no method task_parameters"):
        fit(
            nn.Linear(4, 1),
            TASKS[1],
            [(torch.randn(2, 4), torch.zeros(2))],
            1,
            options=replace(QUIET, task_lr={"b": 2.0}),
        )


def test_the_weight_of_a_task_is_a_factor_on_its_loss() -> None:
    data = [(torch.randn(6, 4), {"a": torch.tensor([0, 1, 2, 0, 1, 2]), "b": torch.randn(6)})]
    one, other = network(), network()
    fit(one, [TASKS[0], Task.regression("b", weight=0.3)], data, 2, options=QUIET)
    fit(other, TASKS, data, 2, weighting={"a": 1.0, "b": 0.3}, options=QUIET)
    for parameter, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_curves_show_cosines_scores_and_the_gain_over_single_tasks(tmp_path: Path) -> None:
    data = own_data()
    options = replace(QUIET, lr=0.05, reference={"a": 0.5, "b": 2.0})
    model, twin = network(), network()
    history = fit(model, TASKS, data, 2, weighting="random", validation=data, folder=tmp_path, options=options)
    assert fit(twin, TASKS, data, 2, weighting="random", validation=data, options=options) == history
    assert_same(state(model), state(twin))  # looking at the gradients changes nothing
    last = history[-1]
    gain = 50 * ((last.validation["a"] - 0.5) / 0.5 + (2.0 - last.validation["b"]) / 2.0)
    assert last.delta_m == pytest.approx(gain)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for tag, value in {
        "cosine/a~b": last.cosines["a~b"],
        "score": last.score,
        "delta_m": last.delta_m,
        "weight/a": last.weights["a"],
    }.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value)
    assert -1 <= last.cosines["a~b"] <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": "c"}, "monitor names 'c', which is no task"),
        ({"reference": {"c": 1.0}}, "reference names 'c', which is no task"),
        ({"reference": {"a": 0.0}}, "reference of task 'a' is 0"),
        ({"task_lr": {"c": 1.0}}, "task_lr names 'c', which is no task"),
        ({"keep": "best"}, 'keep="best" chooses by validation data, but there are none'),
        ({"patience": 3}, "patience=3 chooses by validation data"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(network(), TASKS, own_data(), 1, options=replace(QUIET, **options))


def test_a_penalty_of_the_model_is_minimised_as_well() -> None:
    class Penalised(HardShared):
        def penalty(self) -> Tensor:
            return 0.5 * self.heads["a"].weight.square().sum()

    torch.manual_seed(1)
    model = Penalised(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), {"a": nn.Linear(8, 3), "b": nn.Linear(8, 1)})
    model.load_state_dict(network().state_dict())
    plain, before = network(), network().heads["a"].weight.detach().clone()
    data = [(torch.randn(6, 4), {"a": torch.tensor([0, 1, 2, 0, 1, 2]), "b": torch.randn(6)})]
    for trained in (model, plain):
        fit(trained, TASKS, data, 1, options=replace(QUIET, lr=0.1))
    torch.testing.assert_close(model.heads["a"].weight, plain.heads["a"].weight - 0.1 * before)
