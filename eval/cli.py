"""`fwdllama eval` scores a model with and without an adapter; `fwdllama score` scores answers that exist already.

stdout carries the result, as a table or as one JSON object; progress and warnings go to stderr. Everything that can
be checked without the model (data, adapter file, output paths) is checked before the model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwdllama.errors import ResourceError, UsageError
from fwdllama.types import Dataset

from .answer import Answerer, EngineSettings, Measured, OpenAnswerer, TemplateName, measure, open_model

if TYPE_CHECKING:
    from fwdllama.report import AdapterFacts
    from gguf_tools.adapter import Adapter

TEMPLATE_KEY = "fwdllama.template"  # an adapter's file may name the template that it was trained with


class KindOption(StrEnum):
    """Kinds of data."""

    auto = "auto"
    squad = "squad"
    pairs = "pairs"
    classification = "classification"


class TemplateOption(StrEnum):
    """Ways to put a question."""

    seed = "seed"
    chat = "chat"


class ScopeOption(StrEnum):
    """Where the adapter is on."""

    answer = "answer"
    all = "all"


class VersionOption(StrEnum):
    """SQuAD's rules."""

    auto = "auto"
    v1 = "1.1"
    v2 = "2.0"


def register(app: typer.Typer, *, open_answerer: OpenAnswerer = open_model) -> None:
    """Add the commands `eval` and `score` to an application; `open_answerer` is what opens a model."""

    @app.command("eval")
    def evaluate(
        model: Annotated[
            Path, typer.Option(help="Base model: a name such as smollm2-135m, or the path of a GGUF file.")
        ],
        data: Annotated[
            Path,
            typer.Option(
                help="Questions: SQuAD JSON, JSONL of prompts and answers, or CSV with labels; plain or gzip."
            ),
        ],
        adapter: Annotated[
            Path | None, typer.Option(help="Adapter to score against the base model, a GGUF file.")
        ] = None,
        kind: Annotated[
            KindOption, typer.Option(help="Kind of data; auto tells it from the content.")
        ] = KindOption.auto,
        limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first N questions of the file.")] = None,
        template: Annotated[
            TemplateOption | None,
            typer.Option(help="How questions are put; default: as the adapter was trained, else seed."),
        ] = None,
        scope: Annotated[
            ScopeOption | None,
            typer.Option(help="Where the adapter is on, against what its file says; for experiments only."),
        ] = None,
        batch: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 8,
        ctx: Annotated[
            int, typer.Option(min=32, help="Longest question with its context and answer, in tokens.")
        ] = 1024,
        threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: one a physical core.")] = None,
        kv_type: Annotated[
            str, typer.Option(help="Type of the KV cache: f16, f32, q8_0, ..., q4_0.", metavar="TYPE")
        ] = "f16",
        mmap: Annotated[bool, typer.Option(help="Map the model's file instead of reading it.")] = False,
        repack: Annotated[bool, typer.Option(help="Rearrange the weights for this CPU; fastest.")] = True,
        max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 32,
        compare: Annotated[bool, typer.Option(help="With an adapter, answer with the base model too.")] = True,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
        html: Annotated[Path | None, typer.Option(help="Write a report with plots and answers to this file.")] = None,
        predictions: Annotated[
            Path | None, typer.Option(help="Write the answers to this file, as JSON of question id to answer.")
        ] = None,
    ) -> None:
        """Score a model's answers, with an adapter and without it."""
        from rich.console import Console

        from fwdllama.tasks.load import load_dataset
        from gguf_tools.adapter import read_adapter
        from gguf_tools.output import replacing

        from .report import write_report
        from .results import Results, summary, table

        if scope is not None and adapter is None:
            raise UsageError(f"--scope {scope.value} says where an adapter is on, but no --adapter was given.")
        for path in (html, predictions):
            check_writable(path)
        dataset = load_dataset(data, kind=kind.value, limit=limit)
        loaded = read_adapter(adapter) if adapter is not None else None
        settings = EngineSettings(
            model,
            template=_template(template, loaded),
            scope=scope.value if scope is not None else None if loaded is None else loaded.scope,
            batch=batch,
            n_ctx=ctx,
            n_threads=threads,
            kv_type=kv_type,
            mmap=mmap,
            repack=repack,
        )
        facts = _facts(adapter, loaded) if adapter is not None and loaded is not None else None
        if facts is not None and settings.scope != facts.scope:
            _warn(
                f"the adapter was trained with scope {facts.scope}, but is scored with scope {settings.scope} as asked."
            )

        def run(label: str, path: Path | None) -> Measured:
            with open_answerer(settings, path) as answerer:
                return _measured(answerer, dataset, label, max_new_tokens)

        tuned = run("tuned", adapter) if adapter is not None else None
        base = run("base", None) if adapter is None or compare else None
        results = Results(settings, dataset, base, tuned, facts)
        shown = tuned or base
        assert shown is not None  # without an adapter the base is always asked
        if shown.n_missing:
            asked = f"{shown.n_missing} of {len(dataset.examples)} questions"
            _warn(f"{asked} got no answer{_reasons(shown.answers.skipped)}.")
        if predictions is not None:
            with replacing(predictions) as temporary:
                temporary.write_text(
                    json.dumps(dict(shown.answers.predictions), ensure_ascii=False, indent=0) + "\n", encoding="utf-8"
                )
        if html is not None:
            write_report(summary(results), html)
        if as_json:
            typer.echo(json.dumps(results.as_json(), indent=2))
        else:
            Console().print(table(results))

    @app.command("score")
    def score(
        predictions: Annotated[Path, typer.Argument(help="JSON of question id to answer, plain or gzip.")],
        data: Annotated[Path, typer.Option(help="The SQuAD file that was answered, plain or gzip.")],
        version: Annotated[
            VersionOption, typer.Option(help="Whose rules; auto is 2.0 if a question has no answer.")
        ] = VersionOption.auto,
        na_probs: Annotated[
            Path | None, typer.Option(help="JSON of question id to the probability of no answer (2.0).")
        ] = None,
        threshold: Annotated[float, typer.Option(help="Probability above which an answer counts as none (2.0).")] = 1.0,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    ) -> None:
        """Score answers that exist already by the official rules of SQuAD; no model is needed."""
        from rich.console import Console

        from fwdllama.score import squad_version

        from .files import read_json, read_na_probs, read_predictions
        from .results import score_table
        from .squad import read_questions, score_v1, score_v2

        questions = read_questions(read_json(data))
        answers = read_predictions(predictions)
        rules = version.value if version is not VersionOption.auto else squad_version(q.answers for q in questions)
        if rules == "1.1" and na_probs is not None:
            raise UsageError(
                "--na-probs is for SQuAD 2.0, but these questions are scored by 1.1; add --version 2.0 to override."
            )
        if rules == "1.1":
            scores: Mapping[str, Any] = score_v1(questions, answers)
            consequence = "scored 0"
        else:
            scores = score_v2(questions, answers, read_na_probs(na_probs) if na_probs is not None else None, threshold)
            consequence = "left out"
        if scores["missing"]:
            without = f"{len(scores['missing'])} of {len(questions)} questions have no prediction"
            _warn(f"{without} and are {consequence}, such as {scores['missing'][0]!r}.")
        if as_json:
            typer.echo(json.dumps({"version": rules, **scores}, indent=2))
        else:
            Console().print(score_table(rules, scores))


def check_writable(path: Path | None) -> None:
    """Find out before the work that its result could not be saved.

    Raises:
        ResourceError: the path is a folder, or its folder is missing or cannot be written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise ResourceError(f"{path}: is a folder, but a file to write was expected.")
    if not path.parent.is_dir():
        raise ResourceError(f"{path}: the folder {path.parent} does not exist; make it first.")
    if not os.access(path.parent, os.W_OK):
        raise ResourceError(f"{path}: the folder {path.parent} cannot be written to.")


def _measured(answerer: Answerer, dataset: Dataset, label: str, max_new_tokens: int) -> Measured:
    with _progress(label, len(dataset.examples)) as report:
        return measure(answerer, dataset, max_new_tokens=max_new_tokens, progress=report)


@contextmanager
def _progress(label: str, total: int) -> Iterator[Any]:
    """A bar on stderr, or one line where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        if not console.is_terminal:
            typer.echo(f"{label}: answering {total} questions", err=True)
        task = bar.add_task(label, total=total)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _template(asked: TemplateOption | None, adapter: Adapter | None) -> TemplateName:
    """What was asked for, else what the adapter was trained with, else the seed template."""
    if asked is not None:
        return asked.value
    return "chat" if adapter is not None and adapter.metadata.get(TEMPLATE_KEY) == "chat" else "seed"


def _facts(path: Path, adapter: Adapter) -> AdapterFacts:
    from fwdllama.report import AdapterFacts

    raw = path.read_bytes()
    return AdapterFacts(str(path), len(raw), f"sha256:{hashlib.sha256(raw).hexdigest()}", adapter.scope)


def _warn(sentence: str) -> None:
    typer.echo(f"warning: {sentence}", err=True)


def _reasons(skipped: Mapping[str, int]) -> str:
    return ": " + ", ".join(f"{count} {reason}" for reason, count in skipped.items()) if skipped else ""
