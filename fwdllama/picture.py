"""A figure as an SVG file of its own, for documents: with its title, its legend and the style that a report's page would give it.

The style is that of the reports, read from their template, so that colours are decided once; an image in a document follows the reader's
light or dark setting as a page does.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from markupsafe import Markup

from fwdllama.drawing import WIDTH, Figure

STYLE = Path(__file__).parent / "templates" / "style.html"
HEAD, ROW, PER_ROW = 30, 20, 2  # of the title, of a row of the legend, and how many entries that has
MARKS = {"block": '<rect x="0" y="-9" width="12" height="9" rx="2" class="rect"/>', "ring": '<circle cx="6" cy="-4" r="4" class="dot"/>'}
LINE = '<path d="M0 -4h14" class="line"/>'


@cache
def style() -> str:
    """What of the reports' style is for plots: colours, light and dark, and the rules of their parts."""
    text = STYLE.read_text(encoding="utf-8")
    colours = re.findall(r"^:root \{.*?^\}|^@media \(prefers-color-scheme: dark\) \{.*?^\}", text, re.MULTILINE | re.DOTALL)
    rules = [line for line in text.splitlines() if line.startswith(".plot-svg")]
    own = (
        "text { font-family: ui-sans-serif, system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'Helvetica Neue', Arial, sans-serif; }",
        ".card { fill: var(--card); stroke: var(--line); } .head { fill: var(--ink); font-size: 15px; font-weight: 650; }",
        ".legend text { fill: var(--soft); font-size: 12px; }",
    )
    return "\n".join([*colours, *rules, *own])


def picture(figure: Figure) -> str:
    """The text of an SVG file; equal figures give equal bytes."""
    found = re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', figure.svg)
    assert found is not None  # `drawing` gives every plot one
    plot_height = float(found[1])
    top = HEAD + ROW * -(-len(figure.legend) // PER_ROW) + 6
    width, height = WIDTH + 16, round(plot_height + top + 10)
    entries = []
    for i, (classes, label) in enumerate(figure.legend):
        role, _, mark = classes.partition(" ")
        x, y = 16 + (i % PER_ROW) * WIDTH // PER_ROW, HEAD + ROW * (i // PER_ROW) + 12
        drawn = f'<g class="plot-svg"><g class="series {role}">{MARKS.get(mark, LINE)}</g></g>'
        entries.append(Markup('<g transform="translate({}, {})">{}<text x="20" y="0">{}</text></g>').format(x, y, Markup(drawn), label))
    plot = str(figure.svg).replace("<svg ", f'<svg x="8" y="{top}" width="{WIDTH}" height="{plot_height:g}" ', 1)
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}" role="img">\n<title>{}</title>\n<style>\n{}\n</style>\n'
        '<rect x="0.5" y="0.5" width="{}" height="{}" rx="10" class="card"/>\n<text x="16" y="22" class="head">{}</text>\n'
        '<g class="legend">{}</g>\n{}\n</svg>\n'
    ).format(
        width, height, width, height, figure.title, Markup(style()), width - 1, height - 1, figure.title, Markup("").join(entries), Markup(plot)
    )
