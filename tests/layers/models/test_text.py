"""The networks for text: filling that does not matter, and a tagger that is its definition."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from layers import models, padding_mask
from layers.models.bilstm_crf import BiLSTMCRF
from layers.models.text_cnn import TextCNN
from mtl import FitOptions, Task, fit

LENGTHS = torch.tensor([6, 3, 1])


def tokens(vocabulary_size: int = 13) -> Tensor:
    return torch.randint(0, vocabulary_size, (3, 6))


MODELS = {
    "text_cnn": lambda: TextCNN(13, 4, embedding_size=5, channels=3),
    "text_cnn with k-max": lambda: TextCNN(13, 4, embedding_size=5, channels=3, k=3),
    "bilstm_crf": lambda: BiLSTMCRF(13, 4, embedding_size=5, hidden_size=3, num_layers=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_filling_does_not_matter(name: str) -> None:
    model, x = MODELS[name]().double().eval(), tokens()
    found = model(x, LENGTHS)
    for n, length in enumerate(LENGTHS.tolist()):
        alone = model(x[n : n + 1, :length])
        kept = found[n : n + 1, :length] if found.dim() == 3 else found[n : n + 1]
        torch.testing.assert_close(kept, alone, rtol=1e-12, atol=1e-13)


def test_k_max_keeps_more() -> None:
    assert models.text_cnn(3, k=4).classifier.in_features == 3 * 32 * 4
    assert models.text_cnn(3, k=4)(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3)


def test_tagger_is_the_enumeration() -> None:
    """Loss and labels of a whole BiLSTM-CRF, from emissions and transitions alone."""
    model, x = BiLSTMCRF(13, 3, embedding_size=5, hidden_size=4).double().eval(), tokens()
    emissions = model(x, LENGTHS).detach()
    for parameter in model.crf.parameters():
        nn.init.normal_(parameter)
    crf, tags = model.crf, torch.randint(0, 3, (3, 6))
    tags[~padding_mask(LENGTHS, 6)] = -100
    likelihoods, decoded = [], model.decode(x, LENGTHS)
    with torch.no_grad():
        for n, length in enumerate(LENGTHS.tolist()):
            table = {}
            for y in itertools.product(range(3), repeat=length):
                score = crf.start[y[0]] + crf.end[y[-1]] + sum(emissions[n, t, k] for t, k in enumerate(y))
                table[y] = float(score + sum(crf.transitions[a, b] for a, b in itertools.pairwise(y)))
            partition = torch.tensor(list(table.values()), dtype=torch.float64).logsumexp(0)
            likelihoods.append(table[tuple(tags[n, :length].tolist())] - float(partition))
            assert tuple(decoded[n, :length].tolist()) == max(table, key=lambda y: table[y])
    loss = model.loss(model(x, LENGTHS), tags)
    assert float(loss.detach()) == pytest.approx(-sum(likelihoods) / 3, rel=1e-11)


class TokenAccuracy(MulticlassAccuracy):
    """Of the likeliest tag of each token by itself."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.flatten(0, 1), target.flatten())


def test_tagger_learns_with_fit() -> None:
    """Tags that depend on the token before as well; the model has the loss, -100 marks what does not count."""
    torch.manual_seed(0)
    x = torch.randint(0, 5, (64, 8))
    tags = (x + x.roll(1, dims=1)) % 3
    tags[:, 0] = x[:, 0] % 3
    model = BiLSTMCRF(5, 3, embedding_size=8, hidden_size=16, dropout=0.0)
    lengths = torch.randint(4, 9, (64,))
    tags[~padding_mask(lengths, 8)] = -100
    options = FitOptions(optimizer="adamw", lr=0.03, progress=False)
    task = Task("tags", loss=model.loss, metric=TokenAccuracy(average="micro", ignore_index=-100))
    history = fit(model, task, [((x, lengths), tags)] * 5, 20, options=options)
    assert history[-1].loss["tags"] < 0.3 * history[0].loss["tags"]
    found = model.eval().decode(x, lengths)
    assert float((found == tags)[tags != -100].float().mean()) > 0.9


def test_a_batch_of_batches() -> None:
    """torch.vmap: values that cannot be looked at are not."""
    model, x = MODELS["text_cnn with k-max"]().eval(), torch.stack([tokens(), tokens()])
    found = torch.vmap(model)(x, torch.stack([LENGTHS, LENGTHS.flip(0)]))
    torch.testing.assert_close(found[1], model(x[1], LENGTHS.flip(0)))


@pytest.mark.slow
def test_exports_with_any_batch_and_length() -> None:
    model, x = MODELS["text_cnn with k-max"]().eval(), torch.randint(0, 13, (3, 20))
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("time", min=12)}
    program = torch.export.export(model, (x, LENGTHS), dynamic_shapes=(sizes, {0: sizes[0]}))
    y, lengths = torch.randint(0, 13, (5, 30)), torch.tensor([30, 1, 4, 7, 2])
    torch.testing.assert_close(program.module()(y, lengths), model(y, lengths))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model(torch.tensor([[0, 13]])), "tokens must be from 0 to 12, but are from 0 to 13"),
        (lambda model: model(torch.tensor([0, 1])), r"tokens must have shape \(batch, time\)"),
        (lambda model: model(torch.zeros(2, 3)), "tokens must be a tensor of integers"),
        (lambda model: model(tokens(), torch.tensor([7, 1, 1])), "lengths must be from 1 to 6, but are from 1 to 7"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_bad_input(name: str, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(MODELS[name]())
