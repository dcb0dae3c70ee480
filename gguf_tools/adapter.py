"""LoRA adapters as GGUF files: what llama.cpp loads, and what we add to it to know where an adapter belongs.

For each adapted base tensor W (n_out, n_in) the file holds `<name>.lora_a` = A (rank, n_in) and `<name>.lora_b` =
B (n_out, rank) in F32, and the model computes W x + (alpha / rank) B A x. The same adapter always gives the same
bytes, so that its digest names it; and nothing is written that `validate` would refuse to read.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO, Literal, cast

import numpy as np
from gguf import GGUFValueType, GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.gguf_writer import WriterState
from numpy.typing import NDArray

from gguf_tools.errors import FileError
from gguf_tools.header import Buffer, Header, TensorEntry
from gguf_tools.mapping import mapped
from gguf_tools.output import replacing
from gguf_tools.validate import adapter_alpha, base_names, check_adapter

if TYPE_CHECKING:
    from gguf_tools.model import ModelInfo

Scope = Literal["answer", "all"]
NAMESPACE = "fwdllama."
BASE_KEY = "fwdllama.base.sha256"  # digest of the model that an adapter was made for
INVOCATION_KEY = "adapter.alora.invocation_tokens"


def scale_of(alpha: float, rank: int) -> float:
    """What B A is multiplied by: alpha / rank, or 1 where alpha is 0, as llama.cpp has it."""
    return alpha / rank if alpha else 1.0


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in memory.

    `tensors` maps a base tensor's name, such as `blk.3.attn_q.weight`, to A (rank, n_in) and B (n_out, rank), both
    float32. With scope `answer` the adapter is on only from `invocation_tokens` on; with `all` there are none.
    `metadata` is ours, each key beginning with `fwdllama.`, such as `fwdllama.base.sha256`.
    """

    architecture: str
    alpha: float
    tensors: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    scope: Scope = "all"
    invocation_tokens: tuple[int, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each adapted tensor."""
        return {name: a.shape[0] for name, (a, _) in self.tensors.items()}

    def scale(self, name: str) -> float:
        """What B A of a tensor is multiplied by."""
        return scale_of(self.alpha, self.tensors[name][0].shape[0])

    @property
    def n_parameters(self) -> int:
        """Numbers in all A and B together."""
        return sum(a.size + b.size for a, b in self.tensors.values())


def adapter_bytes(adapter: Adapter) -> bytes:
    """The GGUF file of an adapter; equal adapters give equal bytes, whatever the order of their tensors and metadata.

    Raises:
        FileError: the adapter is one that `read_adapter` would refuse, or its fields contradict each other.
    """
    _check_fields(adapter)
    writer = GGUFWriter(None, adapter.architecture)
    # Not `add_string`, which drops empty values, nor `add_array`, which guesses a type.
    writer.add_key_value("general.type", "adapter", GGUFValueType.STRING)
    writer.add_key_value("adapter.type", "lora", GGUFValueType.STRING)
    writer.add_key_value("adapter.lora.alpha", adapter.alpha, GGUFValueType.FLOAT32)
    if adapter.scope == "answer":
        tokens = list(adapter.invocation_tokens)
        writer.add_key_value(INVOCATION_KEY, tokens, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    for key in sorted(adapter.metadata):
        writer.add_key_value(key, adapter.metadata[key], GGUFValueType.STRING)
    arrays = [
        (f"{name}.lora_{half}", np.ascontiguousarray(array, "<f4"))
        for name in sorted(adapter.tensors)
        for half, array in zip("ab", adapter.tensors[name], strict=True)
    ]
    for name, array in arrays:
        writer.add_tensor_info(name, array.shape, np.dtype(np.float32), array.nbytes)
    # The writer opens paths only, and writes tensors only to file descriptors, but its header goes to any stream.
    stream = io.BytesIO()
    writer.fout, writer.state = [cast(io.BufferedWriter, stream)], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(stream, stream.tell())
    for _, array in arrays:
        stream.write(array.data)
        writer.write_padding(stream, array.nbytes)
    data = stream.getvalue()
    check_adapter(data, "the adapter to be written")
    return data


def _check_fields(adapter: Adapter) -> None:
    """What the finished bytes could no longer tell."""
    if (adapter.scope == "answer") != bool(adapter.invocation_tokens):
        raise FileError(
            f"the adapter to be written has scope {adapter.scope!r} and {len(adapter.invocation_tokens)} invocation "
            "tokens; scope 'answer' needs some, scope 'all' has none."
        )
    for token in adapter.invocation_tokens:
        if not 0 <= token < 1 << 31:
            raise FileError(f"the adapter to be written has invocation token {token}, which is no token id.")
    if not abs(adapter.alpha) <= float(np.finfo(np.float32).max):
        raise FileError(f"the adapter to be written has alpha {adapter.alpha}, but it must be a finite float32.")
    for key, value in adapter.metadata.items():
        if not key.startswith(NAMESPACE):
            raise FileError(
                f"the adapter to be written has the metadata key {key!r}, but ours begin with {NAMESPACE!r}."
            )
        if not _encodable(key + value):
            raise FileError(f"the adapter to be written has metadata {key!r} that cannot be encoded as UTF-8.")


def _encodable(text: str) -> bool:
    """False for lone surrogates, which Python allows in a string."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_adapter(target: str | os.PathLike[str] | BinaryIO, adapter: Adapter) -> None:
    """Write an adapter to a stream, or to a path, where the old file stays whole until the new one is safely on disk.

    Raises:
        FileError: the adapter is not valid, or the path cannot be written.
    """
    data = adapter_bytes(adapter)
    if isinstance(target, (str, os.PathLike)):
        with replacing(target) as temporary:
            temporary.write_bytes(data)
    else:
        target.write(data)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter, ours or another program's, after checking all of it; F16 tensors are widened to float32.

    Raises:
        FileError: the first thing wrong with it.
    """
    with mapped(path) as data:
        return parse_adapter(data, str(path))


def parse_adapter(data: Buffer, label: str, base: ModelInfo | None = None) -> Adapter:
    """`read_adapter` of bytes that are already at hand; with `base` it must fit that model too.

    Raises:
        FileError: the first thing wrong with it; `label` begins the sentence.
    """
    header = check_adapter(data, label, base)
    tokens = tuple(header.numbers(INVOCATION_KEY) or ())
    return Adapter(
        architecture=header.text("general.architecture") or "",
        alpha=adapter_alpha(header),
        tensors={name: adapter_pair(header, name) for name in base_names(header)},
        scope="answer" if tokens else "all",
        invocation_tokens=tokens,
        metadata={
            key: header.text(key) or ""
            for key, (kind, _) in header.values.items()
            if kind == GGUFValueType.STRING and key.startswith(NAMESPACE)
        },
    )


def adapter_pair(header: Header, name: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A (rank, n_in) and B (n_out, rank) of one base tensor of a checked adapter, copied, as float32."""
    a, b = (header.tensors[f"{name}.lora_{half}"] for half in "ab")
    return _values(header, a), _values(header, b)


def _values(header: Header, entry: TensorEntry) -> NDArray[np.float32]:
    code = "<f4" if entry.type == GGMLQuantizationType.F32 else "<f2"
    raw = header.data[entry.offset : entry.offset + entry.size_bytes]
    return np.frombuffer(raw, code).astype(np.float32).reshape(entry.shape)
