"""Machines agree: what they exchange by seed and digest is the same everywhere, of which these values, once computed, are the proof.

`make test-arm64` runs this file on AArch64. A value may change only together with the wire format or the ledger's.
"""

from __future__ import annotations

import hashlib

import pytest

from tests.portability.contract import CONTRACT
from tests.portability.exchange import compared

GOLDEN = {
    "directions": "1f10e384dca13b5012e0031309af412a2b24c1fb725d9c933404fce421f7a5f2",
    "seeds of probes": "89b2c8f07085dcea4bf0310bfe3101ca605b38904467ed9770c6aea489f9788d",
    "order of examples": "09a95c35a22db469171bb533f532f7b5a19d1cbbf567e6d024ff523e41a7df3a",
    "initial A and theta": "4e264ec4fbfda075d996089e196fd08b726a694b8e0f43f7dd1176e76c823ba4",
    "update of a step": "f906b93225e9f8e45e155f97a134f71cf4d6f5b3cef6378ee00620aa7f05f049",
    "theta replayed from a ledger": "5dfa0e98bfb3c0c3ddd5909ec1ec9182fae47aec258a3bcc28a0f1c06a486574",
    "ledger": "7c9a87d25a452baa8f3a6188bd22b001c3377c51c8cf200557f7b8302b588131",
    "adapters": "e601cebc8d6d5faa4342f98d12ccf94ab4fcbf6c572c906b4836cd5588fdcf8c",
    "adapter for peft": "e6e8ceaf4319210e42ee36cad727af9eb3983d3183573f0f3ffe0341cd78f966",
    "signed requests": "e8e4ca35f375f99d7355163f80bbf86dcf51993c5424f9e7f9feda92b487d30b",
    "tasks and results": "6ffd46a271242be4d5acc900b485d43044a5453ae3739121fd3d9036418ef2ba",
    "slopes": "3b686884b048a05b134c11a5767bbacde07aba5df6de706225e0caae83333bd1",
    "coefficients and pacing": "99ad099a5c5c1601df423ae9944d76afe3b9a3dd2c09e749beeb4a564dd434cb",
    "entry of a round": "979182e3b031290a568092ed2d04e06518670cded30a3ca8cbe61f65fdce78d0",
    "random models": "2163ef173247a4c9b434cc79747f781786b548df9724a39c48ab6ce1aee32262",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_what_machines_exchange_has_its_golden_digest(name: str) -> None:
    assert hashlib.sha256(CONTRACT[name]()).hexdigest() == GOLDEN[name]


def test_only_the_specification_of_a_run_which_grows_with_every_option_has_no_golden_digest() -> None:
    assert CONTRACT.keys() - GOLDEN.keys() == {"specification of a run"}


def test_a_comparison_fails_where_the_contract_is_broken_and_only_tells_of_other_differences() -> None:
    mine = {"contract": {"directions": "a" * 64}, "private": {"losses": "b" * 64}}
    assert compared(mine, {"contract": {"directions": "a" * 64}, "private": {"losses": "c" * 64}}) == (
        ["same      aaaaaaaaaaaa directions", "differs   bbbbbbbbbbbb losses"],
        True,
    )
    assert compared(mine, {"contract": {"directions": "c" * 64}, "private": {"losses": "b" * 64}}) == (
        ["DIFFERENT aaaaaaaaaaaa directions", "same      bbbbbbbbbbbb losses"],
        False,
    )


def test_digests_of_other_tests_are_not_compared() -> None:
    told, alike = compared({"contract": {"a": ""}, "private": {}}, {"contract": {}, "private": {}})
    assert told == ["the two machines did not compute the same things: they run different versions of the tests"]
    assert not alike
