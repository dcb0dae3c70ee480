"""The writer serves everybody to the end, whoever goes away, and says what happened only once it is on disk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from fwdllama_server.opening import opened
from fwdllama_server.schema import tokens
from fwdllama_server.store import Store, later


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = opened(tmp_path / "aggregator").store
    yield found
    found.close()


def add(connection: sa.Connection, id_: str) -> None:
    connection.execute(tokens.insert().values(id=id_, hash=id_, name="x", created_at=0.0))


def count(store: Store) -> int:
    return int(store.view(lambda c: c.execute(sa.select(sa.func.count()).select_from(tokens)).scalar_one()))


def test_cancelled_write_does_not_stop_the_ones_after_it(store: Store) -> None:
    held, begun = threading.Event(), threading.Event()

    def slow(connection: sa.Connection) -> None:
        begun.set()
        held.wait(10)
        add(connection, "slow")

    async def scenario() -> None:
        running = asyncio.create_task(store.write(slow))
        await asyncio.to_thread(begun.wait, 10)
        waiting = asyncio.create_task(store.write(lambda c: add(c, "waiting")))
        await asyncio.sleep(0)
        for task in (running, waiting):
            task.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        held.set()
        await asyncio.wait_for(store.write(lambda c: add(c, "after")), 10)

    asyncio.run(scenario())
    assert count(store) == 2  # the one that had begun was finished; the one that only waited was not begun


def test_failed_act_leaves_its_neighbours_of_the_same_commit(store: Store) -> None:
    held = threading.Event()
    store.submit(lambda c: held.wait(10))
    first, bad, last = (store.submit(lambda c, name=name: add(c, name)) for name in ("a", "a", "b"))
    held.set()
    first.result(10)
    last.result(10)
    with pytest.raises(sa.exc.IntegrityError):
        bad.result(10)
    assert count(store) == 2


def test_notice_comes_after_the_commit_and_never_of_what_was_undone(store: Store) -> None:
    told: list[int] = []

    def act(connection: sa.Connection, id_: str) -> None:
        later(connection, lambda: told.append(count(store)))
        add(connection, id_)

    store.submit(lambda c: act(c, "a")).result(10)
    assert told == [1]
    with pytest.raises(sa.exc.IntegrityError):
        store.submit(lambda c: act(c, "a")).result(10)
    assert told == [1]


def test_values_of_statements_are_in_no_message(store: Store) -> None:
    store.submit(lambda c: add(c, "hunter2")).result(10)
    with pytest.raises(sa.exc.IntegrityError) as failed:
        store.submit(lambda c: add(c, "hunter2")).result(10)
    assert "hunter2" not in str(failed.value)
