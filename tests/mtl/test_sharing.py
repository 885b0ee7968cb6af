import pytest
import torch
from torch import nn

from mtl import HardShared


def test_every_head_reads_the_one_trunk() -> None:
    model = HardShared(nn.Linear(6, 5), heads={"a": nn.Linear(5, 3), "b": nn.Linear(5, 2)})
    inputs = torch.randn(4, 6)
    outputs = model(inputs)
    assert set(outputs) == {"a", "b"}
    for name, head in model.heads.items():
        torch.testing.assert_close(outputs[name], head(model.trunk(inputs)))
    sum(output.sum() for output in outputs.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_without_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="heads is empty"):
        HardShared(nn.Linear(6, 5), heads={})
