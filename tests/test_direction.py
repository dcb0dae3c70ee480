"""Directions are a contract between machines: the same seed is the same bits everywhere and for ever."""

from __future__ import annotations

import doctest
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllama import direction as module
from fwdllama.direction import direction, moved, packed_bits, unpack
from tests.reference import signs

SEEDS = st.integers(0, (1 << 64) - 1)


@pytest.mark.parametrize(
    ("seed", "n_params", "sha256"),
    [
        (0, 1, "c68830a25204a09f8e77aada6bc5807f607cccaaa0ebb2a7122d317584478a8b"),
        (0, 64, "ec14a01fb49cf4492a7f5d011d93787ac328b2f6bcb8ba4181d33c2c3a2b3045"),
        (1, 65, "5f2e9cb4f0de63a820de1908abb0703eb22faeea811506c72375e1db9704a3e7"),
        (7, 8, "e80fae24a8d47643cf3ab165c6b57dc5195d0beab72b045505d3866df78671a4"),
        (7, 1_000, "420a6f55ecec28ab2ba1dadfdc4482ac52bd1cbc447560abd8858290486ec083"),
        (1 << 63, 4_096, "826600277b152ef3b1d4580e61f70c9412d05c3e38b12b700cd8706d79fa877d"),
        ((1 << 64) - 1, 100_003, "574ea45c81bc8397cd7add9b13eaa918901862fb272224e492887a813a433390"),
        (0x0123456789ABCDEF, 1_000_000, "292b03fbcd32c30be00c8f8d0d3cb2a4a429e0aae67e311453905fa7c0d58f34"),
    ],
)
def test_the_direction_of_a_seed_has_its_golden_hash(seed: int, n_params: int, sha256: str) -> None:
    z = direction(seed, n_params)
    assert z.dtype == np.float32
    assert z.shape == (n_params,)
    assert hashlib.sha256(z.astype("<f4").tobytes()).hexdigest() == sha256


@given(SEEDS, st.integers(0, 400))
def test_every_coordinate_is_its_philox_bit_least_significant_first(seed: int, n_params: int) -> None:
    assert direction(seed, n_params).tolist() == signs(seed, n_params)


@given(SEEDS, st.integers(0, 300), st.integers(0, 300))
def test_a_shorter_direction_begins_like_a_longer_one(seed: int, a: int, b: int) -> None:
    short, long = sorted((a, b))
    assert np.array_equal(direction(seed, short), direction(seed, long)[:short])


@given(SEEDS, st.integers(1, 300))
def test_packed_bits_are_one_bit_a_coordinate_and_unpack_to_the_direction(seed: int, n_params: int) -> None:
    bits = packed_bits(seed, n_params)
    assert bits.dtype == np.uint8
    assert len(bits) == -(-n_params // 8)
    assert np.array_equal(unpack(bits, n_params), direction(seed, n_params))


def test_unpack_turns_a_clear_bit_into_plus_one_and_a_set_bit_into_minus_one() -> None:
    assert unpack(np.array([0b0000_0110, 0b1], np.uint8), 9).tolist() == [1, -1, -1, 1, 1, 1, 1, 1, -1]


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_that_is_no_unsigned_64_bit_number_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"^seed {seed} is not an unsigned 64-bit number\.$"):
        direction(seed, 8)


def test_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("n_params", [1, 8, 13, 1000])
def test_a_moved_theta_is_bit_equal_to_theta_plus_the_distance_times_z(n_params: int) -> None:
    theta = np.random.default_rng(n_params).standard_normal(n_params).astype(np.float32)
    distance = np.float32(0.0213)
    for signed in (distance, -distance):
        assert np.array_equal(moved(theta, packed_bits(9, n_params), signed), theta + signed * direction(9, n_params))
