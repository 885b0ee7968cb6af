"""Save a pruned model as tensors and JSON only, and load it into a fresh instance of the user's own class.

One safetensors file: the tensors of the state dict, and in the header the plan that makes a fresh model fit them.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress.errors import ArtifactError
from compress.plans import Plan, plan_kind, read_plan
from compress.sandbox import unwrapped

FORMAT = "prunus"
VERSION = 1


def save(result: Any, path: str | os.PathLike[str], *, plan: Plan | None = None) -> None:
    """Write a pruned model to ``path``; an existing file is replaced only when the new one is complete.

    Args:
        result: what :func:`compress.prune`, :func:`compress.factorize` or :func:`compress.iterate` gave, or a module
            with its ``plan``. A module may say itself by which plan it was made of a fresh one (``made_by``, as what
            ``mtl.SoftShared.collapse`` gives): then that comes first, unless ``plan`` is given.

    Raises:
        ArtifactError: no plan, or the folder does not exist.
    """
    model = result if isinstance(result, nn.Module) else result.model
    plan = plan if plan is not None else _plan_of(result, model)
    if not isinstance(plan, Plan):
        raise ArtifactError(
            "save needs the plan that made the model: save(result, path) or save(model, path, plan=plan)"
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise ArtifactError(f"the folder {str(target.parent)!r} does not exist: create it, or choose another path")
    tensors, aliases = _unique_tensors(model)
    header = {"format": FORMAT, "version": str(VERSION), "plan": plan.to_json(), "aliases": json.dumps(aliases)}
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=header)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A pruned copy of the fresh, full-size ``model`` with the saved weights. ``model`` itself is not changed.

    Raises:
        ArtifactError: the file is missing, damaged, not an artefact of :func:`save`, or of another architecture.
    """
    for kind in getattr(unwrapped(model), "plan_kinds", ()):  # what its class can be made into, besides what we can
        plan_kind(kind)
    plan, aliases, tensors = _read(Path(path))
    try:
        pruned = plan.carry_out(unwrapped(model), empty=True)  # (nothing is decomposed: the weights are in the file)
    except ValueError as error:
        raise ArtifactError(f"{str(path)!r} does not fit this model: {error}") from error
    tensors.update({name: tensors[source] for name, source in aliases.items() if source in tensors})
    expected = pruned.state_dict()
    differing = sorted(set(expected) ^ set(tensors))
    differing += sorted(k for k in set(expected) & set(tensors) if expected[k].shape != tensors[k].shape)
    if differing:
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise ArtifactError(f"{str(path)!r} does not fit this model: {shown} differ; build it with the same arguments")
    pruned.load_state_dict(tensors)
    return pruned


def _plan_of(result: Any, model: nn.Module) -> Plan | None:
    """All that was done since the model was fresh."""
    from compress.shrink.plan import ShrinkPlan

    first, second = getattr(model, "made_by", None), getattr(result, "plan", None)
    steps = tuple(plan for plan in (first, second) if isinstance(plan, Plan))
    return ShrinkPlan(steps) if len(steps) == 2 else next(iter(steps), None)


def _unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, each stored once: safetensors refuses shared memory. Aliases map other names to the first."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ArtifactError(f"the model keeps extra state {name!r}, which is no tensor: it cannot be saved safely")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors, aliases


def _read(path: Path) -> tuple[Plan, dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise ArtifactError(f"no file at {str(path)!r}: check the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{str(path)!r} is damaged or no safetensors file ({error}): save it again") from error
    if header.get("format") != FORMAT or "plan" not in header:
        raise ArtifactError(
            f"{str(path)!r} holds no plan: it was not written by compress.save; load its tensors as usual"
        )
    if header.get("version") != str(VERSION):
        raise ArtifactError(f"{str(path)!r} has format version {header.get('version')}, not {VERSION}: upgrade prunus")
    try:
        plan = read_plan(header["plan"])
    except ValueError as error:  # (a plan's own package has its own errors)
        raise ArtifactError(f"{str(path)!r}: {error}") from error
    try:
        return plan, dict(json.loads(header.get("aliases", "{}"))), tensors
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{str(path)!r} names its shared tensors in no way known ({error}): save it again"
        ) from error
