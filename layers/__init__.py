"""Layers and small networks that `compress` can prune and `mtl` can train."""
