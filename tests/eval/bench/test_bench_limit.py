"""Hard limits of memory: whoever needs more dies, whoever needs less is counted, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fwdllama_eval.bench.child import run
from fwdllama_eval.bench.limit import Limit, Means, limited, uncached
from fwdllama_eval.bench.measure import Bench, BenchError

MIB = 1 << 20
EAT = "import sys; x = bytearray(int(sys.argv[1]) << 20); x[::4096] = bytes(len(x[::4096])); print('whole')"


def eaten(limit: Limit, n_mib: int) -> subprocess.CompletedProcess[str]:
    """A process that touches so many MiB."""
    return subprocess.run([*limit.words, sys.executable, "-S", "-c", EAT, str(n_mib)], capture_output=True, text=True, check=False)


@pytest.fixture(params=["cgroup v1", "cgroup v2", "systemd-run", "RLIMIT_AS"])
def means(request: pytest.FixtureRequest) -> Means:
    try:
        with limited(64 * MIB, means=request.param):
            pass
    except BenchError as error:
        pytest.skip(str(error))
    found: Means = request.param
    return found


def test_under_a_limit_a_small_process_ends_well_and_a_large_one_does_not(means: Means) -> None:
    with limited(100 * MIB, means=means) as limit:
        assert eaten(limit, 20).stdout == "whole\n"
        if limit.group is not None:
            assert 20 * MIB < (limit.peak_bytes() or 0) < 60 * MIB
        assert eaten(limit, 200).returncode != 0
        assert limit.n_killed() == (1 if limit.group is not None else 0)
    assert limit.group is None or not limit.group.exists()


def test_two_limits_at_once_do_not_mix(means: Means) -> None:
    with limited(100 * MIB, means=means) as small, limited(400 * MIB, means=means) as large:
        assert eaten(large, 200).returncode == 0
        assert eaten(small, 200).returncode != 0


def test_a_group_is_removed_also_when_the_block_fails(means: Means) -> None:
    groups = []

    def failing() -> None:
        with limited(100 * MIB, means=means) as limit:
            groups.append(limit.group)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert all(group is None or not group.exists() for group in groups)


def test_what_cannot_be_limited_is_said(tmp_path: Path) -> None:
    sentence = r"memory cannot be limited to 1\.0 MiB here: cgroup v2 cannot be had\."
    with pytest.raises(BenchError, match=sentence), limited(MIB, means="cgroup v2", mounts=tmp_path / "none"):
        pass


def test_a_mount_without_the_memory_controller_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("no folder")
    (tmp_path / "mounts").write_text(f"cgroup2 {tmp_path}/cgroup cgroup2 rw 0 0\n")
    with pytest.raises(BenchError, match="cannot be had"), limited(MIB, means="cgroup v2", mounts=tmp_path / "mounts"):
        pass


def test_a_command_that_needs_more_than_its_limit_is_named_with_it(bench: Bench) -> None:
    assert run(bench, "--version", limit_bytes=1 << 30).limit is not None
    with pytest.raises(BenchError, match=r"`fwdllama --version` ended with .* under a hard limit of 4\.0 MiB by "):
        run(bench, "--version", limit_bytes=4 * MIB)


def test_a_file_out_of_the_cache_is_whole(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(range(256)) * 64)
    uncached(tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == bytes(range(256)) * 64
