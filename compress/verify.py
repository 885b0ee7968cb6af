"""Check a plan by running it: the pruned model must compute what its masked twin computes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.errors import PruneError
from compress.plan import PrunePlan
from compress.precision import in_double, widened
from compress.recorder import Trace
from compress.sandbox import untouched
from compress.surgery import copied, mask, masked
from compress.trace import ExampleInputs, as_arguments, output_tensors

SINGLE_TOLERANCE = 1e-5  # of the output's scale: what differs by more is computed again in float64
DOUBLE_TOLERANCE = 1e-9


def agrees(model: nn.Module, plan: PrunePlan, pruned: nn.Module, example_inputs: ExampleInputs, trace: Trace) -> bool:
    """Whether ``pruned`` runs with the model's output shapes and, for an exact plan, gives its masked twin's numbers.

    Computed in the model's own precision; what differs there by more than rounding is computed again in float64, which
    costs time but no memory. Where
    a plan is not exact there are no numbers to compare with.

    Args:
        trace: of the model on the same inputs.
    """
    inputs = _lively(example_inputs)
    try:
        found = _outputs(pruned, inputs)
        if not plan.exact:  # in a trace with real data shapes may depend on values, which change
            return trace.real or [tuple(t.shape) for t in found] == trace.shapes
        if not any(t.dtype.itemsize < 4 for t in found if t.is_floating_point()):  # half precision decides nothing
            with masked(model, plan):
                expected = _outputs(model, inputs)
            if [t.shape for t in found] != [t.shape for t in expected]:
                return False
            if _close(found, expected, _tolerance(expected)):
                return True
        return _agrees_in_double(model, plan, pruned, inputs)
    except Exception:  # noqa: BLE001  a pruned model that does not run, for whatever reason, is what is looked for
        return False


def _agrees_in_double(model: nn.Module, plan: PrunePlan, pruned: nn.Module, inputs: ExampleInputs) -> bool:
    double = tree_map_only(Tensor, widened, inputs)
    try:
        with in_double():
            found = _outputs(pruned, double)
            with masked(model, plan):
                expected = _outputs(model, double)
    except Exception:  # noqa: BLE001  some functions (LSTM) compare types before operators are called: then on copies
        found = _outputs(copied(pruned).double(), double)
        expected = _outputs(mask(model, plan).double(), double)
    return [t.shape for t in found] == [t.shape for t in expected] and _close(found, expected, DOUBLE_TOLERANCE)


def same_outputs(model: nn.Module, other: nn.Module, example_inputs: ExampleInputs) -> bool:
    """Whether ``other`` computes what ``model`` does, in float64.

    Raises:
        Exception: whatever stops one of them from running.
    """
    inputs = tree_map_only(Tensor, widened, _lively(example_inputs))
    try:
        with in_double():
            found, expected = _outputs(other, inputs), _outputs(model, inputs)
    except Exception:  # noqa: BLE001  as above: on copies
        found, expected = (_outputs(copied(each).double(), inputs) for each in (other, model))
    return [t.shape for t in found] == [t.shape for t in expected] and _close(found, expected, DOUBLE_TOLERANCE)


def culprits(parts: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> list[int]:
    """The parts without which the rest holds, found by halving.

    Args:
        parts: what failed together.
        holds: whether a subset is fine on its own.
    """
    if len(parts) == 1:
        return list(parts)
    middle = len(parts) // 2
    failing = [half for half in (parts[:middle], parts[middle:]) if not holds(half)]
    if not failing:  # each half is fine, together they are not: give up the smaller
        return list(parts[:middle])
    return [part for half in failing for part in culprits(half, holds)]


def check_repeatable(model: nn.Module, example_inputs: ExampleInputs, trace: Trace) -> None:
    """Whether a removal failed because the model draws random numbers: no two of its runs can then be compared.

    Args:
        trace: of the model; where none of its operators draws random numbers, nothing is run.

    Raises:
        PruneError: in evaluation mode the output depends on the seed; names the operators that draw.
    """
    random = [op for op in trace.evaluation if torch.Tag.nondeterministic_seeded in op.func.tags]
    inputs = _lively(example_inputs)
    if not random or _close(_outputs(model, inputs), other := _outputs(model, inputs, seed=1), _tolerance(other)):
        return
    names = ", ".join(list(dict.fromkeys(str(op) for op in random))[:3])
    raise PruneError(
        f"the output depends on randomness in evaluation mode ({names}), so that no removal can be verified: "
        "draw random numbers only where self.training, as nn.Dropout does"
    )


def _outputs(model: nn.Module, inputs: ExampleInputs, *, seed: int = 0) -> list[Tensor]:
    args, kwargs = as_arguments(inputs)
    # models may keep something of a run even in evaluation mode, and the twin shares its buffers with the model
    with torch.no_grad(), untouched(model):
        torch.manual_seed(seed)
        outputs: Any = model.eval()(*args, **kwargs)
    return output_tensors(outputs)


def _lively(example_inputs: ExampleInputs) -> ExampleInputs:
    """Constant inputs (zeros, say) would hide errors: noise takes their place."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.numel() < 2 or bool((tensor != tensor.flatten()[0]).any()):
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    return tree_map_only(Tensor, noise, example_inputs)


def _tolerance(outputs: Sequence[Tensor]) -> float:
    double = all(t.dtype == torch.float64 for t in outputs if t.is_floating_point())
    return DOUBLE_TOLERANCE if double else SINGLE_TOLERANCE


def _close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    for a, b in zip(found, expected, strict=True):
        if not a.is_floating_point() or not b.numel():
            continue
        finite = b.isfinite()
        scale = float(b[finite].abs().max()) if finite.any() else 0.0  # no floor of 1: outputs may be tiny
        same = torch.where(finite, (a - b).abs() <= tolerance * scale, a.isfinite() == finite)
        if not bool(same.all()):
            return False
    return True
