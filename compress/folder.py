"""The folder of a run: whose it is, what in it is committed, and nothing half-written whenever the process dies."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from compress.errors import PruneError

TEMPORARY = ".partial"  # suffix of what is being written; left over after a crash, overwritten by the next attempt


def claim(path: Path, description: Mapping[str, object], outputs: Iterable[str] = ()) -> None:
    """Marks the folder of ``path`` as the run of ``description``, or checks that it is this run's already.

    ``path`` is the JSON file that holds the description; ``outputs`` are the names that the run writes beside it.
    Raises :class:`PruneError`, with everything left as it was, when the folder belongs to a run with another
    description (the message names what differs), or has no description but some of the outputs.
    """
    remedy = "choose another folder, or delete that one to start over"
    here = json.loads(json.dumps(dict(description)))  # tuples become lists, as they will be in the file
    if path.is_file():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PruneError(f"{path} is damaged, so that the run cannot go on; {remedy}") from error
        if differences := _differences(there, here):
            raise PruneError(f"{path.parent} holds another run: {', '.join(differences)}; {remedy}")
        return
    foreign = [name for name in outputs if (path.parent / name).exists()]
    if foreign:
        raise PruneError(f"{path.parent} has {', '.join(foreign)} that are not from this run; {remedy}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PruneError(f"folder {path.parent} cannot be made ({error.strerror}); choose another folder") from error
    write_file(path, lambda partial: partial.write_text(json.dumps(here, indent=1), encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path and moves the result to ``path``, which is old or new and never half."""
    partial = path.with_name(
        f".{path.stem}{TEMPORARY}{path.suffix}"
    )  # the suffix stays: savefig picks its format by it
    write(partial)
    _sync(partial)
    os.replace(partial, path)


def commit_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with an empty folder and renames it to ``path``, which appears complete or not at all."""
    partial = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    os.rename(partial, path)
    _sync(path.parent)


def _differences(there: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    missing = "nothing"
    return [
        f"{name} is {there.get(name, missing)} there and {here.get(name, missing)} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name, missing) != here.get(name, missing)
    ]


def _sync(path: Path) -> None:
    """Waits until it is on the disk, so that no power cut keeps a rename and loses the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
