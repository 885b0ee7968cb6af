"""Sequence labelling: a bidirectional LSTM scores the tags of each token, a CRF the tags of the whole sequence.

Huang, Xu, Yu: Bidirectional LSTM-CRF Models for Sequence Tagging (2015), section 2.4; Lample et al.: Neural
Architectures for Named Entity Recognition (2016), section 2, without its character model.
"""

from torch import Tensor, nn

from layers.crf import CRF
from layers.dropout import Dropout
from layers.models.text_cnn import embedded
from layers.padding import padding_mask
from layers.recurrent import LSTM

IGNORED = -100  # the target of a token that does not count, as in torch.nn.CrossEntropyLoss


class BiLSTMCRF(nn.Module):
    """`forward(tokens, lengths=None)`: (batch, time) indices -> (batch, time, num_tags) emissions.

    Train with `loss`, which scores whole sequences, and label with `decode`.

    Raises ValueError for indices outside the vocabulary, and lengths that are not from 1 to time.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_tags: int,
        *,
        embedding_size: int = 64,
        hidden_size: int = 64,
        num_layers: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.dropout = Dropout(dropout, per="time")
        self.lstm = LSTM(embedding_size, hidden_size, num_layers=num_layers, bidirectional=True, dropout=dropout)
        self.emissions = nn.Linear(2 * hidden_size, num_tags)
        self.crf = CRF(num_tags)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.dropout(embedded(self, self.embedding, tokens, lengths))
        return self.emissions(self.dropout(self.lstm(x, lengths)[0]))

    def loss(self, emissions: Tensor, tags: Tensor) -> Tensor:
        """Negative log-likelihood of the tags (batch, time), mean over the sequences; a tag of -100 does not count.

        Raises ValueError for a sequence without any tag that counts, and tags out of range.
        """
        return -self.crf(emissions, tags, tags != IGNORED).mean()

    def decode(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The likeliest tags (batch, time), -1 beyond the lengths."""
        mask = None if lengths is None else padding_mask(lengths.to(tokens.device), tokens.shape[1])
        return self.crf.viterbi(self(tokens, lengths), mask)[0]


def bilstm_crf(num_tags: int = 5, vocabulary_size: int = 1000) -> BiLSTMCRF:
    """A tagger of 64 features in each direction.

    >>> tagger = bilstm_crf(3).eval()
    >>> tagger.decode(torch.tensor([[4, 8, 15], [16, 23, 0]]), torch.tensor([3, 2])).shape
    torch.Size([2, 3])
    """
    return BiLSTMCRF(vocabulary_size, num_tags)
