"""A Hugging Face LLaMA folder made into a GGUF model, piece by piece and without torch.

Every check comes before the first byte is written, and the file is read back before it takes its place. Memory is a piece of a
tensor, whatever the model's size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray

from gguf_tools.errors import FileError
from gguf_tools.llama import LlamaConfig, LlamaTensor, llama_tensors, read_llama_config
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.output import Progress, new_file
from gguf_tools.recipe import file_type_of
from gguf_tools.rotary import interleaved
from gguf_tools.safetensors import SafetensorsFile
from gguf_tools.shards import open_shards
from gguf_tools.stream import OutTensor, write_tensors
from gguf_tools.vocabulary import Vocabulary, read_vocabulary

TYPES = ("F32", "F16", "BF16", "Q8_0")
_PIECE = 1 << 22  # numbers at once: 16 MiB as float32
_MAX_F16 = 65504.0
_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Conversion:
    """The model that was written, and sentences about texts that it tokenises otherwise than the original."""

    model: ModelInfo
    warnings: tuple[str, ...]


def convert_model(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    type: str = "F16",
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the model in `folder` to the GGUF file `target`, its matrices as `type` (one of TYPES), norms as F32.

    `progress` is given the bytes written and those there will be. `force` replaces an existing file.

    Raises:
        FileError: the folder is not a whole LLaMA with a tokenizer that llama.cpp has, a value is not finite or does not
        fit the type, or the target exists or cannot be written.
    """
    name = type.upper()
    if name not in TYPES:
        raise FileError(f"type {type!r} is not one that is converted to; give one of {', '.join(TYPES)}, and quantise after.")
    folder = Path(folder)
    shards = open_shards(folder)
    config = read_llama_config(folder)
    tensors = list(llama_tensors(config))
    _check_tensors(folder, shards, tensors, config)
    kind = GGMLQuantizationType[name]
    for tensor in tensors:
        if len(tensor.shape) == 2 and tensor.shape[1] % GGML_QUANT_SIZES[kind][0]:
            raise FileError(f"{folder}: the rows of {tensor.source} have {tensor.shape[1]} values, no multiple of 32 as {name} needs.")
    vocabulary = read_vocabulary(folder, config.n_vocab, config.token_ids)
    with new_file(target, force=force) as temporary:
        writer = gguf.GGUFWriter(None, "llama")
        _describe(writer, folder, config, kind, vocabulary)
        write_tensors(temporary, writer, list(_outputs(tensors, shards, config, kind)), progress)
        read_model_info(temporary)
    return Conversion(read_model_info(target), vocabulary.warnings)


def _check_tensors(
    folder: Path, shards: Mapping[str, SafetensorsFile], tensors: list[LlamaTensor], config: LlamaConfig
) -> None:
    """Every tensor is there with its shape, and none besides that would have changed what the model computes."""
    for tensor in tensors:
        file = shards.get(tensor.source)
        if file is None:
            raise FileError(f"{folder}: lacks {tensor.source}, which config.json calls for.")
        shape = file.tensors[tensor.source].shape
        if shape != tensor.shape:
            raise FileError(f"{file.path}: {tensor.source} has shape {shape}, but config.json calls for {tensor.shape}.")
    known = {tensor.source for tensor in tensors} | ({"lm_head.weight"} if config.tied else set())
    for name in shards:
        if name in known or name.endswith(".rotary_emb.inv_freq"):  # computed from rope_theta
            continue
        if name.endswith(".bias"):
            raise FileError(f"{shards[name].path}: {name} is a bias, which models of this architecture do not have.")
        raise FileError(f"{shards[name].path}: {name[:120]} is no tensor of a LLaMA of {config.n_layers} layers.")


def _describe(writer: gguf.GGUFWriter, folder: Path, config: LlamaConfig, kind: GGMLQuantizationType, vocabulary: Vocabulary) -> None:
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_linear is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_linear)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_vocab_size(config.n_vocab)
    writer.add_file_type(file_type_of(kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary.add_to(writer)


def _outputs(
    tensors: list[LlamaTensor], shards: Mapping[str, SafetensorsFile], config: LlamaConfig, kind: GGMLQuantizationType
) -> Iterator[OutTensor]:
    """What is written, in the file's order."""
    for tensor in tensors:
        own = kind if len(tensor.shape) == 2 else GGMLQuantizationType.F32
        pieces = partial(_pieces, shards[tensor.source], tensor, config.head_dim, kind)
        yield OutTensor(tensor.name, tensor.shape, own, pieces)
    if (divisors := config.rope_divisors) is not None:
        yield OutTensor(_ROPE_FREQS, divisors.shape, GGMLQuantizationType.F32, lambda: [divisors])


def _pieces(
    file: SafetensorsFile, tensor: LlamaTensor, head_dim: int, kind: GGMLQuantizationType
) -> Iterator[NDArray[np.generic]]:
    """A tensor's rows, some at a time and whole heads of what is rotated, in the type that is written."""
    if len(tensor.shape) == 1:
        yield file.read(tensor.source)
        return
    n_rows, n_columns = tensor.shape
    unit = head_dim if tensor.rotated else 1
    step = max(1, _PIECE // (n_columns * unit)) * unit
    for first in range(0, n_rows, step):
        rows = file.read(tensor.source, first, min(first + step, n_rows))
        if kind == GGMLQuantizationType.F16 and (largest := float(np.abs(rows).max())) > _MAX_F16:
            raise FileError(f"{file.path}: {tensor.source} holds {largest:g}, but F16 ends at {_MAX_F16:g}; take F32 or BF16.")
        rows = interleaved(rows, head_dim) if tensor.rotated else rows
        yield np.ascontiguousarray(quantize(rows, kind))
