"""The official SQuAD scores, to the last digit: v1.1 (Rajpurkar et al. 2016) and v2.0 (Rajpurkar et al. 2018).

The two differ in more than unanswerable questions, and both differences are kept: v1.1 scores a question without a
prediction 0, v2.0 leaves it out of every mean. Either way the result names the questions, because a score over fewer
of them is another score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from fwdllama.errors import DataError
from fwdllama.score import Version, exact_match, f1, percent, squad_version


class ScoresV1(TypedDict):
    """Scores in percent; `missing` are the ids that no prediction was given for, scored 0."""

    exact_match: float
    f1: float
    total: int
    missing: tuple[str, ...]


class ScoresV2(TypedDict):
    """Scores in percent, of all questions, of those with an answer (HasAns) and of those without (NoAns).

    `best_*` are there only where probabilities of "no answer" were given; `missing` are the ids that were left out.
    """

    exact: float
    f1: float
    total: int
    HasAns_exact: NotRequired[float]
    HasAns_f1: NotRequired[float]
    HasAns_total: NotRequired[int]
    NoAns_exact: NotRequired[float]
    NoAns_f1: NotRequired[float]
    NoAns_total: NotRequired[int]
    best_exact: NotRequired[float]
    best_exact_thresh: NotRequired[float]
    best_f1: NotRequired[float]
    best_f1_thresh: NotRequired[float]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """What scoring needs of a question: its id and every accepted answer; none where it cannot be answered."""

    id: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class _Scored:
    """Scores of one question in 0..1, and whether it has an answer."""

    exact: float
    f1: float
    has_answer: bool


def read_questions(dataset_json: Mapping[str, Any]) -> list[Question]:
    """The questions of a parsed SQuAD file, in its order.

    Raises:
        DataError: the file has another shape, no questions, or the same id twice.
    """
    try:
        questions = [
            Question(str(qa["id"]), tuple(str(answer["text"]) for answer in qa["answers"]))
            for article in dataset_json["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"The data set is not SQuAD JSON ({error}): data[].paragraphs[].qas[] with id and answers[].text is needed."
        ) from error
    if not questions:
        raise DataError("The data set holds no question, so there is nothing to score.")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(
                f"The data set has two questions with the id {question.id!r}; ids must be unique to be scored."
            )
        seen.add(question.id)
    return questions


def evaluate_v1(dataset_json: Mapping[str, Any], predictions: Mapping[str, str]) -> ScoresV1:
    """Exact match and F1 as evaluate-v1.1 prints them.

    Raises:
        DataError: the data set is not SQuAD v1.1, or a prediction is not text.
    """
    return score_v1(read_questions(dataset_json), predictions)


def score_v1(questions: Sequence[Question], predictions: Mapping[str, str]) -> ScoresV1:
    """The same for questions that were read already."""
    unanswerable = next((q.id for q in questions if not q.answers), None)
    if unanswerable is not None:
        raise DataError(
            f"The question {unanswerable!r} has no accepted answer, so the data set is SQuAD v2.0; score it as that."
        )
    scored = _score(questions, predictions, "1.1")
    zero = _Scored(0.0, 0.0, True)
    every = [scored.get(q.id, zero) for q in questions]
    return {
        "exact_match": percent(s.exact for s in every),
        "f1": percent(s.f1 for s in every),
        "total": len(every),
        "missing": _missing(questions, scored),
    }


def evaluate_v2(
    dataset_json: Mapping[str, Any],
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> ScoresV2:
    """Exact match and F1 as evaluate-v2.0 prints them.

    `na_probs` are the system's probabilities that a question has no answer: above `threshold` its prediction counts
    as none. With them come the best scores that any one threshold would give, and that threshold.

    Raises:
        DataError: the data set is not SQuAD, no question has a prediction, or a predicted one has no probability.
    """
    return score_v2(read_questions(dataset_json), predictions, na_probs, threshold)


def score_v2(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    na_probs: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> ScoresV2:
    """The same for questions that were read already."""
    scored = _score(questions, predictions, "2.0")
    if not scored:
        raise DataError(
            f"None of the {len(questions)} questions has a prediction; predictions are a JSON object of id to answer."
        )
    lacking = next((id_ for id_ in scored if na_probs is not None and id_ not in na_probs), None)
    if lacking is not None:
        raise DataError(f"The question {lacking!r} has a prediction but no no-answer probability; give one for each.")
    if na_probs is None:
        judged = list(scored.values())
    else:
        judged = [_declined(s) if na_probs[id_] > threshold else s for id_, s in scored.items()]
    result: ScoresV2 = {
        "exact": percent(s.exact for s in judged),
        "f1": percent(s.f1 for s in judged),
        "total": len(judged),
        "missing": _missing(questions, scored),
    }
    if has := [s for s in judged if s.has_answer]:
        result |= {
            "HasAns_exact": percent(s.exact for s in has),
            "HasAns_f1": percent(s.f1 for s in has),
            "HasAns_total": len(has),
        }
    if none := [s for s in judged if not s.has_answer]:
        result |= {
            "NoAns_exact": percent(s.exact for s in none),
            "NoAns_f1": percent(s.f1 for s in none),
            "NoAns_total": len(none),
        }
    if na_probs is not None:
        n_unanswerable = sum(not s.has_answer for s in scored.values())
        exact_gains = [(na_probs[id_], _gain(s, s.exact, predictions[id_])) for id_, s in scored.items()]
        f1_gains = [(na_probs[id_], _gain(s, s.f1, predictions[id_])) for id_, s in scored.items()]
        order = {id_: place for place, id_ in enumerate(na_probs)}
        ranks = [order[id_] for id_ in scored]
        result["best_exact"], result["best_exact_thresh"] = _best(exact_gains, ranks, n_unanswerable)
        result["best_f1"], result["best_f1_thresh"] = _best(f1_gains, ranks, n_unanswerable)
    return result


def score_questions(questions: Sequence[Question], predictions: Mapping[str, str]) -> ScoresV1 | ScoresV2:
    """By the rule of v2.0 if any question has no answer, otherwise by that of v1.1."""
    if squad_version(q.answers for q in questions) == "2.0":
        return score_v2(questions, predictions)
    return score_v1(questions, predictions)


def _score(questions: Sequence[Question], predictions: Mapping[str, str], version: Version) -> dict[str, _Scored]:
    """Scores of the questions that have a prediction, in the order of the questions."""
    return {
        q.id: _Scored(
            exact_match(predictions[q.id], q.answers, version=version),
            f1(predictions[q.id], q.answers, version=version),
            bool(q.answers),
        )
        for q in questions
        if q.id in predictions
    }


def _missing(questions: Sequence[Question], scored: Mapping[str, _Scored]) -> tuple[str, ...]:
    return tuple(q.id for q in questions if q.id not in scored)


def _declined(scored: _Scored) -> _Scored:
    """The score once "no answer" replaces the prediction."""
    right = float(not scored.has_answer)
    return _Scored(right, right, scored.has_answer)


def _gain(scored: _Scored, score: float, prediction: str) -> float:
    """What letting this prediction stand adds to a total in which every question was declined."""
    if scored.has_answer:
        return score
    return -1.0 if prediction else 0.0


def _best(gains: Sequence[tuple[float, float]], ranks: Sequence[int], n_unanswerable: int) -> tuple[float, float]:
    """Best score in percent over all thresholds, and the lowest threshold that reaches it.

    `gains` are (probability of no answer, gain) of the predicted questions. Predictions are let stand from the least
    doubtful on; equal probabilities in the order of the probabilities' file (`ranks`), as the official script sorts
    them.
    """
    total = best = float(n_unanswerable)
    threshold = 0.0
    for (probability, gain), _ in sorted(zip(gains, ranks, strict=True), key=lambda item: (item[0][0], item[1])):
        total += gain
        if total > best:
            best, threshold = total, probability
    return 100.0 * best / len(gains), threshold
