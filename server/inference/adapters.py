"""The adapter in llama.cpp's memory, exchanged for the next edition without waiting for the answers that run on it.

There is room for two. Where no answer runs on the current one, the new numbers are written over it; where one does, they go into the
other place, which is current from then on, and the answers that run finish with the old numbers. Only while both are in use does a third
edition wait, the newest of those that arrive.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from fwdllama.errors import EngineError
from fwdllama.llama.adapter import LoadedAdapter
from fwdllama.llama.context import Context
from fwdllama.llama.model import Model

from .edition import Edition

log = logging.getLogger("fwdllama.inference")


@dataclass(eq=False)
class Held:
    """An edition that llama.cpp holds; `n_users` requests run on it. `since` is in seconds since 1970."""

    loaded: LoadedAdapter
    edition: Edition
    since: float
    n_users: int = 0


class Adapters:
    """Used by the engine's thread only, but `current`, `next_edition` and `on_now` may be read anywhere."""

    def __init__(self, model: Model, context: Context) -> None:
        self._model, self._context = model, context
        self.current: Held | None = None
        self.on_now: Held | None = None  # in the context, for the next decode
        self.next_edition: Edition | None = None
        self._other: Held | None = None

    def offer(self, edition: Edition) -> None:
        """Make `edition` the current one as soon as there is room, unless another is offered before."""
        self.next_edition = edition

    def advance(self) -> None:
        """Bring the offered edition in, if there is room; one that llama.cpp refuses is dropped, and the current one stays."""
        edition = self.next_edition
        if edition is None or (_busy(self.current) and _busy(self._other)):
            return
        self.next_edition = None
        before = self.current
        place = self._other if _busy(before) else before
        try:
            held = self._placed(edition, place)
        except EngineError as error:
            log.warning("%s was refused, and %s stays on: %s", edition.name, before.edition.name if before else "no adapter", error)
            return
        if place is not before:
            self._other = before
        self.current = held
        log.info("adapter %s is on from the next request on", edition.name)

    def _placed(self, edition: Edition, place: Held | None) -> Held:
        """`edition` in llama.cpp's memory, in place of an idle one where there is one."""
        if place is not None and edition.fits_in(place.edition):
            pairs = edition.adapter.tensors.items()
            place.loaded.update({f"{name}.lora_{half}": x for name, pair in pairs for half, x in zip("ab", pair, strict=True)})
            place.edition, place.since = edition, time.time()
            return place
        held = Held(LoadedAdapter(self._model, edition.adapter), edition, time.time())
        if place is not None:
            self._drop(place)
        return held

    def switch(self, held: Held | None) -> None:
        """Compute later decodes with `held`, or with the base model alone. Costs nothing where it is so already."""
        if held is self.on_now:
            return
        if self.on_now is not None:
            self.on_now.loaded.attach(self._context, False)  # each believes that it is alone, so never two at a time
            self.on_now = None
        if held is not None:
            held.loaded.attach(self._context, True)
            self.on_now = held

    def _drop(self, held: Held) -> None:
        if self.on_now is held:
            self.switch(None)
        held.loaded.close()

    def close(self) -> None:
        """Free both; before the context and the model are closed."""
        for held in (self.current, self._other):
            if held is not None:
                self._drop(held)
        self.current = self._other = None


def _busy(held: Held | None) -> bool:
    return held is not None and held.n_users > 0
