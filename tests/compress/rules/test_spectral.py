import pytest
import torch
from torch import nn

import compress
from tests.compress.helpers import assert_exact, between, frozen_reasons, image

FUNCTIONS = {
    "real transform": lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, n=x.shape[-1]),
    "two axes": lambda x: torch.fft.irfft2(torch.fft.rfft2(x).conj(), s=x.shape[-2:]),
    "complex": lambda x: torch.fft.ifft(torch.fft.fft(x, dim=2), dim=2).real,
    "conjugate": lambda x: torch.fft.fft(x).conj().imag,
    "pairs": lambda x: torch.view_as_real(torch.fft.fft(x)).sum(-1),
    "from pairs": lambda x: torch.view_as_complex(torch.stack([x, 2 * x], dim=-1)).imag,
}
CASES = {name: (lambda f=f: (between(f), image())) for name, f in FUNCTIONS.items()}


@pytest.mark.parametrize("name", CASES)
def test_removal_equals_masking(name: str) -> None:
    assert_exact(*CASES[name]())


def test_a_transform_over_the_channels_freezes_them() -> None:
    graph = compress.trace(between(lambda x: torch.fft.fft(x, dim=1).real), image())
    assert "transforms the axis" in frozen_reasons(graph, "0.weight")


class SpectralConvolution(nn.Module):
    """The lowest frequencies times complex weights (Li et al. 2021, Fourier neural operator, section 4)."""

    def __init__(self, channels: int = 11, modes: int = 3) -> None:
        super().__init__()
        self.channels, self.modes = channels, modes
        self.weight = nn.Parameter(torch.randn(channels, channels, modes, dtype=torch.complex128))

    def forward(self, x):
        spectrum = torch.fft.rfft(x)
        out = torch.zeros(x.shape[0], self.channels, spectrum.shape[-1], dtype=spectrum.dtype, device=x.device)
        out[:, :, : self.modes] = torch.einsum("bix,iox->box", spectrum[:, :, : self.modes], self.weight)
        return torch.fft.irfft(out, n=x.shape[-1])


def test_complex_weights_prune_along_both_of_their_channel_axes() -> None:
    model = nn.Sequential(nn.Conv1d(3, 11, 1), SpectralConvolution(), nn.GELU(), nn.Conv1d(11, 5, 1)).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    result = compress.prune(model, x, budget=compress.Budget(channels=0.5))
    assert result.plan.exact
    assert max(result.model[1].weight.shape[:2]) < 11
    torch.testing.assert_close(result.model(x), compress.mask(model, result.plan)(x))
