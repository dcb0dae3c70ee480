"""Opening an aggregator's folder: its secrets, and its database."""

from __future__ import annotations

from pathlib import Path

from .auth import Secrets
from .context import Context
from .limits import Limits
from .schema import metadata
from .store import Store

DATABASE = "aggregator.sqlite"


def opened(folder: Path, *, database: str | None = None, limits: Limits | None = None, model_server: str | None = None) -> Context:
    """The aggregator of a folder, made on first use; close its `store` when done."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    secrets = Secrets.at(folder)
    url = database or f"sqlite:///{folder / DATABASE}"
    store = Store(url)
    store.submit(lambda c: metadata.create_all(c)).result()
    return Context(store, secrets, limits or Limits(), model_server)
