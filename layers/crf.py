"""Linear-chain conditional random field: scores of whole tag sequences, for sequence labelling.

Legend: n batch, t time, k tags; e emissions (n, t, k), A transitions (k, k) from the first to the second tag.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from layers._checks import check_positive, check_range, check_shape, fail, is_symbolic, readable
from layers.kernels.crf import MAX_TAGS, crf_log_partition
from layers.kernels.dispatch import fuses


class CRF(nn.Module):
    """p(y | e) = exp(s(y)) / sum_y' exp(s(y')), s(y) = start[y_1] + sum_t e_t[y_t] + sum_t A[y_(t-1), y_t] + end[y_T].

    All methods take emissions (batch, time, num_tags), scores before any softmax, and `mask` (batch, time), True where
    a step counts (`layers.padding_mask(lengths, time)` for padded batches); None: all do. Steps that do not count are
    skipped wherever they are, as if the sequence did not have them. Called as a module it gives the log-likelihood, so
    that `-crf(emissions, tags, mask).mean()` is the loss.

    The time is O(time num_tags^2), for all sequences of a batch at once, the arithmetic in logarithms; on CUDA
    log_partition is one kernel. To forbid a
    transition set it to a large negative number such as -1e4 (with -inf, gradients are not finite). Source: Lafferty,
    McCallum, Pereira: Conditional Random Fields (2001); Sutton and McCallum: An Introduction to Conditional Random
    Fields (2012), sections 4.1 and 4.2; in networks: Lample et al.: Neural Architectures for Named Entity Recognition
    (2016), section 2.2, with start and end tags.

    Raises ValueError for another rank or number of tags, a mask that is not boolean or leaves a sequence without any
    step, and tags out of range where the mask is True.

    >>> crf = CRF(2)
    >>> _ = [nn.init.zeros_(p) for p in crf.parameters()]  # without transitions, each step is a softmax
    >>> emissions = torch.tensor([[[0.0, 0.0], [5.0, 1.0]]])
    >>> crf.viterbi(emissions)
    (tensor([[0, 0]]), tensor([5.], grad_fn=<AmaxBackward0>))
    """

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        check_positive(self, num_tags=num_tags)
        self.num_tags = num_tags
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags))
        self.start = nn.Parameter(torch.empty(num_tags))
        self.end = nn.Parameter(torch.empty(num_tags))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small random scores, so that the emissions decide at first."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.log_likelihood(emissions, tags, mask)

    def log_likelihood(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None) -> Tensor:
        """log p(tags | emissions), (batch,); tags (batch, time), integers in [0, num_tags) where the mask is True."""
        return self.score(emissions, tags, mask) - self.log_partition(emissions, mask)

    def score(self, emissions: Tensor, tags: Tensor, mask: Tensor | None = None) -> Tensor:
        """s(tags), (batch,)."""
        self._check(emissions, mask)
        counts = torch.ones_like(tags, dtype=torch.bool) if mask is None else mask
        self._check_tags(emissions, tags, counts)
        tags = tags.masked_fill(~counts, 0)
        last = torch.where(counts, torch.arange(tags.shape[1], device=tags.device), -1).cummax(1).values
        before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)  # the step that a step follows
        moves = torch.where(before < 0, self.start[tags], self.transitions[tags.gather(1, before.clamp(min=0)), tags])
        steps = emissions.gather(2, tags[:, :, None])[:, :, 0] + moves
        return steps.masked_fill(~counts, 0).sum(1) + self.end[tags.gather(1, last[:, -1:])[:, 0]]

    def log_partition(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """log of the sum of exp(s(y)) over all sequences y, (batch,): the forward algorithm."""
        self._check(emissions, mask)
        if not is_symbolic(emissions) and fuses(emissions) and self.num_tags <= MAX_TAGS:
            found = crf_log_partition(emissions, self.transitions, self.start, self.end, mask)
            return found.to(emissions.dtype)
        return (self._alphas(emissions, mask, torch.logsumexp)[-1] + self.end).logsumexp(1)

    def marginals(self, emissions: Tensor, mask: Tensor | None = None) -> Tensor:
        """p(y_t = k | emissions), (batch, time, num_tags), zero where the mask is False: forward-backward."""
        self._check(emissions, mask)
        alphas = self._alphas(emissions, mask, torch.logsumexp)
        beta = self.end.expand(emissions.shape[0], -1)  # log of the sum over what follows a step
        betas = [beta]
        for t in range(emissions.shape[1] - 1, 0, -1):
            earlier = (self.transitions + (emissions[:, t] + beta)[:, None, :]).logsumexp(2)
            beta = earlier if mask is None else torch.where(mask[:, t, None], earlier, beta)
            betas.append(beta)
        log_partition = (alphas[-1] + self.end).logsumexp(1)
        found = (torch.stack(alphas, 1) + torch.stack(betas[::-1], 1) - log_partition[:, None, None]).exp()
        return found if mask is None else found.masked_fill(~mask[:, :, None], 0)

    def viterbi(self, emissions: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tags (batch, time) of the likeliest sequence, -1 where the mask is False, and its score s (batch,)."""
        self._check(emissions, mask)
        alphas = self._alphas(emissions, mask, torch.amax)
        final = alphas[-1] + self.end
        tag = final.argmax(1)
        path = [tag]
        for t in range(emissions.shape[1] - 1, 0, -1):
            # The scores are all that is kept on the way: of the one tag that was reached, the best one before it.
            earlier = (alphas[t - 1] + self.transitions.T[tag]).argmax(1)
            tag = earlier if mask is None else torch.where(mask[:, t], earlier, tag)
            path.append(tag)
        tags = torch.stack(path[::-1], dim=1)
        return (tags if mask is None else tags.masked_fill(~mask, -1)), final.amax(1)

    def _alphas(self, emissions: Tensor, mask: Tensor | None, reduce: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """For each step (batch, num_tags): `reduce` over all beginnings up to it of their score, by their last tag."""
        alpha = self.start + emissions[:, 0]
        alphas = [alpha]
        begun = None if mask is None else mask[:, :1]
        for t in range(1, emissions.shape[1]):
            later = reduce(alpha[:, :, None] + self.transitions, 1)
            if mask is None or begun is None:
                alpha = later + emissions[:, t]
            else:
                # before its first step that counts a sequence has no tag to come from
                alpha = torch.where(mask[:, t, None], torch.where(begun, later, self.start) + emissions[:, t], alpha)
                begun = begun | mask[:, t, None]
            alphas.append(alpha)
        return alphas

    def _check(self, emissions: Tensor, mask: Tensor | None) -> None:
        check_shape(self, "emissions", emissions, ("batch", "time", self.num_tags))
        if mask is None or is_symbolic(emissions):
            return
        check_shape(self, "mask", mask, (emissions.shape[0], emissions.shape[1]))
        if mask.dtype is not torch.bool:
            raise fail(self, f"mask must be boolean, True where a step counts, but has dtype {mask.dtype}")
        if readable(mask) and not bool(mask.any(1).all()):
            empty = (~mask.any(1)).nonzero().flatten().tolist()
            raise fail(self, f"mask must leave each sequence at least one step, but sequences {empty} have none")

    def _check_tags(self, emissions: Tensor, tags: Tensor, counts: Tensor) -> None:
        if is_symbolic(emissions):
            return
        check_shape(self, "tags", tags, (emissions.shape[0], emissions.shape[1]))
        check_range(self, "tags", tags[counts] if readable(tags) else tags, 0, self.num_tags - 1)

    def extra_repr(self) -> str:
        return f"num_tags={self.num_tags}"
