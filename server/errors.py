"""The one exception of this package: a request that is refused, with its HTTP status and a sentence. And a database's, in one line."""

from __future__ import annotations


class Refused(Exception):
    """Why a request is not served. `headers` go with the answer."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers or {}


def reason(error: Exception) -> str:
    """Why a database refused, in one line without the statement."""
    text = str(getattr(error, "orig", None) or error)
    return " ".join(text.split("\n")[0].split()).rstrip(".")
