"""Numbers that are not finite are found where they are, in every type: the gguf package's own dequantiser agrees."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from gguf_tools.finite import _SCALES, can_be_scanned, first_not_finite
from gguf_tools.header import TensorEntry

INFINITE = {"F32": (4, 0x7F800000), "F16": (2, 0xFC00), "BF16": (2, 0x7FC0)}


@pytest.mark.parametrize("name", INFINITE)
def test_the_first_of_several_floats_is_found(name: str) -> None:
    width, bits = INFINITE[name]
    data = bytearray(100 * width + 7)
    for i in (41, 63):
        data[7 + i * width : 7 + (i + 1) * width] = bits.to_bytes(width, "little")
    entry = TensorEntry((100,), GGMLQuantizationType[name], 7, 100 * width)
    assert first_not_finite(bytes(data), entry) == 7 + 41 * width
    assert first_not_finite(bytes(len(data)), entry) is None


@pytest.mark.parametrize("kind", _SCALES)
def test_a_scale_that_is_not_finite_is_found_where_dequantising_gives_one(kind: GGMLQuantizationType) -> None:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    n_blocks, bad = 5, 3
    for place in _SCALES[kind]:
        data = np.frombuffer(np.random.default_rng(0).bytes(n_blocks * block_bytes), np.uint8).reshape(n_blocks, block_bytes).copy()
        for other in _SCALES[kind]:
            data[:, other : other + 2] = np.full(n_blocks, 1, "<f2").view(np.uint8).reshape(n_blocks, 2)
        data[bad, place : place + 2] = np.array([np.inf], "<f2").view(np.uint8)
        entry = TensorEntry((n_blocks, block), kind, 0, data.size)
        assert first_not_finite(data.tobytes(), entry) == bad * block_bytes + place
        if kind == GGMLQuantizationType.Q1_0:
            continue  # the gguf package cannot dequantise it
        with np.errstate(invalid="ignore"):
            values = dequantize(data, kind).reshape(n_blocks, block)
        assert [bool(np.isfinite(row).all()) for row in values] == [i != bad for i in range(n_blocks)]


def test_types_without_a_known_scale_are_not_claimed() -> None:
    assert {kind.name for kind in GGMLQuantizationType if not can_be_scanned(kind)} == {
        "I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "IQ1_M", "MXFP4", "NVFP4"
    }  # fmt: skip
