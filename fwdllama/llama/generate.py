"""Greedy answers, and losses on the known ones, of many examples that share the sequences of one context.

Examples on one paragraph are put into the same filling of the context, where the paragraph is decoded once. Behind the
prompts everything is decoded with the adapter on: first the invocation, then one token a step of each example that is
not finished. llama.cpp computes neighbouring sequences in one pass and a gap costs another, so the sequence of a
finished example is taken over by the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fwdllama.errors import DataError
from fwdllama.llama.adapter import LoadedAdapter
from fwdllama.llama.context import Context, Tokens
from fwdllama.llama.prompts import common_prefix, fill
from fwdllama.loss import choice_nll, token_nll
from fwdllama.types import Encoded, Scope

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Answered:
    """`tokens` without the end token; of a classification one, the first of the likeliest label word.

    `loss` is the mean negative log-likelihood of the target in nats per token, None where it was not asked for.
    """

    tokens: list[int]
    loss: float | None = None


@dataclass(frozen=True)
class _Row:
    """Tokens to decode behind the prompt in `sequence`; logits are wanted from index `first` on."""

    sequence: int
    start: int
    tokens: tuple[int, ...]
    first: int


def generate(
    context: Context,
    adapter: LoadedAdapter | None,
    scope: Scope,
    examples: Sequence[Encoded],
    *,
    max_new_tokens: int,
    stop_at_newline: bool = True,
) -> list[list[int]]:
    """The tokens of each example's greedy answer, in the order of `examples`. See `answers`."""
    found: list[list[int]] = [[] for _ in examples]
    for i, answered in answers(
        context, adapter, scope, examples, max_new_tokens=max_new_tokens, stop_at_newline=stop_at_newline
    ):
        found[i] = answered.tokens
    return found


def answers(
    context: Context,
    adapter: LoadedAdapter | None,
    scope: Scope,
    examples: Sequence[Encoded],
    *,
    max_new_tokens: int,
    stop_at_newline: bool = True,
    with_losses: bool = False,
) -> Iterator[tuple[int, Answered]]:
    """Yield (index in `examples`, answer) in the order in which they are done, which is by fillings of the context.

    An answer ends before an end-of-generation token, with a newline that follows some text, after `max_new_tokens`, or
    where the sequence is full. Without an adapter the context must have none attached; with one it is left attached.

    Raises:
        DataError: an example does not fit a sequence of the context.
    """
    options = context.options
    for example in examples:
        n_tokens = len(example.prompt) + len(example.invocation)
        if with_losses:
            n_tokens = max(n_tokens, example.n_tokens)
        if n_tokens > options.n_ctx_seq:
            raise DataError(
                f"example {example.id} needs {n_tokens} tokens, but the context has {options.n_ctx_seq} a sequence."
            )
    for chosen in fillings(examples, min(options.n_seq, options.n_batch, options.n_outputs)):
        batch = [examples[i] for i in chosen]
        if adapter is not None:
            adapter.attach(context, scope == "all")
        fill(context, [np.array(example.prompt, np.int32) for example in batch])
        if adapter is not None:
            adapter.attach(context, True)
        losses: Sequence[float | None] = _losses(context, batch) if with_losses else [None] * len(batch)
        tokens = _greedy(context, batch, max_new_tokens, stop_at_newline)
        for i, mine, loss in zip(chosen, tokens, losses, strict=True):
            yield i, Answered(mine, loss)


def fillings(examples: Sequence[Encoded], n_seq: int) -> list[list[int]]:
    """Divide examples, by index, into lots of at most n_seq so that few prompts that begin alike are torn apart.

    Prompts that share half of their tokens with the one before, in lexical order, form a group; groups go into lots
    largest first, each into the fullest lot that has room. A group's members are neighbours, as `fill` wants them, the
    ones with short targets first.
    """
    prompts = [np.array(example.prompt, np.int32) for example in examples]
    groups: list[list[int]] = []
    for i in sorted(range(len(examples)), key=lambda i: (examples[i].prompt, i)):
        last = groups[-1][-1] if groups else None
        alike = last is not None and 2 * common_prefix(prompts[last], prompts[i]) >= len(prompts[i])
        if alike and len(groups[-1]) < n_seq:
            groups[-1].append(i)
        else:
            groups.append([i])
    by_room: list[list[list[int]]] = [[] for _ in range(n_seq + 1)]  # lots that have room for exactly k more
    for group in sorted(groups, key=lambda group: (-len(group), group)):
        k = next((k for k in range(len(group), n_seq) if by_room[k]), None)
        lot = by_room[k].pop() if k is not None else []
        lot.extend(sorted(group, key=lambda i: (len(examples[i].target), i)))
        by_room[n_seq - len(lot)].append(lot)
    return sorted((lot for lots in by_room for lot in lots), key=min)


def _greedy(context: Context, batch: Sequence[Encoded], n_most: int, stop_at_newline: bool) -> list[list[int]]:
    model, n_ctx_seq = context.model, context.options.n_ctx_seq
    found: list[list[int]] = [[] for _ in batch]
    texts = [b""] * len(batch)
    nexts = [0] * len(batch)
    for i, row in _first_logits(context, batch):
        choices = np.array(batch[i].choices, np.int32)
        nexts[i] = int(choices[row[choices].argmax()]) if len(choices) else int(row.argmax())

    def goes_on(i: int) -> bool:
        """Take the next token of example i; whether another one is to follow."""
        if batch[i].choices:
            found[i].append(nexts[i])
            return False
        if len(found[i]) >= n_most or model.is_end(nexts[i]):
            return False
        found[i].append(nexts[i])
        texts[i] += model.piece(nexts[i])
        ended = stop_at_newline and b"\n" in texts[i].lstrip()
        return not ended and len(found[i]) < n_most and position(i) < n_ctx_seq

    def position(i: int) -> int:
        """Where the last token found of example i belongs."""
        return len(batch[i].prompt) + len(batch[i].invocation) + len(found[i]) - 1

    held = list(range(len(batch)))  # sequence -> the example whose cells it holds
    while True:
        alive = [goes_on(i) for i in held]
        for sequence in reversed(range(len(held))):
            if not alive[sequence]:
                moved = held.pop()
                if sequence < len(held):
                    context.copy(len(held), sequence)
                    held[sequence] = moved
        if not held:
            return found
        logits = context.decode(
            np.array([found[i][-1] for i in held], np.int32),
            np.array([position(i) for i in held], np.int32),
            np.arange(len(held), dtype=np.int32),
            np.ones(len(held), np.int8),
        )
        assert logits is not None
        for i, token in zip(held, logits.argmax(axis=1), strict=True):
            nexts[i] = int(token)


def _first_logits(context: Context, batch: Sequence[Encoded]) -> Iterator[tuple[int, Logits]]:
    """(index in batch, logits (n_vocab,) behind the invocation); a sequence then holds prompt and invocation only."""
    rows = [_Row(i, len(e.prompt), e.invocation, len(e.invocation) - 1) for i, e in enumerate(batch)]
    for owners, _, logits in _decoded(context, rows):
        yield from zip(owners.tolist(), logits, strict=True)
    for row in rows:
        context.forget(row.sequence, row.start + len(row.tokens))


def _losses(context: Context, batch: Sequence[Encoded]) -> list[float]:
    """Mean negative log-likelihood per target token, in nats; the prompts stay."""
    rows = [_Row(i, len(e.prompt), e.invocation + e.target[:-1], len(e.invocation) - 1) for i, e in enumerate(batch)]
    total = np.zeros(len(batch), np.float64)
    for owners, offsets, logits in _decoded(context, rows):
        targets = np.array([batch[i].target[k] for i, k in zip(owners, offsets, strict=True)], np.int32)
        nll = token_nll(logits, targets)
        for at, i in enumerate(owners):
            choices = np.array(batch[i].choices, np.int32)
            total[i] += choice_nll(logits[at], choices, int(targets[at])) if len(choices) else nll[at]
    return [float(total[i]) / len(example.target) for i, example in enumerate(batch)]


def _decoded(context: Context, rows: Sequence[_Row]) -> Iterator[tuple[Tokens, Tokens, Logits]]:
    """Decode each row behind its prompt, in place of whatever follows there.

    Yields (sequence (n,), index of the logits counted from the row's first wanted ones (n,), logits (n, n_vocab)) a
    decode; the logits are a view that the next decode overwrites.
    """
    for group in _groups(rows, context.options.n_ctx_seq, context.options.n_batch):
        width = max(len(row.tokens) for row in group)
        tokens = np.zeros((len(group), width), np.int32)
        wants = np.zeros((len(group), width), np.int8)
        for r, row in enumerate(group):
            tokens[r, : len(row.tokens)] = row.tokens
            wants[r, row.first : len(row.tokens)] = 1
            context.forget(row.sequence, row.start)
        starts = np.array([[row.start] for row in group], np.int32)
        firsts = np.array([row.first for row in group], np.int32)
        sequences = np.array([[row.sequence] for row in group], np.int32)
        for begin, end in _columns(wants, context.options.n_batch, context.options.n_outputs):
            columns = np.arange(begin, end, dtype=np.int32)
            logits = context.decode(
                tokens[:, begin:end].ravel(),
                (starts + columns).ravel(),
                np.broadcast_to(sequences, (len(group), end - begin)).ravel(),
                wants[:, begin:end].ravel(),
            )
            if logits is not None:
                owners, wanted = np.nonzero(wants[:, begin:end])
                yield sequences[owners, 0], (wanted + begin - firsts[owners]).astype(np.int32), logits


def _groups(rows: Sequence[_Row], n_ctx_seq: int, n_batch: int) -> Iterator[list[_Row]]:
    """Neighbours that are decoded together: padded to one width they must fit, and padding is at most a half.

    Padding stands behind a row's tokens, where it changes nothing, but it needs cells while it is there.
    """
    group: list[_Row] = []
    for row in rows:
        both = [*group, row]
        widths = [len(each.tokens) for each in both]
        fits = all(each.start + max(widths) <= n_ctx_seq for each in both) and len(both) <= n_batch
        if group and not (fits and max(widths) <= 2 * min(widths)):
            yield group
            both = [row]
        group = both
    yield group


def _columns(wants: NDArray[np.int8], n_batch: int, n_outputs: int) -> Iterator[tuple[int, int]]:
    """Cut the columns of a group (n_rows, width) into decodes of at most n_batch tokens and n_outputs logits."""
    n_rows, width = wants.shape
    begin, n_wanted = 0, 0
    for column, wanted in enumerate(wants.sum(axis=0, dtype=np.int64).tolist()):
        if column > begin and ((column + 1 - begin) * n_rows > n_batch or n_wanted + wanted > n_outputs):
            yield begin, column
            begin, n_wanted = column, 0
        n_wanted += wanted
    yield begin, width
