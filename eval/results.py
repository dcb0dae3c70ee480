"""What an evaluation found, as a table, as JSON and as the input of its HTML report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from fwdllama.formats import change, number
from fwdllama.plots import metric_name
from fwdllama.report import AdapterFacts
from fwdllama.types import Dataset

from .answer import EngineSettings, Measured
from .report import EvaluationSummary, score_rows


@dataclass(frozen=True)
class Results:
    """What an evaluation found, ready to be shown in any form."""

    settings: EngineSettings
    dataset: Dataset
    base: Measured | None
    tuned: Measured | None
    adapter: AdapterFacts | None

    def as_json(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "model": str(self.settings.model),
            "adapter": None
            if self.adapter is None
            else {"path": self.adapter.path, "sha256": self.adapter.digest.removeprefix("sha256:")},
            "scope": self.settings.scope,
            "template": self.settings.template,
            "data": self.dataset.source,
            "kind": self.dataset.kind,
            "n_questions": len(self.dataset.examples),
            "left_out": dict(self.dataset.skipped),
            "base": self.base.as_json() if self.base else None,
            "tuned": self.tuned.as_json() if self.tuned else None,
        }


def summary(results: Results) -> EvaluationSummary:
    """What the HTML report is made of, dated now."""
    name = results.settings.model.stem
    return EvaluationSummary(
        title=f"{name} with {Path(results.adapter.path).name}" if results.adapter else name,
        when=datetime.now().strftime("%d %B %Y, %H:%M").lstrip("0"),
        dataset=results.dataset,
        base=results.base,
        tuned=results.tuned,
        adapter=results.adapter,
        settings={**vars(results.settings), "data": results.dataset.source},
    )


def table(results: Results) -> Table:
    """Base and tuned side by side, with the change where there are both."""
    both = results.base is not None and results.tuned is not None
    lines = Table(
        title=f"{len(results.dataset.examples):,} questions of {results.dataset.source}", title_justify="left"
    )
    lines.add_column("")
    for label, there in (("base", results.base), ("tuned", results.tuned), ("change", both or None)):
        if there is not None:
            lines.add_column(label, justify="right")
    for row in score_rows(results.base, results.tuned):
        cells = [
            number(value, row.digits)
            for value, there in ((row.base, results.base), (row.tuned, results.tuned))
            if there
        ]
        lines.add_row(f"{row.label} ({row.unit})", *cells, *([change(row.base, row.tuned, row.digits)] if both else []))
    return lines


def score_table(rules: str, scores: Mapping[str, Any]) -> Table:
    """Official scores line by line, with four decimals as papers compare them."""
    lines = Table(title=f"SQuAD {rules}", title_justify="left")
    lines.add_column("")
    lines.add_column("score", justify="right")
    for name, value in scores.items():
        if name != "missing":
            lines.add_row(metric_name(name), f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    return lines
