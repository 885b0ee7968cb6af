"""A folder belongs to one run, and what is in it is complete."""

from pathlib import Path

import pytest

from compress.errors import PruneError
from compress.folder import claim, commit_folder, write_file

RUN = {"rounds": 3, "budget": {"macs": 0.5}, "protect": ("head.*",)}


def test_the_same_run_may_come_back(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run.json"
    claim(path, RUN)
    content = path.read_bytes()
    claim(path, RUN, ["rounds"])
    assert path.read_bytes() == content


def test_another_run_is_told_what_differs_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    claim(path, RUN)
    content = path.read_bytes()
    with pytest.raises(
        PruneError, match=r"rounds is 3 there and 5 here.*seed is nothing there.*another folder"
    ) as caught:
        claim(path, RUN | {"rounds": 5, "seed": 1})
    assert "budget" not in str(caught.value)
    assert path.read_bytes() == content


def test_files_of_something_else_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text("mine")
    with pytest.raises(PruneError, match=r"has history\.json that"):
        claim(tmp_path / "run.json", RUN, ["rounds", "history.json"])
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_a_damaged_description_and_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(PruneError, match="damaged"):
        claim(tmp_path / "run.json", RUN)
    with pytest.raises(PruneError, match="cannot be made"):
        claim(tmp_path / "run.json" / "deeper" / "run.json", RUN)


def test_a_crash_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    def crash(partial: Path) -> None:
        (partial / "half" if partial.is_dir() else partial).write_text("half")
        raise KeyboardInterrupt

    write_file(tmp_path / "a.txt", lambda partial: partial.write_text("whole"))
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a.txt", crash)
    assert (tmp_path / "a.txt").read_text() == "whole"

    with pytest.raises(KeyboardInterrupt):
        commit_folder(tmp_path / "round", crash)
    assert not (tmp_path / "round").exists()
    commit_folder(tmp_path / "round", lambda partial: (partial / "b.txt").write_text("whole"))
    assert [path.name for path in (tmp_path / "round").iterdir()] == ["b.txt"]
