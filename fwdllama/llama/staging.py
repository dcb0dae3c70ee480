"""Staged training, its first pass: every unit goes through the layers below the trained ones, a slice of layers in memory at a time.

A slice's file is cut from the model when its turn comes and deleted when it is over; what leaves it waits on disk for the next one, in
full precision, so that the result does not depend on where slices begin. What leaves the last slice is kept, in half precision unless told
otherwise, for training, which then needs the upper layers only. So the peak of memory is that of the largest slice or of the top, never of the model.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from fwdllama.errors import ResourceError, Stopped
from fwdllama.formats import size
from fwdllama.llama.context import ContextOptions, States
from fwdllama.llama.embedding import Embeddings
from fwdllama.llama.model import ModelOptions
from fwdllama.llama.slice import Slice
from fwdllama.llama.states import Passage, StateStore, Unit, stored_bytes
from fwdllama.types import Staged
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.plan import Part
from gguf_tools.split import extract_layers


@dataclass(frozen=True)
class Stage:
    """What the first pass is to do: where slices begin and end, and how they are computed."""

    model: Path
    boundaries: tuple[int, ...]  # 0, ..., the first trained layer
    options: ContextOptions
    weights: ModelOptions
    n_seq: int  # sequences of a unit

    def needed_bytes(self, units: Sequence[Unit], *, half: bool) -> tuple[int, int]:
        """Bytes on disk that are kept, and at most while they are made."""
        info = read_model_info(self.model)
        n_tokens = sum(unit.n_tokens for unit in units)
        full, kept = (stored_bytes(n_tokens, info.n_embd, half=each) for each in (False, half))
        most = 0
        for first, last in pairwise(self.boundaries):
            before, after = full if first else 0, kept if last == self.boundaries[-1] else full
            most = max(most, before + after + _slice_bytes(info, first, last))
        return kept, most

    def run(
        self,
        store: StateStore,
        units: Sequence[Unit],
        *,
        half: bool,
        on_progress: Callable[[Staged], None] = lambda staged: None,
        stop: Callable[[], bool] = lambda: False,
        free_bytes: int | None = None,
    ) -> int:
        """Put what `store` lacks of `units` into it; returns the tokens that went through. What a stopped pass did is used by the next.

        `free_bytes` is what may be written, None for all that the disk has.

        Raises:
            ResourceError: the disk has no room.
            Stopped: on request.
        """
        missing = store.missing(units)
        if not missing:
            return 0
        info = read_model_info(self.model)
        kept, most = self.needed_bytes(missing, half=half)
        free = shutil.disk_usage(store.folder).free if free_bytes is None else free_bytes
        if most > free:
            raise ResourceError(
                f"{store.folder} needs {size(most)} for what enters layer {store.first} of {sum(unit.n_tokens for unit in missing):,} tokens "
                f"({size(kept)} of it to stay), but {size(free)} are free. Use fewer --steps, or set FWDLLAMA_CACHE to a folder on a larger disk."
            )
        name = hashlib.blake2b(b"".join(unit.key for unit in missing), digest_size=8).hexdigest()

        def passage(layer: int) -> Passage:
            return Passage(store.folder / f"pass-{name}-{layer}.f32", missing, info.n_embd)

        begun = time.monotonic()
        first = max((layer for layer in range(1, store.first) if _is_whole(store, name, layer, passage)), default=0)
        bounds = [first, *(layer for layer in self.boundaries if layer > first)]
        for first, last in pairwise(bounds):
            with ExitStack() as resources:
                if first:
                    source = passage(first)
                    resources.callback(source.close)
                    read: Callable[[int], list[States]] = source.read
                else:
                    embeddings = Embeddings(self.model)
                    resources.callback(embeddings.close)

                    def read(index: int, rows: Embeddings = embeddings) -> list[States]:
                        return [rows.rows(np.array(p + b, np.int32)) for p, b in zip(missing[index].prompts, missing[index].behind, strict=True)]

                target = passage(last) if last < store.first else None
                if target is not None:
                    resources.callback(target.close)
                begin = target.n_complete if target is not None else 0
                part = resources.enter_context(self._slice(store.folder, first, last))
                for index in range(begin, len(missing)):
                    if stop():
                        raise Stopped("Stopped while the layers below the trained ones were computed; the same command goes on where it was.")
                    if target is None and not store.missing([missing[index]]):
                        continue
                    left = part.passed(missing[index].arrays[0], read(index))
                    if target is None:
                        store.add(missing[index], left)
                    else:
                        target.append(left)
                    done = (first + (last - first) * (index + 1) / len(missing)) / store.first
                    on_progress(Staged(first, last, store.first, done, time.monotonic() - begun))
            for path in store.folder.glob(f"pass-{name}-{first}.f32"):
                path.unlink()
        return sum(unit.n_tokens for unit in missing)

    @contextmanager
    def _slice(self, folder: Path, first: int, last: int) -> Iterator[Slice]:
        path = folder / "slice.gguf"
        extract_layers(self.model, path, first, last, vocabulary="none", force=True)
        try:
            with closing(Slice(path, self.options, self.weights, self.n_seq)) as part:
                yield part
        finally:
            path.unlink(missing_ok=True)


def _is_whole(store: StateStore, name: str, layer: int, passage: Callable[[int], Passage]) -> bool:
    """Whether an earlier pass of the same units left what enters `layer`."""
    if not (store.folder / f"pass-{name}-{layer}.f32").exists():
        return False
    found = passage(layer)
    found.close()
    return found.complete


def _slice_bytes(info: ModelInfo, first: int, last: int) -> int:
    return Part.bare(info, first, last).weight_bytes()
