"""How good the base and the tuned model are on questions that neither was trained on.

Both are asked after training, by one loaded model with the adapter off and on: the base is frozen, so its answers are
those that it had before. Nothing that is found here chooses anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fwdllama.formats import change, number
from fwdllama.score import f1
from fwdllama.types import Dataset, Example

if TYPE_CHECKING:
    from fwdllama.config import TrainConfig
    from fwdllama.report import AnswerPair

MAX_NEW_TOKENS = 32  # of an answer; as `fwdllama eval`


@dataclass(frozen=True)
class Scores:
    """Scores in percent by name, and both answers to every question by its id; `skipped` counts what was not asked."""

    dataset: Dataset
    before: Mapping[str, float]
    after: Mapping[str, float]
    base: Mapping[str, str]
    tuned: Mapping[str, str]
    skipped: Mapping[str, int]


def score(model: Path, adapter: Path, dataset: Dataset, config: TrainConfig) -> Scores:
    """Ask every question twice, with the adapter off and on.

    Raises:
        DataError: no question fits the model's context.
        ResourceError: there is too little memory.
    """
    from fwdllama.answering import answer_dataset, choose_template, open_engine
    from fwdllama.llama.model import ModelOptions

    options = ModelOptions(config.engine.mmap, config.engine.repack, config.engine.n_gpu_layers)
    with open_engine(
        model,
        adapter_path=adapter,
        n_threads=config.engine.n_threads,
        model_options=options,
        kv_type=config.engine.kv_type,
    ) as engine:
        template = choose_template(engine, config.template, dataset.kind)
        found = []
        for label, on in (("base", False), ("tuned", True)):
            engine.set_adapter(on)
            with answering(label, len(dataset.examples)) as report:
                found.append(
                    answer_dataset(
                        engine,
                        dataset,
                        template,
                        max_new_tokens=MAX_NEW_TOKENS,
                        with_losses=False,
                        progress=report,
                    )
                )
    base, tuned = found
    return Scores(dataset, base.score, tuned.score, base.predictions, tuned.predictions, tuned.skipped)


@contextmanager
def answering(label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, or one line where stderr is no terminal."""
    console = Console(stderr=True)
    text, left = TextColumn("{task.description}"), TextColumn("left")
    columns = (text, BarColumn(), MofNCompleteColumn(), left, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        if not console.is_terminal:
            console.print(f"asking the {label} model {total} questions", soft_wrap=True)
        task = bar.add_task(f"asking the {label} model", total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def table(scores: Scores) -> Table:
    """Before and after line by line."""
    from fwdllama.plots import metric_name

    title = f"{len(scores.dataset.examples):,} questions of {Path(scores.dataset.source).name}"
    lines = Table(title=title, title_justify="left")
    lines.add_column("")
    for heading in ("before", "after", "change"):
        lines.add_column(heading, justify="right")
    for name, before in scores.before.items():
        after = scores.after[name]
        lines.add_row(f"{metric_name(name)} (%)", number(before, 1), number(after, 1), change(before, after, 1))
    return lines


def chosen(scores: Scores, n: int = 5) -> list[AnswerPair]:
    """`n` answers worth reading, by rule: the improved ones first, of different paragraphs; last one still wrong."""
    from fwdllama.report import AnswerPair

    def gain(example: Example) -> float:
        return _f1(example, scores.tuned) - _f1(example, scores.base)

    ranked = sorted(scores.dataset.examples, key=lambda example: -gain(example))
    wrong = [example for example in ranked if _f1(example, scores.tuned) == 0.0]  # first those that were wrong before
    last = wrong[:1] if n > 1 else []
    rest = [example for example in ranked if example not in last]
    seen: set[str] = set()
    order = {}
    for place, example in enumerate(rest):
        again = _text(example) in seen
        seen.add(_text(example))
        better = gain(example) > 0
        order[example.id] = (not better, again and better, -_f1(example, scores.tuned), place)
    shown = [*sorted(rest, key=lambda example: order[example.id])[: n - len(last)], *last]
    said = [(scores.base.get(example.id), scores.tuned.get(example.id)) for example in shown]
    return [
        AnswerPair(question(example), example.fields.get("context", ""), base, tuned, example.answers)
        for example, (base, tuned) in zip(shown, said, strict=True)
    ]


def _f1(example: Example, predictions: Mapping[str, str]) -> float:
    return f1(predictions.get(example.id, ""), example.answers, version="1.1" if example.answers else "2.0")


def _text(example: Example) -> str:
    """What several questions may be about."""
    return example.fields.get("context", "") or example.id


def question(example: Example) -> str:
    """What was asked, of whatever kind of data."""
    return example.fields.get("question") or " ".join(v for k, v in example.fields.items() if k != "context")


def side_by_side(pairs: Sequence[AnswerPair]) -> Table:
    """Question, both answers and the truth."""
    lines = Table(title="Answers side by side", title_justify="left", show_lines=True)
    for heading in ("question", "base", "tuned", "truth"):
        lines.add_column(heading, ratio=2 if heading in ("question", "base") else 1, overflow="fold")
    for pair in pairs:
        cells = (pair.question, pair.base or "", pair.tuned or "", pair.truths[0] if pair.truths else "(no answer)")
        lines.add_row(*map(Text, cells))  # Text: brackets in an answer are not markup
    return lines
