"""Prompts on disk: what a batch's prompts left in the KV cache, for when their unit returns.

In scope `answer` a prompt's cells do not depend on theta. A batch that rolls over a small data set meets a unit again and again, and reading its
cells takes milliseconds where computing them takes the time of several probes. Kept with them, where the context's model is the top of one: the
values that enter it for the tokens behind the prompt, which every probe needs.

A pool that is full takes nothing new. Passes over the data are cyclic, and a pool that put out the oldest would throw away each unit shortly
before it is needed; one that keeps what came first has its share of every pass. Only what other models and data left there makes room.

Whatever is not as it was written is computed again. So a file need not be synced, and may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwdllama.errors import EngineError
from fwdllama.formats import size
from fwdllama.llama.context import Context, States, Tokens
from fwdllama.llama.parcel import DamageError, Parcel, pack
from fwdllama.llama.prompts import key_of

log = logging.getLogger("fwdllama.llama")

FORMAT = 1
UNFINISHED, ABANDONED_S = ".part", 3600  # of a process that was killed, once nobody has written it for so long
RESERVE_BYTES = 1 << 30  # of the disk that stay free

@dataclass(frozen=True)
class Unit:
    """Prompts that are decoded together, and where."""

    rows: Sequence[int]  # sequences of the context
    prompts: Sequence[Tokens]
    behind: Sequence[Tokens]  # with a trunk: the tokens behind each prompt; else empty

    def key(self) -> str:
        """The same for the same tokens in the same order, wherever they are."""
        return key_of((*self.prompts, *self.behind)).hex()


@dataclass(frozen=True)
class Return:
    """When a run returns to a unit: never before it has seen them all. Time tells how many it will see."""

    n_units: int
    seconds: float | None = None  # that training may take; None: not limited

    def expected(self, n_seen: int, elapsed_s: float) -> bool:
        """Whether more units than there are will be seen at the pace of `n_seen` in `elapsed_s`.

        >>> Return(100, 300.0).expected(8, 20.0), Return(100, 300.0).expected(8, 30.0)
        (True, False)
        """
        return self.seconds is None or n_seen * self.seconds > self.n_units * elapsed_s


class PromptPool:
    """Files of units in a folder for one identity, beside those of others, all together within `limit_bytes`.

    `identity` is everything that a cell's bits depend on beside the tokens: model, engine, options of the context. It names the folder.
    """

    def __init__(
        self,
        root: Path,
        identity: Mapping[str, Any],
        limit_bytes: int,
        returns: Return,
        *,
        reserve_bytes: int = RESERVE_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        named = json.dumps({"format": FORMAT, **identity}, sort_keys=True).encode()
        self.root, self.returns, self.clock = root, returns, clock
        self.limit_bytes, self.reserve_bytes = limit_bytes, reserve_bytes
        self.folder = root / hashlib.blake2b(named, digest_size=16).hexdigest()
        self.n_found = self.n_kept = self._n_seen = 0
        self._begun: float | None = None
        self._closed: str | None = None  # why nothing more is added
        if os.access(self.folder, os.W_OK):
            os.utime(self.folder)  # the folder that was used last is put out last
            for file in self.folder.glob(f"*{UNFINISHED}"):
                if _changed_at(file) < time.time() - ABANDONED_S:
                    _remove(file)

    def restore(self, context: Context, unit: Unit) -> list[States] | None:
        """Make the unit's sequences hold its prompts; the states behind each of them, or None where the unit must be computed."""
        self._begun = self.clock() if self._begun is None else self._begun
        self._n_seen += 1
        path = self.folder / unit.key()
        try:
            with Parcel.open(path, unit.prompts) as parcel:
                for i, row in enumerate(unit.rows):
                    context.restore(row, parcel.state(i))
                states = parcel.behind()
        except FileNotFoundError:
            return None
        except (DamageError, EngineError, OSError) as error:
            log.warning("%s is computed again: %s", path, error)
            _remove(path)
            return None
        self.n_found += 1
        return states

    def keep(self, context: Context, unit: Unit, states: Sequence[States]) -> None:
        """Write down what `restore` did not find, once it is computed, if it is expected to be needed and there is room."""
        assert self._begun is not None
        if self._closed or not self.returns.expected(self._n_seen, self.clock() - self._begun):
            return
        path = self.folder / unit.key()
        unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # cells tell much of the text that they come from
            with open(unfinished, "wb") as file:
                whole = pack(file, context, unit.rows, unit.prompts, states, self._has_room)
            if whole:
                os.replace(unfinished, path)
                self.n_kept += 1
            else:
                _remove(unfinished)
        except (OSError, EngineError) as error:
            _remove(unfinished)
            self._close(f"{self.folder} cannot be written ({error})")

    def _has_room(self, n_bytes: int) -> bool:
        """Whether so many bytes can be added; what other identities left makes room."""
        others = sorted((folder for folder in self.root.iterdir() if folder != self.folder), key=_changed_at)
        while others and self._used() + n_bytes > self.limit_bytes:
            shutil.rmtree(others.pop(0), ignore_errors=True)
        if self._used() + n_bytes > self.limit_bytes:
            self._close(f"{self.root} holds {size(self._used())} of {size(self.limit_bytes)}")
        elif shutil.disk_usage(self.folder).free - n_bytes < self.reserve_bytes:
            self._close(f"{self.folder} would leave less than {size(self.reserve_bytes)} of the disk")
        return not self._closed

    def _used(self) -> int:
        return sum(_size_bytes(file) for file in self.root.glob("*/*"))

    def _close(self, reason: str) -> None:
        self._closed = reason
        log.info("no more prompts are kept: %s", reason)


def _size_bytes(path: Path) -> int:
    """Of a file that another process may be moving: then none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
