"""Reading checkpoints that others wrote: tensors only, however wrapped, and nothing in the file is ever run."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.errors import CheckpointError

# Under which keys training scripts keep the weights, most specific first: a checkpoint with both "state_dict" and an
# average ("ema") gives what was trained, as its own training script would on resuming.
WEIGHT_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
    "ema",
    "state_dict_ema",
    "model_ema",
)
MAX_NAMES = 3  # how many keys of a kind an error lists by name


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Returns the weights in a checkpoint as ``{parameter name: tensor on the CPU}``.

    Reads ``.safetensors`` files and everything that ``torch.save`` wrote (``.pt .pth .th .bin .ckpt``). The weights may
    be nested under usual keys such as ``state_dict`` or ``model``; the prefixes ``module.`` (data parallel) and
    ``_orig_mod.`` (``torch.compile``) are stripped. Entries that are not tensors are left out.

    Raises :class:`CheckpointError` for a file that is missing, empty, truncated or no checkpoint, and for one that
    holds Python objects (a pickle payload), which is refused without running it.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder; name the file in it that holds the weights")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes); copy or download it again")
    state = _find_weights(_read(path))
    if state is None:
        raise CheckpointError(
            f"checkpoint {path} holds no weights (tensors by name, directly or under one of {', '.join(WEIGHT_KEYS)}); "
            "save it again with torch.save(model.state_dict(), FILE)"
        )
    return _strip_prefixes(state)


def load_state_dict(model: nn.Module, state: Mapping[str, Tensor], source: str = "the checkpoint") -> None:
    """Copies ``state`` into ``model``: all of it, or nothing where a name or a shape does not match.

    ``source`` is what the error calls the checkpoint. ``num_batches_tracked`` may be missing: checkpoints from before
    PyTorch 0.4.1 do not have it and evaluation does not use it. Raises :class:`CheckpointError` that names missing,
    unexpected and misshapen keys.
    """
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    misshapen = [
        f"{name} {tuple(state[name].shape)} in the file and {tuple(expected[name].shape)} in the model"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError(
            f"{source} does not fit the model {type(model).__name__}: {', '.join(problems)}; "
            "choose the architecture and the number of classes that it was trained with"
        )
    model.load_state_dict(dict(state), strict=False)


def _read(path: Path) -> object:
    """Whatever the file holds; a failure of any kind becomes one line, since a stranger's file can fail in any way."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path, device="cpu")
        with warnings.catch_warnings():
            # torch warns about what it then refuses (pickle protocols, TorchScript); our error says it once.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"checkpoint {path} holds a Python object ({found[1]}) and was refused, since loading it can run code; "
                "where you trust it, save the weights again with torch.save(model.state_dict(), FILE) or as safetensors"
            ) from error
        foreign = isinstance(error, pickle.UnpicklingError)  # its message is a page about weights_only
        reason = "it holds something else than tensors" if foreign else _first_sentence(error)
        raise CheckpointError(
            f"checkpoint {path} is damaged or no checkpoint ({reason}); copy or download it again, or save the weights "
            "with torch.save(model.state_dict(), FILE) or as safetensors"
        ) from error


def _first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].split(". ")[0] or type(error).__name__


def _find_weights(content: object) -> dict[str, Tensor] | None:
    """The first mapping from names to tensors: under a usual key, here, or under the only key that holds one."""
    if not isinstance(content, Mapping):
        return None
    for key in WEIGHT_KEYS:
        found = _find_weights(content.get(key))
        if found is not None:
            return found
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        return tensors
    # Optimiser states are keyed by integers and never weights.
    nested = [_find_weights(value) for name, value in content.items() if isinstance(name, str) and name != "optimizer"]
    candidates = [state for state in nested if state is not None]
    return candidates[0] if len(candidates) == 1 else None


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # torch.compile may wrap a submodule, so its prefix can be anywhere; data parallel wraps the whole model only.
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
