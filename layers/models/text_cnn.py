"""Convolutional networks for sentences.

Kim: Convolutional Neural Networks for Sentence Classification (2014), section 2: convolutions of several widths side by
side, the maximum over time, dropout, a linear layer. With `k` above 1 the k largest values in order, as in
Kalchbrenner, Grefenstette, Blunsom (2014), section 3.2; with dilations above 1 wider windows at the same cost, as in
Strubell et al.: Fast and Accurate Entity Recognition with Iterated Dilated Convolutions (2017), section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layers._checks import check_lengths, check_range, check_shape, same_padding
from layers.conv import Conv1d
from layers.dropout import Dropout
from layers.padding import padding_mask
from layers.pool import KMaxOverTime


class TextCNN(nn.Module):
    """`forward(tokens, lengths=None)`: (batch, time) indices -> (batch, num_classes) logits.

    `windows` are pairs (kernel_size, dilation), one for each branch of `channels` feature maps; kernels are odd. What
    stands beyond a length does not matter.

    Raises ValueError for an even kernel, indices outside the vocabulary, and lengths that are not from 1 to time.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_classes: int,
        *,
        embedding_size: int = 64,
        channels: int = 32,
        windows: Sequence[tuple[int, int]] = ((3, 1), (5, 1), (3, 4)),
        k: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.convolutions = nn.ModuleList(
            Conv1d(embedding_size, channels, kernel, dilation=dilation, padding=same_padding(self, kernel, dilation))
            for kernel, dilation in windows
        )
        self.pool = KMaxOverTime(k)
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(len(windows) * channels * k, num_classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = embedded(self, self.embedding, tokens, lengths).transpose(1, 2)
        pooled = [self.pool(convolution(x).relu(), lengths).flatten(1) for convolution in self.convolutions]
        return self.classifier(self.dropout(torch.cat(pooled, dim=1)))


def embedded(model: nn.Module, embedding: nn.Embedding, tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """(batch, time) indices -> (batch, time, features), zeros beyond the lengths.

    Raises ValueError for indices outside the vocabulary (a CUDA device would stop for good) and bad lengths.
    """
    check_shape(model, "tokens", tokens, ("batch", "time"))
    check_range(model, "tokens", tokens, 0, embedding.num_embeddings - 1)
    x = embedding(tokens)
    if lengths is None:
        return x
    check_lengths(model, lengths, tokens.shape[0], tokens.shape[1])
    return x.masked_fill(~padding_mask(lengths.to(x.device), tokens.shape[1])[:, :, None], 0)


def text_cnn(num_classes: int = 2, vocabulary_size: int = 1000, *, k: int = 1) -> TextCNN:
    """Three branches of 32 feature maps, one of them dilated; `k` values of each are kept.

    >>> text_cnn(5)(torch.tensor([[4, 8, 15, 16, 0]]), torch.tensor([4])).shape
    torch.Size([1, 5])
    """
    return TextCNN(vocabulary_size, num_classes, k=k)
