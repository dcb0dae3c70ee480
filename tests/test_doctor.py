"""Machines described by their /proc and /sys: a server, a phone, a container, and one without either."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fwdllama import doctor
from fwdllama.doctor import Check, build, machine, phone
from fwdllama.machine import big_cores, cgroup_limit_bytes, default_threads, memory_bytes, usable_cores

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_x86_features_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"cpuinfo": "processor\t: 0\nflags\t\t: fpu avx avx2 avx512_vnni\n"})
    assert build.check_cpu_features(tmp_path) == Check("cpu features", True, "AVX2, AVX-512 VNNI")


def test_only_features_of_every_core_count(tmp_path: Path) -> None:
    write(tmp_path, {"cpuinfo": "Features\t: fp asimd asimddp\n\nFeatures\t: fp asimd asimddp i8mm\n"})
    assert build.check_cpu_features(tmp_path) == Check("cpu features", True, "dotprod")


def test_cpu_without_fast_kernels_is_reported(tmp_path: Path) -> None:
    write(tmp_path, {"cpuinfo": "flags : fpu sse2\n"})
    check = build.check_cpu_features(tmp_path)
    assert not check.ok
    assert check.value == "none that help"
    assert "several times slower" in check.advice


def test_cpu_features_are_unknown_without_proc(tmp_path: Path) -> None:
    check = build.check_cpu_features(tmp_path)
    assert check.ok
    assert check.value.startswith("unknown on ")


def test_big_cores_are_those_near_the_highest_clock(tmp_path: Path) -> None:
    clocks = [1800000] * 4 + [2800000] * 3 + [3200000]
    write(tmp_path, {f"devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": f"{c}\n" for i, c in enumerate(clocks)})
    assert big_cores(tmp_path) == [4, 5, 6, 7]


def test_fewer_threads_are_advised_where_cores_differ(tmp_path: Path) -> None:
    usable = sorted(usable_cores())
    if len(usable) < 2:
        pytest.skip("needs two cores")
    clocks = dict.fromkeys(usable, "1000000") | {usable[0]: "3000000"}
    write(tmp_path, {f"devices/system/cpu/cpu{i}/cpufreq/cpuinfo_max_freq": c for i, c in clocks.items()})
    check = machine.check_cores(tmp_path)
    assert check.value == f"{len(usable)} usable, 1 fast ({usable[0]})"
    assert check.advice.startswith("use --threads 1:")


def test_cores_of_one_kind_need_no_advice(tmp_path: Path) -> None:
    n_usable = len(usable_cores())
    assert machine.check_cores(tmp_path) == Check("cores", True, f"{n_usable} usable")


@pytest.mark.parametrize(("available_kib", "ok"), [(1 << 20, True), ((1 << 20) - 1, False)])
def test_memory_is_what_the_kernel_calls_available(tmp_path: Path, available_kib: int, ok: bool) -> None:
    write(tmp_path, {"meminfo": f"MemTotal: 8388608 kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\n"})
    check = machine.check_memory(tmp_path)
    assert check.ok is ok
    assert check.value == "1.0 GiB available of 8.0 GiB"
    assert bool(check.advice) is not ok


def test_memory_is_known_without_proc(tmp_path: Path) -> None:
    available_bytes, total_bytes = memory_bytes(tmp_path)
    assert 0 < available_bytes <= total_bytes


def test_limit_of_a_parent_group_counts(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", {"self/cgroup": "0::/user.slice/job\n"})
    top = tmp_path / "sys" / "fs" / "cgroup"
    write(top, {"user.slice/memory.max": f"{2 * GIB}\n", "user.slice/job/memory.max": "max\n"})
    assert cgroup_limit_bytes(proc, tmp_path / "sys") == 2 * GIB
    assert machine.check_memory_limit(proc, tmp_path / "sys") == Check("memory limit", True, "2.0 GiB")


def test_limit_inside_a_container_is_found_at_the_top(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", {"self/cgroup": "0::/../../docker/abc\n"})
    write(tmp_path / "sys" / "fs" / "cgroup", {"memory.max": f"{GIB // 2}\n"})
    check = machine.check_memory_limit(proc, tmp_path / "sys")
    assert (check.ok, check.value) == (False, "0.5 GiB")
    assert check.advice == "raise the limit of the container or service to at least 1.0 GiB"


def test_limit_of_the_first_control_group_version_is_read(tmp_path: Path) -> None:
    proc = write(tmp_path / "proc", {"self/cgroup": "5:cpu,cpuacct:/a\n4:memory:/a\n"})
    folder = write(tmp_path / "sys" / "fs" / "cgroup" / "memory", {"memory.limit_in_bytes": "9223372036854771712\n"})
    assert cgroup_limit_bytes(proc, tmp_path / "sys") is None
    write(folder, {"a/memory.limit_in_bytes": f"{3 * GIB}\n"})
    assert cgroup_limit_bytes(proc, tmp_path / "sys") == 3 * GIB


def test_no_control_groups_is_no_limit(tmp_path: Path) -> None:
    assert machine.check_memory_limit(tmp_path, tmp_path) == Check("memory limit", True, "none")


def test_termux_is_recognised_and_told_of_what_ends_it_in_the_background() -> None:
    assert phone.check_termux({"PREFIX": "/usr"}) == Check("termux", True, "no")
    for environ in ({"TERMUX_VERSION": "0.118"}, {"PREFIX": "/data/data/com.termux/files/usr"}):
        check = phone.check_termux(environ)
        assert check.value != "no"
        assert "Battery: unrestricted" in check.advice


def test_old_python_is_refused() -> None:
    assert build.check_python((3, 11, 0)) == Check("python", True, "3.11.0")
    assert build.check_python((3, 10, 9)) == Check("python", False, "3.10.9", "install Python 3.11 or later")


def test_disk_is_measured_where_the_cache_will_be_made(tmp_path: Path) -> None:
    check = machine.check_disk(tmp_path / "not" / "yet")
    assert check.value.endswith(f"GiB free for {tmp_path}/not/yet")
    assert not (tmp_path / "not").exists()


def test_models_that_are_missing_can_be_fetched(tmp_path: Path) -> None:
    assert machine.check_models(tmp_path) == Check("models", False, "none fetched", "fwdllama model fetch smollm2-135m")
    receipt = '{"sha256": "", "size_bytes": 4, "licence": "mit", "source": ""}'
    write(tmp_path / "models", {"smollm2-135m-int4.gguf": "GGUF", "smollm2-135m-int4.gguf.json": receipt})
    write(tmp_path / "models" / "hf" / "a" / "b", {"c.gguf": "GGUF", "c.gguf.json": receipt})
    assert machine.check_models(tmp_path) == Check("models", True, "smollm2-135m (int4), hf:a/b/c.gguf")


def test_build_for_another_cpu_is_survived_and_named() -> None:
    (check,) = build.check_llama(probe="import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert (check.ok, check.value) == (False, "compiled for another CPU (illegal instruction)")
    assert check.advice == build.REBUILD


def test_build_with_another_interface_names_what_is_missing() -> None:
    check, _ = build.check_llama(probe='print(\'{"missing": ["llama_decode", "llama_set_adapters_lora"], "build": ""}\')')
    assert (check.ok, check.value) == (False, "missing: llama_decode, llama_set_adapters_lora")


def test_build_that_does_not_load_gives_the_loader_s_last_word() -> None:
    (check,) = build.check_llama(probe="raise OSError('libllama.so: cannot open shared object file')")
    assert (check.ok, check.value) == (False, "OSError: libllama.so: cannot open shared object file")


def test_the_installed_build_is_the_one_that_is_needed() -> None:
    assert build.check_llama_version() == Check("llama-cpp-python", True, build.NEEDED_LLAMA_VERSION)
    functions, compiled = build.check_llama()
    assert functions == Check("llama.cpp functions", True, "all there")
    assert compiled.ok
    assert compiled.value


def test_needed_build_is_the_one_that_is_pinned() -> None:
    pinned = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"llama-cpp-python=={build.NEEDED_LLAMA_VERSION}"' in pinned


def test_diagnosis_of_this_machine_is_complete_and_changes_nothing(tmp_path: Path) -> None:
    checks = doctor.diagnose(cache_dir=tmp_path, environ=os.environ)
    assert [check.name for check in checks] == [
        "python",
        "compiler",
        "cmake",
        "llama-cpp-python",
        "llama.cpp functions",
        "llama.cpp build",
        "cpu features",
        "cores",
        "memory",
        "memory limit",
        "disk",
        "clock",
        "termux",
        "battery",
        "temperature",
        "models",
    ]
    assert all(check.value for check in checks)
    assert all(check.advice for check in checks if not check.ok)
    assert checks[0].value == ".".join(map(str, sys.version_info[:3]))
    assert list(tmp_path.iterdir()) == []


INFO = "CPU : NEON = 1 | ARM_FMA = 1 | DOTPROD = 1 | OPENMP = 1 | REPACK = 1 | "


@pytest.mark.parametrize(
    ("flags", "told", "ok", "value", "unused"),
    [
        ("asimd asimddp", INFO, True, "dotprod, repacking, OpenMP", ""),
        ("asimd asimddp i8mm", INFO, True, "dotprod, repacking, OpenMP", "this CPU has i8mm, which"),
        ("asimd asimddp i8mm", "CPU : NEON = 1 | ", False, "nothing that helps", "this CPU has dotprod, i8mm, which"),
        ("fpu avx2 avx512_vnni", "CPU : AVX = 1 | AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | ", True, "AVX2, AVX-512 VNNI", ""),
        ("fpu avx2", "CPU : SSE3 = 1 | ", False, "nothing that helps", "this CPU has AVX2, which"),
    ],
)
def test_a_build_that_leaves_the_cpu_unused_is_told_from_one_that_does_not(
    tmp_path: Path, flags: str, told: str, ok: bool, value: str, unused: str
) -> None:
    write(tmp_path, {"cpuinfo": f"Features : {flags}\n"})
    check = build.check_build(told, tmp_path)
    assert (check.ok, check.value) == (ok, value)
    assert check.advice.startswith(unused)
    assert bool(check.advice) is bool(unused)


def script(folder: Path, name: str, text: str) -> dict[str, str]:
    """An environment in which a command of this name does that, and nothing else is installed."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return {"PATH": str(path.parent)}


def test_compiler_and_cmake_are_found_or_said_to_be_missing(tmp_path: Path) -> None:
    script(tmp_path, "clang++", "echo clang version 21.1.8; echo Target: aarch64")
    environ = script(tmp_path, "cmake", "exit 1") | {"TERMUX_VERSION": "0.118"}
    compiler, cmake = build.check_tools(environ)
    assert compiler == Check("compiler", True, "clang version 21.1.8")
    assert cmake.value == f"{tmp_path}/bin/cmake does not work"
    assert cmake.ok, "llama.cpp is compiled already"
    assert cmake.advice == "to compile llama.cpp anew: pkg install clang cmake ninja"


@pytest.mark.parametrize(
    ("answer", "when", "ok", "value", "advice"),
    [
        ("echo yes", "2026-11-23T12:00", True, "2026-11-23 12:00 UTC, set by the network", ""),
        ("echo no", "2026-11-23T12:00", True, "2026-11-23 12:00 UTC, not set by the network", "switch on automatic date and time (agg"),
        ("exit 1", "2026-11-23T12:00", True, "2026-11-23 12:00 UTC, by whom it is set cannot be told", ""),
        ("echo yes", "1970-01-01T00:03", False, "1970-01-01 00:03 UTC", "that cannot be; switch on automatic date and time: cert"),
        ("echo yes", "2081-05-04T00:00", False, "2081-05-04 00:00 UTC", "that cannot be; "),
    ],
)
def test_a_clock_that_cannot_be_is_refused_and_who_sets_it_is_told(tmp_path: Path, answer: str, when: str, ok: bool, value: str, advice: str) -> None:
    check = machine.check_clock(datetime.fromisoformat(when).replace(tzinfo=UTC), script(tmp_path, "timedatectl", answer))
    assert (check.ok, check.value) == (ok, value)
    assert check.advice.startswith(advice)


def test_a_phone_lacks_its_api_until_its_command_answers(tmp_path: Path) -> None:
    environ = {"TERMUX_VERSION": "0.118", "PATH": str(tmp_path / "bin")}
    assert phone.check_api(environ).value == "no package"
    script(tmp_path, "termux-battery-status", "exit 1")
    assert phone.check_api(environ) == Check("termux:api", False, "does not answer", f"{phone.API}; then start that app once")
    script(tmp_path, "termux-battery-status", "echo '{}'")
    assert phone.check_api(environ) == Check("termux:api", True, "answers")


def test_a_phone_without_a_wake_lock_is_told_where_to_get_it(tmp_path: Path) -> None:
    environ = {"TERMUX_VERSION": "0.118", "PATH": str(tmp_path / "bin")}
    assert phone.check_wake_lock(environ).advice.startswith("pkg install termux-tools")
    script(tmp_path, "termux-wake-lock", "exit 0")
    assert phone.check_wake_lock(environ) == Check("wake lock", True, "taken while training")


def test_battery_and_temperature_are_told_where_they_can_be_read(tmp_path: Path) -> None:
    assert phone.check_battery({}, tmp_path) == Check("battery", True, "none that can be read")
    assert phone.check_battery({"TERMUX_VERSION": "1"}, tmp_path).ok is False
    assert phone.check_temperature(tmp_path).value == "none that can be read"
    battery = {"type": "Battery", "capacity": "21", "status": "Discharging", "temp": "312"}
    write(tmp_path / "sys/class/power_supply/battery", battery)
    write(tmp_path / "sys/class/thermal/thermal_zone3", {"type": "cpu-1-0\n", "temp": "61300\n"})
    check = phone.check_battery({}, tmp_path)
    assert (check.value, check.advice[:12]) == ("21%, on battery", "charge it: b")
    assert phone.check_temperature(tmp_path) == Check("temperature", True, "61 °C (cpu-1-0)")


def test_what_android_hides_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    for name in ("cpuinfo", "meminfo", "self/cgroup", "devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"):
        (tmp_path / name).mkdir(parents=True)  # cannot be read as a file, by root neither
    assert build.check_cpu_features(tmp_path).value == "none that help"
    assert memory_bytes(tmp_path)[1] > 0
    assert cgroup_limit_bytes(tmp_path, tmp_path) is None
    assert big_cores(tmp_path) == []
    assert default_threads(tmp_path) >= 1
