"""`LlamaOracle`: losses of a batch of examples under an adapter, computed by llama.cpp.

Scope `answer`: prompts are decoded once a batch with the adapter off; every loss then drops the cells behind the prompts and decodes
only invocation and target with the adapter on, about a tenth of the tokens. Scope `all`: the prompt is part of every loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import DataError
from fwdllama.llama.adapter import LoadedAdapter, Writing
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.prompts import fill, units
from fwdllama.loss import choice_nll, token_nll
from fwdllama.oracle import Losses
from fwdllama.space import Space
from fwdllama.types import Encoded, Scope
from gguf_tools.adapter import Adapter


@dataclass
class _Row:
    """What a loss decodes for one example: tokens behind the prompt, and which of them predict the target."""

    start: int  # position of the first invocation token
    tokens: NDArray[np.int32]  # invocation + target[:-1]
    first: int  # index in tokens of the one that predicts target[0]
    target: NDArray[np.int32]
    choices: NDArray[np.int32]


def _row(example: Encoded) -> _Row:
    return _Row(
        len(example.prompt),
        np.array(example.invocation + example.target[:-1], np.int32),
        len(example.invocation) - 1,
        np.array(example.target, np.int32),
        np.array(example.choices, np.int32),
    )


def _n_behind(example: Encoded) -> int:
    """Tokens that a loss decodes behind the example's prompt."""
    return len(example.invocation) + len(example.target) - 1


def _same(a: Sequence[NDArray[np.int32] | None], b: Sequence[NDArray[np.int32] | None]) -> bool:
    return len(a) == len(b) and all(
        x is y or (x is not None and y is not None and np.array_equal(x, y)) for x, y in zip(a, b, strict=True)
    )


class LlamaOracle:
    """A `LossOracle` over one model, one adapter and one context. Close it before the model."""

    def __init__(
        self,
        model: Model,
        space: Space,
        scope: Scope,
        options: ContextOptions,
        *,
        unit_size: int = 1,
        writing: Writing | None = None,
    ) -> None:
        self.model, self.space, self.scope = model, space, scope
        adapter = Adapter(
            architecture=model.info.architecture,
            alpha=space.alpha,
            tensors=space.tensors(space.initial_theta()),
            scope="all",
            invocation_tokens=(),
            metadata={},
        )
        self.adapter = LoadedAdapter(model, adapter, writing=writing)
        self.context = Context(model, options)
        self.unit_size = unit_size
        self._rows: list[_Row | None] = []
        self._prompts: list[NDArray[np.int32] | None] = []

    @property
    def capacity(self) -> int:
        """The most examples a batch can hold."""
        return self.context.options.n_seq

    @property
    def decode_s(self) -> float:
        """Seconds spent inside llama_decode so far."""
        return self.context.decode_s

    def fits(self, example: Encoded, longest_answer: int = 0) -> bool:
        """Whether the example, padded to `longest_answer` tokens behind its prompt, fits a sequence."""
        return len(example.prompt) + max(_n_behind(example), longest_answer) <= self.context.options.n_ctx_seq

    def load(self, examples: Sequence[Encoded | None]) -> None:
        """Make `examples` the batch; None leaves a row empty.

        In scope `answer` this decodes their prompts, block by block of `unit_size` rows, except blocks that hold what they held before.

        Raises:
            DataError: too many examples, or one that does not fit its sequence.
        """
        if len(examples) > self.capacity:
            raise DataError(f"a batch of {len(examples)} examples exceeds the context's {self.capacity} sequences.")
        if all(e is None for e in examples):
            raise DataError("a batch is empty; it needs at least one example.")
        widest = max(_n_behind(e) for e in examples if e is not None)
        options = self.context.options
        for example in examples:
            if example is None:
                continue
            if not example.invocation or not example.target:
                raise DataError(f"example {example.id} has no invocation or no answer, so nothing predicts the answer.")
            if _n_behind(example) > options.n_batch or len(example.target) > options.n_outputs:
                raise DataError(
                    f"example {example.id} has {_n_behind(example)} tokens behind its prompt and {len(example.target)} to predict; "
                    f"one decode holds {options.n_batch} and {options.n_outputs}."
                )
            if not self.fits(example, widest):
                raise DataError(
                    f"example {example.id} needs {len(example.prompt) + widest} tokens, "
                    f"but the context holds {self.context.options.n_ctx_seq}."
                )
        before, self._prompts = self._prompts, []  # a decode that fails leaves nothing that could pass for kept
        self._rows = [None if e is None else _row(e) for e in examples]
        prompts = [None if e is None else np.array(e.prompt, np.int32) for e in examples]
        if self.scope == "answer":
            self.adapter.attach(self.context, False)
            for unit in units(prompts, self.unit_size):
                if not _same(before[unit.start : unit.stop], prompts[unit.start : unit.stop]):
                    fill(self.context, prompts, unit)
        self._prompts = prompts
        self.adapter.attach(self.context, True)

    def write(self, theta: NDArray[np.float32]) -> None:
        """Put theta into the adapter."""
        self.adapter.update(dict(self.space.views(theta)))

    def losses(self, rows: Sequence[int] | None = None) -> Losses:
        """Mean negative log-likelihood per target token, in nats, float64 (len(rows),)."""
        chosen = [i for i, row in enumerate(self._rows) if row is not None] if rows is None else list(rows)
        if self.scope == "all":
            wanted = set(chosen)
            fill(self.context, [p if i in wanted else None for i, p in enumerate(self._prompts)])
        found: dict[int, float] = {}
        for group in self._groups(sorted(set(chosen))):
            found.update(zip(group, self._group_losses(group), strict=True))
        return np.array([found[r] for r in chosen], np.float64)

    def _row(self, index: int) -> _Row:
        row = self._rows[index]
        if row is None:
            raise DataError(f"row {index} of the batch is empty.")
        return row

    def _groups(self, chosen: list[int]) -> list[list[int]]:
        """Split rows into decodes: similar lengths together, within the context's tokens and outputs."""
        options, groups = self.context.options, []
        group: list[int] = []
        n_outputs = 0
        for r in sorted(chosen, key=lambda r: (len(self._row(r).tokens), r)):
            row = self._row(r)
            full = (len(group) + 1) * len(row.tokens) > options.n_batch or n_outputs + len(row.target) > options.n_outputs
            if group and full:
                groups.append(group)
                group, n_outputs = [], 0
            group.append(r)
            n_outputs += len(row.target)
        return [*groups, group] if group else groups

    def _group_losses(self, group: list[int]) -> list[float]:
        width = max(len(self._row(r).tokens) for r in group)
        shape = (len(group), width)
        tokens, wants = np.zeros(shape, np.int32), np.zeros(shape, np.int8)
        positions, sequences = np.empty(shape, np.int32), np.empty(shape, np.int32)
        ramp = np.arange(width, dtype=np.int32)
        for i, r in enumerate(group):
            row = self._row(r)
            tokens[i, : len(row.tokens)] = row.tokens
            positions[i] = row.start + ramp
            sequences[i] = r
            wants[i, row.first : len(row.tokens)] = 1
            self.context.forget(r, row.start)
        logits = self.context.decode(tokens.ravel(), positions.ravel(), sequences.ravel(), wants.ravel())
        assert logits is not None
        losses, start = [], 0
        for r in group:
            row = self._row(r)
            mine = logits[start : start + len(row.target)]
            start += len(row.target)
            if len(row.choices):
                losses.append(choice_nll(mine[0], row.choices, int(row.target[0])))
            else:
                losses.append(float(token_nll(mine, row.target).mean()))
        return losses

    def close(self) -> None:
        """Free adapter, then context. Safe to call twice."""
        self.adapter.close()
        self.context.close()

    def __enter__(self) -> LlamaOracle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
