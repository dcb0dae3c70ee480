"""Answering a data set: every question asked, scored, and the loss on the known answers, from one loaded model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fwdllama.encode import Encoder, encode_dataset, longest, model_template
from fwdllama.engine import Engine, open_engine
from fwdllama.llama.generate import Answered, answers
from fwdllama.llama.model import Model
from fwdllama.score import accuracy, exact_match, f1, percent, squad_version
from fwdllama.tasks import Kind
from fwdllama.tasks.template import Template
from fwdllama.types import Dataset, Encoded, Example

__all__ = ["Answers", "Engine", "answer_dataset", "ask", "choose_template", "open_engine"]

log = logging.getLogger("fwdllama.answering")


@dataclass(frozen=True)
class Answers:
    """What answering a data set gave.

    `predictions` has every question, '' where one was skipped (`skipped` counts the reasons); `losses`, in nats per
    target token, has those that were asked. `score` is in percent: `exact_match` and `f1`, or `accuracy`.
    """

    predictions: Mapping[str, str]
    losses: Mapping[str, float]
    n_prompt_tokens: int
    n_new_tokens: int
    elapsed_s: float
    skipped: Mapping[str, int]
    score: Mapping[str, float]


def choose_template(engine: Engine, name: Literal["seed", "chat"], kind: Kind) -> Template:
    """The seed template, or the chat template of the engine's model.

    Raises:
        DataError: the model has no chat template, or one that cannot be used.
    """
    return model_template(engine.model, name, kind)


def answer_dataset(
    engine: Engine,
    dataset: Dataset,
    template: Template,
    *,
    max_new_tokens: int = 24,
    with_losses: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """Greedy answers to every question, scored; `progress` is called with (questions done, questions in all).

    Raises:
        DataError: no question fits the context, or two label words cannot be told apart.
        ResourceError: there is too little memory for the context that the data needs.
    """
    begun = time.perf_counter()
    encoded = encode_dataset(engine.model, dataset, template, n_ctx_seq=None)
    n_new = 1 if dataset.kind == "classification" else max_new_tokens
    context = engine.context_for(longest(encoded.examples, n_new))
    encoded = encoded.within(context.options.n_ctx_seq)
    examples = _invoked(engine, encoded.examples)
    predictions = {example.id: "" for example in dataset.examples}
    losses: dict[str, float] = {}
    n_done = n_all = len(dataset.examples)
    n_done -= len(encoded.examples)
    n_new_tokens = 0
    several_lines = any("\n" in answer.strip() for source in encoded.sources for answer in source.answers)
    for i, answered in answers(
        context,
        engine.adapter,
        engine.scope,
        examples,
        max_new_tokens=n_new,
        stop_at_newline=not several_lines,
        with_losses=with_losses,
    ):
        source = encoded.sources[i]
        predictions[source.id] = _text(engine.model, template, source, encoded.examples[i], answered)
        if answered.loss is not None:
            losses[source.id] = answered.loss
        n_new_tokens += len(answered.tokens)
        n_done += 1
        if progress is not None:
            progress(n_done, n_all)
    return Answers(
        predictions,
        losses,
        sum(len(example.prompt) + len(example.invocation) for example in encoded.examples),
        n_new_tokens,
        time.perf_counter() - begun,
        encoded.skipped,
        _score(dataset, predictions),
    )


def ask(engine: Engine, template: Template, example: Example, *, max_new_tokens: int = 24) -> str:
    """The greedy answer to one question, whose own `answers` may be empty.

    Raises:
        DataError: the question does not fit the context.
    """
    [encoded] = _invoked(engine, [Encoder(engine.model, template).question(example)])
    context = engine.context_for(longest([encoded], max_new_tokens))
    several_lines = any("\n" in answer.strip() for answer in example.answers)
    [(_, answered)] = answers(
        context,
        engine.adapter,
        engine.scope,
        [encoded],
        max_new_tokens=max_new_tokens,
        stop_at_newline=not several_lines,
    )
    return _text(engine.model, template, example, encoded, answered)


def _text(model: Model, template: Template, source: Example, encoded: Encoded, answered: Answered) -> str:
    """The answer that the tokens spell, or the label word that they begin."""
    if encoded.choices:
        return source.choices[encoded.choices.index(answered.tokens[0])]
    raw = b"".join(model.piece(token) for token in answered.tokens)
    return template.parse(raw.decode(errors="ignore"), source)  # the limit may have cut a character in two


def _score(dataset: Dataset, predictions: Mapping[str, str]) -> dict[str, float]:
    pairs = [(predictions[example.id], example.answers) for example in dataset.examples]
    if dataset.kind == "classification":
        return {"accuracy": 100.0 * accuracy([given for given, _ in pairs], [answers[0] for _, answers in pairs])}
    version = squad_version(answers for _, answers in pairs)
    return {
        "exact_match": percent(exact_match(given, answers, version=version) for given, answers in pairs),
        "f1": percent(f1(given, answers, version=version) for given, answers in pairs),
    }


def _invoked(engine: Engine, examples: Sequence[Encoded]) -> list[Encoded]:
    """The examples with the adapter on from its own invocation, where that ends their prompts, be it shorter than the template's or longer.

    An adapter answers badly behind another template than its own, but that may be what a user wants to see.
    """
    known = engine.invocation if engine.adapter is not None and engine.scope == "answer" else ()
    if not known or all(example.invocation == known for example in examples):
        return list(examples)
    made = []
    for example in examples:
        asked = example.prompt + example.invocation
        if asked[-len(known) :] == known:
            made.append(replace(example, prompt=asked[: -len(known)], invocation=known))
        else:
            made.append(example)
    if any(example.invocation != known for example in made):
        log.warning("the adapter was trained with another template or kind of data than it is used with now")
    return made
