"""What passes between the HTTP side and the engine's thread: answers asked for, and what becomes of them.

A request is one HTTP request. Its answers may run one after the other, but all with the same edition of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .edition import Edition
from .sampling import Sampling

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Asked:
    """One answer to a prompt, given as tokens; at most `max_new` tokens and none behind a stop string."""

    tokens: tuple[int, ...]
    max_new: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Started:
    """The edition that all answers of the request are computed with, None for the base model; `on` says of each whether it is ever on."""

    edition: Edition | None
    on: tuple[bool, ...]


@dataclass(frozen=True)
class Piece:
    """More text of answer `index`."""

    index: int
    text: str


@dataclass(frozen=True)
class Finished:
    """Answer `index` is complete, after `n_new` tokens."""

    index: int
    reason: FinishReason
    n_new: int


@dataclass(frozen=True)
class Failed:
    """The request ends here; `missing` says that no adapter has arrived yet, which may be otherwise later."""

    message: str
    missing: bool = False


Event = Started | Piece | Finished | Failed


@dataclass(eq=False)
class Request:
    """Answers asked for together. `emit` is called in the engine's thread; `cancelled` may be set by anybody, at any time."""

    asked: Sequence[Asked]
    tuned: bool
    emit: Callable[[Event], None]
    cancelled: bool = field(default=False)
