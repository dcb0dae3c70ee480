"""The database's revisions: the newest is the schema, older ones are brought up to it with all they hold, newer ones are left alone."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from fwdllama_server.migrations import VERSION_TABLE, head, upgrade
from fwdllama_server.opening import DATABASE, opened, opened_store
from fwdllama_server.schema import audit, metadata, runs

from fwdllama.errors import ResourceError, UsageError


def at_revision(folder: Path, revision: str) -> Path:
    """A database of an earlier release with a run in it."""
    path = folder / DATABASE
    folder.mkdir(exist_ok=True)
    engine = sa.create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        upgrade(connection, revision)
        then = sa.Table("runs", sa.MetaData(), autoload_with=connection)  # as it was at that revision
        values = dict.fromkeys((c.name for c in then.c if not c.nullable), 0)
        values |= {"id": "r1", "name": "old", "spec": "{}", "status": "open", "head": b"h", "theta_digest": "d"}
        connection.execute(then.insert().values(values))
    engine.dispose()
    return path


def test_newest_revision_is_the_schema(tmp_path: Path) -> None:
    store = opened(tmp_path).store
    options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
    found = store.view(lambda c: compare_metadata(MigrationContext.configure(c, opts=options), metadata))
    store.close()
    assert found == []


def test_every_revision_goes_back_as_it_came(tmp_path: Path) -> None:
    from alembic import command
    from fwdllama_server import migrations

    engine = sa.create_engine("sqlite://")
    with engine.begin() as connection:
        upgrade(connection)
        config = migrations._config()
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
        assert sa.inspect(connection).get_table_names() == [VERSION_TABLE]
        upgrade(connection)
    engine.dispose()


def test_older_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = at_revision(tmp_path, "0001")
    with pytest.raises(ResourceError) as refused:
        opened(tmp_path)
    assert str(refused.value) == (
        f"{path} is at revision 0001, and this version of fwdllama needs {head()}; make a backup, then start with --migrate."
    )
    with sqlite3.connect(path) as connection:
        assert connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone() == ("0001",)
    connection.close()


def test_older_database_is_upgraded_with_all_it_holds(tmp_path: Path) -> None:
    at_revision(tmp_path, "0001")
    context = opened(tmp_path, migrate=True)
    names = context.store.view(lambda c: c.execute(sa.select(runs.c.name)).scalars().all())
    indexes = context.store.view(lambda c: {i["name"] for i in sa.inspect(c).get_indexes("events")})
    context.store.close()
    assert (names, indexes) == (["old"], {"ix_events_run_id"})
    opened(tmp_path).store.close()


def test_newer_database_is_refused_whatever_is_asked(tmp_path: Path) -> None:
    path = at_revision(tmp_path, "head")
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    connection.close()
    with pytest.raises(ResourceError) as refused:
        opened(tmp_path, migrate=True)
    assert str(refused.value) == f"{path} is at revision 9999, which this version of fwdllama does not know; install a newer one."


def test_database_that_somebody_else_made_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        connection.execute("CREATE TABLE runs (id INTEGER)")
    connection.close()
    with pytest.raises(ResourceError, match="has tables such as runs that no release of fwdllama made; give another database"):
        opened(tmp_path, migrate=True)


def test_upgrade_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = at_revision(tmp_path, "0001")
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE INDEX ix_events_run_id ON events (at)")  # in the way of revision 0002
    connection.close()
    with pytest.raises(ResourceError, match=r"cannot be used: index ix_events_run_id already exists\.$"):
        opened(tmp_path, migrate=True)
    with sqlite3.connect(path) as connection:
        assert connection.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchone() == ("0001",)
    connection.close()


@pytest.mark.parametrize(
    ("database", "sentence"),
    [
        ("nonsense", "--database is no URL; it must be such as postgresql://user:password@host/name."),
        ("mysql://h/n", "--database is for mysql, but must be for postgresql (or sqlite)."),
        ("sqlite://", "--database names no file; without the option it is in the folder."),
    ],
)
def test_wrong_database_url_is_one_sentence(tmp_path: Path, database: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        opened(tmp_path, database=database)
    assert str(refused.value) == sentence


def test_unreachable_database_is_one_sentence_without_its_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="PostgreSQL's driver is in the extra `postgresql`")
    with pytest.raises(ResourceError) as refused:
        opened(tmp_path, database="postgresql://me:hunter2@127.0.0.1:1/name?connect_timeout=2")
    assert str(refused.value).startswith("postgresql+psycopg://me:***@127.0.0.1:1/name")
    assert "hunter2" not in str(refused.value)
    assert "refused" in str(refused.value)


def test_file_that_is_no_database_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_text("hello" * 1000)
    with pytest.raises(ResourceError) as refused:
        opened(tmp_path)
    assert str(refused.value) == f"{tmp_path / DATABASE} cannot be used: file is not a database."


def test_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as refused:
        opened(tmp_path / "file" / "aggregator")
    assert str(refused.value) == f"{tmp_path / 'file' / 'aggregator'}: cannot be used as the aggregator's folder: Not a directory."


def test_store_is_opened_without_secrets(tmp_path: Path) -> None:
    from fwdllama_server.opening import database_url

    store = opened_store(database_url(tmp_path, None))
    assert store.view(lambda c: c.execute(sa.select(audit)).all()) == []
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [DATABASE]
