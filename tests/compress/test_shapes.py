"""Quick shapes against the operators themselves on real tensors: shape, strides, type, and what they refuse."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.shapes import _KNOWN, QuickShapes

aten = torch.ops.aten
IMAGE, ROWS = (2, 6, 5, 4), (3, 6)


def _image(*, channels_last: bool = False) -> Tensor:
    return torch.rand(IMAGE).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _norm(*, training: bool, affine: bool = True) -> tuple:
    weight = (torch.ones(6), torch.zeros(6)) if affine else (None, None)
    return (_image(channels_last=True), *weight, torch.zeros(6), torch.ones(6), training, 0.1, 1e-5)


CALLS: dict[str, tuple[Callable, tuple]] = {
    "batch norm, evaluation": (aten.native_batch_norm.default, _norm(training=False)),
    "batch norm, training": (aten.native_batch_norm.default, _norm(training=True)),
    "batch norm, plain": (aten.native_batch_norm.default, _norm(training=True, affine=False)),
    "layer norm": (aten.native_layer_norm.default, (torch.rand(2, 3, 6), [6], torch.ones(6), torch.zeros(6), 1e-5)),
    "layer norm over two axes": (aten.native_layer_norm.default, (torch.rand(2, 3, 6), [3, 6], None, None, 1e-5)),
    "layer norm, transposed": (
        aten.native_layer_norm.default,
        (torch.rand(2, 6, 3).transpose(1, 2), [6], torch.ones(6), torch.zeros(6), 1e-5),
    ),
    "addmm": (aten.addmm.default, (torch.rand(7), torch.rand(ROWS), torch.rand(6, 7))),
    "addmm with a full bias": (aten.addmm.default, (torch.rand(3, 7), torch.rand(ROWS), torch.rand(6, 7))),
    "softmax": (aten._softmax.default, (_image(), 1, False)),
    "log softmax": (aten._log_softmax.default, (_image(), 1, False)),
    "safe softmax": (aten._safe_softmax.default, (_image(), -1)),
    "safe softmax to another type": (aten._safe_softmax.default, (_image(), -1, torch.float64)),
    "roll": (aten.roll.default, (_image(), [1], [2])),
    "hardswish": (aten.hardswish.default, (_image(),)),
    "hardswish in place": (aten.hardswish_.default, (_image(),)),
    "gelu": (aten.gelu.default, (_image(channels_last=True),)),
    "clamp": (aten.clamp.default, (_image(), 0.0, 1.0)),
    "add in place": (aten.add_.Tensor, (_image(), torch.rand(6, 1, 1))),
    "multiply by channel": (aten.mul.Tensor, (_image(channels_last=True), torch.rand(2, 6, 1, 1))),
    "each broadcasts the other": (aten.add.Tensor, (torch.rand(3, 1), torch.rand(1, 4))),
    "types meet": (aten.mul.Tensor, (torch.rand(3), torch.ones(3, dtype=torch.float64))),
    "a number as a tensor": (aten.mul.Tensor, (torch.rand(3), torch.tensor(2.0, dtype=torch.float64))),
    "integers and a float": (aten.mul.Tensor, (torch.arange(3), 0.5)),
    "comparison": (aten.lt.Scalar, (torch.rand(3), 0.5)),
    "where": (aten.where.self, (torch.rand(3) > 0.5, torch.rand(3), torch.rand(3, dtype=torch.float64))),
}


def _described(result: object) -> list[tuple]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [(t.shape, t.stride(), t.dtype) for t in tensors]


def _on_meta(args: tuple) -> tuple:
    return tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)


@pytest.mark.parametrize("name", CALLS)
def test_shapes_strides_and_types_are_those_of_the_operator(name: str) -> None:
    func, args = CALLS[name]
    shapes = QuickShapes()
    for _ in range(2):  # the second time from memory
        found = shapes(func, _on_meta(args), {})
        assert _described(found) == _described(func(*args))
        assert all(t.is_meta for t in (found if isinstance(found, tuple) else (found,)))


def test_every_known_operator_is_tried() -> None:
    assert set(_KNOWN) <= {func for func, _ in CALLS.values()}


def test_a_type_that_was_seen_does_not_decide_for_another() -> None:
    shapes = QuickShapes()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for scalar in (2, 2.5):
            args = (torch.arange(3), scalar) if dtype is torch.bfloat16 else (torch.rand(3, dtype=dtype), scalar)
            assert shapes(aten.mul.Tensor, _on_meta(args), {}).dtype == aten.mul.Tensor(*args).dtype


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.addmm.default, (torch.rand(7), torch.rand(3, 5), torch.rand(6, 7))),
        (aten.addmm.default, (torch.rand(5), torch.rand(ROWS), torch.rand(6, 7))),
        (aten.native_layer_norm.default, (torch.rand(2, 5), [6], torch.ones(6), torch.zeros(6), 1e-5)),
        (aten.add.Tensor, (torch.rand(3), torch.rand(4))),
        (aten.add_.Tensor, (torch.rand(3, 1), torch.rand(3, 4))),
    ],
)
def test_what_the_operator_refuses_is_refused(func: Callable, args: tuple) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        func(*args)
    with pytest.raises((RuntimeError, ValueError)):
        QuickShapes()(func, _on_meta(args), {})
