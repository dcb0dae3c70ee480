"""Trunk and top are the whole model to the bit, and parts of another model are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwdllama.llama.seam import compare
from gguf_tools.split import split_model
from gguf_tools.synth import write_tiny_llama


@pytest.mark.parametrize(("kind", "at"), [("F32", 1), ("Q8_0", 2), ("Q4_0", 3)])
def test_trunk_and_top_give_the_logits_of_the_whole_to_the_bit(kind: str, at: int, tmp_path: Path) -> None:
    whole = write_tiny_llama(tmp_path / "whole.gguf", type=kind, n_layers=4)
    trunk, top = tmp_path / "trunk.gguf", tmp_path / "top.gguf"
    split_model(whole, at, trunk, top)
    seam = compare(whole, trunk, top, at, n_tokens=100, n_threads=1)
    assert (seam.whole, seam.n_different, seam.n_logits, seam.largest_difference) == (True, 0, 32_000, 0.0)


def test_parts_of_another_model_or_cut_are_told(tmp_path: Path) -> None:
    whole, other = (write_tiny_llama(tmp_path / f"{seed}.gguf", seed=seed, n_layers=4) for seed in (0, 1))
    for source, at in ((other, 2), (whole, 3)):
        trunk, top = tmp_path / f"trunk-{at}.gguf", tmp_path / f"top-{at}.gguf"
        split_model(source, at, trunk, top)
        seam = compare(whole, trunk, top, 2, n_threads=1)
        assert not seam.whole
        assert seam.n_different > 10_000
        assert seam.largest_difference > 0.01


@pytest.mark.model
def test_a_real_model_and_its_parts_agree_to_the_bit(model_path: Path, tmp_path: Path) -> None:
    trunk, top = tmp_path / "trunk.gguf", tmp_path / "top.gguf"
    split_model(model_path, 18, trunk, top)
    assert compare(model_path, trunk, top, 18).whole
