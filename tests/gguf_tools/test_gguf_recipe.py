"""A wish for single tensors comes true or is refused; importance data is read in both formats, and never from a file that is none."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import example, given
from hypothesis import strategies as st

from gguf_tools.errors import FileError
from gguf_tools.imatrix import read_imatrix
from gguf_tools.model import ModelInfo, read_model_info
from gguf_tools.quantize import quantize_model
from gguf_tools.recipe import FILE_TYPES, Recipe, misfits, tensor_overrides
from gguf_tools.synth import write_tiny_llama

OpenLlama = Callable[..., Any]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("recipe") / "f32.gguf", n_layers=2, n_embd=256, n_ff=256, tied=False)


@pytest.fixture(scope="module")
def info(source: Path) -> ModelInfo:
    return read_model_info(source)


def importance(info: ModelInfo) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        name: rng.random(shape[1], np.float32) + np.float32(0.1)
        for name, (shape, _) in info.tensors.items()
        if len(shape) == 2 and name != "token_embd.weight"
    }


def write_imatrix(path: Path, values: dict[str, np.ndarray[Any, Any]], n_tokens: float = 8.0) -> Path:
    writer = GGUFWriter(path, "imatrix")
    writer.add_string("general.type", "imatrix")
    for name, each in values.items():
        writer.add_tensor(f"{name}.in_sum2", (each * np.float32(n_tokens))[None])
        writer.add_tensor(f"{name}.counts", np.full((1, 1), n_tokens, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy(values: dict[str, np.ndarray[Any, Any]], n_calls: int = 3) -> bytes:
    parts = [struct.pack("<i", len(values))]
    for name, each in values.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", n_calls, each.size), (each * np.float32(n_calls)).tobytes()]
    return b"".join(parts)


def test_single_tensors_are_what_was_asked_for_and_all_others_the_type(source: Path, tmp_path: Path, open_llama: OpenLlama) -> None:
    recipe = Recipe("int4", (("attn_[qk]", "int8"), ("attn_", "q6_k"), (r"blk\.1\.ffn_down", "F16")), output="F16", embeddings="Q5_1")
    steps: list[tuple[int, int]] = []
    made = quantize_model(source, tmp_path / "q.gguf", recipe, n_threads=1, progress=lambda *step: steps.append(step))
    types = {name: kind for name, (shape, kind) in made.tensors.items() if len(shape) == 2}
    assert types == {
        "token_embd.weight": "Q5_1", "output.weight": "F16",
        **{f"blk.{i}.attn_{m}.weight": "Q8_0" for i in (0, 1) for m in "qk"},
        **{f"blk.{i}.attn_{m}.weight": "Q6_K" for i in (0, 1) for m in ("v", "output")},
        **{f"blk.{i}.ffn_{m}.weight": "Q4_0" for i in (0, 1) for m in ("gate", "up", "down")},
        "blk.1.ffn_down.weight": "F16",
    }  # fmt: skip
    assert steps == [(i, len(made.tensors)) for i in range(1, len(made.tensors) + 1)]
    assert np.isfinite(open_llama(made.path).logits(range(5, 20))).all()


def test_embeddings_that_are_the_output_too_have_one_type(tmp_path: Path) -> None:
    tied = write_tiny_llama(tmp_path / "tied.gguf", n_layers=1)
    made = quantize_model(tied, tmp_path / "q.gguf", Recipe("Q4_0", output="Q8_0"), n_threads=1)
    assert made.tensors["token_embd.weight"][1] == "Q8_0"
    with pytest.raises(FileError, match=r"output and embeddings are one tensor in this model, so they cannot be Q8_0 and F16"):
        quantize_model(tied, tmp_path / "no.gguf", Recipe("Q4_0", output="Q8_0", embeddings="F16"))


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        (Recipe("q4_9"), "quantisation type 'q4_9' is unknown; these can be made: F32, F16"),
        (Recipe("Q2_0"), "quantisation type 'Q2_0' is unknown"),
        (Recipe("IQ1_S"), "quantisation type IQ1_S has so few bits that it needs importance data; see --imatrix"),
        (Recipe("Q4_0", (("attn_q", "Q9"),)), "tensor type 'Q9' is unknown; a single tensor can be F32, F16"),
        (Recipe("Q4_0", (("attn_q", "Q8_K"),)), "tensor type 'Q8_K' is unknown"),
        (Recipe("Q4_0", (("attn_x", "Q8_0"),)), "the tensor pattern 'attn_x' fits none of its matrices"),
        (Recipe("Q4_0", (("_norm", "Q8_0"),)), "the tensor pattern '_norm' fits none of its matrices"),
        (Recipe("Q4_0", (("(", "Q8_0"),)), r"the tensor pattern '\(' is no regular expression: "),
        (Recipe("Q4_0", output="IQ2_XS"), "output.weight cannot be IQ2_XS without importance data for it; see --imatrix"),
        (Recipe("F16", (("attn_q", "Q8_0"),)), "can be of another type only beside a quantised one, not beside F16"),
    ],
)
def test_wishes_that_would_not_come_true_are_refused(recipe: Recipe, sentence: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=sentence):
        quantize_model(source, tmp_path / "q.gguf", recipe, n_threads=1)
    assert not list(tmp_path.iterdir())


def test_a_type_whose_blocks_do_not_fill_a_tensors_rows_is_refused_for_it_and_noted_for_the_rest(tmp_path: Path) -> None:
    """Given as the type of the output, it would abort the process."""
    odd = write_tiny_llama(tmp_path / "odd.gguf", n_layers=1, n_embd=48, n_ff=256, n_head=3, n_head_kv=3)
    with pytest.raises(FileError, match=r"token_embd.weight has rows of 48 values, but Q6_K needs whole blocks of 256"):
        quantize_model(odd, tmp_path / "q.gguf", Recipe("Q4_0", embeddings="Q6_K"))
    made = quantize_model(odd, tmp_path / "q.gguf", "Q4_K_M", n_threads=1)
    types = {name: kind for name, (shape, kind) in made.tensors.items() if len(shape) == 2}
    unfit = misfits(Recipe("Q4_K_M"), read_model_info(odd))
    assert {name for name, kind in types.items() if kind != "Q6_K"} == set(unfit)  # llama.cpp's mixture has Q6_K for ffn_down
    assert not misfits(Recipe("F16"), read_model_info(odd))


def test_importance_data_of_both_formats_gives_the_same_bytes_and_none_gives_others(source: Path, info: ModelInfo, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "new", importance(info))
    (tmp_path / "old").write_bytes(legacy(importance(info), n_calls=4))
    for tensor, values in importance(info).items():
        np.testing.assert_array_equal(read_imatrix(tmp_path / "new")[tensor], values)
        np.testing.assert_array_equal(read_imatrix(tmp_path / "old")[tensor], values)
    made = [
        quantize_model(source, tmp_path / f"{name}.gguf", Recipe("Q4_0", pure=True, imatrix=tmp_path / name), n_threads=1)
        for name in ("new", "old")
    ]
    assert made[0].file_type == made[1].file_type == int(FILE_TYPES["Q4_0"])
    assert made[0].path.read_bytes() == made[1].path.read_bytes()
    plain = quantize_model(source, tmp_path / "plain.gguf", Recipe("Q4_0", pure=True), n_threads=1)
    assert plain.tensors == made[0].tensors
    assert plain.path.read_bytes()[-10_000:] != made[0].path.read_bytes()[-10_000:]


@pytest.mark.model
def test_every_type_can_be_made(source: Path, info: ModelInfo, tmp_path: Path) -> None:
    """Among the slow tests, because llama.cpp computes the tables of the smallest types for 20 seconds."""
    write_imatrix(tmp_path / "imatrix", importance(info))
    for name, kind in FILE_TYPES.items():
        made = quantize_model(source, tmp_path / f"{name}.gguf", Recipe(name, imatrix=tmp_path / "imatrix"), n_threads=1)
        assert (name, made.file_type) == (name, int(kind))


def test_experts_that_no_token_reached_count_alike(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "i.gguf", "imatrix")
    writer.add_tensor("x.in_sum2", np.array([[2, 4], [9, 9]], np.float32))
    writer.add_tensor("x.counts", np.array([[2], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_imatrix(tmp_path / "i.gguf")["x"].tolist() == [1, 2, 1, 1]


def test_importance_of_another_model_is_refused(source: Path, info: ModelInfo, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    for values, sentence in (
        ({"blk.9.attn_q.weight": np.ones(256, np.float32)}, "names no tensor of .*f32.gguf. Was it made for another model"),
        ({name: np.ones(64, np.float32)}, f"has 64 values for {name}, but .*f32.gguf needs 256. Was it made for another model"),
        ({name: np.full(256, np.nan, np.float32)}, f"the importance of {name} holds a value that is negative or not finite"),
        ({name: np.full(256, -1, np.float32)}, f"the importance of {name} holds a value that is negative or not finite"),
    ):
        (tmp_path / "i").write_bytes(legacy(values))
        with pytest.raises(FileError, match=sentence):
            quantize_model(source, tmp_path / "q.gguf", Recipe("Q4_0", imatrix=tmp_path / "i"))
    with pytest.raises(FileError, match=r"gone: does not exist"):
        quantize_model(source, tmp_path / "q.gguf", Recipe("Q4_0", imatrix=tmp_path / "gone"))
    with pytest.raises(FileError, match=r"f32.gguf: is no importance matrix: it holds no tensor named \*.in_sum2"):
        read_imatrix(source)


WHOLE = legacy({"blk.0.attn_q.weight": np.arange(8, dtype=np.float32), "b": np.ones(3, np.float32)})


@given(st.integers(0, len(WHOLE) - 1))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, end: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "i"
    path.write_bytes(WHOLE[:end])
    with pytest.raises(FileError, match=r"truncated|is empty"):
        read_imatrix(path)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
@example(WHOLE.index(np.float32(18).tobytes()) + 3, 0x7F)  # a signalling NaN: numpy warns when it is divided
def test_a_changed_byte_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    path = tmp_path_factory.mktemp("bytes") / "i"
    path.write_bytes(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    refusal, found = None, {}
    try:
        found = read_imatrix(path)
    except FileError as error:
        refusal = str(error)
    assert refusal is None or refusal.startswith(f"{path}: ")
    assert all(np.isfinite(values).all() for values in found.values())


@given(st.text(max_size=12), st.sampled_from(["Q8_0", "int4", "F16", "Q6_K"]))
def test_any_pattern_names_matrices_of_the_model_or_is_refused(info: ModelInfo, pattern: str, kind: str) -> None:
    refusal, names = None, set()
    try:
        names = {name for name, _ in tensor_overrides(Recipe("Q4_0", ((pattern, kind),)), info, frozenset())}
    except FileError as error:
        refusal = str(error)
    assert bool(names) == (refusal is None)
    assert refusal is None or "the tensor pattern" in refusal
    assert names <= {name for name, (shape, _) in info.tensors.items() if len(shape) == 2}
