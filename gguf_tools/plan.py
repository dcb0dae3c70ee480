"""What llama.cpp will hold in memory for a model and its contexts, item by item, from the file's header alone.

Every item is derived from what is allocated, not fitted to a total: weights from the tensor list, the KV cache from its cells, the compute
buffer from the graph (`gguf_tools.graph`), the vocabulary from the structures of its tokens. Sizes are for a CPU with Linux' page accounting,
where memory that was reserved and never written does not count; what a run certainly or probably writes is counted in full.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_tools.graph import EXACT_KV_TYPES, Decode, compute_bytes, work_bytes
from gguf_tools.model import ModelInfo
from gguf_tools.split import N_UNNAMED

CELLS = 256  # llama.cpp rounds the cells of a sequence up to a multiple of this
# Types that llama.cpp rearranges for this CPU, where the rows are a multiple of 8 (repack.cpp: with AVX2; on ARM with dot products or i8mm).
_REPACKED = {
    "x86": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "arm": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0"),
}
# libstdc++ on 64 bits: an entry by id (string, score, kind: 40), its text by id (32), and a hash node by text with its bucket (72); a merge is
# a hash node of two strings and a rank with its bucket (112). While a file is loaded, each string is also in the list that was read (32).
_TOKEN_BYTES, _MERGE_BYTES, _UNNAMED_BYTES = 40 + 32 + 72 + 32, 112 + 32, 40
# A node of a graph: struct ggml_tensor (368 with its header), its place in the graph, in the hash set, and in the allocator's lists.
_NODE_BYTES, _GRAPHS = 368 + 80, 4  # one to reserve with, one with and one without outputs, and the scheduler's own


def whole_cells(n_tokens: int) -> int:
    """The cells that llama.cpp gives a sequence of so many tokens.

    >>> whole_cells(257)
    512
    """
    return -(-n_tokens // CELLS) * CELLS


@dataclass(frozen=True)
class Item:
    """A piece of memory; `mapped`: pages of a file, which the system can take back and read again, at the price of time."""

    name: str
    size_bytes: int
    mapped: bool = False


@dataclass(frozen=True)
class Part:
    """A model, or the layers `first` to `last` - 1 of one with its embeddings and output, as `extract_layers` cuts it."""

    info: ModelInfo
    first: int
    last: int
    has_texts: bool = True

    @classmethod
    def whole(cls, info: ModelInfo) -> Part:
        """All layers."""
        return cls(info, 0, info.n_layers)

    @classmethod
    def bare(cls, info: ModelInfo, first: int, last: int, n_logits: int | None = None) -> Part:
        """Layers without a vocabulary: of the matrices of its size they have the output, and that only where they are the last ones.

        `n_logits` are the tokens that the output is kept of, None: all.
        """
        outer = {"token_embd.weight", "output.weight", "output.bias"}
        tensors = {name: entry for name, entry in cls(info, first, last).tensors.items() if name not in outer}
        n_vocab = n_logits or info.n_vocab if last == info.n_layers else N_UNNAMED
        _, kind = info.tensors.get("output.weight", info.tensors["token_embd.weight"])
        tensors["token_embd.weight"] = (n_vocab, info.n_embd), kind if last == info.n_layers else "F32"
        bare = replace(info, n_vocab=n_vocab, n_merges=0, tied_embeddings=True, tensors=tensors)
        return cls(bare, first, last, has_texts=False)

    @cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Those of this part, by their names in the whole."""
        return {
            name: entry
            for name, entry in self.info.tensors.items()
            if (layer := _layer(name)) is None or self.first <= layer < self.last
        }

    def weight_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor_bytes(*entry) for entry in self.tensors.values())


@dataclass(frozen=True)
class Sizes:
    """A context: cells and number of sequences, logits rows and tokens of a decode, and how attention is computed."""

    n_ctx_seq: int
    n_seq: int
    n_outputs: int
    n_batch: int
    kv_type: str = "f16"
    flash: bool = False


def _layer(name: str) -> int | None:
    """The layer that a tensor belongs to; None where it belongs to none."""
    found = re.match(r"blk\.(\d{1,9})\.", name, re.ASCII)
    return int(found[1]) if found else None


def tensor_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor's values.

    >>> tensor_bytes((4, 64), "Q8_0")
    272
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def repacked_types(machine: str | None = None) -> tuple[str, ...]:
    """The types that llama.cpp rearranges on a CPU, named as `platform.machine()` names it; None for this one.

    >>> repacked_types("x86_64")
    ('Q4_0', 'Q4_K', 'IQ4_NL', 'MXFP4')
    """
    return _REPACKED["arm" if (machine or platform.machine()).lower().startswith(("arm", "aarch")) else "x86"]


def weight_items(part: Part, label: str, *, mmap: bool, repack: bool, kinds: Collection[str] | None = None) -> list[Item]:
    """Weights as loaded: read, mapped, rearranged.

    Of a mapped file everything stays in memory from the first tensor that is used in place to the last, with rearranged ones between them.
    `kinds` are the types that are rearranged; None: on this CPU.
    """
    tensors = part.tensors
    kinds = repacked_types() if kinds is None else kinds
    moved = {
        name: tensor_bytes(shape, kind)
        for name, (shape, kind) in tensors.items()
        if repack and kind in kinds and len(shape) == 2 and shape[0] % 8 == 0 and name != "token_embd.weight"
    }
    # Tied embeddings are used twice, but rows cannot be looked up in a rearranged matrix, so the output gets its own copy.
    shape, kind = tensors["token_embd.weight"]
    if part.info.tied_embeddings and repack and kind in kinds and shape[0] % 8 == 0:
        moved["output.weight"] = tensor_bytes(shape, kind)
    copies = sum(moved.values())
    if mmap:
        items = [Item(f"{label}, mapped from the file", sum(_span(tensors, moved)), mapped=True)]
    else:
        items = [Item(f"{label}, read", part.weight_bytes() - sum(size for name, size in moved.items() if name in tensors))]
    return [*items, Item(f"{label}, rearranged for this CPU", copies)] if copies else items


def _span(tensors: Mapping[str, tuple[tuple[int, ...], str]], moved: Collection[str]) -> list[int]:
    """Sizes of the tensors, in the order of the file, from the first that is not moved to the last."""
    kept = [i for i, name in enumerate(tensors) if name not in moved]
    return [tensor_bytes(*entry) for entry in list(tensors.values())[kept[0] : kept[-1] + 1]]


def vocabulary_bytes(info: ModelInfo) -> int:
    """Tokens and merges as llama.cpp keeps them to tokenise with."""
    return info.n_vocab * _TOKEN_BYTES + info.n_merges * _MERGE_BYTES


def _numbers_bytes(part: Part) -> int:
    """What llama.cpp keeps of tokens that are numbers only."""
    return part.info.n_vocab * _UNNAMED_BYTES


def kv_bytes(part: Part, sizes: Sizes) -> int:
    """The KV cache of a context, which llama.cpp clears, and so touches, when it makes it.

    Raises:
        FileError: llama.cpp has no such KV type.
    """
    held = replace(part.info, kv_heads=part.info.kv_heads[part.first : part.last])
    return sizes.n_seq * _cells(sizes) * held.kv_bytes_per_token(sizes.kv_type, sizes.kv_type)


def _cells(sizes: Sizes) -> int:
    return whole_cells(sizes.n_ctx_seq)


def decode_of(sizes: Sizes, lora_rank: int = 0) -> Decode:
    """The largest decode of a context, as llama.cpp reserves for it."""
    n_cells = _cells(sizes)
    n_tokens = min(sizes.n_batch, sizes.n_seq * n_cells)
    n_tokens = math.ceil(n_tokens / sizes.n_seq) * sizes.n_seq
    n_outputs = min(n_tokens, max(sizes.n_outputs, sizes.n_seq))
    flash = sizes.flash or sizes.kv_type.lower() not in EXACT_KV_TYPES
    return Decode(n_tokens, n_cells, n_outputs, flash, sizes.kv_type, lora_rank)


def context_items(part: Part, sizes: Sizes, label: str, *, lora_rank: int = 0) -> list[Item]:
    """A context: KV cache, compute buffer with what its kernels work in, logits, and the graphs themselves."""
    decode = decode_of(sizes, lora_rank)
    n_nodes = max(1024, 8 * len(part.tensors))
    return [
        Item(f"KV cache of {label}, {sizes.n_seq} x {sizes.n_ctx_seq} tokens in {sizes.kv_type}", kv_bytes(part, sizes)),
        Item(f"computing in {label}", compute_bytes(part.info, decode) + work_bytes(part.info, decode) + _GRAPHS * n_nodes * _NODE_BYTES),
        Item(f"logits of {label}, {decode.n_outputs} rows", 4 * decode.n_outputs * part.info.n_vocab),
    ]


def model_items(part: Part, label: str, *, mmap: bool, repack: bool, kinds: Collection[str] | None = None) -> list[Item]:
    """Weights and vocabulary of a loaded model."""
    return [
        *weight_items(part, f"weights of {label}", mmap=mmap, repack=repack, kinds=kinds),
        Item(f"vocabulary of {label}", vocabulary_bytes(part.info) if part.has_texts else _numbers_bytes(part)),
    ]
