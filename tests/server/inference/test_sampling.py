from __future__ import annotations

import numpy as np
import pytest
from fwdllama_server.inference.sampling import FEW, Sampler, Sampling

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def drawn(sampling: Sampling, logits: np.ndarray = LOGITS, n: int = 400) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.choose(logits) for _ in range(n)]


def test_temperature_0_takes_the_likeliest() -> None:
    assert set(drawn(Sampling(temperature=0))) == {1}


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_a_temperature_near_0_is_the_same(temperature: float) -> None:
    assert set(drawn(Sampling(temperature, seed=1))) == {1}


def test_frequencies_are_the_probabilities() -> None:
    counts = np.bincount(drawn(Sampling(seed=1), n=8_000)) / 8_000
    assert np.abs(counts - [0.1, 0.4, 0.2, 0.3]).max() < 0.02
    flat = np.bincount(drawn(Sampling(2.0, seed=1), n=8_000)) / 8_000
    roots = np.sqrt([0.1, 0.4, 0.2, 0.3])
    assert np.abs(flat - roots / roots.sum()).max() < 0.02


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_likeliest_that_together_are_as_probable(top_p: float, kept: set[int]) -> None:
    assert set(drawn(Sampling(1.0, top_p, seed=2))) == kept


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_top_p_of_a_large_vocabulary_is_that_of_sorting_all_of_it(top_p: float) -> None:
    logits = np.random.default_rng(0).standard_normal(3 * FEW).astype(np.float32)
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    order = np.argsort(-weights, kind="stable")
    n = 1 + int(np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum()))
    assert (n > FEW) == (top_p > 0.5), "both ways must be taken"
    tokens = drawn(Sampling(1.0, top_p, seed=3), logits, 600)
    assert set(tokens) <= set(order[:n].tolist())
    assert len(set(tokens) & set(order[n // 2 : n].tolist())) > 0


def test_a_seed_repeats_and_the_answers_of_a_request_differ() -> None:
    def first(seed: int | None, index: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), index)
        return [sampler.choose(np.zeros(1000, np.float32)) for _ in range(4)]

    assert first(-5, 0) == first(-5, 0)
    assert first(-5, 0) != first(-5, 1)
    assert first(None, 0) != first(None, 0)
