"""Adapters damaged at random are refused by a `FileError` or harmless; no other exception ever comes out."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.adapter import Adapter, adapter_bytes
from gguf_tools.errors import FileError
from gguf_tools.validate import check_adapter


def sample() -> bytes:
    rng = np.random.default_rng(1)
    tensors = {
        f"blk.{i}.{module}.weight": (
            rng.standard_normal((4, 64)).astype(np.float32),
            rng.standard_normal((n_out, 4)).astype(np.float32),
        )
        for i in range(3)
        for module, n_out in (("attn_q", 64), ("attn_v", 32))
    }
    return adapter_bytes(Adapter("llama", 16.0, tensors, "answer", (10, 11), {"fwdllama.base.name": "tiny"}))


SAMPLE = sample()
N_HEADER = SAMPLE.index(b"lora_b", SAMPLE.rindex(b"blk.2.attn_v.weight")) + 64  # nearly all that is not numbers


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, N_HEADER) | st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=3),
    st.none() | st.integers(0, len(SAMPLE)),
    st.none() | st.tuples(st.integers(0, N_HEADER), st.binary(max_size=12)),
)
def test_a_mutated_adapter_passes_or_is_a_file_error(
    flips: list[tuple[int, int]], cut: int | None, inserted: tuple[int, bytes] | None
) -> None:
    data = bytearray(SAMPLE)
    for at, value in flips:
        data[at] = value
    if inserted is not None:
        data[inserted[0] : inserted[0]] = inserted[1]
    message, end = "mutated.gguf: ", 0
    try:
        end = check_adapter(bytes(data[:cut]), "mutated.gguf").end
    except FileError as error:
        message = str(error)
    assert message.startswith("mutated.gguf: ")
    assert end <= len(data[:cut])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_after_the_magic_are_a_file_error(data: bytes) -> None:
    with pytest.raises(FileError):
        check_adapter(b"GGUF" + struct.pack("<I", 3) + data, "random.gguf")
