"""GGUF files written byte by byte, of which every field can be a lie; and real ones taken apart, to be put together wrong."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_tools.header import MODEL_LIMITS, Array, parse_header

U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 4, 5, 6, 7, 8, 9, 10, 12  # GGUF value types
T_F32, T_F16, T_Q8_0, T_I32 = 0, 1, 8, 26  # tensor types
CODES = {0: "B", 1: "b", 2: "H", 3: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", 11: "q", F64: "d"}
NAME = "blk.0.attn_q.weight"


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack(f"<{CODES[kind]}", value)


def array(key: str, code: str, *numbers: int) -> bytes:
    return entry(key, ARRAY, struct.pack(code, *numbers))


def strings(values: Iterable[bytes]) -> bytes:
    """The payload of an array of strings."""
    parts = [text(value) for value in values]
    return struct.pack("<IQ", STRING, len(parts)) + b"".join(parts)


def tokens_entry(tokens: Sequence[int], kind: int = U32) -> bytes:
    payload = struct.pack(f"<IQ{len(tokens)}I", kind, len(tokens), *tokens)
    return entry("adapter.alora.invocation_tokens", ARRAY, payload)


def size_of(ne: Sequence[int], kind: int) -> int:
    """Bytes of a tensor; rows that are no whole blocks are rounded down."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return math.prod(ne) // block * block_bytes


@dataclass(frozen=True)
class Tensor:
    """A tensor as its file claims it to be; `ne` is in GGUF order, innermost first."""

    name: str | bytes
    ne: tuple[int, ...]
    type: int = T_F32
    offset: int | None = None
    data: bytes | None = None

    @property
    def payload(self) -> bytes:
        return self.data if self.data is not None else bytes(4 * math.prod(self.ne))


def assemble(
    keys: Sequence[bytes],
    tensors: Sequence[Tensor],
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    tail: bytes = b"",
) -> bytes:
    """A file of these parts, its counts true where they are not given."""
    counts = len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys
    head = bytearray(magic + struct.pack("<IQQ", version, *counts) + b"".join(keys))
    data, at = [], 0
    for tensor in tensors:
        head += text(tensor.name) + struct.pack(f"<I{len(tensor.ne)}Q", len(tensor.ne), *tensor.ne)
        head += struct.pack("<IQ", tensor.type, at if tensor.offset is None else tensor.offset)
        data.append(tensor.payload + bytes(-len(tensor.payload) % 32))
        at += len(data[-1])
    return bytes(head) + bytes(-len(head) % 32) + b"".join(data) + tail


@dataclass(frozen=True)
class Crafted:
    """An adapter, good unless a part of it is replaced."""

    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    architecture: bytes = entry("general.architecture", STRING, text("llama"))
    type: bytes = entry("general.type", STRING, text("adapter"))
    adapter_type: bytes = entry("adapter.type", STRING, text("lora"))
    alpha: bytes = entry("adapter.lora.alpha", F32, struct.pack("<f", 16.0))
    extra: tuple[bytes, ...] = ()
    tensors: tuple[Tensor, ...] = field(default=(Tensor(f"{NAME}.lora_a", (64, 4)), Tensor(f"{NAME}.lora_b", (4, 64))))
    tail: bytes = b""

    def bytes(self) -> bytes:
        parts = (self.architecture, self.type, self.adapter_type, self.alpha, *self.extra)
        counts = {"n_tensors": self.n_tensors, "n_keys": self.n_keys}
        keys = [key for key in parts if key]
        return assemble(keys, self.tensors, magic=self.magic, version=self.version, tail=self.tail, **counts)


def pair(base: str, a: tuple[int, ...] = (64, 4), b: tuple[int, ...] = (4, 64), **other: Any) -> tuple[Tensor, Tensor]:
    return Tensor(f"{base}.lora_a", a, **other), Tensor(f"{base}.lora_b", b, **other)


@dataclass
class Parts:
    """A file taken apart: the type and payload of each key, and the tensors with their data."""

    keys: dict[str, tuple[int, bytes]]
    tensors: list[Tensor]

    def bytes(self, **lies: Any) -> bytes:
        return assemble([entry(key, kind, payload) for key, (kind, payload) in self.keys.items()], self.tensors, **lies)

    def set(self, key: str, kind: int, value: Any) -> None:
        self.keys[key] = kind, scalar(kind, value)

    def copy(self) -> Parts:
        return Parts(dict(self.keys), list(self.tensors))


def dissect(data: bytes) -> Parts:
    """The parts of a good file."""
    header = parse_header(data, "good", MODEL_LIMITS)
    keys: dict[str, tuple[int, bytes]] = {}
    for key, (kind, value) in header.values.items():
        if not isinstance(value, Array):
            keys[key] = int(kind), scalar(int(kind), value)
        elif value.type == STRING:
            keys[key] = ARRAY, strings(header.strings(key))
        else:
            n_bytes = value.count * struct.calcsize(CODES[int(value.type)])
            keys[key] = ARRAY, struct.pack("<IQ", value.type, value.count) + data[value.offset : value.offset + n_bytes]
    tensors = [
        Tensor(name, entry.shape[::-1], int(entry.type), None, data[entry.offset : entry.offset + entry.size_bytes])
        for name, entry in header.tensors.items()
    ]
    return Parts(keys, tensors)
