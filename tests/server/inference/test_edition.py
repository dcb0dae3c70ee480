"""An adapter is used only once it is known to be harmless, to fit, and to be of this base model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from fwdllama_server.inference.edition import last_occurrence, make_edition
from hypothesis import given
from hypothesis import strategies as st

from fwdllama.errors import AdapterError
from gguf_tools.errors import FileError
from gguf_tools.model import ModelInfo, file_sha256

AdapterOf = Callable[..., bytes]


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=3))
def test_last_occurrence_is_that_of_strings(tokens: list[int], wanted: list[int]) -> None:
    at = "".join(map(str, tokens)).rfind("".join(map(str, wanted)))
    assert last_occurrence(tokens, wanted) == (None if at < 0 else at)


def test_an_edition_knows_its_names_and_its_scope(info: ModelInfo, adapter_of: AdapterOf) -> None:
    data = adapter_of(1, **{"base.sha256": file_sha256(info.path)})
    edition = make_edition(data, "a", info, version=3, digest="d")
    assert (edition.version, edition.digest, edition.sha256) == (3, "d", hashlib.sha256(data).hexdigest())
    assert (edition.scope, edition.name) == ("answer", "version 3")
    assert make_edition(adapter_of(1, scope="all"), "a", info).first_on([5]) == 0
    assert make_edition(data, "a", info).name == f"sha256:{edition.sha256[:12]}"


def test_only_what_has_the_same_shapes_and_alpha_can_be_written_over(info: ModelInfo, adapter_of: AdapterOf) -> None:
    first, same, wider = (make_edition(adapter_of(1, **more), "a", info) for more in ({}, {"scope": "all"}, {"rank": 5}))
    assert first.fits_in(same)
    assert not first.fits_in(wider)


@pytest.mark.parametrize("damage", [lambda data: data[:-4000], lambda data: b"GGUF" + data, lambda data: data.replace(b"lora_a", b"lora_c", 1)])
def test_a_damaged_file_is_refused(info: ModelInfo, adapter_of: AdapterOf, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(FileError, match=r"^version 9: "):
        make_edition(damage(adapter_of(1)), "version 9", info)


def test_an_adapter_of_another_base_is_refused_by_its_digest(info: ModelInfo, adapter_of: AdapterOf) -> None:
    data = adapter_of(1, **{"base.sha256": "ab" * 32})
    with pytest.raises(AdapterError) as caught:
        make_edition(data, "version 9", info)
    assert str(caught.value) == (
        f"version 9: was trained on the base model with SHA-256 abababababab, but {info.path} has "
        f"{file_sha256(info.path)[:12]}. Use the model that it was trained on."
    )
