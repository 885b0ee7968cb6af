"""Two processes train as one does. What they run is below ``main``: this file is also the program of the processes."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import layers
from mtl import FitOptions, HardShared, Task, UnionSoftmax, fit
from mtl.data import TensorLoader
from mtl.processes import Processes
from mtl.sampling import steps_of

TASKS = [Task.classification("a"), Task.regression("b"), Task.multi_label("c")]
NAMES = ("equal", "uncertainty", "geometric", "gradnorm", "own data", "parameters", "accumulated")
NORMS = ("norm", "norm gradnorm", "norm own data", "short")  # with batch norms, which two processes synchronise


class Plain(nn.Module):
    """A model without a ``representation``."""

    def __init__(self, inner: HardShared) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.inner(inputs)


def data(name: str) -> Any:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(27, 4, dtype=torch.float64, generator=generator)
    a = torch.randint(3, (27,), generator=generator)
    b = inputs.sum(1)
    c = (torch.randn(27, 2, dtype=torch.float64, generator=generator) > 0).double()
    a[::4], b[1::5], c[3::7, 0] = -100, math.nan, math.nan
    batch_size = 13 if name == "short" else 5  # 27 rows: one is left for the last batch
    if name.endswith("own data"):
        parts = {"a": (inputs, a), "b": (inputs[:14], b[:14]), "c": (inputs[5:], c[5:])}
        return {task: TensorLoader(*pair, batch_size=batch_size, shuffle=True) for task, pair in parts.items()}
    return TensorLoader(inputs, {"a": a, "b": b, "c": c}, batch_size=batch_size, shuffle=True)


def trunk(name: str) -> nn.Module:
    if name not in NORMS:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    norm = nn.BatchNorm1d(4, track_running_stats=name != "short")
    model = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 4, 3), norm, nn.Tanh(), nn.Flatten())
    return layers.SyncBatchNorm.convert(model) if "WORLD_SIZE" in os.environ else model


def train(name: str, folder: str | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model: Any = HardShared(
        trunk(name),
        {"a": nn.Linear(8, 3), "b": nn.Linear(8, 1), "c": nn.Linear(8, 2)},
        union=UnionSoftmax(nn.Linear(8, 3), {"a": 3}) if name.endswith("own data") else None,
    ).double()
    if name == "parameters":
        model = Plain(model)
    if Processes.here().rank > 0:  # whatever else is in the other processes, the first one's model counts
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    options = FitOptions(
        device="cpu", progress=False, lr=0.05, max_grad_norm=1.0, ema_decay=0.9,
        accumulate=2 if name == "accumulated" else 1,
    )  # fmt: skip
    weighting = name if name in NAMES[1:4] else "gradnorm" if name in ("parameters", "norm gradnorm") else "equal"
    validation = data("equal")
    history = fit(
        model, TASKS, data(name), 2, weighting=weighting, validation=validation, folder=folder, options=options
    )
    return history, {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def main(folder: str) -> None:
    torch.set_num_threads(1)
    for name in (*NAMES, *NORMS):
        run = os.path.join(folder, name.replace(" ", "-"))
        history, weights = train(name, run)
        torch.save({"history": history.to_json(), "weights": weights}, f"{run}-{Processes.here().rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_are_one(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for name in (*NAMES, *NORMS):
        history, weights = train(name)
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{name.replace(' ', '-')}-{rank}.pt", weights_only=True)
            for key, tensor in weights.items():
                torch.testing.assert_close(found["weights"][key], tensor, rtol=0, atol=1e-9, msg=f"{name}: {key}")
            for row, expected in zip(found["history"], history.to_json(), strict=True):
                for group in ("loss", "train", "validation"):
                    assert row[group] == pytest.approx(expected[group], abs=1e-6), f"{name}: {group}"
        # one process goes on from, or shows, what two have left
        resumed, same = train(name, str(tmp_path / name.replace(" ", "-")))
        assert [row.loss for row in resumed] == [pytest.approx(row.loss, abs=1e-6) for row in history]
        key = next(key for key in weights if key.endswith("heads.a.weight"))
        torch.testing.assert_close(same[key], weights[key])


@pytest.mark.parametrize("size", [2, 3])
def test_the_parts_of_a_loss_average_to_the_loss(size: int) -> None:
    batch = next(iter(steps_of(data("equal"), TASKS, "proportional")))
    outputs = {"a": torch.randn(5, 3), "b": torch.randn(5), "c": torch.randn(5, 2)}
    for task in TASKS:
        expected = task.loss(*task.pair(outputs[task.name], batch.labels[task.name]))
        total = 0.0
        for rank in range(size):
            part, factors = Processes(rank, size).part(batch)
            output = outputs[task.name].tensor_split(size)[rank]
            if part.labels[task.name].count:
                loss = task.loss(*task.pair(output, part.labels[task.name]))
                total += factors[task.name] * loss.item() / size
            else:
                assert factors[task.name] == 0
        assert total == pytest.approx(expected.item())


def test_batch_norms_that_see_a_part_only_are_said_once() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match=r"1 batch norms, such as '1', .* 2 processes .* use layers.SyncBatchNorm"):
        Processes(0, 2).check_batch_norm(model)
    synchronised = nn.Sequential(nn.Linear(4, 3), nn.SyncBatchNorm(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Processes(1, 2).check_batch_norm(model)
        Processes(0, 1).check_batch_norm(model)
        Processes(0, 2).check_batch_norm(synchronised)


if __name__ == "__main__":
    main(sys.argv[1])
