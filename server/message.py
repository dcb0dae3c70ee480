"""The messages between administrators and the aggregator; those of devices are in `fwdllama.federation.message`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fwdllama.config import Section
from fwdllama.federation.message import Label


class Rollback(Section):
    """The version to go back to."""

    version: Annotated[int, Field(ge=0, lt=1 << 31)]


class NewToken(Section):
    """An enrolment token to be made. uses: None for any number; expires_s: None for never."""

    name: Label = "devices"
    uses: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    expires_s: Annotated[float, Field(gt=0, le=1e9)] | None = None


class Token(Section):
    """An enrolment token; `token` itself is told once, when it is made."""

    id: str
    name: str
    uses_left: int | None
    expires_at: float | None
    created_at: float
    revoked_at: float | None = None
    token: str | None = None


class Device(Section):
    """A device and what it has done."""

    device: str
    name: str
    enrolled_at: float
    last_seen: float
    revoked_at: float | None
    battery: float | None
    charging: bool | None
    memory_bytes: int | None
    n_results: int
    n_probes: int
    n_refused: int
    n_wasted: int


class Progress(Section):
    """Where the open round stands, in probes, and the run's totals."""

    run: str
    status: str
    version: int
    probes: int
    wanted: int
    leased: int
    deadline: float
    n_probes: int
    n_results: int
    n_refused: int
    n_wasted: int
    best_version: int | None
    best_loss: float | None


class Record(Section):
    """A record of the audit log."""

    seq: int
    at: float
    actor: str
    act: str
    data: dict[str, Any]
    hash: str


class Round(Section):
    """A closed round."""

    round: int
    closed_at: float
    duration_s: float | None = None
    n_probes: int
    n_wanted: int | None = None
    n_devices: int
    n_results: int | None = None
    loss: float | None = None
    gradient_rms: float | None = None
    lr: float | None = None
    restored: int | None = None  # the version that a roll-back went to
