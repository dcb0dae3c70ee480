"""Models are quantised, merged, split and made at random from the command line; stdout is data, and bad input one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gguf_tools.adapter import Adapter, Scope, write_adapter
from gguf_tools.model import read_model_info
from gguf_tools.synth import write_tiny_llama

from .conftest import Run


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("gguf") / "f32.gguf")


def adapter(path: Path, size: float = 1.0, scope: Scope = "all") -> Path:
    pair = np.full((2, 64), 0.1, np.float32), np.full((64, 2), size, np.float32)
    tokens = (1, 2) if scope == "answer" else ()
    write_adapter(path, Adapter("llama", 2.0, {"blk.0.attn_q.weight": pair}, scope, tokens))
    return path


def test_int4_and_int8_are_made_by_one_command(run: Run, f32: Path) -> None:
    result = run("gguf", "quantize", f32, "--type", "int4", "--type", "int8", "-o", "m-{type}.gguf", "--threads", 1, "--json")
    assert (result.code, result.err) == (0, "")
    assert [(made["path"], made["layers"]) for made in result.json] == [("m-int4.gguf", 3), ("m-int8.gguf", 3)]
    assert [read_model_info(made["path"]).quantisation for made in result.json] == ["Q4_0", "Q8_0"]


def test_types_that_do_not_fit_are_noted(run: Run, f32: Path) -> None:
    result = run("gguf", "quantize", f32, "--type", "q6_k", "-o", "m.gguf", "--threads", 1)
    assert result.err.startswith("note: q6_k: rows of 22 of 29 tensors, such as token_embd.weight, are not whole blocks of this type")
    assert "types          22 Q8_0, 7 F32" in result.out


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--type", "int4", "--type", "int8", "-o", "m.gguf"], 2, "--out is 'm.gguf', but 2 types need a name for each file; put {type} into it."),
        (["--type", "q4_0", "--type", "q5", "-o", "{type}.gguf"], 1, "quantisation type 'q5' is unknown; these can be made: F32, F16"),
        (["--type", "q4_0", "--tensor-type", "attn_v", "-o", "m.gguf"], 2, "--tensor-type is 'attn_v', but must be PATTERN=TYPE"),
        (["--type", "q4_0", "-o", "gone/m.gguf"], 1, "gone/m.gguf: the folder gone does not exist; create it first."),
    ],
)
def test_bad_wishes_are_one_sentence_and_nothing_is_written(
    arguments: list[str], code: int, sentence: str, run: Run, f32: Path, tmp_path: Path
) -> None:
    result = run("gguf", "quantize", f32, *arguments)
    assert (result.code, result.out) == (code, "")
    assert result.error.startswith(sentence)
    assert not list(tmp_path.glob("*.gguf"))


def test_merging_says_how_rounding_compares_with_the_change(run: Run, f32: Path, tmp_path: Path) -> None:
    result = run("gguf", "merge", f32, adapter(tmp_path / "a.gguf"), "-o", "m.gguf", "--type", "f16", "--json")
    assert (result.code, result.err, result.json["adapted"]) == (0, "", 1)
    assert result.json["change_rms"] == pytest.approx(0.2, rel=1e-3)
    assert 0 < result.json["rounding_rms"] < 0.001
    result = run("gguf", "merge", f32, adapter(tmp_path / "b.gguf", 0.001), "-o", "m.gguf", "--type", "int4", "--force")
    assert result.err.startswith("note: storing the merged weights rounds them by 0.0")
    assert result.err.rstrip().endswith("--type f16 or q8_0 keeps more of it.")


def test_an_adapter_for_answers_is_merged_only_when_asked(run: Run, f32: Path, tmp_path: Path) -> None:
    answer = adapter(tmp_path / "a.gguf", scope="answer")
    refused = run("gguf", "merge", f32, answer, "-o", "m.gguf")
    assert refused.code == 1
    assert refused.error.endswith("another model than the one that was trained; --everywhere merges it all the same.")
    assert run("gguf", "merge", f32, answer, "-o", "m.gguf", "--everywhere").code == 0
    assert run("gguf", "merge", f32, answer, "-o", "m.gguf", "--everywhere").error == (
        "m.gguf: already exists; give another name, or --force to replace it."
    )


def test_a_model_is_split_and_checked(run: Run, f32: Path) -> None:
    result = run("gguf", "split", f32, "--at", 2, "-o", "trunk.gguf", "top.gguf", "--check", "--threads", 1, "--json")
    assert (result.code, result.err) == (0, "")
    assert [result.json[part]["layers"] for part in ("trunk", "top")] == [3, 1]
    assert result.json["check"] == {"tokens": 64, "logits": 64 * 320, "different": 0}
    assert run("gguf", "split", f32, "--at", 3, "-o", "a.gguf", "b.gguf").error.endswith("so it can be cut at 1 to 2, not at 3.")


def test_random_models_have_the_shape_that_is_named_or_given(run: Run, f32: Path) -> None:
    result = run("gguf", "synth", "-o", "a.gguf", "--type", "q4_0", "--n-layers", 5, "--untied", "--json")
    assert (result.code, result.json["layers"], result.json["types"]) == (0, 5, {"Q4_0": 37, "F32": 11})
    assert run("gguf", "synth", "-o", "b.gguf", "--like", f32).code == 0
    assert read_model_info("b.gguf").tensors == read_model_info(f32).tensors
    assert run("gguf", "synth", "-o", "c.gguf", "--like", f32, "--n-ff", 9).error == f"--n-ff goes with a named shape, but --like is the file {f32}."
    assert run("gguf", "synth", "-o", "c.gguf", "--like", "llama-9b").error.startswith("--like is 'llama-9b', but must be tiny, smollm2-135m")
