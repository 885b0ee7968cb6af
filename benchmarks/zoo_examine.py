"""What the sweep of ``benchmarks/zoo.py`` asks of one model, in the process that calls: one thread, one result."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import compress
from benchmarks.common import PRUNE_STAGES, stopwatch
from benchmarks.zoo_models import Entry, Inputs

TOLERANCE = 1e-5  # of the largest value of each output, in float64
SINGLE_TOLERANCE = 1e-3  # in float32: rounding adds up over the layers of a large model
LARGEST_DOUBLE = 300e6  # parameters: above that, two models in float64 would not fit beside each other
LOWEST_KEPT, FRACTION = 0.40, 0.50  # of the MACs
ENDS = ("input of the model", "output of the model")  # what cannot shrink in any pruner
PLACE = re.compile(r"(\w+\.\w[\w.]*) in [\w.]+")  # an operator in a module: each would be a reason of its own
REAL = "traced with a real forward pass"  # begins the note on a model whose control flow depends on data
WITHOUT_RULE = re.compile(r"operator (\S+) has no rule")

Result = dict[str, Any]


def examine(entry: Entry) -> Result:
    """Prune one model to half of its MACs and check the result; ``failure`` is empty if all is well.

    Transformers are pruned a second time with ``exact_only=True``, under the key ``exact_only``.
    """
    torch.set_num_threads(1)
    _warm_up()
    model, inputs = prepared(entry)
    result = _examine(entry, model, inputs, exact_only=False)
    if entry.is_transformer:
        result["exact_only"] = _examine(entry, model, inputs, exact_only=True)
    return result


def prepared(entry: Entry) -> tuple[nn.Module, Inputs]:
    """The model and an input, both random, with nothing in the model that would hide a mistake.

    Parameters that start at one value (the zeros of biases and last layers, the 1e-6 of layer scales, the ones of
    norms) and running statistics get random ones: zero is the same before and after any surgery.
    """
    model = entry.build()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2 or (tensor != tensor.flatten()[0]).any():
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            positive = name.endswith("running_var") or float(tensor.flatten()[0]) > 0
            tensor.copy_(0.5 + noise if positive and tensor.dim() < 2 else 0.2 * (noise - 0.5))
    torch.manual_seed(2)
    return model, entry.inputs(1)


def floats(outputs: Any) -> list[Tensor]:
    """All tensors of floats in what a model returned; Hugging Face returns dataclasses that are also mappings."""
    leaves = tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """What the model gives for its arguments; those that draw random numbers draw the same in every call."""
    torch.manual_seed(3)
    if isinstance(inputs, dict):
        return floats(model(**inputs))
    return floats(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def trains(model: nn.Module, entry: Entry, inputs: Inputs) -> str:
    """Why forward or backward fails in one of the modes; empty if none does."""
    torch.manual_seed(4)
    batch = (entry.training_inputs or entry.inputs)(2)
    for mode, given in (("evaluation", inputs), ("training", batch)):
        model.train(mode == "training")
        model.zero_grad(set_to_none=True)
        try:
            sum(output.sum() for output in call(model, given)).backward()  # type: ignore[union-attr]
        except Exception as error:  # noqa: BLE001  whatever goes wrong is the finding
            return f"{mode} mode: {describe(error)}"
        if not any(parameter.grad is not None for parameter in model.parameters()):
            return f"{mode} mode: no parameter got a gradient"
    model.zero_grad(set_to_none=True)
    model.eval()
    return ""


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def _examine(entry: Entry, model: nn.Module, inputs: Inputs, *, exact_only: bool) -> Result:
    before = _reset_peak()
    try:
        with stopwatch(PRUNE_STAGES) as seconds:
            pruned = compress.prune(model, inputs, budget=compress.Budget(macs=FRACTION), exact_only=exact_only)
    except Exception as error:  # noqa: BLE001  whatever goes wrong is the finding
        return {"failure": f"prune: {describe(error)}", **_frozen(model, inputs)}
    peak = _peak()
    kept = pruned.after.macs / pruned.before.macs
    failures = [] if LOWEST_KEPT < kept <= FRACTION else [f"MACs {kept:.4f} are not in ({LOWEST_KEPT}, {FRACTION}]"]
    failures += [reason for reason in [trains(pruned.model, entry, inputs)] if reason]
    plan, notes = pruned.plan, list(pruned.notes)
    params = pruned.after.params / pruned.before.params
    del pruned  # large models need the room
    checked = _compare(model, plan, inputs, same_shapes=not any(note.startswith(REAL) for note in notes))
    failures += [reason for reason in [checked.pop("failure")] if reason]
    inexact = Counter(PLACE.sub(r"\1", group.inexact) for group in plan.groups if group.inexact)
    return {
        "failure": "; ".join(failures),
        "exact": plan.exact,
        "inexact": dict(inexact),
        **checked,
        "macs_kept": kept,
        "params_kept": params,
        "seconds": {**seconds, "plan": seconds["total"] - sum(seconds[stage] for stage in PRUNE_STAGES)},
        "model_mb": _size_mb(model),
        "peak_mb": None if peak is None or before is None else peak - before,
        "notes": notes,
        **({} if exact_only else _frozen(model, inputs)),
    }


def _compare(model: nn.Module, plan: compress.PrunePlan, inputs: Inputs, *, same_shapes: bool) -> Result:
    """Outputs of the pruned model against those of the masked twin; one of the two is in memory at a time.

    ``same_shapes``: they must have the dense model's shapes as well; a detector's depend on what it finds.
    """
    dtype = torch.float64 if _runs_in_double(model, inputs) else torch.float32
    inputs = _as_type(inputs, dtype)
    try:
        with torch.no_grad():
            dense = call(model.to(dtype).eval(), inputs)
            found = call(compress.apply(model, plan).eval(), inputs)
            expected = call(compress.mask(model, plan).eval(), inputs)
    except Exception as error:  # noqa: BLE001  whatever goes wrong is the finding
        return {"failure": f"pruned or masked copy: {describe(error)}"}
    finally:
        model.float()
    shapes = [tuple(t.shape) for t in found], [tuple(t.shape) for t in dense]
    if same_shapes and shapes[0] != shapes[1]:
        return {"failure": f"outputs have shapes {shapes[0]} instead of {shapes[1]}"}
    relative = _difference(found, expected)
    tolerance = TOLERANCE if dtype == torch.float64 else SINGLE_TOLERANCE
    failure = f"error {relative:.2g} is above {tolerance:.2g}" if plan.exact and not relative <= tolerance else ""
    return {
        "failure": failure,
        "precision": str(dtype).removeprefix("torch."),
        "relative_error": relative,
        "mask_effect": _difference(expected, dense),
        "output_scale": _scale(dense),
    }


def _runs_in_double(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the dense model takes float64: RAFT, for one, makes tensors of float32 in its code."""
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST_DOUBLE:
        return False
    try:
        with torch.no_grad():
            call(model.double().eval(), _as_type(inputs, torch.float64))
    except RuntimeError:
        return False
    finally:
        model.float()
    return True


def _as_type(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any output in units of that output's largest value: a small one counts like others."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    floor = 1e-6 * _scale(expected)  # what is mathematically zero is rounding, of a scale that means nothing
    largest = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.numel():
            # infinite where only one of them is: -inf stands for "no" in masks
            error = torch.where(a == b, 0.0, a - b).abs().max().item()
            largest = max(largest, error / max(_scale([b]), floor, 1e-300))
    return largest


def _scale(outputs: Sequence[Tensor]) -> float:
    return max((_finite(t).abs().max().item() for t in outputs if _finite(t).numel()), default=0.0)


def _finite(tensor: Tensor) -> Tensor:
    return tensor[tensor.isfinite()]


def _frozen(model: nn.Module, inputs: Inputs) -> Result:
    """Groups, and what is frozen for reasons other than being an input or output, as numbers of axes by reason."""
    try:
        graph = compress.trace(model, inputs)
    except compress.PruneError:
        return {}
    reasons = Counter(PLACE.sub(r"\1", axis.reason) for axis in graph.frozen)
    inner = {reason: count for reason, count in reasons.most_common() if not reason.startswith(ENDS)}
    operators = sorted({name for reason in inner for name in WITHOUT_RULE.findall(reason)})
    return {"num_groups": len(graph.groups), "frozen": inner, "without_rule": operators}


def _warm_up() -> None:
    """What PyTorch imports and builds on first use is nobody's time."""
    compress.prune(_small_net(), torch.rand(1, 3, 4, 4), budget=compress.Budget(macs=0.6))


def _warm_up_peer() -> None:
    """The same for Torch-Pruning."""
    import torch_pruning

    net, image = _small_net(), torch.rand(1, 3, 4, 4)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    torch_pruning.pruner.BasePruner(net, image, importance=importance, ignored_layers=[net[-1]]).step()


def _small_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def _size_mb(model: nn.Module) -> float:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / 1e6


def _reset_peak() -> float | None:
    """Resident megabytes now, from which the peak is counted; None where the system cannot tell (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return None
    return _peak()


def _peak() -> float | None:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


def examine_peer(entry: Entry) -> Result:
    """The same model in Torch-Pruning, half of the channels: as it is, and if that fails with its README's advice."""
    torch.set_num_threads(1)
    _warm_up_peer()
    attempts = {}
    for advised in (False, True):
        attempts["with advice" if advised else "generic"] = attempt = _attempt_peer(entry, advised=advised)
        if not attempt["failure"]:
            break
    return {**attempt, "attempts": {name: found["failure"] or "ok" for name, found in attempts.items()}}


def _attempt_peer(entry: Entry, *, advised: bool) -> Result:
    import torch_pruning

    model, inputs = prepared(entry)
    heads = _heads(model) if advised else {}
    if advised and not heads:
        return {"failure": "no advice"}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    try:
        shapes = [t.shape for t in call(model, inputs)]
        start = time.process_time()
        pruner = torch_pruning.pruner.BasePruner(
            model,
            inputs,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=False,
            pruning_ratio=0.5,
            ignored_layers=layers[-1:],
            num_heads=heads,
            **({"forward_fn": lambda net, given: net(**given)} if isinstance(inputs, dict) else {}),
        )
        built = time.process_time()
        pruner.step()
        stepped = time.process_time()
        for module in model.modules():  # as in its example for vision transformers
            if isinstance(qkv := getattr(module, "qkv", None), nn.Linear) and qkv in heads:
                head_dim = qkv.out_features // (3 * pruner.num_heads[qkv])
                vars(module).update(num_heads=pruner.num_heads[qkv], head_dim=head_dim)
        found = [t.shape for t in call(model.eval(), inputs)]
    except Exception as error:  # noqa: BLE001  whatever goes wrong is the finding
        return {"failure": describe(error)}
    failure = "" if found == shapes else "outputs have other shapes"
    failure = failure or trains(model, entry, inputs)
    return {"failure": failure, "seconds": {"trace": built - start, "step": stepped - built}}


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Layers that emit heads, as its README asks for them: query, key and value, from one projection or from three."""
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        count = getattr(module, "num_heads", getattr(module, "num_attention_heads", None))
        names = ("qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj")
        layers = [layer for name in names if isinstance(layer := getattr(module, name, None), nn.Linear)]
        if isinstance(count, int):
            heads |= dict.fromkeys(layers, count)
    return heads
