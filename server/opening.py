"""Opening an aggregator's folder: its secrets, and its database."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from fwdllama.errors import ResourceError, UsageError

from .auth import Secrets
from .context import Context
from .errors import reason
from .limits import Limits
from .migrations import prepare
from .store import Store

DATABASE = "aggregator.sqlite"
_DRIVER = "psycopg"  # what `postgresql://` means here


def opened(
    folder: Path, *, database: str | None = None, limits: Limits | None = None, model_server: str | None = None, migrate: bool = False
) -> Context:
    """The aggregator of a folder, made on first use; close its `store` when done. `migrate`: bring an older database up to date.

    Raises:
        UsageError: `database` is no URL of a database that can be used.
        ResourceError: the folder or the database cannot be used, or the database is of another version.
    """
    url = database_url(folder, database)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        secrets = Secrets.at(folder)
    except OSError as error:
        raise ResourceError(f"{folder}: cannot be used as the aggregator's folder: {error.strerror or error}.") from error
    return Context(opened_store(url, migrate=migrate), secrets, limits or Limits(), model_server)


def opened_store(url: sa.URL, *, migrate: bool = False) -> Store:
    """A database with its tables, made where there are none; `opened` says what is raised."""
    store = Store(url)
    try:
        store.alone(lambda connection: prepare(connection, named(url), migrate=migrate))
    except sa.exc.SQLAlchemyError as error:
        store.close()
        raise ResourceError(f"{named(url)} cannot be used: {reason(error)}.") from error
    except BaseException:
        store.close()
        raise
    return store


def existing_store(folder: Path, database: str | None) -> Store:
    """A database that was served before; `opened` says what is raised."""
    url = database_url(folder, database)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        raise ResourceError(f"{url.database} does not exist; is {folder} the folder of an aggregator?")
    return opened_store(url)


def database_url(folder: Path, database: str | None) -> sa.URL:
    """Where the database is: in the folder, unless told.

    Raises:
        UsageError: it is no URL, or of a database that is not supported.
    """
    if database is None:
        return sa.URL.create("sqlite", database=str(folder / DATABASE))
    try:
        url = sa.make_url(database)
    except (sa.exc.ArgumentError, ValueError):
        raise UsageError("--database is no URL; it must be such as postgresql://user:password@host/name.") from None
    kind = url.get_backend_name()
    if kind not in ("postgresql", "sqlite"):
        raise UsageError(f"--database is for {kind}, but must be for postgresql (or sqlite).")
    if kind == "sqlite" and not url.database:
        raise UsageError("--database names no file; without the option it is in the folder.")
    if url.drivername == "postgresql":
        url = url.set(drivername=f"postgresql+{_DRIVER}")
    try:
        url.get_dialect().import_dbapi()
    except ImportError:
        raise UsageError("a PostgreSQL database needs a driver: pip install 'fwdllama[postgresql]'.") from None
    except sa.exc.NoSuchModuleError:
        raise UsageError(f"--database asks for the driver {url.get_driver_name()}, which is not known; use postgresql://...") from None
    return url


def named(url: sa.URL) -> str:
    """A database as sentences name it: a file, or a URL without its password."""
    return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
