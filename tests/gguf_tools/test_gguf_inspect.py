"""What a file is, from its header: right, quick at any size, and never reading weights."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.adapter import Adapter, write_adapter
from gguf_tools.errors import FileError
from gguf_tools.inspect import AdapterView, ModelView, Token, inspect_file
from gguf_tools.soundness import validate_file
from gguf_tools.synth import write_tiny_llama
from tests.gguf_tools import bases
from tests.gguf_tools.forge import ARRAY, F32, I32, STRING, U32, Tensor, assemble, entry, scalar, size_of, strings
from tests.stopwatch import quick

Q4_0 = 2


def seven_billion(path: Path) -> Path:
    """LLaMA-7B in Q4_0 with 32,000 tokens, its weights a hole in the file."""
    n_layers, n_embd, n_ff, n_vocab = 32, 4096, 11_008, 32_000
    numbers = {"context_length": 4096, "embedding_length": n_embd, "block_count": n_layers, "feed_forward_length": n_ff, "attention.head_count": 32,
               "rope.dimension_count": 128}  # fmt: skip
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256)), *(b"token%d" % i for i in range(n_vocab - 259))]
    keys = [
        entry("general.architecture", STRING, scalar(STRING, "llama")),
        *(entry(f"llama.{name}", U32, scalar(U32, value)) for name, value in numbers.items()),
        entry("llama.attention.layer_norm_rms_epsilon", F32, scalar(F32, 1e-5)),
        entry("tokenizer.ggml.model", STRING, scalar(STRING, "llama")),
        entry("tokenizer.ggml.tokens", ARRAY, strings(tokens)),
        entry("tokenizer.ggml.scores", ARRAY, struct.pack(f"<IQ{n_vocab}f", F32, n_vocab, *[0.0] * n_vocab)),
        entry("tokenizer.ggml.token_type", ARRAY, struct.pack(f"<IQ{n_vocab}i", I32, n_vocab, 2, 3, 3, *[6] * 256, *[1] * (n_vocab - 259))),
    ]
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (n_embd,), "ffn_norm": (n_embd,), "ffn_gate": (n_embd, n_ff), "ffn_up": (n_embd, n_ff),
                                         "ffn_down": (n_ff, n_embd)}  # fmt: skip
    layer |= {f"attn_{name}": (n_embd, n_embd) for name in ("q", "k", "v", "output")}
    shapes = {"token_embd": (n_embd, n_vocab), "output_norm": (n_embd,), "output": (n_embd, n_vocab)}
    shapes |= {f"blk.{i}.{name}": ne for i in range(n_layers) for name, ne in layer.items()}
    tensors, at = [], 0
    for name, ne in shapes.items():
        kind = 0 if len(ne) == 1 else Q4_0
        tensors.append(Tensor(f"{name}.weight", ne, kind, at, b""))
        at += size_of(ne, kind) + -size_of(ne, kind) % 32
    with open(path, "wb") as file:
        file.write(assemble(keys, tensors))
        file.truncate(file.tell() + at)
    return path


def test_a_file_of_seven_billion_parameters_takes_less_than_two_seconds(tmp_path: Path) -> None:
    path = seven_billion(tmp_path / "7b.gguf")
    view = quick(lambda: inspect_file(path), within_s=2)
    assert isinstance(view, ModelView)
    assert view.n_parameters == 6_738_415_616
    assert view.size_bytes > 3.5 * 2**30
    assert path.stat().st_blocks * 512 < 2**21  # a hole: of what is not there, nothing could be read
    assert view.kv_bytes_per_token == 512 * 1024
    verdict = quick(lambda: validate_file(path), within_s=2)
    assert verdict.unchecked == ("whether the matrices' numbers are finite (see --data)",)


def test_a_model_is_described_by_role(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", type="Q8_0", n_layers=3)
    view = inspect_file(path)
    assert isinstance(view, ModelView)
    assert (view.kind, view.architecture, view.n_layers, view.n_embd, view.n_head, view.n_head_kv, view.n_ff) == ("model", "llama", 3, 64, 4, 2, 128)
    assert (view.quantisation, view.size_bytes, view.tied_embeddings) == ("Q8_0", path.stat().st_size, True)
    assert view.tokenizer.n_tokens == 320
    assert view.tokenizer.bos == view.tokenizer.eos == Token(0, "<|endoftext|>")
    assert view.tokenizer.end_of_turn == Token(2, "<|im_end|>")
    roles = {role.role: role for role in view.roles}
    key = roles["attn_k.weight"]
    assert (key.n_tensors, key.shape, key.types, key.n_parameters, key.size_bytes) == (3, (32, 64), {"Q8_0": 3}, 3 * 32 * 64, 3 * 32 * 68)
    assert roles["output_norm.weight"].types == {"F32": 1}
    assert sum(role.n_parameters for role in view.roles) == view.n_parameters
    assert view.bits_per_weight == pytest.approx(8.5, abs=0.2)


def test_quantisation_is_counted_where_layers_differ(tmp_path: Path) -> None:
    parts = bases.tiny(n_layers=2)
    (i,) = [i for i, tensor in enumerate(parts.tensors) if tensor.name == "blk.1.attn_q.weight"]
    parts.tensors[i] = Tensor("blk.1.attn_q.weight", (64, 64), 1, None, bytes(2 * 64 * 64))
    (tmp_path / "m.gguf").write_bytes(parts.bytes())
    view = inspect_file(tmp_path / "m.gguf")
    assert {role.role: role.types for role in view.roles}["attn_q.weight"] == {"F32": 1, "F16": 1}


@pytest.mark.parametrize(("tokens", "scope"), [((), "all"), ((5, 6), "answer")])
def test_an_adapter_is_described_with_its_base_rank_and_scope(tokens: tuple[int, ...], scope: Any, tmp_path: Path) -> None:
    def pair(rank: int) -> tuple[Any, Any]:
        return np.ones((rank, 8), np.float32), np.full((4, rank), np.nan if rank == 3 else 1, np.float32)

    adapter = Adapter("llama", 6.0, {"blk.2.attn_q.weight": pair(2), "blk.11.attn_q.weight": pair(5), "output.weight": pair(2)}, scope, tokens,
                      {"fwdllama.base.sha256": "ab", "fwdllama.run.step": "7"})  # fmt: skip
    write_adapter(tmp_path / "a.gguf", adapter)
    view = inspect_file(tmp_path / "a.gguf")
    assert isinstance(view, AdapterView)
    assert (view.kind, view.alpha, view.ranks, view.scope, view.invocation_tokens) == ("adapter", 6.0, (2, 5), scope, tokens)
    assert (view.layers, view.modules) == ((2, 11), ("attn_q", "output"))
    assert (view.base, view.metadata) == ({"fwdllama.base.sha256": "ab"}, {"fwdllama.run.step": "7"})
    assert view.n_parameters == sum(prod(shape) for shape in [(2, 8), (4, 2), (5, 8), (4, 5), (2, 8), (4, 2)])
    assert json.loads(json.dumps(asdict(view)))["layers"] == [2, 11]


def test_numbers_are_not_read(tmp_path: Path) -> None:
    parts = bases.adapter()
    parts.tensors[0] = Tensor(parts.tensors[0].name, parts.tensors[0].ne, 0, None, b"\xff" * len(parts.tensors[0].payload))
    (tmp_path / "nan.gguf").write_bytes(parts.bytes())
    assert inspect_file(tmp_path / "nan.gguf").kind == "adapter"
    with pytest.raises(FileError, match=r"not finite"):
        validate_file(tmp_path / "nan.gguf")


def test_an_adapter_that_is_none_is_refused(tmp_path: Path) -> None:
    parts = bases.adapter()
    parts.set("adapter.lora.alpha", U32, 16)
    (tmp_path / "bad.gguf").write_bytes(parts.bytes())
    with pytest.raises(FileError, match=r"adapter.lora.alpha is 16 of type UINT32"):
        inspect_file(tmp_path / "bad.gguf")
