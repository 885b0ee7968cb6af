from pathlib import Path

import pytest
import torch

from mtl.checkpoint import RunFolder

SIGNATURE = {"epochs": 3, "options": {"lr": 0.1, "seed": 0}, "model": {"weight": [2, 3]}}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = RunFolder(tmp_path / "new" / "run", SIGNATURE)
    assert store.load() is None
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    store.save({"step": 7, "weight": weight})
    state = RunFolder(tmp_path / "new" / "run", SIGNATURE).load()
    assert state is not None
    assert state["step"] == 7
    assert torch.equal(state["weight"], weight)
    assert [file.name for file in store.path.iterdir()] == ["fit.pt"]


def test_a_crash_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunFolder(tmp_path, SIGNATURE)
    store.save({"step": 1})

    def crash(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        store.save({"step": 2})
    assert store.load() == {"step": 1}


def test_a_folder_of_another_run_says_what_differs(tmp_path: Path) -> None:
    RunFolder(tmp_path, SIGNATURE).save({})
    other = {"epochs": 5, "options": {"lr": 0.1, "seed": 0}, "model": {"bias": [2]}}
    with pytest.raises(ValueError, match="epochs is 3 there, 5 here; model.bias is None there, .2. here") as caught:
        RunFolder(tmp_path, other).load()
    assert "lr" not in str(caught.value)


def test_files_that_are_no_states_are_refused(tmp_path: Path) -> None:
    store = RunFolder(tmp_path, SIGNATURE)
    for content in (b"", b"garbage"):
        (tmp_path / "fit.pt").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read .*: remove it to start again"):
            store.load()
    torch.save({"state_dict": {}}, tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="is not a state of format 1"):
        store.load()
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "fit.pt", SIGNATURE).load()


def test_code_in_the_file_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Payload(), tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        RunFolder(tmp_path, SIGNATURE).load()
    assert not (tmp_path / "ran").exists()
