"""Questions made up of random words, in SQuAD's format: as many, and as long, as a test needs."""

from __future__ import annotations

import random
from typing import Any


def squad(n_paragraphs: int, *, n_words: int = 8, n_questions: int = 3, seed: int = 1) -> dict[str, Any]:
    """Paragraphs of `n_words`, each with `n_questions` for its first words, one a question."""
    rng = random.Random(seed)

    def words(n: int) -> list[str]:
        return ["".join(rng.choices("abcdefgh", k=3)) for _ in range(n)]

    paragraphs = []
    for p in range(n_paragraphs):
        context = words(n_words)
        qas = [
            {"id": f"{p}-{q}", "question": " ".join(words(2)), "answers": [{"text": context[q], "answer_start": 4 * q}]}
            for q in range(n_questions)
        ]
        paragraphs.append({"context": " ".join(context), "qas": qas})
    return {"version": "1.1", "data": [{"title": "made", "paragraphs": paragraphs}]}
