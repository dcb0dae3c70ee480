"""How plots are drawn: inline SVG by pygal, coloured by the page around it.

pygal draws; everything that makes a chart look like pygal is taken away again. Its style sheet is not used: shapes
carry a role (`main`, `quiet` or `limit`) and the page's own CSS gives each role a colour, so that one drawing serves
light and dark, screen and paper. Its scripts, hover panels and random ids are removed, so that the same data give the
same bytes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal
from xml.etree import ElementTree

import pygal
from markupsafe import Markup
from pygal.style import Style

from fwdllama.formats import is_number

# For its map plugins pygal leaves an import hook of a kind that Python 3.12 removed: on 3.11 every optional import that
# finds nothing, anywhere in the program, would warn. There are no maps here.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "PluginImportFixer"]

Role = Literal["main", "quiet", "limit"]
Point = tuple[float, float]

WIDTH, HEIGHT = 480, 300  # SVG units; shown 1:1 in two columns and at three quarters on a phone
MAX_POINTS = 240  # two units of width a point: more cannot be seen and only makes the page heavy
LABEL_PX = 12
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Series:
    """One line: `role` decides its colour, `dots` whether single points are marked, `line` whether they are joined."""

    name: str
    points: tuple[Point, ...]
    role: Role
    dots: bool = False
    line: bool = True


@dataclass(frozen=True)
class Figure:
    """A drawing with what belongs beside it: `legend` has (CSS classes of the mark, label) pairs."""

    title: str
    svg: Markup
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()


def nice_ticks(low: float, high: float, n_wanted: int = 5) -> list[float]:
    """Round numbers, evenly spaced, from at or below `low` to at or above `high`.

    >>> nice_ticks(0.0, 4.3)
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    scale = max(abs(low), abs(high))
    if high - low <= 1e-9 * max(scale, 1e-3):  # nothing but rounding separates them: as flat as it can be drawn
        low, high = min(low, 0.0), max(high, 0.0)
        high = high if high - low > 1e-9 else low + 1.0
    rough = (high - low) / n_wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 2 - math.floor(math.log10(step))
    return [round(i * step, digits) for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """At most as many digits as the tick needs, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def thinned(points: Sequence[Point], limit: int = MAX_POINTS) -> tuple[Point, ...]:
    """Means of equal runs of neighbours, at most `limit` of them; the points themselves where they are few enough."""
    if len(points) <= limit:
        return tuple(points)
    edges = [round(i * len(points) / limit) for i in range(limit + 1)]
    bins = [points[a:b] for a, b in pairwise(edges)]
    return tuple((sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins)


def line_figure(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    x_title: str,
    y_title: str,
    caption: str = "",
    from_zero: bool = False,
) -> Figure | None:
    """Lines over a common x, or None where no series has a point."""
    series = [s for s in series if s.points]
    if not series:
        return None
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    x_ticks = nice_ticks(min(0.0, min(xs)), max(xs))
    y_ticks = nice_ticks(min(0.0, min(ys)) if from_zero else min(ys), max(ys))
    # Data end where they end: only the ticks inside are kept on x, so that no empty strip follows the last step.
    x_high = max(max(xs), x_ticks[1])
    chart = pygal.XY(
        **_common(name, HEIGHT),
        x_title=x_title,
        y_title=y_title,
        xrange=(x_ticks[0], x_high),
        range=(y_ticks[0], y_ticks[-1]),
        x_labels=[{"label": tick_label(v), "value": v} for v in x_ticks if v <= x_high * (1 + 1e-9)],
        y_labels=[{"label": tick_label(v), "value": v} for v in y_ticks],
        dots_size=2.6,
    )
    for s in series:
        chart.add(s.name, list(s.points), show_dots=s.dots, stroke=s.line, formatter=_point_text(s.name, x_title))
    return Figure(title, _inline(chart, [s.role for s in series], title), caption, _legend(series))


def bar_figure(
    name: str,
    title: str,
    groups: Sequence[str],
    bars: Sequence[tuple[str, Role, Sequence[float | None]]],
    *,
    axis_title: str,
    high: float | None = None,
    caption: str = "",
) -> Figure | None:
    """Horizontal bars, one of each kind a group, with their values written at the end; None where there is no value."""
    bars = [bar for bar in bars if any(is_number(v) for v in bar[2])]
    if not groups or not bars:
        return None
    top = high if high is not None else max(float(v) for _, _, values in bars for v in values if v is not None)
    ticks = nice_ticks(0.0, top, 4)
    chart = pygal.HorizontalBar(
        **_common(name, 74 + len(groups) * (34 + 30 * len(bars))),
        x_title=axis_title,
        range=(0.0, ticks[-1]),
        y_labels=[{"label": tick_label(v), "value": v} for v in ticks],
        print_values=True,
        print_values_position="top",
        rounded_bars=2,
        formatter=lambda v: "" if v is None else f"{v:.1f}",
    )
    # pygal draws groups from the bottom up and, within a group, the first kind on top: only the groups need turning.
    chart.x_labels = list(reversed(groups))
    for label, _, values in bars:
        chart.add(label, [v if is_number(v) else None for v in reversed(values)])
    legend = tuple((f"{role} block", label) for label, role, _ in bars)
    return Figure(title, _inline(chart, [role for _, role, _ in bars], title), caption, legend)


def _common(name: str, height: int) -> dict[str, Any]:
    style = Style(
        font_family="inherit",
        label_font_size=LABEL_PX,
        major_label_font_size=LABEL_PX,
        title_font_size=LABEL_PX,
        value_font_size=LABEL_PX,
    )
    return {
        "style": style,
        "css": [],
        "js": [],
        "width": WIDTH,
        "height": height,
        "margin": 6,
        "margin_right": 14,
        "show_legend": False,
        "truncate_label": -1,
        "classes": ["plot-svg", f"plot-{name}"],
        "disable_xml_declaration": True,
        "no_data_text": "",
    }


def _inline(chart: pygal.graph.graph.Graph, roles: Sequence[Role], title: str) -> Markup:
    """The chart as an `<svg>` element without scripts, styles, comments or random ids."""
    chart.uuid = ""
    root = ElementTree.fromstring(chart.render())  # a str of our own making, not somebody's file
    root.attrib.pop("id", None)
    root.attrib.update({"role": "img", "aria-label": title})
    for parent in list(root.iter()):
        for child in list(parent):
            tag, kind = child.tag.removeprefix(SVG), child.get("class", "")
            if tag in ("defs", "script", "style") or "tooltip-overlay" in kind or (tag == "title" and kind == ""):
                parent.remove(child)
    for group in root.iter(f"{SVG}g"):
        words = group.get("class", "").split()
        colour = next((w for w in words if w.startswith("color-")), None)
        if colour is not None:
            group.set("class", f"series {roles[int(colour.removeprefix('color-'))]}")
        notes = [child for child in group if child.tag == f"{SVG}desc"]
        if notes:
            ElementTree.SubElement(group, f"{SVG}title").text = notes[0].text
        for note in notes:
            group.remove(note)
    for node in root.iter():
        node.tag = node.tag.removeprefix(SVG)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # ElementTree has escaped every text in it


def _legend(series: Sequence[Series]) -> tuple[tuple[str, str], ...]:
    return tuple((s.role if s.line else f"{s.role} ring", s.name) for s in series)


def _point_text(name: str, x_title: str) -> Callable[[Any], str]:
    return lambda point: f"{name}: {point[1]:.4g} ({x_title}: {point[0]:.4g})"
