"""Models with random weights, of any LLaMA shape or like a given file: real files that llama.cpp loads, tiny or as large as LLaMA-7B.

The weights are scaled so that the model is as uncertain as it should be: normed activations have variance one, the output matrix turns
them into logits with a standard deviation of 0.5, and a token's loss is about ln(n_vocab) + 0.12 nats.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from gguf_tools.alphabet import add_vocabulary
from gguf_tools.blocks import random_type, random_values
from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import read_model_info
from gguf_tools.output import Progress
from gguf_tools.recipe import check_rows, file_type_of, is_matrix
from gguf_tools.shape import TINY, LlamaShape
from gguf_tools.stream import OutTensor, metadata_of, row_slices, write_streamed

_LOGIT_DEVIATION = 0.5


def write_llama(
    path: str | os.PathLike[str],
    shape: LlamaShape,
    *,
    type: str = "F32",
    seed: int = 0,
    architecture: str = "llama",
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a random model with a byte-level BPE tokenizer and a chat template; the same arguments give the same bytes.

    Matrices are stored as `type`, norms as F32. `architecture` only names the file's keys: the tensors are those of `llama`.

    Raises:
        FileError: the sizes do not fit together or the type's blocks, the type is unknown, or the path cannot be written.
    """
    shape.check(str(path))
    kind = random_type(type)
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type("model")
    writer.add_name(f"random {architecture} {seed}")
    writer.add_block_count(shape.n_layers)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(file_type_of(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, shape.n_vocab)
    types = {name: kind if len(each) > 1 else GGMLQuantizationType.F32 for name, each in shape.tensors().items()}
    _write(path, writer, shape.tensors(), types, seed, force, progress)
    return Path(path)


def write_tiny_llama(
    path: str | os.PathLike[str],
    *,
    type: str = "F32",
    seed: int = 0,
    architecture: str = "llama",
    **sizes: Any,  # fields of LlamaShape, where they are not those of TINY
) -> Path:
    """`write_llama` of the smallest useful shape, for tests: milliseconds and 900 KB; an old file is replaced."""
    return write_llama(path, replace(TINY, **sizes), type=type, seed=seed, architecture=architecture, force=True)


def write_like(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    type: str | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model with the metadata, tokenizer and tensor shapes of `model`, but random weights, of any architecture.

    Tensors keep their types; with `type`, matrices are stored as that. Norms are one, biases zero.

    Raises:
        FileError: `model` is no model, a type cannot be made at random or does not fit a tensor, or `path` cannot be written.
    """
    info = read_model_info(model)
    if os.path.realpath(path) == os.path.realpath(model):
        raise FileError(f"{path}: is the model to imitate as well; the result needs another path.")
    kind = random_type(type) if type is not None else None
    with mapped(model) as data:
        header = parse_header(data, str(model), MODEL_LIMITS)
        shapes = {name: entry.shape for name, entry in header.tensors.items()}
        types = {
            name: kind if kind is not None and is_matrix(name, entry.shape) else random_type(entry.type.name)
            for name, entry in header.tensors.items()
        }
        own = ("general.name", *(("general.file_type",) if kind is not None else ()))
        writer = metadata_of(header, without=own)
    writer.add_name(f"random weights in the shape of {info.name}")
    if kind is not None:
        writer.add_file_type(file_type_of(kind))
    _write(path, writer, shapes, types, seed, force, progress)
    return Path(path)


def _write(
    path: str | os.PathLike[str],
    writer: gguf.GGUFWriter,
    shapes: Mapping[str, tuple[int, ...]],
    types: Mapping[str, GGMLQuantizationType],
    seed: int,
    force: bool,
    progress: Progress | None,
) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    tied = "output.weight" not in shapes
    tensors = []
    for name, shape in shapes.items():
        check_rows(f"{path}: {name}", shape, types[name])
        deviation = _deviation(name, shape, tied=tied)
        tensors.append(OutTensor(name, shape, types[name], partial(_pieces, rng, name, shape, types[name], deviation)))
    write_streamed(path, writer, tensors, force=force, progress=progress)


def _deviation(name: str, shape: tuple[int, ...], *, tied: bool) -> float:
    """Standard deviation of a matrix's weights: it keeps the variance of what it is applied to, or makes logits."""
    if name == "output.weight" or (name == "token_embd.weight" and tied):
        return _LOGIT_DEVIATION * float(shape[-1] ** -0.5)
    return 1.0 if name == "token_embd.weight" else float(shape[-1] ** -0.5)


def _pieces(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, deviation: float
) -> Iterator[NDArray[Any]]:
    """A tensor's bytes, drawn when they are asked for, so that the order of asking is that of the file."""
    if len(shape) == 1:
        constant = np.zeros if name.endswith(".bias") else np.ones
        yield quantize(constant(shape, np.float32), kind).view(np.uint8)
        return
    for start, end in row_slices(shape):
        yield random_values(rng, (end - start) * shape[-1], kind, deviation)
