"""A's rows are the directions in which a module's inputs vary most; the inputs are those that the model computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fwdllama.errors import EngineError
from fwdllama.llama.activation import (
    MAX_TOKENS,
    activation_a,
    cached_rows,
    module_inputs,
    principal_rows,
    store_rows,
)
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import Model, ModelOptions
from fwdllama.llama.trunk import Trunk, cut
from fwdllama.types import Encoded, Scope
from gguf_tools.model import file_sha256
from gguf_tools.synth import write_tiny_llama
from tests.reference import TinyLlama

SCOPES: tuple[Scope, ...] = get_args(Scope)
OPTIONS = ContextOptions(n_ctx_seq=256, n_seq=4, n_outputs=64, n_batch=64, n_threads=1, kv_type="f32", flash=False)
WIDTHS = {"attn_q": 64, "attn_k": 64, "attn_v": 64, "attn_output": 64, "ffn_gate": 64, "ffn_up": 64, "ffn_down": 128}
INVOCATION = (44, 45, 46)


def tokens(n: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 300, n).tolist())


EXAMPLES = [Encoded(str(n), tokens(n, n), INVOCATION, tokens(n_target, 90 + n)) for n, n_target in ((5, 1), (90, 4))]
N_BEHIND = 3 + 6
N_ALL = 95 + N_BEHIND


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model(path) as opened:
        yield opened


def weight(layer: int, module: str) -> str:
    return f"blk.{layer}.{module}.weight"


def names(*layers: int) -> list[str]:
    return [weight(layer, module) for layer in layers for module in WIDTHS]


class Watched(TinyLlama):
    """The model worked out by hand, keeping what each norm gives: two a layer, and one at the end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.normed: list[NDArray[np.float64]] = []

    def _normed(self, x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        self.normed.append(super()._normed(x, name))
        return self.normed[-1]


@pytest.mark.parametrize("scope", SCOPES)
def test_inputs_are_what_the_model_worked_out_by_hand_multiplies_where_the_adapter_is_on(path: Path, model: Model, scope: Scope) -> None:
    found = module_inputs(model, OPTIONS, EXAMPLES, names(0, 1), scope)
    by_hand: dict[str, list[NDArray[np.float64]]] = {name: [] for name in found}
    for e in EXAMPLES:
        watched = Watched(path)
        watched.logits(e.prompt + e.invocation + e.target[:-1])
        start = len(e.prompt) if scope == "answer" else 0
        for layer in (0, 1):
            for module in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
                by_hand[weight(layer, module)].append(watched.normed[2 * layer + module.startswith("ffn")][start:])
    n = N_BEHIND if scope == "answer" else N_ALL
    assert list(found) == names(0, 1)
    for name, values in found.items():
        assert values.shape == (n, WIDTHS[name.split(".")[2]])
        assert values.dtype == np.float32
        if by_hand[name]:
            assert np.abs(values - np.concatenate(by_hand[name])).max() < 2e-5, name


def test_the_last_layers_feed_forward_part_is_seen_where_the_last_token_is_computed(path: Path, model: Model) -> None:
    found = module_inputs(model, OPTIONS, EXAMPLES, names(2), "answer")
    watched = Watched(path)
    e = EXAMPLES[-1]
    watched.logits(e.prompt + e.invocation + e.target[:-1])
    assert found[weight(2, "attn_q")].shape == (N_BEHIND, 64)
    assert np.abs(found[weight(2, "ffn_up")][-1] - watched.normed[5][-1]).max() < 2e-5


@pytest.mark.parametrize("scope", SCOPES)
def test_trunk_and_top_have_the_inputs_of_the_whole_model_to_the_bit(path: Path, model: Model, scope: Scope) -> None:
    parts = cut(path, file_sha256(path), 1, path.parent)
    assert parts is not None
    trunk = Trunk(parts, OPTIONS, ModelOptions(), 2)
    with Model(parts.top, needs_vocabulary=False) as top:
        found = module_inputs(top, OPTIONS, EXAMPLES, names(1, 2), scope, trunk)
    trunk.close()
    expected = module_inputs(model, OPTIONS, EXAMPLES, names(1, 2), scope)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], values), name


def test_inputs_of_many_tokens_are_limited(model: Model) -> None:
    many = [Encoded("long", tokens(240, i), INVOCATION, (5,)) for i in range(3)]
    name = weight(0, "attn_q")
    found = module_inputs(model, OPTIONS, many, [name], "all")
    assert found[name].shape == (MAX_TOKENS, 64)
    assert np.array_equal(found[name][:243], module_inputs(model, OPTIONS, many[:1], [name], "all")[name])


def test_a_weight_that_the_model_does_not_use_is_named(model: Model) -> None:
    with pytest.raises(EngineError, match=r"^the inputs of blk\.7\.attn_q\.weight were not seen in the graph; choose "):
        module_inputs(model, OPTIONS, EXAMPLES[:1], [weight(0, "attn_q"), weight(7, "attn_q")], "answer")


def by_svd(inputs: NDArray[np.float32], rank: int) -> NDArray[np.float64]:
    centred = inputs.astype(np.float64) - inputs.astype(np.float64).mean(axis=0)
    directions: NDArray[np.float64] = np.linalg.svd(centred, full_matrices=False)[2][:rank]
    return directions


@given(st.integers(12, 60), st.integers(10, 90), st.integers(1, 8), st.integers(0, 1000))
def test_principal_rows_are_the_leading_right_singular_vectors_of_the_centred_inputs(n_tokens: int, n_in: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    deviations = 2.0 ** -np.arange(n_in) + 1e-3  # well apart, so that the directions are
    rotation = np.linalg.qr(rng.standard_normal((n_in, n_in)))[0]
    inputs = ((rng.standard_normal((n_tokens, n_in)) * deviations) @ rotation + 5.0).astype(np.float32)
    rows = principal_rows(inputs, rank)
    assert rows.shape == (rank, n_in)
    assert rows.dtype == np.float32
    assert np.abs(rows @ rows.T - np.eye(rank)).max() < 1e-5
    agreement = np.abs((rows * by_svd(inputs, rank)).sum(axis=1))
    assert agreement.min() > 1 - 1e-3
    assert (rows[np.arange(rank), np.abs(rows).argmax(axis=1)] > 0).all()


def spread(n_tokens: int, n_in: int, n_directions: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((n_tokens, n_directions)), rng.standard_normal((n_directions, n_in))
    values: NDArray[np.float32] = (parts[0] @ parts[1] + 1.0).astype(np.float32)
    return values


@pytest.mark.parametrize(
    ("inputs", "n_directions"),
    [
        (spread(40, 64, 2, 1), 2),
        (spread(3, 64, 20, 2), 2),  # three tokens have two directions about their mean
        (spread(1, 64, 20, 3), 0),
        (np.zeros((9, 64), np.float32), 0),
        (np.tile(spread(1, 64, 20, 4), (9, 1)), 0),  # one token nine times
        (spread(40, 64, 3, 5) * np.float32(1e-9), 3),
    ],
    ids=["of two directions", "three tokens", "one token", "zeros", "the same token", "small numbers"],
)
def test_inputs_of_fewer_directions_than_the_rank_leave_rows_of_zeros(inputs: NDArray[np.float32], n_directions: int) -> None:
    rows = principal_rows(inputs, 6)
    lengths = np.linalg.norm(rows, axis=1)
    assert lengths.tolist() == pytest.approx([1.0] * n_directions + [0.0] * (6 - n_directions), abs=1e-5)
    assert not rows[n_directions:].any()


def test_every_matrix_gets_the_rows_of_its_own_inputs() -> None:
    inputs: dict[str, Any] = {name: spread(20, WIDTHS[name.split(".")[2]], 9, i) for i, name in enumerate(names(0, 1))}
    inputs[weight(1, "attn_k")] = inputs[weight(1, "attn_q")].copy()
    a = activation_a(inputs, 4)
    assert list(a) == list(inputs)
    for name, rows in a.items():
        assert np.array_equal(rows, principal_rows(inputs[name], 4)), name


def test_kept_rows_are_found_again_to_the_bit_and_only_for_the_same_matrices(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.npz"
    rows = {name: spread(4, 64, 9, i) for i, name in enumerate(names(0))}
    assert cached_rows(path, names(0)) is None
    store_rows(path, rows)
    found = cached_rows(path, names(0))
    assert found is not None
    assert list(found) == names(0)
    assert all(np.array_equal(found[name], rows[name]) for name in names(0))
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"]
    assert cached_rows(path, names(0, 1)) is None


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04", b"cut"])
def test_kept_rows_that_are_damaged_are_made_anew_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes) -> None:
    path = tmp_path / "a.npz"
    store_rows(path, {weight(0, "attn_q"): spread(4, 64, 9, 1)})
    path.write_bytes(path.read_bytes()[:700] if content == b"cut" else content)
    assert cached_rows(path, [weight(0, "attn_q")]) is None
    assert "a.npz is damaged and is made anew" in caplog.text


def test_rows_that_cannot_be_kept_are_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    store_rows(tmp_path / "file" / "a.npz", {weight(0, "attn_q"): spread(4, 64, 9, 1)})
    assert "a.npz cannot be written: " in caplog.text
