"""The sequences of a context, and the steps that bring the answers in them forward.

A step reads a piece of one prompt and generates a token of every answer. A few answers are decoded one after the other, from some number on
(`TOGETHER`) those that use the same adapter at once: on a CPU a few rows of a quantised matrix are slower than as many single ones, and alone,
an answer's bits do not depend on who else asks. Milliseconds a step, together and apart (SmolLM2-135M, one core):

    answers      2            3            4            8
    Q8_0     27.6  14.1   34.7  21.6   39.9  28.5   50.8  56.6
    Q4_0     12.9  10.6   17.7  15.9   17.5  21.1   27.3  43.0
    F16      17.6  20.0   19.3  29.5   21.5  38.5   43.6  97.2

Each step begins with the adapter that is on already, so that two kinds of answers cost one switch a step and not two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fwdllama.errors import EngineError
from fwdllama.llama.context import Context
from fwdllama.llama.model import Model

from .adapters import Adapters, Held
from .exchange import Asked, Failed, Finished, FinishReason, Piece, Request
from .sampling import Sampler
from .text import TextStream

TOGETHER = {"F16": 2, "BF16": 2, "F32": 2, "Q4_0": 4}  # answers from which one decode for all is faster, by the model's type
TOGETHER_OTHERWISE = 8


@dataclass(eq=False)
class Answer:
    """One answer in a sequence of the context; the adapter is `held` from prompt token `on_from` on, None for never."""

    request: Request
    index: int
    asked: Asked
    slot: int
    held: Held | None
    on_from: int | None
    sampler: Sampler = field(init=False)
    text: TextStream = field(init=False)
    n_read: int = 0  # prompt tokens that were decoded
    n_new: int = 0
    last: int = -1  # the newest token, which is not decoded yet

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.asked.sampling, self.index)
        self.text = TextStream(self.asked.stops)

    @property
    def generating_with(self) -> Held | None:
        """What its next token is computed with."""
        return self.held if self.on_from is not None else None


class Slots:
    """Answers in the sequences of one context. Every method is for the engine's thread."""

    def __init__(self, model: Model, context: Context, adapters: Adapters, *, together: int) -> None:
        self._model, self._context, self._adapters = model, context, adapters
        self._together = together
        self._free = set(range(context.options.n_seq))
        self._reading: deque[Answer] = deque()
        self._generating: list[Answer] = []

    @property
    def n_free(self) -> int:
        """Answers that can still be put in."""
        return len(self._free)

    def answers(self) -> list[Answer]:
        """All that are in it."""
        return [*self._reading, *self._generating]

    def put(self, request: Request, index: int, held: Held | None, on_from: int | None) -> None:
        """Begin an answer. Answers of one kind get neighbouring sequences: together, llama.cpp computes those in one pass."""
        slot = max(self._free) if on_from is None else min(self._free)
        self._free.remove(slot)
        self._context.forget(slot, 0)
        self._reading.append(Answer(request, index, request.asked[index], slot, held, on_from))

    def remove(self, answer: Answer) -> None:
        """End an answer, whatever it has come to."""
        if answer in self._generating:
            self._generating.remove(answer)
        else:
            self._reading.remove(answer)
        self._free.add(answer.slot)

    def step(self) -> list[Answer]:
        """Read a piece of one prompt, then one token of every answer that generates. Returns those that ended; they are removed."""
        ended: list[Answer] = []
        if self._reading:
            answer = self._reading[0]
            self._reading.rotate(-1)
            ended += self._ended([answer], self._read)
        kinds = list({id(answer.generating_with): answer.generating_with for answer in self._generating}.values())
        for kind in sorted(kinds, key=lambda kind: kind is not self._adapters.on_now):
            alike = [answer for answer in self._generating if answer.generating_with is kind]
            lots = [sorted(alike, key=lambda answer: answer.slot)] if len(alike) >= self._together else [[answer] for answer in alike]
            for lot in lots:
                ended += self._ended(lot, self._generate)
        return ended

    def _ended(self, answers: list[Answer], work: Callable[[list[Answer]], list[Answer]]) -> list[Answer]:
        """Which of `answers` end with `work`: all of them, where llama.cpp refuses."""
        try:
            ended = work(answers)
        except EngineError as error:
            ended = answers
            for answer in answers:
                answer.request.emit(Failed(str(error)))
                answer.request.cancelled = True
        for answer in ended:
            self.remove(answer)
        return ended

    def _read(self, answers: list[Answer]) -> list[Answer]:
        [answer] = answers
        tokens, begin = answer.asked.tokens, answer.n_read
        end = min(begin + self._context.n_batch, len(tokens))
        off = answer.on_from is None or begin < answer.on_from
        if off and answer.on_from is not None:
            end = min(end, answer.on_from)
        self._adapters.switch(None if off else answer.held)
        wants = np.zeros(end - begin, np.int8)
        wants[-1] = end == len(tokens)
        positions = np.arange(begin, end, dtype=np.int32)
        logits = self._context.decode(np.array(tokens[begin:end], np.int32), positions, np.full_like(positions, answer.slot), wants)
        answer.n_read = end
        if logits is None:
            return []
        self._reading.remove(answer)
        self._generating.append(answer)
        return [answer] if self._take(answer, answer.sampler.choose(logits[0])) else []

    def _generate(self, answers: list[Answer]) -> list[Answer]:
        self._adapters.switch(answers[0].generating_with)
        logits = self._context.decode(
            np.array([answer.last for answer in answers], np.int32),
            np.array([len(answer.asked.tokens) + answer.n_new - 1 for answer in answers], np.int32),
            np.array([answer.slot for answer in answers], np.int32),
            np.ones(len(answers), np.int8),
        )
        assert logits is not None
        return [answer for answer, row in zip(answers, logits, strict=True) if self._take(answer, answer.sampler.choose(row))]

    def _take(self, answer: Answer, token: int) -> bool:
        """Add a token to an answer, and say what it spells; whether the answer ends with it."""
        reason: FinishReason | None = None
        if self._model.is_end(token):
            reason = "stop"
        else:
            answer.n_new, answer.last = answer.n_new + 1, token
            self._say(answer, answer.text.feed(self._model.piece(token)))
            if answer.text.stopped:
                reason = "stop"
            elif answer.n_new >= answer.asked.max_new:
                reason = "length"
        if reason is None:
            return False
        self._say(answer, answer.text.finish())
        answer.request.emit(Finished(answer.index, reason, answer.n_new))
        return True

    def _say(self, answer: Answer, text: str) -> None:
        if text:
            answer.request.emit(Piece(answer.index, text))
