"""The header of a GGUF file, parsed within bounds: what every reader here stands on.

The reader of the `gguf` package raises whatever its slices happen to raise, reads vocabularies element by element (seconds for a large
one) and can be made to allocate absurdly. So the header is parsed here, every length compared with the bytes that are left before it is
used, and string arrays skipped, not built: 20 ms for 50,000 tokens.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from gguf_tools.errors import FileError

Buffer = bytes | mmap.mmap
Scalar = int | float | bool | bytes

_CODES: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_INTEGERS = frozenset(_CODES) - {GGUFValueType.FLOAT32, GGUFValueType.FLOAT64, GGUFValueType.BOOL}
_MAX_NAME = 63  # bytes; llama.cpp's GGML_MAX_NAME less the terminating zero


@dataclass(frozen=True)
class Limits:
    """How large a file of one kind may be; past these it is refused before any more of it is read."""

    n_keys: int
    n_tensors: int
    header_bytes: int
    file_bytes: int


MODEL_LIMITS = Limits(n_keys=10_000, n_tensors=100_000, header_bytes=1 << 28, file_bytes=1 << 44)
ADAPTER_LIMITS = Limits(n_keys=1_000, n_tensors=8_000, header_bytes=1 << 21, file_bytes=1 << 32)


@dataclass(frozen=True)
class Array:
    """A metadata array left where it is: `offset` is the file position of its first element."""

    type: GGUFValueType
    count: int
    offset: int


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is: `shape` in numpy order (n_out, n_in), `offset` from the beginning of the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """A parsed header; arrays can be read only while `data` is open."""

    label: str
    data: Buffer
    values: Mapping[str, tuple[GGUFValueType, Scalar | Array]]
    tensors: Mapping[str, TensorEntry]
    end: int  # of the last tensor, or of the header where there are none

    def _wrong(self, key: str, wanted: str) -> FileError:
        found = self.values[key][0].name
        return FileError(f"{self.label}: the metadata value {key} is of type {found}, but must be {wanted}.")

    def text(self, key: str) -> str | None:
        """The string at `key`, None where the key is absent.

        Raises:
            FileError: it is no string, or not UTF-8.
        """
        value = self.values.get(key, (None, None))[1]
        if value is None:
            return None
        if not isinstance(value, bytes):
            raise self._wrong(key, "a string")
        return _decoded(value, f"{self.label}: the metadata value {key}")

    def number(self, key: str) -> int | None:
        """The integer at `key`, of any width, None where the key is absent.

        Raises:
            FileError: it is no integer.
        """
        kind, value = self.values.get(key, (None, None))
        if kind is None:
            return None
        if kind not in _INTEGERS or not isinstance(value, int):
            raise self._wrong(key, "an integer")
        return value

    def numbers(self, key: str) -> list[int] | None:
        """The integers of the array at `key`; None where the key is absent or a single value.

        Raises:
            FileError: it is an array of something else.
        """
        value = self.values.get(key, (None, None))[1]
        if not isinstance(value, Array):
            return None
        if value.type not in _INTEGERS:
            raise self._wrong(key, f"an array of integers, not of {value.type.name}")
        return list(struct.unpack_from(f"<{value.count}{_CODES[value.type]}", self.data, value.offset))

    def strings(self, key: str) -> Iterator[bytes]:
        """The elements of the string array at `key`, none where there is no such array."""
        value = self.values.get(key, (None, None))[1]
        if isinstance(value, Array) and value.type == GGUFValueType.STRING:
            at = value.offset
            for _ in range(value.count):
                (length,) = struct.unpack_from("<Q", self.data, at)
                yield self.data[at + 8 : at + 8 + length]
                at += 8 + length


def _decoded(value: bytes, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{where} is not UTF-8 text (byte {error.start} of it).") from None


class _Cursor:
    """A position that cannot leave the header."""

    def __init__(self, data: Buffer, label: str, end: int) -> None:
        self.data, self.label, self.end, self.at = data, label, end, 0

    def wrong(self, sentence: str) -> FileError:
        return FileError(f"{self.label}: {sentence}")

    def skip(self, n_bytes: int, what: str) -> int:
        """Move past `n_bytes` and return where they began."""
        start = self.at
        if n_bytes > self.end - start:
            whole = self.end == len(self.data)
            why = "the file is truncated or damaged" if whole else "the header is larger than allowed"
            raise self.wrong(f"{what} at byte {start} needs {n_bytes} bytes, but {self.end - start} are left; {why}.")
        self.at = start + n_bytes
        return start

    def read(self, code: str, what: str) -> int | float | bool:
        value: int | float | bool
        (value,) = struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}"), what))
        return value

    def integer(self, code: str, what: str) -> int:
        return int(self.read(code, what))

    def string(self, what: str) -> bytes:
        start = self.skip(self.integer("Q", f"the length of {what}"), what)
        return self.data[start : self.at]

    def count(self, n_most: int, n_bytes_each: int, what: str) -> int:
        """An element count, refused where that many cannot follow."""
        start = self.at
        n = self.integer("Q", f"the number of {what}")
        fits = (self.end - self.at) // n_bytes_each
        if n > n_most:
            raise self.wrong(f"claims {n} {what} at byte {start}, but at most {n_most} are accepted.")
        if n > fits:
            raise self.wrong(f"claims {n} {what} at byte {start}, but at most {fits} can follow; the file is truncated or damaged.")
        return n

    def value(self, key: str) -> tuple[GGUFValueType, Scalar | Array]:
        kind = self._type(key)
        if kind == GGUFValueType.STRING:
            return kind, self.string(f"the metadata value {key}")
        if kind != GGUFValueType.ARRAY:
            return kind, self.read(_CODES[kind], f"the metadata value {key}")
        element = self._type(key)
        if element == GGUFValueType.ARRAY:
            raise self.wrong(f"the metadata value {key} is an array of arrays, which GGUF does not allow.")
        size = 8 if element == GGUFValueType.STRING else struct.calcsize(f"<{_CODES[element]}")
        array = Array(element, self.count(1 << 63, size, f"elements of {key}"), self.at)
        if element == GGUFValueType.STRING:
            self._skip_strings(array.count, key)
        else:
            self.skip(array.count * size, f"the metadata value {key}")
        return kind, array

    def _type(self, key: str) -> GGUFValueType:
        raw = self.integer("I", f"the type of {key}")
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise self.wrong(f"the metadata value {key} has type {raw}, which GGUF lacks.") from None

    def _skip_strings(self, count: int, key: str) -> None:
        at, end, data, length = self.at, self.end, self.data, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                break
            at += 8 + length(data, at)[0]  # may leave the file: Python's integers do not overflow
        self.skip(at - self.at if at <= end else len(data) + 1, f"the metadata value {key}")

    def name(self, what: str, n_most: int) -> str:
        """A key or tensor name: short and printable, so that it can be shown, and compared as C compares it."""
        start = self.at
        n = self.integer("Q", f"the length of {what}")
        if not 1 <= n <= n_most:
            raise self.wrong(f"{what} at byte {start} is {n} bytes long, but must have 1 to {n_most}.")
        name = _decoded(self.data[self.skip(n, what) : self.at], f"{self.label}: {what} at byte {start}")
        if not name.isprintable():
            raise self.wrong(f"{what} at byte {start} holds control characters: {name!r}.")
        return name


def parse_header(data: Buffer, label: str, limits: Limits) -> Header:
    """Read a GGUF header; every tensor it lists lies inside the file, in order, aligned and without gaps.

    Raises:
        FileError: anything else.
    """
    cursor = _Cursor(data, label, min(len(data), limits.header_bytes))
    if len(data) > limits.file_bytes:
        raise cursor.wrong(f"has {len(data)} bytes, but at most {limits.file_bytes} are accepted.")
    if data[:4] != b"GGUF":
        raise cursor.wrong(f"is not a GGUF file; it begins with {bytes(data[:4])!r} instead of b'GGUF'.")
    cursor.skip(4, "the magic")
    version = cursor.integer("I", "the version")
    if version not in (2, 3):
        raise cursor.wrong(f"is GGUF version {version} (or of a big-endian machine); versions 2 and 3 are read.")
    n_tensors = cursor.count(limits.n_tensors, 32, "tensors")
    n_keys = cursor.count(limits.n_keys, 13, "metadata values")
    values: dict[str, tuple[GGUFValueType, Scalar | Array]] = {}
    for _ in range(n_keys):
        key = cursor.name("a metadata key", 65_535)
        if key in values:
            raise cursor.wrong(f"the metadata key {key!r} occurs twice.")
        values[key] = cursor.value(key)
    alignment = _alignment(cursor, values)
    tensors = _placed(cursor, [_tensor(cursor) for _ in range(n_tensors)], alignment)
    last = max((entry.offset + entry.size_bytes for entry in tensors.values()), default=cursor.at)
    return Header(label, data, values, tensors, last)


def _alignment(cursor: _Cursor, values: Mapping[str, tuple[GGUFValueType, Scalar | Array]]) -> int:
    kind, value = values.get("general.alignment", (GGUFValueType.UINT32, 32))
    if kind != GGUFValueType.UINT32 or not isinstance(value, int) or value.bit_count() != 1 or value > 1 << 16:
        raise cursor.wrong(f"general.alignment is {value!r:.80} of type {kind.name}, but must be a power of two up to 65536 of type UINT32.")
    return value


def _tensor(cursor: _Cursor) -> tuple[str, TensorEntry]:
    """One entry of the tensor list, its offset still relative to the data section."""
    name = cursor.name("a tensor name", _MAX_NAME)
    n_dims = cursor.integer("I", f"the shape of {name}")
    if not 1 <= n_dims <= 4:
        raise cursor.wrong(f"{name} has {n_dims} dimensions, but a tensor has 1 to 4.")
    shape = tuple(cursor.integer("Q", f"the shape of {name}") for _ in range(n_dims))[::-1]
    raw = cursor.integer("I", f"the type of {name}")
    try:
        kind = GGMLQuantizationType(raw)
    except ValueError:
        raise cursor.wrong(f"{name} has tensor type {raw}, which is unknown.") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if math.prod(shape) == 0 or shape[-1] % block:
        raise cursor.wrong(f"{name} has shape {shape}; rows of type {kind.name} are whole blocks of {block}, none empty.")
    size_bytes = math.prod(shape) // block * block_bytes
    return name, TensorEntry(shape, kind, cursor.integer("Q", f"the offset of {name}"), size_bytes)


def _placed(cursor: _Cursor, found: list[tuple[str, TensorEntry]], alignment: int) -> dict[str, TensorEntry]:
    """The tensors at absolute offsets, which must be the ones that llama.cpp computes for itself: data begins behind the cursor."""
    tensors: dict[str, TensorEntry] = {}
    start, expected, n_bytes = cursor.at + -cursor.at % alignment, 0, len(cursor.data)
    for name, entry in found:
        if name in tensors:
            raise cursor.wrong(f"the tensor {name} occurs twice.")
        if entry.offset != expected:
            how = "overlapping the one before" if entry.offset < expected else "after a gap"
            how = "misaligned" if entry.offset % alignment else how
            raise cursor.wrong(f"{name} lies at offset {entry.offset} ({how}), but must be at {expected}.")
        end = start + entry.offset + entry.size_bytes
        if end > n_bytes:
            raise cursor.wrong(f"is truncated: {name} ends at byte {end}, but the file has {n_bytes} bytes.")
        tensors[name] = TensorEntry(entry.shape, entry.type, start + entry.offset, entry.size_bytes)
        expected += entry.size_bytes + -entry.size_bytes % alignment
    return tensors
