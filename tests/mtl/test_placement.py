import pytest
import torch
from torch import nn

from mtl import FitOptions
from mtl.placement import Placement

CPU = FitOptions(device="cpu")


def test_auto_is_decided_by_the_model_and_the_processor() -> None:
    convolutional = Placement.choose(nn.Conv2d(3, 8, 3), CPU)
    assert convolutional.channels_last
    assert convolutional.precision == ("bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32")
    dense = Placement.choose(nn.Linear(3, 8), CPU)
    assert (dense.precision, dense.channels_last) == ("fp32", False)


def test_what_is_asked_for_is_done() -> None:
    options = FitOptions(device="cpu", precision="bf16", channels_last="off")
    placement = Placement.choose(nn.Conv2d(3, 8, 3), options)
    assert (placement.precision, placement.channels_last) == ("bf16", False)
    with placement.autocast():
        assert nn.Linear(3, 8)(torch.randn(2, 3)).dtype == torch.bfloat16


def test_the_layout_of_the_model_is_given_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last), nn.Linear(8, 2))
    before = {name: (tensor.stride(), tensor.clone(), id(tensor)) for name, tensor in model.named_parameters()}
    with Placement(torch.device("cpu"), "fp32", channels_last=True).applied_to(model):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        stride, values, identity = before[name]
        assert parameter.stride() == stride
        assert torch.equal(parameter, values)
        assert id(parameter) == identity


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        Placement.choose(nn.Linear(2, 2), FitOptions(device="cuda:99"))
