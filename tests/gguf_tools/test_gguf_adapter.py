"""Adapters survive the round trip, are the same bytes everywhere, and never half written."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.adapter import Adapter, adapter_bytes, read_adapter, write_adapter
from gguf_tools.errors import FileError
from gguf_tools.output import replacing

NAME = "blk.0.attn_q.weight"


def small(**changes: object) -> Adapter:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    b = -np.arange(8, dtype=np.float32).reshape(4, 2)
    adapter = Adapter("llama", 16.0, {NAME: (a, b)}, "answer", (7, 8), {"fwdllama.base.sha256": "ab"})
    return replace(adapter, **changes)  # type: ignore[arg-type]


def assert_equal(left: Adapter, right: Adapter) -> None:
    assert (left.architecture, left.alpha, left.scope) == (right.architecture, right.alpha, right.scope)
    assert (left.invocation_tokens, dict(left.metadata)) == (right.invocation_tokens, dict(right.metadata))
    assert set(left.tensors) == set(right.tensors)
    for name, pair in left.tensors.items():
        for mine, other in zip(pair, right.tensors[name], strict=True):
            assert mine.dtype == other.dtype == np.float32
            assert mine.shape == other.shape
            assert mine.tobytes() == other.tobytes()


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    names = draw(
        st.sets(
            st.builds("blk.{}.{}.weight".format, st.integers(0, 99), st.sampled_from(["attn_q", "ffn_up"])), min_size=1
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    tensors = {}
    for name in names:
        rank, n_in, n_out = (draw(st.integers(1, 5)) for _ in range(3))
        a, b = rng.standard_normal((rank, n_in)), rng.standard_normal((n_out, rank))
        tensors[name] = a.astype(np.float32), b.astype(np.float32)
    tokens = tuple(draw(st.lists(st.integers(0, (1 << 31) - 1), max_size=4)))
    keys = st.text("abc.", max_size=8).map("fwdllama.{}".format)
    return Adapter(
        architecture=draw(st.sampled_from(["llama", "qwen2"])),
        alpha=draw(st.floats(allow_nan=False, allow_infinity=False, width=32)),
        tensors=tensors,
        scope="answer" if tokens else "all",
        invocation_tokens=tokens,
        metadata=draw(st.dictionaries(keys, st.text(), max_size=4)),
    )


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_what_is_written_is_read_back_exactly(adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        write_adapter(path, adapter)
        assert path.read_bytes() == adapter_bytes(adapter)
        assert_equal(read_adapter(path), adapter)


@settings(max_examples=30, deadline=None)
@given(adapters())
def test_the_order_of_tensors_and_metadata_does_not_change_the_bytes(adapter: Adapter) -> None:
    turned = replace(
        adapter,
        tensors=dict(list(adapter.tensors.items())[::-1]),
        metadata=dict(list(adapter.metadata.items())[::-1]),
    )
    assert adapter_bytes(turned) == adapter_bytes(adapter)


def test_the_smallest_adapter_has_the_bytes_agreed_upon() -> None:
    """Devices compare adapters by digest, so these bytes may change only together with the wire format."""
    digest = hashlib.sha256(adapter_bytes(small())).hexdigest()
    assert digest == "1e5f95a9503dde76f015106652538e4fb0aec8940a289dda7bdb2806acc0fe6c"


def test_bytes_do_not_depend_on_how_the_arrays_lie_in_memory() -> None:
    a, b = small().tensors[NAME]
    other = np.asfortranarray(a), np.repeat(b, 2, axis=0)[::2]
    assert adapter_bytes(small(tensors={NAME: other})) == adapter_bytes(small())


def test_other_programs_find_the_keys_and_tensors_that_llama_cpp_looks_for(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf", small())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 16.0,
        "adapter.alora.invocation_tokens": [7, 8],
        "fwdllama.base.sha256": "ab",
    }
    assert reader.fields["adapter.lora.alpha"].types == [gguf.GGUFValueType.FLOAT32]
    assert reader.fields["adapter.alora.invocation_tokens"].types[-1] == gguf.GGUFValueType.UINT32
    a, b = small().tensors[NAME]
    assert {tensor.name: tensor.data.tolist() for tensor in reader.tensors} == {
        f"{NAME}.lora_a": a.tolist(),
        f"{NAME}.lora_b": b.tolist(),
    }


def test_an_f16_adapter_of_another_program_is_read_as_float32(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_string("general.name", "theirs")
    writer.add_tensor(f"{NAME}.lora_b", np.full((4, 2), 0.5, np.float16))
    writer.add_tensor(f"{NAME}.lora_a", np.full((2, 3), 0.1, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    adapter = read_adapter(tmp_path / "a.gguf")
    assert (adapter.scope, adapter.invocation_tokens, adapter.metadata) == ("all", (), {})
    a, b = adapter.tensors[NAME]
    assert a.dtype == b.dtype == np.float32
    assert a.shape == (2, 3)
    assert a[0, 0] == np.float32(np.float16(0.1))
    assert (b == 0.5).all()


def test_arrays_that_were_read_can_be_written_to_after_the_file_is_gone(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a.gguf", small())
    adapter = read_adapter(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").unlink()
    adapter.tensors[NAME][0][0, 0] = 5.0
    assert adapter.tensors[NAME][0][0].tolist() == [5.0, 1.0, 2.0]


def test_ranks_and_parameters_are_counted_for_each_tensor() -> None:
    one = np.zeros((1, 5), np.float32), np.zeros((6, 1), np.float32)
    adapter = small(tensors={**small().tensors, "blk.1.attn_v.weight": one})
    assert adapter.ranks == {NAME: 2, "blk.1.attn_v.weight": 1}
    assert adapter.n_parameters == 2 * 3 + 4 * 2 + 5 + 6


A, B = small().tensors[NAME]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scope": "all"}, "scope 'all' and 2 invocation tokens; scope 'answer' needs some, scope 'all' has none"),
        ({"invocation_tokens": ()}, "scope 'answer' and 0 invocation tokens"),
        ({"invocation_tokens": (-1,)}, "invocation token -1, which is no token id"),
        ({"invocation_tokens": tuple(range(1000))}, "has 1000 tokens, but must have 1 to 256"),
        ({"alpha": float("nan")}, "alpha nan, but it must be a finite float32"),
        ({"alpha": 1e39}, "alpha 1e[+]39, but it must be a finite float32"),
        ({"metadata": {"general.name": "x"}}, "metadata key 'general.name', but ours begin with 'fwdllama.'"),
        ({"metadata": {"fwdllama.x": "\ud800"}}, "metadata 'fwdllama.x' that cannot be encoded"),
        ({"metadata": {"fwdllama.\n": "x"}}, "control characters"),
        ({"architecture": ""}, "general.architecture is missing"),
        ({"tensors": {}}, "holds no tensors"),
        ({"tensors": {NAME: (A, B[:, :1])}}, r"lora_a has shape \(2, 3\), lora_b \(4, 1\): the ranks differ"),
        ({"tensors": {NAME: (A * np.nan, B)}}, "lora_a holds a value that is not finite"),
        ({"tensors": {"token_embd.weight": (A, B)}}, "belongs to the token embeddings"),
        ({"tensors": {"blk.0.attn_q.bias": (A, B)}}, "belongs to a bias"),
    ],
)
def test_an_adapter_that_could_not_be_read_is_not_written(
    changes: dict[str, object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=sentence):
        write_adapter(tmp_path / "a.gguf", small(**changes))
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_written_to_a_stream() -> None:
    stream = io.BytesIO()
    write_adapter(stream, small())
    assert stream.getvalue() == adapter_bytes(small())


def replace_half(path: Path, stopped_by: BaseException) -> None:
    with replacing(path) as new:
        new.write_bytes(b"half")
        raise stopped_by


def test_a_file_replaced_in_vain_is_unchanged_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(FileError, match=r"a.gguf: cannot be written: No space left on device"):
        replace_half(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        replace_half(path, KeyboardInterrupt())
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_when_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.gguf").write_bytes(b"old")
    (tmp_path / "link.gguf").symlink_to("real.gguf")
    write_adapter(tmp_path / "link.gguf", small())
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "real.gguf").read_bytes() == adapter_bytes(small())


@pytest.mark.parametrize(
    ("target", "sentence"),
    [("folder", "folder: is a directory, but a file to write"), ("gone/a.gguf", "cannot be written: No such file")],
)
def test_a_path_that_cannot_be_written_is_a_sentence(target: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match=sentence):
        write_adapter(tmp_path / target, small())
