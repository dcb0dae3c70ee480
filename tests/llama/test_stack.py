"""Thetas side by side in one decode give, to the last bit, what each gives alone, and leave no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from fwdllama.errors import EngineError
from fwdllama.llama.adapter import Writing
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.space import Theta, build_space
from fwdllama.types import Encoded, Scope
from gguf_tools.synth import write_tiny_llama

N_PLACES = 4
TOKENS = np.random.default_rng(7).integers(3, 300, (8, 40)).tolist()
EXAMPLES = [Encoded(str(i), tuple(TOKENS[i][: 20 + i]), (44, 45), tuple(TOKENS[i][-4 - i % 2 :])) for i in range(8)]


@pytest.fixture(scope="module", params=["F32", "Q8_0", "Q4_0"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf", type=request.param)) as opened:
        yield opened


def make(
    model: Model,
    *,
    modules: Sequence[str] = ("q", "k", "v", "o", "gate", "up", "down"),
    train: Literal["b", "ab"] = "b",
    last: int | None = None,
    scope: Scope = "answer",
    writing: Writing | None = None,
    **changes: Any,
) -> LlamaOracle:
    shapes = {name: (shape[0], shape[1]) for name, (shape, _) in model.info.tensors.items() if len(shape) == 2}
    end = model.info.n_layers - 2 if last is None else last
    space = build_space(shapes, model.info.n_layers, modules=modules, layers=(0, end), rank=4, alpha=8.0, train=train, seed=3)
    options = ContextOptions(128, **({"n_seq": 8, "n_outputs": 64, "n_batch": 256, "n_threads": 1, "flash": False} | changes))
    oracle = LlamaOracle(model, space, scope, options, writing=writing, n_places=N_PLACES)
    oracle.load(EXAMPLES)
    return oracle


def drawn(oracle: LlamaOracle) -> list[Theta]:
    random = np.random.default_rng(1)
    return [oracle.space.initial_theta() + np.float32(0.3) * random.standard_normal(oracle.space.n_params, np.float32) for _ in range(N_PLACES)]


def alone(oracle: LlamaOracle, thetas: Sequence[Theta], groups: Sequence[Sequence[int]]) -> list[list[float]]:
    found = []
    for theta, rows in zip(thetas, groups, strict=True):
        oracle.write(theta)
        found.append(oracle.losses(rows).tolist())
    return found


def beside(oracle: LlamaOracle, thetas: Sequence[Theta], groups: Sequence[Sequence[int]]) -> list[list[float]]:
    for index, theta in enumerate(thetas):
        oracle.place(index, theta)
    return [losses.tolist() for losses in oracle.losses_beside(groups)]


@pytest.mark.parametrize("train", ["b", "ab"])
@pytest.mark.parametrize("size", [1, 2])
def test_losses_beside_each_other_are_bit_equal_to_each_thetas_own(model: Model, size: int, train: Literal["b", "ab"]) -> None:
    groups = [range(i * size, (i + 1) * size) for i in range(N_PLACES)]
    with make(model, train=train) as oracle:
        thetas = drawn(oracle)
        expected = alone(oracle, thetas, groups)
        before = oracle.context.n_decoded
        assert beside(oracle, thetas, groups) == expected
        assert oracle.context.n_decoded - before == N_PLACES * size * 6  # five or six tokens of each, in one decode
        assert len({value for losses in expected for value in losses}) == N_PLACES * size
        assert oracle.n_places == N_PLACES


def test_first_tokens_beside_each_other_are_each_thetas_own_and_need_no_more_than_their_share(model: Model) -> None:
    groups = [[i] for i in range(N_PLACES)]
    with make(model) as oracle:
        thetas = drawn(oracle)
        expected = []
        for theta, rows in zip(thetas, groups, strict=True):
            oracle.write(theta)
            expected.append(float(oracle.losses(rows, n_targets=1)[0]))
        before = oracle.context.n_decoded
        for index, theta in enumerate(thetas):
            oracle.place(index, theta)
        found = [float(losses[0]) for losses in oracle.losses_beside(groups, n_targets=1)]
        assert found == pytest.approx(expected, abs=1e-6)  # two columns are another kernel than eight for float32
        assert oracle.context.n_decoded - before == N_PLACES * len(EXAMPLES[0].invocation)
        assert min(abs(a - b[0]) for a, b in zip(expected, alone(oracle, thetas, groups), strict=True)) > 1e-3


def test_a_decode_of_one_theta_afterwards_is_what_it_was_before_though_its_graph_may_be_used_again(model: Model) -> None:
    groups = [range(i * 2, (i + 1) * 2) for i in range(N_PLACES)]
    with make(model) as oracle:
        thetas = drawn(oracle)
        oracle.write(thetas[2])
        before = oracle.losses()
        for _ in range(2):
            beside(oracle, thetas, groups)
            oracle.write(thetas[2])
            assert np.array_equal(oracle.losses(), before)


def test_thetas_that_need_several_decodes_each_get_their_own_rows(model: Model) -> None:
    groups = [[0], [1], [5], [3, 4]]
    with make(model, n_outputs=8) as oracle:
        thetas = drawn(oracle)
        expected = alone(oracle, thetas, groups)
        assert beside(oracle, thetas, groups) == expected


@pytest.mark.parametrize("size", [1, 2])
def test_where_the_last_layer_is_adapted_each_theta_has_as_many_tokens_with_logits(model: Model, size: int) -> None:
    """Its feed-forward part sees only those, and answers differ in length."""
    groups = [range(i * size, (i + 1) * size) for i in range(N_PLACES)]
    with make(model, last=model.info.n_layers - 1) as oracle:
        thetas = drawn(oracle)
        expected = alone(oracle, thetas, groups)
        before = oracle.context.n_decoded
        assert beside(oracle, thetas, groups) == expected
        assert oracle.context.n_decoded - before == N_PLACES * size * 6
        assert oracle.n_places == N_PLACES


def test_where_so_many_logits_have_no_room_thetas_are_evaluated_one_after_the_other(model: Model) -> None:
    groups = [[0], [1], [2], [3]]
    with make(model, last=model.info.n_layers - 1, n_outputs=18) as oracle:  # 4, 5, 4 and 5, but four times 5 are 20
        thetas = drawn(oracle)
        expected = alone(oracle, thetas, groups)
        before = oracle.context.n_decoded
        assert beside(oracle, thetas, groups) == expected
        assert oracle.context.n_decoded - before == 5 + 6 + 5 + 6
        assert oracle.n_places == N_PLACES


def test_a_graph_that_is_not_what_it_must_be_ends_the_putting_together(model: Model) -> None:
    with make(model) as oracle:
        thetas = drawn(oracle)
        expected = alone(oracle, thetas, [[0], [1], [2], [3]])
        assert oracle._stack is not None
        del oracle._stack._by_address[next(iter(oracle._stack._by_address))]  # one tensor's node is not recognised
        assert beside(oracle, thetas, [[0], [1], [2], [3]]) == expected
        assert oracle.n_places == 1
        assert beside(oracle, thetas, [[0], [1], [2], [3]]) == expected


@pytest.mark.parametrize("changes", [{"scope": "all"}, {"writing": "memory-file"}])
def test_there_is_one_place_where_prompts_are_decoded_with_theta_or_tensors_are_out_of_reach(model: Model, changes: dict[str, Any]) -> None:
    with make(model, **changes) as oracle:
        assert oracle.n_places == 1


def test_a_theta_that_is_not_finite_is_refused_before_anything_is_computed_with_it(model: Model) -> None:
    with make(model) as oracle:
        theta = drawn(oracle)[0]
        theta[5] = np.inf
        said = r"^blk\.0\.attn_q\.weight\.lora_b would hold numbers that are not finite: the steps before have diverged\.$"
        with pytest.raises(EngineError, match=said):
            oracle.place(0, theta)


@pytest.mark.model
def test_on_a_real_model_losses_beside_each_other_are_bit_equal_to_each_thetas_own(model_path: Path) -> None:
    with Model(model_path) as real, make(real, modules=("q", "v", "up"), n_threads=2) as oracle:
        thetas = drawn(oracle)
        groups = [range(i * 2, (i + 1) * 2) for i in range(N_PLACES)]
        expected = alone(oracle, thetas, groups)
        assert beside(oracle, thetas, groups) == expected
        assert oracle.n_places == N_PLACES
