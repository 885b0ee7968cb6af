"""The numpy reference of batch norm against torch and its autograd."""

import numpy as np
import pytest
import torch

import layers
from layers.norm import batch_norm_backward, batch_norm_forward

SHAPES = {"1d": (7, 3), "1d over time": (4, 3, 5), "2d": (4, 3, 5, 2), "3d": (2, 3, 2, 3, 4)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_reference_and_module_agree(kind: str, training: bool) -> None:
    norm = getattr(layers, f"BatchNorm{kind[:2]}")(3, momentum=0.3, eps=1e-3, dtype=torch.float64).train(training)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(tensor)
    torch.nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(SHAPES[kind], dtype=torch.float64, requires_grad=True)
    arrays = [t.detach().numpy().copy() for t in (x, norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    kept = [a.copy() for a in arrays]
    step = batch_norm_forward(*arrays, training=training, momentum=0.3, eps=1e-3)
    y = norm(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert x.grad is not None
    found = (step.y, step.running_mean, step.running_var, *batch_norm_backward(dy.numpy(), step))
    wanted = (y.detach(), norm.running_mean, norm.running_var, x.grad, norm.weight.grad, norm.bias.grad)
    for array, tensor in zip(found, wanted, strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=1e-10, atol=1e-12)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, kept, strict=True))


def test_one_value_a_channel() -> None:
    norm = layers.BatchNorm2d(3)
    with pytest.raises(ValueError, match="BatchNorm2d: input needs more than one value a channel in training"):
        norm(torch.zeros(1, 3, 1, 1))
    assert norm.eval()(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)


def test_wrong_channels() -> None:
    with pytest.raises(ValueError, match=r"BatchNorm1d: input must have shape \(batch, 3, time\).*\(2, 4, 5\)"):
        layers.BatchNorm1d(3)(torch.zeros(2, 4, 5))
