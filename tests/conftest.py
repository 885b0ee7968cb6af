"""What every test relies on: the same seeds before each test, and one thread, so that numbers repeat."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # two workers on two cores: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    """A test that changes the default dtype must not change the next one."""
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def checkpoints() -> Path:
    """Folder of the CIFAR ResNet checkpoints, named by PRUNUS_CHECKPOINTS; without it the test is skipped."""
    folder = os.environ.get("PRUNUS_CHECKPOINTS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set PRUNUS_CHECKPOINTS to the folder that holds resnet20-12fca82f.th and resnet56-4bfd9763.th")
    return Path(folder)
