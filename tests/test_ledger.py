"""A run is its ledger: replayed bit for bit, cut after a crash, and refused when a single byte of it changed."""

from __future__ import annotations

import hashlib
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwdllama.errors import ResourceError, RunError
from fwdllama.ledger import MAX_ENTRIES, Entry, Ledger, digest, read_ledger, replay
from tests.reference import stepped

GENESIS = hashlib.sha256(b"a run").digest()
OTHER = hashlib.sha256(b"another run").digest()
PAIRS = st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.floats(-10, 10, width=32)), max_size=5)


def entry(step: int, *pairs: tuple[int, float]) -> Entry:
    return Entry(step, np.array([s for s, _ in pairs], np.uint64), np.array([c for _, c in pairs], np.float32))


STEPS = [entry(0, (1, 0.5), ((1 << 64) - 1, -0.25)), entry(1), entry(2, (3, 1e-3), (4, 2.0), (5, -7.0))]


@st.composite
def runs(draw: st.DrawFn) -> list[Entry]:
    return [entry(step, *pairs) for step, pairs in enumerate(draw(st.lists(PAIRS, max_size=6)))]


def written(path: Path, steps: list[Entry]) -> Path:
    ledger = Ledger.create(path, GENESIS)
    for step in steps:
        ledger.append(step)
    return path


def assert_same(left: list[Entry], right: list[Entry]) -> None:
    assert [e.payload() for e in left] == [e.payload() for e in right]


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """Every write past n_bytes fails half done, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@given(runs(), st.integers(0, 6), st.integers(1, 130))
def test_replaying_two_parts_in_turn_is_replaying_the_whole_bit_for_bit(
    run: list[Entry], cut: int, n_params: int
) -> None:
    theta = np.linspace(-2, 2, n_params, dtype=np.float32)
    whole = replay(theta, run)
    assert replay(replay(theta, run[:cut]), run[cut:]).tobytes() == whole.tobytes()


@given(runs())
def test_replay_is_every_step_redone_one_number_at_a_time(run: list[Entry]) -> None:
    theta = np.linspace(-2, 2, 70, dtype=np.float32)
    expected = theta.tolist()
    for step in run:
        expected = stepped(expected, step.seeds.tolist(), step.coefficients.tolist())
    assert replay(theta, run).tobytes() == np.array(expected, np.float32).tobytes()


def test_a_ledger_read_from_disk_replays_to_the_same_bits(tmp_path: Path) -> None:
    theta = np.linspace(-2, 2, 70, dtype=np.float32)
    assert replay(theta, read_ledger(written(tmp_path / "l", STEPS))).tobytes() == replay(theta, STEPS).tobytes()


def test_the_file_of_a_ledger_is_the_documented_bytes(tmp_path: Path) -> None:
    """Written out by hand, because other programs read it."""
    frame = bytes.fromhex("00000000 01000000 0cb89edd 0807060504030201 0000803e")
    expected = b"FWDLEDG1" + GENESIS + frame + hashlib.sha256(GENESIS + frame).digest()
    assert written(tmp_path / "l", [entry(0, (0x0102030405060708, 0.25))]).read_bytes() == expected


@settings(max_examples=20)  # each step of each is synced to disk
@given(run=runs())
def test_what_was_appended_is_what_is_read(tmp_path_factory: pytest.TempPathFactory, run: list[Entry]) -> None:
    path = written(tmp_path_factory.mktemp("ledger") / "l", run)
    assert_same(read_ledger(path, GENESIS), run)
    assert_same(read_ledger(path), run)


def test_the_digest_names_the_run_and_is_where_the_ledger_stands(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "l", GENESIS)
    for n, step in enumerate(STEPS, 1):
        ledger.append(step)
        assert (ledger.n_steps, ledger.last) == (n, digest(GENESIS, STEPS[:n]))
    assert ledger.last == (tmp_path / "l").read_bytes()[-32:]
    assert digest(OTHER, STEPS) != digest(GENESIS, STEPS)
    assert digest(GENESIS, [entry(0, (1, 0.5)), entry(1)]) != digest(GENESIS, [entry(0, (1, 0.75)), entry(1)])
    assert digest(GENESIS, []) == GENESIS


def test_a_ledger_continues_after_it_was_opened_again(tmp_path: Path) -> None:
    path = written(tmp_path / "l", STEPS[:1])
    for n in (1, 2):
        ledger = Ledger.open(path, GENESIS)
        assert (ledger.n_steps, ledger.last) == (n, digest(GENESIS, STEPS[:n]))
        ledger.append(STEPS[n])
    assert_same(read_ledger(path, GENESIS), STEPS)
    assert path.read_bytes() == written(tmp_path / "at once", STEPS).read_bytes()


def test_a_last_frame_torn_at_any_byte_is_cut_off_and_written_anew(tmp_path: Path) -> None:
    whole = written(tmp_path / "l", STEPS).read_bytes()
    kept = len(written(tmp_path / "first two", STEPS[:2]).read_bytes())
    path = tmp_path / "torn"
    for n_bytes in range(kept, len(whole)):
        path.write_bytes(whole[:n_bytes])
        assert_same(read_ledger(path, GENESIS), STEPS[:2])
        assert len(path.read_bytes()) == n_bytes, "reading must not change the file"
        ledger = Ledger.open(path, GENESIS)
        assert (ledger.n_steps, path.stat().st_size) == (2, kept)
        ledger.append(STEPS[2])
        assert path.read_bytes() == whole


def test_opening_a_whole_ledger_does_not_change_it(tmp_path: Path) -> None:
    path = written(tmp_path / "l", STEPS)
    before = path.read_bytes()
    Ledger.open(path, GENESIS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_any_byte_of_a_whole_ledger_is_refused_and_nothing_is_lost(tmp_path: Path, bit: int) -> None:
    whole = written(tmp_path / "l", STEPS).read_bytes()
    path = tmp_path / "flipped"
    accepted = []
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        try:
            Ledger.open(path, GENESIS)
            accepted.append(at)
        except RunError:
            assert path.read_bytes() == data, "a refusal must not change the file"
    assert accepted == [], f"bytes {accepted} of {len(whole)} may change unnoticed"


def test_damage_is_told_apart_from_a_crash_by_where_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "l", STEPS)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    at = len(written(tmp_path / "first two", STEPS[:2]).read_bytes())
    sentence = f"{path}: step 2 at byte {at} does not match its hash. The file is damaged; restore it from a copy."
    with pytest.raises(RunError, match=f"^{re.escape(sentence)}$"):
        read_ledger(path)


def test_a_ledger_of_another_run_is_refused_by_both_names(tmp_path: Path) -> None:
    path = written(tmp_path / "l", STEPS)
    mine, theirs = OTHER.hex()[:12], GENESIS.hex()[:12]
    sentence = f"{path} belongs to another model or configuration: its genesis is {theirs}, not {mine}."
    for read in (read_ledger, Ledger.open):
        with pytest.raises(RunError, match=f"^{re.escape(sentence)}$"):
            read(path, OTHER)


def test_frames_in_another_order_are_refused(tmp_path: Path) -> None:
    """With hashes that chain, as only a program could write them."""
    data, last = b"FWDLEDG1" + GENESIS, GENESIS
    for step in (STEPS[0], STEPS[2]):
        last = hashlib.sha256(last + step.payload()).digest()
        data += step.payload() + last
    (tmp_path / "l").write_bytes(data)
    with pytest.raises(RunError, match=r"step 2 at byte 108 stands where step 1 belongs\.$"):
        read_ledger(tmp_path / "l")


@pytest.mark.parametrize("data", [b"", b"FWDLEDG1", b"FWDLEDG2" + bytes(32), b"GGUF" + bytes(100)])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "l").write_bytes(data)
    sentence = f"{tmp_path / 'l'} is not a ledger: it must begin with FWDLEDG1 and a hash."
    with pytest.raises(RunError, match=f"^{re.escape(sentence)}$"):
        read_ledger(tmp_path / "l")


def test_a_missing_ledger_is_refused_with_the_systems_reason(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"l: the ledger cannot be read \(No such file or directory\)\.$"):
        Ledger.open(tmp_path / "l", GENESIS)


def test_a_ledger_is_never_begun_over_another_file(tmp_path: Path) -> None:
    path = written(tmp_path / "l", STEPS)
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"l exists already: a ledger is only ever appended to\.$"):
        Ledger.create(path, GENESIS)
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_step_that_is_not_the_next_one_is_refused(tmp_path: Path, step: int) -> None:
    ledger = Ledger.open(written(tmp_path / "l", STEPS[:1]), GENESIS)
    with pytest.raises(RunError, match=rf"l: step {step} cannot follow 1 recorded steps\.$"):
        ledger.append(entry(step))
    assert_same(read_ledger(ledger.path), STEPS[:1])


@pytest.mark.parametrize(
    "bad",
    [
        Entry(0, np.array([1, 2], np.uint64), np.array([0.5], np.float32)),
        Entry(0, np.array([1], np.uint64), np.array([np.nan], np.float32)),
        Entry(0, np.array([1], np.uint64), np.array([np.inf], np.float32)),
        Entry(0, np.zeros(MAX_ENTRIES + 1, np.uint64), np.zeros(MAX_ENTRIES + 1, np.float32)),
    ],
    ids=["more seeds than coefficients", "nan", "infinite", "too many"],
)
def test_a_step_that_could_not_be_read_or_replayed_is_never_written(tmp_path: Path, bad: Entry) -> None:
    ledger = Ledger.create(tmp_path / "l", GENESIS)
    with pytest.raises(RunError, match="step 0"):
        ledger.append(bad)
    ledger.append(STEPS[0])
    assert_same(read_ledger(ledger.path), STEPS[:1])


@pytest.mark.parametrize("then", [STEPS[2], entry(2)], ids=["the same step", "a smaller step"])
def test_an_append_that_failed_half_way_can_be_tried_again(tmp_path: Path, then: Entry) -> None:
    path = written(tmp_path / "l", STEPS[:2])
    ledger = Ledger.open(path, GENESIS)
    with largest_file(path.stat().st_size + 70), pytest.raises(ResourceError, match=r"l: step 2 cannot be written \("):
        ledger.append(STEPS[2])
    ledger.append(then)
    assert path.read_bytes() == written(tmp_path / "at once", [*STEPS[:2], then]).read_bytes()
