import pytest
import torch

from compress.sums import channel_sums

SHAPES = [(5, 3, 7, 9), (300, 3, 4, 4), (256, 8, 1, 1), (3, 8, 5), (600, 16), (16, 24), (255, 8), (7,),
          (2, 3, 9, 9, 2), (4, 11, 8), (1, 16, 700, 300), (0, 5)]  # fmt: skip


def _draw(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return torch.where(value.abs() < 0.7, 0.0, value).to(dtype)  # about half of it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_on_every_axis_and_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = _draw(shape, dtype)
    layouts = [value, value.movedim(0, -1).contiguous().movedim(-1, 0), value[..., ::2]]
    layouts += [value.contiguous(memory_format=torch.channels_last)] if value.dim() == 4 else []
    for found in layouts:
        for axis in range(found.dim()):
            others = [d for d in range(found.dim()) if d != axis]
            double = found.double().abs()
            magnitude, nonzero = channel_sums(found, axis)
            expected = double.sum(others) if others else double
            torch.testing.assert_close(magnitude, expected, rtol=1e-6, atol=0)
            assert torch.equal(nonzero, (double > 0).long().sum(others) if others else (double > 0).long())
            again = channel_sums(found.abs(), axis, nonnegative=True)
            torch.testing.assert_close(again[0], expected, rtol=1e-6, atol=0)


def test_nothing_is_zero_in_255_or_more_rows() -> None:
    """Counts are added as bytes, which must not overflow into each other."""
    for rows in (254, 255, 256, 510, 511, 1000):
        assert channel_sums(torch.ones(rows, 16), 1)[1].tolist() == [rows] * 16


def test_tiny_and_endless_values_are_not_zero() -> None:
    value = torch.tensor([[1e-40, float("inf"), float("nan"), -1.0, 0.0, -0.0, 3e38, 1.0]]).T.repeat(1, 16)
    magnitude, nonzero = channel_sums(value, 1)
    assert nonzero.tolist() == [6] * 16
    assert not torch.isfinite(magnitude).any()
