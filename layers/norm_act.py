"""Batch norm with the residual and the activation that follow it, as blocks call it: one operator where that wins."""

from torch import Tensor, nn

from layers._checks import is_symbolic
from layers.kernels.conv_bn_act import Activation, batch_norm_act
from layers.kernels.dispatch import fuses
from layers.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from layers.sync_norm import SyncBatchNorm, training_arguments

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)


def norm_act(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None, *, activation: Activation | None = None
) -> Tensor:
    """`activation(norm(x) + residual)`, without the steps that are None.

    Any module may be the norm. A batch norm in training is one operator with what follows it where `layers.kernels`
    has a kernel for the device, unless somebody sees its calls (a hook, `torch.fx`) or it is of another class.

    >>> norm_act(nn.Identity(), torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 1.0]), activation=torch.relu)
    tensor([0., 3.])
    """
    if not is_symbolic(x) and fuses(x) and type(norm) in _NORMS and norm.training and not has_hooks(norm):
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        norm._check_input_dim(x)
        group = norm.group() if isinstance(norm, SyncBatchNorm) else None
        return batch_norm_act(x, training_arguments(norm, group), activation, residual)
    y = norm(x)
    y = y if residual is None else y + residual
    return y if activation is None else activation(y)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes what goes into or comes out of `module`."""
    return "forward" in vars(module) or bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
