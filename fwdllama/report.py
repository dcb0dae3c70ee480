"""The HTML report of a training run, and the page that every other report is made on.

One file that can be mailed: style and plots are inline, nothing is fetched and no script runs. Every text that came
from a model, a data file or a path goes through jinja2's autoescape; the only markup let through is the SVG that
`fwdllama.plots` built itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fwdllama import plots
from fwdllama.formats import change, clock, flat, is_number, number, percent, size
from fwdllama.plots import Row
from fwdllama.score import exact_match, f1
from fwdllama.types import Scope
from gguf_tools.output import replacing

TEMPLATES = Path(__file__).parent / "templates"
EXCERPT_CHARS = 300

SCOPE_MEANING: Mapping[Scope, str] = {
    "answer": "on from the answer marker, off while the prompt is read",
    "all": "on for every token, an ordinary LoRA",
}
SCOPE_WARNING = (
    "This adapter must be off while the prompt is read and on from the answer marker. fwdllama and llama-server do "
    "that by themselves; any other runtime switches it on for the whole prompt, where it answers worse than the base "
    "model. For such a runtime train with --scope all."
)


@dataclass(frozen=True)
class AnswerPair:
    """One question with what the base and the tuned model said; None where that model was not asked.

    `truths` is empty where the right answer is none.
    """

    question: str
    context: str
    base: str | None
    tuned: str | None
    truths: tuple[str, ...]


@dataclass(frozen=True)
class AdapterFacts:
    """What a reader must know of an adapter file; `digest` is written as `sha256:...`."""

    path: str
    size_bytes: int
    digest: str
    scope: Scope

    @property
    def meaning(self) -> str:
        """The scope in words."""
        return SCOPE_MEANING[self.scope]

    @property
    def warning(self) -> str:
        """What goes wrong in other runtimes, or nothing."""
        return SCOPE_WARNING if self.scope == "answer" else ""


@dataclass(frozen=True)
class RunSummary:
    """Everything a training report shows.

    `metrics` are the rows of metrics.jsonl, one a step: step, elapsed_s, n_probes (of this step), n_probes_gate
    (asked by the variance gate, or None), loss and held_out_loss (nats per answer token, None where not measured),
    projected_gradient_rms, accepted, lr, tokens_per_s, peak_memory_bytes, decode_fraction (0..1). Any of them may be
    missing. Scores are in percent, 0 to 100, under the names exact_match, f1 and accuracy. `next_commands` are pairs
    (purpose, command line).
    """

    title: str
    when: str
    metrics: Sequence[Row]
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    scores_before: Mapping[str, float] = field(default_factory=dict)
    scores_after: Mapping[str, float] = field(default_factory=dict)
    examples: Sequence[AnswerPair] = ()
    adapter: AdapterFacts | None = None
    next_commands: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Tile:
    """One number worth reading first; `strong` ones are coloured."""

    label: str
    value: str
    unit: str = ""
    note: str = ""
    strong: bool = False


def render(run: RunSummary) -> str:
    """The whole page as HTML."""
    rows = run.metrics
    figures = [
        plots.score_figure(run.scores_before, run.scores_after, caption="Questions that were held out of training."),
        plots.loss_figure(rows, over="time"),
        plots.loss_figure(rows, over="probes"),
        plots.pacing_figure(rows),
        plots.slope_figure(rows),
        plots.speed_figure(rows),
    ]
    return render_page(
        "training.html",
        title=run.title,
        when=run.when,
        run=run,
        tiles=_tiles(run),
        figures=[f for f in figures if f is not None],
    )


def write_report(run: RunSummary, path: Path) -> None:
    """Render and save; see `write_page`."""
    write_page(render(run), path)


def render_page(template: str, *, more_templates: Path | None = None, **values: Any) -> str:
    """A template of ours, or of the folder `more_templates`, filled with `values`; a name not given is an error."""
    folders = [str(folder) for folder in (more_templates, TEMPLATES) if folder is not None]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (change, clock, distinct, excerpt, flat, is_right, number, percent, size, verdict)
    environment.filters.update({function.__name__: function for function in filters})
    return environment.get_template(template).render(**values)


def write_page(html: str, path: Path) -> None:
    """Save a page whole or not at all.

    Raises:
        FileError: the file cannot be written there.
    """
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def score_tiles(before: Mapping[str, float], after: Mapping[str, float]) -> list[Tile]:
    """A tile a score: the tuned value with where it came from, or the base value where nothing was tuned."""
    tiles = []
    for metric, value in (after or before).items():
        old = before.get(metric) if after else None
        note = f"from {old:.1f}, {change(old, value, 1)}" if old is not None else ""
        tiles.append(Tile(plots.metric_name(metric), f"{value:.1f}", "%", note, strong=True))
    return tiles


def _tiles(run: RunSummary) -> list[Tile]:
    tiles = score_tiles(run.scores_before, run.scores_after)
    held_out = [row["held_out_loss"] for row in run.metrics if is_number(row.get("held_out_loss"))]
    if held_out:
        tiles.append(Tile("Held-out loss", f"{min(held_out):.2f}", "nats/token", f"best; {held_out[0]:.2f} at first"))
    if not run.metrics:
        return tiles
    last = run.metrics[-1]
    if is_number(last.get("elapsed_s")):
        rejected = sum(row.get("accepted") is False for row in run.metrics)
        steps = f"{len(run.metrics):,} steps" + (f", {rejected:,} rejected" if rejected else "")
        tiles.append(Tile("Training time", clock(last["elapsed_s"]), _clock_unit(last["elapsed_s"]), steps))
    probes = sum(row.get("n_probes") or 0 for row in run.metrics)
    speeds = [row["tokens_per_s"] for row in run.metrics if is_number(row.get("tokens_per_s"))]
    if probes:
        tiles.append(Tile("Probes", f"{probes:,}", "", f"{sum(speeds) / len(speeds):,.0f} tokens/s" if speeds else ""))
    peaks = [row["peak_memory_bytes"] for row in run.metrics if is_number(row.get("peak_memory_bytes"))]
    if peaks:
        value, unit = size(max(peaks)).split()
        decoding = last.get("decode_fraction")
        note = f"{decoding:.0%} of the time decoding" if is_number(decoding) else ""
        tiles.append(Tile("Peak memory", value, unit, note))
    return tiles


def _clock_unit(seconds: float) -> str:
    return "min" if round(seconds) < 3600 else "h"


def distinct(texts: Iterable[str]) -> list[str]:
    """Each text once, in the order of first sight."""
    return list(dict.fromkeys(texts))


def is_right(answer: str, truths: Sequence[str]) -> bool:
    """Whether the answer is an exact match as SQuAD counts it."""
    return exact_match(answer, truths, version="1.1" if truths else "2.0") == 1.0


def verdict(answer: str, truths: Sequence[str]) -> str:
    """The score of one answer in a word or two."""
    if is_right(answer, truths):
        return "exact"
    return f"F1 {100 * f1(answer, truths, version='1.1' if truths else '2.0'):.0f}"


def excerpt(pair: AnswerPair, limit: int = EXCERPT_CHARS) -> Markup:
    """About `limit` characters of the context, whole words, around the first accepted answer in it, which is marked."""
    text = pair.context
    found = next((hit for truth in pair.truths if truth and (hit := _whole_word(truth, text))), None)
    first, last = found.span() if found else (0, 0)
    start = max(0, min(first - (limit - (last - first)) // 2, len(text) - limit))
    before, after = text[start:first], text[last : max(last, start + limit)]
    if start > 0:
        before = "… " + re.sub(r"^\S*\s+", "", before)
    if last + len(after) < len(text):
        after = re.sub(r"\s*\S*$", "", after) + " …"
    mark = Markup("<mark>{}</mark>").format(text[first:last]) if found else Markup()
    return escape(before) + mark + escape(after)


def _whole_word(words: str, text: str) -> re.Match[str] | None:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text)
