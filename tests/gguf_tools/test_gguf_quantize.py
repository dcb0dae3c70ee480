"""Requantised models are what was asked for, appear whole or not at all, and llama.cpp keeps quiet."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_tools.errors import FileError
from gguf_tools.model import read_model_info
from gguf_tools.quantize import quantize_model
from gguf_tools.synth import write_tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("source") / "f32.gguf", n_layers=5)


def tensor_bytes(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize(
    ("kind", "stored", "file_type", "tolerance"),
    [("Q8_0", "Q8_0", 7, 0.03), ("q4_0", "Q4_0", 2, 0.3), ("F16", "F16", 1, 0.003), ("Q5_1", "Q5_1", 9, 0.15)],
)
def test_a_quantised_model_has_the_type_and_says_nearly_the_same(
    kind: str,
    stored: str,
    file_type: int,
    tolerance: float,
    source: Path,
    tmp_path: Path,
    open_llama: Callable[..., Any],
) -> None:
    info = quantize_model(source, tmp_path / "q.gguf", kind, n_threads=1)
    assert (info.path, info.file_type) == (tmp_path / "q.gguf", file_type)
    assert info.tensors["blk.4.ffn_down.weight"] == ((64, 128), stored)
    assert info.tensors["blk.4.ffn_norm.weight"] == ((64,), "F32")
    assert info.size_bytes < source.stat().st_size
    before, after = (open_llama(path).logits(range(5, 40)) for path in (source, info.path))
    assert 0 < np.sqrt(np.mean((after - before) ** 2)) < tolerance  # logits deviate by 0.5 among themselves


def test_an_already_quantised_model_is_requantised_unless_forbidden(source: Path, tmp_path: Path) -> None:
    quantize_model(source, tmp_path / "q8.gguf", "Q8_0", n_threads=1)
    assert quantize_model(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "Q4_0", n_threads=1).quantisation == "Q4_0"
    with pytest.raises(
        FileError, match=r"q8.gguf: cannot be quantised to Q4_1: requantizing from type q8_0 is disabled"
    ):
        quantize_model(tmp_path / "q8.gguf", tmp_path / "no.gguf", "Q4_1", allow_requantize=False, n_threads=1)
    assert {path.name for path in tmp_path.iterdir()} == {"q8.gguf", "q4.gguf"}


def patched(path: Path, old: bytes, new: bytes, target: Path) -> Path:
    """The file with `old` replaced everywhere by `new` of the same length."""
    assert len(old) == len(new)
    assert old in path.read_bytes()
    target.write_bytes(path.read_bytes().replace(old, new))
    return target


def test_what_llama_cpp_refuses_is_reported_in_its_words_and_the_old_target_stays(tmp_path: Path, source: Path) -> None:
    unknown = patched(source, b"llama", b"lloma", tmp_path / "unknown.gguf")
    target = tmp_path / "target.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(
        FileError, match=r"unknown.gguf: cannot be quantised to Q8_0: unknown model architecture: 'lloma'"
    ):
        quantize_model(unknown, target, "Q8_0", n_threads=1, force=True)
    assert target.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"unknown.gguf", "target.gguf"}


@pytest.mark.parametrize(
    ("kind", "where", "sentence"),
    [
        ("Q9_9", "q.gguf", "quantisation type 'Q9_9' is unknown; these can be made: F32, F16"),
        ("IQ2_XXS", "q.gguf", "quantisation type IQ2_XXS has so few bits that it needs importance data; see --imatrix"),
        ("Q8_0", ".", "already exists; give another name, or --force to replace it"),
        ("Q8_0", "gone/q.gguf", "q.gguf: the folder .*gone does not exist; create it first"),
    ],
)
def test_what_cannot_be_written_is_refused(kind: str, where: str, sentence: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=sentence):
        quantize_model(source, tmp_path / where, kind)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_no_model_never_reaches_llama_cpp(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(FileError, match=r"bad.gguf: is GGUF version 0"):
        quantize_model(tmp_path / "bad.gguf", tmp_path / "q.gguf", "Q8_0")


def test_a_model_is_not_quantised_onto_itself(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(FileError, match=r"f32.gguf: is the source as well; the result needs another path"):
        quantize_model(source, source, "Q8_0")
    assert source.read_bytes() == before


QUIETLY = """
import sys
import llama_cpp
from gguf_tools.errors import FileError
from gguf_tools.quantize import quantize_model
quantize_model(sys.argv[1], sys.argv[2], "Q8_0", n_threads=1)
"""

DISK_FULL = """
import resource, sys
from gguf_tools.errors import FileError
from gguf_tools.quantize import quantize_model
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    quantize_model(sys.argv[1], sys.argv[2], "Q8_0", n_threads=1)
except FileError as error:
    print(error)
"""


def run(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )


def test_llama_cpp_prints_nothing(source: Path, tmp_path: Path) -> None:
    result = run(QUIETLY, source, tmp_path / "q.gguf")
    assert (result.stdout, result.stderr) == ("", "")


def test_the_log_goes_where_it_went_before(source: Path, tmp_path: Path) -> None:
    code = QUIETLY + "llama_cpp.llama_model_load_from_file(b'/gone', llama_cpp.llama_model_default_params())"
    assert "/gone" in run(code, source, tmp_path / "q.gguf").stderr


def test_a_full_disk_is_named_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    result = run(DISK_FULL, source, tmp_path / "q.gguf")
    assert "cannot be quantised to Q8_0: the result could not be written; is the disk full?" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by_signal", [True, False])
def test_ctrl_c_and_what_progress_raises_end_the_work_at_once_and_leave_nothing(by_signal: bool, tmp_path: Path) -> None:
    """And the next file can be written again."""
    path = write_tiny_llama(tmp_path / "f32.gguf", n_layers=6, n_embd=128, n_ff=256)
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 5:
            if by_signal:
                signal.raise_signal(signal.SIGINT)
            else:
                raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            quantize_model(path, tmp_path / "q.gguf", "Q8_0", n_threads=1, progress=stop)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [(i, 56) for i in range(1, 6)]
    assert [each.name for each in tmp_path.iterdir()] == ["f32.gguf"]
    assert quantize_model(path, tmp_path / "q.gguf", "Q8_0", n_threads=1).quantisation == "Q8_0"


def test_a_file_that_is_there_is_replaced_only_when_forced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "q.gguf").write_bytes(b"precious")
    with pytest.raises(FileError, match=r"q.gguf: already exists; give another name, or --force to replace it"):
        quantize_model(source, tmp_path / "q.gguf", "Q8_0", n_threads=1)
    assert (tmp_path / "q.gguf").read_bytes() == b"precious"
    quantize_model(source, tmp_path / "q.gguf", "Q8_0", n_threads=1, force=True)
    assert read_model_info(tmp_path / "q.gguf").quantisation == "Q8_0"
