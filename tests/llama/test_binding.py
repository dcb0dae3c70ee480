"""The installed llama.cpp is the one this package was written for, or it is refused by what it lacks."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fwdllama.errors import EngineError, ModelError
from fwdllama.llama.binding import TESTED_VERSION, TensorHead, ggml, layout_is_known, llama, missing_symbols
from fwdllama.llama.model import Model
from gguf_tools.synth import write_tiny_llama

# Prints the class and the sentence of what `llama()` raises.
ASK = """
from fwdllama.errors import EngineError
from fwdllama.llama.binding import llama
try:
    llama()
except EngineError as error:
    print(error)
"""


def asked_of(package: str, tmp_path: Path) -> str:
    """What `llama()` says where the installed `llama_cpp` is a module of this source."""
    (tmp_path / "llama_cpp.py").write_text(package)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.strip()


def test_this_build_is_the_one_that_was_tested_and_has_all_that_training_needs() -> None:
    assert llama().__version__ == TESTED_VERSION
    assert missing_symbols() == []


def test_the_libraries_are_loaded_once() -> None:
    assert llama() is llama()
    assert ggml() is ggml()


def test_the_mirror_of_ggml_tensor_has_the_size_of_this_builds_struct() -> None:
    assert layout_is_known()
    assert ggml().ggml_tensor_overhead() == ctypes.sizeof(TensorHead) + 32  # type: ignore[union-attr]


def test_a_build_that_lacks_functions_is_refused_by_their_names(tmp_path: Path) -> None:
    package = "__version__ = '0.2.90'\ndef llama_decode(): ...\ndef llama_get_logits(): ...\n"
    sentence = asked_of(package, tmp_path)
    assert sentence.startswith(
        f"llama-cpp-python 0.2.90 at {tmp_path / 'llama_cpp.py'} lacks llama_model_load_from_file, "
    )
    assert "llama_set_adapters_lora" in sentence
    assert "llama_decode" not in sentence
    assert sentence.endswith(f". Install version {TESTED_VERSION} of llama-cpp-python.")


@pytest.mark.parametrize("error", ["ImportError", "OSError", "RuntimeError"])
def test_a_build_that_cannot_be_loaded_is_refused_with_the_reason(tmp_path: Path, error: str) -> None:
    sentence = asked_of(f"raise {error}('libllama.so: wrong ELF class')", tmp_path)
    assert sentence == (
        f"llama-cpp-python cannot be loaded (libllama.so: wrong ELF class). Install version {TESTED_VERSION}."
    )


def test_llama_cpp_talks_to_logging_and_never_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "fwdllama.llama")
    path = write_tiny_llama(tmp_path / "other.gguf", architecture="nosucharch")
    with pytest.raises((ModelError, EngineError), match="nosucharch"):
        Model(path).close()
    assert any("nosucharch" in record.getMessage() and record.levelno == logging.ERROR for record in caplog.records)
    assert capfd.readouterr() == ("", "")
