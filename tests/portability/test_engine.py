"""A base that each device requantises for itself must be one file everywhere: runs name their base by its digest."""

from __future__ import annotations

import hashlib

import pytest

from tests.portability.engine import ENGINE, losses

GOLDEN = {
    "base requantised from Q4_1 to Q8_0": "bec8b2a93834b6c22bb73bed1acda72c60b72ca46d56df739c0861afddcb9d59",
    "base requantised from F16 to Q8_0": "083bebb95cd7271aecde4b3f4f01ff06f8ff27b6ea458138360002429fce7f14",
    "upper layers of a base": "e030e9b59fac25ed590c72160fc21e03cd3a5e80493341f85c557d1f014da88b",
    "tokens of texts": "b61031171cd4280d0ce4f63c67e879ce36ab100def53b8c296a2b1e13fc8aa1b",
}
# Mean losses in nats of the four examples on x86-64 with AVX2, and how far other processors' kernels may be from them: twice what AArch64 was.
LOSSES = {
    "F32": ((5.8122908, 5.8659086, 5.6376958, 5.8271415), 1e-6),
    "F16": ((5.8122157, 5.8656381, 5.6373041, 5.8270034), 4e-4),
    "Q8_0": ((6.2299003, 6.0983114, 6.1739670, 6.1228289), 6e-3),
    "Q4_0": ((5.6043125, 5.5971646, 5.5040126, 5.6347845), 1.2e-2),
}


@pytest.mark.parametrize("name", ENGINE)
def test_what_devices_make_of_a_base_has_its_golden_digest(name: str) -> None:
    assert hashlib.sha256(ENGINE[name]()).hexdigest() == GOLDEN[name]


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_are_those_of_other_processors_within_the_rounding_of_their_kernels(kind: str) -> None:
    expected, within = LOSSES[kind]
    assert losses(kind) == pytest.approx(expected, abs=within)
