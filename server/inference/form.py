"""OpenAI's form of an answer: whole, or chunk by chunk, for completions and for chats."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .exchange import FinishReason
from .schema import Usage

Json = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What all parts of one response have in common. `fingerprint` names the adapter that it was computed with."""

    kind: Literal["completion", "chat"]
    id: str
    created: int
    model: str
    fingerprint: str
    with_usage: bool = False  # in a stream: the last chunk has the usage, and all others say that they have none

    def whole(self, answers: Sequence[tuple[str, FinishReason]], usage: Usage) -> Json:
        """A complete response; `answers` are (text, why it ended)."""
        choices = []
        for index, (text, reason) in enumerate(answers):
            said: Json = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.kind == "chat" else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
        return {**self._head(streamed=False), "choices": choices, "usage": usage.model_dump()}

    def opening(self, index: int) -> Json | None:
        """The chunk that comes before an answer's text: in a chat it says who speaks."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self.kind == "chat" else None

    def piece(self, index: int, text: str) -> Json:
        """A chunk with more text of an answer."""
        return self._chunk(index, {"content": text} if self.kind == "chat" else {"text": text}, None)

    def closing(self, index: int, reason: FinishReason) -> Json:
        """The last chunk of an answer."""
        return self._chunk(index, {} if self.kind == "chat" else {"text": ""}, reason)

    def usage(self, usage: Usage) -> Json:
        """The last chunk of a stream that was asked for the usage."""
        return {**self._head(streamed=True), "choices": [], "usage": usage.model_dump()}

    def _chunk(self, index: int, said: Json, reason: FinishReason | None) -> Json:
        content: Json = {"delta": said} if self.kind == "chat" else said
        choice = {"index": index, **content, "logprobs": None, "finish_reason": reason}
        return {**self._head(streamed=True), "choices": [choice], **({"usage": None} if self.with_usage else {})}

    def _head(self, *, streamed: bool) -> Json:
        name = "text_completion" if self.kind == "completion" else "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model, "system_fingerprint": self.fingerprint}


def event(data: Json | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
