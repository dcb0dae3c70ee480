"""`gguf convert` and `gguf peft` as a user runs them: the path on stdout, or one sentence and an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gguf_tools.adapter import Adapter, read_adapter, write_adapter
from gguf_tools.model import read_model_info
from tests.cli.conftest import Run
from tests.gguf_tools.folder import CONFIG, byte_level, write_folder

NAME = "blk.0.attn_q.weight"


def test_convert_writes_a_model_and_prints_its_path(run: Run, tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer["added_tokens"].append({"id": 300, "content": "<more>"})
    write_folder(tmp_path / "hf", CONFIG, tokenizer=tokenizer)
    result = run("gguf", "convert", "hf", "-o", "m.gguf")
    assert (result.code, result.out) == (0, "m.gguf\n")
    assert result.err == "warning: the added token '<more>' was left out: the model has no embedding for it.\n"
    assert read_model_info(tmp_path / "m.gguf").quantisation == "F16"
    assert run("gguf", "convert", "hf", "-o", "m.gguf", "--type", "f32", "--force").code == 0
    assert read_model_info(tmp_path / "m.gguf").quantisation == "F32"


def test_convert_refuses_in_one_sentence(run: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "hf", CONFIG)
    (tmp_path / "m.gguf").touch()
    for arguments, code, sentence in (
        (("hf", "-o", "m.gguf"), 1, "m.gguf: already exists; give another name, or --force to replace it."),
        (("none", "-o", "x.gguf"), 1, "none: does not exist."),
        (("hf", "-o", "x.gguf", "--type", "q9"), 1, "type 'q9' is not one that is converted to; give one of F32"),
        (("hf",), 2, "Missing option '--out' / '-o'."),
    ):
        result = run("gguf", "convert", *arguments)
        assert (result.code, result.out) == (code, "")
        assert result.error.startswith(sentence)
    assert not (tmp_path / "x.gguf").exists()


def test_an_adapter_goes_to_peft_and_back(run: Run, model: Path, tmp_path: Path) -> None:
    n_out, n_in = read_model_info(model).tensors[NAME][0]
    rng = np.random.default_rng(0)
    pair = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((2, n_in), (n_out, 2)))
    write_adapter(tmp_path / "a.gguf", Adapter("llama", 8.0, {NAME: pair}, "answer", (1, 2)))  # type: ignore[dict-item]
    there = run("gguf", "peft", "from-gguf", "a.gguf", "--base", model, "-o", "peft", "--base-name", "org/name")
    assert (there.code, there.out) == (0, "peft\n")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    back = run("gguf", "peft", "to-gguf", "peft", "--base", model, "-o", "b.gguf")
    assert (back.code, back.out) == (0, "b.gguf\n")
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert read_adapter(tmp_path / "b.gguf").invocation_tokens == (1, 2)


def test_peft_refuses_in_one_sentence(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, sentence in (
        (("to-gguf", "empty", "--base", model, "-o", "b.gguf"), "empty/adapter_config.json: does not exist."),
        (("to-gguf", "empty", "--base", "nothing.gguf", "-o", "b.gguf"), "nothing.gguf"),
        (("from-gguf", model, "--base", model, "-o", "p"), f"{model}: is not a LoRA adapter"),
    ):
        result = run("gguf", "peft", *arguments)
        assert (result.code, result.out) == (1, "")
        assert sentence in result.error
    assert not (tmp_path / "p").exists()
