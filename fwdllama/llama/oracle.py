"""`LlamaOracle`: losses of a batch of examples under an adapter, computed by llama.cpp.

Scope `answer`: prompts are decoded once a batch, or with a `PromptPool` once, with the adapter off; every loss then drops the cells behind the
prompts and decodes only invocation and target with the adapter on, about a tenth of the tokens. Scope `all`: the prompt is part of every loss.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import DataError, EngineError
from fwdllama.llama.adapter import LoadedAdapter, Values, Writing, check_finite
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.packing import Need, packed
from fwdllama.llama.pool import PromptPool, Unit
from fwdllama.llama.prompts import fill
from fwdllama.llama.row import Members, Moves, Row, kept_units, laid, n_behind, rearranged, row_of, units_of
from fwdllama.llama.stack import Stack
from fwdllama.llama.trunk import Below
from fwdllama.loss import choice_nll, token_nll
from fwdllama.oracle import Losses
from fwdllama.space import Space
from fwdllama.types import Encoded, Scope
from gguf_tools.adapter import Adapter

log = logging.getLogger("fwdllama.llama")


class LlamaOracle:
    """A `LossOracle` over one model, one adapter and one context. Close it before the model."""

    def __init__(
        self,
        model: Model,
        space: Space,
        scope: Scope,
        options: ContextOptions,
        *,
        trunk: Below | None = None,
        shortlist: NDArray[np.int32] | None = None,
        pool: PromptPool | None = None,
        writing: Writing | None = None,
        n_places: int = 1,
    ) -> None:
        """`model` is the whole model, or with a `trunk` the top that belongs to it; names in `space` are the whole model's.

        `shortlist` are the tokens, ascending, whose logits the model gives, None: all; losses are then relative to these alone.
        A `pool` is for scope `answer`, and of the identity of this very model, context and trunk.
        `n_places` thetas can be evaluated in one decode, if the adapter and the scope allow it; else the attribute is 1.
        """
        self.model, self.space, self.scope, self.trunk, self.shortlist = model, space, scope, trunk, shortlist
        self.pool = pool if scope == "answer" else None
        adapter = Adapter(
            architecture=model.info.architecture,
            alpha=space.alpha,
            tensors={self._own_name(name): pair for name, pair in space.tensors(space.initial_theta()).items()},
            scope="all",
            invocation_tokens=(),
            metadata={},
        )
        self.adapter = LoadedAdapter(model, adapter, writing=writing)
        self._own_names = {name: self._own_name(name) for name, _ in space.views(space.initial_theta())}
        self._stack = self._stacked(n_places)
        # llama.cpp goes on in the last layer with the tokens that have logits: where that layer is adapted, each theta must have equally many.
        self._is_last_adapted = space.last_layer - (trunk.first if trunk else 0) == model.n_layers - 1
        self.n_places = n_places if self._stack else 1
        self.context = Context(model, options, eval_callback=self._stack.look if self._stack else None)
        self._units: dict[int, Members] = {}
        self._states: dict[int, NDArray[np.float32]] = {}  # with a trunk: what enters the top, of whole examples, or what losses decode of them
        self._rows: list[Row | None] = []
        self._prompts: list[NDArray[np.int32] | None] = []

    def _stacked(self, n_places: int) -> Stack | None:
        """In scope `all` prompts are decoded with each theta, sequence by sequence, so there is nothing to put together."""
        if n_places < 2 or self.scope == "all":
            return None
        try:
            return Stack(self.adapter, {name: v.shape for name, v in self._values(self.space.initial_theta()).items()}, n_places)
        except EngineError as error:
            log.info("probes are computed one after the other: %s", error)
            return None

    @property
    def capacity(self) -> int:
        """The most examples a batch can hold."""
        return self.context.options.n_seq

    @property
    def decode_s(self) -> float:
        """Seconds spent inside llama_decode so far."""
        return self.context.decode_s + (self.trunk.decode_s if self.trunk else 0.0)

    @property
    def n_decoded(self) -> int:
        """Tokens decoded so far; those that only the trunk or only the top computed count as one each."""
        return self.context.n_decoded + (self.trunk.n_decoded if self.trunk else 0)

    def fits(self, example: Encoded) -> bool:
        """Whether the example fits a sequence."""
        return example.n_tokens <= self.context.options.n_ctx_seq

    def load(self, examples: Sequence[Encoded | None]) -> None:
        """Make `examples` the batch; None leaves a row empty.

        In scope `answer` this decodes their prompts, except those of units whose rows hold what they held before or that the pool has.

        Raises:
            DataError: too many examples, or one that does not fit its sequence.
        """
        if len(examples) > self.capacity:
            raise DataError(f"a batch of {len(examples)} examples exceeds the context's {self.capacity} sequences.")
        if all(e is None for e in examples):
            raise DataError("a batch is empty; it needs at least one example.")
        for example in examples:
            if example is not None:
                self._check(example)
        before, self._units = self._units, {}  # a decode that fails leaves nothing that could pass for kept
        self._rows = [None if e is None else row_of(e, self.shortlist) for e in examples]
        self._prompts = [None if e is None else np.array(e.prompt, np.int32) for e in examples]
        after = units_of(examples, trunk=self.trunk is not None)
        if self.scope == "answer":
            self.adapter.attach(self.context, False)
        kept = self._moved(before, after)
        states = {row: self._states[was] for moves in kept.values() for was, row in moves if was in self._states}
        for key, members in after.items():
            rows = [row for row, *_ in members]
            if key not in kept:
                states.update(self._trunk_states(rows) if self.scope == "all" else self._prompted(rows))
        for row, values in states.items():
            self._row(row).tokens = values[-len(self._row(row).tokens) :]
        self._states = states
        self._units = after
        self.adapter.attach(self.context, True)

    def _moved(self, before: Mapping[int, Members], after: Mapping[int, Members]) -> dict[int, Moves]:
        """Units of which everything is here already, each with its (old, new) rows; in the context, those whose rows have changed are moved."""
        kept = kept_units(before, after)
        if self.scope == "all":  # the context holds no prompts between losses
            return kept
        order = rearranged(dict(move for moves in kept.values() for move in moves), self.capacity)
        if order is None:
            return {key: moves for key, moves in kept.items() if all(was == row for was, row in moves)}
        for was, row in order:
            self.context.copy(was, row)
        return kept

    def _prompted(self, rows: list[int]) -> dict[int, NDArray[np.float32]]:
        """Have a unit's prompts in the context; with a trunk, what enters the top behind each of them."""
        prompts = [prompt for row in rows if (prompt := self._prompts[row]) is not None]
        behind = [np.asarray(self._row(row).tokens, np.int32) for row in rows] if self.trunk else []
        unit = Unit(rows, prompts, behind)
        found = self.pool.restore(self.context, unit) if self.pool else None
        if found is None:
            states = self._trunk_states(rows)
            fill(self.context, self._prompts, rows, states=states if self.trunk else None)
            found = [states[row][self._row(row).start :].copy() for row in rows if row in states]  # what is before them need not be held
            if self.pool:
                self.pool.keep(self.context, unit, found)
        return dict(zip(rows, found, strict=False))

    def _trunk_states(self, rows: list[int]) -> dict[int, NDArray[np.float32]]:
        if self.trunk is None:
            return {}
        prompts = [prompt for row in rows if (prompt := self._prompts[row]) is not None]
        behind = [np.asarray(self._row(row).tokens, np.int32) for row in rows]
        return dict(zip(rows, self.trunk.states(prompts, behind), strict=True))

    def _check(self, example: Encoded) -> None:
        options = self.context.options
        if not example.invocation or not example.target:
            raise DataError(f"example {example.id} has no invocation or no answer, so nothing predicts the answer.")
        if n_behind(example) > options.n_batch or len(example.target) > options.n_outputs:
            raise DataError(
                f"example {example.id} has {n_behind(example)} tokens behind its prompt and {len(example.target)} to predict; "
                f"one decode holds {options.n_batch} and {options.n_outputs}."
            )
        if not self.fits(example):
            raise DataError(f"example {example.id} needs {example.n_tokens} tokens, but the context holds {options.n_ctx_seq}.")

    def write(self, theta: NDArray[np.float32]) -> None:
        """Put theta into the adapter."""
        self.adapter.update(self._values(theta))

    def _values(self, theta: NDArray[np.float32]) -> Values:
        return {self._own_names[name]: values for name, values in self.space.views(theta)}

    def _own_name(self, name: str) -> str:
        """The tensor's name in the model that is loaded: a top's layers are numbered from 0."""
        first = self.trunk.first if self.trunk else 0
        block, layer, rest = name.split(".", 2)
        return f"{block}.{int(layer) - first}.{rest}"

    def losses(self, rows: Sequence[int] | None = None, *, n_targets: int | None = None) -> Losses:
        """Mean negative log-likelihood per target token, or per one of the first `n_targets`, in nats, float64 (len(rows),)."""
        chosen = [i for i, row in enumerate(self._rows) if row is not None] if rows is None else list(rows)
        if self.scope == "all":
            wanted = set(chosen)
            prompts = [p if i in wanted else None for i, p in enumerate(self._prompts)]
            fill(self.context, prompts, states=self._states if self.trunk else None)
        found: dict[int, float] = {}
        apart = [[row] for row in sorted(set(chosen))]
        for indices in packed(apart, partial(self._need, n_targets=n_targets), self.context.options):
            group = [apart[i][0] for i in indices]
            found.update(zip(group, self._group_losses(group, n_targets), strict=True))
        return np.array([found[r] for r in chosen], np.float64)

    def place(self, index: int, theta: NDArray[np.float32]) -> None:
        """Have theta at place `index`, beside those of other places."""
        assert self._stack is not None
        values = self._values(theta)
        if not np.isfinite(theta).all():  # a fifth of the time of looking into every tensor
            check_finite(values)
        self._stack.write(index, values)

    def losses_beside(self, groups: Sequence[Sequence[int]], *, n_targets: int | None = None) -> list[Losses]:
        """As `losses` of each group's rows, with the theta of place i for groups[i]; what `write` wrote may be lost."""
        found: list[Losses] = []
        for indices in packed(groups, partial(self._need, n_targets=n_targets), self.context.options):
            found += self._beside(indices[0], [groups[i] for i in indices], n_targets)
        return found

    def _beside(self, first: int, groups: list[Sequence[int]], n_targets: int | None) -> list[Losses]:
        """Losses of groups that one decode can hold, with the thetas of the places from `first` on."""
        assert self._stack is not None
        needs = [[self._need(row, n_targets) for row in group] for group in groups]
        n_outputs = max(sum(need.n_outputs for need in group) for group in needs)
        has_room = not self._is_last_adapted or len(groups) * n_outputs <= self.context.options.n_outputs
        if len(groups) > 1 and self.n_places > 1 and has_room:
            rows = [row for group in groups for row in group]
            n_tokens = len(groups[0]) * max(need.n_tokens for group in needs for need in group)
            try:
                with self._stack.beside(first, len(groups), n_tokens, n_outputs):
                    losses = self._group_losses(rows, n_targets, (len(groups), n_outputs) if self._is_last_adapted else None)
            except EngineError as error:
                log.info("probes are computed one after the other: %s", error)
                self.n_places = 1
            else:
                return list(np.array(losses, np.float64).reshape(len(groups), -1))
        found: list[Losses] = []
        for index, group in enumerate(groups, first):
            self.adapter.update(self._stack.values(index))
            found.append(self.losses(group, n_targets=n_targets))
        return found

    def _row(self, index: int) -> Row:
        row = self._rows[index]
        if row is None:
            raise DataError(f"row {index} of the batch is empty.")
        return row

    def _need(self, index: int, n_targets: int | None = None) -> Need:
        row = self._row(index).cut(n_targets)
        return Need(row.start, len(row.tokens), len(row.target))

    def _group_losses(self, group: list[int], n_targets: int | None, even: tuple[int, int] | None = None) -> list[float]:
        """Losses of rows that one decode can hold; `even` is a number of equal parts, and the logits that each must ask for."""
        rows = [self._row(index).cut(n_targets) for index in group]
        for index, row in zip(group, rows, strict=True):
            self.context.forget(index, row.start)
        decode = laid(group, rows, even)
        logits = self.context.decode(decode.tokens, decode.positions, decode.sequences, decode.wants)
        assert logits is not None
        place, width = np.cumsum(decode.wants) - 1, len(decode.wants) // len(rows)  # place: of each token's logits
        losses = []
        for i, row in enumerate(rows):
            start = int(place[i * width + row.first])
            mine = logits[start : start + len(row.target)]
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
