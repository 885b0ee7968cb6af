"""`crf_log_partition` in Triton: a program runs through one sequence, with the transitions in registers.

A step is a reduction over a tile of TAGS x TAGS; padded tags have scores of -1e30, so that no difference is undefined.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FAR = tl.constexpr(-1.0e30)


@triton.jit
def _log_sum_exp(x, AXIS: tl.constexpr):
    largest = tl.max(x, AXIS)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    return tl.log(tl.sum(tl.exp(x - tl.expand_dims(largest, AXIS)), AXIS)) + largest


@triton.jit
def forward_kernel(
    emissions_ptr,  # (batch, time, tags)
    transitions_ptr,  # (tags, tags)
    start_ptr,  # (tags,)
    end_ptr,  # (tags,)
    kinds_ptr,  # (batch, time) int8
    alphas_ptr,  # (batch, time, tags)
    log_z_ptr,  # (batch,)
    time,
    num_tags,
    TAGS: tl.constexpr,
):
    """The forward algorithm of one sequence."""
    sequence = tl.program_id(0).to(tl.int64)
    tags = tl.arange(0, TAGS)
    inside = tags < num_tags
    both = inside[:, None] & inside[None, :]
    transitions = tl.load(transitions_ptr + tags[:, None] * num_tags + tags[None, :], both, other=_FAR)
    start = tl.load(start_ptr + tags, inside, other=_FAR)
    alpha = tl.zeros([TAGS], tl.float32)
    kinds_ptr += sequence * time
    offsets = sequence * time * num_tags + tags
    for t in range(time):
        kind = tl.load(kinds_ptr + t)
        emissions = tl.load(emissions_ptr + offsets, inside, other=0.0)
        later = _log_sum_exp(alpha[:, None] + transitions, 0)
        before = tl.where(kind == 2, later, start)
        alpha = tl.where(kind == 0, alpha, before + emissions)
        alpha = tl.where(inside, alpha, _FAR)
        tl.store(alphas_ptr + offsets, alpha, inside)
        offsets += num_tags
    end = tl.load(end_ptr + tags, inside, other=_FAR)
    tl.store(log_z_ptr + sequence, _log_sum_exp(alpha + end, 0))


@triton.jit
def backward_kernel(
    dlog_z_ptr,  # (batch,)
    emissions_ptr,  # (batch, time, tags)
    transitions_ptr,  # (tags, tags)
    end_ptr,  # (tags,)
    kinds_ptr,  # (batch, time) int8
    alphas_ptr,  # (batch, time, tags)
    log_z_ptr,  # (batch,)
    demissions_ptr,  # (batch, time, tags)
    dtransitions_ptr,  # (batch, tags, tags), to be summed over sequences
    dends_ptr,  # (batch, 2, tags): for start and for end
    time,
    num_tags,
    TAGS: tl.constexpr,
):
    """Probabilities of tags and of pairs of tags of one sequence, times the gradient of its log Z."""
    sequence = tl.program_id(0).to(tl.int64)
    tags = tl.arange(0, TAGS)
    inside = tags < num_tags
    both = inside[:, None] & inside[None, :]
    transitions = tl.load(transitions_ptr + tags[:, None] * num_tags + tags[None, :], both, other=_FAR)
    scale = tl.load(dlog_z_ptr + sequence)
    log_z = tl.load(log_z_ptr + sequence)
    beta = tl.load(end_ptr + tags, inside, other=_FAR)
    offsets = (sequence * time + time - 1) * num_tags + tags
    alpha = tl.load(alphas_ptr + offsets, inside, other=_FAR)
    ends = dends_ptr + sequence * 2 * num_tags + tags
    tl.store(ends + num_tags, scale * tl.exp(alpha + beta - log_z), inside)
    dstart = tl.zeros([TAGS], tl.float32)
    pairs = tl.zeros([TAGS, TAGS], tl.float32)
    kinds_ptr += sequence * time + time - 1
    for step in range(time):
        kind = tl.load(kinds_ptr - step)
        emissions = tl.load(emissions_ptr + offsets, inside, other=0.0)
        tag = tl.where(inside & (kind != 0), scale * tl.exp(alpha + beta - log_z), 0.0)
        tl.store(demissions_ptr + offsets, tag, inside)
        dstart += tl.where(kind == 1, tag, 0.0)
        offsets = tl.maximum(offsets - num_tags, tags)  # in front of the first step is nothing that counts
        alpha = tl.load(alphas_ptr + offsets, inside, other=_FAR)
        onward = transitions + (emissions + beta)[None, :]
        pair = scale * tl.exp(alpha[:, None] + onward - log_z)
        pairs += tl.where(both & (kind == 2), pair, 0.0)
        beta = tl.where(inside, tl.where(kind == 2, _log_sum_exp(onward, 1), beta), _FAR)
    tl.store(ends, dstart, inside)
    out = dtransitions_ptr + sequence * num_tags * num_tags + tags[:, None] * num_tags + tags[None, :]
    tl.store(out, pairs, both)


def tile(num_tags: int) -> dict[str, int]:
    """The constants of the kernels: a warp for each 512 pairs, so that two tiles take a quarter of its registers."""
    tags = max(triton.next_power_of_2(num_tags), 16)
    return {"TAGS": tags, "num_warps": max(1, tags * tags // 512)}


def forward(emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """As `layers.kernels.crf.forward_reference`."""
    batch, time, tags = emissions.shape
    alphas, log_z = torch.empty_like(emissions), emissions.new_empty(batch)
    forward_kernel[(batch,)](
        emissions, transitions, start, end, kinds.contiguous(), alphas, log_z, time, tags, **tile(tags)
    )
    return log_z, alphas


def backward(
    dlog_z: Tensor,
    emissions: Tensor,
    transitions: Tensor,
    end: Tensor,
    kinds: Tensor,
    alphas: Tensor,
    log_z: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `layers.kernels.crf.backward_reference`."""
    batch, time, tags = emissions.shape
    demissions = torch.empty_like(emissions)
    dtransitions, dends = emissions.new_empty(batch, tags, tags), emissions.new_empty(batch, 2, tags)
    arguments = (dlog_z, emissions, transitions, end, kinds.contiguous(), alphas, log_z)
    backward_kernel[(batch,)](*arguments, demissions, dtransitions, dends, time, tags, **tile(tags))
    dstart, dend = dends.sum(0).unbind()
    return demissions, dtransitions.sum(0), dstart.clone(), dend.clone()
