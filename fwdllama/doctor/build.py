"""Python, the tools that compile llama.cpp, and how it was compiled.

A child process imports llama.cpp: a build made for another CPU dies there with SIGILL, and the doctor must survive to say so.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fwdllama.doctor.check import Check, answered
from fwdllama.doctor.phone import is_termux
from fwdllama.machine import PROC, cpu_features

NEEDED_LLAMA_VERSION = "0.3.36"
REBUILD = "make setup (or: pip install --force-reinstall --no-cache-dir llama-cpp-python==" + NEEDED_LLAMA_VERSION + ")"

# What ggml's quantised kernels are compiled for: as /proc/cpuinfo spells it, as llama.cpp does, and as people do.
KERNELS = (
    ("avx2", "AVX2", "AVX2"),
    ("avx512_vnni", "AVX512_VNNI", "AVX-512 VNNI"),
    ("avx_vnni", "AVX_VNNI", "AVX-VNNI"),
    ("asimddp", "DOTPROD", "dotprod"),
    ("i8mm", "MATMUL_INT8", "i8mm"),
)
NEEDED_FEATURES = ("avx2", "asimddp")
OTHERS = (("REPACK", "repacking"), ("LLAMAFILE", "tinyBLAS"), ("KLEIDIAI", "KleidiAI"), ("OPENMP", "OpenMP"))

PROBE = """
import json
from fwdllama.llama.binding import llama, missing_symbols
print(json.dumps({"missing": missing_symbols(), "build": llama().llama_print_system_info().decode()}))
"""


def check_python(version: tuple[int, ...]) -> Check:
    """Python 3.11 or later."""
    text = ".".join(map(str, version))
    return Check("python", version >= (3, 11), text, "" if version >= (3, 11) else "install Python 3.11 or later")


def check_llama_version() -> Check:
    """llama-cpp-python is installed, and is the one release whose structures this package mirrors."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return Check("llama-cpp-python", False, "not installed", REBUILD)
    ok = version == NEEDED_LLAMA_VERSION
    return Check("llama-cpp-python", ok, version, "" if ok else f"{NEEDED_LLAMA_VERSION} is needed: {REBUILD}")


def check_llama(proc: Path = PROC, probe: str = PROBE) -> list[Check]:
    """The build loads on this CPU, exports every function that the engine calls, and was compiled for what this CPU can do."""
    name = "llama.cpp functions"
    try:
        child = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return [Check(name, False, "did not load within 60 s", REBUILD)]
    if child.returncode == -signal.SIGILL:
        return [Check(name, False, "compiled for another CPU (illegal instruction)", REBUILD)]
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        return [Check(name, False, lines[-1], REBUILD)]
    found = json.loads(child.stdout)
    missing = ", ".join(found["missing"])
    functions = Check(name, False, f"missing: {missing}", REBUILD) if missing else Check(name, True, "all there")
    return [functions, check_build(found["build"], proc)]


def check_build(told: str, proc: Path = PROC) -> Check:
    """What llama.cpp says that it was compiled with (`llama_print_system_info`), against what this CPU has."""
    switches = {name.strip().rpartition(": ")[2].strip() for name, equals, value in (part.partition("=") for part in told.split("|")) if equals}
    here = cpu_features(proc)
    unused = [(flag, label) for flag, word, label in KERNELS if flag in here and word not in switches]
    used = [label for _, word, label in KERNELS if word in switches] + [label for word, label in OTHERS if word in switches]
    value = ", ".join(used) or "nothing that helps"
    if not unused:
        return Check("llama.cpp build", True, value)
    names = ", ".join(label for _, label in unused)
    slow = any(flag in NEEDED_FEATURES for flag, _ in unused)
    return Check("llama.cpp build", not slow, value, f"this CPU has {names}, which the build does not use; compile it here: {REBUILD}")


def check_cpu_features(proc: Path = PROC) -> Check:
    """The instruction sets that make quantised arithmetic fast: AVX2 and its successors, or ARM's dotprod and i8mm."""
    found = cpu_features(proc)
    value = ", ".join(label for flag, _, label in KERNELS if flag in found) or "none that help"
    if not (proc / "cpuinfo").exists():  # macOS: every Apple CPU has dotprod
        return Check("cpu features", True, f"unknown on {platform.system()}")
    ok = any(each in found for each in NEEDED_FEATURES)
    advice = "" if ok else "training works, but several times slower; a CPU with AVX2 or ARM dotprod is better"
    return Check("cpu features", ok, value, advice)


def check_tools(environ: Mapping[str, str]) -> list[Check]:
    """Compiler and cmake. They compile llama.cpp and are not used afterwards, so that they are missed only where it is not there."""
    try:
        importlib.metadata.version("llama-cpp-python")
        compiled = True
    except importlib.metadata.PackageNotFoundError:
        compiled = False
    install = "pkg install clang cmake ninja" if is_termux(environ) else "apt install g++ cmake, or xcode-select --install and brew install cmake"
    checks = []
    for name, commands in (("compiler", ("c++", "clang++", "g++")), ("cmake", ("cmake",))):
        path = next((found for command in commands if (found := shutil.which(command, path=environ.get("PATH")))), None)
        said = None if path is None else answered([path, "--version"])
        if said:
            checks.append(Check(name, True, said.splitlines()[0]))
        else:
            value = "none" if path is None else f"{path} does not work"
            checks.append(Check(name, compiled, value, f"to compile llama.cpp{' anew' if compiled else ''}: {install}"))
    return checks
