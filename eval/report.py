"""The HTML report of an evaluation, made of the same page, parts and plots as the report of a training run.

Which answers are shown is decided by rule, never by hand: some evenly spaced over the file, then the best and the
worst by F1, and among equals by the loss, so that the surest mistakes come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fwdllama import plots
from fwdllama.drawing import Figure, bar_figure
from fwdllama.report import AdapterFacts, AnswerPair, Tile, render_page, score_tiles, write_page
from fwdllama.score import f1
from fwdllama.types import Dataset, Example

from .answer import Measured

TEMPLATES = Path(__file__).parent / "templates"
BANDS = ("all right (F1 100)", "partly right", "wrong (F1 0)")


@dataclass(frozen=True)
class EvaluationSummary:
    """Everything an evaluation report shows; `base` or `tuned` is None where that model was not asked."""

    title: str
    when: str
    dataset: Dataset
    base: Measured | None
    tuned: Measured | None
    adapter: AdapterFacts | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> Measured:
        """The model that the report is about: the tuned one if there is one.

        Raises:
            ValueError: there is neither.
        """
        measured = self.tuned or self.base
        if measured is None:
            raise ValueError("an evaluation without results has no report")
        return measured


@dataclass(frozen=True)
class ScoreRow:
    """One line of the table; a value is None where it was not measured."""

    label: str
    unit: str
    base: float | None
    tuned: float | None
    digits: int = 2


def render(summary: EvaluationSummary, *, n_shown: int = 6) -> str:
    """The whole page as HTML, with `n_shown` answers in each section."""
    measured = summary.shown
    asked = [example for example in summary.dataset.examples if example.id in measured.answers.predictions]
    best, worst = ranked(summary, asked, n_shown)
    base_scores = summary.base.scores if summary.base else {}
    tuned_scores = summary.tuned.scores if summary.tuned else {}
    figures = [plots.score_figure(base_scores, tuned_scores), _band_figure(summary, asked)]
    return render_page(
        "evaluation.html",
        more_templates=TEMPLATES,
        title=summary.title,
        when=summary.when,
        summary=summary,
        tiles=_tiles(summary),
        figures=[figure for figure in figures if figure is not None],
        rows=score_rows(summary.base, summary.tuned),
        side_by_side=[_pair(summary, e) for e in evenly(asked, n_shown)],
        best=[_pair(summary, e) for e in best],
        worst=[_pair(summary, e) for e in worst],
        n_questions=len(summary.dataset.examples),
    )


def write_report(summary: EvaluationSummary, path: Path) -> None:
    """Render and save; FileError where the file cannot be written."""
    write_page(render(summary), path)


def score_rows(base: Measured | None, tuned: Measured | None) -> list[ScoreRow]:
    """The figures of both models line by line, for text and HTML alike."""
    names = dict.fromkeys(name for model in (base, tuned) if model for name in model.scores)

    def row(label: str, unit: str, value: Callable[[Measured], float | None], digits: int = 2) -> ScoreRow:
        return ScoreRow(label, unit, value(base) if base else None, value(tuned) if tuned else None, digits)

    def score(name: str) -> Callable[[Measured], float | None]:
        return lambda m: m.scores.get(name)

    rows = [
        *(row(plots.metric_name(name), "%", score(name)) for name in names),
        row("Loss", "nats/token", lambda m: m.loss, 3),
        row("Throughput", "tokens/s", lambda m: m.tokens_per_s, 0),
        row("Throughput", "questions/s", lambda m: m.questions_per_s),
        row("Time", "s", lambda m: m.answers.elapsed_s or None, 1),
        row("Without an answer", "questions", lambda m: m.n_missing or None, 0),
    ]
    return [row for row in rows if row.base is not None or row.tuned is not None]


def ranked(summary: EvaluationSummary, asked: Sequence[Example], n: int) -> tuple[list[Example], list[Example]]:
    """The `n` best and the `n` worst answered of the examples; no example is in both."""
    answers = summary.shown.answers

    def key(example: Example) -> tuple[float, float]:
        return (-_f1(example, answers.predictions), answers.losses.get(example.id, 0.0))

    ordered = sorted(asked, key=key)
    n_best = min(n, (len(ordered) + 1) // 2)
    return ordered[:n_best], ordered[n_best:][-n:][::-1]


def evenly(examples: Sequence[Example], n: int) -> list[Example]:
    """`n` of them, evenly spaced from the first on."""
    if len(examples) <= n:
        return list(examples)
    return [examples[i * len(examples) // n] for i in range(n)]


def _f1(example: Example, predictions: Mapping[str, str]) -> float:
    return f1(predictions[example.id], example.answers, version="1.1" if example.answers else "2.0")


def _band_figure(summary: EvaluationSummary, asked: Sequence[Example]) -> Figure | None:
    """How many questions were answered wholly, partly and not at all: a mean alone hides which of them moved it."""

    def shares(measured: Measured | None) -> list[float | None]:
        predictions = measured.answers.predictions if measured else {}
        scores = [_f1(e, predictions) for e in asked if e.id in predictions]
        if not scores:
            return [None] * len(BANDS)
        counts = (sum(s == 1.0 for s in scores), sum(0.0 < s < 1.0 for s in scores), sum(s == 0.0 for s in scores))
        return [100.0 * count / len(scores) for count in counts]

    if summary.dataset.kind == "classification":  # a label is right or wrong: the bands would repeat the accuracy
        return None
    return bar_figure(
        "bands",
        "Answers by quality",
        list(BANDS),
        [("base", "quiet", shares(summary.base)), ("tuned", "main", shares(summary.tuned))],
        axis_title="Questions (%)",
        high=100.0,
        caption="F1 compares words, so a longer answer that holds the right one is partly right.",
    )


def _tiles(summary: EvaluationSummary) -> list[Tile]:
    base, tuned, measured = summary.base, summary.tuned, summary.shown
    main = {name: s for name, s in measured.scores.items() if not name.startswith(("HasAns", "NoAns"))}
    tiles = score_tiles(base.scores if base and tuned else {}, main)
    if measured.loss is not None:
        note = f"base {base.loss:.2f}" if base and tuned and base.loss is not None else ""
        tiles.append(Tile("Loss", f"{measured.loss:.2f}", "nats/token", note))
    if measured.tokens_per_s is not None:
        tiles.append(
            Tile(
                "Throughput", f"{measured.tokens_per_s:,.0f}", "tokens/s", f"{measured.questions_per_s:.2f} questions/s"
            )
        )
    note = f"{measured.n_missing:,} without an answer" if measured.n_missing else ""
    tiles.append(Tile("Questions", f"{len(summary.dataset.examples):,}", "", note))
    return tiles


def _pair(summary: EvaluationSummary, example: Example) -> AnswerPair:
    base, tuned = (m.answers.predictions.get(example.id) if m else None for m in (summary.base, summary.tuned))
    question = example.fields.get("question") or " ".join(v for k, v in example.fields.items() if k != "context")
    return AnswerPair(question, example.fields.get("context", ""), base, tuned, example.answers)
