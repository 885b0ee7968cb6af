"""Seeded random convolutional networks: blocks of every kind, in any order, with sizes stored on modules."""

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compress.helpers import Apply


class RandomNetwork(nn.Module):
    """Blocks drawn by ``seed`` between a stem and a head; channel counts are odd wherever a block allows it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        channels = draw.choice([6, 7, 9, 11, 12])
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=draw.random() < 0.5)
        self.blocks = nn.ModuleList()
        self.kinds: tuple[str, ...] = ()
        for _ in range(draw.randint(2, 6)):
            kind = draw.choice(sorted(BLOCKS))
            block, channels = BLOCKS[kind](draw, channels)
            self.blocks.append(block)
            self.kinds += (kind,)
        self.flat = draw.random() < 0.4
        self.head = nn.Linear(channels * (6 if self.flat else 1), 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = F.adaptive_avg_pool2d(x, (3, 2))
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


Block = tuple[nn.Module, int]


def _conv(draw: random.Random, channels: int) -> Block:
    made = draw.choice([5, 8, 10, 13])
    norm = draw.choice(
        [nn.BatchNorm2d(made), nn.BatchNorm2d(made, affine=False), nn.Identity(), nn.InstanceNorm2d(made)]
    )
    act = draw.choice([nn.ReLU(inplace=True), nn.Sigmoid(), nn.SiLU(), nn.PReLU(made), nn.Hardswish(), nn.GELU()])
    return nn.Sequential(nn.Conv2d(channels, made, 3, padding=1, bias=draw.random() < 0.5), norm, act), made


def _transposed(draw: random.Random, channels: int) -> Block:
    made = draw.choice([6, 7])
    return nn.Sequential(nn.ConvTranspose2d(channels, made, 3, padding=1), nn.Tanh()), made


def _depthwise(draw: random.Random, channels: int) -> Block:
    times = draw.choice([1, 1, 2])
    return nn.Conv2d(channels, channels * times, 3, padding=1, groups=channels), channels * times


def _grouped(draw: random.Random, channels: int) -> Block:
    groups = next((g for g in (draw.choice([2, 3, 4]), 2, 3) if channels % g == 0), 1)
    made = groups * draw.choice([1, 2, 3, 5])
    return nn.Sequential(nn.Conv2d(channels, made, 3, padding=1, groups=groups), nn.ReLU()), made


class _Around(nn.Module):
    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _residual(draw: random.Random, channels: int) -> Block:
    inner = draw.choice([5, 7])
    body = nn.Sequential(
        nn.Conv2d(channels, inner, 1), nn.BatchNorm2d(inner), nn.ReLU(), nn.Conv2d(inner, channels, 3, padding=1)
    )
    return _Around(lambda m, x: (x + m.body(x)).relu(), body=body), channels


def _projected(draw: random.Random, channels: int) -> Block:
    made = draw.choice([7, 9])
    return _Around(
        lambda m, x: m.short(x) + m.body(x).relu(),
        short=nn.Conv2d(channels, made, 1, bias=False), body=nn.Conv2d(channels, made, 3, padding=1),
    ), made  # fmt: skip


def _shared(draw: random.Random, channels: int) -> Block:
    return _Around(lambda m, x: m.body(m.body(x).relu()), body=nn.Conv2d(channels, channels, 3, padding=1)), channels


def _gate(draw: random.Random, channels: int) -> Block:
    inner = draw.choice([3, 5])
    return _Around(
        lambda m, x: x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid(),
        down=nn.Conv2d(channels, inner, 1), up=nn.Conv2d(inner, channels, 1),
    ), channels  # fmt: skip


def _dense(draw: random.Random, channels: int) -> Block:
    growth = draw.choice([3, 5])
    return _Around(
        lambda m, x: torch.cat([x, m.a(x), m.b(torch.cat([x, m.a(x)], 1)).relu()], 1),
        a=nn.Conv2d(channels, growth, 1), b=nn.Conv2d(channels + growth, growth, 3, padding=1),
    ), channels + 2 * growth  # fmt: skip


def _inception(draw: random.Random, channels: int) -> Block:
    a, b = draw.choice([(3, 4), (5, 2)])
    return _Around(
        lambda m, x: torch.cat([m.a(x), F.max_pool2d(x, 3, 1, 1), m.b(x)], 1),
        a=nn.Conv2d(channels, a, 1), b=nn.Conv2d(channels, b, 3, padding=1),
    ), a + b + channels  # fmt: skip


def _split(draw: random.Random, channels: int) -> Block:
    if channels < 4:
        return _conv(draw, channels)
    first = draw.randint(2, channels - 2)
    made = draw.choice([5, 7])

    def function(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x.split(m.sizes, 1)
        return m.a(a) + m.b(b)

    block = _Around(function, a=nn.Conv2d(first, made, 1), b=nn.Conv2d(channels - first, made, 3, padding=1))
    block.sizes = [first, channels - first]
    return block, made


def _slices(draw: random.Random, channels: int) -> Block:
    if channels < 4:
        return _conv(draw, channels)
    first = draw.randint(2, channels - 2)
    block = _Around(
        lambda m, x: torch.cat([m.body(x[:, : m.first]), x[:, m.first :]], 1), body=nn.Conv2d(first, 7, 3, padding=1)
    )
    block.first = first
    return block, 7 + channels - first


def _halves(draw: random.Random, channels: int) -> Block:
    if channels % 2:
        return _conv(draw, channels)

    def glu(m: nn.Module, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * b.sigmoid()

    return Apply(glu), channels // 2


def _shuffle(draw: random.Random, channels: int) -> Block:
    groups = next((g for g in (2, 3, 5) if channels % g == 0), 1)

    def shuffle(m: nn.Module, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(b, c, h, w)

    return Apply(shuffle, groups=groups), channels


def _pixel(draw: random.Random, channels: int) -> Block:
    return nn.Sequential(nn.Conv2d(channels, 4 * 5, 1), nn.PixelShuffle(2), nn.AvgPool2d(2)), 5


def _scale(draw: random.Random, channels: int) -> Block:
    block = _Around(lambda m, x: x * m.gamma + m.beta)
    block.gamma, block.beta = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(1, channels, 1, 1))
    return block, channels


def _padded(draw: random.Random, channels: int) -> Block:
    block = _Around(
        lambda m, x: F.pad(x, (0, 0, 0, 0, m.extra, m.extra)) + m.body(x),
        body=nn.Conv2d(channels, channels + 4, 3, padding=1),
    )
    block.extra = 2
    return block, channels + 4


class _Heads(nn.Module):
    """Attention over positions: heads of one or three projections, fused or written out, beside its input."""

    def __init__(self, channels: int, heads: int, size: int, *, one: bool, fused: bool) -> None:
        super().__init__()
        self.heads, self.size, self.fused, self.scale = heads, size, fused, 0.4
        parts = [3] if one else [1, 1, 1]
        self.projections = nn.ModuleList(nn.Linear(channels, n * heads * size) for n in parts)
        self.out = nn.Linear(heads * size, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        b, n, _ = tokens.shape
        joined = torch.cat([layer(tokens) for layer in self.projections], dim=-1)
        q, k, v = joined.view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            mixed = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(b, n, self.heads * self.size)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


def _attention(draw: random.Random, channels: int) -> Block:
    heads, size = draw.choice([2, 3]), draw.choice([4, 5])
    return _Heads(channels, heads, size, one=draw.random() < 0.5, fused=draw.random() < 0.5), channels


def _pool(draw: random.Random, channels: int) -> Block:
    return draw.choice(
        [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2, 1), nn.Upsample(scale_factor=2), nn.Dropout2d(0.1)]
    ), channels


BLOCKS: dict[str, Callable[[random.Random, int], Block]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _conv, _transposed, _depthwise, _grouped, _residual, _projected, _shared, _gate, _dense, _inception, _split,
        _slices, _halves, _shuffle, _pixel, _scale, _padded, _pool, _attention,
    )
}  # fmt: skip
