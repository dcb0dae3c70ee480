"""A trunk and a top are written together or not at all, and only where the cut changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from gguf_tools.errors import FileError
from gguf_tools.split import split_model
from gguf_tools.synth import write_tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("split") / "whole.gguf", n_layers=4, type="Q8_0")


def test_the_parts_share_one_layer_and_lose_none(source: Path, tmp_path: Path) -> None:
    trunk, top = split_model(source, 2, tmp_path / "trunk.gguf", tmp_path / "top.gguf")
    assert (trunk.n_layers, top.n_layers) == (3, 2)
    whole, lower, upper = ({t.name: t.data for t in GGUFReader(path).tensors} for path in (source, trunk.path, top.path))
    for layer in range(4):
        for part, number in ((lower, layer), (upper, layer - 2)):
            if f"blk.{number}.ffn_up.weight" in part:
                assert np.array_equal(part[f"blk.{number}.ffn_up.weight"], whole[f"blk.{layer}.ffn_up.weight"])
    assert np.array_equal(lower["token_embd.weight"], upper["token_embd.weight"])


@pytest.mark.parametrize("at", [-1, 0, 4, 99])
def test_a_model_is_cut_between_its_layers_only(at: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"whole.gguf: has layers 0 to 3, so it can be cut at 1 to 3, not at {at}"):
        split_model(source, at, tmp_path / "trunk.gguf", tmp_path / "top.gguf")


@pytest.mark.parametrize(
    ("trunk", "top", "sentence"),
    [
        ("a.gguf", "a.gguf", "model, trunk and top need three different paths"),
        ("gone/a.gguf", "b.gguf", "a.gguf: the folder .*gone does not exist"),
        ("a.gguf", "gone/b.gguf", "b.gguf: the folder .*gone does not exist"),
        ("a.gguf", "old.gguf", "old.gguf: already exists; give another name, or --force"),
    ],
)
def test_both_parts_are_written_or_none(trunk: str, top: str, sentence: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(b"precious")
    with pytest.raises(FileError, match=sentence):
        split_model(source, 2, tmp_path / trunk, tmp_path / top)
    assert [path.name for path in tmp_path.iterdir()] == ["old.gguf"]
    assert (tmp_path / "old.gguf").read_bytes() == b"precious"


def test_the_model_itself_is_never_written_over(source: Path, tmp_path: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(FileError, match=r"model, trunk and top need three different paths"):
        split_model(source, 2, tmp_path / "a.gguf", source, force=True)
    assert source.read_bytes() == before
