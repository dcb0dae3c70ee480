"""The result that was computed and not yet delivered: kept until the aggregator has taken or refused it, whatever happens between."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from fwdllama.federation.message import EvaluateResult, TrainResult
from fwdllama.federation.store import Store

Result = TrainResult | EvaluateResult
_NAME = "result.json"
_RESULT: TypeAdapter[Result] = TypeAdapter(Result)


@dataclass(frozen=True)
class Pending:
    """A result, and the task of which run it answers."""

    run: str
    task: str
    result: Result


class Spool:
    """At most one undelivered result: a device works on one task at a time and takes the next with the delivery of the last."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def put(self, pending: Pending) -> None:
        """Keep a result; on return it survives a crash."""
        held = {"run": pending.run, "task": pending.task, "result": pending.result.model_dump(mode="python")}
        self.store.write(_NAME, json.dumps(held).encode())

    def pending(self) -> Pending | None:
        """What is to be delivered first; a damaged file is as good as none: its task expires and is handed on."""
        data = self.store.read(_NAME)
        if data is None:
            return None
        try:
            held = json.loads(data)
            return Pending(str(held["run"]), str(held["task"]), _RESULT.validate_python(held["result"]))
        except (ValueError, KeyError, TypeError, ValidationError):
            self.store.remove(_NAME)
            return None

    def clear(self) -> None:
        """Forget it: delivered, or refused for good."""
        self.store.remove(_NAME)
