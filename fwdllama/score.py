"""Scores of one answer and their means: SQuAD's exact match and F1, and accuracy.

Pure functions, shared by the training objectives and the evaluator, that agree with the official evaluation of SQuAD
v1.1 and v2.0 (Rajpurkar et al. 2016, 2018) to the last bit. The two differ only where normalisation leaves nothing of
an answer, hence the `version` argument: for v1.1 such an answer shares no word with anything, for v2.0 it means "no
answer".
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

Version = Literal["1.1", "2.0"]

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)  # ASCII only: SQuAD keeps typographic dashes and quotes


def normalise(text: str) -> str:
    """The form in which SQuAD compares answers: lower case, no ASCII punctuation, no articles, single spaces.

    Punctuation goes before articles, so "a-b" becomes "ab" and keeps its a.

    >>> normalise("The  Panthers' (1995) season, a-b")
    'panthers 1995 season ab'
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str], *, version: Version = "1.1") -> float:
    """1.0 if the normalised prediction equals any normalised reference, else 0.0.

    `answers` is empty where the question has no answer (SQuAD v2.0); then only an empty prediction is right.

    >>> exact_match("the Denver Broncos.", ["Denver Broncos", "Broncos"])
    1.0
    >>> exact_match("Denver", ())
    0.0
    """
    predicted = normalise(prediction)
    return float(any(normalise(answer) == predicted for answer in _references(answers, version)))


def f1(prediction: str, answers: Sequence[str], *, version: Version = "1.1") -> float:
    """Harmonic mean of word precision and recall against the reference that it fits best, in 0..1.

    Where a reference is empty (a v2.0 question without an answer) the score is 1.0 for an empty prediction, else 0.0.

    >>> f1("the Carolina Panthers team", ["Denver Broncos", "Carolina Panthers"])
    0.8
    >>> f1("", ())
    1.0
    """
    predicted = normalise(prediction).split()
    return max(_word_f1(predicted, answer) for answer in _references(answers, version))


def squad_version(references: Iterable[Sequence[str]]) -> Version:
    """Which rule a set of questions is scored by: v2.0's if any of them has no answer.

    >>> squad_version([("Denver",), ()])
    '2.0'
    """
    return "1.1" if all(references) else "2.0"


def percent(scores: Iterable[float]) -> float:
    """Mean of scores in 0..1, times 100, with the rounding of the official scripts.

    They add in the order of the questions, then compute 100 * total / count. The loop stands instead of `sum`, which
    compensates rounding errors from Python 3.12 on and would change the last digit.

    Raises:
        ValueError: there are no scores.

    >>> percent([1.0, 0.0, 0.5, 0.0])
    37.5
    """
    total, count = 0.0, 0
    for score in scores:
        total += score
        count += 1
    if count == 0:
        raise ValueError("the mean of no scores is undefined")
    return 100.0 * total / count


def accuracy(predictions: Sequence[str], labels: Sequence[str]) -> float:
    """Share, in 0..1, of predictions that are exactly their label.

    Raises:
        ValueError: the two differ in length, or are empty.

    >>> accuracy(["World", "Sports"], ["World", "Business"])
    0.5
    """
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions cannot be compared with {len(labels)} labels")
    if not labels:
        raise ValueError("the accuracy of no predictions is undefined")
    return sum(predicted == label for predicted, label in zip(predictions, labels, strict=True)) / len(labels)


def _references(answers: Sequence[str], version: Version) -> Sequence[str]:
    """The references that count: v2.0 leaves out those that normalise to nothing, unless nothing else is left."""
    if version == "2.0":
        answers = [answer for answer in answers if normalise(answer)]
    return answers or ("",)


def _word_f1(predicted: list[str], answer: str) -> float:
    """F1 of two bags of words; every operation is in the order of the official scripts, which fixes the last bit."""
    reference = normalise(answer).split()
    if not predicted or not reference:
        return float(not answer.strip() and not predicted)  # v1.1: a reference of articles only matches nothing
    shared = sum((Counter(predicted) & Counter(reference)).values())
    if shared == 0:
        return 0.0
    precision = shared / len(predicted)
    recall = shared / len(reference)
    return (2 * precision * recall) / (precision + recall)
