"""Layers taken out of a model are the same bytes under other numbers, only where that changes nothing, and take little memory."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from gguf_tools.errors import FileError
from gguf_tools.header import MODEL_LIMITS, parse_header
from gguf_tools.mapping import mapped
from gguf_tools.model import read_model_info
from gguf_tools.split import can_be_cut, extract_layers
from gguf_tools.synth import write_tiny_llama
from tests.gguf_tools import bases
from tests.gguf_tools.forge import ARRAY, BOOL, U32


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("source") / "f32.gguf", n_layers=5)


def tensor_bytes(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def metadata(path: Path) -> dict[str, Any]:
    """Every value, arrays as lists."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items() if not key.startswith("GGUF.")}


@pytest.mark.parametrize(("first", "last"), [(0, 5), (0, 2), (2, 5), (1, 4), (4, 5)])
def test_extracted_layers_are_the_same_bytes_numbered_from_zero(
    first: int, last: int, source: Path, tmp_path: Path, open_llama: Callable[..., Any]
) -> None:
    info = extract_layers(source, tmp_path / "part.gguf", first, last)
    assert info.n_layers == last - first
    expected = {}
    for name, data in tensor_bytes(source).items():
        _, _, rest = name.partition(".")
        layer, _, module = rest.partition(".")
        if not name.startswith("blk."):
            expected[name] = data
        elif first <= int(layer) < last:
            expected[f"blk.{int(layer) - first}.{module}"] = data
    assert tensor_bytes(info.path) == expected
    assert open_llama(info.path).logits([5, 6, 7]).shape == (3, 320)


def test_extracting_keeps_quantised_tensors_as_they_are(tmp_path: Path) -> None:
    quantised = write_tiny_llama(tmp_path / "q.gguf", type="Q4_0", n_layers=12, tied=False)
    info = extract_layers(quantised, tmp_path / "part.gguf", 9, 12)
    assert (info.n_layers, info.quantisation, info.file_type) == (3, "Q4_0", 2)
    whole, part = tensor_bytes(quantised), tensor_bytes(info.path)
    assert part["blk.2.attn_v.weight"] == whole["blk.11.attn_v.weight"]
    assert part["output.weight"] == whole["output.weight"]


@pytest.mark.parametrize("rows", [[2, 3, 4, 9, 318, 319], [*range(319, -1, -1)]])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_shortlist_keeps_those_rows_of_the_output_as_they_are(kind: str, tied: bool, rows: list[int], tmp_path: Path) -> None:
    whole = write_tiny_llama(tmp_path / "whole.gguf", type=kind, n_layers=3, tied=tied)
    part = extract_layers(whole, tmp_path / "part.gguf", 1, 3, vocabulary="none", shortlist=rows)
    assert (part.n_vocab, part.tied_embeddings) == (len(rows), True)
    before, after = tensor_bytes(whole), tensor_bytes(part.path)
    output = before["token_embd.weight" if tied else "output.weight"]
    n = len(output) // 320
    assert after.pop("token_embd.weight") == b"".join(output[n * row : n * (row + 1)] for row in rows)
    every = tensor_bytes(extract_layers(whole, tmp_path / "every.gguf", 1, 3, vocabulary="none").path)
    assert every.pop("token_embd.weight") == output
    assert after == every


@pytest.mark.parametrize("rows", [[], [1, 1], [-1, 4], [5, 320]])
def test_a_shortlist_that_names_no_tokens_or_other_ones_is_refused(rows: list[int], source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"f32.gguf: a shortlist of tokens must have some of 0 to 319, each once\.$"):
        extract_layers(source, tmp_path / "part.gguf", 1, 5, vocabulary="none", shortlist=rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("last", "vocabulary"), [(4, "none"), (5, "kept")])
def test_a_shortlist_is_for_a_part_with_output_and_without_texts(last: int, vocabulary: Any, source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a shortlist of tokens is for a part without vocabulary that ends at the last layer"):
        extract_layers(source, tmp_path / "part.gguf", 1, last, vocabulary=vocabulary, shortlist=[1])


@pytest.mark.parametrize(("first", "last"), [(3, 3), (4, 2), (-1, 2), (0, 6)])
def test_layers_that_are_not_there_are_refused(first: int, last: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"has layers 0 to 4, but {first} to {last - 1} were asked for"):
        extract_layers(source, tmp_path / "part.gguf", first, last)


def test_layers_of_an_unknown_architecture_are_not_moved(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "other.gguf", architecture="cohere2")
    with pytest.raises(FileError, match=r"layers of the architecture 'cohere2' may depend on their position"):
        extract_layers(path, tmp_path / "part.gguf", 1, 3)


def test_layers_that_repeat_in_a_pattern_are_cut_only_where_it_begins(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "gemma.gguf", architecture="gemma3", n_layers=7)
    with pytest.raises(FileError, match=r"layers of gemma3 repeat every 6, so a part cannot begin at 3"):
        extract_layers(path, tmp_path / "part.gguf", 3, 7)


def test_a_model_of_special_depth_is_not_cut(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "gemma.gguf", architecture="gemma2", n_layers=46, n_embd=8, n_ff=8)
    with pytest.raises(FileError, match=r"a gemma2 model of 46 layers computes differently in part"):
        extract_layers(path, tmp_path / "part.gguf", 2, 46)


def test_what_a_scaling_architecture_is_fed_would_be_scaled_so_it_is_not_cut(tmp_path: Path) -> None:
    for architecture in ("gemma", "gemma2"):
        path = write_tiny_llama(tmp_path / f"{architecture}.gguf", architecture=architecture, n_layers=4)
        with pytest.raises(FileError, match=rf"llama.cpp scales all that a {architecture} model is fed .*, so a part cannot begin at 2"):
            extract_layers(path, tmp_path / "part.gguf", 2, 4)
        assert not can_be_cut(read_model_info(path), 2)
        assert extract_layers(path, tmp_path / f"{architecture}-trunk.gguf", 0, 2).n_layers == 2


def test_metadata_stays_but_for_the_number_of_layers_and_what_has_a_value_for_each(tmp_path: Path) -> None:
    parts = bases.tiny(n_layers=5)
    parts.keys["llama.attention.head_count_kv"] = ARRAY, struct.pack("<IQ5I", U32, 5, *[2] * 5)
    parts.keys["tokenizer.of.five"] = ARRAY, struct.pack("<IQ5I", U32, 5, *range(5))
    (tmp_path / "whole.gguf").write_bytes(parts.bytes())
    part = extract_layers(tmp_path / "whole.gguf", tmp_path / "part.gguf", 1, 4)
    changed = {"llama.block_count": 3, "llama.attention.head_count_kv": [2] * 3}
    assert metadata(part.path) == metadata(tmp_path / "whole.gguf") | changed
    assert part.kv_heads == (2, 2, 2)
    whole = extract_layers(tmp_path / "whole.gguf", tmp_path / "all.gguf", 0, 5)
    assert metadata(whole.path) == metadata(tmp_path / "whole.gguf")


@pytest.mark.parametrize("name", ["attention.sliding_window_pattern", "rope.dimension_sections"])
def test_arrays_as_long_as_the_model_that_cannot_be_cut_prevent_a_part(name: str, tmp_path: Path) -> None:
    parts = bases.of_architecture("gemma3", 7)
    parts.keys[f"gemma3.{name}"] = ARRAY, struct.pack("<IQ7?", BOOL, 7, *[True] * 7)
    path = tmp_path / "arrays.gguf"
    path.write_bytes(parts.bytes())
    with pytest.raises(FileError, match=rf"gemma3.{name} has a value for each layer, or merely as many, and cannot be cut to a part"):
        extract_layers(path, tmp_path / "part.gguf", 0, 6)
    assert not can_be_cut(read_model_info(path), 6)
    assert extract_layers(path, tmp_path / "all.gguf", 0, 7).n_layers == 7


@pytest.mark.parametrize(
    ("first", "last", "tied", "embeddings"),
    [
        (0, 5, False, "output.weight"),
        (0, 5, True, "token_embd.weight"),
        (0, 2, False, None),
        (0, 2, True, None),
        (2, 5, False, "output.weight"),
        (2, 5, True, "token_embd.weight"),
        (1, 4, False, None),
        (1, 4, True, None),
    ],
)
def test_a_part_without_vocabulary_keeps_the_matrices_it_computes_with(
    first: int, last: int, tied: bool, embeddings: str | None, tmp_path: Path
) -> None:
    path = write_tiny_llama(tmp_path / "whole.gguf", n_layers=5, tied=tied, type="Q8_0")
    part = extract_layers(path, tmp_path / "part.gguf", first, last, vocabulary="none")
    whole, found = tensor_bytes(path), tensor_bytes(part.path)
    assert "output.weight" not in found
    assert found["token_embd.weight"] == (whole[embeddings] if embeddings else bytes(32 * 64 * 4))
    assert part.n_vocab == (320 if embeddings else 32)
    assert found["output_norm.weight"] == whole["output_norm.weight"]
    values = metadata(part.path)
    assert [key for key in values if key.startswith("tokenizer.")] == ["tokenizer.ggml.model"]
    assert (values["tokenizer.ggml.model"], values["llama.vocab_size"]) == ("no_vocab", part.n_vocab)
    with pytest.raises(FileError, match=r"part.gguf: has no tokenizer"):
        read_model_info(part.path)


def test_a_part_is_not_written_over_its_source_nor_unasked_over_another_file(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(FileError, match=r"f32.gguf: is the source as well; the result needs another path"):
        extract_layers(source, source, 1, 3, force=True)
    assert source.read_bytes() == before
    (tmp_path / "part.gguf").write_bytes(b"precious")
    with pytest.raises(FileError, match=r"part.gguf: already exists; give another name, or --force to replace it"):
        extract_layers(source, tmp_path / "part.gguf", 1, 3)
    assert (tmp_path / "part.gguf").read_bytes() == b"precious"
    assert extract_layers(source, tmp_path / "part.gguf", 1, 3, force=True).n_layers == 2


def test_progress_counts_bytes_and_what_it_raises_ends_the_work_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    extract_layers(source, tmp_path / "part.gguf", 1, 3, progress=lambda done, total: seen.append((done, total)))
    n_bytes = sum(len(data) for data in tensor_bytes(tmp_path / "part.gguf").values())
    assert seen[-1] == (n_bytes, n_bytes)
    assert seen == sorted(seen)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_layers(source, tmp_path / "other.gguf", 1, 3, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["part.gguf"]


def test_a_source_that_shrinks_while_it_is_copied_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "whole.gguf", n_layers=4)
    with mapped(path) as data:
        entry = parse_header(data, str(path), MODEL_LIMITS).tensors["blk.3.ffn_down.weight"]

    def shrink(done: int, total: int) -> None:
        with open(path, "r+b") as file:
            file.truncate(entry.offset + 100)

    with pytest.raises(FileError, match=rf"whole.gguf: ended at byte {entry.offset + 100} while it was copied; was it changed meanwhile\?"):
        extract_layers(path, tmp_path / "part.gguf", 1, 4, progress=shrink)
    assert [each.name for each in tmp_path.iterdir()] == ["whole.gguf"]


DISK_FULL = """
import resource, sys
from gguf_tools.errors import FileError
from gguf_tools.split import extract_layers
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    extract_layers(sys.argv[1], sys.argv[2], 1, 3)
except FileError as error:
    print(error)
"""

MEMORY = """
import resource, sys
from gguf_tools.split import extract_layers
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
extract_layers(sys.argv[1], sys.argv[2], 0, 2, vocabulary=sys.argv[3])
print((peak() - before) / 1024, "llama_cpp" in sys.modules)
"""


def run(code: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_disk_that_fills_is_told_with_the_name_that_was_given(source: Path, tmp_path: Path) -> None:
    assert run(DISK_FULL, source, tmp_path / "part.gguf") == f"{tmp_path / 'part.gguf'}: cannot be written: File too large.\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocabulary", ["kept", "none"])
def test_cutting_takes_a_few_megabytes_of_memory_whatever_the_model(vocabulary: str, tmp_path: Path) -> None:
    """80 MB are copied, of which mapped pages would count; a large vocabulary costs more, while its texts are written."""
    path = write_tiny_llama(tmp_path / "large.gguf", type="Q8_0", n_layers=3, n_embd=1024, n_ff=12_288)
    growth, loaded = run(MEMORY, path, tmp_path / "part.gguf", vocabulary).split()
    assert (tmp_path / "part.gguf").stat().st_size > 80e6
    assert float(growth) < 12
    assert loaded == "False"


@pytest.mark.model
def test_the_top_of_a_real_model_is_extracted_unchanged(model_path: Path, tmp_path: Path) -> None:
    n_layers = read_model_info(model_path).n_layers
    info = extract_layers(model_path, tmp_path / "top.gguf", n_layers - 6, n_layers)
    whole, part = tensor_bytes(model_path), tensor_bytes(info.path)
    assert part["blk.0.attn_q.weight"] == whole[f"blk.{n_layers - 6}.attn_q.weight"]
    assert part["blk.5.ffn_down.weight"] == whole[f"blk.{n_layers - 1}.ffn_down.weight"]
