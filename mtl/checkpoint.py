"""The state of a run on disk: one file, replaced as a whole, that only its own run may continue."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

_FILE = "fit.pt"
_FORMAT = 1
_SHOWN = 3


class RunFolder:
    """Saves and loads the state of one run in a folder.

    The file holds tensors, numbers, strings and containers of them, and is read with ``weights_only=True``: nothing in
    it is ever executed.

    Args:
        path: of the folder; it is made when the first state is saved
        signature: nested dicts and plain values that say which run this is; None to read any
    """

    def __init__(self, path: str | os.PathLike[str], signature: Mapping[str, Any] | None) -> None:
        self.path = Path(path)
        self._signature = dict(_flat(signature)) if signature is not None else None

    def load(self) -> dict[str, Any] | None:
        """The last state saved, on the CPU; None if there is none.

        Raises:
            ValueError: if the state cannot be read, or belongs to a run with another signature.
        """
        file = self.path / _FILE
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"folder {self.path} is a file: give another folder")
        if not file.exists():
            return None
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{file} cannot be read ({reason}): remove it to start again, or use another folder"
            ) from None
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise ValueError(f"{file} is not a state of format {_FORMAT}: use another folder")
        if self._signature is not None:
            self._check(saved["signature"], self._signature)
        state = saved["state"]
        assert isinstance(state, dict)
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the saved state by this one; a crash at any moment leaves either the old or the new."""
        self.path.mkdir(parents=True, exist_ok=True)
        temporary = self.path / f"{_FILE}.tmp"
        with temporary.open("wb") as file:
            torch.save({"format": _FORMAT, "signature": self._signature, "state": dict(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / _FILE)

    def _check(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        keys = [key for key in [*here, *(key for key in there if key not in here)] if there.get(key) != here.get(key)]
        if keys:
            shown = "; ".join(f"{key} is {there.get(key)} there, {here.get(key)} here" for key in keys[:_SHOWN])
            more = f" (and {len(keys) - _SHOWN} more)" if len(keys) > _SHOWN else ""
            raise ValueError(f"folder {self.path} holds another run: {shown}{more}; use another folder")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
