"""Pictures of a channel graph: Graphviz DOT, and one self-contained HTML page with tables and a drawing (SVG).

The drawing has a row for each layer, from input to output, and a vertical band for each group from the first layer that
it touches to the last: where bands start, channels are made; a band's marks say what each layer does with them.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape

from compress.channels import ChannelGraph
from compress.overview import GapFacts, GroupFacts, Layer, Overview, layers, overview
from compress.table import MODEL, at_once, part_of, reach, some

ROW, LANE, BOX, BAR, MARGIN = 20, 22, 330, 60, 10  # pixels
GOLDEN_ANGLE = 137.508  # degrees: neighbours in a list get hues far apart, however long the list
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5em; color: #222; background: #fff }
h1 { font-size: 1.4em; margin: 0 } h2 { font-size: 1.1em; margin: 1.2em 0 .3em }
main { display: flex; flex-wrap: wrap; gap: 2em; align-items: flex-start }
.drawing { max-width: 100%; overflow-x: auto } .tables { flex: 1 1 36em }
table { border-collapse: collapse } th, td { text-align: left; padding: 2px 12px 2px 0; vertical-align: top }
th { border-bottom: 1px solid #999 } td { border-bottom: 1px solid #eee; overflow-wrap: break-word }
.n { text-align: right; white-space: nowrap }
.chip { display: inline-block; min-width: 2em; border-radius: 8px; text-align: center; color: #fff }
svg { font: 11px system-ui, sans-serif } .band { opacity: .35 } .mark { stroke-width: 2 }
.group:hover .band, .group:target .band { opacity: 1 }
.frozen { fill: #f4f4f4; stroke: #ccc } .live { fill: #eaf1fb; stroke: #9bb8df }
"""
LEGEND = (
    "<p>A band is a group of channels: the wider, the more MACs depend on it; dashed where removal is not exact. "
    "&#9679; the layer makes the channels, &#9675; reads them, &#8211; has a value for each. A grey layer has "
    "nothing to remove. The bar is a layer's part of the MACs. Hover for more; numbers in the table lead to bands.</p>"
)


def as_dot(graph: ChannelGraph) -> str:
    """Groups (ellipses) and the layers that they connect (boxes) in Graphviz' language, layers from input to output.

    An edge runs from a layer to the group of channels that it makes, and from a group to the layers that read it.
    Layers that only carry a value for each channel (batch norm) are left out: they connect nothing.
    """
    lines = ["digraph groups {", "  node [fontname=sans];"]
    edges = []
    for layer in layers(graph):
        name = _quoted(layer.name or MODEL)
        found = []
        for index, roles in layer.roles.items():
            colour = f'[color="{_hue(index)}"]'
            found += [f"  g{index} -> {name} {colour};"] if "consumer" in roles else []
            found += [f"  {name} -> g{index} {colour};"] if "producer" in roles else []
        if found:
            lines.append(f"  {name} [shape=box];")
        edges += found
    for facts in overview(graph).groups:
        group = facts.group
        label = f"#{group.index} {group.name}\\n{group.num_units} units, {facts.macs:.1%} of the MACs"
        style = "solid" if group.exact else "dashed"
        lines.append(f'  g{group.index} [label={_quoted(label)}, color="{_hue(group.index)}", style={style}];')
    return "\n".join([*lines, *edges, "}", ""])


def as_html(graph: ChannelGraph, title: str) -> str:
    """One page, without scripts or anything from elsewhere: what ``print(graph)`` shows, beside the drawing."""
    facts = overview(graph)
    notes = "".join(f"<p>note: {escape(note)}</p>" for note in facts.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1><p>{escape(reach(facts))}</p>{notes}{LEGEND}
<main><section class="drawing"><h2>Layers from input to output</h2>
{_drawing(layers(graph), facts.groups)}</section>
<section class="tables">{_groups(facts)}{_gaps(facts.gaps)}{_frozen(facts)}</section></main>
</body></html>
"""


# -- the tables of the page --------------------------------------------------------------------------------------------


def _groups(facts: Overview) -> str:
    rows = []
    for row in facts.groups:
        group = row.group
        chip = f'<a class="chip" style="background:{_colour(group.index)}" href="#g{group.index}">{group.index}</a>'
        rows.append(
            [chip, escape(group.name), _number(group.num_units), _number(f"{row.macs:.1%}"), escape(at_once(row)),
             _number(len(group.members)), escape(group.inexact or "exact")]
        )  # fmt: skip
    return _table("Channel groups", ["#", "group", "units", "MACs", "at once", "members", "removal"], rows)


def _gaps(gaps: Sequence[GapFacts]) -> str:
    rows = [
        [escape(f"{gap.operator} {gap.why}"), _number(gap.calls), escape(some([name or MODEL for name in gap.modules]))]
        for gap in gaps
    ]
    return _table("Operators without a rule", ["operator", "calls", "modules"], rows)


def _frozen(facts: Overview) -> str:
    rows = [
        [_number(len(axes)), escape(some([part_of(axis) for axis in axes])), escape(reason)]
        for reason, axes in facts.frozen.items()
    ]
    return _table("Never removed", ["axes", "which", "reason"], rows)


def _table(title: str, columns: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<h2>{title}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: object) -> str:
    return f'<td class="n">{value}</td>'


# -- the drawing -------------------------------------------------------------------------------------------------------


def _drawing(shown: Sequence[Layer], groups: Sequence[GroupFacts]) -> str:
    rows = {group: [i for i, layer in enumerate(shown) if group in layer.roles] for group in range(len(groups))}
    lanes = _lanes({group: (found[0], found[-1]) for group, found in rows.items()})
    width = BOX + BAR + 3 * MARGIN + LANE * (max(lanes.values(), default=0) + 1)
    height = ROW * len(shown) + 2 * MARGIN
    heaviest = max((layer.macs for layer in shown), default=0) or 1
    parts = [_row(i, layer, heaviest, width) for i, layer in enumerate(shown)]
    parts += [_band(facts, lanes[facts.group.index], rows[facts.group.index], shown) for facts in groups]
    return f'<svg width="{width}" height="{height}" xmlns="http://www.w3.org/2000/svg">' + "\n".join(parts) + "</svg>"


def _lanes(spans: dict[int, tuple[int, int]]) -> dict[int, int]:
    """A lane for each span of rows such that no two in one lane overlap; short ones come first, beside the layers."""
    lanes: list[list[tuple[int, int]]] = []
    chosen = {}
    for group, (start, end) in sorted(spans.items(), key=lambda item: (item[1][1] - item[1][0], item[1])):
        free = (i for i, lane in enumerate(lanes) if all(end < other[0] or other[1] < start for other in lane))
        chosen[group] = next(free, len(lanes))
        if chosen[group] == len(lanes):
            lanes.append([])
        lanes[chosen[group]].append((start, end))
    return chosen


def _row(index: int, layer: Layer, heaviest: float, width: int) -> str:
    top = MARGIN + ROW * index
    name = layer.name or MODEL
    # the end of a long path says more than its beginning
    short = name if len(name) <= 34 else f"…{name[-33:]}"
    shape = layer.shapes[0].partition(" ")[2] if layer.shapes else ""
    about = [name, *layer.shapes, f"{layer.macs:.2%} of the MACs"]
    about += [f"frozen: {part_of(axis)}: {axis.reason}" for axis in layer.frozen]
    kind = "live" if layer.roles else "frozen"
    middle, bar = top + ROW - 6, BAR * layer.macs / heaviest
    return (
        f"<g><title>{escape(chr(10).join(about))}</title>"
        f'<line x1="{BOX}" x2="{width - MARGIN}" y1="{top + ROW / 2}" y2="{top + ROW / 2}" stroke="#eee"/>'
        f'<rect class="{kind}" x="{MARGIN}" y="{top + 1}" width="{BOX - MARGIN}" height="{ROW - 3}" rx="3"/>'
        f'<text x="{MARGIN + 6}" y="{middle}">{escape(short)}</text>'
        f'<text x="{BOX - 6}" y="{middle}" text-anchor="end" fill="#777">{escape(shape)}</text>'
        f'<rect x="{BOX + 4}" y="{top + 5}" width="{bar:.1f}" height="{ROW - 11}" fill="#bbb"/></g>'
    )


def _band(facts: GroupFacts, lane: int, rows: Sequence[int], shown: Sequence[Layer]) -> str:
    group = facts.group
    x = BOX + BAR + 2 * MARGIN + LANE * lane + LANE // 2
    centres = [MARGIN + ROW * row + ROW / 2 for row in rows]
    colour = _colour(group.index)
    about = (
        f"#{group.index} {group.name}: {group.num_units} units, {facts.macs:.1%} of the MACs, at once: {at_once(facts)}"
    )
    dashes = "" if group.exact else ' stroke-dasharray="5 3"'
    band = (
        f'<line class="band" x1="{x}" x2="{x}" y1="{centres[0]}" y2="{centres[-1]}" stroke="{colour}" '
        f'stroke-width="{3 + 11 * math.sqrt(max(facts.macs, 0)):.1f}"{dashes}/>'
    )
    marks = [_mark(shown[row], group.index, x, y) for row, y in zip(rows, centres, strict=True)]
    pill = (
        f'<rect class="pill" x="{x - 10}" y="{centres[0] - 8}" width="20" height="13" rx="6" fill="{colour}"/>'
        f'<text x="{x}" y="{centres[0] + 2}" text-anchor="middle" fill="#fff" font-size="10">{group.index}</text>'
    )
    title = f"<title>{escape(about)}; {escape(group.inexact or 'exact')}</title>"
    return f'<g class="group" id="g{group.index}">{title}{band}{"".join(marks[1:])}{pill}</g>'


def _mark(layer: Layer, group: int, x: int, y: float) -> str:
    roles, colour = layer.roles[group], _colour(group)
    if roles == ("carrier",):
        return f'<line class="mark" x1="{x - 5}" x2="{x + 5}" y1="{y}" y2="{y}" stroke="{colour}"/>'
    marks = {"consumer": (y - 3 if "producer" in roles else y, "#fff"), "producer": (y, colour)}
    if "consumer" in roles and "producer" in roles:
        marks["producer"] = (y + 4, colour)
    drawn = [(centre, fill) for role, (centre, fill) in marks.items() if role in roles]
    return "".join(
        f'<circle class="mark" cx="{x}" cy="{centre}" r="4" fill="{fill}" stroke="{colour}"/>' for centre, fill in drawn
    )


def _colour(group: int) -> str:
    return f"hsl({GOLDEN_ANGLE * group % 360:.0f} 65% 42%)"


def _hue(group: int) -> str:
    """Graphviz takes hue, saturation and value as fractions."""
    return f"{GOLDEN_ANGLE * group % 360 / 360:.3f} 0.8 0.7"


def _quoted(text: str) -> str:
    """A string of DOT; ``\\n`` in it stays the line break that it is there."""
    return '"' + text.replace('"', '\\"') + '"'
