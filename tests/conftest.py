"""Where the tests that need real data or a real model find them; both skip, saying so, where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine makes single examples slow; that is not a fault of the code.
settings.register_profile("steady", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


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
