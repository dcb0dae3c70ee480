"""`fwdllama audit`: whether the records of what was done are whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from fwdllama.errors import RunError, UsageError

from . import administrator as a
from .serve import Database


def register(app: typer.Typer) -> None:
    """Add `audit verify`."""
    group = typer.Typer(help="The log of every administrative act and every round.")

    @group.command("verify")
    def verify_command(
        folder: Annotated[Path, typer.Argument(help="The aggregator's folder.")] = Path("aggregator"),
        database: Database = None,
        url: Annotated[
            str | None, typer.Option(help="Ask a running aggregator instead; its ledgers are not read then.", metavar="URL")
        ] = None,
        key_file: a.KeyFile = None,
        head: Annotated[
            str | None, typer.Option(help="A hash that an earlier verification ended with: it must still be there.", metavar="HASH")
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a sentence.")] = False,
    ) -> None:
        """Follow the audit log and every ledger from their beginnings, hash by hash; exit code 1 and the place where one was changed.

        Note the hash that it ends with somewhere else: with --head it tells whether anything up to there was rewritten or cut off.
        """
        try:
            import sqlalchemy as sa

            from .. import schema
            from ..audit import check_ledgers, followed
            from ..opening import existing_store
        except ModuleNotFoundError as error:
            raise UsageError(f"the aggregator's records need {error.name}: pip install 'fwdllama[server]'.") from error
        n_entries = None
        if url is not None:
            with a.administrator(url, key_file) as admin:
                n, last = _ended(followed(map(_row, admin.pages("/v1/audit", "from", "seq"))), head)
        else:
            store = existing_store(folder, database)
            try:
                ordered = sa.select(schema.audit).order_by(schema.audit.c.seq).execution_options(yield_per=1000)
                n, last = store.view(lambda c: _ended(followed(c.execute(ordered)), head))
                n_entries = store.view(check_ledgers)
            finally:
                store.close()
        if as_json:
            typer.echo(json.dumps({"records": n, "entries": n_entries, "head": last.hex()}))
        else:
            ledgers = "" if n_entries is None else f" and {n_entries} entries of ledgers"
            typer.echo(f"{n} records{ledgers} follow from each other; the last hash is {last.hex()}")

    app.add_typer(group, name="audit")


def _row(record: dict[str, Any]) -> SimpleNamespace:
    """A record as it was hashed."""
    return SimpleNamespace(**{**record, "data": json.dumps(record["data"], sort_keys=True), "hash": bytes.fromhex(record["hash"])})


def _ended(hashes: Iterable[bytes], head: str | None) -> tuple[int, bytes]:
    n, last, seen = 0, bytes(32), head is None
    for last in hashes:
        n += 1
        seen = seen or last.hex() == head
    if not seen:
        raise RunError(f"no record has the hash {head}: the audit log was rewritten or cut off since that was noted.")
    return n, last
