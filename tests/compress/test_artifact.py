import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import compress
from compress import ArtifactError, Budget, prune
from tests.compress.helpers import assert_same, image, tokens
from tests.compress.random_networks import RandomNetwork
from tests.compress.test_plan import Padded, Shuffled


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(13, 11), nn.Linear(11, 7)
        self.back, self.head = nn.Linear(7, 11), nn.Linear(11, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.back(self.body(self.embedding(x)).relu()))


MODELS = {
    "shuffled": (Shuffled, image()),
    "padded": (Padded, image()),
    "tied": (Tied, tokens()),
    **{f"random {seed}": ((lambda seed=seed: RandomNetwork(seed)), image(2, 3, 11, 9)) for seed in range(5)},
}


@pytest.fixture
def saved(tmp_path):
    """A saved small model: (class, result, path)."""
    result = prune(Padded(), image(), budget=Budget(macs=0.6))
    compress.save(result, tmp_path / "small.safetensors")
    return Padded, result, tmp_path / "small.safetensors"


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_instance_gives_the_same_outputs(name: str, tmp_path) -> None:
    make, inputs = MODELS[name]
    result = prune(make(), inputs, budget=Budget(params=0.8))
    path = tmp_path / "small.safetensors"
    compress.save(result, path)
    fresh = make()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    loaded = compress.load(fresh, str(path))
    assert_same(loaded, result.model, inputs, 0.0)
    assert loaded.state_dict().keys() == result.model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert compress.measure(loaded, inputs) == result.after
    again = prune(loaded, inputs, budget=Budget(params=0.95))
    compress.save(again.model, path, plan=result.plan.then(again.plan))
    assert_same(compress.load(make(), path), again.model, inputs, 0.0)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path) -> None:
    result = prune(Tied(), tokens(), budget=Budget(params=0.7))
    compress.save(result, tmp_path / "tied.safetensors")
    with safe_open(tmp_path / "tied.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert len(stored & {"embedding.weight", "head.weight"}) == 1
    loaded = compress.load(Tied(), tmp_path / "tied.safetensors")
    assert loaded.head.weight is loaded.embedding.weight


def test_the_file_holds_tensors_and_json_only(saved) -> None:
    _, result, path = saved
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert compress.PrunePlan.from_json(header["__metadata__"]["plan"]) == result.plan
    assert sum(t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__") == len(
        data[8 + length :]
    )


def test_buffers_half_precision_and_frozen_parameters_survive(tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11), nn.Conv2d(11, 5, 1)).to(torch.bfloat16)
    model[1].num_batches_tracked.fill_(7)
    result = prune(model, image().bfloat16(), budget=Budget(macs=0.6))
    compress.save(result, tmp_path / "x.safetensors")
    fresh = nn.Sequential(nn.Conv2d(3, 11, 3), nn.BatchNorm2d(11), nn.Conv2d(11, 5, 1)).to(torch.bfloat16)
    fresh[0].weight.requires_grad_(False)
    loaded = compress.load(fresh, tmp_path / "x.safetensors")
    assert int(loaded[1].num_batches_tracked) == 7
    assert loaded[0].weight.dtype == torch.bfloat16
    assert not loaded[0].weight.requires_grad


def _refused(model: nn.Module, path, match: str) -> None:
    with pytest.raises(ArtifactError, match=match) as caught:
        compress.load(model, path)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path) -> None:
    _refused(Padded(), tmp_path / "none.safetensors", "no file at .*none.safetensors': check the path")
    _refused(Padded(), tmp_path, "no file at")


@pytest.mark.parametrize("damage", ["empty", "truncated", "half a header", "noise", "huge header"])
def test_a_damaged_file(saved, damage: str) -> None:
    make, _, path = saved
    data = path.read_bytes()
    path.write_bytes({
        "empty": b"", "truncated": data[:-100], "half a header": data[:50], "noise": b"\x80\x04" + b"x" * 999,
        "huge header": (2**60).to_bytes(8, "little") + data[8:],
    }[damage])  # fmt: skip
    _refused(make(), path, "is damaged or no safetensors file")


def test_a_foreign_file(tmp_path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    _refused(Padded(), tmp_path / "foreign.safetensors", "holds no plan: it was not written by compress.save")
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    _refused(Padded(), tmp_path / "foreign.safetensors", "holds no plan")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": "99"}, "has format version 99, not 1"),
        ({"plan": "{}"}, "not a pruning plan"),
        ({"plan": "no json"}, "not a plan"),
        ({"aliases": "no json"}, "names its shared tensors"),
        ({"aliases": "[1]"}, "names its shared tensors"),
    ],
)
def test_a_header_that_cannot_be_used(tmp_path, changes, match: str) -> None:
    header = {
        "format": "prunus",
        "version": "1",
        "plan": compress.PrunePlan.empty().to_json(),
        "aliases": "{}",
    } | changes
    save_file({"weight": torch.zeros(5, 3), "bias": torch.zeros(5)}, tmp_path / "x.safetensors", metadata=header)
    _refused(nn.Linear(3, 5), tmp_path / "x.safetensors", match)


def test_another_architecture_is_named(saved) -> None:
    _, _, path = saved
    _refused(nn.Linear(3, 5), path, "does not fit this model: the plan removes part of")
    other = Padded()
    other.head = nn.Linear(32, 7)
    _refused(other, path, r"does not fit this model: head\.bias, head\.weight differ; build it with the same arguments")
    _refused(nn.ModuleDict(dict(Padded().named_children())), path, "does not fit this model")


def test_a_folder_that_is_missing(saved, tmp_path) -> None:
    with pytest.raises(ArtifactError, match="the folder .*none' does not exist: create it"):
        compress.save(saved[1], tmp_path / "none" / "x.safetensors")


def test_a_model_needs_its_plan(saved, tmp_path) -> None:
    with pytest.raises(ArtifactError, match=r"save needs the plan that made the model: save\(result, path\)"):
        compress.save(saved[1].model, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_an_existing_file_survives_a_failed_save(saved, monkeypatch) -> None:
    make, result, path = saved
    data = path.read_bytes()

    def fails(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr("compress.artifact.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        compress.save(result, path)
    monkeypatch.undo()
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == [path.name]
    assert_same(compress.load(make(), path), result.model, image(), 0.0)


def test_extra_state_that_is_no_tensor_is_refused(tmp_path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state) -> None:
            pass

    model = nn.Sequential(Extra(3, 11), nn.Linear(11, 5))
    result = prune(model, image(7, 3), budget=Budget(macs=0.6))
    with pytest.raises(ArtifactError, match="extra state '0._extra_state', which is no tensor"):
        compress.save(result, tmp_path / "x.safetensors")
