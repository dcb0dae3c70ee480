"""A device's theta is that of the whole ledger, from wherever it begins, or the task is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwdllama.errors import FederationError, Stopped, Unreachable
from fwdllama.federation.catchup import KEEP_EVERY, Follower, Position
from fwdllama.federation.store import MemoryStore
from tests.federation.made import Archive, client, entry, ledger_of, refusal, spec


def follower(archive: Archive, store: MemoryStore | None = None, **options: Any) -> Follower:
    store = store or MemoryStore()
    return Follower(client(archive.answer, store), store, archive.run(), archive.initial, **options)


def reached(following: Follower, archive: Archive, version: int) -> None:
    theta = following.at(version, archive.digest(version))
    assert theta.tobytes() == archive.theta(version).tobytes()


@st.composite
def _histories(draw: st.DrawFn) -> tuple[list[int | None], list[int]]:
    n = draw(st.integers(1, 14))
    restores = [None, *(draw(st.one_of(st.none(), st.integers(0, i - 1))) for i in range(1, n))]
    stops = sorted(draw(st.lists(st.integers(0, len(restores)), min_size=1, max_size=5)))
    return restores, stops


@settings(max_examples=50)
@given(_histories(), st.integers(1, 5), st.one_of(st.none(), st.integers(0, 14)))
def test_theta_of_every_version_is_that_of_the_whole_ledger_whatever_was_held_restored_or_snapshotted(
    history: tuple[list[int | None], list[int]], page: int, snapshot: int | None
) -> None:
    restores, stops = history
    archive = Archive(ledger_of(restores), page=page, snapshot_at=snapshot if snapshot is not None and snapshot <= len(restores) else None)
    store = MemoryStore()
    following = follower(archive, store)
    for version in stops:
        reached(following, archive, version)
    following.keep()
    again = follower(archive, store)
    assert (again.held.version if again.held else 0) == stops[-1]
    reached(again, archive, len(restores))


def test_going_on_fetches_only_the_entries_that_are_new() -> None:
    archive = Archive(ledger_of([None] * 6))
    following = follower(archive)
    reached(following, archive, 4)
    del archive.asked[:]
    reached(following, archive, 6)
    assert archive.asked == ["/v1/runs/r1/ledger?from=4"]


def test_entries_beyond_the_tasks_version_are_left_for_later() -> None:
    archive = Archive(ledger_of([None] * 6), page=6)
    following = follower(archive)
    reached(following, archive, 3)
    reached(following, archive, 6)


def test_an_entry_that_restores_what_was_before_the_held_theta_starts_over() -> None:
    archive = Archive(ledger_of([None] * 5))
    said: list[str] = []
    following = follower(archive, on_event=said.append)
    reached(following, archive, 5)
    archive.entries += ledger_of([None] * 5 + [1])[5:]
    reached(following, archive, 6)
    assert said == ["catching up from another place: step 5 restores step 1, which is not among steps 5 to 5 of the ledger."]


def test_a_snapshot_is_taken_where_it_is_fewer_bytes_than_the_ledger() -> None:
    archive = Archive(ledger_of([None] * 9, n=50), snapshot_at=8)
    following = follower(archive)
    reached(following, archive, 9)
    assert [path.split(":")[0] for path in archive.asked] == ["/v1/runs/r1", "/v1/blobs/sha256", "/v1/runs/r1/ledger?from=7"]
    archive.entries.append(entry(9))
    reached(following, archive, 10)  # the chain goes on from there


def test_the_ledger_is_taken_where_it_is_fewer_bytes_than_a_snapshot() -> None:
    archive = Archive(ledger_of([None] * 3), spec=spec(4000), snapshot_at=3)
    reached(follower(archive), archive, 3)
    assert [path.split("?")[0] for path in archive.asked] == ["/v1/runs/r1/ledger"] * 2


def test_a_snapshot_that_is_gone_is_no_reason_to_fail() -> None:
    archive = Archive(ledger_of([None] * 9, n=50), snapshot_at=8)

    def without_blobs(request: Any) -> Any:
        return refusal(404, "no such blob.") if "blobs" in request.url.path else archive.answer(request)

    store = MemoryStore()
    reached(Follower(client(without_blobs, store), store, archive.run(), archive.initial), archive, 9)


def test_a_damaged_copy_of_theta_is_ignored() -> None:
    archive = Archive(ledger_of([None] * 4))
    store = MemoryStore()
    following = follower(archive, store)
    reached(following, archive, 4)
    following.keep()
    data = bytearray(store.values["theta-r1"])
    data[60] ^= 1
    store.values["theta-r1"] = bytes(data)
    again = follower(archive, store)
    assert again.held is None
    reached(again, archive, 4)


def test_theta_that_another_run_or_an_older_aggregator_left_is_replaced() -> None:
    archive = Archive(ledger_of([None] * 4))
    store = MemoryStore()
    held = Position(3, bytes(31) + b"x", np.ones(40, np.float32))
    store.write("theta-r1", held.to_bytes())
    reached(follower(archive, store), archive, 4)
    archive.entries = archive.entries[:2]  # restored from an older copy
    reached(follower(archive, store), archive, 2)


def test_theta_is_stored_now_and_then_not_for_every_version() -> None:
    archive = Archive(ledger_of([None] * (KEEP_EVERY + 1)))
    store = MemoryStore()
    following = follower(archive, store)
    for version in range(KEEP_EVERY):
        reached(following, archive, version)
        assert "theta-r1" not in store.values
    reached(following, archive, KEEP_EVERY)
    assert "theta-r1" in store.values


def test_a_ledger_that_leads_elsewhere_than_the_task_says_is_refused() -> None:
    archive = Archive(ledger_of([None] * 3))
    following = follower(archive)
    with pytest.raises(FederationError) as caught:
        following.at(3, "ee" * 32)
    assert str(caught.value) == (
        f"run 'made': version 3 has the digest {archive.digest(3)[:12]} here, but eeeeeeeeeeee at http://aggregator.test:8080. "
        "The ledger does not lead to what the task is about, and nothing is computed for it."
    )
    assert following.held is None


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda data: data[:-1], "the page ends within the frame at byte"),
        (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "does not match its hash"),
        (lambda data: b"", "ends at version 0, but the task is about version 3"),
        (lambda data: b"<html>not a ledger at all</html>", "claims"),
    ],
)
def test_pages_that_are_damaged_are_refused_with_a_sentence(spoil: Any, sentence: str) -> None:
    archive = Archive(ledger_of([None] * 3), spoil=spoil)
    with pytest.raises(FederationError, match=f"run 'made': its ledger cannot be followed.*{sentence}"):
        follower(archive).at(3, archive.digest(3))


def test_a_network_that_fails_on_the_way_changes_nothing() -> None:
    archive = Archive(ledger_of([None] * 6))
    store = MemoryStore()
    following = follower(archive, store)
    reached(following, archive, 2)
    following.client = client(lambda request: refusal(503), store, patience_s=0)
    with pytest.raises(Unreachable):
        following.at(6, archive.digest(6))
    assert following.held is not None
    assert following.held.version == 2
    following.client = client(archive.answer, store)
    reached(following, archive, 6)


def test_a_replay_stops_when_asked() -> None:
    archive = Archive(ledger_of([None] * 3))
    with pytest.raises(Stopped):
        follower(archive, stop=lambda: True).at(3, archive.digest(3))
