"""Whether the numbers of a tensor are finite, found by their bits in pieces of a few MiB, whatever the tensor's type.

Of a quantised tensor only the scales can be infinite or not a number; they are looked at where they lie in each block, without
dequantising anything.
"""

from __future__ import annotations

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_tools.errors import FileError
from gguf_tools.header import Buffer, Header, TensorEntry
from gguf_tools.mapping import forget

T = GGMLQuantizationType
PIECE_BYTES = 1 << 22

_PLAIN: dict[GGMLQuantizationType, tuple[str, int]] = {  # all ones in the exponent: infinite or not a number
    T.F32: ("<u4", 0x7F800000),
    T.F16: ("<u2", 0x7C00),
    T.BF16: ("<u2", 0x7F80),
}
# Where the F16 scales of a block begin, in bytes.
_SCALES: dict[GGMLQuantizationType, tuple[int, ...]] = {
    T.Q4_0: (0,), T.Q4_1: (0, 2), T.Q5_0: (0,), T.Q5_1: (0, 2), T.Q8_0: (0,), T.Q1_0: (0,), T.Q2_K: (80, 82), T.Q3_K: (108,),
    T.Q4_K: (0, 2), T.Q5_K: (0, 2), T.Q6_K: (208,), T.IQ1_S: (0,), T.IQ2_XXS: (0,), T.IQ2_XS: (0,), T.IQ2_S: (0,), T.IQ3_XXS: (0,),
    T.IQ3_S: (0,), T.IQ4_NL: (0,), T.IQ4_XS: (0,), T.TQ1_0: (52,), T.TQ2_0: (64,),
}  # fmt: skip


def can_be_scanned(kind: GGMLQuantizationType) -> bool:
    """Whether `first_not_finite` knows the type: floats, and quantised types with F16 scales."""
    return kind in _PLAIN or kind in _SCALES


def first_not_finite(data: Buffer, entry: TensorEntry) -> int | None:
    """The file position of the first infinity or NaN in a tensor, None where there is none.

    Raises:
        KeyError: the type is one of which `can_be_scanned` is False.
    """
    if entry.type in _PLAIN:
        code, exponent = _PLAIN[entry.type]
        return _first(data, entry, code, exponent, np.dtype(code).itemsize, (0,))
    return _first(data, entry, "<u2", 0x7C00, GGML_QUANT_SIZES[entry.type][1], _SCALES[entry.type])


def check_finite(header: Header, name: str, entry: TensorEntry) -> None:
    """Refuse a tensor with an infinity or NaN.

    Raises:
        FileError: it has one.
        KeyError: as `first_not_finite`.
    """
    bad = first_not_finite(header.data, entry)
    if bad is not None:
        raise FileError(f"{header.label}: {name} holds a value that is not finite at byte {bad}.")


def _first(data: Buffer, entry: TensorEntry, code: str, exponent: int, stride: int, places: tuple[int, ...]) -> int | None:
    """The first number of type `code` at one of `places` in every `stride` bytes whose exponent is all ones."""
    end = entry.offset + entry.size_bytes
    step = PIECE_BYTES // stride * stride
    for start in range(entry.offset, end, step):
        count = min(step, end - start) // stride
        found = []
        for place in places:
            numbers = np.ndarray((count,), code, data, start + place, (stride,))
            bad = numbers & exponent == exponent
            if bool(bad.any()):
                found.append(start + place + int(np.argmax(bad)) * stride)
        if found:
            return min(found)
        forget(data, start, count * stride)
    return None
