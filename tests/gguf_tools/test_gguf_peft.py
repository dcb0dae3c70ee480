"""Adapters survive the way to PEFT and back, and what an adapter of llama.cpp cannot say is refused."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.adapter import Adapter, adapter_bytes
from gguf_tools.errors import FileError
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.peft import read_peft, write_peft
from gguf_tools.safetensors import open_safetensors, safetensors_bytes
from gguf_tools.synth import write_tiny_llama

Q, V = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    """Three layers, 64 values, 4 heads of 16 and 2 KV heads, with an output matrix of its own."""
    return read_model_info(write_tiny_llama(tmp_path_factory.mktemp("base") / "tiny.gguf", tied=False))


def half(name: str, kind: str, shape: tuple[int, int]) -> tuple[str, np.ndarray[Any, Any]]:
    values = np.random.default_rng(len(name) + ord(kind)).standard_normal(shape).astype(np.float32)
    return f"base_model.model.{name}.lora_{kind}.weight", values


def tensors() -> dict[str, Any]:
    return dict([half(Q, "A", (2, 64)), half(Q, "B", (64, 2)), half(V, "A", (2, 64)), half(V, "B", (32, 2))])


def save(folder: Path, config: dict[str, Any], arrays: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(arrays, {}))
    return folder


def scaled_update(adapter: Adapter, name: str) -> np.ndarray[Any, Any]:
    a, b = (x.astype(np.float64) for x in adapter.tensors[name])
    update: np.ndarray[Any, Any] = adapter.alpha / len(a) * b @ a
    return update


@st.composite
def adapters(draw: st.DrawFn, base: ModelInfo) -> Adapter:
    able = [name for name in base.tensors if "norm" not in name and name != "token_embd.weight"]
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    found = {}
    for name in draw(st.sets(st.sampled_from(able), min_size=1)):
        rank, (n_out, n_in) = draw(st.sampled_from([1, 2, 5])), base.tensors[name][0]
        found[name] = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((rank, n_in), (n_out, rank)))
    tokens = tuple(draw(st.lists(st.integers(0, 319), max_size=3)))
    return Adapter(
        "llama", draw(st.floats(-1e6, 1e6, width=32).filter(bool)), found, "answer" if tokens else "all", tokens,
        draw(st.dictionaries(st.text("ab.", max_size=4).map("fwdllama.{}".format), st.text(max_size=5), max_size=2)),
    )  # type: ignore[arg-type]  # fmt: skip


@settings(max_examples=10)
@given(data=st.data())
def test_to_peft_and_back_gives_the_same_bytes(data: st.DataObject, base: ModelInfo) -> None:
    adapter = data.draw(adapters(base))
    with tempfile.TemporaryDirectory() as folder:
        write_peft(folder, adapter, base)
        assert adapter_bytes(read_peft(folder, base)) == adapter_bytes(adapter)


def test_from_peft_and_back_gives_the_same_tensors_and_settings(tmp_path: Path, base: ModelInfo) -> None:
    config = CONFIG | {"alora_invocation_tokens": [7, 9], "rank_pattern": {f"^{Q}": 2}}
    write_peft(tmp_path / "back", read_peft(save(tmp_path / "a", config, tensors()), base), base, base_name="org/model")
    file = open_safetensors(tmp_path / "back" / "adapter_model.safetensors")
    assert {name: file.read(name).tobytes() for name in file.tensors} == {n: a.tobytes() for n, a in tensors().items()}
    written = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["rank_pattern"]) == (2, 8, {})
    assert written["target_modules"] == [V, Q]  # not the same ones in each layer, so by name
    assert (written["alora_invocation_tokens"], written["base_model_name_or_path"]) == ([7, 9], "org/model")


def test_the_rows_of_q_and_k_are_reordered_and_no_others(tmp_path: Path, base: ModelInfo) -> None:
    adapter = read_peft(save(tmp_path / "a", CONFIG, tensors()), base)
    source = tensors()
    assert adapter.tensors["blk.0.attn_v.weight"][1].tobytes() == source[f"base_model.model.{V}.lora_B.weight"].tobytes()
    rows = source[f"base_model.model.{Q}.lora_B.weight"]
    for head in range(4):
        for i in range(8):  # Hugging Face pairs i with i + 8, llama.cpp 2i with 2i + 1
            mine = adapter.tensors["blk.1.attn_q.weight"][1][16 * head : 16 * (head + 1)]
            assert mine[2 * i].tolist() == rows[16 * head + i].tolist()
            assert mine[2 * i + 1].tolist() == rows[16 * head + i + 8].tolist()


def test_one_alpha_for_all_says_what_settings_for_each_said(tmp_path: Path, base: ModelInfo) -> None:
    arrays = tensors() | dict([half(V, "A", (4, 64)), half(V, "B", (32, 4))])
    v, plain = "blk.0.attn_v.weight", tensors() | arrays
    unscaled = plain[f"base_model.model.{V}.lora_B.weight"].astype(np.float64) @ plain[f"base_model.model.{V}.lora_A.weight"]
    for change, scale in (
        ({}, 8 / 4),
        ({"use_rslora": True}, 8 / 4**0.5),
        ({"alpha_pattern": {"self_attn.v_proj": 3.0}}, 3 / 4),
        ({"alpha_pattern": {"attn.v_proj": 3.0, f"^{V}": 5, "v_proj": 7}}, 5 / 4),  # the first that is whole parts
        ({"alpha_pattern": {"v_proj": 3.0}, "use_rslora": True}, 3 / 4**0.5),
    ):
        config = CONFIG | {"rank_pattern": {"layers.0.self_attn.v_proj": 4}} | change
        adapter = read_peft(save(tmp_path / "a", config, arrays), base)
        np.testing.assert_allclose(scaled_update(adapter, v), scale * unscaled, rtol=1e-5, atol=1e-6)
        q_scale = 8 / 2**0.5 if "use_rslora" in change else 8 / 2
        size = np.linalg.norm(plain[f"base_model.model.{Q}.lora_B.weight"] @ plain[f"base_model.model.{Q}.lora_A.weight"])
        assert np.isclose(np.linalg.norm(scaled_update(adapter, "blk.1.attn_q.weight")), q_scale * size, rtol=1e-5)


def test_an_alpha_of_zero_is_said_to_peft_as_a_scale_of_one(tmp_path: Path, base: ModelInfo) -> None:
    adapter = replace(read_peft(save(tmp_path / "a", CONFIG, tensors()), base), alpha=0.0)
    write_peft(tmp_path / "b", adapter, base)
    back = read_peft(tmp_path / "b", base)
    assert back.alpha == 2  # of rank 2
    assert back.tensors["blk.0.attn_v.weight"][1].tobytes() == adapter.tensors["blk.0.attn_v.weight"][1].tobytes()


def test_adapted_layers_are_named_as_people_write_them(tmp_path: Path, base: ModelInfo) -> None:
    arrays = dict(half(f"model.layers.{i}.mlp.up_proj", *part) for i in (0, 2) for part in (("A", (2, 64)), ("B", (128, 2))))
    write_peft(tmp_path / "b", read_peft(save(tmp_path / "a", CONFIG, arrays), base), base)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["layers_to_transform"]) == (["up_proj"], [0, 2])


def test_the_copy_of_the_output_matrix_that_peft_saves_is_passed_over(tmp_path: Path, base: ModelInfo) -> None:
    head = dict([half("lm_head", "A", (2, 64)), half("lm_head", "B", (320, 2))])
    copy = {"base_model.model.lm_head.base_layer.weight": np.zeros((320, 64), np.float32)}
    assert list(read_peft(save(tmp_path / "a", CONFIG, head | copy), base).tensors) == ["output.weight"]
    resized = {"base_model.model.lm_head.base_layer.weight": np.zeros((321, 64), np.float32)}
    with pytest.raises(FileError, match=r"lm_head.base_layer.weight is no lora_A or lora_B but a whole tensor"):
        read_peft(save(tmp_path / "a", CONFIG, head | resized), base)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"peft_type": "LOHA"}, r"peft_type is 'LOHA', but only LORA is converted"),
    ({"bias": "lora_only"}, r"bias is 'lora_only', but an adapter of llama.cpp cannot hold biases"),
    ({"use_dora": True}, r"use_dora is True, which an adapter of llama.cpp cannot express"),
    ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which an adapter"),
    ({"trainable_token_indices": [1]}, r"trainable_token_indices is \[1\], which an adapter"),
    ({"fan_in_fan_out": True}, r"fan_in_fan_out is True"),
    ({"lora_bias": True}, r"lora_bias is True"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa', which changes the base model too"),
    ({"r": 4}, r"lora_A of \S+ has shape \(2, 64\), but rank 4 and the base model need \(4, 64\)"),
    ({"r": "2"}, r"r is '2', but must be a positive integer"),
    ({"lora_alpha": None}, r"lora_alpha is None, but must be a finite number"),
    ({"lora_alpha": 0}, r"lora_alpha is 0, which switches the adapter off"),
    ({"lora_alpha": float("nan")}, r"lora_alpha is nan"),
    ({"alpha_pattern": {"(a+)+$": 3}}, r"alpha_pattern has the pattern '\(a\+\)\+\$', but only names of modules are"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\], but must be an object"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern of q_proj is 0, but must be a positive integer"),
    ({"alora_invocation_tokens": "x"}, r"alora_invocation_tokens is 'x', but must be a list of token ids"),
])  # fmt: skip
def test_settings_that_llama_cpp_lacks_are_refused(change: dict[str, Any], sentence: str, tmp_path: Path, base: ModelInfo) -> None:
    with pytest.raises(FileError, match=sentence) as caught:
        read_peft(save(tmp_path / "a", CONFIG | change, tensors()), base)
    assert str(caught.value).startswith(str(tmp_path / "a"))


@pytest.mark.parametrize(("name", "shape", "sentence"), [
    (f"base_model.model.{Q}.lora_magnitude_vector", (64,), r"lora_magnitude_vector is a DoRA magnitude, which"),
    (f"base_model.model.{Q}.lora_B.bias", (64,), r"lora_B.bias is a bias, which"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", (2, 320), r"lora_embedding_A is the token embeddings, which"),
    ("base_model.model.model.embed_tokens.weight", (320, 64), r"embed_tokens.weight is no lora_A or lora_B but a whole tensor"),
    ("base_model.model.model.norm.lora_A.weight", (2, 64), r"norm.lora_A.weight belongs to no matrix that is adapted"),
    ("base_model.model.model.layers.3.mlp.up_proj.lora_A.weight", (2, 64), r"layers.3.\S+ belongs to no matrix that is adapted"),
    ("base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", (2, 64), r"layers.2.mlp.up_proj has lora_B missing"),
    (f"base_model.model.{Q}.lora_B.weight", (65, 2), r"lora_B of \S+q_proj has shape \(65, 2\), .* need \(64, 2\)"),
])  # fmt: skip
def test_tensors_that_are_no_adapter_s_are_refused(
    name: str, shape: tuple[int, ...], sentence: str, tmp_path: Path, base: ModelInfo
) -> None:
    with pytest.raises(FileError, match=sentence):
        read_peft(save(tmp_path / "a", CONFIG, tensors() | {name: np.zeros(shape, np.float32)}), base)


def test_an_adapter_of_nothing_or_of_another_kind_of_model_is_refused(tmp_path: Path, base: ModelInfo) -> None:
    with pytest.raises(FileError, match=r"holds no tensors, but an adapter has at least one lora_A and lora_B"):
        read_peft(save(tmp_path / "a", CONFIG, {}), base)
    with pytest.raises(FileError, match=r"PEFT adapters for 'falcon' are not converted; they are for llama, qwen2"):
        read_peft(save(tmp_path / "a", CONFIG, tensors()), replace(base, architecture="falcon"))
    tied = replace(base, tensors={name: shape for name, shape in base.tensors.items() if name != "output.weight"})
    head = dict([half("lm_head", "A", (2, 64)), half("lm_head", "B", (320, 2))])
    with pytest.raises(FileError, match=r"adapts lm_head, which is output.weight and which the base model lacks \(tied"):
        read_peft(save(tmp_path / "a", CONFIG, head), tied)


def test_a_folder_with_an_adapter_is_kept_unless_forced(tmp_path: Path, base: ModelInfo) -> None:
    adapter = read_peft(save(tmp_path / "a", CONFIG, tensors()), base)
    kept = (tmp_path / "a" / "adapter_config.json").read_bytes()
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match=r"adapter_config.json: already exists"):
        write_peft(tmp_path / "a", adapter, base)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["adapter_config.json"]
    assert (tmp_path / "a" / "adapter_config.json").read_bytes() == kept
    write_peft(tmp_path / "a", adapter, base, force=True)
    assert adapter_bytes(read_peft(tmp_path / "a", base)) == adapter_bytes(adapter)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"file: is a file, but a folder to write to was expected"):
        write_peft(tmp_path / "file", adapter, base)
    with pytest.raises(FileError, match=r"none/b: cannot be made: No such file or directory"):
        write_peft(tmp_path / "none" / "b", adapter, base)


def test_an_adapter_of_another_model_is_not_written(tmp_path: Path, base: ModelInfo) -> None:
    adapter = read_peft(save(tmp_path / "a", CONFIG, tensors()), base)
    smaller = replace(base, tensors={**base.tensors, "blk.0.attn_v.weight": ((16, 64), "F32")})
    with pytest.raises(FileError, match=r"the adapter: blk.0.attn_v.weight.lora_b has shape \(32, 2\), but the base model"):
        write_peft(tmp_path / "b", adapter, smaller)
    assert not (tmp_path / "b").exists()
