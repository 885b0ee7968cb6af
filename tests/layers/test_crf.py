"""The CRF against the enumeration of all tag sequences."""

import itertools
import math

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

import layers

D = torch.float64
TIME, TAGS = 5, 3
MASKS = {
    "none": None,
    "lengths": layers.padding_mask(torch.tensor([5, 3, 1, 2]), TIME),
    "holes": torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool),
}


def crf_and_emissions() -> tuple[layers.CRF, Tensor]:
    crf = layers.CRF(TAGS).to(D)
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter, std=2)
    return crf, torch.randn(4, TIME, TAGS, dtype=D) * 2


def scores(crf: layers.CRF, emissions: Tensor, mask: Tensor | None) -> list[dict[tuple[int, ...], float]]:
    """For each sequence of the batch, the score of every tag sequence over the steps that count, by the definition."""
    start, end, moves = (p.detach().numpy() for p in (crf.start, crf.end, crf.transitions))
    found = []
    for n, sequence in enumerate(emissions.detach().numpy()):
        kept = sequence if mask is None else sequence[mask[n].numpy()]
        table = {}
        for tags in itertools.product(range(TAGS), repeat=len(kept)):
            score = start[tags[0]] + end[tags[-1]] + sum(kept[t, k] for t, k in enumerate(tags))
            table[tags] = score + sum(moves[a, b] for a, b in itertools.pairwise(tags))
        found.append(table)
    return found


def steps(mask: Tensor | None, n: int) -> list[int]:
    return list(range(TIME)) if mask is None else mask[n].nonzero().flatten().tolist()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_is_the_enumeration(mask: Tensor | None) -> None:
    crf, emissions = crf_and_emissions()
    tables = scores(crf, emissions, mask)
    partitions = [scipy.special.logsumexp(list(table.values())) for table in tables]
    np.testing.assert_allclose(crf.log_partition(emissions, mask).detach(), partitions, rtol=1e-12)
    tags = torch.randint(0, TAGS, (4, TIME))
    expected = [table[tuple(tags[n, steps(mask, n)].tolist())] for n, table in enumerate(tables)]
    np.testing.assert_allclose(crf.score(emissions, tags, mask).detach(), expected, rtol=1e-12)
    likelihood = np.array(expected) - partitions
    np.testing.assert_allclose(crf(emissions, tags, mask).detach(), likelihood, rtol=1e-11)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_marginals_are_sums_over_sequences(mask: Tensor | None) -> None:
    crf, emissions = crf_and_emissions()
    expected = np.zeros((4, TIME, TAGS))
    for n, table in enumerate(scores(crf, emissions, mask)):
        partition = scipy.special.logsumexp(list(table.values()))
        for tags, score in table.items():
            for t, k in zip(steps(mask, n), tags, strict=True):
                expected[n, t, k] += math.exp(score - partition)
    marginals = crf.marginals(emissions, mask)
    np.testing.assert_allclose(marginals.detach(), expected, rtol=1e-11, atol=1e-14)
    # and they are the gradient of the log partition function
    emissions.requires_grad_()
    (gradient,) = torch.autograd.grad(crf.log_partition(emissions, mask).sum(), emissions)
    torch.testing.assert_close(gradient, marginals, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_viterbi_finds_the_best(mask: Tensor | None) -> None:
    crf, emissions = crf_and_emissions()
    tags, best = crf.viterbi(emissions, mask)
    for n, table in enumerate(scores(crf, emissions, mask)):
        expected = max(table, key=lambda found: table[found])
        assert tuple(tags[n, steps(mask, n)].tolist()) == expected
        assert float(best[n].detach()) == pytest.approx(table[expected], rel=1e-12)
        assert all(int(tags[n, t]) == -1 for t in range(TIME) if t not in steps(mask, n))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_what_does_not_count_changes_nothing(mask: Tensor | None) -> None:
    if mask is None:
        return
    crf, emissions = crf_and_emissions()
    tags = torch.randint(0, TAGS, (4, TIME))
    before = crf(emissions, tags, mask), crf.marginals(emissions, mask), crf.viterbi(emissions, mask)[0]
    emissions[~mask], tags[~mask] = 1e6, -100
    after = crf(emissions, tags, mask), crf.marginals(emissions, mask), crf.viterbi(emissions, mask)[0]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_gradients(mask: Tensor | None) -> None:
    crf, emissions = crf_and_emissions()
    tags = torch.randint(0, TAGS, (4, TIME))
    names = [name for name, _ in crf.named_parameters()]

    def likelihood(emissions: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(crf, dict(zip(names, parameters, strict=True)), (emissions, tags, mask))

    parameters = [p.detach().requires_grad_() for p in crf.parameters()]
    assert torch.autograd.gradcheck(likelihood, (emissions.requires_grad_(), *parameters))


def test_long_sequences_do_not_overflow() -> None:
    crf = layers.CRF(4)
    emissions = torch.randn(2, 300, 4) * 100
    tags = crf.viterbi(emissions)[0]
    likelihood = crf(emissions, tags)
    assert likelihood.isfinite().all()
    assert bool((likelihood <= 1e-3 * emissions.abs().sum()).all())
    torch.testing.assert_close(crf.marginals(emissions).sum(2), torch.ones(2, 300), rtol=0.05, atol=0.05)


def test_forbidden_transitions_do_not_occur() -> None:
    crf, emissions = crf_and_emissions()
    with torch.no_grad():
        crf.transitions[0, 1] = -1e4
    tags = crf.viterbi(emissions)[0]
    assert not bool(((tags[:, :-1] == 0) & (tags[:, 1:] == 1)).any())
    crf.log_partition(emissions.requires_grad_()).sum().backward()
    assert emissions.grad is not None
    assert emissions.grad.isfinite().all()
    assert float(crf.transitions.grad[0, 1]) == 0


def test_one_step_is_a_softmax() -> None:
    crf, emissions = crf_and_emissions()
    emissions = emissions[:, :1]
    expected = (emissions[:, 0] + crf.start + crf.end).softmax(1)
    torch.testing.assert_close(crf.marginals(emissions)[:, 0], expected)


E4 = torch.zeros(2, 5, 4)
GOOD = torch.zeros(2, 5, dtype=torch.long)
EMPTY = torch.tensor([[True] * 5, [False] * 5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda crf: layers.CRF(0), "CRF: num_tags must be an integer of at least 1, but is 0"),
        (lambda crf: crf.viterbi(torch.zeros(2, 5, 3)), r"CRF: emissions must have shape \(batch, time, 4\)"),
        (lambda crf: crf.log_partition(torch.zeros(5, 4)), r"emissions must have shape .*has shape \(5, 4\)"),
        (lambda crf: crf.marginals(E4, torch.ones(2, 4, dtype=torch.bool)), r"mask must have shape \(2, 5\)"),
        (lambda crf: crf.marginals(E4, torch.ones(2, 5)), "mask must be boolean, .* dtype torch.float32"),
        (
            lambda crf: crf.viterbi(E4, EMPTY),
            r"CRF: mask must leave each sequence .* \[1\] have none",
        ),
        (lambda crf: crf(E4, GOOD, EMPTY), "mask must leave each sequence"),
        (lambda crf: crf(E4, GOOD + 4), "CRF: tags must be from 0 to 3, but are from 4 to 4"),
        (lambda crf: crf(E4, GOOD - 1), "tags must be from 0 to 3"),
        (lambda crf: crf(E4, GOOD[:, :4]), r"tags must have shape \(2, 5\).*has shape \(2, 4\)"),
        (lambda crf: crf(E4, GOOD.float()), "tags must be a tensor of integers"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(layers.CRF(4))
