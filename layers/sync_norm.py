"""Batch norm with the statistics of the batches of several processes, on any device."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layers._checks import check_shape, fail, is_symbolic
from layers.kernels.conv_bn_act import NormArguments, batch_norm_act
from layers.replacing import replace_modules

Model = TypeVar("Model", bound=nn.Module)


class SyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all ranks of a process group: as if one process had all their samples.

    (batch, num_features, *) in and out, any number of further axes; the batches of the ranks may differ in size.
    Arguments of `torch.nn.BatchNorm2d`, and `process_group`, None for all ranks. Outside of `torch.distributed`, and in
    evaluation mode, it is plain batch norm. Gradients of weight and bias are those of the rank's own samples, for
    `DistributedDataParallel` to average. `torch.nn.SyncBatchNorm` does this on CUDA alone; here any backend of
    `torch.distributed` will do, such as gloo on CPUs. Source: Peng et al.: MegDet (2018), section 3.2.

    Raises ValueError for another rank or number of channels, an empty axis, and one value a channel in training, where
    there is one process.

    >>> SyncBatchNorm(3)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group

    @staticmethod
    def convert(model: Model, process_group: dist.ProcessGroup | None = None) -> Model | nn.Module:
        """Put a `SyncBatchNorm` in the place of every batch norm of `model`, in place; returns the model.

        Norms keep their parameters and buffers, so that optimisers and checkpoints go on. For a model that is itself a
        batch norm, what takes its place is returned.

        >>> type(SyncBatchNorm.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[1]).__name__
        'SyncBatchNorm'
        """
        made: dict[nn.Module, SyncBatchNorm] = {}  # a norm that is used in two places stays one
        for module in list(model.modules()):
            if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
                made[module] = _converted(module, process_group)
        replace_modules(model, made)
        return made.get(model, model)

    def forward(self, input: Tensor) -> Tensor:
        check_shape(self, "input", input, ("batch", self.num_features, "..."))
        group = self.group()
        if group is None:
            alone = not is_symbolic(input) and self.training and input.numel() == input.shape[1]
            if alone:
                raise fail(
                    self, f"input needs more than one value a channel in training, but has shape {tuple(input.shape)}"
                )
            return super().forward(input)
        return batch_norm_act(input, training_arguments(self, group))

    def group(self) -> dist.ProcessGroup | None:
        """The ranks whose batches count in the present mode; None where that is this process alone."""
        if not self.training or not dist.is_available() or not dist.is_initialized():
            return None
        group = self.process_group if self.process_group is not None else dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank that `forward` has let through."""


def training_arguments(norm: _BatchNorm, group: dist.ProcessGroup | None = None) -> NormArguments:
    """What `norm` passes on in training; counts the batch, as its own forward does."""
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # cumulative average
            momentum = 1.0 / float(norm.num_batches_tracked)
    return NormArguments(
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        training=True,
        momentum=0.0 if momentum is None else momentum,
        eps=norm.eps,
        group=group,
    )


def _converted(norm: _BatchNorm, process_group: dist.ProcessGroup | None) -> SyncBatchNorm:
    made = SyncBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, process_group
    )
    made._parameters, made._buffers, made.training = norm._parameters, norm._buffers, norm.training
    return made
