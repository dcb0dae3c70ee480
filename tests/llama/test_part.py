"""Parts without vocabulary compute what the whole model computes, to the bit, and hold no matrix that they do not need."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fwdllama.errors import ModelError
from fwdllama.llama.binding import TensorHead, ggml
from fwdllama.llama.context import Context, ContextOptions, Tokens
from fwdllama.llama.embedding import Embeddings
from fwdllama.llama.model import Model, ModelOptions
from gguf_tools.model import read_model_info
from gguf_tools.split import extract_layers
from gguf_tools.synth import write_tiny_llama
from tests.gguf_tools import bases
from tests.gguf_tools.forge import ARRAY, U32, Parts, Tensor

N_LAYERS, N_TOKENS = 5, 40
TOKENS: Tokens = np.random.default_rng(1).integers(0, 320, N_TOKENS, dtype=np.int32)
Values = NDArray[np.float32]


def computed(path: Path, inputs: Tokens | Values, *, repack: bool = True) -> tuple[Values, list[Values]]:
    """The logits after each of `inputs`, and the values that leave each layer, every one (n_tokens, n)."""
    seen: dict[str, Values] = {}
    library = ggml()
    assert library is not None

    def look(node: int, ask: bool, _user_data: object) -> bool:
        name = library.ggml_get_name(node).decode()
        if not name.startswith("l_out-"):
            return not ask
        if not ask:
            head = TensorHead.from_address(node)
            values = np.empty((head.ne[1], head.ne[0]), np.float32)
            library.ggml_backend_tensor_get(node, values.ctypes.data, 0, values.nbytes)
            seen[name] = values
        return True

    options = ContextOptions(n_ctx_seq=64, n_seq=1, n_outputs=N_TOKENS, n_batch=64, n_threads=1)
    with (
        Model(path, ModelOptions(mmap=not repack, repack=repack), needs_vocabulary=False) as model,
        Context(model, options, eval_callback=look) as context,
    ):
        n = len(inputs)
        logits = context.decode(inputs, np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.ones(n, np.int8))
        assert logits is not None
        return logits.copy(), [seen[f"l_out-{i}"] for i in range(model.n_layers)]


def looked_up(path: Path, tokens: Tokens) -> Values:
    with closing(Embeddings(path)) as embeddings:
        return embeddings.rows(tokens)


@pytest.mark.parametrize("repack", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_parts_fed_one_by_one_are_the_whole_model_to_the_bit(kind: str, tied: bool, repack: bool, tmp_path: Path) -> None:
    whole = write_tiny_llama(tmp_path / "whole.gguf", type=kind, n_layers=N_LAYERS, tied=tied)
    wanted, leaving = computed(whole, TOKENS, repack=repack)
    for vocabulary in ("kept", "none"):
        inputs: Tokens | Values = TOKENS if vocabulary == "kept" else looked_up(whole, TOKENS)
        for first, last in ((0, 2), (2, 3), (3, 4)):
            part = extract_layers(whole, tmp_path / "part.gguf", first, last, vocabulary="none" if first else vocabulary, force=True)
            _, within = computed(part.path, inputs, repack=repack)
            for values, expected in zip(within, leaving[first:last], strict=True):
                assert np.array_equal(values.view(np.uint32), expected.view(np.uint32))
            inputs = within[-1]
        top = extract_layers(whole, tmp_path / "top.gguf", 4, N_LAYERS, vocabulary="none", force=True)
        found, _ = computed(top.path, inputs, repack=repack)
        assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


def vector(name: str, n: int) -> Tensor:
    return Tensor(name, (n,), data=np.linspace(1, 3, n, dtype=np.float32).tobytes())


def with_output_bias() -> Parts:
    parts = bases.of_architecture("qwen2", N_LAYERS, tied=False)
    parts.tensors.append(vector("output.bias", 300))
    return parts


def with_frequencies() -> Parts:
    parts = bases.tiny(n_layers=N_LAYERS)
    parts.tensors.append(vector("rope_freqs.weight", 8))
    return parts


def with_arrays() -> Parts:
    parts = bases.tiny(n_layers=N_LAYERS)
    for name, value in (("feed_forward_length", 64), ("attention.head_count", 4), ("attention.head_count_kv", 2)):
        parts.keys[f"llama.{name}"] = ARRAY, struct.pack("<IQ5I", U32, N_LAYERS, *[value] * N_LAYERS)
    return parts


@pytest.mark.parametrize(
    ("make", "at"),
    [
        (with_output_bias, 3),
        (with_frequencies, 3),
        (with_arrays, 3),
        (lambda: bases.of_architecture("qwen3", N_LAYERS), 3),
        (lambda: bases.of_architecture("gemma3", 8), 6),
        (lambda: bases.of_architecture("smollm3", 6), 4),
    ],
    ids=["output bias", "frequencies", "arrays", "qwen3", "windows", "layers without rotation"],
)
def test_what_is_not_the_same_in_all_models_and_layers_goes_with_them(make: Callable[[], Parts], at: int, tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(make().bytes())
    n_layers = read_model_info(path).n_layers
    tokens = TOKENS % 300
    wanted, leaving = computed(path, tokens)
    _, lower = computed(extract_layers(path, tmp_path / "a.gguf", 0, at, vocabulary="none").path, looked_up(path, tokens))
    _, upper = computed(extract_layers(path, tmp_path / "b.gguf", at, n_layers - 1, vocabulary="none").path, lower[-1])
    assert np.array_equal(upper[-1], leaving[-2])
    found, _ = computed(extract_layers(path, tmp_path / "c.gguf", at, n_layers, vocabulary="none").path, lower[-1])
    assert np.array_equal(found, wanted)
    assert np.ptp(wanted) > 0.1


def test_a_part_without_vocabulary_refuses_text_and_does_not_pass_for_a_model(tmp_path: Path) -> None:
    whole = write_tiny_llama(tmp_path / "whole.gguf")
    part = extract_layers(whole, tmp_path / "part.gguf", 1, 2, vocabulary="none")
    with Model(part.path, needs_vocabulary=False) as model:
        assert (model.n_vocab, model.n_layers, model.has_texts) == (32, 1, False)
        assert not model.is_end(0)
        for ask in (lambda: model.tokenize("a"), lambda: model.piece(3), lambda: model.is_control(3)):
            with pytest.raises(ModelError, match=r"part.gguf: is a part without vocabulary, which knows no texts of tokens; use the whole"):
                ask()
    with Model(whole) as model:
        assert model.has_texts
