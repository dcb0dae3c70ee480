"""One version of an adapter as the model server uses it: checked, named, and with the place in a prompt from which it is on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fwdllama.engine import check_base
from fwdllama.types import Scope
from gguf_tools.adapter import Adapter, parse_adapter
from gguf_tools.model import ModelInfo


@dataclass(frozen=True, eq=False)
class Edition:
    """An adapter that fits the base model. `version` is the aggregator's number of it, None for a local file.

    `digest` is the aggregator's of the numbers that are trained, `sha256` that of the file.
    """

    adapter: Adapter
    sha256: str
    version: int | None = None
    digest: str | None = None

    @property
    def scope(self) -> Scope:
        """Where it is on."""
        return self.adapter.scope

    @property
    def name(self) -> str:
        """For people: `version 3`, or the beginning of the file's digest."""
        return f"version {self.version}" if self.version is not None else f"sha256:{self.sha256[:12]}"

    def first_on(self, tokens: Sequence[int]) -> int | None:
        """Index of the first token that is computed with the adapter, None where it stays off.

        With scope `answer` that is where the invocation occurs for the last time, as in training, where it ends the prompt,
        and as llama-server has it; with `all` it is 0.
        """
        if self.scope == "all":
            return 0
        return last_occurrence(tokens, self.adapter.invocation_tokens)

    def fits_in(self, other: Edition) -> bool:
        """Whether its numbers can be written over those of `other` where llama.cpp holds them."""
        mine, theirs = self.adapter, other.adapter
        return mine.alpha == theirs.alpha and _shapes(mine) == _shapes(theirs)


def _shapes(adapter: Adapter) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {name: (a.shape, b.shape) for name, (a, b) in adapter.tensors.items()}


def last_occurrence(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Where `wanted`, which is not empty, begins for the last time in `tokens`.

    >>> last_occurrence([1, 2, 3, 1, 2], [1, 2]), last_occurrence([1], [1, 2])
    (3, None)
    """
    whole, n = tuple(tokens), len(wanted)
    part = tuple(wanted)
    for i in range(len(whole) - n, -1, -1):
        if whole[i] == part[0] and whole[i : i + n] == part:
            return i
    return None


def make_edition(
    data: bytes, label: str, base: ModelInfo, *, version: int | None = None, digest: str | None = None
) -> Edition:
    """An edition from the bytes of an adapter's file, once they are known to be harmless and to fit the base model.

    Raises:
        FileError: llama.cpp could not be given this file; `label` begins the sentence.
        AdapterError: it was trained on another base model.
    """
    adapter = parse_adapter(data, label, base)
    check_base(label, adapter, Path(base.path))
    return Edition(adapter, hashlib.sha256(data).hexdigest(), version, digest)
