import pytest
import torch
from torch import nn

from mtl import Task
from mtl.batch import by_task, call, mode, read

A, B = Task("a", nn.CrossEntropyLoss()), Task("b", nn.MSELoss())


def test_inputs_are_called_as_what_they_are() -> None:
    model = nn.Bilinear(2, 3, 4)
    left, right = torch.randn(5, 2), torch.randn(5, 3)
    expected = model(left, right)
    torch.testing.assert_close(call(model, (left, right)), expected)
    torch.testing.assert_close(call(model, {"input2": right, "input1": left}), expected)


def test_a_tensor_belongs_to_the_only_task() -> None:
    tensor = torch.randn(3)
    assert by_task(tensor, [A], "target") == {"a": tensor}
    assert by_task(tensor.bfloat16(), [A], "target")["a"].dtype == torch.float32
    with pytest.raises(ValueError, match="the target is one tensor, but there are 2 tasks"):
        by_task(tensor, [A, B], "target")


def test_a_missing_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"the target has no entry for task 'b'; it has \['a'\]"):
        by_task({"a": torch.zeros(1)}, [A, B], "target")
    with pytest.raises(ValueError, match="the output of the model is a list"):
        by_task([torch.zeros(1)], [A], "output of the model")


def test_a_batch_must_be_a_pair() -> None:
    with pytest.raises(ValueError, match="a batch of the data is a Tensor"):
        read(torch.zeros(2, 2), [A])


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    model[1].eval()
    with mode(model, training=True):
        assert all(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False, False]
