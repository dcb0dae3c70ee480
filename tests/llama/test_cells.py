"""What llama.cpp saves of a sequence is understood to the last byte, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fwdllama.errors import EngineError
from fwdllama.llama.cells import Bytes, Layout, layout_of
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.prompts import decode
from gguf_tools.synth import write_tiny_llama

N = 21


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(write_tiny_llama(tmp_path_factory.mktemp("cells") / "tiny.gguf", n_head=2)) as opened:
        yield opened


def filled(model: Model, **changes: Any) -> Context:
    """A context of three sequences, the second of which has N cells."""
    options = {"flash": False, **changes}
    context = Context(model, ContextOptions(256, n_seq=3, n_outputs=1, n_batch=64, n_threads=1, **options))
    decode(context, 1, 0, np.arange(3, 3 + N, dtype=np.int32))
    return context


@pytest.fixture(scope="module")
def state(model: Model) -> Bytes:
    with filled(model) as context:
        return context.saved(1)


@pytest.mark.parametrize(
    ("changes", "cell_bytes"),
    [
        ({}, 3 * 2 * 64 * 2),  # layers, K and V, values, bytes
        ({"flash": True}, 3 * 2 * 64 * 2),
        ({"kv_type": "f32"}, 3 * 2 * 64 * 4),
        ({"kv_type": "q8_0", "flash": True}, 3 * 2 * 2 * 34),  # two blocks of 32
    ],
)
def test_every_byte_is_a_cells_or_a_literal(model: Model, changes: dict[str, Any], cell_bytes: int) -> None:
    with filled(model, **changes) as context:
        held = context.saved(1)
    layout = layout_of(held, N)
    assert layout is not None
    assert layout.size_bytes(N) == len(held)
    assert layout.size_bytes(N) - layout.size_bytes(N - 1) == cell_bytes + 12
    pieces = [held[place] for literal, section, _ in layout.places(N) for place in (literal, section)]
    assert np.array_equal(np.concatenate(pieces), held)


def test_what_is_a_cells_is_that_cells(model: Model, state: Bytes) -> None:
    layout = layout_of(state, N)
    assert layout is not None
    with filled(model) as context:
        context.forget(1, N - 4)
        shorter = context.saved(1)
    for (_, section, shape), (_, less, shape_less) in zip(layout.places(N), layout.places(N - 4), strict=True):
        assert np.array_equal(state[section].reshape(shape)[:, : N - 4], shorter[less].reshape(shape_less))


def altered(state: Bytes, at: int, value: int) -> Bytes:
    copy = state.copy()
    copy[at] = value
    return copy


def test_another_number_of_cells_another_order_and_another_length_are_not_understood(state: Bytes) -> None:
    layout = layout_of(state, N)
    assert layout is not None
    first_place = layout.literals[0]
    assert all(layout_of(state[:-n], N) is None for n in (1, 4, 9, 100, len(state)))
    assert layout_of(np.concatenate([state, state[:1]]), N) is None
    assert layout_of(state, N - 1) is None
    assert layout_of(altered(state, first_place, 1), N) is None  # two cells of position 1
    assert layout_of(altered(state, first_place + 4, 2), N) is None  # a cell of two sequences
    assert layout_of(altered(state, 8, 1), N) is None  # fewer sequences than there are


def test_a_sequence_without_cells_has_none() -> None:
    assert list(Layout((0,), ()).places(0)) == [(slice(0, 0), slice(0, 0), (0, 0, 0))]


def test_what_was_saved_can_be_restored_into_another_sequence_and_nothing_empties_it(model: Model, state: Bytes) -> None:
    with filled(model) as context:
        context.restore(2, state)
        held = context.saved(2)
        layout = layout_of(held, N)
        assert layout is not None
        assert layout.sections == layout_of(state, N).sections  # type: ignore[union-attr]
        context.restore(2, state[:0])
        assert layout_of(context.saved(2), 0) is not None
        with pytest.raises(EngineError, match=r"llama\.cpp does not take back what was saved of a sequence"):
            context.restore(2, state[:-1])
