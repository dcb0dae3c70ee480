"""Model files written piece by piece: nothing larger than a piece of one tensor is in memory.

The header is the `gguf` package's writer's; its tensors are not, because that one takes whole tensors.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from gguf_tools.errors import FileError
from gguf_tools.header import Array, Header
from gguf_tools.output import Progress, new_file

PIECE_VALUES = 1 << 21  # values in one piece: 8 MiB as float32
_OWN_KEYS = ("general.architecture", "general.alignment")  # written by the writer itself


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written; `pieces` gives its bytes in order, each a contiguous array."""

    name: str
    shape: tuple[int, ...]  # numpy order
    type: GGMLQuantizationType
    pieces: Callable[[], Iterable[NDArray[Any]]]

    @property
    def size_bytes(self) -> int:
        """Bytes in the file, without padding."""
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * block_bytes


def row_slices(shape: tuple[int, ...], n_values: int = PIECE_VALUES) -> Iterator[tuple[int, int]]:
    """Ranges of whole rows, each of about `n_values` values; rows of all but the last dimension are counted through."""
    n_rows = math.prod(shape[:-1])
    step = max(1, n_values // shape[-1])
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def write_streamed(
    path: str | os.PathLike[str],
    writer: GGUFWriter,  # without a path, with all metadata
    tensors: Sequence[OutTensor],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a model file; `progress` is called with the bytes of tensors that are done, and all.

    Raises:
        FileError: `path` exists without `force`, cannot be written, or the disk has too little room, found before any work.
    """
    with new_file(path, force=force) as temporary:
        check_room(Path(path), temporary, tensors)
        write_tensors(temporary, writer, tensors, progress)


def write_tensors(target: Path, writer: GGUFWriter, tensors: Sequence[OutTensor], progress: Progress | None = None) -> None:
    """Write header and tensors to `target` itself, for a caller that looks at the file before it takes another's place."""
    total = sum(tensor.size_bytes for tensor in tensors)
    for tensor in tensors:
        # A dtype that is not uint8, so that the shape is taken as it is.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, tensor.type)
    try:
        writer.write_header_to_file(target)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        done = 0
        for tensor in tensors:
            start = done
            for piece in tensor.pieces():
                file.write(piece.data)
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)
            assert done - start == tensor.size_bytes, tensor.name
            writer.write_padding(file, tensor.size_bytes)
    finally:
        writer.close()


def check_room(path: Path, temporary: Path, tensors: Sequence[OutTensor]) -> None:
    """Refuse tensors that the disk of `temporary` has too little room for, in a sentence about `path`."""
    n_bytes = sum(tensor.size_bytes for tensor in tensors)
    free = shutil.disk_usage(temporary.parent).free
    if free < n_bytes:
        raise FileError(f"{path}: needs {n_bytes / 2**30:.2f} GiB, but its disk has {free / 2**30:.2f} GiB left.")


def metadata_of(header: Header, without: Collection[str] = (), instead: Mapping[str, Any] = MappingProxyType({})) -> GGUFWriter:
    """A writer with all metadata of a model that was read, tokenizer and chat template included, but not the keys `without`.

    The values `instead` are written in place of those that these keys have, in the same types.
    """
    writer = GGUFWriter(None, header.text("general.architecture") or "")
    alignment = header.number("general.alignment")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in header.values.items():
        if key in _OWN_KEYS or key in without:
            continue
        if not isinstance(value, Array):
            writer.add_key_value(key, instead.get(key, value), kind)
        elif value.count:  # the writer has no empty arrays, and to llama.cpp they are as good as none
            writer.add_key_value(key, instead[key] if key in instead else elements(header, key, value), kind, value.type)
    return writer


def elements(header: Header, key: str, array: Array) -> list[Any]:
    """What `array`, the metadata value `key`, holds."""
    if array.type == GGUFValueType.STRING:
        return list(header.strings(key))
    dtype = np.dtype(array.type.name.lower()).newbyteorder("<")
    found: list[Any] = np.frombuffer(header.data, dtype, array.count, array.offset).tolist()
    return found
