"""The messages between devices and aggregator; `docs/protocol.md` explains their order.

Losses travel as JSON numbers of at most seven digits after rounding to float32 (about ten bytes): a slope's noise is thousands of
times larger than what that rounds away.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fwdllama.config import Section
from fwdllama.federation.spec import RunSpec, Sha256

Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Label = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")]  # PostgreSQL stores no NUL, terminals obey the others
Loss = Annotated[float, Field(allow_inf_nan=True)]  # judged by the aggregator, which says which one is wrong


def theta_digest(theta: NDArray[np.float32]) -> str:
    """Hex sha256 of theta's little-endian bytes: what a device checks after catching up, and names in its result."""
    return hashlib.sha256(theta.astype("<f4", copy=False).tobytes()).hexdigest()


class Enrolment(Section):
    """A device introduces itself; the enrolment token is in the Authorization header."""

    name: Label


class Enrolled(Section):
    """What a device keeps; the key signs every later request and is not shown again."""

    device: Identifier
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class CheckIn(Section):
    """How a device is, and what it could work on."""

    base: Sha256  # of its model file
    examples: Count = 0
    memory_bytes: Count | None = None  # free
    battery: Annotated[float, Field(ge=0, le=1)] | None = None
    charging: bool | None = None
    metered: bool | None = None
    resting: bool | None = None  # true: it must not work now, and only says how it is


class Task(Section):
    """Work: evaluate these seeds around version `version` (train), or the held-out examples at it (evaluate; no seeds)."""

    task: Identifier
    run: Identifier
    kind: Literal["train", "evaluate"]
    version: Count  # the number of ledger entries that lead to theta
    theta_digest: Sha256
    seeds: tuple[Seed, ...] = ()
    lease_s: float  # from now; after that another device may be given the same


class Wait(Section):
    """Nothing to do; come back between `least_s` and `most_s` seconds from now. `finished`: never again."""

    least_s: float
    most_s: float
    reason: str
    finished: bool = False


class Assignment(Section):
    """The answer to a check-in: one of the two."""

    task: Task | None = None
    wait: Wait | None = None


def _with_kind(schema: dict[str, Any]) -> None:
    """A default serves Python; on the wire a result must say what it is."""
    schema["required"].append("kind")


class TrainResult(Section, json_schema_extra=_with_kind):
    """Losses of a task's seeds, in their order. Seed i was evaluated on the device's group i % len(examples).

    plus: mean (bounded) loss of the group at theta + eps z. minus: at theta - eps z, one for every seed (two-sided), or at theta, one for every
    group (one-sided). examples: how many each group holds. loss: mean unbounded loss of all of them at theta.
    """

    kind: Literal["train"] = "train"
    theta_digest: Sha256
    plus: Annotated[tuple[Loss, ...], Field(max_length=4096)]
    minus: Annotated[tuple[Loss, ...], Field(max_length=4096)]
    examples: Annotated[tuple[Count, ...], Field(max_length=4096)]
    loss: Loss
    n_tokens: Count


class EvaluateResult(Section, json_schema_extra=_with_kind):
    """Mean loss of the device's held-out examples at a version."""

    kind: Literal["evaluate"] = "evaluate"
    theta_digest: Sha256
    loss: Loss
    n_examples: Annotated[int, Field(ge=0, le=1 << 24)]
    n_tokens: Count


class Delivery(Section):
    """A result, and, where the device goes on, its next check-in in the same request."""

    result: Annotated[TrainResult | EvaluateResult, Field(discriminator="kind")]
    checkin: CheckIn | None = None


class Receipt(Section):
    """The result is stored durably and counted once."""

    duplicate: bool = False  # it had been accepted before
    next: Assignment | None = None


class Snapshot(Section):
    """Theta of a version as a blob: float32, little-endian."""

    version: Count
    sha256: Sha256
    size_bytes: Count


class Run(Section):
    """A run as devices see it."""

    run: Identifier
    status: Literal["open", "paused", "finished"]
    reason: str | None = None
    spec: RunSpec
    genesis: Sha256
    version: Count  # latest
    theta_digest: Sha256
    ledger_bytes: Count
    snapshot: Snapshot | None = None


class Version(Section):
    """One entry of the registry of adapters."""

    run: Identifier
    version: Count
    theta_digest: Sha256
    parent: Count | None
    created_at: float  # seconds since 1970
    n_probes: Count  # of the entry that led here
    n_devices: Count
    loss: float | None = None  # mean training loss of the round that led here, at its parent
    held_out_loss: float | None = None
    n_evaluated: Count = 0  # examples
    tags: tuple[Literal["latest", "best"], ...] = ()
    adapter_sha256: Sha256 | None = None  # of the GGUF, once it was asked for


class Problem(Section):
    """Why a request was refused, in one sentence."""

    detail: str
