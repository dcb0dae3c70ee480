"""Models and adapters of transformers and peft compute in llama.cpp what they compute there; needs the extra `interop`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_tools.adapter import Adapter, read_adapter, write_adapter
from gguf_tools.convert import convert_model
from gguf_tools.model import ModelInfo
from gguf_tools.peft import read_peft, write_peft
from tests.gguf_tools.conftest import Opener
from tests.gguf_tools.folder import byte_level

torch = pytest.importorskip("torch", reason="transformers computes with torch; install the extra `interop`")
transformers = pytest.importorskip("transformers", reason="the original models are in the extra `interop`")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of other packages, which are not ours to fix

TOKENS = [5, 80, 17, 256, 257, 3, 44, 101, 9, 9, 250, 64, 1, 2, 200, 31]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500.0}  # fmt: skip


def original(**change: Any) -> Any:
    """A random LLaMA of transformers, its logits with a deviation near 1."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "eos_token_id": 299,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | change)).eval()


def logits_of(model: Any, tokens: list[int] = TOKENS) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0].float().numpy()
        return found


def converted(model: Any, folder: Path, **saving: Any) -> ModelInfo:
    model.save_pretrained(folder, **saving)
    (folder / "tokenizer.json").write_text(json.dumps(byte_level()))
    return convert_model(folder, folder.with_suffix(".gguf"), type="f32").model


@pytest.mark.parametrize("change", [
    {}, {"tie_word_embeddings": True, "num_key_value_heads": 4}, {"head_dim": 32},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}, {"rope_parameters": LLAMA3},
], ids=["grouped queries", "tied", "wide heads", "linear scaling", "llama3 scaling"])  # fmt: skip
def test_logits_are_those_of_transformers(change: dict[str, Any], tmp_path: Path, open_llama: Opener) -> None:
    model = original(**change)
    info = converted(model, tmp_path / "hf", max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    expected = logits_of(model)
    assert expected.std() > 0.3
    assert np.abs(open_llama(info.path, exact=True).logits(TOKENS) - expected).max() < 1e-3


def test_bf16_weights_of_transformers_are_read_exactly(tmp_path: Path, open_llama: Opener) -> None:
    info = converted(original().to(torch.bfloat16), tmp_path / "hf")
    expected = logits_of(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32))
    assert np.abs(open_llama(info.path, exact=True).logits(TOKENS) - expected).max() < 1e-3


def random_adapter(info: ModelInfo, tokens: tuple[int, ...] = ()) -> Adapter:
    rng = np.random.default_rng(1)
    tensors = {}
    for i, name in enumerate(name for name in info.tensors if name.endswith("weight") and "norm" not in name):
        if name != "token_embd.weight" and not name.startswith("blk.0."):
            rank = 4 if i % 3 else 8
            n_out, n_in = info.tensors[name][0]
            a, b = (rng.standard_normal(shape) * 0.2 for shape in ((rank, n_in), (n_out, rank)))
            tensors[name] = a.astype(np.float32), b.astype(np.float32)
    return Adapter("llama", 6.5, tensors, "answer" if tokens else "all", tokens)


def test_peft_loads_a_gguf_adapter_and_gives_the_same_logits(tmp_path: Path, open_llama: Opener) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is in the extra `interop`")
    model = original()
    info = converted(model, tmp_path / "hf")
    adapter = random_adapter(info)
    write_adapter(tmp_path / "a.gguf", adapter)
    write_peft(tmp_path / "peft", adapter, info, base_name=str(tmp_path / "hf"))
    plain = logits_of(model)
    expected = logits_of(peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval())
    assert np.abs(expected - plain).max() > 1
    assert np.abs(open_llama(info.path, tmp_path / "a.gguf", exact=True).logits(TOKENS) - expected).max() < 1e-2


@pytest.mark.parametrize("change", [
    {}, {"use_rslora": True, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 16}, "alpha_pattern": {"v_proj": 3}},
    {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 2]},
], ids=["plain", "rank-stabilised, with patterns", "some layers"])  # fmt: skip
def test_an_adapter_of_peft_gives_the_same_logits_in_llama_cpp(
    change: dict[str, Any], tmp_path: Path, open_llama: Opener
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is in the extra `interop`")
    model = original()
    info = converted(model, tmp_path / "hf")
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": 4, "lora_alpha": 10, "target_modules": linear, "task_type": "CAUSAL_LM"} | change
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "peft")
    write_adapter(tmp_path / "a.gguf", read_peft(tmp_path / "peft", info))
    expected = logits_of(adapted)
    with adapted.disable_adapter():
        assert np.abs(expected - logits_of(adapted)).max() > 0.3
    assert np.abs(open_llama(info.path, tmp_path / "a.gguf", exact=True).logits(TOKENS) - expected).max() < 1e-2


def test_an_adapter_for_answers_is_one_for_peft_too(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is in the extra `interop`")
    model = original()
    info = converted(model, tmp_path / "hf")
    write_peft(tmp_path / "peft", random_adapter(info, (44, 101)), info)
    adapted = peft.PeftModel.from_pretrained(original(), tmp_path / "peft").eval()
    assert adapted.peft_config["default"].alora_invocation_tokens == [44, 101]
    before, after = TOKENS.index(44), TOKENS.index(44) + 2
    difference = np.abs(logits_of(adapted) - logits_of(model)).max(axis=1)
    assert difference[:before].max() < 1e-4  # off until the invocation
    assert difference[after:].max() > 0.3
    adapted.save_pretrained(tmp_path / "again")
    assert read_peft(tmp_path / "again", info).invocation_tokens == (44, 101)


def test_a_round_trip_through_peft_changes_nothing(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is in the extra `interop`")
    info = converted(original(), tmp_path / "hf")
    adapter = random_adapter(info)
    write_adapter(tmp_path / "a.gguf", adapter)
    write_peft(tmp_path / "peft", adapter, info, base_name=str(tmp_path / "hf"))
    peft.PeftModel.from_pretrained(original(), tmp_path / "peft").save_pretrained(tmp_path / "again")
    back = read_peft(tmp_path / "again", info)
    assert back.alpha == adapter.alpha
    for name, pair in read_adapter(tmp_path / "a.gguf").tensors.items():
        assert [half.tobytes() for half in pair] == [half.tobytes() for half in back.tensors[name]]
