"""How large the compute buffer of a llama.cpp context gets: the tensors of a decode, put through ggml's allocator.

llama.cpp reserves one buffer for the values between the layers of its largest decode. A sum over "what is alive at the worst moment" is up
to 30 % below that, because the allocator's holes do not fit every tensor. So the graph of a decoder-only transformer is listed here
tensor by tensor, in the order in which llama.cpp computes it, and allocated by the same rules (ggml-alloc.c): a tensor takes its operand's
place where the operation allows it and nobody else needs the operand, otherwise the smallest hole it fits, otherwise the end.

Three layers are listed: the first differs from all others, the last computes only the tokens whose logits are wanted, and those between
repeat themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_tools.model import ModelInfo

ALIGNMENT = 32  # bytes, of tensors in a CPU buffer
EXACT_KV_TYPES = ("f16", "f32", "bf16")
_TO_Q8_K = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # what their matrices' operands are converted to: 292 bytes for 256 values


@dataclass(frozen=True)
class Decode:
    """The largest decode that a context is made for.

    `n_tokens` of all sequences, each of which sees `n_cells` cells; `n_outputs` logits rows; `lora_rank` 0 where no adapter is on.
    """

    n_tokens: int
    n_cells: int
    n_outputs: int
    flash: bool = False
    kv_type: str = "f16"
    lora_rank: int = 0


@dataclass
class _Tensor:
    size: int  # bytes, aligned
    n_users: int = 0  # that are still to come
    offset: int | None = None


@dataclass
class _Allocator:
    """Offsets in an endless buffer: best fit among the holes, the end only where none is large enough."""

    holes: list[tuple[int, int]] = field(default_factory=list)  # (offset, size), sorted, never adjacent
    end: int = 0
    peak: int = 0

    def place(self, size: int) -> int:
        fitting = [hole for hole in self.holes if hole[1] >= size]
        if not fitting:
            offset = self.end
            self.end += size
            self.peak = max(self.peak, self.end)
            return offset
        # ggml keeps searching while a hole is not larger than the best, so the last of equal ones wins.
        offset, room = min(reversed(fitting), key=lambda hole: hole[1])
        self.holes.remove((offset, room))
        if room > size:
            self.holes.append((offset + size, room - size))
            self.holes.sort()
        return offset

    def free(self, offset: int, size: int) -> None:
        merged: list[tuple[int, int]] = []
        for hole in sorted([*self.holes, (offset, size)]):
            if merged and merged[-1][0] + merged[-1][1] == hole[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + hole[1])
            else:
                merged.append(hole)
        if merged and sum(merged[-1]) == self.end:
            self.end = merged.pop()[0]
        self.holes = merged


class _Graph:
    """Tensors in the order of their computation; sizes are counted in 4-byte values."""

    def __init__(self) -> None:
        self.inputs: list[_Tensor] = []
        self.nodes: list[tuple[_Tensor | None, tuple[_Tensor, ...], bool]] = []  # (result, operands, may take an operand's place)

    def input(self, n_values: int, width: int = 4) -> _Tensor:
        self.inputs.append(_Tensor(_aligned(n_values * width)))
        return self.inputs[-1]

    def node(self, n_values: int, *operands: _Tensor, in_place: bool = False) -> _Tensor:
        tensor = _Tensor(_aligned(n_values * 4))
        self._add(tensor, operands, in_place)
        return tensor

    def stored(self, *operands: _Tensor) -> None:
        """A node whose result is elsewhere: in the KV cache."""
        self._add(None, operands, False)

    def _add(self, tensor: _Tensor | None, operands: tuple[_Tensor, ...], in_place: bool) -> None:
        for operand in operands:
            operand.n_users += 1
        self.nodes.append((tensor, operands, in_place))

    def allocated_bytes(self) -> int:
        memory = _Allocator()
        for given in self.inputs:
            given.offset = memory.place(given.size)
        for tensor, operands, in_place in self.nodes:
            if tensor is not None:
                taken = next((o for o in operands if in_place and o.n_users == 1 and o.size == tensor.size and o.offset is not None), None)
                if taken is not None:
                    tensor.offset, taken.offset = taken.offset, None
                else:
                    tensor.offset = memory.place(tensor.size)
            for operand in operands:
                operand.n_users -= 1
                if operand.n_users == 0 and operand.offset is not None:
                    memory.free(operand.offset, operand.size)
                    operand.offset = None
        return memory.peak


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Widths:
    """What of a model decides over its graph: values a token of each kind of tensor, and where the architecture differs.

    `windows` is kinds of attention masks, 2 where some layers see a sliding window only; `post_norms` are behind attention and feed-forward.
    """

    n_embd: int
    n_head: int
    n_vocab: int
    n_layers: int
    key_length: int
    value_length: int
    n_head_kv: int
    feed_forward: int
    windows: int
    post_norms: bool

    @classmethod
    def of(cls, info: ModelInfo) -> Widths:
        """Those of a model; of experts, the widest matrix."""
        down = [shape[-1] for name, (shape, _) in info.tensors.items() if ".ffn_down" in name and name.endswith(".weight")]
        return cls(
            info.n_embd,
            info.n_head,
            info.n_vocab,
            info.n_layers,
            info.key_length,
            info.value_length,
            max(info.kv_heads),
            max(down, default=info.n_embd),
            2 if info.architecture.startswith(("gemma2", "gemma3")) else 1,
            any(name.endswith("post_attention_norm.weight") for name in info.tensors),
        )

    @property
    def query(self) -> int:
        """Values of all queries of a token."""
        return self.n_head * self.key_length

    @property
    def key(self) -> int:
        """Values of all its keys."""
        return self.n_head_kv * self.key_length

    @property
    def value(self) -> int:
        """Values of all its values."""
        return self.n_head_kv * self.value_length


def compute_bytes(info: ModelInfo, decode: Decode) -> int:
    """Bytes of the compute buffer that llama.cpp reserves for `decode`.

    Exact for the architecture `llama` and within a few percent for those that differ by a norm or a bias.
    """
    return _compute_bytes(Widths.of(info), decode)


@lru_cache(maxsize=1024)  # searching for a setting that fits asks for the same context many times
def _compute_bytes(widths: Widths, decode: Decode) -> int:
    n, flash, rank, n_embd = decode.n_tokens, decode.flash, decode.lora_rank, widths.n_embd
    graph = _Graph()
    tokens = graph.input(n)
    graph.input(n * n_embd)  # for a decode of embeddings; never freed, because a decode of tokens has no use for it
    positions = graph.input(n)
    # A quantised cache holds heads multiplied with a Hadamard matrix, so that their outliers are smaller: for keys as large as the largest
    # power of two that divides a head, for values the smallest.
    rotated = decode.kv_type.lower() not in EXACT_KV_TYPES and widths.key_length % 64 == 0
    turn_keys, turn_values = (graph.input(side**2) if rotated else None for side in (widths.key_length & -widths.key_length, 64))

    def rotate(x: _Tensor, width: int, turn: _Tensor | None) -> _Tensor:
        return x if turn is None else graph.node(n * width, turn, x)

    masks = []
    for _ in range(widths.windows):
        keys = graph.input(n, 8)
        values = graph.input(n if flash else n * widths.value, 8)  # without flash attention V is stored transposed, value by value
        mask = graph.input(decode.n_cells * n, 2 if flash else 4)
        masks.append((keys, values, mask))
    wanted = graph.input(decode.n_outputs)

    def matrix(x: _Tensor, width: int, rows: int = n, *, adapted: bool = True) -> _Tensor:
        y = graph.node(width * rows, x)
        if rank and adapted:
            low = graph.node(rank * rows, x)
            delta = graph.node(width * rows, low)
            delta = graph.node(width * rows, delta, in_place=True)  # scaled
            y = graph.node(width * rows, y, delta, in_place=True)
        return y

    def norm(x: _Tensor, width: int, rows: int = n) -> _Tensor:
        return graph.node(width * rows, graph.node(width * rows, x, in_place=True), in_place=True)

    below = graph.node(n * n_embd, tokens)
    n_layers = min(3, widths.n_layers)
    for layer in range(n_layers):
        keys, values, mask = masks[layer % widths.windows]
        x = norm(below, n_embd)
        # Turned by position, after a norm in some models. Heads are views of the matrix product, whose place is never taken.
        query = rotate(graph.node(n * widths.query, matrix(x, widths.query), positions), widths.query, turn_keys)
        value = rotate(matrix(x, widths.value), widths.value, turn_values)
        key = rotate(graph.node(n * widths.key, matrix(x, widths.key), positions), widths.key, turn_keys)
        graph.stored(key, keys)
        graph.stored(value, values)
        n_attended = widths.n_head * widths.value_length
        if flash:
            attended = graph.node(n * n_attended, query, mask)
        else:
            scores = graph.node(decode.n_cells * n * widths.n_head, query)
            scores = graph.node(decode.n_cells * n * widths.n_head, scores, mask, in_place=True)
            attended = graph.node(n * n_attended, graph.node(n * n_attended, scores))
        x = matrix(rotate(attended, n_attended, turn_values), n_embd)
        rows = n
        if layer == n_layers - 1:
            rows = decode.n_outputs
            x, below = graph.node(rows * n_embd, x, wanted), graph.node(rows * n_embd, below, wanted)
        if widths.post_norms:
            x = norm(x, n_embd, rows)
        between = graph.node(rows * n_embd, x, below, in_place=True)
        x = norm(between, n_embd, rows)
        up = matrix(x, widths.feed_forward, rows)
        gate = matrix(x, widths.feed_forward, rows)
        x = matrix(graph.node(rows * widths.feed_forward, gate, up), n_embd, rows)
        if widths.post_norms:
            x = norm(x, n_embd, rows)
        below = graph.node(rows * n_embd, x, between, in_place=True)
    matrix(norm(below, n_embd, decode.n_outputs), widths.n_vocab, decode.n_outputs, adapted=False)
    return graph.allocated_bytes()


def work_bytes(info: ModelInfo, decode: Decode) -> int:
    """Bytes in which matrices' operands are converted to the type that their kernels multiply with, for the largest matrix."""
    widths = Widths.of(info)
    kinds = {kind for name, (shape, kind) in info.tensors.items() if len(shape) > 1 and name.startswith("blk.")}
    widest = max(widths.feed_forward, widths.query, info.n_embd)
    of_weights = max((_operand_bytes(kind, widest * decode.n_tokens) for kind in sorted(kinds)), default=0)
    of_scores = 0 if decode.flash else 2 * decode.n_cells * decode.n_tokens * info.n_head  # the softmax, as F16 like V
    return max(of_weights, of_scores)


def _operand_bytes(kind: str, n_values: int) -> int:
    if kind in ("F32", "F16", "BF16"):
        return n_values * (0 if kind == "F32" else 2)
    operand = GGMLQuantizationType.Q8_K if kind in _TO_Q8_K else GGMLQuantizationType.Q8_0
    block, size = GGML_QUANT_SIZES[operand]
    return math.ceil(n_values / block) * size
