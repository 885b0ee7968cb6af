"""Every operator of `layers.kernels` against float64 PyTorch, on CPU kernels and on interpreted Triton kernels.

The interpreter is chosen when kernels are decorated, hence a process of its own: this file run as a program.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import layers
from layers.functional import (
    ConvArguments,
    bn_act,
    bn_act_conv,
    conv_act,
    crf_log_partition,
    highway_gates,
    linear_act,
)
from layers.kernels.dispatch import has_triton

ACTIVATE = {"none": lambda z: z, "relu": F.relu, "relu6": F.relu6, "silu": F.silu}
# Relative to the norm of the tensor. Data of 16 bits are rounded once at the end (2^-9, 2^-12), where the interpreter
# rounds towards zero.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-6)).item()


def check(
    function: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: list[Tensor | None],
    differentiable: bool = True,
) -> None:
    """Result, and every gradient where there are any, against `expected` in float64."""
    mine = [None if t is None else t.clone().requires_grad_(differentiable) for t in inputs]
    wide = [None if t is None else t.double().requires_grad_(differentiable) for t in inputs]
    y, wanted = function(*mine), expected(*wide)
    assert y.shape == wanted.shape
    tolerance = TOLERANCE[next(t for t in inputs if t is not None).dtype]
    assert error(y, wanted) < tolerance, (error(y, wanted), tolerance)
    if differentiable:
        dy = torch.randn_like(y)
        y.backward(dy)
        wanted.backward(dy.double())
        for i, (a, b) in enumerate(zip(mine, wide, strict=True)):
            if a is not None:
                assert error(a.grad, b.grad) < 4 * tolerance, (i, error(a.grad, b.grad))


def data(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=1e-5)


def bn_act_case(
    shape: tuple[int, ...], activation: Any, residual: bool, dtype: torch.dtype, channels_last: bool
) -> None:
    x = 3 * data(*shape, dtype=dtype, channels_last=channels_last) + 2
    other = data(*shape, dtype=dtype, channels_last=channels_last) if residual else None
    weight, bias = (data(shape[1], dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))

    def expected(x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        z = batch_norm(x, weight, bias)
        return ACTIVATE[activation](z if other is None else z + other)

    check(
        lambda x, r, w, b: bn_act(x, r, weight=w, bias=b, activation=activation)[0], expected, [x, other, weight, bias]
    )
    _, mean, variance = bn_act(x, weight=weight, bias=bias, activation=activation)
    flat = x.double().transpose(0, 1).flatten(1)
    assert error(mean, flat.mean(1)) < 1e-6
    assert error(variance, flat.var(1)) < 1e-5


def bn_act_conv_case(activation: Any, dtype: torch.dtype, channels_last: bool) -> None:
    x = data(2, 4, 5, 3, dtype=dtype, channels_last=channels_last)
    weight, bias = (data(4, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
    inputs = [x, weight, bias, data(6, 2, 3, 1, dtype=dtype), data(6, dtype=dtype)]
    geometry: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "dilation": 1, "groups": 2}

    def function(x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, shift: Tensor) -> Tensor:
        return bn_act_conv(
            x, ConvArguments(kernel, shift, **geometry), weight=weight, bias=bias, activation=activation
        )[0]

    def expected(x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, shift: Tensor) -> Tensor:
        return F.conv2d(ACTIVATE[activation](batch_norm(x, weight, bias)), kernel, shift, **geometry)

    check(function, expected, inputs)


def linear_act_case(activation: Any, residual: bool, bias: bool, dtype: torch.dtype) -> None:
    x, weight = data(3, 7, 37, dtype=dtype), data(19, 37, dtype=dtype)
    shift, other = data(19, dtype=dtype) if bias else None, data(3, 7, 19, dtype=dtype) if residual else None

    def expected(x: Tensor, weight: Tensor, shift: Tensor | None, other: Tensor | None) -> Tensor:
        z = F.linear(x, weight, shift)
        return ACTIVATE[activation](z if other is None else z + other)

    check(lambda x, w, b, r: linear_act(x, w, b, r, activation=activation), expected, [x, weight, shift, other])


def conv_act_case(activation: Any, residual: bool, kernel: int, dtype: torch.dtype, channels_last: bool) -> None:
    x = data(2, 4, 7, 5, dtype=dtype, channels_last=channels_last)
    groups, stride, padding = (1, 1, 0) if kernel == 1 else (2, (2, 1), (1, 0))
    weight, bias = data(6, 4 // groups, kernel, kernel, dtype=dtype), data(6, dtype=dtype)
    geometry: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": 1, "groups": groups}
    other = torch.randn_like(F.conv2d(x.double(), weight.double(), None, **geometry)).to(dtype) if residual else None

    def expected(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None) -> Tensor:
        z = F.conv2d(x, weight, bias, **geometry)
        return ACTIVATE[activation](z if other is None else z + other)

    def function(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None) -> Tensor:
        y = conv_act(x, ConvArguments(weight, bias, **geometry), other, activation=activation)
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        return y

    check(function, expected, [x, weight, bias, other], differentiable=False)


def crf_case(tags: int, masked: bool, dtype: torch.dtype) -> None:
    """Steps in front, in the middle and at the end may not count, and nothing of them may be seen."""
    emissions, crf = 2 * data(3, 6, tags, dtype=dtype), layers.CRF(tags).double()
    mask = torch.tensor([[1] * 6, [0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0]]).bool() if masked else None

    def expected(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor) -> Tensor:
        parameters = {"transitions": transitions, "start": start, "end": end}
        return torch.func.functional_call(LogPartition(crf), parameters, (emissions, mask))

    parameters = [data(*p.shape, dtype=dtype) for p in crf.parameters()]
    check(lambda *args: crf_log_partition(*args, mask), expected, [emissions, *parameters])


class LogPartition(nn.Module):
    """As the layer computes it step by step."""

    def __init__(self, crf: layers.CRF) -> None:
        super().__init__()
        self.transitions, self.start, self.end = crf.transitions, crf.start, crf.end

    def forward(self, emissions: Tensor, mask: Tensor | None) -> Tensor:
        alphas = layers.CRF._alphas(self, emissions, mask, torch.logsumexp)  # type: ignore[arg-type]
        return (alphas[-1] + self.end).logsumexp(1)


def highway_case(activation: Any, free: bool, dtype: torch.dtype, channels_last: bool) -> None:
    h, t, x, c = (data(2, 5, 7, 3, dtype=dtype, channels_last=channels_last) for _ in range(4))

    def expected(h: Tensor, t: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        gate = t.sigmoid()
        return ACTIVATE[activation](h) * gate + x * (1 - gate if c is None else c.sigmoid())

    check(lambda *args: highway_gates(*args, activation=activation), expected, [h, t, x, c if free else None])


def cases(dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]) -> Iterator[tuple[Any, ...]]:
    """Case and arguments: every activation with and without residual, dtype, layout."""
    for dtype, activation, residual in itertools.product(dtypes, ACTIVATE, (False, True)):
        if activation == "relu6" and residual and dtype in (torch.bfloat16, torch.float16):
            continue  # rounding the result to 16 bits puts some elements on the other side of 6
        for channels_last in (False, True):
            for shape in shapes:
                if not (residual and activation == "silu") and (len(shape) == 4 or not channels_last):
                    yield bn_act_case, shape, activation, residual, dtype, channels_last
            if not residual:
                yield bn_act_conv_case, activation, dtype, channels_last
            for kernel in (1, 3):
                yield conv_act_case, activation, residual, kernel, dtype, channels_last
            yield highway_case, activation, residual, dtype, channels_last
        yield linear_act_case, activation, residual, residual, dtype
    for dtype in dtypes:
        for masked in (False, True):
            yield crf_case, 5, masked, dtype


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_against_float64(dtype: torch.dtype) -> None:
    for case, *arguments in cases((dtype,), ((3, 5, 7, 9), (5, 7), (2, 3, 11))):
        torch.manual_seed(0)  # an activation with a kink may fall on the other side of it in 16 bits: for some data
        case(*arguments)


@pytest.mark.skipif(not has_triton(), reason="needs Triton")
def test_triton_kernels_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PRUNUS_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "18 cases agree" in run.stdout, run.stdout


def main() -> None:
    """Few cases: one program of a kernel takes the interpreter milliseconds."""
    from layers.kernels.dispatch import uses_triton
    from tests.layers.kernels.test_blocks import CHECKS

    torch.manual_seed(0)
    torch.set_num_threads(1)
    assert uses_triton(torch.ones(1))
    half = torch.bfloat16
    chosen: list[tuple[Any, ...]] = [
        (bn_act_case, (2, 3, 7, 5), "relu", True, torch.float32, False),
        (bn_act_case, (2, 3, 7, 5), "relu6", False, torch.float32, True),
        (bn_act_case, (2, 3, 7, 5), "silu", False, torch.float32, True),
        (bn_act_case, (2, 3, 7, 5), "none", True, torch.float32, True),
        (bn_act_case, (2, 3, 7, 5), "relu", True, half, True),
        (bn_act_case, (5, 7), "relu", False, torch.float16, False),
        (bn_act_case, (300, 2), "relu", False, torch.float32, False),  # several programs to merge
        (bn_act_conv_case, "relu", torch.float32, True),
        (bn_act_conv_case, "relu", half, False),
        (linear_act_case, "relu", True, True, torch.float32),
        (linear_act_case, "relu6", False, False, torch.float16),  # the interpreter multiplies bfloat16 wrongly
        (conv_act_case, "relu", True, 1, torch.float32, True),
        (conv_act_case, "relu6", True, 3, half, False),
        (conv_act_case, "silu", False, 3, torch.float32, True),
        (crf_case, 5, True, torch.float32),
        (crf_case, 17, False, half),
        (highway_case, "relu", False, torch.float32, True),
        (highway_case, "silu", True, half, False),
    ]
    for case, *arguments in chosen:
        case(*arguments)
    for check_all in CHECKS:
        check_all()
    sys.stdout.write(f"{len(chosen)} cases agree\n")


if __name__ == "__main__":
    main()
