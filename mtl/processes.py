"""Several processes that train one model: each takes a part of every batch, and all take the same step.

Every process iterates the same data in the same order and keeps its rows of each batch, so that the losses, and with
them the numbers, are those of one process. Gradients are averaged after the backward pass rather than by
``DistributedDataParallel``: that also serves weightings that need the tasks' gradients one by one, and models that do
not use every parameter in every step. Batch norm sees the rows of its own process only, unless it is a synchronised
one: ``check_batch_norm`` says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtl.batch import Batch
from mtl.task import Labels


@dataclass(frozen=True)
class Processes:
    """This process among all that train together.

    Args:
        rank: of this one, 0 for the first, which alone writes to the disk
        size: how many there are
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Processes:
        """As ``torch.distributed`` was started, by ``torchrun``, ``accelerate launch`` or the caller."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """Whether it writes and reports."""
        return self.rank == 0

    def part(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """This process's rows of a batch, and by task the factor that makes its mean loss its part of the global one.

        The mean over all processes of ``factor * loss`` is the loss of the whole batch. A batch with fewer rows than
        there are processes cannot be divided, and many layers refuse an empty part: all processes take it whole, and
        the labels count in the first one. (The running variance of a synchronised batch norm then counts its rows as
        often as there are processes.)
        """
        if self.size == 1:
            return batch, dict.fromkeys(batch.labels, 1.0)
        labels = {name: self._labels(found) for name, found in batch.labels.items()}
        factors = {name: labels[name].count * self.size / found.count for name, found in batch.labels.items()}
        return replace(batch, inputs=self._rows(batch.inputs), labels=labels), factors

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over all processes; all in one message per dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average what each process found; a parameter that one of them did not use counts as zero there."""
        if self.size == 1:
            return
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not parameters:
            return
        used = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device, dtype=torch.float32)
        dist.all_reduce(used)
        for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
            if anywhere and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.average(parameter.grad for parameter in parameters if parameter.grad is not None)

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, for what may differ by random numbers or rounding."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    @torch.no_grad()
    def align(self, tensors: Iterable[Tensor]) -> None:
        """All processes get the first one's values."""
        for tensor in tensors if self.size > 1 else ():
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)

    def check_batch_norm(self, model: nn.Module) -> None:
        """Warn, in the first process, where batch norms make the numbers differ from those of one process.

        Synchronised ones (``torch.nn.SyncBatchNorm``, ``layers.SyncBatchNorm``) are known by their process group.
        """
        norms = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not hasattr(module, "process_group")
        ]
        if norms and self.size > 1 and self.is_first:
            warnings.warn(
                f"{len(norms)} batch norms, such as {norms[0]!r}, take their statistics from the part of each batch "
                f"that one of the {self.size} processes sees, so the numbers are not those of one process; to share "
                "them, use layers.SyncBatchNorm.convert(model)",
                stacklevel=3,
            )

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def _labels(self, labels: Labels) -> Labels:
        if len(labels.values) < self.size:
            nothing = replace(labels, known=torch.zeros_like(labels.values, dtype=torch.bool), count=0, left_out=False)
            return labels if self.is_first else nothing
        values = self._rows(labels.values)
        known = None if labels.known is None else self._rows(labels.known)
        return replace(labels, values=values, known=known, count=values.numel() if known is None else int(known.sum()))

    def _rows(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            divisible = value.dim() > 0 and len(value) >= self.size
            return value.tensor_split(self.size)[self.rank] if divisible else value
        if isinstance(value, dict):
            return {key: self._rows(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return tuple(self._rows(item) for item in value)
        return value
