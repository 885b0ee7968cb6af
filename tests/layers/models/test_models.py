"""What all networks of layers.models promise: sizes, known parameter counts, gradients everywhere."""

import pytest
import torch
from torch import nn

from layers import models

EMBEDDING = 1000 * 64


def _conv(in_channels: int, out_channels: int, kernel_size: int = 1) -> int:
    """Weights of a convolution without bias, and of its batch norm."""
    return out_channels * (in_channels * kernel_size**2 + 2)


def _block(n: int, width: int) -> int:
    few, many, fine, side = width // 4, width // 2, width // 16, width // 8
    return 2 * _conv(n, few) + _conv(few, many, 3) + _conv(n, fine) + _conv(fine, side, 5) + _conv(n, side)


def _reduction(n: int) -> int:
    half, few = n // 2, n // 4
    return _conv(n, half) + _conv(half, half, 3) + _conv(n, few) + 2 * _conv(few, few, 3)


# Known counts: resnet20 0.27 M and resnet56 0.85 M in table 6 of He et al. (2016); VGG-16 for CIFAR 14.73 M.
PARAMETERS = {
    "digits_cnn": 94_186,
    "highway_mlp": 65 * 50 + 8 * 2 * 51 * 50 + 51 * 10,
    "text_cnn": EMBEDDING + 2 * 32 * (64 * 3 + 1) + 32 * (64 * 5 + 1) + 97 * 10,
    "bilstm_crf": EMBEDDING + 2 * 4 * 64 * (64 + 64 + 2) + 129 * 10 + 10 * 12,
    "inception_cifar": _conv(3, 32, 3)
    + _block(32, 64)
    + _reduction(64)
    + _block(112, 128)
    + _reduction(128)
    + _block(224, 256)
    + 257 * 10,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "vgg16_bn_cifar": 14_728_266,
}


def build(name: str, num_classes: int = 10) -> nn.Module:
    return getattr(models, name)(num_classes)


def inputs(name: str, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if name in ("text_cnn", "bilstm_crf"):
        return torch.randint(0, 1000, (batch, 9))
    shape = (1, 8, 8) if name in ("digits_cnn", "highway_mlp") else (3, 32, 32)
    return torch.randn(batch, *shape, dtype=dtype)


def test_every_model_is_listed() -> None:
    assert set(models.__all__) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_output_and_gradients(name: str) -> None:
    model = build(name, num_classes=7)
    logits = model(inputs(name, 3))
    assert logits.shape == ((3, 9, 7) if name == "bilstm_crf" else (3, 7))
    assert logits.isfinite().all()
    logits.square().sum().backward()
    if name == "bilstm_crf":  # whose CRF is in its loss
        model.loss(logits.detach(), torch.zeros(3, 9, dtype=torch.long)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_images_do_not_influence_each_other_in_evaluation(name: str) -> None:
    model, x = build(name).eval(), inputs(name, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-4)
