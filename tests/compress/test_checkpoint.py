"""Foreign checkpoints: found wherever they are nested, refused where they could run code, loaded whole or not."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from compress.checkpoint import load_state_dict, read_state_dict
from compress.errors import CheckpointError


class _Payload:
    """Would create a file when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.witness),)


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))


def _assert_same(state: dict, model: nn.Module) -> None:
    assert set(state) == set(model.state_dict())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"momentum": torch.ones(1)}}}},
        lambda state: {"model": {"module": state}, "best": torch.tensor(0.9)},
        lambda state: {"generator": state, "epoch": 3},
        lambda state: {"net": {f"module._orig_mod.{name}": value for name, value in state.items()}},
        lambda state: {f"module.module.{name}": value for name, value in state.items()},
        lambda state: {name.replace("0.", "0._orig_mod.", 1): value for name, value in state.items()},
    ],
    ids=["flat", "state_dict", "nested", "only-key", "compiled", "twice-parallel", "compiled-part"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_finds_the_weights(tmp_path: Path, wrap, zipped: bool) -> None:
    model = _model()
    torch.save(wrap(model.state_dict()), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    _assert_same(read_state_dict(tmp_path / "a.pth"), model)


def test_reads_safetensors(tmp_path: Path) -> None:
    model = _model()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    _assert_same(read_state_dict(tmp_path / "a.safetensors"), model)


def test_a_model_attribute_called_module_beside_others_is_kept(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(3)}
    torch.save(state, tmp_path / "a.pt")
    assert set(read_state_dict(tmp_path / "a.pt")) == set(state)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain", "named-safetensors"])
def test_a_payload_is_refused_and_does_not_run(tmp_path: Path, kind: str) -> None:
    witness, path = tmp_path / "witness", tmp_path / "a.pt"
    content = {"state_dict": _model().state_dict(), "extra": _Payload(witness)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "named-safetensors":
        path = path.rename(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert not witness.exists()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_refusal_names_the_object_and_the_remedy(tmp_path: Path) -> None:
    torch.save({"state_dict": _model().state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*state_dict\(\)"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".th", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint at all " * 9, b"PK\x03\x04" + bytes(99), bytes(64)])
def test_a_file_that_is_no_checkpoint(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="again") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_checkpoint(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.ones(999)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="damaged"):
        read_state_dict(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_state_dict(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize(
    "content", [{}, {"epoch": 3}, [torch.ones(2)], {"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}]
)
def test_a_checkpoint_without_weights(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_state_dict(tmp_path / "a.pt")


def test_loads_into_the_model() -> None:
    source, target = _model(), _model()
    load_state_dict(target, source.state_dict())
    _assert_same(source.state_dict(), target)


def test_old_checkpoints_without_batch_counts_load() -> None:
    source, target = _model(), _model()
    state = {name: value for name, value in source.state_dict().items() if "num_batches" not in name}
    load_state_dict(target, state)
    _assert_same(source.state_dict(), target)


def test_names_every_kind_of_mismatch_and_changes_nothing() -> None:
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in before.items()}
    state["3.weight"] = torch.zeros(5, 3)
    del state["0.bias"]
    state |= {f"extra{index}": torch.zeros(1) for index in range(5)}
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(model, state, source="a.pt")
    message = str(caught.value)
    for part in (
        "a.pt",
        "1 missing (0.bias)",
        "5 unexpected (extra0, extra1, extra2, ...)",
        "3.weight (5, 3)",
        "(2, 3)",
    ):
        assert part in message
    _assert_same(before, model)
