"""A unit's file: the cells of its prompts, those of a common beginning once.

    magic | BLAKE2b of all that follows the next number | length of the index | a block for each prompt | index

A block is what llama.cpp saves of a sequence without the cells that are an earlier sequence's too, then the states behind the prompt. The questions
of a paragraph share three quarters of their tokens, so a unit of five takes a third of what its sequences hold. No more than one sequence is in
memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from fwdllama.llama.cells import Bytes, Layout, layout_of
from fwdllama.llama.context import Context, States, Tokens
from fwdllama.llama.prompts import plan

MAGIC = b"fwdkv\0\0\1"
DIGEST_BYTES = 16
_HEAD_BYTES = len(MAGIC) + DIGEST_BYTES + 4


class DamageError(Exception):
    """A file is not what was written."""


@dataclass(frozen=True)
class _Block:
    """A prompt's place in the file."""

    start: int
    layout: Layout  # of nothing for an empty prompt
    n_cells: int
    n_shared: int  # of them are the leader's
    leader: int

    @property
    def size_bytes(self) -> int:
        return self.layout.size_bytes(self.n_cells - self.n_shared)


def pack(
    file: BinaryIO,
    context: Context,
    rows: Sequence[int],  # of the context
    prompts: Sequence[Tokens],  # what they hold
    states: Sequence[States],  # behind each; empty without a trunk
    has_room: Callable[[int], bool],
) -> bool:
    """Write a unit into a new file; False where its cells are not understood, or there is no room for so many bytes."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)

    def write(data: bytes) -> None:
        digest.update(data)
        file.write(data)

    file.write(bytes(_HEAD_BYTES))
    literals: list[tuple[int, ...]] = []
    first: Layout | None = None
    for i, leader, n_shared in plan(prompts, range(len(prompts))):
        n_cells = len(prompts[i])
        if not n_cells:
            literals.append((0,))
            continue
        state = context.saved(rows[i])
        layout = layout_of(state, n_cells)
        if layout is None or (first is not None and layout.sections != first.sections):
            return False
        if first is None:
            first = layout
            if not has_room(_expected_bytes(layout, prompts, states)):
                return False
        assert leader <= i
        for literal, section, shape in layout.places(n_cells):
            write(state[literal].tobytes())
            write(state[section].reshape(shape)[:, n_shared:].tobytes())
        literals.append(layout.literals)
        del state  # before the next is asked for: at 7B it may be 100 MB
    for values in states:
        write(np.ascontiguousarray(values, np.float32).tobytes())
    index = {"literals": literals, "sections": first.sections if first else (), "states": [values.shape for values in states]}
    packed = json.dumps(index).encode()
    write(packed)
    file.seek(0)
    file.write(MAGIC + digest.digest() + len(packed).to_bytes(4, "little"))
    return True


def _expected_bytes(layout: Layout, prompts: Sequence[Tokens], states: Sequence[States]) -> int:
    shared = {i: n for i, _, n in plan(prompts, range(len(prompts)))}
    return sum(layout.size_bytes(len(prompt) - shared[i]) for i, prompt in enumerate(prompts)) + sum(values.nbytes for values in states)


class Parcel:
    """A unit's file, open and found to be whole. Use as a context manager."""

    def __init__(self, file: BinaryIO, prompts: Sequence[Tokens]) -> None:
        """Take over an open file; `open` is what closes it when it is damaged."""
        self._file = file
        head = file.read(_HEAD_BYTES)
        n_index = int.from_bytes(head[-4:], "little")
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()  # type: ignore[arg-type]
        if head[:-4] != MAGIC + found:
            raise DamageError("it is not what was written")
        end = os.fstat(file.fileno()).st_size - n_index
        try:
            index: dict[str, Any] = json.loads(self._bytes(end, n_index))
            sections = tuple((int(outer), int(width)) for outer, width in index["sections"])
            self._blocks: list[_Block] = []
            at = _HEAD_BYTES
            for (i, leader, n_shared), literals in zip(plan(prompts, range(len(prompts))), index["literals"], strict=True):
                layout = Layout(tuple(map(int, literals)), sections if len(prompts[i]) else ())
                self._blocks.append(_Block(at, layout, len(prompts[i]), n_shared, leader))
                at += self._blocks[-1].size_bytes
            self._states: list[tuple[int, tuple[int, int]]] = []
            for n_tokens, n_embd in index["states"]:
                self._states.append((at, (int(n_tokens), int(n_embd))))
                at += 4 * int(n_tokens) * int(n_embd)
        except (ValueError, KeyError, TypeError) as error:
            raise DamageError(f"its index cannot be read ({error})") from error
        if at != end:
            raise DamageError(f"it has {end - _HEAD_BYTES} bytes of cells, and its prompts need {at - _HEAD_BYTES}")

    @classmethod
    def open(cls, path: Path, prompts: Sequence[Tokens]) -> Parcel:
        """Open the file of a unit with these prompts.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
            DamageError: it is not what was written, or of other prompts.
        """
        file = open(path, "rb")  # noqa: SIM115 - closed with the parcel
        try:
            return cls(file, prompts)
        except BaseException:
            file.close()
            raise

    def state(self, i: int) -> Bytes:
        """What prompt i's sequence held, as `Context.restore` takes it; empty for an empty prompt."""
        block = self._blocks[i]
        state = np.empty(block.layout.size_bytes(block.n_cells), np.uint8)
        own_places = block.layout.places(block.n_cells - block.n_shared)
        leader = self._blocks[block.leader]
        leader_places = leader.layout.places(leader.n_cells)
        for (literal, section, shape), own, lead in zip(block.layout.places(block.n_cells), own_places, leader_places, strict=True):
            state[literal] = self._array(block.start, own[0], (literal.stop - literal.start,))
            cells = state[section].reshape(shape)
            cells[:, block.n_shared :] = self._array(block.start, own[1], own[2])
            if block.n_shared:
                cells[:, : block.n_shared] = self._array(leader.start, lead[1], lead[2])[:, : block.n_shared]
        return state

    def behind(self) -> list[States]:
        """The states behind each prompt; empty where there is no trunk."""
        return [np.frombuffer(self._bytes(at, 4 * shape[0] * shape[1]), np.float32).reshape(shape) for at, shape in self._states]

    def _array(self, start: int, place: slice, shape: tuple[int, ...]) -> Bytes:
        return np.frombuffer(self._bytes(start + place.start, place.stop - place.start), np.uint8).reshape(shape)

    def _bytes(self, start: int, size: int) -> bytes:
        found = os.pread(self._file.fileno(), size, start) if size else b""
        if len(found) != size:
            raise DamageError("it ends too early")
        return found

    def __enter__(self) -> Parcel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
