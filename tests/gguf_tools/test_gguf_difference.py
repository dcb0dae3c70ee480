"""Differences against the obvious way: build the matrices, subtract, and take norms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.adapter import Adapter, write_adapter
from gguf_tools.difference import TensorDifference, _change_difference, difference
from gguf_tools.errors import FileError
from gguf_tools.synth import write_tiny_llama
from tests.gguf_tools import bases
from tests.gguf_tools.forge import Tensor

NAME, OTHER = "blk.0.attn_q.weight", "blk.0.attn_v.weight"


def adapter(seed: int, rank: int = 3, alpha: float = 6.0, names: tuple[str, ...] = (NAME,), n_in: int = 12) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter("llama", alpha, {
        name: (rng.standard_normal((rank, n_in)).astype(np.float32), rng.standard_normal((10, rank)).astype(np.float32)) for name in names
    })  # fmt: skip


def change(adapter: Adapter, name: str = NAME) -> np.ndarray:  # type: ignore[type-arg]
    a, b = (x.astype(np.float64) for x in adapter.tensors[name])
    return (adapter.alpha / a.shape[0] if adapter.alpha else 1.0) * b @ a


@settings(max_examples=40)
@given(st.integers(0, 99), st.integers(1, 14), st.integers(1, 14), st.sampled_from([0.0, 1.0, -3.0]))
def test_norms_are_those_of_the_changes_at_any_ranks(seed: int, rank_a: int, rank_b: int, alpha: float) -> None:
    one, two = adapter(seed, rank_a, alpha), adapter(seed + 1000, rank_b)
    found = _change_difference(NAME, one, two)
    x, y = change(one), change(two)
    norms = [np.linalg.norm(x), np.linalg.norm(y), np.linalg.norm(x - y)]
    assert [found.norm_a, found.norm_b, found.norm_difference] == pytest.approx(norms, rel=1e-9)
    assert found.relative == pytest.approx(norms[2] / norms[0], rel=1e-9)
    assert found.cosine == pytest.approx(np.sum(x * y) / (norms[0] * norms[1]), abs=1e-9)


def test_the_same_change_made_of_other_factors_is_no_difference(tmp_path: Path) -> None:
    one = adapter(1)
    a, b = one.tensors[NAME]
    two = Adapter("llama", 12.0, {NAME: (np.repeat(a, 2, 0) / 2, np.repeat(b, 2, 1))})
    write_adapter(tmp_path / "a.gguf", one)
    write_adapter(tmp_path / "b.gguf", two)
    total = difference(tmp_path / "a.gguf", tmp_path / "b.gguf").total
    assert total.relative == pytest.approx(0, abs=1e-7)
    assert total.cosine == pytest.approx(1, abs=1e-12)


def test_a_file_does_not_differ_from_itself_at_all(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf", adapter(1, names=(NAME, OTHER)))
    write_tiny_llama(tmp_path / "m.gguf", type="Q4_0")
    for name in ("a.gguf", "m.gguf"):
        found = difference(tmp_path / name, tmp_path / name)
        assert [tensor.norm_difference for tensor in found.tensors] == [0.0] * len(found.tensors)
        assert found.total.cosine == pytest.approx(1, abs=1e-12)
        assert (found.only_a, found.only_b) == ((), ())


def test_tensors_of_one_file_only_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf", adapter(1, names=(NAME, OTHER)))
    write_adapter(tmp_path / "b.gguf", adapter(2, names=(NAME, "output.weight")))
    found = difference(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert ([tensor.name for tensor in found.tensors], found.only_a, found.only_b) == ([NAME], (OTHER,), ("output.weight",))


def quantised(path: Path, kind: GGMLQuantizationType) -> Path:
    """A tiny model with its matrices rounded to a type."""
    parts = bases.tiny()
    for i, tensor in enumerate(parts.tensors):
        if len(tensor.ne) == 2:
            values = np.frombuffer(tensor.payload, np.float32).reshape(tensor.ne[::-1])
            parts.tensors[i] = Tensor(tensor.name, tensor.ne, int(kind), None, quantize(values, kind).tobytes())
    path.write_bytes(parts.bytes())
    return path


def test_models_of_different_types_are_compared_by_value(tmp_path: Path) -> None:
    kinds = [GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0")]
    paths = [quantised(tmp_path / f"{kind.name}.gguf", kind) for kind in kinds]
    relative = [difference(paths[0], path).total.relative or 0 for path in paths]
    assert relative[0] == 0 < relative[1] < 1e-3 < relative[2] < 0.02 < relative[3] < 0.2


def test_a_tensor_larger_than_a_piece_is_compared_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "a.gguf", seed=1)
    write_tiny_llama(tmp_path / "b.gguf", seed=2)
    whole = difference(tmp_path / "a.gguf", tmp_path / "b.gguf")
    monkeypatch.setattr("gguf_tools.difference.PIECE_VALUES", 1000)
    pieces = difference(tmp_path / "a.gguf", tmp_path / "b.gguf")
    for one, two in zip(whole.tensors, pieces.tensors, strict=True):
        assert two.norm_difference == pytest.approx(one.norm_difference, rel=1e-12)


def test_nothing_is_divided_by_a_norm_of_zero() -> None:
    zero = TensorDifference("x", 0.0, 1.0, 1.0, 0.0)
    assert (zero.relative, zero.cosine) == (None, None)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf", adapter(1))
    write_adapter(tmp_path / "wide.gguf", adapter(1, n_in=16))
    write_tiny_llama(tmp_path / "m.gguf")
    write_tiny_llama(tmp_path / "q.gguf", architecture="qwen2")
    for b, sentence in (("m.gguf", r"m.gguf: is a model, but .*a.gguf is an adapter; only"), ("wide.gguf", r"attn_q.weight has shape \(10, 16\)")):
        with pytest.raises(FileError, match=sentence):
            difference(tmp_path / "a.gguf", tmp_path / b)
    with pytest.raises(FileError, match=r"q.gguf: is of the architecture 'qwen2', but .*m.gguf of 'llama'"):
        difference(tmp_path / "m.gguf", tmp_path / "q.gguf")
