"""Fused attention: q (*, H, N, D), k (*, H_k, S, D), v (*, H_k, S, E) give (*, H, N, E).

The default scale is a power of D; the recorder notes that use, so that D then stays as it is.
"""

import math

import numpy as np

from compress.labels import Array, Labels
from compress.recorder import Op, TensorRef
from compress.rules.elementwise import broadcast
from compress.rules.registry import NoRule, rule


@rule(
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
def attention(labels: Labels, op: Op) -> None:
    """Heads meet, queries and keys are contracted over D, scores and values over S."""
    query, key, value = (op.arguments[name] for name in ("query", "key", "value"))
    output = op.outputs[0]
    q, k, v = labels[query], labels[key], labels[value]
    if len(q) != len(k) or len(k) != len(v) or len(q) < 3:
        raise NoRule("queries and keys of different rank")
    batch: list[Array] = []
    for a, b, c in zip(q[:-2], k[:-2], v[:-2], strict=True):
        for other in (b, c):  # with grouped queries, head i reads key i // (H / H_k)
            labels.link(a, np.repeat(other, len(a) // len(other)), str(op))
        batch.append(a)
    labels.link(q[-1], k[-1], str(op))
    labels.contract(q[-1])
    labels.link(k[-2], v[-2], str(op))
    labels.contract(k[-2])
    mask = op.arguments.get("attn_mask", op.arguments.get("attn_bias"))
    if isinstance(mask, TensorRef):
        scores = broadcast(labels, [mask], (*output.shape[:-1], len(k[-2])), str(op))
        for known, given, length in zip((*batch, q[-2], k[-2]), scores, _padded(mask.shape, len(scores)), strict=True):
            if length > 1:  # a mask that is broadcast over heads says nothing about them
                labels.link(known, given, str(op))
    labels.set(output, [*batch, q[-2], v[-1]])
    for statistic in op.outputs[1:]:
        labels.set(statistic, _statistic(labels, statistic, batch, q[-2]))
    rows = math.prod(len(axis) for axis in batch) * len(q[-2]) * len(k[-2])
    for inner in (q[-1], v[-1]):
        labels.cost(rows * len(inner), (*batch, q[-2], k[-2], inner))


def _padded(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    return (1,) * (ndim - len(shape)) + shape


def _statistic(labels: Labels, ref: TensorRef, batch: list[Array], rows: Array) -> list[Array]:
    """Only the backward pass reads these: heads where they fit, else fixed."""
    axes = [*batch, rows]
    if tuple(len(axis) for axis in axes) == ref.shape:
        return axes
    return [labels.fixed(n) for n in ref.shape]
