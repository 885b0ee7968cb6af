"""The folder of a run: whose it is, what in it is committed, and nothing half-written whenever the process dies."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import PruneError

TEMPORARY = ".partial"  # suffix of what is being written; left over after a crash, overwritten by the next attempt


def claim(
    path: Path,
    description: Mapping[str, object],
    outputs: Iterable[str] = (),
    *,
    dump: Callable[[object], str] = json.dumps,
    parse: Callable[[str], Any] = json.loads,
) -> None:
    """Marks the folder of ``path`` as the run of ``description``, or checks that it is this run's already.

    ``path`` is the file that holds the description, as JSON or in the form of ``dump`` and ``parse``; ``outputs`` are
    the names that the run writes beside it. Raises :class:`PruneError`, with everything left as it was, when the folder
    belongs to a run with another description (the message names what differs), or has none but some of the outputs.
    """
    remedy = "choose another folder, or delete that one to start over"
    here = json.loads(json.dumps(dict(description)))  # tuples become lists, as they will be in the file
    if path.is_file():
        try:
            there = parse(path.read_text(encoding="utf-8"))
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
    write_file(path, lambda temporary: temporary.write_text(dump(here), encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with a temporary path and moves the result to ``path``, which is old or new and never half."""
    # The suffix stays: savefig picks its format by it.
    temporary = path.with_name(f".{path.stem}{TEMPORARY}{path.suffix}")
    write(temporary)
    _sync(temporary)
    os.replace(temporary, path)


def commit_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with an empty folder and renames it to ``path``, which appears complete or not at all."""
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write(temporary)
    for file in temporary.iterdir():
        _sync(file)
    _sync(temporary)
    os.rename(temporary, path)
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
