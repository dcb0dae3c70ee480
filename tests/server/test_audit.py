"""The audit log tells when any of it, or of a ledger, was changed, and where."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fwdllama_server.audit import followed
from fwdllama_server.cli import audit as command

from fwdllama.errors import FwdllamaError, RunError

from .commands import invoked

if TYPE_CHECKING:
    from .conftest import Aggregator

ROUND = {"probes": 8, "most": 8, "probes_per_task": 4}


@pytest.fixture
def folder(aggregator: Aggregator, tmp_path: Path) -> Path:
    """The folder of an aggregator with a run of three rounds and a roll-back."""
    aggregator.create(rounds=3, round=ROUND, evaluation={"every": 1000})
    member = aggregator.member()
    for _ in range(7):
        member.work("toy")
    assert aggregator.admin("POST", "/v1/runs/toy/rollback", {"version": 1}).status_code == 200
    return tmp_path / "aggregator"


def verify(*arguments: object) -> Any:
    return invoked("audit", "verify", *arguments)


def changed(folder: Path, statement: str) -> str:
    """The sentence of `audit verify` after a change of the database."""
    with closing(sqlite3.connect(folder / "aggregator.sqlite")) as connection:
        connection.execute(statement)
        connection.commit()
    error = verify(folder).exception
    assert isinstance(error, FwdllamaError)
    return str(error)


def test_untouched_log_is_whole_and_its_head_is_found_again(folder: Path) -> None:
    first = json.loads(verify(folder, "--json").stdout)
    assert first["records"] > 4
    assert first["entries"] == 4
    assert json.loads(verify(folder, "--head", first["head"], "--json").stdout) == first
    sentence = verify(folder).stdout
    assert sentence == f"{first['records']} records and 4 entries of ledgers follow from each other; the last hash is {first['head']}\n"


def test_changed_row_is_found_and_named(folder: Path, tmp_path: Path) -> None:
    follow = "was changed, or does not follow from the one before it."
    for n, (statement, sentence) in enumerate(
        (
            ("UPDATE audit SET data = '{}' WHERE seq = 2", f"record 2 of the audit log (round-closed) {follow}"),
            ("UPDATE audit SET actor = 'nobody' WHERE seq = 1", f"record 1 of the audit log (token-created) {follow}"),
            ("UPDATE audit SET at = at + 1 WHERE seq = 0", f"record 0 of the audit log (run-created) {follow}"),
            ("DELETE FROM audit WHERE seq = 3", "the audit log has no record 3: it was removed."),
            ("UPDATE entries SET payload = x'00' WHERE number = 1", f"entry 1 of run toy {follow}"),
            ("DELETE FROM entries WHERE number = 3", "the ledger of run toy has 3 entries and does not end where the run is, at version 4."),
        )
    ):
        copy = tmp_path / str(n)
        shutil.copytree(folder, copy)
        assert changed(copy, statement) == sentence


def test_log_that_was_cut_off_lacks_the_head_noted_before(folder: Path) -> None:
    head = json.loads(verify(folder, "--json").stdout)["head"]
    with closing(sqlite3.connect(folder / "aggregator.sqlite")) as connection:
        connection.execute("DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)")
        connection.commit()
    assert verify(folder).exit_code == 0
    error = verify(folder, "--head", head).exception
    assert str(error) == f"no record has the hash {head}: the audit log was rewritten or cut off since that was noted."


def test_ledger_that_was_rewritten_consistently_is_not_the_recorded_one(folder: Path, aggregator: Aggregator) -> None:
    from fwdllama_server.schema import entries, runs

    from fwdllama.ledger import chained

    def rewrite(connection: Any) -> None:
        rows = connection.execute(entries.select().order_by(entries.c.number)).all()
        last = bytes.fromhex(aggregator.admin("GET", "/v1/runs/toy").json()["genesis"])
        for row in rows:
            payload = row.payload[:-1] + bytes([row.payload[-1] ^ 1]) if row.number == 0 else row.payload
            last = chained(last, payload)
            connection.execute(entries.update().where(entries.c.number == row.number).values(payload=payload, hash=last))
        connection.execute(runs.update().values(head=last))

    aggregator.context.store.submit(rewrite).result()
    error = verify(folder).exception
    assert str(error) == "entry 0 of run toy is not the one that the audit log recorded."


def test_log_over_http_is_the_one_in_the_database(folder: Path, aggregator: Aggregator) -> None:
    records = aggregator.admin("GET", "/v1/audit?limit=1000").json()
    hashes = list(followed(map(command._row, records)))
    assert hashes[-1].hex() == json.loads(verify(folder, "--json").stdout)["head"]
    records[2]["data"]["name"] = "other"
    with pytest.raises(RunError, match="record 2 of the audit log"):
        list(followed(map(command._row, records)))


def test_folder_without_a_database_is_one_sentence(tmp_path: Path) -> None:
    error = verify(tmp_path / "nowhere").exception
    assert str(error) == f"{tmp_path / 'nowhere' / 'aggregator.sqlite'} does not exist; is {tmp_path / 'nowhere'} the folder of an aggregator?"
