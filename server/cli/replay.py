"""A run's ledger replayed here: what the aggregator serves must come out, bit for bit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fwdllama.errors import RunError
from fwdllama.federation.message import Run, theta_digest
from fwdllama.federation.origin import origin_of
from fwdllama.ledger import Entry, digest, read_page, replay

from . import administrator as a


@dataclass(frozen=True)
class Replay:
    """A version that was made again: its number, entries and probes, theta's digest and the adapter file's."""

    version: int
    n_entries: int
    n_probes: int
    theta_digest: str
    adapter_sha256: str


def replayed(admin: a.Administrator, run: str, version: int | None = None) -> Replay:
    """Fetch the initial adapter and the ledger, and replay it up to `version` (default: the latest).

    Raises:
        RunError: the ledger is no chain, or leads elsewhere than the aggregator says.
    """
    about = Run.model_validate(admin.ask("GET", f"/v1/runs/{a.name(run)}"))
    number = about.version if version is None else version
    entries: list[Entry] = []
    last = genesis = about.spec.genesis()
    if genesis.hex() != about.genesis:
        raise RunError(f"run {run} begins with {about.genesis[:12]}, but its specification gives {genesis.hex()[:12]}.")
    while len(entries) < number:
        page, last = read_page(admin.octets(f"/v1/runs/{about.run}/ledger?from={len(entries)}"), last, len(entries), f"the ledger of {run}")
        entries += page
    entries = entries[:number]
    origin = origin_of(about.spec, admin.octets(f"/v1/blobs/sha256:{about.spec.initial}"))
    theta = replay(origin.theta, entries)
    found = theta_digest(theta)
    said = admin.ask("GET", f"/v1/runs/{about.run}/versions/{number}")["theta_digest"]
    if found != said:
        raise RunError(f"run {run}: replaying {number} entries gives theta {found[:12]}, but the aggregator says {said[:12]}.")
    made = origin.file(theta, number, digest(genesis, entries))
    return Replay(number, len(entries), sum(len(e.seeds) for e in entries), found, hashlib.sha256(made).hexdigest())
