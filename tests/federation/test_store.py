"""What a device keeps survives crashes, is its owner's alone, and belongs to one process and one aggregator."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fwdllama.errors import ResourceError, RunError
from fwdllama.federation.identity import AHEAD, Identity
from fwdllama.federation.message import Enrolled, EvaluateResult, TrainResult
from fwdllama.federation.spool import Pending, Spool
from fwdllama.federation.store import FolderStore, MemoryStore, Store, default_folder

URL = "http://aggregator.test:8080"
ENROLLED = Enrolled(device="d1", key="11" * 32)


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_values_are_replaced_appended_to_and_removed(kind: str, tmp_path: Path) -> None:
    store: Store = MemoryStore() if kind == "memory" else FolderStore(tmp_path)
    assert store.read("a") is None
    store.append("a", b"1")
    store.append("a", b"2")
    assert store.read("a") == b"12"
    store.write("a", b"3")
    assert store.read("a") == b"3"
    store.remove("a")
    store.remove("a")
    assert store.read("a") is None


def test_files_and_folder_are_their_owners_alone(tmp_path: Path) -> None:
    with FolderStore(tmp_path / "device") as store:
        Identity.enrolled(store, URL, ENROLLED).nonce(1.0)
        store.append("blob.part", b"x")
        assert stat.S_IMODE((tmp_path / "device").stat().st_mode) == 0o700
        for name in ("device.json", "nonce", "blob.part"):
            assert stat.S_IMODE((tmp_path / "device" / name).stat().st_mode) == 0o600, name


def test_a_folder_takes_one_process(tmp_path: Path) -> None:
    program = f"from pathlib import Path; from fwdllama.federation.store import FolderStore; FolderStore(Path({str(tmp_path)!r}))"
    with FolderStore(tmp_path):
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"{tmp_path} is in use by another device; give each device of this machine its own --folder." in found.stderr


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"file/x cannot keep a device: Not a directory. Choose another --folder."):
        FolderStore(tmp_path / "file" / "x")


def test_each_address_has_a_folder_of_its_own() -> None:
    folders = {default_folder(url) for url in (URL, URL.replace("http", "https"), URL + "1")}
    assert len(folders) == 3
    assert default_folder(URL).name.startswith("aggregator.test_8080-")


def test_a_device_is_the_same_after_a_restart() -> None:
    store = MemoryStore()
    made = Identity.enrolled(store, URL, ENROLLED)
    found = Identity.load(store, URL)
    assert found is not None
    assert (found.device, found.key) == (made.device, made.key)
    assert Identity.load(MemoryStore(), URL) is None


def test_nonces_grow_across_restarts_and_clocks_set_back() -> None:
    store = MemoryStore()
    used: list[int] = []
    for start_s in (1_000_000.0, 999_000.0, 5.0, 1_000_050.0):
        identity = Identity.load(store, URL) or Identity.enrolled(store, URL, ENROLLED)
        used += [identity.nonce(start_s + i) for i in range(200)]
    assert used == sorted(set(used))


def test_nonces_are_written_once_a_minute_not_once_a_request() -> None:
    class Counting(MemoryStore):
        n = 0

        def write(self, name: str, data: bytes) -> None:
            self.n += 1
            super().write(name, data)

    store = Counting()
    identity = Identity.enrolled(store, URL, ENROLLED)
    before = store.n
    for i in range(1000):
        identity.nonce(i * AHEAD / 1e6 / 1000)
    assert store.n - before <= 2


def test_a_folder_of_another_aggregators_device_is_refused() -> None:
    store = MemoryStore()
    Identity.enrolled(store, URL, ENROLLED)
    with pytest.raises(RunError) as caught:
        Identity.load(store, "http://other")
    assert str(caught.value) == (
        f"This folder belongs to a device of {URL}, not of http://other. Give the device of each aggregator its own --folder."
    )


@pytest.mark.parametrize("name", ["device.json", "nonce"])
@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b'{"url": "x", "device": "d"}'])
def test_a_damaged_identity_is_refused(name: str, data: bytes) -> None:
    if (name, data) == ("nonce", b""):
        return  # as good as none: a crash cannot leave it, and time is far above zero
    store = MemoryStore()
    Identity.enrolled(store, URL, ENROLLED)
    store.write(name, data)
    with pytest.raises(RunError, match=r"is damaged\. Remove the device's folder and enrol again with a token"):
        Identity.load(store, URL)


@pytest.mark.parametrize(
    "result",
    [
        TrainResult(theta_digest="ab" * 32, plus=(1.5, float("inf")), minus=(1.25,), examples=(4,), loss=1.5, n_tokens=9),
        EvaluateResult(theta_digest="ab" * 32, loss=2.5, n_examples=3, n_tokens=4),
    ],
)
def test_a_result_is_kept_until_it_is_cleared(result: TrainResult | EvaluateResult) -> None:
    store = MemoryStore()
    Spool(store).put(Pending("r1", "t1", result))
    assert Spool(store).pending() == Pending("r1", "t1", result)
    Spool(store).clear()
    assert Spool(store).pending() is None


HALF = json.dumps({"run": "r", "task": "t", "result": {"kind": "train"}}).encode()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"run": "r", "task": "t"}', HALF])
def test_a_damaged_result_is_as_good_as_none(data: bytes) -> None:
    store = MemoryStore()
    store.write("result.json", data)
    assert Spool(store).pending() is None
    assert store.values == {}
