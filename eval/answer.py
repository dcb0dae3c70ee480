"""Who answers questions, and what that measured.

`Answerer` is the seam: a model behind llama.cpp with or without an adapter (`open_model`), or predictions that were
made before (`RecordedAnswerer`), which is also how everything above the engine is tested. Engine code is imported
when a model is opened, never before: help texts and the scoring of a predictions file need no llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from fwdllama.score import accuracy
from fwdllama.types import Dataset, Scope

from .squad import Question, score_questions

Progress = Callable[[int, int], None]  # (questions done, questions in all)
TemplateName = Literal["seed", "chat"]


class Answers(Protocol):
    """What answering a data set gave.

    Losses may have been computed for all questions, some or none; tokens and seconds are of the whole data set.
    """

    @property
    def predictions(self) -> Mapping[str, str]:
        """The answer by question id."""

    @property
    def losses(self) -> Mapping[str, float]:
        """Nats per token of the accepted answer, by question id."""

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of all prompts."""

    @property
    def n_new_tokens(self) -> int:
        """Tokens that were generated."""

    @property
    def elapsed_s(self) -> float:
        """Seconds of answering, without loading the model."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """Questions that were not asked, by reason."""


class Answerer(Protocol):
    """Whoever answers every question of a data set."""

    def answer(self, dataset: Dataset, *, max_new_tokens: int, progress: Progress) -> Answers:
        """Answers in at most `max_new_tokens` tokens each; `progress` is called as questions are done."""


@dataclass(frozen=True)
class RecordedAnswers:
    """Answers as plain data."""

    predictions: Mapping[str, str]
    losses: Mapping[str, float] = field(default_factory=dict)
    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    elapsed_s: float = 0.0
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedAnswerer:
    """Gives the answers it was made with to the questions that are asked, and none to others."""

    recorded: RecordedAnswers

    def answer(self, dataset: Dataset, *, max_new_tokens: int, progress: Progress) -> Answers:
        """The recorded answers; `max_new_tokens` has no effect on answers that exist already."""
        known = self.recorded.predictions
        asked = [example.id for example in dataset.examples]
        predictions = {id_: known[id_] for id_ in asked if id_ in known}
        progress(len(asked), len(asked))
        n_missing = len(asked) - len(predictions)
        return RecordedAnswers(
            predictions,
            {id_: loss for id_, loss in self.recorded.losses.items() if id_ in predictions},
            self.recorded.n_prompt_tokens,
            self.recorded.n_new_tokens,
            self.recorded.elapsed_s,
            {**self.recorded.skipped, **({"without a recorded answer": n_missing} if n_missing else {})},
        )


@dataclass(frozen=True)
class EngineSettings:
    """How a model is opened for answering.

    `scope` None takes the scope that the adapter's file names; `batch` is questions at a time, `n_ctx` tokens for
    each of them, `n_threads` None the engine's choice.
    """

    model: Path
    template: TemplateName = "seed"
    scope: Scope | None = None
    batch: int = 8
    n_ctx: int = 1024
    n_threads: int | None = None
    kv_type: str = "f16"
    mmap: bool = False
    repack: bool = True


OpenAnswerer = Callable[[EngineSettings, Path | None], AbstractContextManager[Answerer]]


@dataclass(frozen=True)
class EngineAnswerer:
    """A model that is open."""

    engine: Any
    template: TemplateName

    def answer(self, dataset: Dataset, *, max_new_tokens: int, progress: Progress) -> Answers:
        """Greedy answers of the model, and its loss on the accepted ones."""
        from fwdllama import answering

        template = answering.choose_template(self.engine, self.template, dataset.kind)
        answers: Answers = answering.answer_dataset(
            self.engine, dataset, template, max_new_tokens=max_new_tokens, progress=progress
        )
        return answers


@contextmanager
def open_model(settings: EngineSettings, adapter: Path | None) -> Iterator[Answerer]:
    """A model, with an adapter or without, closed when the block ends.

    Raises:
        ModelError: the model cannot be used.
        AdapterError: the adapter was not made for it.
        ResourceError: there is too little memory.
    """
    from fwdllama import answering
    from fwdllama.llama.model import ModelOptions
    from fwdllama.models import resolve

    with answering.open_engine(
        resolve(settings.model),
        adapter_path=adapter,
        scope=settings.scope if adapter is not None else None,
        batch=settings.batch,
        n_ctx=settings.n_ctx,
        n_threads=settings.n_threads,
        kv_type=settings.kv_type,
        model_options=ModelOptions(mmap=settings.mmap, repack=settings.repack),
    ) as engine:
        yield EngineAnswerer(engine, settings.template)


@dataclass(frozen=True)
class Measured:
    """One model on one data set: `scores` in percent under the official names, and the answers they came from."""

    scores: Mapping[str, float]
    answers: Answers
    n_missing: int = 0

    @property
    def loss(self) -> float | None:
        """Mean over questions of the loss in nats per answer token, or None where no loss was computed."""
        losses = [loss for loss in self.answers.losses.values() if math.isfinite(loss)]
        return math.fsum(losses) / len(losses) if losses else None

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt and generated tokens a second."""
        n_tokens = self.answers.n_prompt_tokens + self.answers.n_new_tokens
        return n_tokens / self.answers.elapsed_s if self.answers.elapsed_s > 0 else None

    @property
    def questions_per_s(self) -> float | None:
        """Questions answered a second."""
        return len(self.answers.predictions) / self.answers.elapsed_s if self.answers.elapsed_s > 0 else None

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the answers themselves."""
        return {
            **self.scores,
            "loss_nats_per_token": self.loss,
            "tokens_per_s": self.tokens_per_s,
            "questions_per_s": self.questions_per_s,
            "n_prompt_tokens": self.answers.n_prompt_tokens,
            "n_new_tokens": self.answers.n_new_tokens,
            "elapsed_s": self.answers.elapsed_s,
            "skipped": dict(self.answers.skipped),
            "n_missing": self.n_missing,
        }


def measure(answerer: Answerer, dataset: Dataset, *, max_new_tokens: int, progress: Progress) -> Measured:
    """Ask everything, and score what was answered.

    Raises:
        DataError: nothing could be scored.
    """
    answers = answerer.answer(dataset, max_new_tokens=max_new_tokens, progress=progress)
    n_missing = sum(example.id not in answers.predictions for example in dataset.examples)
    return Measured(score_dataset(dataset, answers.predictions), answers, n_missing)


def score_dataset(dataset: Dataset, predictions: Mapping[str, str]) -> dict[str, float]:
    """Scores in percent: accuracy of label words, or exact match and F1 by the rules of SQuAD v1.1 or v2.0.

    A question without a prediction counts as the official scripts count it; with label words it is wrong.
    """
    if dataset.kind == "classification":
        given = [predictions.get(example.id, "") for example in dataset.examples]
        return {"accuracy": 100.0 * accuracy(given, [example.answers[0] for example in dataset.examples])}
    scores = score_questions([Question(example.id, example.answers) for example in dataset.examples], predictions)
    return {name: float(value) for name, value in scores.items() if isinstance(value, float)}
