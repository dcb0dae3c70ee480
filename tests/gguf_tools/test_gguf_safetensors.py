"""A safetensors file from anywhere is read exactly or refused in one sentence, at once and in little memory."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.errors import FileError
from gguf_tools.safetensors import open_safetensors, safetensors_bytes
from tests.gguf_tools.refusal import check_refusal, peak_bytes

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_of(header: Any, data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**change: Any) -> bytes:
    return file_of({"w": GOOD | change})


def two(first: list[int], second: list[int], n_bytes: int) -> bytes:
    return file_of({"a": GOOD | {"data_offsets": first}, "b": GOOD | {"data_offsets": second}}, bytes(n_bytes))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"is no safetensors file, or truncated: its header claims 0 bytes, but 0 follow"),
    "seven bytes": (bytes(7), r"is no safetensors file, or truncated"),
    "huge header": (file_of({}, length=(1 << 64) - 1), r"header claims 18446744073709551615 bytes, but 26 follow"),
    "header cut": (entry()[:40], r"its header claims \d+ bytes, but 32 follow"),
    "long header": (file_of(b" " * (1 << 25) + b"{}"), r"its header has 33554434 bytes, but at most 33554432 are accepted"),
    "no JSON": (file_of(b"\x80PK"), r"the header: is not JSON"),
    "list": (file_of([]), r"the header: is a JSON list, but must be an object"),
    "deep": (file_of(b'{"a":' + b"[" * 200_000), r"the header: is nested too deeply"),
    "huge number": (file_of(b'{"a":' + b"9" * 5000 + b"}"), r"the header: is not JSON"),
    "twice": (file_of(b'{"a":1,"a":2}'), r"the header: the key 'a' occurs twice"),
    "no entry": (file_of({"w": 5}), r"w is described by 5, but must have dtype, shape and data_offsets"),
    "metadata": (file_of({"__metadata__": {"a": 1}}, b""), r"its __metadata__ must map names to strings"),
    "name": (file_of({"a\nb": GOOD}), r"a tensor name is not printable .* 'a\\nb'"),
    "dtype": (entry(dtype="I64"), r"w is of type 'I64', but F32, F16 and BF16 are read"),
    "dtype a list": (entry(dtype=["F32"]), r"w is of type \['F32'\], but F32"),
    "negative": (entry(shape=[-2, -3]), r"w has shape \[-2, -3\], but must have up to 8 positive dimensions"),
    "empty shape": (entry(shape=[2, 0], data_offsets=[0, 0]), r"w has shape \[2, 0\]"),
    "fraction": (entry(shape=[2.0, 3]), r"w has shape \[2.0, 3\]"),
    "true": (entry(shape=[True, 6]), r"w has shape \[True, 6\]"),
    "product": (entry(shape=[1 << 40, 1 << 40]), r"w lies at bytes 0 to 24, but its shape .* needs 4835703278458516698824704"),
    "size": (entry(shape=[2, 4]), r"w lies at bytes 0 to 24, but its shape \(2, 4\) of F32 needs 32 bytes"),
    "wrong type": (entry(dtype="BF16"), r"of BF16 needs 12 bytes"),
    "one offset": (entry(data_offsets=[0]), r"w has data_offsets \[0\], but must have a beginning and an end"),
    "backwards": (entry(data_offsets=[24, 0]), r"w lies at bytes 24 to 0, but"),
    "far": (entry(data_offsets=[1 << 50, (1 << 50) + 24]), r"w follows a gap"),
    "overlap": (two([0, 24], [8, 32], 32), r"b overlaps another tensor: it begins at byte \d+, but .* end at \d+"),
    "the same bytes": (two([0, 24], [0, 24], 24), r"b overlaps another tensor"),
    "gap": (two([0, 24], [32, 56], 56), r"b follows a gap"),
    "cut": (entry()[:-1], r"is truncated: w ends at byte \d+, but the file has \d+ bytes"),
    "tail": (entry() + b"x", r"1 bytes follow the last tensor, which ends at byte \d+"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_in_one_sentence_at_once_and_in_little_memory(name: str, tmp_path: Path) -> None:
    data, sentence = HOSTILE[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    check_refusal(open_safetensors, path, sentence)


def test_a_claimed_size_is_never_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE["huge header"][0])

    def refused() -> None:
        with pytest.raises(FileError):
            open_safetensors(path)

    assert peak_bytes(refused) < 1 << 20


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"is not a regular file"):
        open_safetensors(tmp_path)
    with pytest.raises(FileError, match=r"x: does not exist"):
        open_safetensors(tmp_path / "x")


def test_values_that_are_not_finite_are_found_in_their_row(tmp_path: Path) -> None:
    values = np.zeros((5, 3), np.float32)
    values[3, 1] = np.nan
    (tmp_path / "x").write_bytes(safetensors_bytes({"w": values}, {}))
    file = open_safetensors(tmp_path / "x")
    assert file.read("w", 0, 3).shape == (3, 3)
    with pytest.raises(FileError, match=r"w holds a value that is not finite in row 3"):
        file.read("w", 2)


@settings(max_examples=20)
@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=6), st.lists(st.integers(1, 4), max_size=3), max_size=4),
    st.dictionaries(st.text(max_size=5).filter(lambda key: key != "format"), st.text(max_size=5), max_size=3),
)
def test_what_is_written_is_read_back(shapes: dict[str, list[int]], metadata: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(safetensors_bytes(arrays, metadata))
        file = open_safetensors(path)
        assert file.metadata == {"format": "pt", **metadata}
        assert {name: file.read(name).tobytes() for name in file.tensors} == {n: a.tobytes() for n, a in arrays.items()}
        assert {name: stored.shape for name, stored in file.tensors.items()} == {n: a.shape for n, a in arrays.items()}


@settings(max_examples=100)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(data: st.DataObject) -> None:
    whole = bytearray(safetensors_bytes({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float32)}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        with suppress(FileError):
            file = open_safetensors(path)
            for name in file.tensors:
                assert file.read(name).shape == file.tensors[name].shape
