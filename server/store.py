"""The database: durable, one writer at a time wherever it sits, and many requests in one commit.

A commit that survives a power cut costs a few milliseconds of disk, so requests that arrive while one is under way share the next: a thread takes
all that wait, gives each a savepoint, and answers them once the whole is on disk. Several workers share a PostgreSQL database by the same
rule, a lock in place of SQLite's, so that a round never has two writers and nothing can deadlock.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

log = logging.getLogger("fwdllama.server")
T = TypeVar("T")
Act = Callable[[Connection], T]
MOST_IN_ONE_COMMIT = 24
_LOCK = 0x66776C6C  # of this program among a PostgreSQL database's advisory locks
_NOTICES = "fwdllama notices"  # in a connection's `info`


def later(connection: Connection, notice: Callable[[], None]) -> None:
    """Call `notice` once what this act writes is on disk; never, if it is not."""
    connection.info.setdefault(_NOTICES, []).append(notice)


class Store:
    """A database, open. `write` and `read` from any thread; `close` when done."""

    def __init__(self, url: sa.URL) -> None:
        self.url = url
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self._writer = self._engine(writes=True)
        self._reader = self._engine(writes=False)
        self._waiting: queue.SimpleQueue[tuple[Act[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def _engine(self, *, writes: bool) -> Engine:
        if not self.is_sqlite:
            most = {"pool_size": 1, "max_overflow": 0} if writes else {"pool_size": 5, "max_overflow": 10}
            # A read sees one moment, as it does in SQLite: what one statement found must still be there for the next.
            moment = None if writes else "REPEATABLE READ"
            return sa.create_engine(self.url, **most, isolation_level=moment, pool_pre_ping=True, hide_parameters=True)
        engine = sa.create_engine(self.url, connect_args={"check_same_thread": False, "timeout": 30}, hide_parameters=True)

        @sa.event.listens_for(engine, "connect")
        def _connected(connection: Any, record: Any) -> None:
            connection.isolation_level = None  # transactions begin where SQLAlchemy says, not where the driver guesses
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
                connection.execute(f"PRAGMA {pragma}")
            if not writes:
                connection.execute("PRAGMA query_only=ON")

        @sa.event.listens_for(engine, "begin")
        def _began(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return engine

    async def write(self, act: Act[T]) -> T:
        """What `act` returns, once all it wrote is on disk; what it raises, and nothing of it is written."""
        return await asyncio.wrap_future(self.submit(act))

    def submit(self, act: Act[T]) -> Future[T]:
        """`write` for threads."""
        future: Future[T] = Future()
        self._waiting.put((act, future))
        return future

    async def read(self, act: Act[T]) -> T:
        """What `act` reads, in a transaction of its own."""
        return await asyncio.to_thread(self.view, act)

    def view(self, act: Act[T]) -> T:
        """`read` for threads."""
        with self._reader.connect() as connection, connection.begin():
            return act(connection)

    def alone(self, act: Act[T]) -> T:
        """`act` in a write of its own, in this thread: what comes before requests are served."""
        with self._transaction() as connection:
            return act(connection)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            yield connection

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            stop = False
            while len(batch) < MOST_IN_ONE_COMMIT:
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    stop = True
                    break
                batch.append(item)
            self._commit(batch)
            if stop:
                return

    def _commit(self, batch: list[tuple[Act[Any], Future[Any]]]) -> None:
        # From here on nobody can cancel it: a request that goes away now must not end this thread when its answer is set.
        batch = [(act, future) for act, future in batch if future.set_running_or_notify_cancel()]
        done: list[tuple[Future[Any], Any, BaseException | None]] = []
        notices: list[Callable[[], None]] = []
        try:
            with self._transaction() as connection:
                notices = connection.info[_NOTICES] = []
                for act, future in batch:
                    so_far = len(notices)
                    connection.exec_driver_sql("SAVEPOINT act")
                    try:
                        done.append((future, act(connection), None))
                    except sa.exc.OperationalError:
                        raise
                    except Exception as error:  # noqa: BLE001 - it belongs to the request, whose answer it becomes
                        connection.exec_driver_sql("ROLLBACK TO SAVEPOINT act")
                        del notices[so_far:]
                        done.append((future, None, error))
                    connection.exec_driver_sql("RELEASE SAVEPOINT act")
        except Exception as error:
            log.exception("a commit failed")
            done, notices = [(future, None, error) for _, future in batch], []
        for notice in notices:
            notice()
        for future, value, problem in done:
            if problem is None:
                future.set_result(value)
            else:
                future.set_exception(problem)

    def close(self) -> None:
        """Finish what waits, then let go."""
        self._waiting.put(None)
        self._thread.join()
        self._writer.dispose()
        self._reader.dispose()
