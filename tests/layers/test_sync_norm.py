"""SyncBatchNorm: two processes are one, and one process alone is plain batch norm."""

import copy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import layers
from layers import SyncBatchNorm


def network() -> nn.Sequential:
    block = layers.Residual(layers.ConvBNAct(4, 4, 3, activation=None), activation="relu")
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), block, nn.Flatten(), nn.BatchNorm1d(24))


def trained(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output, gradients of input and parameters, buffers; of two steps, so that running statistics move twice."""
    x = x.clone().requires_grad_()
    for _ in range(2):
        y = model(x)
        y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The batch is cut unevenly; in float64, since sums are taken in another order."""
    model = network().double()
    x, dy = torch.randn(5, 3, 4, 5, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    torch.save((x, dy, model.state_dict()), tmp_path / "data")
    mp.spawn(_rank, args=(tmp_path,), nprocs=2)
    y, dx, *rest = trained(model, x, dy)
    parts = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    strict = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), y, **strict)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), dx, **strict)
    num_parameters = len(list(model.parameters()))
    for i, expected in enumerate(rest):
        first, second = (part[2 + i] for part in parts)
        if i < num_parameters:
            torch.testing.assert_close(first + second, expected, **strict)
        else:
            torch.testing.assert_close(first, expected, **strict)
            assert torch.equal(first, second)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    x, dy, state = torch.load(folder / "data", weights_only=True)
    model = network().double()
    model.load_state_dict(state)
    model = SyncBatchNorm.convert(model)
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    torch.save(trained(model, x[mine], dy[mine]), folder / str(rank))
    x = x[mine]
    assert torch.equal(model.eval()(x), model(x))  # no communication, so that ranks may evaluate alone
    dist.barrier()
    dist.destroy_process_group()


def test_alone_it_is_batch_norm() -> None:
    model = network()
    converted = SyncBatchNorm.convert(copy.deepcopy(model))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert not any(type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) for module in converted.modules())
    x, dy = torch.randn(5, 3, 4, 5), torch.randn(5, 24)
    for actual, expected in zip(trained(converted, x, dy), trained(model, x, dy), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(layers.fold_batch_norm(converted)(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_conversion_keeps_parameters_and_sharing() -> None:
    norm = nn.BatchNorm2d(3, momentum=None).eval()
    model = nn.ModuleDict({"a": norm, "b": norm})
    converted = SyncBatchNorm.convert(model)
    assert converted is model
    made = model["a"]
    assert isinstance(made, SyncBatchNorm)
    assert made is model["b"]
    assert made.weight is norm.weight
    assert made.running_mean is norm.running_mean
    assert made.momentum is None
    assert not made.training
    assert isinstance(SyncBatchNorm.convert(norm), SyncBatchNorm)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="SyncBatchNorm: input needs more than one value a channel"):
        SyncBatchNorm(3)(torch.zeros(1, 3, 1))
    with pytest.raises(ValueError, match=r"SyncBatchNorm: input must have shape \(batch, 3, ...\).*\(2, 4\)"):
        SyncBatchNorm(3)(torch.zeros(2, 4))
