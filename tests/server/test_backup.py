"""A backup taken while the aggregator works, restored elsewhere, goes on with every run and knows every device."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fwdllama_server.app import create_app
from fwdllama_server.backup import back_up, restore
from fwdllama_server.limits import Limits
from fwdllama_server.opening import opened
from starlette.testclient import TestClient

from fwdllama.errors import FwdllamaError
from gguf_tools.errors import FileError

if TYPE_CHECKING:
    from .conftest import Aggregator

ROUND = {"probes": 8, "most": 8, "probes_per_task": 4}


def test_restored_aggregator_goes_on_with_every_run(aggregator: Aggregator, tmp_path: Path) -> None:
    from .conftest import Aggregator as Restored

    aggregator.create(rounds=4, round=ROUND, evaluation={"every": 1000, "devices": 1})
    member = aggregator.member()
    for _ in range(4):  # into the second round
        member.work("toy")
    manifest = back_up(tmp_path / "aggregator", tmp_path / "backup.tar", with_secrets=True)
    assert manifest["secrets"] is True
    assert (tmp_path / "backup.tar").stat().st_mode & 0o777 == 0o600
    before = aggregator.admin("GET", "/v1/runs/toy").json()
    member.work("toy")  # after the backup, and not in it
    restore(tmp_path / "backup.tar", tmp_path / "new")
    assert {p.name: p.stat().st_mode & 0o077 for p in (tmp_path / "new").iterdir() if p.suffix != ".sqlite"} == {"admin.key": 0, "device.secret": 0}
    context = opened(tmp_path / "new", limits=Limits(requests_per_s=1000.0))
    context.now = aggregator.clock
    with TestClient(create_app(context)) as client:
        again = Restored(context, client, aggregator.clock)
        assert again.admin("GET", "/v1/runs/toy").json() == before
        member.client = client
        for _ in range(12):
            member.work("toy")
        run = again.admin("GET", "/v1/runs/toy").json()
    context.store.close()
    assert (run["status"], run["version"]) == ("finished", 4)


def test_backup_without_secrets_holds_none_and_says_so(aggregator: Aggregator, tmp_path: Path) -> None:
    folder = tmp_path / "aggregator"
    back_up(folder, tmp_path / "b.tar", with_secrets=False)
    data = (tmp_path / "b.tar").read_bytes()
    assert aggregator.context.secrets.admin.encode() not in data
    with tarfile.open(tmp_path / "b.tar") as archive:
        assert archive.getnames() == ["manifest.json", "aggregator.sqlite"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "device.secret").write_text("kept")
    restore(tmp_path / "b.tar", tmp_path / "new")
    assert (tmp_path / "new" / "device.secret").read_text() == "kept"


def refused(file: Path, folder: Path) -> str:
    with pytest.raises((FwdllamaError, FileError)) as error:
        restore(file, folder)
    assert not (folder / "aggregator.sqlite").exists() or folder.name == "aggregator"
    return str(error.value)


def test_what_is_no_whole_backup_is_refused(aggregator: Aggregator, tmp_path: Path) -> None:
    back_up(tmp_path / "aggregator", tmp_path / "b.tar", with_secrets=True)
    whole = (tmp_path / "b.tar").read_bytes()
    there = f"{tmp_path}/aggregator/aggregator.sqlite exists already; restore into a new folder."
    assert refused(tmp_path / "b.tar", tmp_path / "aggregator") == there
    assert refused(tmp_path / "none.tar", tmp_path / "new") == f"{tmp_path}/none.tar does not exist."
    at = whole.index(b"SQLite format 3") + 200
    for name, data in (("text", b"hello" * 200), ("short", whole[: len(whole) // 2]), ("flipped", whole[:at] + b"\xff" + whole[at + 1 :])):
        (tmp_path / name).write_bytes(data)
        sentence = refused(tmp_path / name, tmp_path / "new")
        assert sentence.startswith(f"{tmp_path / name} is ")
        assert "damaged" in sentence
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "admin.key").write_text("another")
    another = f"{tmp_path}/other/admin.key is not the one in {tmp_path}/b.tar; restore into a new folder."
    assert refused(tmp_path / "b.tar", tmp_path / "other") == another


def test_backup_replaces_nothing_unasked_and_needs_a_database(aggregator: Aggregator, tmp_path: Path) -> None:
    (tmp_path / "b.tar").write_text("mine")
    with pytest.raises(FileError, match="already exists; give another name, or --force to replace it"):
        back_up(tmp_path / "aggregator", tmp_path / "b.tar", with_secrets=False)
    assert (tmp_path / "b.tar").read_text() == "mine"
    back_up(tmp_path / "aggregator", tmp_path / "b.tar", with_secrets=False, force=True)
    with pytest.raises(FwdllamaError) as error:
        back_up(tmp_path, tmp_path / "c.tar", with_secrets=False)
    assert str(error.value) == f"{tmp_path / 'aggregator.sqlite'} does not exist; only SQLite is backed up here (for PostgreSQL use pg_dump)."
