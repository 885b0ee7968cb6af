"""The CIFAR ResNets: the shortcut of option A, and checkpoints that load unchanged."""

from pathlib import Path

import pytest
import torch

from layers import models
from layers.models.resnet_cifar import PaddedShortcut


def test_shortcut_is_option_a() -> None:
    x = torch.randn(2, 5, 9, 7)
    y = PaddedShortcut(5, 12, stride=2)(x)
    expected = torch.zeros(2, 12, 5, 4)
    expected[:, 3:8] = x[:, :, ::2, ::2]
    assert torch.equal(y, expected)


def test_shortcut_follows_its_stored_numbers() -> None:
    shortcut = PaddedShortcut(16, 32, stride=2)
    assert (shortcut.channels_before, shortcut.channels_after) == (8, 8)
    shortcut.channels_before, shortcut.channels_after = 3, 0
    y = shortcut(torch.ones(1, 4, 2, 2))
    assert y[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("file", "build"),
    [("resnet20-12fca82f.th", models.resnet20_cifar), ("resnet56-4bfd9763.th", models.resnet56_cifar)],
)
def test_published_checkpoint_loads(checkpoints: Path, file: str, build: type) -> None:
    if not (checkpoints / file).is_file():
        pytest.skip(f"{file} is not in PRUNUS_CHECKPOINTS")
    state = torch.load(checkpoints / file, map_location="cpu", weights_only=True)["state_dict"]
    model = build()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=True)
    loaded = model.state_dict()
    for name, value in state.items():
        assert torch.equal(loaded[name.removeprefix("module.")], value)
