"""The operators as PyTorch sees them: schemas, fake tensors, autograd, torch.compile, errors, several processes."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from layers.functional import (
    ConvArguments,
    bn_act,
    bn_act_conv,
    conv_act,
    crf_log_partition,
    highway_gates,
    linear_act,
)


def tensor(*shape: int, channels_last: bool = False, **options: Any) -> Tensor:
    x = torch.randn(shape, **options)
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(channels_last: bool) -> None:
    x, other = (tensor(2, 4, 5, 3, channels_last=channels_last) for _ in range(2))
    weight, kernel = tensor(4), tensor(6, 4, 3, 3)
    geometry = ([2, 1], [1, 1], [1, 1], 1)
    operators = torch.ops.prunus
    y, mean, inverse_std, _ = (t.detach() for t in operators.bn_act(x, other, weight, None, "relu", 1e-5, ""))
    out = operators.bn_act_conv(x, weight, None, kernel, None, "relu", 1e-5, "", *geometry)[0].detach()
    with torch.no_grad():
        backward = (x.detach(), x.detach(), y, weight.detach(), None, mean, inverse_std, "relu", "")
        torch.library.opcheck(operators.bn_act_backward.default, backward)
        backward = (out, x.detach(), weight.detach(), None, mean, inverse_std, kernel.detach(), "relu", "", *geometry)
        torch.library.opcheck(operators.bn_act_conv_backward.default, backward)
        torch.library.opcheck(operators.conv_act.default, (x.detach(), kernel.detach(), None, None, "relu", *geometry))
    for residual in (None, other):
        torch.library.opcheck(operators.bn_act.default, (x, residual, weight, tensor(4), "relu6", 1e-5, ""))
    torch.library.opcheck(operators.bn_act_conv.default, (x, weight, None, kernel, None, "relu", 1e-5, "", *geometry))
    torch.library.opcheck(operators.linear_act.default, (tensor(5, 3), tensor(4, 3), tensor(4), tensor(5, 4), "relu"))
    for carry in (None, other):
        torch.library.opcheck(operators.highway.default, (x, other, x, carry, "relu"))
        with torch.no_grad():
            torch.library.opcheck(
                operators.highway_backward.default, (y, y, y, y, None if carry is None else y, "relu")
            )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck_of_crf() -> None:
    emissions, transitions, start, end = tensor(2, 4, 3), tensor(3, 3), tensor(3), tensor(3)
    kinds = torch.tensor([[1, 2, 2, 2], [0, 1, 0, 2]], dtype=torch.int8)
    operators = torch.ops.prunus
    torch.library.opcheck(operators.crf_forward.default, (emissions, transitions, start, end, kinds))
    with torch.no_grad():
        log_z, alphas = operators.crf_forward(emissions, transitions, start, end, kinds)
        arguments = (log_z, emissions.detach(), transitions.detach(), end.detach(), kinds, alphas, log_z)
        torch.library.opcheck(operators.crf_backward.default, arguments)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu"])
def test_gradcheck(activation: Any) -> None:
    double = {"dtype": torch.float64}
    x, other, weight, bias = (
        tensor(3, 4, 5, 2, **double),
        tensor(3, 4, 5, 2, **double),
        tensor(4, **double),
        tensor(4, **double),
    )
    kernel, shift = tensor(6, 2, 3, 1, **double), tensor(6, **double)

    def convolution(x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, shift: Tensor) -> Tensor:
        conv = ConvArguments(kernel, shift, stride=(2, 1), padding=1, groups=2)
        return bn_act_conv(x, conv, weight=weight, bias=bias, activation=activation)[0]

    def norm(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        residual = None if activation == "silu" else other
        return bn_act(x, residual, weight=weight, bias=bias, activation=activation)[0]

    assert torch.autograd.gradcheck(norm, (x, other, weight, bias))
    assert torch.autograd.gradgradcheck(norm, (x[:2, :, :2], other[:2, :, :2], weight, bias))

    def highway(h: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return highway_gates(h, t, x, activation=activation) + highway_gates(h, t, x, t, activation=activation)

    blocks = tuple(tensor(2, 3, **double) for _ in range(3))
    assert torch.autograd.gradcheck(highway, blocks)
    assert torch.autograd.gradgradcheck(highway, blocks)
    assert torch.autograd.gradcheck(convolution, (x, weight, bias, kernel, shift))
    product = (tensor(5, 3, **double), tensor(4, 3, **double), tensor(4, **double), tensor(5, 4, **double))
    assert torch.autograd.gradcheck(lambda *args: linear_act(*args, activation=activation), product)


def test_gradcheck_of_crf() -> None:
    inputs = [tensor(*shape, dtype=torch.float64) for shape in ((2, 4, 3), (3, 3), (3,), (3,))]
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    assert torch.autograd.gradcheck(lambda *args: crf_log_partition(*args, mask), inputs)
    assert torch.autograd.gradgradcheck(lambda *args: crf_log_partition(*args, mask), inputs)


def test_compiles_without_graph_breaks() -> None:
    x, weight, kernel = tensor(2, 4, 5, 3), tensor(4), tensor(4, 4, 3, 3)

    def function(x: Tensor, weight: Tensor, kernel: Tensor) -> Tensor:
        y, mean, _ = bn_act(x, x, weight=weight)
        z, _, _ = bn_act_conv(y, ConvArguments(kernel, padding=1), weight=weight)
        return linear_act(z.flatten(1), z.flatten(1)) + conv_act(z, ConvArguments(kernel)).sum() + mean.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    gradients = []
    for f in (function, compiled):
        y = f(x, weight, kernel)
        gradients.append((y, *torch.autograd.grad(y.sum(), (x, weight, kernel))))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_strided_data_is_taken() -> None:
    x = tensor(4, 6, 8, 10).detach()[:, ::2, 1:, ::3]
    expected = torch.relu(nn.BatchNorm2d(3)(x))
    torch.testing.assert_close(bn_act(x)[0], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: bn_act(x, activation="tanh"), "'tanh'.*relu6"),
        (lambda x: bn_act(x[:, 0, 0, 0]), r"\(2,\).*channels"),
        (lambda x: bn_act(x[:0]), r"\(0, 3, 4, 4\).*more than 1"),
        (lambda x: bn_act(x[:1, :, :1, :1]), r"\(1, 3, 1, 1\).*more than 1"),
        (lambda x: bn_act(x, weight=torch.ones(4)), r"weight has shape \(4,\).*\(3,\)"),
        (lambda x: bn_act(x, x[:1]), r"residual.*\(1, 3, 4, 4\).*\(2, 3, 4, 4\)"),
        (lambda x: bn_act(x, x, activation="silu"), "silu"),
        (lambda x: bn_act(x.long()), "int64"),
        (lambda x: bn_act_conv(x, ConvArguments(torch.ones(2, 4, 1, 1))), r"\(2, 4, 1, 1\)"),
        (lambda x: bn_act_conv(x, ConvArguments(torch.ones(2, 3, 1, 1), padding="same")), "'same'"),
        (lambda x: conv_act(x, ConvArguments(torch.ones(2, 3, 1, 1)), x), r"residual.*\(2, 2, 4, 4\)"),
        (lambda x: linear_act(x, torch.ones(2, 3)), r"\(2, 3, 4, 4\).*\(2, 3\)"),
        (lambda x: linear_act(x, torch.ones(2, 4), torch.ones(3)), r"bias.*\(3,\)"),
        (lambda x: linear_act(x, torch.ones(2, 4).half()), "float16"),
        (lambda x: highway_gates(x, x[:1], x), r"t is.*\(1, 3, 4, 4\).*\(2, 3, 4, 4\)"),
        (lambda x: highway_gates(x, x, x, activation="tanh"), "'tanh'.*relu6"),
        (lambda x: crf_log_partition(x, x, x, x), r"emissions.*\(2, 3, 4, 4\)"),
        (lambda x: crf_log_partition(x[0], x[0, 0], x[0, 0, 0], x[0, 0]), r"end has shape \(4, 4\).*\(4,\)"),
        (lambda x: crf_log_partition(x[0], x[0, 0], x[0, 0, 0], x[0, 0, 0], x[0, :, :, 0]), "mask is torch.float32"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 4, 4))


def test_empty_products() -> None:
    assert linear_act(torch.ones(0, 3), torch.ones(2, 3)).shape == (0, 2)
    assert torch.equal(linear_act(torch.ones(2, 0), torch.ones(3, 0)), torch.zeros(2, 3))
    assert conv_act(torch.ones(0, 3, 4, 4), ConvArguments(torch.ones(2, 3, 1, 1))).shape == (0, 2, 4, 4)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The batch is cut unevenly: counts are part of what is summed."""
    x, dy = torch.randn(5, 3, 4, 2), torch.randn(5, 3, 4, 2)
    weight, bias = torch.randn(3), torch.randn(3)
    torch.save((x, dy, weight, bias), tmp_path / "data")
    mp.spawn(_rank, args=(tmp_path,), nprocs=2)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y, mean, variance = bn_act(x, x, weight=weight, bias=bias)
    y.backward(dy)
    parts = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    for i, expected in ((0, y), (1, x.grad)):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), expected)
    for i, expected in ((2, weight.grad), (3, bias.grad)):
        torch.testing.assert_close(parts[0][i] + parts[1][i], expected)
    for part in parts:
        torch.testing.assert_close(part[4], mean)
        torch.testing.assert_close(part[5], variance)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    x, dy, weight, bias = torch.load(folder / "data", weights_only=True)
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    x = x[mine].clone().requires_grad_()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    y, mean, variance = bn_act(x, x, weight=weight, bias=bias, group=dist.group.WORLD)
    y.backward(dy[mine])
    torch.save(tuple(t.detach() for t in (y, x.grad, weight.grad, bias.grad, mean, variance)), folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()
