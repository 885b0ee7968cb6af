"""What all networks of layers.models promise: sizes, known parameter counts, gradients everywhere."""

import pytest
import torch
from torch import nn

from layers import models

# Known counts: resnet20 0.27 M and resnet56 0.85 M in table 6 of He et al. (2016); VGG-16 for CIFAR 14.73 M.
PARAMETERS = {
    "digits_cnn": 94_186,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "vgg16_bn_cifar": 14_728_266,
}


def build(name: str, num_classes: int = 10) -> nn.Module:
    return getattr(models, name)(num_classes=num_classes)


def inputs(name: str, batch: int) -> torch.Tensor:
    return torch.randn(batch, 1, 8, 8) if name == "digits_cnn" else torch.randn(batch, 3, 32, 32)


def test_every_model_is_listed() -> None:
    assert set(models.__all__) == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name: str) -> None:
    assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_output_and_gradients(name: str) -> None:
    model = build(name, num_classes=7)
    logits = model(inputs(name, 3))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_images_do_not_influence_each_other_in_evaluation(name: str) -> None:
    model, x = build(name).eval(), inputs(name, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-4)
