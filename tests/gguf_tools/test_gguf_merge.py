"""A merged model says what base and adapter said together, in any type, within little memory, and only where that is the same thing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from gguf_tools.adapter import Adapter, write_adapter
from gguf_tools.errors import FileError
from gguf_tools.merge import merge_adapter
from gguf_tools.model import read_model_info
from gguf_tools.quantize import quantize_model
from gguf_tools.synth import write_tiny_llama

OpenLlama = Callable[..., Any]
TOKENS = list(range(5, 60))


def adapter_for(base: Path, path: Path, *, alpha: float = 8.0, size: float = 0.05, rank: int = 4, **fields: Any) -> Path:
    """An adapter of every matrix within the layers."""
    rng = np.random.default_rng(3)
    tensors = {}
    for name, (shape, _) in read_model_info(base).tensors.items():
        if name.startswith("blk.") and len(shape) == 2:
            a, b = rng.standard_normal((rank, shape[1])) * shape[1] ** -0.5, size * rng.standard_normal((shape[0], rank))
            tensors[name] = a.astype(np.float32), b.astype(np.float32)
    write_adapter(path, Adapter("llama", alpha, tensors, **fields))
    return path


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("merge") / "f32.gguf", tied=False, n_embd=256, n_ff=256)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return adapter_for(base, base.with_name("adapter.gguf"))


@pytest.mark.parametrize(("alpha", "tolerance"), [(8.0, 2e-3), (0.0, 2e-3)])
def test_a_model_merged_in_f32_gives_the_logits_of_base_and_adapter(
    alpha: float, tolerance: float, base: Path, tmp_path: Path, open_llama: OpenLlama
) -> None:
    adapter = adapter_for(base, tmp_path / "a.gguf", alpha=alpha)
    merged = merge_adapter(base, adapter, tmp_path / "m.gguf")
    assert merged.error < 1e-8
    together, alone = open_llama(base, adapter).logits(TOKENS), open_llama(base).logits(TOKENS)
    assert np.abs(open_llama(merged.path).logits(TOKENS) - together).max() < tolerance
    assert np.abs(alone - together).max() > 0.1


@pytest.mark.parametrize(
    ("type_", "stored", "file_type", "tolerance"),
    [("f16", "F16", 1, 0.003), ("bf16", "BF16", 32, 0.03), ("int8", "Q8_0", 7, 0.03), ("Q6_K", "Q6_K", 18, 0.06), ("q4_k", "Q4_K", 14, 0.3)],
)
def test_every_matrix_is_stored_as_the_type_and_the_logits_deviate_by_its_rounding(
    type_: str, stored: str, file_type: int, tolerance: float, base: Path, adapter: Path, tmp_path: Path, open_llama: OpenLlama
) -> None:
    merged = merge_adapter(base, adapter, tmp_path / "m.gguf", type=type_)
    info = read_model_info(merged.path)
    kinds = {kind for name, (shape, kind) in info.tensors.items() if len(shape) == 2}
    assert (kinds, info.file_type, info.tensors["output_norm.weight"][1]) == ({stored}, file_type, "F32")
    together, found = open_llama(base, adapter).logits(TOKENS), open_llama(merged.path).logits(TOKENS)
    assert 0 < np.sqrt(np.mean((found - together) ** 2)) < tolerance  # logits deviate by 0.5 among themselves
    assert 0 < merged.error < merged.change


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_K"])
def test_with_type_same_adapted_matrices_keep_their_type_and_all_others_their_bytes(kind: str, tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "q.gguf", type=kind, n_layers=1, n_embd=256, n_ff=256)
    pair = np.full((2, 256), 0.01, np.float32), np.full((256, 2), 0.5, np.float32)
    write_adapter(tmp_path / "a.gguf", Adapter("llama", 2.0, {"blk.0.attn_q.weight": pair}))
    merged = merge_adapter(base, tmp_path / "a.gguf", tmp_path / "m.gguf")
    before, after = tensors_of(base), tensors_of(merged.path)
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.tensor_type == after[name].tensor_type
        assert (tensor.data.tobytes() == after[name].data.tobytes()) == (name != "blk.0.attn_q.weight")
    wanted = dequantize(before["blk.0.attn_q.weight"].data, before["blk.0.attn_q.weight"].tensor_type) + np.float32(0.01)
    found = dequantize(after["blk.0.attn_q.weight"].data, after["blk.0.attn_q.weight"].tensor_type)
    assert np.sqrt(np.mean((found - wanted) ** 2)) == pytest.approx(merged.error, rel=1e-3)
    assert merged.change == pytest.approx(0.01, rel=1e-3)
    assert read_model_info(merged.path).file_type == read_model_info(base).file_type


def test_tokenizer_template_and_every_other_value_are_those_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = merge_adapter(base, adapter, tmp_path / "m.gguf", type="Q8_0")
    before, after = ({key: (field.types, field.contents()) for key, field in GGUFReader(path).fields.items()} for path in (base, merged.path))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"general.file_type"}


def test_an_adapter_that_is_on_for_the_answer_only_is_merged_only_when_asked(base: Path, tmp_path: Path) -> None:
    answer = adapter_for(base, tmp_path / "a.gguf", scope="answer", invocation_tokens=(1, 5))
    with pytest.raises(FileError, match=r"a.gguf: is on only from the answer on .*another model than the one that was trained; --everywhere"):
        merge_adapter(base, answer, tmp_path / "m.gguf")
    assert merge_adapter(base, answer, tmp_path / "m.gguf", everywhere=True).names


def test_an_adapter_of_another_model_is_refused_and_nothing_is_written(adapter: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf")
    with pytest.raises(FileError, match=r"lora_a has shape \(4, 256\), but the base model needs \(rank, 64\). Was it trained on another"):
        merge_adapter(other, adapter, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["other.gguf"]


@pytest.mark.parametrize(
    ("type_", "sentence"),
    [
        ("q9", "tensor type 'q9' is unknown; a single tensor can be F32, F16"),
        ("Q4_K_M", "tensor type 'Q4_K_M' is unknown"),
        ("IQ3_XXS", "cannot be stored as IQ3_XXS without importance data; choose another type, such as Q8_0 or F16"),
        ("NVFP4", "token_embd.weight has rows of 96 values, but NVFP4 needs whole blocks of 64"),
    ],
)
def test_types_that_cannot_be_made_are_refused_before_anything_is_written(type_: str, sentence: str, tmp_path: Path) -> None:
    n_embd = 256 if type_ == "IQ3_XXS" else 96
    base = write_tiny_llama(tmp_path / "b.gguf", n_layers=1, n_embd=n_embd, n_ff=256, n_head=2, n_head_kv=1)
    adapter = adapter_for(base, tmp_path / "a.gguf")
    with pytest.raises(FileError, match=sentence):
        merge_adapter(base, adapter, tmp_path / "m.gguf", type=type_)
    assert not (tmp_path / "m.gguf").exists()


def test_the_base_is_never_written_over(base: Path, adapter: Path) -> None:
    before = base.read_bytes()
    with pytest.raises(FileError, match=r"f32.gguf: is the base or the adapter as well; the result needs another path"):
        merge_adapter(base, adapter, base, force=True)
    assert base.read_bytes() == before


MEMORY = """
import resource, sys
from gguf_tools.merge import merge_adapter
from gguf_tools.quantize import _ggml
_ggml()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
merge_adapter(*sys.argv[1:4], type="F16")
print((peak() - before) / 1024)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """The embeddings alone are 66 MB as float32; a piece is 8 MiB, of which a handful exist at a time."""
    sizes = {"n_layers": 1, "n_embd": 1024, "n_ff": 256, "n_vocab": 16_000}
    write_tiny_llama(tmp_path / "q.gguf", type="Q8_0", **sizes)
    name = "blk.0.ffn_up.weight"
    write_adapter(tmp_path / "a.gguf", Adapter("llama", 2.0, {name: (np.ones((2, 1024), np.float32), np.ones((256, 2), np.float32))}))
    paths = [str(tmp_path / each) for each in ("q.gguf", "a.gguf", "m.gguf")]
    result = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 60


@pytest.mark.model
@pytest.mark.parametrize(("type_", "tolerance"), [("same", 1.0), ("F16", 0.1)])
def test_a_real_model_merged_says_what_it_said_with_the_adapter(
    type_: str, tolerance: float, model_path: Path, tmp_path: Path, open_llama: OpenLlama
) -> None:
    adapter = adapter_for(model_path, tmp_path / "a.gguf", size=0.02)
    merged = merge_adapter(model_path, adapter, tmp_path / "m.gguf", type=type_)
    # Quantised matrices round their inputs too, those in F16 do not: the base is compared in the type of the result.
    base = model_path if type_ == "same" else quantize_model(model_path, tmp_path / "base.gguf", type_).path
    tokens = open_llama(base).tokenise("The capital of France is Paris, and the capital of Italy is Rome.")
    together, alone = open_llama(base, adapter).logits(tokens), open_llama(base).logits(tokens)
    error, change = (np.sqrt(np.mean((each - together) ** 2)) for each in (open_llama(merged.path).logits(tokens), alone))
    assert error < tolerance * change
