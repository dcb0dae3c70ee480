"""`ScoreOracle`: one minus the F1 of greedy answers as the loss.

Training needs values only, never gradients, so what is wanted can be trained on directly. F1 is flat almost everywhere and jumps, so its
slopes are far noisier than a likelihood's: it is for the last part of a run that the likelihood began.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import UsageError
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.oracle import Losses
from fwdllama.score import f1
from fwdllama.types import Encoded


class ScoreOracle:
    """A `LossOracle` over a `LlamaOracle` of the whole model: the same batch and theta, another loss.

    Raises:
        UsageError: the oracle has a trunk, which knows the known answers' tokens only.
    """

    def __init__(self, oracle: LlamaOracle) -> None:
        if oracle.trunk is not None:
            raise UsageError("objective f1 generates new tokens, which needs the whole model: use --no-trunk.")
        self.oracle = oracle
        self._examples: Sequence[Encoded | None] = ()

    def load(self, examples: Sequence[Encoded | None]) -> None:
        """Make `examples` the batch.

        Raises:
            UsageError: they are of a classification task.
        """
        if any(example is not None and example.choices for example in examples):
            raise UsageError("objective f1 compares words of answers; a classification task is trained with objective nll.")
        self._examples = examples
        self.oracle.load(examples)

    def write(self, theta: NDArray[np.float32]) -> None:
        """Put theta into the adapter."""
        self.oracle.write(theta)

    def losses(self, rows: Sequence[int] | None = None, *, n_targets: int | None = None) -> Losses:
        """1 - F1 of each row's greedy answer against its target, 0 to 1, float64 (len(rows),); there is none of a part of it.

        Raises:
            UsageError: `n_targets` was given.
        """
        if n_targets is not None:
            raise UsageError("objective f1 scores whole answers only.")
        chosen = [i for i, e in enumerate(self._examples) if e is not None] if rows is None else list(rows)
        model = self.oracle.model
        result = []
        for row, tokens in zip(chosen, self._answers(chosen), strict=True):
            example = self._examples[row]
            assert example is not None
            truth = b"".join(model.piece(token) for token in example.target[:-1]).decode(errors="ignore")
            given = b"".join(model.piece(token) for token in tokens).decode(errors="ignore").strip().partition("\n")[0]
            result.append(1.0 - f1(given, (truth,)))
        return np.array(result, np.float64)

    def _answers(self, rows: Sequence[int]) -> list[list[int]]:
        """Greedy answers of at most twice the target's length and two tokens more, all rows a token at a time."""
        oracle, context = self.oracle, self.oracle.context
        if oracle.scope == "all":
            oracle.losses(rows)  # puts the prompts of these rows there, at this theta
        found: dict[int, list[int]] = {}
        nexts: dict[int, int] = {}
        position: dict[int, int] = {}
        for row in rows:
            example = self._examples[row]
            assert example is not None
            n = len(example.invocation)
            start = len(example.prompt)
            context.forget(row, start)
            wants = np.zeros(n, np.int8)
            wants[-1] = 1
            logits = context.decode(
                np.array(example.invocation, np.int32),
                np.arange(start, start + n, dtype=np.int32),
                np.full(n, row, np.int32),
                wants,
            )
            assert logits is not None
            found[row], nexts[row], position[row] = [], int(logits[0].argmax()), start + n
        alive = [row for row in rows if self._takes(row, nexts[row], found[row], position[row])]
        while alive:
            for row in alive:
                logits = context.decode(
                    np.array([nexts[row]], np.int32), np.array([position[row]], np.int32), np.array([row], np.int32), np.ones(1, np.int8)
                )
                assert logits is not None
                nexts[row], position[row] = int(logits[0].argmax()), position[row] + 1
            alive = [row for row in alive if self._takes(row, nexts[row], found[row], position[row])]
        return [found[row] for row in rows]

    def _takes(self, row: int, token: int, found: list[int], position: int) -> bool:
        """Add `token` to the answer unless it ends it; whether another is to be asked for."""
        example = self._examples[row]
        assert example is not None
        model = self.oracle.model
        ended = model.is_end(token) or (bool(found) and b"\n" in model.piece(token))
        if ended or len(found) >= 2 * len(example.target) + 2 or position >= self.oracle.context.options.n_ctx_seq:
            return False
        found.append(token)
        return True
