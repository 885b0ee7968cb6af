import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import compress
from compress.picture import _lanes, as_dot, as_html
from tests.compress.helpers import between, image
from tests.compress.test_overview import Residual

VOID = ("meta", "br")


class Balanced(HTMLParser):
    """Follows which elements are open, and collects what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _drawing(graph: compress.ChannelGraph) -> ElementTree.Element:
    page = as_html(graph, "a model")
    return ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6].replace(' xmlns="', ' about="'))


def test_the_page_is_well_formed_and_loads_nothing() -> None:
    page = as_html(compress.trace(Residual(), image(1, 3)), "<b> & Co")
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.loads == []
    assert "<script" not in page
    assert "&lt;b&gt; &amp; Co" in page


def test_every_group_has_a_row_and_a_band_with_a_mark_a_layer() -> None:
    graph = compress.trace(Residual(), image(1, 3))
    page = as_html(graph, "a model")
    bands = {band.get("id"): band for band in _drawing(graph).iter("g") if band.get("class") == "group"}
    assert set(bands) == {f"g{group.index}" for group in graph.groups}
    assert re.findall(r'href="#(g\d+)"', page) == list(bands)
    # stem (a pill), inner reads, outer writes, norm carries, head reads
    assert len(bands["g0"].findall("circle")) == 3
    assert len(bands["g0"].findall("rect")) == 1
    lines = [line.get("class") for line in bands["g0"].findall("line")]
    assert lines == ["band", "mark"]
    assert "layer_norm" in bands["g0"].findtext("title")
    assert bands["g0"].find("line").get("stroke-dasharray")  # not exact
    assert not bands["g1"].find("line").get("stroke-dasharray")


def test_what_is_drawn_lies_inside_the_drawing() -> None:
    drawing = _drawing(compress.trace(Residual(), image(1, 3)))
    width, height = float(drawing.get("width")), float(drawing.get("height"))
    for element in drawing.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= width
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(name, 0)) <= height


def test_spans_in_a_lane_never_overlap_and_lanes_are_few() -> None:
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 50, (60,), generator=generator).tolist()
    lengths = torch.randint(0, 30, (60,), generator=generator).tolist()
    spans = {i: (start, start + length) for i, (start, length) in enumerate(zip(starts, lengths, strict=True))}
    lanes = _lanes(spans)
    for i in spans:
        for j in range(i):
            if lanes[i] == lanes[j]:
                assert spans[i][1] < spans[j][0] or spans[j][1] < spans[i][0]
    crowded = max(sum(start <= row <= end for start, end in spans.values()) for row in range(80))
    assert max(lanes.values()) + 1 <= 2 * crowded


def test_dot_has_a_node_a_group_and_edges_in_the_direction_of_the_data() -> None:
    dot = as_dot(compress.trace(Residual(), image(1, 3)))
    for edge in ('"stem" -> g0', 'g0 -> "inner"', '"inner" -> g1', 'g1 -> "outer"', '"outer" -> g0', 'g0 -> "head"'):
        assert f"  {edge} [" in dot
    assert '"head" -> g' not in dot
    assert dot.count("[label=") == 2
    assert dot.startswith("digraph")
    assert dot.count("{") == dot.count("}") == 1


def test_names_are_quoted_in_dot() -> None:
    class Quotes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module('a"b', nn.Linear(3, 4))
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.get_submodule('a"b')(x))

    assert r'"a\"b" -> g0' in as_dot(compress.trace(Quotes(), image(1, 3)))


@pytest.mark.parametrize("model", [nn.Linear(3, 5), nn.Sequential(nn.Linear(3, 4), nn.Flatten(0, 1))])
def test_a_model_of_which_nothing_can_go_has_a_picture_too(model: nn.Module) -> None:
    graph = compress.trace(model, image(7, 3))
    assert "nothing can be removed" in as_html(graph, "a model")
    assert "->" not in as_dot(graph)


def test_operators_without_a_rule_are_listed() -> None:
    graph = compress.trace(between(lambda x: torch.logcumsumexp(x, -1)), image())
    assert "aten.logcumsumexp.default has no rule" in as_html(graph, "a model")
    assert "aten.logcumsumexp.default has no rule" in str(graph)
