"""The tokens whose logits a run computes, where it does not compute those of the whole vocabulary.

An output matrix has a row for every token: a fifth of SmolLM2-135M, and nearly half of what a probe computes in its upper third. A data set's
texts are made of some of them, a third for 4,000 questions, and what a model answers is hardly ever another, so the rest adds little to what an
answer is weighed against. Vocabulary selection of this kind is known from translation (Jean et al. 2015, L'Hostis et al. 2016).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fwdllama.encode import Encoder
from fwdllama.types import Example

Shortlist = NDArray[np.int32]  # token ids, ascending

FEWEST = 8192  # with those first in the vocabulary, which are its most frequent: merges are learned in that order
BLOCK = 64  # kernels take rows by blocks
USUAL = 18432  # of 4,000 questions
TEXTS = 4096  # examples whose prompts are looked into; answers are, of all


def shortlisted(encoder: Encoder, examples: Iterable[Example], n_vocab: int) -> Shortlist | None:
    """Every token of the examples' answers, of the prompts of the first TEXTS, and the vocabulary's first; None where that is nearly all.

    Of a classification task, whose losses compare label words alone, the label words.
    """
    found: set[int] = set(encoder.invocation)
    texts: set[str] = set()
    labels = True
    for index, example in enumerate(examples):
        found.update(encoder.targets(example))
        labels = labels and bool(example.choices)
        if index < TEXTS:
            texts.update(example.fields.values())
    if not labels:
        for text in texts:
            found.update(encoder.model.tokenize(text))
    n = whole_blocks(len(found) if labels else max(len(found), FEWEST))
    if n >= n_vocab:
        return None
    fill = (token for token in range(n_vocab) if token not in found)
    while len(found) < n:
        found.add(next(fill))
    return np.array(sorted(found), np.int32)


def expected_size(n_vocab: int) -> int | None:
    """How many tokens a data set like SQuAD's makes of a vocabulary; None where that is nearly all.

    >>> expected_size(49152), expected_size(512)
    (18432, None)
    """
    return USUAL if n_vocab > USUAL else None


def usual_shortlist(n_vocab: int) -> Shortlist | None:
    """As many tokens as a data set usually makes, where only their number counts."""
    n = expected_size(n_vocab)
    return None if n is None else np.arange(n, dtype=np.int32)


def whole_blocks(n: int) -> int:
    """`n` tokens, rounded up to whole blocks.

    >>> whole_blocks(65)
    128
    """
    return -(-n // BLOCK) * BLOCK
