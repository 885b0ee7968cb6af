"""Fused operators, one a file: a plain PyTorch path that is specification, CPU path and oracle of the faster ones."""
