"""Layers and small networks that `compress` can prune and `mtl` can train.

>>> import torch, layers
>>> model = layers.models.digits_cnn().eval()
>>> deployed = layers.fold_batch_norm(model)  # the same function, without batch norms
>>> x = torch.zeros(5, 1, 8, 8)
>>> torch.allclose(deployed(x), model(x), atol=1e-5)
True
"""

from layers import functional, models
from layers.conv import ConvBNAct
from layers.fold import fold_batch_norm
from layers.memory import memory_efficient, recompute_cheap

__all__ = ["ConvBNAct", "fold_batch_norm", "functional", "memory_efficient", "models", "recompute_cheap"]
