"""`gguf inspect`, `validate`, `diff` and `average` as a user runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gguf_tools.adapter import Adapter, read_adapter, write_adapter
from tests.cli.conftest import Run

NAME = "blk.0.attn_q.weight"


def write(path: Path, seed: int, a_seed: int = 0) -> Path:
    a = np.random.default_rng(a_seed).standard_normal((2, 64)).astype(np.float32)
    b = np.random.default_rng(seed).standard_normal((64, 2)).astype(np.float32)
    write_adapter(path, Adapter("llama", 4.0, {NAME: (a, b)}, "answer", (5, 6), {"fwdllama.base.sha256": "ab"}))
    return path


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a.gguf", 1), write(tmp_path / "b.gguf", 2)


def test_inspect_describes_a_model(run: Run, model: Path) -> None:
    result = run("gguf", "inspect", model)
    assert result.code == 0
    for words in ("llama", "3 of width 64, feed-forward 128", "4, sharing 2 of keys and values", "gpt2 (gpt-2), 320 tokens", "attn_q.weight", "Q8_0"):
        assert words in result.out
    view = run("gguf", "inspect", model, "--json").json
    assert (view["kind"], view["n_layers"], view["tokenizer"]["eos"]) == ("model", 3, {"id": 0, "text": "<|endoftext|>"})


def test_inspect_describes_an_adapter(run: Run, adapters: tuple[Path, Path]) -> None:
    out = run("gguf", "inspect", adapters[0]).out
    for words in ("LoRA of rank 2, alpha 4", "attn_q in 1 layers, 0 to 0", "from tokens 5, 6 on", "base sha256", "attn_q.weight.lora_b"):
        assert words in out
    assert run("gguf", "inspect", adapters[0], "--json").json["base"] == {"fwdllama.base.sha256": "ab"}


def test_validate_says_what_passed_and_what_was_not_looked_at(run: Run, model: Path, adapters: tuple[Path, Path]) -> None:
    result = run("gguf", "validate", model)
    assert (result.code, result.out) == (
        0,
        f"{model}: is a valid llama model of 29 tensors.\nNot checked: whether the matrices' numbers are finite (see --data).\n",
    )
    assert run("gguf", "validate", model, "--data").out == f"{model}: is a valid llama model of 29 tensors.\n"
    assert run("gguf", "validate", adapters[0], "--base", model).out == f"{adapters[0]}: is a valid llama adapter of 2 tensors.\n"
    assert run("gguf", "validate", adapters[0], "--json").json["valid"] is True


def test_validate_refuses_with_one_sentence_and_exit_code_1(run: Run, model: Path, adapters: tuple[Path, Path]) -> None:
    data = bytearray(adapters[0].read_bytes())
    data[-4:] = b"\0\0\x80\x7f"
    adapters[0].write_bytes(data)
    result = run("gguf", "validate", adapters[0], "--base", model)
    assert (result.code, result.out) == (1, "")
    assert result.error == f"{adapters[0]}: {NAME}.lora_b holds a value that is not finite at byte {len(data) - 4}."
    assert run("gguf", "validate", model, "--base", model).error == f"{model}: is a model, but only an adapter has a base."


def test_diff_prints_norms_by_tensor_and_for_all(run: Run, adapters: tuple[Path, Path]) -> None:
    lines = run("gguf", "diff", *adapters).out.splitlines()
    assert [line.split()[0] for line in lines] == ["tensor", NAME, "all"]
    facts = run("gguf", "diff", *adapters, "--json").json
    assert facts["kind"] == "adapter"
    assert [tensor["name"] for tensor in facts["tensors"]] == [NAME]
    assert 0.5 < facts["total"]["relative"] < 3
    same = run("gguf", "diff", adapters[0], adapters[0], "--json").json["total"]
    assert (same["norm_difference"], same["cosine"]) == (0, pytest.approx(1))


def test_average_writes_the_mean_and_never_over_a_file_unasked(run: Run, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "mean.gguf"
    assert run("gguf", "average", *adapters, "-o", out, "--weights", "3,1").out == f"{out}\n"
    mean, (one, two) = read_adapter(out), map(read_adapter, adapters)
    np.testing.assert_allclose(mean.tensors[NAME][1], 0.75 * one.tensors[NAME][1] + 0.25 * two.tensors[NAME][1], atol=1e-6)
    before = out.read_bytes()
    result = run("gguf", "average", *adapters, "-o", out)
    assert (result.code, result.error) == (1, f"{out}: already exists; give another name, or --force to replace it.")
    assert out.read_bytes() == before
    assert run("gguf", "average", *adapters, "-o", out, "--force").code == 0
    assert out.read_bytes() != before


def test_average_refuses_what_has_no_mean_and_writes_nothing(run: Run, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.gguf", 3, a_seed=9)
    result = run("gguf", "average", adapters[0], other, "-o", tmp_path / "mean.gguf")
    assert result.code == 1
    assert result.error.startswith(f"{other}: {NAME}.lora_a differs from {adapters[0]}, so the mean of the two changes is not")
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["a.gguf", "b.gguf", "other.gguf"]
    assert run("gguf", "average", adapters[0], other, "-o", tmp_path / "mean.gguf", "--concatenate").code == 0
    assert read_adapter(tmp_path / "mean.gguf").ranks == {NAME: 4}
    usage = run("gguf", "average", *adapters, "-o", tmp_path / "x.gguf", "--weights", "1;2")
    assert (usage.code, usage.error) == (2, "--weights is '1;2', but must be numbers with commas between them, such as 3,1.")
