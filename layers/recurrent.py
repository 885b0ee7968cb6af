"""Recurrent layers over padded batches: plain (RNN), long short-term memory (LSTM), gated recurrent units (GRU).

A backward direction reads each sequence from its own last step, wherever the filling begins; outputs in the filling are
zero. Each layer and direction is one call of PyTorch's fused kernel on the padded batch. Beside packing the batch with
`torch.nn.utils.rnn`, on one core and with two fifths of the batch filling, a training step takes 0.35 (LSTM) to 0.76
(GRU) of the time; forward alone an LSTM takes 0.9 x and a GRU 1.4 to 1.8 x as long, as the filling is computed too
(benchmarks/bench_recurrent.py, on a busy machine).
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers._checks import check_lengths, check_positive, check_shape, fail
from layers.padding import padding_mask


class _Recurrent(nn.Module):
    """What the three share; they differ in their cell and kernel."""

    _cell: type[nn.RNNCell] | type[nn.LSTMCell] | type[nn.GRUCell]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive(self, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        if not 0 <= dropout < 1:
            raise fail(self, f"dropout must be in [0, 1), but is {dropout}")
        self.bidirectional, self.dropout = bidirectional, dropout
        directions = 2 if bidirectional else 1
        widths = [input_size, *[directions * hidden_size] * (num_layers - 1)]
        # The cells hold the parameters; the kernels that run over time are called with them.
        self.forwards = nn.ModuleList(self._cell(width, hidden_size) for width in widths)
        self.backwards = nn.ModuleList(self._cell(width, hidden_size) for width in widths if bidirectional)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first = self.forwards[0]
        assert isinstance(first, nn.RNNCellBase)
        check_shape(self, "x", x, ("batch", "time", first.input_size))
        mask = order = None
        if lengths is not None:
            check_lengths(self, lengths, x.shape[0], x.shape[1])
            lengths = lengths.to(x.device)
            mask = padding_mask(lengths, x.shape[1])[:, :, None]
        if self.bidirectional:
            order = _reversal(x, lengths)
        finals: tuple[Tensor, ...] = ()
        for layer, forwards in enumerate(self.forwards):
            if layer:
                x = F.dropout(x, self.dropout, self.training)
            outputs: tuple[Tensor, ...] = (self._run(x, forwards),)
            finals = (_last(outputs[0], lengths),)
            if order is not None:
                turned = self._run(_reordered(x, order), self.backwards[layer])
                outputs, finals = (*outputs, _reordered(turned, order)), (*finals, _last(turned, lengths))
            x = torch.cat(outputs, dim=2)
        return x if mask is None else x.masked_fill(~mask, 0), torch.cat(finals, dim=1)

    def _run(self, x: Tensor, cell: nn.Module) -> Tensor:
        """(batch, time, features) -> (batch, time, hidden), forwards in time, from a state of zeros."""
        assert isinstance(cell, nn.RNNCellBase)
        state = x.new_zeros(1, x.shape[0], cell.hidden_size)
        weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
        if not x.is_cuda or torch.compiler.is_compiling():
            return self._kernel(x, state, weights)
        with warnings.catch_warnings():  # cuDNN copies the weights of a call together, which is next to nothing
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
            return self._kernel(x, state, weights)

    def _kernel(self, x: Tensor, state: Tensor, weights: list[Tensor]) -> Tensor:
        raise NotImplementedError


class RNN(_Recurrent):
    """h_t = tanh(W x_t + b + U h_(t-1) + c), from h_0 = 0.

    `forward(x, lengths=None)`: x (batch, time, input_size) -> (output, final). output is (batch, time, directions
    hidden_size), directions 2 if `bidirectional` (forward, then backward features) else 1, zero beyond a length; final
    (batch, directions hidden_size) is the state of the last layer after the last step that each direction reads: the
    summary of a sequence. `dropout` is the probability between layers. Source: Elman: Finding Structure in Time (1990);
    Schuster and Paliwal: Bidirectional Recurrent Neural Networks (1997).

    Raises ValueError for sizes below 1, another rank or number of features, and lengths that are not from 1 to time.

    >>> output, final = RNN(3, 5, bidirectional=True)(torch.zeros(2, 4, 3), torch.tensor([4, 1]))
    >>> output.shape, final.shape
    (torch.Size([2, 4, 10]), torch.Size([2, 10]))
    """

    _cell = nn.RNNCell

    def _kernel(self, x: Tensor, state: Tensor, weights: list[Tensor]) -> Tensor:
        return torch.rnn_tanh(x, state, weights, True, 1, 0.0, self.training, False, True)[0]


class LSTM(_Recurrent):
    """c_t = f c_(t-1) + i g, h_t = o tanh(c_t), with the gates i, f, o = sigmoid(...) and g = tanh(...) of x_t and
    h_(t-1).

    Arguments, shapes and errors as for `RNN`; final holds h, not c. Source: Hochreiter and Schmidhuber: Long Short-Term
    Memory (1997), with forget gates of Gers et al. (2000).

    >>> LSTM(3, 5)(torch.zeros(2, 4, 3))[0].shape
    torch.Size([2, 4, 5])
    """

    _cell = nn.LSTMCell

    def _kernel(self, x: Tensor, state: Tensor, weights: list[Tensor]) -> Tensor:
        return torch.lstm(x, (state, state), weights, True, 1, 0.0, self.training, False, True)[0]


class GRU(_Recurrent):
    """h_t = (1 - z) n + z h_(t-1) with z, r = sigmoid(...) of x_t and h_(t-1), n = tanh(W x_t + b + r (U h_(t-1) + c)).

    Arguments, shapes and errors as for `RNN`. Source: Cho et al.: Learning Phrase Representations using RNN
    Encoder-Decoder (2014), section 2.3.

    >>> GRU(3, 5, num_layers=2)(torch.zeros(2, 4, 3))[0].shape
    torch.Size([2, 4, 5])
    """

    _cell = nn.GRUCell

    def _kernel(self, x: Tensor, state: Tensor, weights: list[Tensor]) -> Tensor:
        return torch.gru(x, state, weights, True, 1, 0.0, self.training, False, True)[0]


def _reversal(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Positions (batch, time) that turn each sequence round and leave its filling in place; twice is the identity."""
    steps = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    if lengths is None:
        return steps.flip(1)
    return torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[:, :, None].expand_as(x))


def _last(output: Tensor, lengths: Tensor | None) -> Tensor:
    """(batch, hidden) at the last step of each sequence."""
    if lengths is None:
        return output[:, -1]
    last = (lengths - 1)[:, None, None].expand(-1, 1, output.shape[2])
    return output.gather(1, last)[:, 0]
