"""Machines described by their /proc and /sys: a server, a phone, a container, and one without either."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fwdllama import doctor
from fwdllama.doctor import Check

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_x86_features_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"cpuinfo": "processor\t: 0\nflags\t\t: fpu avx avx2 avx512_vnni\n"})
    assert doctor.check_cpu_features(tmp_path) == Check("cpu features", True, "AVX2, AVX-512 VNNI")


def test_only_features_of_every_core_count(tmp_path: Path) -> None:
    write(tmp_path, {"cpuinfo": "Features\t: fp asimd asimddp\n\nFeatures\t: fp asimd asimddp i8mm\n"})
    assert doctor.check_cpu_features(tmp_path) == Check("cpu features", True, "dotprod")


def test_cpu_without_fast_kernels_is_reported(tmp_path: Path) -> None:
    write(tmp_path, {"cpuinfo": "flags : fpu sse2\n"})
    check = doctor.check_cpu_features(tmp_path)
    assert not check.ok
    assert check.value == "none that help"
    assert "several times slower" in check.advice


def test_cpu_features_are_unknown_without_proc(tmp_path: Path) -> None:
    check = doctor.check_cpu_features(tmp_path)
    assert check.ok
    assert check.value.startswith("unknown on ")


def test_big_cores_are_those_near_the_highest_clock(tmp_path: Path) -> None:
    clocks = [1800000] * 4 + [2800000] * 3 + [3200000]
    write(tmp_path, {f"devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": f"{c}\n" for i, c in enumerate(clocks)})
    assert doctor.big_cores(tmp_path) == [4, 5, 6, 7]


def test_fewer_threads_are_advised_where_cores_differ(tmp_path: Path) -> None:
    usable = sorted(doctor.usable_cores())
    if len(usable) < 2:
        pytest.skip("needs two cores")
    clocks = dict.fromkeys(usable, "1000000") | {usable[0]: "3000000"}
    write(tmp_path, {f"devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": c for i, c in clocks.items()})
    check = doctor.check_cores(tmp_path)
    assert check.value == f"{len(usable)} usable, 1 fast ({usable[0]})"
    assert check.advice.startswith("use --threads 1:")


def test_cores_of_one_kind_need_no_advice(tmp_path: Path) -> None:
    n_usable = len(doctor.usable_cores())
    assert doctor.check_cores(tmp_path) == Check("cores", True, f"{n_usable} usable")


@pytest.mark.parametrize(("available_kib", "ok"), [(1 << 20, True), ((1 << 20) - 1, False)])
def test_memory_is_what_the_kernel_calls_available(tmp_path: Path, available_kib: int, ok: bool) -> None:
    write(tmp_path, {"meminfo": f"MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\n"})
    check = doctor.check_memory(tmp_path)
    assert check.ok is ok
    assert check.value == "1.0 GiB available of 8.0 GiB"
    assert bool(check.advice) is not ok


def test_memory_is_known_without_proc(tmp_path: Path) -> None:
    available_bytes, total_bytes = doctor.memory_bytes(tmp_path)
    assert 0 < available_bytes <= total_bytes


def test_limit_of_a_parent_group_counts(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", {"self/cgroup": "0::/user.slice/job\n"})
    top = tmp_path / "sys" / "fs" / "cgroup"
    write(top, {"user.slice/memory.max": f"{2 * GIB}\n", "user.slice/job/memory.max": "max\n"})
    assert doctor.cgroup_limit_bytes(proc, tmp_path / "sys") == 2 * GIB
    assert doctor.check_memory_limit(proc, tmp_path / "sys") == Check("memory limit", True, "2.0 GiB")


def test_limit_inside_a_container_is_found_at_the_top(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", {"self/cgroup": "0::/../../docker/abc\n"})
    write(tmp_path / "sys" / "fs" / "cgroup", {"memory.max": f"{GIB // 2}\n"})
    check = doctor.check_memory_limit(proc, tmp_path / "sys")
    assert (check.ok, check.value) == (False, "0.5 GiB")
    assert check.advice == "raise the limit of the container or service to at least 1.0 GiB"


def test_limit_of_the_first_control_group_version_is_read(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", {"self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n"})
    folder = write(tmp_path / "sys" / "fs" / "cgroup" / "memory", {"memory.limit_in_bytes": "9223372036854771712\n"})
    assert doctor.cgroup_limit_bytes(proc, tmp_path / "sys") is None
    write(folder, {"a/memory.limit_in_bytes": f"{3 * GIB}\n"})
    assert doctor.cgroup_limit_bytes(proc, tmp_path / "sys") == 3 * GIB


def test_no_control_groups_is_no_limit(tmp_path: Path) -> None:
    assert doctor.check_memory_limit(tmp_path, tmp_path) == Check("memory limit", True, "none")


def test_termux_is_recognised_and_told_about_its_wake_lock() -> None:
    assert doctor.check_termux({"PREFIX": "/usr"}) == Check("termux", True, "no")
    for environ in ({"TERMUX_VERSION": "0.118"}, {"PREFIX": "/data/data/com.termux/files/usr"}):
        check = doctor.check_termux(environ)
        assert check.value != "no"
        assert "termux-wake-lock" in check.advice


def test_old_python_is_refused() -> None:
    assert doctor.check_python((3, 11, 0)) == Check("python", True, "3.11.0")
    assert doctor.check_python((3, 10, 9)) == Check("python", False, "3.10.9", "install Python 3.11 or later")


def test_disk_is_measured_where_the_cache_will_be_made(tmp_path: Path) -> None:
    check = doctor.check_disk(tmp_path / "not" / "yet")
    assert check.value.endswith(f"GiB free for {tmp_path}/not/yet")
    assert not (tmp_path / "not").exists()


def test_models_that_are_missing_can_be_fetched(tmp_path: Path) -> None:
    assert doctor.check_models(tmp_path) == Check("models", False, "none fetched", "fwdllama model fetch smollm2-135m")
    receipt = '{"sha256": "", "size_bytes": 4, "licence": "mit", "source": ""}'
    write(tmp_path / "models", {"smollm2-135m-int4.gguf": "GGUF", "smollm2-135m-int4.gguf.json": receipt})
    write(tmp_path / "models" / "hf" / "a" / "b", {"c.gguf": "GGUF", "c.gguf.json": receipt})
    assert doctor.check_models(tmp_path) == Check("models", True, "smollm2-135m (int4), hf:a/b/c.gguf")


def test_build_for_another_cpu_is_survived_and_named() -> None:
    check = doctor.check_llama_symbols("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert (check.ok, check.value) == (False, "compiled for another CPU (illegal instruction)")
    assert check.advice == doctor.REBUILD


def test_build_with_another_interface_names_what_is_missing() -> None:
    check = doctor.check_llama_symbols('print(\'["llama_decode", "llama_set_adapters_lora"]\')')
    assert (check.ok, check.value) == (False, "missing: llama_decode, llama_set_adapters_lora")


def test_build_that_does_not_load_gives_the_loader_s_last_word() -> None:
    check = doctor.check_llama_symbols("raise OSError('libllama.so: cannot open shared object file')")
    assert (check.ok, check.value) == (False, "OSError: libllama.so: cannot open shared object file")


def test_the_installed_build_is_the_one_that_is_needed() -> None:
    assert doctor.check_llama_version() == Check("llama-cpp-python", True, doctor.NEEDED_LLAMA_VERSION)
    assert doctor.check_llama_symbols() == Check("llama.cpp functions", True, "all there")


def test_needed_build_is_the_one_that_is_pinned() -> None:
    pinned = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"llama-cpp-python=={doctor.NEEDED_LLAMA_VERSION}"' in pinned


def test_diagnosis_of_this_machine_is_complete_and_changes_nothing(tmp_path: Path) -> None:
    checks = doctor.diagnose(cache_dir=tmp_path, environ=os.environ)
    assert [check.name for check in checks] == [
        "python",
        "llama-cpp-python",
        "llama.cpp functions",
        "cpu features",
        "cores",
        "memory",
        "memory limit",
        "disk",
        "termux",
        "models",
    ]
    assert all(check.value for check in checks)
    assert all(check.advice for check in checks if not check.ok)
    assert checks[0].value == ".".join(map(str, sys.version_info[:3]))
    assert list(tmp_path.iterdir()) == []
