"""Tensors in safetensors files, read piece by piece as float32 and written, without torch.

A file is the length of a JSON header (8 bytes), that header, and the tensors one after the other. The reader of the `gguf`
package believes the header, and the `safetensors` package hands out whole tensors and no BF16 to numpy; so the header is
checked here, and rows are read by position: not mapped, because touched pages would count as memory in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from gguf_tools.document import parse_object
from gguf_tools.errors import FileError

_CODES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MAX_HEADER = 1 << 25  # a header of 100,000 tensors has 15 MB


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its type by safetensors' name, and `offset` from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """A safetensors file whose header was checked; its tensors are read when they are asked for."""

    path: Path
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]

    def read(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Rows `first` to `last` - 1 of a tensor, all of them by default, widened to float32.

        Raises:
            FileError: the file can no longer be read, or a value is not finite.
        """
        stored = self.tensors[name]
        code = _CODES[stored.dtype]
        n_rows = stored.shape[0] if stored.shape else 1
        shape = ((n_rows if last is None else last) - first, *stored.shape[1:])
        row_bytes = stored.size_bytes // n_rows
        count = math.prod(shape)
        try:
            raw = np.fromfile(self.path, code, count, offset=stored.offset + first * row_bytes)
        except OSError as error:
            raise FileError(f"{self.path}: cannot be read: {error.strerror or error}.") from None
        if raw.size != count:
            raise FileError(f"{self.path}: was truncated while it was read, in {name}.")
        # BF16 is the upper half of a float32.
        wide = (raw.astype("<u4") << 16).view("<f4") if stored.dtype == "BF16" else raw.astype("<f4", copy=False)
        if not np.isfinite(wide).all():
            row = first + int(np.argmin(np.isfinite(wide.reshape(shape[0], -1)).all(axis=1)))
            raise FileError(f"{self.path}: {name} holds a value that is not finite in row {row}.")
        values: NDArray[np.float32] = wide.reshape(shape if stored.shape else ())
        return values


def open_safetensors(path: Path) -> SafetensorsFile:
    """Check a file's header: every tensor lies inside the file, they touch, and their sizes are those of their shapes.

    Raises:
        FileError: anything else.
    """
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path}: is not a regular file.")
        with open(path, "rb") as file:
            n_bytes = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if n_bytes < 8 or length > n_bytes - 8:
                raise FileError(
                    f"{path}: is no safetensors file, or truncated: "
                    f"its header claims {length} bytes, but {max(0, n_bytes - 8)} follow."
                )
            if length > _MAX_HEADER:
                raise FileError(f"{path}: its header has {length} bytes, but at most {_MAX_HEADER} are accepted.")
            header = parse_object(file.read(length), f"{path}: the header")
    except FileNotFoundError:
        raise FileError(f"{path}: does not exist.") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror or error}.") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(f"{path}: its __metadata__ must map names to strings.")
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_placement(path, tensors, 8 + length, n_bytes)
    return SafetensorsFile(path, tensors, metadata)


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    where = f"{path}: {name[:120]}"
    if not name.isprintable() or len(name) > 512:
        raise FileError(f"{path}: a tensor name is not printable or longer than 512 characters: {name!r:.80}.")
    if not isinstance(entry, dict):
        raise FileError(f"{where} is described by {entry!r:.80}, but must have dtype, shape and data_offsets.")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _CODES:
        raise FileError(f"{where} is of type {dtype!r:.80}, but F32, F16 and BF16 are read.")
    if not _counts(shape) or len(shape) > 8 or 0 in shape:
        raise FileError(f"{where} has shape {shape!r:.80}, but must have up to 8 positive dimensions.")
    if not _counts(offsets) or len(offsets) != 2:
        raise FileError(f"{where} has data_offsets {offsets!r:.80}, but must have a beginning and an end.")
    begin, end = offsets
    size_bytes = math.prod(shape) * np.dtype(_CODES[dtype]).itemsize
    if end - begin != size_bytes:
        raise FileError(
            f"{where} lies at bytes {begin} to {end}, but its shape {tuple(shape)!s:.80} of {dtype} needs {size_bytes} bytes."
        )
    return Stored(dtype, tuple(shape), start + begin, size_bytes)


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _check_placement(path: Path, tensors: Mapping[str, Stored], start: int, n_bytes: int) -> None:
    """Without gaps or overlaps up to the end of the file, as the format demands: nothing hides, nothing is read twice."""
    expected = start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if stored.offset != expected:
            how = "overlaps another tensor" if stored.offset < expected else "follows a gap"
            raise FileError(
                f"{path}: {name} {how}: it begins at byte {stored.offset}, but the tensors before it end at {expected}."
            )
        expected += stored.size_bytes
        if expected > n_bytes:
            raise FileError(f"{path}: is truncated: {name} ends at byte {expected}, but the file has {n_bytes} bytes.")
    if expected != n_bytes:
        raise FileError(f"{path}: {n_bytes - expected} bytes follow the last tensor, which ends at byte {expected}.")


def safetensors_bytes(tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of float32 arrays; equal arrays and metadata give equal bytes, whatever their order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **dict(sorted(metadata.items()))}}
    parts, at = [], 0
    for name in sorted(tensors):
        data = np.ascontiguousarray(tensors[name], "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned, as the format recommends
    return len(text).to_bytes(8, "little") + text + b"".join(parts)
