"""What optimize_for_inference says of models, backends and results that are not what they must be."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import optimize_for_inference
from layers.inference.capture import Call, NotCapturedError, capture
from layers.inference.script import NotScriptableError, script
from layers.inference.verify import TOLERANCE, difference

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_is_not_installed_is_an_error_that_names_it(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"layers.inference.backends.{backend}.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"not installed: .*{backend}"):
        optimize_for_inference(nn.Linear(3, 3), torch.randn(2, 3), backend=backend)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@pytest.mark.parametrize(
    ("model", "example", "backend", "message"),
    [
        (F.relu, torch.ones(2), "torch", "must be a torch.nn.Module"),
        (nn.ReLU(), torch.ones(2), "tensorrt", "'tensorrt', but it must be one of auto, torch, inductor"),
        (nn.Linear(3, 3), torch.ones(2, 4), "torch", "Linear does not run on example_inputs"),
        (nn.Linear(3, 3), (torch.ones(2, 3), 1, 2), "torch", "example_inputs do not fit Linear.forward: too many"),
        (nn.Linear(3, 3), {"y": torch.ones(2, 3)}, "torch", "do not fit Linear.forward: missing"),
        (Noise(), torch.ones(2, 3), "torch", "in a second call"),
    ],
)
def test_bad_input(model: Any, example: Any, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimize_for_inference(model, example, backend=backend)


def test_what_cannot_be_captured_or_scripted_says_why() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x * 2, x.shape[0]

    with pytest.raises(NotCapturedError, match="sizes"):
        capture(Sizes(), Call.of(Sizes(), torch.randn(3, 2)))
    graph = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(NotScriptableError, match="calls"):
        script(graph)


def test_what_cannot_be_captured_is_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    class ByValue(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool((x > 0).all()) else -x

    fast = optimize_for_inference(nn.Sequential(nn.Linear(3, 3), ByValue()), torch.ones(2, 3))
    assert "data-dependent" in str(fast.report)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([torch.ones(3)], None),
        ([torch.ones(3) + TOLERANCE[torch.float32] * 2], "an error of"),
        ([torch.ones(2)], "instead of"),
        ([torch.ones(3).double()], "instead of"),
        ([torch.tensor([1.0, 1.0, torch.nan])], "infinite or undefined|an error of"),
        ([], "0 tensors instead of 1"),
    ],
)
def test_differences(found: list[Tensor], message: str | None) -> None:
    problem = difference([torch.ones(3)], found)
    assert (problem is None) == (message is None)
    if message is not None:
        assert any(part in problem for part in message.split("|"))


def test_differences_in_integers_and_undefined_numbers() -> None:
    assert difference([torch.tensor([1])], [torch.tensor([2])]) == "other integers"
    both = torch.tensor([1.0, torch.nan, torch.inf])
    assert difference([both], [both.clone()]) is None
