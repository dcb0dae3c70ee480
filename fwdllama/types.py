"""The plain records that everything passes around; this module imports nothing of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Scope = Literal["answer", "all"]


@dataclass(frozen=True)
class Segment:
    """A piece of a prompt. `special` text may contain control tokens such as `<|im_start|>`; a user's own text never may."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Example:
    """One question of whatever kind: `fields` fill a template, `answers` are the accepted ones, the first is trained on.

    `choices` is empty, or the label words of a classification task, among which `answers[0]` is the right one.
    `answers` is empty where a SQuAD v2.0 question has no answer.
    """

    id: str
    fields: Mapping[str, str]
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """An example as the engine sees it, in tokens of one model.

    The adapter of scope `answer` is on from the first token of `invocation`. Losses are taken over `target`: the answer and
    its end token, or, where `choices` is given, over one token among the first tokens of the label words. Examples of one `unit`
    have prompts that begin alike and may share the work on them.
    """

    id: str
    prompt: tuple[int, ...]
    invocation: tuple[int, ...]
    target: tuple[int, ...]
    choices: tuple[int, ...] = ()
    unit: int | None = None

    @property
    def n_tokens(self) -> int:
        """Cells of KV cache that the example occupies while its loss is computed."""
        return len(self.prompt) + len(self.invocation) + len(self.target) - 1


@dataclass(frozen=True)
class Dataset:
    """Examples of one kind, with what was left out of the file and why."""

    kind: Literal["squad", "pairs", "classification"]
    examples: tuple[Example, ...]
    source: str
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Staged:
    """How far the first pass is: layers that are through, of how many, as a fraction of all tokens and layers, and seconds since its begin."""

    first: int  # of the slice in memory
    last: int
    of: int
    done: float  # 0 to 1, of everything
    elapsed_s: float
