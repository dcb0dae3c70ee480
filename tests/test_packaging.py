"""What `pip install fwdllama` puts on a machine, from a wheel built here without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"fwdllama": "fwdllama", "gguf_tools": "gguf_tools", "eval": "fwdllama_eval", "server": "fwdllama_server"}  # folder -> installed name


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """Names inside the wheel, built from a copy: setuptools leaves a `build/`, and packs what is in it."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    for name in SOURCES:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"  # as pip does, in half of its time
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=checkout, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as contents:
        return frozenset(contents.namelist())


def test_wheel_installs_four_names_and_no_other(members: frozenset[str]) -> None:
    top = {member.split("/")[0] for member in members}
    assert {name for name in top if not name.endswith(".dist-info")} == set(SOURCES.values())


def test_every_file_of_the_packages_is_in_the_wheel(members: frozenset[str]) -> None:
    for folder, installed in SOURCES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"{installed}/{path.relative_to(ROOT / folder).as_posix()}" in members


def test_bundled_data_templates_and_type_marker_are_in_the_wheel(members: frozenset[str]) -> None:
    assert "fwdllama/py.typed" in members
    assert any(member.startswith("fwdllama/bundled/") and member.endswith(".json") for member in members)
    assert any(member.startswith("fwdllama/templates/") and member.endswith(".html") for member in members)
    assert {f"fwdllama_server/dashboard/{name}" for name in ("page.html", "style.css", "main.js", "icon.svg")} <= members
    assert any(member.endswith(".dist-info/licenses/LICENSE") for member in members)


def test_commands_that_the_wheel_promises_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = [*project["scripts"].values(), *project["entry-points"]["fwdllama.commands"].values()]
    program = "\n".join(f"import {module}; assert callable({module}.{function})" for module, _, function in (t.partition(":") for t in promised))
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, fwdllama; print(sorted({'numpy', 'llama_cpp', 'gguf', 'pydantic'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
