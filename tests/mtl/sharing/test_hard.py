import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from mtl import FitOptions, HardShared, Task, UnionSoftmax, fit

QUIET = FitOptions(device="cpu", progress=False)


def trunk() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def heads() -> dict[str, nn.Module]:
    return {"a": nn.Linear(16, 3), "b": nn.Linear(16, 2)}


def model_of(kind: str) -> HardShared:
    torch.manual_seed(0)
    if kind == "depths":
        shallow = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3))
        return HardShared(trunk(), {**heads(), "a": shallow}, at={"a": "4"})
    if kind == "private norms":
        return HardShared(trunk(), heads(), private=(nn.BatchNorm2d,))
    if kind == "up to a depth":
        return HardShared(trunk(), heads(), private=("5.*", "6.*"))
    if kind == "union":
        return HardShared(trunk(), heads(), union=UnionSoftmax(nn.Linear(16, 5), {"a": 3, "b": 2}))
    return HardShared(trunk(), heads())


KINDS = ("all", "depths", "private norms", "up to a depth", "union")


def randomised(model: nn.Module) -> nn.Module:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else torch.randn(tensor.shape) * 0.3)
    return model


def test_every_head_reads_the_one_trunk() -> None:
    model = HardShared(nn.Linear(6, 5), heads={"a": nn.Linear(5, 3), "b": nn.Linear(5, 2)})
    inputs = torch.randn(4, 6)
    outputs = model(inputs)
    assert set(outputs) == {"a", "b"}
    assert model.trunk is not None
    for name, head in model.heads.items():
        torch.testing.assert_close(outputs[name], head(model.trunk(inputs)))
    sum(output.sum() for output in outputs.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_their_own_give_what_common_inputs_give(kind: str) -> None:
    model = randomised(model_of(kind)).eval()
    assert isinstance(model, HardShared)
    images = torch.randn(4, 1, 10, 10)
    together = model(images)
    for name, inputs in {"a": images, "b": (images,)}.items():
        torch.testing.assert_close(model.forward_tasks({name: inputs})[name], together[name])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shared_in_any_way_can_be_pruned_saved_and_loaded(kind: str, tmp_path: Any) -> None:
    model, images = randomised(model_of(kind)).eval(), torch.randn(3, 1, 10, 10)
    result = compress.prune(model, images, budget=compress.Budget(macs=0.6))
    assert result.after.macs <= 0.6 * result.before.macs
    assert {name: output.shape for name, output in result.model(images).items()} == {
        name: output.shape for name, output in model(images).items()
    }
    compress.save(result, tmp_path / "small.safetensors")
    loaded = compress.load(model_of(kind), tmp_path / "small.safetensors").eval()
    for name, output in result.model.eval()(images).items():
        torch.testing.assert_close(loaded(images)[name], output)
    # and it can still be trained, its shared parts remaining shared
    data = [(images, {"a": torch.tensor([0, 1, 2]), "b": torch.tensor([0, 1, 1])})]
    fit(loaded, [Task.classification("a"), Task.classification("b")], data, 1, options=QUIET)
    if kind == "private norms":
        own, other = (dict(loaded.trunks[name].named_parameters()) for name in "ab")
        assert {name for name in own if own[name] is other[name]} == {"5.weight", "5.bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_task_is_sacrificed_however_they_share(kind: str) -> None:
    model = randomised(model_of(kind)).eval()
    data = {task: [torch.randn(16, 1, 10, 10) for _ in range(2)] for task in "ab"}
    result = compress.prune(
        model,
        data["a"][0],
        budget=compress.Budget(macs=0.6),
        criterion="mean_activation",
        combine="balanced",
        calibration=data,
    )
    assert result.plan.exact
    assert result.after.macs <= 0.6 * result.before.macs
    assert set(result.task_losses) == {"a", "b"}
    other = compress.prune(
        model,
        data["a"][0],
        budget=compress.Budget(macs=0.6),
        criterion="mean_activation",
        combine="mean",
        calibration=data,
    )
    assert max(result.task_losses.values()) <= max(other.task_losses.values())  # where balancing starts from


def test_private_norms_over_shared_convolutions() -> None:
    model = model_of("private norms")
    assert model.trunk is None
    assert model.trunks is not None
    a, b = (model.trunks[name] for name in "ab")
    own, other = dict(a.named_parameters()), dict(b.named_parameters())
    assert {name for name in own if own[name] is not other[name]} == {"3.weight", "3.bias", "6.weight", "6.bias"}
    assert {id(p) for p in model.task_parameters("a")} == {
        id(p)
        for p in (
            *a.get_submodule("3").parameters(),
            *a.get_submodule("6").parameters(),
            *model.heads["a"].parameters(),
        )
    }
    images = torch.randn(8, 1, 10, 10)
    model.train().forward_tasks({"a": images})
    assert a.get_submodule("3").num_batches_tracked == 1
    assert b.get_submodule("3").num_batches_tracked == 0
    assert model.representation is None


def test_sharing_survives_a_move_to_another_type() -> None:
    model = model_of("up to a depth").double()
    assert model.stem is not None
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in (*trunk().parameters(), *(p for h in heads().values() for p in h.parameters()))
    ) + sum(p.numel() for p in (*trunk()[5].parameters(), *trunk()[6].parameters()))
    outputs = model(torch.randn(2, 1, 10, 10, dtype=torch.float64))
    assert outputs["a"].dtype == torch.float64


def test_a_head_at_a_depth_reads_the_output_there() -> None:
    model = model_of("depths").eval()
    assert isinstance(model.trunk, nn.Sequential)
    images = torch.randn(2, 1, 10, 10)
    torch.testing.assert_close(model(images)["a"], model.heads["a"](model.trunk[:5](images)))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(images)["a"], model(images)["a"])
    assert model.representation is None


class Encoder(nn.Module):
    """Gives what Hugging Face's encoders give."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        states = self.layer(tokens)
        return {"last_hidden_state": states, "pooler_output": states.mean(1)}


def test_a_head_reads_an_entry_of_the_trunks_output() -> None:
    where = {"tag": "last_hidden_state", "class": "pooler_output"}
    model = HardShared(Encoder(), {"tag": nn.Linear(6, 5), "class": nn.Linear(6, 2)}, at=where)
    outputs = model(tokens=torch.randn(3, 7, 4))
    assert outputs["tag"].shape == (3, 7, 5)
    assert outputs["class"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"not one tensor; say with at=.*last_hidden_state, pooler_output"):
        HardShared(Encoder(), {"class": nn.Linear(6, 2)})(torch.randn(3, 7, 4))
    with pytest.raises(ValueError, match="gives nothing named 'pooled'"):
        HardShared(Encoder(), {"class": nn.Linear(6, 2)}, at={"class": "pooled"})(torch.randn(3, 7, 4))


def test_a_torchvision_and_a_timm_trunk_with_private_norms() -> None:
    import timm
    import torchvision

    resnet = torchvision.models.resnet18(num_classes=8)
    model = HardShared(resnet, {"a": nn.Linear(8, 3), "b": nn.Linear(8, 2)}, private=("bn1.*", "*.bn?.*"))
    assert {name: tuple(out.shape) for name, out in model.eval()(torch.randn(2, 3, 32, 32)).items()} == {
        "a": (2, 3),
        "b": (2, 2),
    }
    small = timm.create_model("resnet10t", num_classes=0)
    model = HardShared(small, {"a": nn.Linear(512, 3), "b": nn.Linear(64, 2)}, at={"b": "layer1.0.bn1"})
    with pytest.raises(RuntimeError):  # a head for vectors on maps
        model.eval()(torch.randn(1, 3, 32, 32))


def test_the_union_is_the_cross_entropy_over_all_classes() -> None:
    union = UnionSoftmax(nn.Identity(), {"a": 3, "b": 2}, weight=0.5)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, -100, 1, 0, 1])
    losses = union.losses({"union": logits}, {"b": labels})
    known = labels >= 0
    expected = nn.functional.cross_entropy(logits[known], labels[known] + 3)
    torch.testing.assert_close(losses["b"], 0.5 * expected)
    assert set(losses) == {"b"}
    model = model_of("union")
    images = torch.randn(4, 1, 10, 10)
    assert model(images)["union"].shape == (4, 5)
    before = model.union.head.weight.clone()  # type: ignore[union-attr]
    data = {"a": [(images, torch.tensor([0, 1, 2, 0]))], "b": [(images, torch.tensor([0, 1, 1, 0]))]}
    fit(model, [Task.classification("a"), Task.classification("b")], data, 1, options=QUIET)
    assert not torch.equal(model.union.head.weight, before)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["all", "private norms", "up to a depth"])
def test_a_task_that_comes_later_leaves_the_others_alone(kind: str) -> None:
    model, images = randomised(model_of(kind)), torch.randn(4, 1, 10, 10)
    assert isinstance(model, HardShared)
    before = model.eval()(images)
    model.add_task("late", nn.Linear(16, 4), like="b", freeze=True)
    data = {"late": [(images, torch.tensor([0, 1, 2, 3]))]}
    own = HardShared.forward_tasks(model, {"late": images})["late"]
    fit(model, Task.classification("late"), data, 2, options=QUIET)
    assert not torch.equal(model.eval().forward_tasks({"late": images})["late"], own)
    for name, output in before.items():
        assert torch.equal(model(images)[name], output)
    assert model(images)["late"].shape == (4, 4)
    with pytest.raises(ValueError, match="there is a head for task 'late' already"):
        model.add_task("late", nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": {}}, "heads is empty"),
        ({"at": {"c": "4"}}, "there is no head for task 'c'"),
        ({"private": ("bn*",)}, "'bn\\*' fits no parameter of the trunk; there are 0.weight"),
        ({"private": (nn.LayerNorm,)}, "LayerNorm fits no parameter of the trunk"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardShared(trunk(), **{"heads": heads(), **arguments})
