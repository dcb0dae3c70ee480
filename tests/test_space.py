"""theta and the adapter's tensors are the same numbers in two layouts, and A is drawn alike everywhere."""

from __future__ import annotations

import hashlib
import math
from itertools import islice
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.errors import UsageError
from fwdllama.space import MODULES, Space, build_space
from tests.reference import philox_words

N_LAYERS = 4
SIZES = {"q": (12, 8), "k": (6, 8), "v": (6, 8), "o": (8, 12), "gate": (10, 8), "up": (10, 8), "down": (8, 10)}
SHAPES = {f"blk.{i}.{MODULES[m]}.weight": size for i in range(N_LAYERS) for m, size in SIZES.items()}


def build(**changes: Any) -> Space:
    usual: dict[str, Any] = {"modules": ["q", "v"], "layers": None, "rank": 3, "alpha": 6.0, "train": "b", "seed": 5}
    return build_space(SHAPES, N_LAYERS, **{**usual, **changes})


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    first = draw(st.integers(0, N_LAYERS - 1))
    return build(
        modules=draw(st.lists(st.sampled_from(list(MODULES)), min_size=1, unique=True)),
        layers=(first, draw(st.integers(first, N_LAYERS - 1))),
        rank=draw(st.integers(1, 6)),
        train=draw(st.sampled_from(["b", "ab"])),
        seed=draw(st.integers(0, (1 << 64) - 1)),
    )


@given(spaces())
def test_every_number_of_theta_is_in_exactly_one_tensor(space: Space) -> None:
    theta = np.arange(space.n_params, dtype=np.float32)
    seen = np.concatenate([view.ravel() for _, view in space.views(theta)])
    assert np.array_equal(np.sort(seen), theta)


@given(spaces())
def test_views_have_the_shapes_of_the_model_and_write_through_to_theta(space: Space) -> None:
    theta = np.zeros(space.n_params, np.float32)
    parts = "ab" if space.train == "ab" else "b"
    views = dict(space.views(theta))
    assert set(views) == {f"{m.name}.lora_{part}" for m in space.matrices for part in parts}
    for name, view in views.items():
        n_out, n_in = SHAPES[name.rsplit(".", 1)[0]]
        assert view.shape == ((space.rank, n_in) if name.endswith("a") else (n_out, space.rank))
        view[...] = 1.0
    assert theta.all()


@given(spaces())
def test_training_starts_at_the_base_model_with_b_zero_and_a_as_drawn(space: Space) -> None:
    drawn = space.initial_a()
    tensors = space.tensors(space.initial_theta())
    assert set(tensors) == {m.name for m in space.matrices}
    for name, (a, b) in tensors.items():
        assert a.dtype == b.dtype == np.float32
        assert np.array_equal(a, drawn[name])
        assert b.shape == (SHAPES[name][0], space.rank)
        assert not b.any()


@given(spaces())
def test_tensors_are_the_views_of_theta_and_the_frozen_a(space: Space) -> None:
    theta = np.random.default_rng(0).standard_normal(space.n_params).astype(np.float32)
    views, drawn = dict(space.views(theta)), space.initial_a()
    for name, (a, b) in space.tensors(theta).items():
        assert np.array_equal(a, views.get(f"{name}.lora_a", drawn[name]))
        assert np.array_equal(b, views[f"{name}.lora_b"])


@pytest.mark.parametrize("train", ["b", "ab"])
def test_tensors_do_not_change_when_theta_does_later(train: Literal["b", "ab"]) -> None:
    space = build(train=train)
    theta = space.initial_theta()
    tensors = space.tensors(theta)
    before = [part.tobytes() for pair in tensors.values() for part in pair]
    theta += 1.0
    assert [part.tobytes() for pair in tensors.values() for part in pair] == before


def test_matrices_follow_layers_then_modules_as_named() -> None:
    space = build(modules=["v", "q"], layers=(1, 2))
    assert [m.name for m in space.matrices] == [f"blk.{i}.attn_{m}.weight" for i in (1, 2) for m in "vq"]
    assert space.first_layer == 1


def test_no_layers_named_means_all_of_them() -> None:
    assert [m.name for m in build(modules=["q"]).matrices] == [f"blk.{i}.attn_q.weight" for i in range(N_LAYERS)]


def test_n_params_counts_b_and_with_train_ab_also_a() -> None:
    assert build(train="b").n_params == N_LAYERS * 3 * (12 + 6)
    assert build(train="ab").n_params == N_LAYERS * 3 * (12 + 6 + 8 + 8)


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("seed", [0, 5, (1 << 63) + 1, (1 << 64) - 1])
def test_a_is_uniform_numbers_from_the_top_24_bits_of_its_own_philox_stream(seed: int, index: int) -> None:
    space = build(seed=seed)
    name = space.matrices[index].name
    units = [(word >> 40) / (1 << 24) * 2 - 1 for word in islice(philox_words((seed, index)), 3 * 8)]
    expected = np.array([unit * math.sqrt(3 / 8) for unit in units]).astype(np.float32)
    assert np.array_equal(space.initial_a()[name].ravel(), expected)


def test_a_has_its_golden_hash() -> None:
    drawn = build(seed=7).initial_a()
    data = b"".join(drawn[name].astype("<f4").tobytes() for name in sorted(drawn))
    assert hashlib.sha256(data).hexdigest() == "434a4adb80eea56fb1c2a147c41c10243011d6c1efc2477d2c4335cdc9e22803"


def test_a_has_variance_one_over_n_in() -> None:
    space = build_space(
        {"blk.0.attn_q.weight": (64, 2048)}, 1, modules=["q"], layers=None, rank=32, alpha=1.0, train="b", seed=1
    )
    a = space.initial_a()["blk.0.attn_q.weight"]
    assert float(a.var()) * 2048 == pytest.approx(
        1.0, abs=0.02
    )  # 65,536 numbers: four deviations of the estimate are 0.014
    assert float(np.abs(a).max()) <= math.sqrt(3 / 2048)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modules": ["q", "query"]}, "module 'query' is not one of q, k, v, o, gate, up, down."),
        ({"modules": []}, "module '(none)' is not one of q, k, v, o, gate, up, down."),
        (
            {"modules": ["token_embd"]},
            "module 'token_embd' is not one of q, k, v, o, gate, up, down. token_embd cannot be trained: with tied "
            "embeddings it is the output matrix too.",
        ),
        ({"layers": (0, 4)}, "layers 0-4 are outside the model, which has layers 0-3."),
        ({"layers": (-1, 2)}, "layers -1-2 are outside the model, which has layers 0-3."),
        ({"layers": (3, 2)}, "layers 3-2 are outside the model, which has layers 0-3."),
        ({"rank": 0}, "rank is 0, but must be at least 1."),
        ({"rank": -4}, "rank is -4, but must be at least 1."),
        ({"rank": 7}, "rank 7 exceeds the smaller side of blk.0.attn_v.weight (6 x 8)."),
    ],
)
def test_a_space_that_cannot_be_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        build(**changes)
    assert str(refused.value) == sentence


def test_a_module_that_a_layer_of_the_model_lacks_is_refused_by_its_tensor() -> None:
    shapes = {name: size for name, size in SHAPES.items() if name != "blk.2.ffn_up.weight"}
    with pytest.raises(UsageError, match=r"^the model has no tensor blk\.2\.ffn_up\.weight, so module 'up' cannot"):
        build_space(shapes, N_LAYERS, modules=["up"], layers=None, rank=1, alpha=1.0, train="b", seed=0)


def test_a_module_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^module 'q' is named twice"):
        build(modules=["q", "v", "q"])


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_is_not_a_positive_number_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match=rf"^alpha is {alpha}"):
        build(alpha=alpha)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_that_is_no_unsigned_64_bit_number_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=rf"^seed {seed} "):
        build(seed=seed)
