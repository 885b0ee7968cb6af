"""Models made fast for inference: captured as a graph, folded, fused, and run by the fastest backend.

>>> import torch, layers
>>> model = layers.models.digits_cnn().eval()
>>> x = torch.randn(2, 1, 8, 8)
>>> fast = layers.optimize_for_inference(model, x)
>>> torch.allclose(fast(x), model(x), atol=1e-4)
True
"""

from layers.inference.module import OptimizedModule
from layers.inference.optimize import optimize_for_inference
from layers.inference.report import Piece, Report

__all__ = ["OptimizedModule", "Piece", "Report", "optimize_for_inference"]
