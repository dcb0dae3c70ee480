"""Random weights in any tensor type: floats by drawing normals, quantised types by drawing their blocks.

A block of random bytes is valid but for its scales, so those are set, and everything else is left as drawn: LLaMA-7B in Q4_0 takes
seconds, where drawing floats and quantising them takes many minutes. How far such blocks spread is measured once for each type.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from gguf_tools.errors import FileError

T = GGMLQuantizationType
_FLOATS = (T.F32, T.F16, T.BF16)


@dataclass(frozen=True)
class _Scales:
    """Where a block keeps its float16 scale, and, in types whose values have an offset, that and its ratio to the scale.

    The ratio makes the values' mean zero, given that codes, and the small scales within a block, are drawn uniformly.
    """

    scale: int
    offset: int | None = None
    ratio: float = 0.0


_SCALES = {
    T.Q4_0: _Scales(0), T.Q4_1: _Scales(0, 2, -7.5), T.Q5_0: _Scales(0), T.Q5_1: _Scales(0, 2, -15.5), T.Q8_0: _Scales(0),
    T.Q2_K: _Scales(80, 82, 1.5), T.Q3_K: _Scales(108), T.Q4_K: _Scales(0, 2, 7.5), T.Q5_K: _Scales(0, 2, 15.5), T.Q6_K: _Scales(208),
    T.IQ1_S: _Scales(0), T.IQ2_XXS: _Scales(0), T.IQ2_XS: _Scales(0), T.IQ2_S: _Scales(0), T.IQ3_XXS: _Scales(0), T.IQ3_S: _Scales(0),
    T.IQ4_NL: _Scales(0), T.IQ4_XS: _Scales(0), T.TQ1_0: _Scales(52),
}  # fmt: skip

# By name, for options and sentences. Without MXFP4, NVFP4 and IQ1_M, which have no float16 scale, and TQ2_0, which has an invalid code.
RANDOM_TYPES = {kind.name: kind for kind in (*_FLOATS, *_SCALES)}


def random_type(name: str) -> GGMLQuantizationType:
    """The type of a name in any case; int4 is Q4_0 and int8 Q8_0.

    Raises:
        FileError: random weights cannot be made in it.
    """
    kind = RANDOM_TYPES.get({"INT4": "Q4_0", "INT8": "Q8_0"}.get(name.upper(), name.upper()))
    if kind is None:
        raise FileError(f"tensor type {name!r} cannot be made at random; these can: {', '.join(RANDOM_TYPES)}.")
    return kind


def random_values(
    rng: np.random.Generator, n_values: int, kind: GGMLQuantizationType, deviation: float
) -> NDArray[np.uint8]:
    """Bytes of `n_values` random weights, whole blocks, with mean about 0 and standard deviation `deviation`."""
    if kind in _FLOATS:
        values: NDArray[np.float32] = rng.standard_normal(n_values, dtype=np.float32)
        values *= np.float32(deviation)
        return np.ascontiguousarray(quantize(values, kind)).view(np.uint8)
    size, size_bytes = GGML_QUANT_SIZES[kind]
    blocks = _drawn(rng, n_values // size, size_bytes)
    _set_scales(blocks, _SCALES[kind], deviation / _deviation_of_one(kind))
    return blocks.reshape(-1)


def _drawn(rng: np.random.Generator, n_blocks: int, size_bytes: int) -> NDArray[np.uint8]:
    n_words = -(-n_blocks * size_bytes // 8)
    words = rng.integers(0, 1 << 64, n_words, dtype=np.uint64)  # a word at a time: 4 times faster than bytes
    return words.astype("<u8", copy=False).view(np.uint8)[: n_blocks * size_bytes].reshape(n_blocks, size_bytes)


def _set_scales(blocks: NDArray[np.uint8], scales: _Scales, scale: float) -> None:
    """Set every block's scale to `scale`, its sign as drawn where there is no offset, which removes what mean the codes have."""
    low, high = np.array([scale], "<f2").view(np.uint8)
    at = scales.scale
    blocks[:, at] = low
    if scales.offset is None:
        blocks[:, at + 1] &= 0x80
        blocks[:, at + 1] |= high
    else:
        blocks[:, at + 1] = high
        blocks[:, scales.offset : scales.offset + 2] = np.array([scale * scales.ratio], "<f2").view(np.uint8)


@functools.cache
def _deviation_of_one(kind: GGMLQuantizationType) -> float:
    """Standard deviation of random blocks with scale 1, over enough values to know it to about 1 %."""
    blocks = _drawn(np.random.Generator(np.random.Philox(0)), 1 << 9, GGML_QUANT_SIZES[kind][1])
    _set_scales(blocks, _SCALES[kind], 1.0)
    return float(np.sqrt(np.mean(np.square(dequantize(blocks, kind), dtype=np.float64))))
