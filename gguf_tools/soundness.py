"""Whether a model or an adapter is one that llama.cpp can be given: `validate_file`, for either.

A model that passes is loaded, gets a context and decodes without ending the process. What is not known here, such as the tensors of an architecture
outside the LLaMA family, is returned as a list of what was not checked, never passed over in silence.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from gguf.constants import GGMLQuantizationType, GGUFValueType

from gguf_tools.architecture import FAMILY, check_keys, check_sizes, wanted_tensors
from gguf_tools.errors import FileError
from gguf_tools.finite import can_be_scanned, check_finite
from gguf_tools.header import MODEL_LIMITS, Header, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import ModelInfo, is_adapter, model_info
from gguf_tools.output import Progress
from gguf_tools.tokenizer import check_tokenizer
from gguf_tools.validate import check_adapter_header, check_adapter_numbers

# Without a dot product in ggml: a matrix of these is a call through a null pointer.
_NO_WEIGHTS = frozenset(GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"))

# ggml's TENSOR_ALIGNMENT: it uses a mapped file's bytes where they lie, and aborts where a buffer does not begin at a multiple of this.
_TENSOR_ALIGNMENT = 32


@dataclass(frozen=True)
class Verdict:
    """What passed: a model or an adapter, and what of it could not be checked."""

    kind: Literal["model", "adapter"]
    architecture: str
    n_tensors: int
    unchecked: tuple[str, ...]


def validate_file(
    path: str | os.PathLike[str],
    *,
    base: ModelInfo | None = None,
    data: bool = False,
    progress: Progress | None = None,  # given bytes
) -> Verdict:
    """Check a model or an adapter, the latter also against `base`; `data` scans a model's weights too.

    An adapter's numbers are always looked at. Of a model, only the vectors are without `data`: that takes milliseconds, and does
    not read gigabytes.

    Raises:
        FileError: the first thing wrong, in one sentence that names the tensor, key or offset; or `base` is given for a model.
    """
    with mapped(path) as buffer:
        header = parse_header(buffer, str(path), MODEL_LIMITS)
        if is_adapter(header):
            check_adapter_header(header, base)
            check_adapter_numbers(header)
            open_question = () if base is not None else ("whether it fits a model (no base was given)",)
            return Verdict("adapter", header.text("general.architecture") or "", len(header.tensors), open_question)
        if base is not None:
            raise FileError(f"{path}: is a model, but only an adapter has a base.")
        info, unchecked = check_model(header)
        return Verdict("model", info.architecture, len(header.tensors), unchecked + _check_numbers(header, data, progress))


def check_model(header: Header) -> tuple[ModelInfo, tuple[str, ...]]:
    """Everything but the numbers of a model; returns what it is and what was not checked.

    Raises:
        FileError: the first thing wrong.
    """
    for key, (kind, _) in header.values.items():
        if kind == GGUFValueType.STRING:
            header.text(key)  # refuses what is not UTF-8
    for key, wanted in (("general.file_type", GGUFValueType.UINT32), ("split.count", GGUFValueType.UINT16)):
        found = header.values.get(key, (wanted, None))[0]
        if found != wanted:
            raise FileError(f"{header.label}: {key} is of type {found.name}, but must be {wanted.name}.")
    for name, entry in header.tensors.items():
        if entry.offset % _TENSOR_ALIGNMENT:
            raise FileError(
                f"{header.label}: {name} begins at byte {entry.offset}, but must begin at a multiple of {_TENSOR_ALIGNMENT}, or llama.cpp aborts; "
                f"general.alignment is {header.number('general.alignment')}."
            )
    info = model_info(header)
    unchecked = check_tokenizer(header, add_bos=info.add_bos)
    if info.architecture in FAMILY:
        check_keys(header, info)
        check_sizes(header, info)
        _check_tensors(header, info)
    else:
        unchecked.append(f"the keys and tensor shapes of the architecture {info.architecture!r}")
    return info, tuple(unchecked)


def _check_tensors(header: Header, info: ModelInfo) -> None:
    """Names, shapes and types against what the architecture has."""
    wanted = wanted_tensors(header, info)
    for name, entry in header.tensors.items():
        where = f"{header.label}: {name} at byte {entry.offset}"
        if name not in wanted:
            raise FileError(f"{where} is no tensor of a {info.architecture} model of {info.n_layers} layers.")
        shape = wanted[name][0]
        if entry.shape != shape:
            raise FileError(f"{where} has shape {entry.shape}, but the metadata needs {shape}.")
        if len(shape) == 1 and entry.type != GGMLQuantizationType.F32:
            raise FileError(f"{where} is of type {entry.type.name}, but vectors must be F32; llama.cpp aborts on others.")
        if entry.type in _NO_WEIGHTS:
            raise FileError(f"{where} is of type {entry.type.name}, which llama.cpp cannot multiply with.")
    for name, (_, required) in wanted.items():
        if required and name not in header.tensors:
            raise FileError(f"{header.label}: holds no tensor {name}, which a {info.architecture} model of {info.n_layers} layers has.")
    for name in header.tensors:
        stem, _, kind = name.rpartition(".")
        if kind != "weight" and f"{stem}.weight" not in header.tensors:
            raise FileError(f"{header.label}: {name} belongs to {stem}.weight, which the file lacks.")


def _check_numbers(header: Header, data: bool, progress: Progress | None) -> tuple[str, ...]:
    """Vectors, and with `data` everything else, must be finite."""
    entries = [(name, entry) for name, entry in header.tensors.items() if data or len(entry.shape) == 1]
    total, done = sum(entry.size_bytes for _, entry in entries), 0
    unknown = sorted({entry.type.name for _, entry in entries if not can_be_scanned(entry.type)})
    for name, entry in entries:
        if can_be_scanned(entry.type):
            check_finite(header, name, entry)
        done += entry.size_bytes
        if progress is not None:
            progress(done, total)
    unscanned = [f"whether numbers of type {', '.join(unknown)} are finite"] if unknown else []
    return tuple(unscanned if data else ["whether the matrices' numbers are finite (see --data)", *unscanned])
