import copy
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mtl import FitOptions, HardShared, History, Task, evaluate, fit
from mtl.data import TensorLoader, digits
from mtl.schedule import lr_factor

QUIET = FitOptions(device="cpu", progress=False)
A, B = Task("a", nn.CrossEntropyLoss()), Task("b", nn.MSELoss())


class Crash(Exception):
    """Stands for the death of the process: nothing after it is carried out."""


class CrashingLoader(TensorLoader):
    """Dies in the middle of one epoch."""

    crash_epoch = -1

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            if self._epoch == self.crash_epoch and index == 1:
                raise Crash
            yield batch


def images(loader: type[TensorLoader] = TensorLoader) -> Any:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=generator)
    targets = {"a": torch.randint(3, (40,), generator=generator), "b": torch.randn(40, 1, generator=generator)}
    return loader(inputs, targets, batch_size=16, shuffle=True, augment=True)


def network() -> HardShared:
    torch.manual_seed(1)
    trunk = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)
    )
    return HardShared(trunk, {"a": nn.Linear(8, 3), "b": nn.Linear(8, 1)})


def run(data: Any, folder: Path | None = None, **changes: Any) -> tuple[History, dict[str, Tensor]]:
    model = network()
    options = replace(QUIET, ema_decay=0.9, max_grad_norm=1.0, label_smoothing=0.1, warmup_epochs=0.5, **changes)
    history = fit(model, [A, B], data, 4, weighting="uncertainty", validation=images(), folder=folder, options=options)
    return history, model.state_dict()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(tag)]


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), f"{name} differs"


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "precision": "bf16", "channels_last": "on"},
        {"optimizer": "adamw", "precision": "fp32", "channels_last": "off", "schedule": "onecycle"},
    ],
)
def test_a_killed_run_ends_with_bitwise_the_numbers_of_an_undisturbed_one(tmp_path: Path, changes: Any) -> None:
    expected, weights = run(images(), **changes)
    data = images(CrashingLoader)
    for epoch in (1, 3, 4):
        data.crash_epoch = epoch
        with pytest.raises(Crash):
            run(data, tmp_path, **changes)
    torch.manual_seed(1234)  # whatever the new process did before
    data.crash_epoch = -1
    history, resumed = run(data, tmp_path, **changes)

    assert history == expected
    assert_bitwise(resumed, weights)
    for tag, values in {
        "lr": [row.lr for row in expected],
        "loss/a": [row.loss["a"] for row in expected],
        "train/b": [row.train["b"] for row in expected],
        "validation/a": [row.validation["a"] for row in expected],
        "weight/b": [row.weights["b"] for row in expected],
    }.items():
        assert [step for step, _ in points(tmp_path, tag)] == [1, 2, 3, 4]
        assert [value for _, value in points(tmp_path, tag)] == pytest.approx(values)


def test_a_finished_folder_gives_model_and_history_without_training(tmp_path: Path) -> None:
    expected, weights = run(images(), tmp_path)
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    data = images(CrashingLoader)
    data.crash_epoch = 1
    history, loaded = run(data, tmp_path)
    assert history == expected
    assert_bitwise(loaded, weights)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files


KILLED = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[2])
from test_trainer import CrashingLoader, images, run
class Killed(CrashingLoader):
    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if self._epoch == 3 and index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch
torch.set_num_threads(1)
run(images(Killed), sys.argv[1])
"""


def test_kill_minus_nine(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, str(tmp_path), here]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == -signal.SIGKILL, finished.stderr
    history, weights = run(images(), tmp_path)
    expected, expected_weights = run(images())
    assert history == expected
    assert_bitwise(weights, expected_weights)


def test_a_folder_of_another_configuration_is_refused_and_left_alone(tmp_path: Path) -> None:
    run(images(), tmp_path)
    before = (tmp_path / "fit.pt").read_bytes()
    with pytest.raises(ValueError, match="holds another run: options.lr is None there, 0.3 here"):
        run(images(), tmp_path, lr=0.3)
    model = HardShared(nn.Flatten(), {"a": nn.Linear(192, 3)})
    with pytest.raises(ValueError, match=r"options.warmup_epochs is 0.5 there, 0.0 here"):
        fit(model, A, images(), 4, folder=tmp_path, options=QUIET)
    assert (tmp_path / "fit.pt").read_bytes() == before


def test_one_step_is_the_textbook_step() -> None:
    inputs, targets = torch.randn(9, 4), torch.randn(9, 1)
    model, twin = nn.Linear(4, 1), nn.Linear(4, 1)
    twin.load_state_dict(model.state_dict())
    options = replace(QUIET, lr=0.1, weight_decay=0.5, momentum=0.9)
    history = fit(model, B, [(inputs, targets)] * 3, 1, options=options)

    buffers = [torch.zeros_like(parameter) for parameter in twin.parameters()]
    losses = []
    for step in range(3):
        lr = 0.1 * (1 + math.cos(math.pi * step / 3)) / 2
        loss = (twin(inputs) - targets).square().mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for parameter, gradient, buffer in zip(twin.parameters(), gradients, buffers, strict=True):
                decayed = gradient + (0.5 * parameter if parameter.dim() > 1 else 0)
                buffer.mul_(0.9).add_(decayed)
                parameter -= lr * (decayed + 0.9 * buffer)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)
    assert history[0].loss["b"] == pytest.approx(sum(losses) / 3)


def test_the_last_small_batch_counts_by_its_size() -> None:
    inputs, targets = torch.randn(10, 4), torch.randn(10, 1)
    data = TensorLoader(inputs, targets, batch_size=7)
    model = nn.Linear(4, 1)
    with torch.no_grad():
        expected = (model(inputs) - targets).square().mean().item()
    history = fit(model, B, data, 1, options=replace(QUIET, lr=1e-12))
    assert history[0].loss["b"] == pytest.approx(expected, rel=1e-5)
    assert history[0].train["b"] == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_is_for_training_and_leaves_the_task_alone() -> None:
    task = Task("a", nn.CrossEntropyLoss())
    inputs, targets = torch.randn(6, 4), torch.randint(3, (6,))
    model = nn.Linear(4, 3)
    with torch.no_grad():
        expected = nn.CrossEntropyLoss(label_smoothing=0.2)(model(inputs), targets).item()
    history = fit(model, task, [(inputs, targets)], 1, options=replace(QUIET, label_smoothing=0.2))
    assert history[0].loss["a"] == pytest.approx(expected)
    assert task.loss.label_smoothing == 0  # type: ignore[attr-defined]


def test_the_model_holds_the_average_that_was_validated() -> None:
    model, data = network(), images()
    history = fit(model, [A, B], data, 3, validation=data, options=replace(QUIET, ema_decay=0.8))
    assert evaluate(model, [A, B], data) == history[-1].validation


def test_modes_random_state_and_threads_are_as_before() -> None:
    model = network()
    model.trunk[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    fit(model, [A, B], images(), 1, options=replace(QUIET, num_threads=2))
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert torch.get_num_threads() == threads
    assert all(
        parameter.is_contiguous() and parameter.grad is None for parameter in model.parameters() if parameter.dim() == 4
    )


def test_the_seed_and_nothing_else_decides() -> None:
    first, weights = run(images())
    torch.manual_seed(99)
    again, same = run(images())
    assert again == first
    assert_bitwise(same, weights)
    other, _ = run(images(), seed=1)
    assert other != first


def test_two_tasks_are_learnt_from_real_images_and_from_a_data_loader() -> None:
    data = digits(validation=0)
    labels = data.train.labels
    assert isinstance(data.train.images, Tensor)
    loader = DataLoader(
        [(image, {"digit": label, "even": label % 2}) for image, label in zip(data.train.images, labels, strict=True)],
        batch_size=64,
        shuffle=True,
    )
    tasks = [Task("digit", nn.CrossEntropyLoss()), Task("even", nn.CrossEntropyLoss())]
    model = HardShared(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU()),
        {"digit": nn.Linear(64, 10), "even": nn.Linear(64, 2)},
    )
    fit(model, tasks, loader, 8, weighting="uncertainty", options=replace(QUIET, lr=0.1))
    test = data.test
    assert isinstance(test.images, Tensor)
    result = evaluate(
        model, tasks, TensorLoader(test.images, {"digit": test.labels, "even": test.labels % 2}, batch_size=100)
    )
    assert result["digit"] > 0.93
    assert result["even"] > 0.93


def test_float64_stays_float64() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 1)).double()
    data = TensorLoader(torch.randn(6, 1, 4, 4, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64))
    history = fit(model, B, data, 1, options=replace(QUIET, precision="auto"))
    assert all(parameter.dtype == torch.float64 for parameter in model.parameters())
    assert history[0].loss["b"] != torch.tensor(history[0].loss["b"], dtype=torch.float32).item()


def test_zero_epochs_change_nothing() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(fit(model, [A, B], images(), 0, options=replace(QUIET, ema_decay=0.9))) == 0
    assert_bitwise(model.state_dict(), before)


class Unsized:
    def __iter__(self) -> Iterator[Any]:
        yield torch.randn(2, 4), torch.randn(2, 1)


class TooShort(Unsized):
    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Unsized(), "have no length"),
        ([], "the data hold no batch"),
        (TooShort(), "the data gave 1 batches in epoch 1, but their length is 2"),
        ([(torch.full((2, 4), math.nan), torch.randn(2, 1))], "task 'b': the loss is nan in epoch 1"),
        (DataLoader(TensorDataset(torch.randn(2, 4))), r"must be a pair \(input, target\)"),
    ],
)
def test_bad_data_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(nn.Linear(4, 1), B, data, 1, options=QUIET)


def test_negative_epochs_and_missing_outputs_are_refused() -> None:
    data = [(torch.randn(2, 4), {"a": torch.tensor([0, 1]), "b": torch.randn(2, 1)})]
    with pytest.raises(ValueError, match="epochs is -1"):
        fit(nn.Linear(4, 1), B, data, -1, options=QUIET)
    model = HardShared(nn.Identity(), {"a": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match="the output of the model has no entry for task 'b'"):
        fit(model, [A, B], data, 1, options=QUIET)


def test_a_penalty_is_added_to_the_loss_at_every_step_and_survives_a_resume(tmp_path: Path) -> None:
    seen: list[float] = []

    def decay(model: nn.Module, progress: float) -> torch.Tensor:
        seen.append(progress)
        return 0.1 * sum(parameter.square().sum() for parameter in model.parameters())

    options = FitOptions(
        lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, progress=False, device="cpu", precision="fp32"
    )
    data = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(3)]
    task, model = Task("value", nn.MSELoss()), nn.Linear(3, 2)
    expected, resumed = copy.deepcopy(model), copy.deepcopy(model)
    fit(model, task, data, epochs=2, options=options, penalty=decay)
    assert seen == [step / 6 for step in range(6)]
    for step in range(6):
        inputs, target = data[step % 3]
        loss = (expected(inputs) - target).square().mean() + 0.1 * sum(p.square().sum() for p in expected.parameters())
        gradients = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                parameter -= 0.1 * lr_factor("cosine", step, 6) * gradient
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()))

    def stop_in_the_second_epoch(model: nn.Module, progress: float) -> torch.Tensor:
        if progress > 0.6:
            raise KeyboardInterrupt
        return decay(model, progress)

    stop_in_the_second_epoch.__qualname__ = decay.__qualname__
    with pytest.raises(KeyboardInterrupt):
        fit(resumed, task, data, epochs=2, options=options, penalty=stop_in_the_second_epoch, folder=tmp_path)
    fit(resumed, task, data, epochs=2, options=options, penalty=decay, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ValueError, match="penalty is"):
        fit(resumed, task, data, epochs=2, options=options, folder=tmp_path)
