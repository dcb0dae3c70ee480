"""The database's revisions, and how a database is brought to the newest or refused."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect
from sqlalchemy.engine import Connection

from fwdllama.errors import ResourceError

from ..schema import metadata

VERSION_TABLE = "fwdllama_revision"  # of our own name, in case the database serves other programs too


def head() -> str:
    """The newest revision."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def revision_of(connection: Connection) -> str | None:
    """The revision that a database is at; None: it is empty."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Bring a database to a revision, in the transaction that is open: all of it or nothing."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def prepare(connection: Connection, name: str, *, migrate: bool) -> None:
    """Make the tables of an empty database, and with `migrate` bring an older one up to date. name: the database's, for sentences.

    Raises:
        ResourceError: the database is older and `migrate` was not given, newer than this program, or somebody else's.
    """
    at, newest = revision_of(connection), head()
    if at == newest:
        return
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if at is None and (foreign := sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))):
        raise ResourceError(f"{name} has tables such as {foreign[0]} that no release of fwdllama made; give another database.")
    if at is not None and at not in known:
        raise ResourceError(f"{name} is at revision {at}, which this version of fwdllama does not know; install a newer one.")
    if at is not None and not migrate:
        raise ResourceError(
            f"{name} is at revision {at}, and this version of fwdllama needs {newest}; make a backup, then start with --migrate."
        )
    upgrade(connection)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["version_table"] = VERSION_TABLE
    return config
