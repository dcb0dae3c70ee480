"""The one exception of this package: a request that is refused, with its HTTP status and a sentence."""

from __future__ import annotations


class Refused(Exception):
    """Why a request is not served. `headers` go with the answer."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers or {}
