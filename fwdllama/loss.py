"""Negative log-likelihoods from logits.

Sums are float64 because losses feed differences that are divided by a small eps; exponentials stay float32, whose relative error of
1e-7 is a thousandth of the arithmetic noise of a quantised model.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

VALUES_AT_ONCE = 1 << 18  # logits whose exponentials are in memory together


def token_nll(
    logits: NDArray[np.float32],  # (n, n_vocab)
    targets: NDArray[np.int32],  # (n,)
) -> NDArray[np.float64]:
    """-log softmax(logits)[target] of every row, in nats, float64 (n,).

    Rows are taken a few at a time, in the same room: all 64 of a decode with 262,144 tokens would need 64 MiB beside the logits.

    >>> token_nll(np.zeros((1, 4), np.float32), np.array([2], np.int32)).round(4)
    array([1.3863])
    """
    nll = np.empty(len(targets), np.float64)
    step = max(1, VALUES_AT_ONCE // logits.shape[1])
    room = np.empty((min(step, len(targets)), logits.shape[1]), np.float32)
    for begin in range(0, len(targets), step):
        rows, chosen = logits[begin : begin + step], targets[begin : begin + step]
        peak = rows.max(axis=1)
        shares = np.subtract(rows, peak[:, None], out=room[: len(rows)])
        total = np.exp(shares, out=shares).sum(axis=1, dtype=np.float64)
        nll[begin : begin + step] = np.log(total) + peak - rows[np.arange(len(chosen)), chosen].astype(np.float64)
    return nll


def choice_nll(logits: NDArray[np.float32], choices: NDArray[np.int32], target: int) -> float:
    """-log of the target's share among `choices` (token ids, one per label word), in nats; logits is one row (n_vocab,).

    >>> round(choice_nll(np.zeros(9, np.float32), np.array([1, 2]), 2), 4)
    0.6931
    """
    scores = logits[choices].astype(np.float64)
    peak = scores.max()
    return float(np.log(np.exp(scores - peak).sum()) + peak - float(logits[target]))


def bounded(losses: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Losses in nats, of which those above `limit` grow ever less: limit + 1 - exp(limit - l).

    The tenth of the examples with the highest losses causes 60 % of a slope's variance and little of its mean (LOG.md); this gives
    each the weight exp(limit - l). Bounding all of them, as generalised cross entropy does, lets examples far off drift away.

    >>> bounded(np.array([1.0, 2.0, 3.0, 9.0]), limit=2.0).round(3)
    array([1.   , 2.   , 2.632, 2.999])
    """
    return np.where(losses <= limit, losses, limit - np.expm1(np.minimum(limit - losses, 0.0)))
