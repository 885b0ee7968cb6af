"""Integers inside what modules keep: found, changed on a copy, and followed by surgery."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress.containers import changed, part, parts
from tests.compress.helpers import assert_exact


@dataclass(frozen=True)
class Frozen:
    width: int
    heads: int
    note: str = "a text"


@dataclass
class Nested:
    inner: Frozen
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    dtype: torch.dtype = torch.float32


class Plain:
    def __init__(self, width: int, heads: int) -> None:
        self.width, self.heads = width, heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


MAKERS: dict[str, Callable[[int, int], Any]] = {
    "frozen dataclass": Frozen,
    "plain object": Plain,
    "namespace": lambda width, heads: SimpleNamespace(width=width, heads=heads),
    "arguments": lambda width, heads: argparse.Namespace(width=width, heads=heads),
}


def test_parts_of_containers_and_configurations() -> None:
    value = Nested(Frozen(8, 2))
    assert dict(parts(value)) == {"inner": value.inner, "sizes": [1, 2], "dtype": torch.float32}
    assert dict(parts([7, 8])) == {0: 7, 1: 8}
    assert part(part(value, "inner"), "heads") == 2
    with pytest.raises(LookupError, match="Frozen has no 'depth'"):
        part(value.inner, "depth")


def test_a_change_is_made_on_a_copy_and_nothing_is_copied_without_one() -> None:
    value = Nested(Frozen(8, 2))
    double = lambda _, item: 2 * item if type(item) is int else changed(item, double)  # noqa: E731
    new = changed(value, double)
    assert (new.inner.width, new.inner.heads, new.sizes) == (16, 4, [2, 4])
    assert (value.inner.width, value.inner.heads, value.sizes) == (8, 2, [1, 2])
    assert changed(value, lambda _, item: item) is value


def test_what_is_not_plain_data_is_left_alone() -> None:
    itself = SimpleNamespace(size=1)
    itself.itself = itself
    for value in (logging.getLogger("a"), nn.Linear(2, 2), SimpleNamespace(run=print, size=3), itself, Plain, "text"):
        assert list(parts(value)) == []


class Attention(nn.Module):
    """As many write it: sizes are read from a configuration that all layers share."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x):
        heads, size = self.config.heads, self.config.width // self.config.heads
        q, k, v = self.qkv(x).split(self.config.width, dim=2)
        q, k, v = (t.view(*t.shape[:2], heads, size).transpose(1, 2) for t in (q, k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(*x.shape[:2], self.config.width))


@pytest.mark.parametrize("name", MAKERS)
def test_integers_of_a_shared_configuration_follow_each_module_on_its_own(name: str) -> None:
    config = MAKERS[name](24, 4)
    model = nn.Sequential(nn.Linear(5, 24), Attention(config), Attention(config), nn.Linear(24, 3))
    streams = ("0.*", "1.out.bias", "2.out.bias")  # what is left are heads
    result = assert_exact(model, torch.randn(2, 7, 5), compress.Budget(channels=0.6), protect=streams)
    heads = [layer.config.heads for layer in result.model[1:3]]
    assert max(heads) < 4
    assert [layer.qkv.out_features for layer in result.model[1:3]] == [3 * 6 * n for n in heads]
    assert (config.width, config.heads) == (24, 4)
    again = compress.apply(model, compress.PrunePlan.from_json(result.plan.to_json()))
    assert [layer.config.heads for layer in again[1:3]] == heads
