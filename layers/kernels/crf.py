"""The forward algorithm of a linear-chain conditional random field as one operator, with its gradient.

With emissions e (n, t, k), transitions A (k, k), scores of first and last tags, and the steps of a sequence that count:

    alpha_1 = start + e_1;  alpha_t[j] = log sum_i exp(alpha_(t-1)[i] + A[i, j]) + e_t[j]
    log Z = log sum exp(alpha_T + end)

The gradient of log Z are the probabilities of tags and of pairs of tags, from the same recursion backwards (Sutton,
McCallum: An Introduction to Conditional Random Fields, 2012, section 4.1). Where it wins: on CUDA, where the loop over
time is 4 launches a step forward and some 15 backward, each of microseconds of work; here it is one, with transitions
and sums in registers. On CPUs a step's launch costs little beside its arithmetic, and the loop stays.
"""

from typing import Any

import torch
from torch import Tensor

from layers.kernels.dispatch import uses_triton

MAX_TAGS = 64  # transitions of as many fit the registers of a program


def kinds_of(mask: Tensor | None, emissions: Tensor) -> Tensor:
    """(batch, time) int8: 0 for a step that does not count, 1 for the first that does, 2 for those after it."""
    if mask is None:
        kinds = torch.full(emissions.shape[:2], 2, dtype=torch.int8, device=emissions.device)
        kinds[:, :1] = 1
        return kinds
    counts = mask.to(torch.int8)
    return counts * (1 + (counts.cumsum(1) > 1).to(torch.int8))


def forward_reference(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, kinds: Tensor
) -> tuple[Tensor, Tensor]:
    """log Z (batch,), and alpha (batch, time, tags), zero before the first step that counts. The specification."""
    alpha, alphas = torch.zeros_like(emissions[:, 0]), []
    for t in range(emissions.shape[1]):
        kind = kinds[:, t, None]
        before = torch.where(kind == 2, (alpha[:, :, None] + transitions).logsumexp(1), start)
        alpha = torch.where(kind == 0, alpha, before + emissions[:, t])
        alphas.append(alpha)
    return (alpha + end).logsumexp(1), torch.stack(alphas, 1)


def backward_reference(
    dlog_z: Tensor,
    emissions: Tensor,
    transitions: Tensor,
    end: Tensor,
    kinds: Tensor,
    alphas: Tensor,
    log_z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for emissions, transitions, start and end."""
    scale, z = dlog_z[:, None], log_z[:, None]
    beta = end.expand_as(alphas[:, 0])  # log of the sum over what follows a step
    dend = (scale * (alphas[:, -1] + end - z).exp()).sum(0)
    demissions, dtransitions, dstart = torch.empty_like(emissions), torch.zeros_like(transitions), torch.zeros_like(end)
    for t in range(emissions.shape[1] - 1, -1, -1):
        kind = kinds[:, t, None]
        tag = torch.where(kind == 0, 0.0, scale * (alphas[:, t] + beta - z).exp())
        demissions[:, t] = tag
        dstart += torch.where(kind == 1, tag, 0.0).sum(0)
        if t:
            onward = transitions + (emissions[:, t] + beta)[:, None, :]
            pair = scale[:, None] * (alphas[:, t - 1, :, None] + onward - z[:, None]).exp()
            dtransitions += torch.where(kind[:, None] == 2, pair, 0.0).sum(0)
            beta = torch.where(kind == 2, onward.logsumexp(2), beta)
    return demissions, dtransitions, dstart, dend


def _has_kernel(emissions: Tensor) -> bool:
    return uses_triton(emissions) and emissions.shape[2] <= MAX_TAGS


@torch.library.custom_op("prunus::crf_forward", mutates_args=())
def _crf_forward(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, kinds: Tensor
) -> tuple[Tensor, Tensor]:
    if _has_kernel(emissions):
        from layers.kernels import crf_triton

        return crf_triton.forward(emissions, transitions, start, end, kinds)
    return forward_reference(emissions, transitions, start, end, kinds)


@_crf_forward.register_fake
def _(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    return emissions.new_empty(emissions.shape[0]), emissions.new_empty(emissions.shape)


@torch.library.custom_op("prunus::crf_backward", mutates_args=())
def _crf_backward(
    dlog_z: Tensor,
    emissions: Tensor,
    transitions: Tensor,
    end: Tensor,
    kinds: Tensor,
    alphas: Tensor,
    log_z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (dlog_z.contiguous(), emissions, transitions, end, kinds, alphas, log_z)
    if _has_kernel(emissions):
        from layers.kernels import crf_triton

        return crf_triton.backward(*arguments)
    return backward_reference(*arguments)


@_crf_backward.register_fake
def _(
    dlog_z: Tensor,
    emissions: Tensor,
    transitions: Tensor,
    end: Tensor,
    kinds: Tensor,
    alphas: Tensor,
    log_z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return emissions.new_empty(emissions.shape), torch.empty_like(transitions), torch.empty_like(end), end.clone()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    log_z, alphas = output
    ctx.mark_non_differentiable(alphas)
    ctx.save_for_backward(*inputs, alphas, log_z)


def _backward(ctx: Any, dlog_z: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    emissions, transitions, start, end, kinds, alphas, log_z = ctx.saved_tensors
    if torch.is_grad_enabled():  # for a second derivative
        again, _ = forward_reference(emissions, transitions, start, end, kinds)
        return (*torch.autograd.grad(again, (emissions, transitions, start, end), dlog_z, create_graph=True), None)
    return (*_crf_backward(dlog_z, emissions, transitions, end, kinds, alphas, log_z), None)


_crf_forward.register_autograd(_backward, setup_context=_setup_context)


def crf_log_partition(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, mask: Tensor | None = None
) -> Tensor:
    """log of the sum of exp(score) over all tag sequences, (batch,), in float32 or float64.

    `emissions` (batch, time, tags), `transitions` (tags, tags) from the first to the second tag, `start` and `end`
    (tags,); `mask` (batch, time) boolean, True where a step counts, None: all do. Each sequence must have one step that
    counts. Differentiable in all of them but the mask.

    Raises ValueError for other shapes, and for a mask that is not boolean.
    """
    tags = emissions.shape[-1]
    if emissions.dim() != 3 or emissions.numel() == 0 or not emissions.is_floating_point():
        raise ValueError(
            f"crf_log_partition: emissions are {emissions.dtype} of shape {tuple(emissions.shape)}; expected "
            "floating-point numbers of shape (batch, time, tags), no axis empty"
        )
    for name, tensor, shape in (
        ("transitions", transitions, (tags, tags)),
        ("start", start, (tags,)),
        ("end", end, (tags,)),
        ("mask", mask, tuple(emissions.shape[:2])),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"crf_log_partition: {name} has shape {tuple(tensor.shape)}; expected {shape}")
    if mask is not None and mask.dtype is not torch.bool:
        raise ValueError(f"crf_log_partition: mask is {mask.dtype}; expected torch.bool")
    dtype = torch.promote_types(torch.float32, emissions.dtype)
    emissions, transitions, start, end = (t.to(dtype).contiguous() for t in (emissions, transitions, start, end))
    log_z, _ = _crf_forward(emissions, transitions, start, end, kinds_of(mask, emissions))
    return log_z
