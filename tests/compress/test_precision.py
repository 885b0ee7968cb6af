import pytest
import torch
from torch import nn

from compress.precision import in_double, widened, widest


def test_types_widen_within_their_kind() -> None:
    assert [widest(t) for t in (torch.float16, torch.float64, torch.complex64, torch.int8, torch.bool)] == [
        torch.float64, torch.float64, torch.complex128, torch.int8, torch.bool,
    ]  # fmt: skip
    assert widened("a text") == "a text"
    assert widened(torch.bfloat16) is torch.float64


class Mixed(nn.Module):
    """Casts of its own, tensors it makes, integers, a cache, and every kind of layer that reads weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(2), nn.Linear(4, 8))
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.embedding = nn.Embedding(5, 8)
        self.register_buffer("last", torch.zeros(8))

    def forward(self, x):
        x = self.norm(self.body(x).to(self.last.dtype))
        x = x + self.embedding(torch.arange(5).repeat(2)[: x.shape[1]]) + torch.ones(8, dtype=self.last.dtype)
        self.last.copy_(x[0, 0])
        x, _ = self.attention(x, x, x, need_weights=False)
        return x.to(torch.float32) / 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_a_model_in_double_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Mixed().to(dtype).eval()
    x = torch.rand(2, 3, 4, 4).to(dtype).double()
    before = {name: (value.dtype, value.data_ptr()) for name, value in model.state_dict().items()}
    with torch.no_grad(), in_double():
        found = model(x)
    assert {name: (value.dtype, value.data_ptr()) for name, value in model.state_dict().items()} == before
    assert found.dtype == torch.float64
    copy = Mixed().double().eval()
    copy.load_state_dict({name: widened(value) for name, value in model.state_dict().items()})
    copy.forward = lambda x: Mixed.forward(copy, x)
    with torch.no_grad():
        expected = copy(x)
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-7)  # the copy itself ends in single


def test_what_is_written_to_keeps_its_type() -> None:
    cache = torch.zeros(3, dtype=torch.bfloat16)
    with in_double():
        cache.copy_(torch.tensor([1.0, 2.0, 3.0]))
        cache.masked_fill_(torch.tensor([True, False, False]), 5.0)
        cache[1:] += torch.ones(2, dtype=torch.float64)
        twice = cache * 2
    assert cache.dtype == torch.bfloat16
    assert twice.dtype == torch.float64
    assert twice.tolist() == [10.0, 6.0, 8.0]
