"""How far a model that was changed is from the dense one, on the outputs for some calibration samples. No labels."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.gram import num_samples_of
from compress.sandbox import untouched
from compress.tasks import EVERYTHING, View
from compress.trace import ExampleInputs, as_arguments, output_tensors


class Trial:
    """Remembers what ``model`` computes for ``inputs``, and compares other outputs with it: what ``view`` sees."""

    def __init__(self, model: nn.Module, inputs: Iterable[ExampleInputs], view: View = EVERYTHING) -> None:
        self._inputs, self._view = list(inputs), view
        self._outputs = [_outputs(model, inputs, view) for inputs in self._inputs]
        together = [torch.cat(column) for column in self._columns()]
        self._spread = sum(float((t - t.mean(0)).square().sum()) for t in together)

    def _columns(self) -> list[list[Tensor]]:
        columns = [list(column) for column in zip(*self._outputs, strict=True)]
        same = [len({o.shape[1:] for o in column}) == 1 and column[0].dim() > 0 for column in columns]
        return [column for column, fits in zip(columns, same, strict=True) if fits]

    def error(self, model: nn.Module) -> float:
        """Squared difference over all floating-point outputs, as a part of their variance; infinite if not a number."""
        difference = 0.0
        for inputs, outputs in zip(self._inputs, self._outputs, strict=True):
            for found, expected in zip(_outputs(model, inputs, self._view), outputs, strict=True):
                difference += float((found - expected).square().sum())
        return difference / max(self._spread, 1e-30) if difference == difference else float("inf")


def first_samples(batches: Iterable[ExampleInputs], number: int) -> Iterable[ExampleInputs]:
    """The first ``number`` samples, batch by batch."""
    for inputs in batches:
        size = num_samples_of(inputs)
        if size > number:
            inputs = tree_map_only(Tensor, lambda t: t[:number] if t.dim() and len(t) == size else t, inputs)  # noqa: B023
        yield inputs
        number -= size
        if number <= 0:
            return


def _outputs(model: nn.Module, inputs: ExampleInputs, view: View) -> list[Tensor]:
    args, kwargs = as_arguments(inputs)
    with torch.no_grad(), untouched(model):
        found = view.of(model.eval()(*args, **kwargs))
    return [tensor.double().cpu() for tensor in output_tensors(found) if tensor.is_floating_point()]
