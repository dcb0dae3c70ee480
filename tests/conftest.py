"""Where the tests that need real data or a real model find them; both skip, saying so, where there is none. And what holds for all tests."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine makes single examples slow; that is not a fault of the code. Other examples are tried each time, so few a time will do;
# `--hypothesis-profile thorough` tries many.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.register_profile("thorough", settings.get_profile("steady"), max_examples=2000)
settings.load_profile("steady")


gc.disable()  # until everything is collected


def pytest_configure() -> None:
    """Temporary files lie in memory where there is room: the steps of runs wait for the disk, 5 to 20 s of all the time on a busy one."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_collection_finish() -> None:
    """What is there after importing stays to the end; looking through all of it for cycles again and again would take 3 s of a run."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cut models, and all else that is kept for the next run, go to a folder of these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FWDLLAMA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets: FWDLLAMA_DATA, or a sibling folder of the checkout."""
    named = os.environ.get("FWDLLAMA_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets, but {folder} is no folder; set FWDLLAMA_DATA")
    return folder


@pytest.fixture(scope="session")
def model_path() -> Path:
    """A small real base model, as GGUF: FWDLLAMA_MODEL. Tests that use it are marked `model`."""
    named = os.environ.get("FWDLLAMA_MODEL")
    if not named:
        pytest.skip("needs a small real model; set FWDLLAMA_MODEL to a GGUF file")
    path = Path(named)
    if not path.is_file():
        pytest.skip(f"needs a small real model, but FWDLLAMA_MODEL is {path}, which is no file")
    return path
