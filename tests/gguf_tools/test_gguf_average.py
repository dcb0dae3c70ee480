"""Means of adapters: exactly the mean of the changes, or a refusal that says why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_tools.adapter import Adapter, adapter_bytes
from gguf_tools.average import average
from gguf_tools.errors import FileError

NAME, OTHER = "blk.0.attn_q.weight", "blk.0.attn_v.weight"


def adapter(seed: int, *, a_seed: int = 0, rank: int = 4, alpha: float = 8.0, names: tuple[str, ...] = (NAME, OTHER)) -> Adapter:
    """Equal `a_seed` and rank give equal A."""
    a, b = np.random.default_rng(a_seed), np.random.default_rng(1000 + seed)
    tensors = {name: (a.standard_normal((rank, 24)).astype(np.float32), b.standard_normal((20, rank)).astype(np.float32)) for name in names}
    return Adapter("llama", alpha, tensors, "answer", (3, 4), {"fwdllama.base.sha256": "ab", "fwdllama.run.step": str(seed)})


def change(adapter: Adapter, name: str) -> np.ndarray:  # type: ignore[type-arg]
    a, b = (x.astype(np.float64) for x in adapter.tensors[name])
    return (adapter.alpha / a.shape[0] if adapter.alpha else 1.0) * b @ a


def mean_of_changes(adapters: list[Adapter], weights: list[float], name: str) -> np.ndarray:  # type: ignore[type-arg]
    return sum(w * change(x, name) for w, x in zip(weights, adapters, strict=True)) / sum(weights)  # type: ignore[no-any-return]


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=2, max_size=4)


@settings(max_examples=30)
@given(WEIGHTS, st.sampled_from([8.0, 2.0, 0.0]), st.booleans())
def test_the_change_is_the_weighted_mean_of_the_changes(weights: list[float], alpha: float, same_a: bool) -> None:
    adapters = [adapter(i, a_seed=0 if same_a else i, alpha=alpha if i else 8.0) for i in range(len(weights))]
    mean = average(adapters, weights, concatenate=not same_a)
    for name in (NAME, OTHER):
        assert mean.ranks[name] == (4 if same_a else 4 * len(weights))
        np.testing.assert_allclose(change(mean, name), mean_of_changes(adapters, weights, name), atol=1e-5)
    adapter_bytes(mean)  # valid, and can be written


def test_equal_a_is_kept_to_the_bit_and_the_rank_does_not_grow() -> None:
    adapters = [adapter(1), adapter(2)]
    mean = average(adapters)
    assert np.array_equal(mean.tensors[NAME][0], adapters[0].tensors[NAME][0])
    assert mean.ranks == {NAME: 4, OTHER: 4}


def test_the_mean_of_an_adapter_with_itself_is_itself() -> None:
    one = adapter(1)
    for n in (2, 3, 7):
        assert adapter_bytes(average([one] * n)) == adapter_bytes(one)
    assert adapter_bytes(average([one, adapter(2)], [5, 0])) == adapter_bytes(replace(one, metadata={"fwdllama.base.sha256": "ab"}))


def test_metadata_stays_where_all_agree() -> None:
    mean = average([adapter(1), adapter(2)])
    assert mean.metadata == {"fwdllama.base.sha256": "ab"}
    assert (mean.scope, mean.invocation_tokens, mean.alpha) == ("answer", (3, 4), 8.0)


def test_other_ranks_are_joined() -> None:
    adapters = [adapter(1, rank=2), adapter(2, rank=5, a_seed=3)]
    mean = average(adapters, [1, 3], concatenate=True)
    assert mean.ranks == {NAME: 7, OTHER: 7}
    np.testing.assert_allclose(change(mean, NAME), mean_of_changes(adapters, [1, 3], NAME), atol=1e-5)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (adapter(2, a_seed=5), r"second: blk.0.attn_q.weight.lora_a differs from first, so the mean .* --concatenate keeps it exactly"),
        (replace(adapter(2), architecture="qwen2"), r"second: was made for the architecture qwen2, but first llama"),
        (replace(adapter(2), metadata={"fwdllama.base.sha256": "cd"}), r"second: has the base model cd, but first ab"),
        (replace(adapter(2), scope="all", invocation_tokens=()), r"second: has the scope all, but first answer"),
        (replace(adapter(2), invocation_tokens=(3, 5)), r"second: has the invocation tokens \[3, 5\], but first \[3, 4\]"),
        (adapter(2, names=(NAME,)), r"second: does not adapt blk.0.attn_v.weight, but first does"),
        (adapter(2, names=(NAME, OTHER, "output.weight")), r"first: does not adapt output.weight, but second does"),
        (replace(adapter(2), tensors={n: (a[:, :8], b) for n, (a, b) in adapter(2).tensors.items()}), r"second: adapts .* of shape \(20, 8\)"),
    ],
)
def test_what_has_no_mean_is_refused(other: Adapter, sentence: str) -> None:
    with pytest.raises(FileError, match=sentence):
        average([adapter(1), other], labels=["first", "second"])


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1.0], r"1 weights were given for 2 adapters"),
        ([1.0, -1.0], r"weights are 1, -1, but must be finite, not negative"),
        ([0.0, 0.0], r"not all zero"),
        ([1.0, float("nan")], r"weights are 1, nan"),
    ],
)
def test_unfit_weights_are_refused(weights: list[float], sentence: str) -> None:
    with pytest.raises(FileError, match=sentence):
        average([adapter(1), adapter(2)], weights)


def test_one_adapter_has_no_mean() -> None:
    with pytest.raises(FileError, match=r"1 adapter was given, but a mean needs at least two"):
        average([adapter(1)])


def test_a_rank_beyond_the_matrix_is_refused() -> None:
    with pytest.raises(FileError, match=r"blk.0.attn_q.weight would have rank 24, but at most 20 is of use"):
        average([adapter(i, a_seed=i) for i in range(6)], concatenate=True)


def test_an_adapter_without_a_known_base_is_taken_at_its_word() -> None:
    assert average([adapter(1), replace(adapter(2), metadata={})]).metadata == {}
