"""A Hugging Face LLaMA converted here computes in llama.cpp what it computed there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_tools.convert import convert_model
from gguf_tools.errors import FileError
from gguf_tools.safetensors import open_safetensors, safetensors_bytes
from tests.gguf_tools.conftest import Opener
from tests.gguf_tools.folder import CONFIG, byte_level, logits, weights, write_folder, write_shards
from tests.gguf_tools.refusal import peak_bytes

TOKENS = [5, 80, 17, 256, 257, 3, 44, 101, 9, 9, 250, 64]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500.0}  # fmt: skip


def slowed_by_llama3(scaling: dict[str, Any], head_dim: int) -> list[float]:
    """The divisors as Meta's code has them: a frequency at a time, by wavelength."""
    low, high = (scaling["original_max_position_embeddings"] / scaling[f"{end}_freq_factor"] for end in ("low", "high"))
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * scaling["rope_theta"] ** (i / head_dim)
        smooth = (scaling["original_max_position_embeddings"] / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / scaling["factor"] + smooth)
        divisors.append(1.0 if wavelength < high else scaling["factor"] if wavelength > low else between)
    assert len(set(divisors)) > 2  # all three kinds occur
    return divisors


@pytest.mark.parametrize(
    ("change", "slowed"),
    [
        ({}, 1.0),
        ({"tie_word_embeddings": True, "num_key_value_heads": 4}, 1.0),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 4.0),
        ({"rope_parameters": LLAMA3}, "llama3"),
    ],
    ids=["grouped queries", "tied", "linear scaling", "llama3 scaling"],
)
def test_logits_are_those_of_the_original(
    change: dict[str, Any], slowed: Any, tmp_path: Path, open_llama: Opener
) -> None:
    config = CONFIG | change
    tensors = weights(config)
    info = convert_model(write_folder(tmp_path / "hf", config, tensors), tmp_path / "m.gguf", type="f32").model
    assert (info.architecture, info.n_vocab, info.eos_token, info.quantisation) == ("llama", 300, 299, "F32")
    expected = logits(config, tensors, TOKENS, slowed_by_llama3(LLAMA3, 16) if slowed == "llama3" else slowed)
    assert np.std(expected) > 0.3
    assert np.abs(open_llama(tmp_path / "m.gguf", exact=True).logits(TOKENS) - expected).max() < 1e-4


@pytest.mark.parametrize(("type", "most"), [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.15)])
def test_smaller_types_compute_nearly_the_same(type: str, most: float, tmp_path: Path, open_llama: Opener) -> None:
    config = CONFIG | {"intermediate_size": 64}
    tensors = weights(config)
    folder = write_folder(tmp_path / "hf", config, tensors)
    assert convert_model(folder, tmp_path / "m.gguf", type=type).model.quantisation == type.upper()
    assert np.abs(open_llama(tmp_path / "m.gguf").logits(TOKENS) - logits(config, tensors, TOKENS)).max() < most


def test_shards_and_one_file_give_the_same_bytes_and_progress_reaches_the_end(tmp_path: Path) -> None:
    tensors = weights(CONFIG)
    folder = write_folder(tmp_path / "hf", tensors=tensors)
    convert_model(folder, tmp_path / "one.gguf")
    names = list(tensors)
    write_shards(folder, [{name: tensors[name] for name in names[i::3]} for i in range(3)])
    seen: list[tuple[int, int]] = []
    convert_model(folder, tmp_path / "three.gguf", progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "three.gguf").read_bytes()
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


def test_pieces_and_the_whole_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "hf")
    convert_model(folder, tmp_path / "whole.gguf", type="f32")
    monkeypatch.setattr("gguf_tools.convert._PIECE", 32 * 7)
    convert_model(folder, tmp_path / "pieces.gguf", type="f32")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_memory_is_a_piece_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG | {"intermediate_size": 1 << 14}  # matrices of 2 MiB, of which there are six
    folder = write_folder(tmp_path / "hf", config)
    monkeypatch.setattr("gguf_tools.convert._PIECE", 1 << 14)
    convert_model(folder, tmp_path / "first.gguf")  # what is kept for ever, such as imports, is not counted
    assert peak_bytes(lambda: convert_model(folder, tmp_path / "m.gguf")) < 1 << 20
    assert (tmp_path / "m.gguf").stat().st_size > 6 << 20


@pytest.mark.parametrize(("change", "sentence"), [
    ({"architectures": ["Qwen2ForCausalLM"]}, r"architectures is \['Qwen2ForCausalLM'\], but only LlamaForCausalLM"),
    ({"attention_bias": True}, r"attention_bias is True, but only False is converted"),
    ({"hidden_act": "gelu"}, r"hidden_act is 'gelu', but only 'silu'"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}, but only None"),
    ({"hidden_size": None}, r"hidden_size is missing, but must be a positive integer"),
    ({"num_hidden_layers": True}, r"num_hidden_layers is True, but must be a positive integer"),
    ({"num_key_value_heads": 3}, r"4 heads of 16 and 3 KV heads do not fit together"),
    ({"head_dim": 8}, r"q_proj.weight has shape \(64, 32\), but config.json calls for \(32, 32\)"),
    ({"num_hidden_layers": 3}, r"lacks model.layers.2.input_layernorm.weight, which config.json calls for"),
    ({"num_hidden_layers": 1}, r"model.layers.1.\S+ is no tensor of a LLaMA of 1 layers"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"the rope type is 'yarn', but only default, linear and llama3"),
    ({"rope_scaling": {"type": "linear"}}, r"factor of rope type linear is None, but must be a positive number"),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, r"low_freq_factor is 1.0 and high_freq_factor 1.0"),
    ({"vocab_size": 100, "eos_token_id": 9}, r"has shape \(300, 32\), but config.json calls for \(100, 32\)"),
    ({"eos_token_id": None}, r"names the token that ends a text \(eos\)"),
])  # fmt: skip
def test_what_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(FileError, match=sentence):
        convert_model(folder, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_weights_that_are_not_a_plain_llama_s_are_refused(tmp_path: Path) -> None:
    tensors = weights(CONFIG)
    q = "model.layers.0.self_attn.q_proj"
    large, infinite = tensors[f"{q}.weight"].copy(), tensors[f"{q}.weight"].copy()
    large[7, 3], infinite[7, 3] = 1e5, np.inf
    for change, sentence in (
        ({f"{q}.bias": np.zeros(64, np.float32)}, rf"{q}.bias is a bias, which models of this architecture do not have"),
        ({"model.extra.weight": np.zeros(4, np.float32)}, r"model.extra.weight is no tensor of a LLaMA of 2 layers"),
        ({f"{q}.weight": large}, r"q_proj.weight holds 100000, but F16 ends at 65504; take F32 or BF16"),
        ({f"{q}.weight": infinite}, r"q_proj.weight holds a value that is not finite in row 7"),
    ):
        with pytest.raises(FileError, match=sentence):
            convert_model(write_folder(tmp_path / "hf", tensors=tensors | change), tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_missing_and_misplaced_shards_are_named(tmp_path: Path) -> None:
    tensors = weights(CONFIG)
    folder = write_folder(tmp_path / "hf", tensors=tensors)
    names = list(tensors)
    write_shards(folder, [{name: tensors[name] for name in names[i::2]} for i in range(2)])
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    second = "model-00002-of-00002.safetensors"
    for places, sentence in (
        (whole["weight_map"] | {"lm_head.weight": "../x.safetensors"}, r"names '../x.safetensors', but a shard is a"),
        (whole["weight_map"] | {"more": second}, rf"{second}: lacks more, which model.safetensors.index.json says"),
        ({name: at for name, at in whole["weight_map"].items() if name != names[1]}, rf"{second}: holds {names[1]}, which"),
        ([], r"its weight_map must say for each tensor the name of a file"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(FileError, match=sentence):
            convert_model(folder, tmp_path / "m.gguf")
    index.write_text(json.dumps(whole))
    (folder / second).unlink()
    with pytest.raises(FileError, match=rf"{second}: is missing; model.safetensors.index.json lists 2 files"):
        convert_model(folder, tmp_path / "m.gguf")


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    for name, sentence in (("none", r"none: does not exist"), ("empty", r"holds neither model.safetensors nor"),
                           ("torch", r"holds pytorch_model.bin, which only torch reads")):  # fmt: skip
        if name != "none":
            (tmp_path / name).mkdir()
        if name == "torch":
            (tmp_path / name / "pytorch_model.bin").touch()
        with pytest.raises(FileError, match=sentence):
            convert_model(tmp_path / name, tmp_path / "m.gguf")
    with pytest.raises(FileError, match=r"hf: holds neither tokenizer.model nor tokenizer.json"):
        convert_model(write_folder(tmp_path / "hf", tokenizer={}), tmp_path / "m.gguf")
    with pytest.raises(FileError, match=r"type 'q4_k' is not one that is converted to; give one of F32, F16, BF16, Q8_0"):
        convert_model(tmp_path / "hf", tmp_path / "m.gguf", type="q4_k")


def test_an_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    folder, target = write_folder(tmp_path / "hf"), tmp_path / "m.gguf"
    target.write_text("mine")
    with pytest.raises(FileError, match=r"m.gguf: already exists"):
        convert_model(folder, target)
    assert target.read_text() == "mine"
    convert_model(folder, target, force=True)
    assert target.stat().st_size > 1000


def test_bf16_and_f16_weights_are_widened_exactly(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.25], [3e38, 1e-38]], np.float32)
    upper = (values.view("<u4") >> 16).astype("<u2")
    header = json.dumps({
        "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "F16", "shape": [2], "data_offsets": [8, 12]},
        "c": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
    }).encode()  # fmt: skip
    data = upper.tobytes() + np.array([0.5, -7], "<f2").tobytes() + np.float32(9).tobytes()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    file = open_safetensors(tmp_path / "x.safetensors")
    assert file.read("a").tobytes() == (upper.astype("<u4") << 16).tobytes()
    assert file.read("a", 1, 2).tolist() == [file.read("a")[1].tolist()]
    assert file.read("b").tolist() == [0.5, -7.0]
    assert file.read("c") == 9


def test_the_template_and_special_tokens_come_from_the_folder(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    }
    tokenizer["added_tokens"].append({"id": 300, "content": "<|more|>", "special": True})
    folder = write_folder(tmp_path / "hf", tokenizer=tokenizer)
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": "<|end|>"}, "eos_token": "he", "chat_template": [{"name": "default", "template": "old"}],
    }))  # fmt: skip
    done = convert_model(folder, tmp_path / "a.gguf")
    assert (done.model.bos_token, done.model.eos_token, done.model.add_bos) == (299, 256, True)
    assert done.model.chat_template == "old"
    assert done.warnings == ("the added token '<|more|>' was left out: the model has no embedding for it.",)
    (folder / "chat_template.jinja").write_text("new")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "he", "add_bos_token": False, "chat_template": "old"}))
    info = convert_model(folder, tmp_path / "b.gguf").model
    assert (info.bos_token, info.eos_token, info.add_bos, info.chat_template) == (256, 299, False, "new")


def test_written_safetensors_are_the_same_whatever_the_order() -> None:
    one = {"b": np.zeros((2, 3), np.float32), "a": np.ones(5, np.float32)}
    assert safetensors_bytes(one, {"y": "1", "x": "2"}) == safetensors_bytes(dict(sorted(one.items())), {"x": "2", "y": "1"})
