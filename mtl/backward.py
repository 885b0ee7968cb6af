"""From the losses of the tasks to the gradients of the parameters, as a weighting wants them combined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtl.processes import Processes
from mtl.weighting import GradientWeighting, Weighting

Gradients = list[tuple[Tensor | None, ...]]  # [task][tensor], None where the task does not depend on the tensor


@dataclass(frozen=True)
class Cut:
    """A tensor in the middle of a forward pass, and the leaf that what follows has seen instead."""

    output: Tensor
    leaf: Tensor


@contextmanager
def cut_at(module: nn.Module | None) -> Iterator[list[Cut]]:
    """Cut the graph at the module's output; with None nothing is cut.

    The tasks' gradients of a shared representation then cost one backward pass through the heads each, and the trunk
    is passed once (Sener & Koltun, NeurIPS 2018, "Multi-Task Learning as Multi-Objective Optimization", section 3.3).
    """
    cuts: list[Cut] = []

    def cut(module: nn.Module, arguments: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        cuts.append(Cut(output, output.detach().requires_grad_()))
        return cuts[-1].leaf

    handle = module.register_forward_hook(cut) if module is not None else None
    try:
        yield cuts
    finally:
        if handle is not None:
            handle.remove()


@dataclass(frozen=True)
class Backward:
    """How losses become gradients.

    Args:
        weighting: of the tasks
        parameters: what is trained
        processes: that train together
    """

    weighting: Weighting
    parameters: Sequence[nn.Parameter]
    processes: Processes

    def __call__(
        self, losses: Mapping[str, Tensor], values: Mapping[str, Tensor], cuts: Sequence[Cut], scale: float = 1.0
    ) -> dict[str, Tensor]:
        """Add the gradients of one batch to ``.grad``.

        Args:
            losses: of this process, by task
            values: the losses over all processes, without a graph
            cuts: of the forward pass
            scale: factor on all gradients

        Returns:
            The factor of each task's gradient of what is shared.
        """
        factors = self._factors_of_losses(values, scale)
        weighted = [scale * factor * loss for factor, loss in zip(factors, losses.values(), strict=True)]
        if isinstance(self.weighting, GradientWeighting) and len(losses) > 1:
            factors = factors * self._combine(weighted, values, cuts, scale)
        else:
            torch.stack(weighted).sum().backward()
            _go_on(cuts, [cut.leaf.grad for cut in cuts])
        return dict(zip(losses, factors.detach(), strict=True))

    def cosines(self, losses: Mapping[str, Tensor], cuts: Sequence[Cut]) -> dict[str, float]:
        """Cosine between the gradients of each pair of tasks, ``{"a~b": in [-1, 1]}``, of what they share; the graph
        stays."""
        tensors = [cut.leaf for cut in cuts] or list(self.parameters)
        gradients = _gradients(list(losses.values()), tensors, keep_graph=True)
        shared = _shared(gradients)
        if not shared:
            return {}
        gramian = self._gramian(gradients, shared, averaged=False)
        norms = gramian.diagonal().clamp(min=torch.finfo(gramian.dtype).tiny).sqrt()
        matrix = (gramian / norms / norms[:, None]).tolist()
        names = list(losses)
        return {f"{names[i]}~{names[j]}": matrix[i][j] for i in range(len(names)) for j in range(i + 1, len(names))}

    def _factors_of_losses(self, values: Mapping[str, Tensor], scale: float) -> Tensor:
        """``d weighting / d loss``; the weighting's own parameters get their gradients. The derivative is taken at the
        loss of all processes: a factor that depends on the losses is then the same everywhere."""
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        (scale * self.weighting(leaves)).backward()
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / scale for leaf in leaves.values()]
        return self.processes.same(torch.stack(found))

    def _combine(
        self, losses: Sequence[Tensor], values: Mapping[str, Tensor], cuts: Sequence[Cut], scale: float
    ) -> Tensor:
        assert isinstance(self.weighting, GradientWeighting)
        tensors = [*(cut.leaf for cut in cuts), *self.parameters]
        gradients = _gradients(losses, tensors)
        if not (shared := _shared(gradients)):
            raise ValueError(
                f"weighting {self.weighting!r} combines gradients of what tasks share, but no trained parameter serves "
                "two tasks: use another weighting"
            )
        if not cuts:
            self.processes.average(gradient for row in gradients for gradient in row if gradient is not None)
        gramian = self._gramian(gradients, shared, averaged=not cuts) / scale**2
        with torch.no_grad():
            factors = self.processes.same(self.weighting.combine(gramian, values).contiguous())
        for index, tensor in enumerate(tensors):
            for row, factor in zip(gradients, factors, strict=True):
                if (gradient := row[index]) is not None:
                    term = gradient * factor if index in shared else gradient
                    tensor.grad = term if tensor.grad is None else tensor.grad + term
        _go_on(cuts, [cut.leaf.grad for cut in cuts])
        return factors

    def _gramian(self, gradients: Gradients, shared: Sequence[int], *, averaged: bool) -> Tensor:
        """(T, T) inner products over all processes; ``averaged`` where the gradients already are those of all."""
        blocks = []
        for index in shared:
            column = [row[index] for row in gradients]
            like = next(gradient for gradient in column if gradient is not None)
            filled = [torch.zeros_like(like) if gradient is None else gradient for gradient in column]
            blocks.append(torch.stack(filled).flatten(1))
        flat = torch.cat(blocks, 1)
        gramian = flat @ flat.T
        if not averaged:  # each process has the rows of its samples, 1 / size of which count in the mean
            self.processes.average([gramian])
            gramian = gramian / self.processes.size
        return gramian


def _gradients(losses: Sequence[Tensor], tensors: Sequence[Tensor], *, keep_graph: bool = False) -> Gradients:
    last = len(losses) - 1
    return [
        torch.autograd.grad(loss, tensors, retain_graph=keep_graph or index < last, allow_unused=True)
        for index, loss in enumerate(losses)
    ]


def _shared(gradients: Gradients) -> list[int]:
    """Which tensors two tasks or more depend on."""
    users = [sum(gradient is not None for gradient in column) for column in zip(*gradients, strict=True)]
    return [index for index, number in enumerate(users) if number > 1]


def _go_on(cuts: Sequence[Cut], gradients: Sequence[Tensor | None]) -> None:
    """Take the gradients of the leaves back through what came before the cuts."""
    pairs = [(cut.output, found) for cut, found in zip(cuts, gradients, strict=True) if found is not None]
    if pairs:
        torch.autograd.backward([output for output, _ in pairs], [found for _, found in pairs])
