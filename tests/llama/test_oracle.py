"""Losses are those of the model worked out by hand, whatever is kept, shared, padded and split on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest

from fwdllama.errors import DataError
from fwdllama.llama.adapter import Writing
from fwdllama.llama.context import ContextOptions
from fwdllama.llama.model import Model
from fwdllama.llama.oracle import LlamaOracle
from fwdllama.space import Theta, build_space
from fwdllama.types import Encoded, Scope
from gguf_tools.synth import write_tiny_llama
from tests.reference import TinyLlama

SCOPES: tuple[Scope, ...] = get_args(Scope)
NOISE = 2e-5  # nats; float32 against float64, and decodes of other shapes
INVOCATION = (44, 45, 46)
PARAGRAPH = tuple(np.random.default_rng(1).integers(3, 300, 40).tolist())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")) as opened:
        yield opened


@pytest.fixture(scope="module")
def by_hand(model: Model) -> TinyLlama:
    return TinyLlama(model.info.path)


@pytest.fixture(params=SCOPES)
def oracle(request: pytest.FixtureRequest, model: Model) -> Iterator[LlamaOracle]:
    with make(model, request.param) as opened:
        yield opened


def make(
    model: Model,
    scope: Scope,
    writing: Writing | None = None,
    *,
    train: Literal["b", "ab"] = "b",
    layers: tuple[int, int] | None = None,
    **changes: Any,
) -> LlamaOracle:
    """An oracle whose modules include k and v, so that a prompt's cells tell whether the adapter was on for them."""
    shapes: Mapping[str, Any] = {name: shape for name, (shape, _) in model.info.tensors.items()}
    modules, n_layers = ["q", "k", "v", "o", "down"], model.info.n_layers
    space = build_space(shapes, n_layers, modules=modules, layers=layers, rank=4, alpha=8.0, train=train, seed=3)
    usual = ContextOptions(128, n_seq=8, n_outputs=64, n_batch=256, n_threads=1, kv_type="f32", flash=False)
    return LlamaOracle(model, space, scope, replace(usual, **changes), writing=writing)


def example(
    name: str, prompt: Sequence[int], n_target: int, *, choices: tuple[int, ...] = (), unit: int | None = None
) -> Encoded:
    target = np.random.default_rng(len(prompt) + n_target).integers(3, 300, n_target).tolist()
    return Encoded(name, tuple(prompt), INVOCATION, (choices[0],) if choices else tuple(target), choices, unit)


def prompt(n: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 300, n).tolist())


EXAMPLES = [
    example("a", PARAGRAPH + prompt(9, 2), 3, unit=0),
    example("b", PARAGRAPH + prompt(17, 3), 9, unit=0),
    example("c", PARAGRAPH + prompt(4, 4), 1, unit=0),
    example("d", prompt(31, 5), 5, unit=7),
    example("e", prompt(8, 6), 2, unit=7),
    example("f", prompt(20, 7), 1, choices=(70, 71, 90)),
    example("no prompt", (), 4),
]


def drawn(oracle: LlamaOracle, seed: int) -> Theta:
    return np.float32(0.3) * np.random.default_rng(seed).standard_normal(oracle.space.n_params, np.float32)


def expected(by_hand: TinyLlama, oracle: LlamaOracle, theta: Theta, examples: Sequence[Encoded]) -> list[float]:
    tensors, scale = oracle.space.tensors(theta), oracle.space.alpha / oracle.space.rank
    return [by_hand.loss(e, tensors, scale, oracle.scope) for e in examples]


def test_losses_are_those_of_the_model_worked_out_by_hand(oracle: LlamaOracle, by_hand: TinyLlama) -> None:
    oracle.load(EXAMPLES)
    for theta in (oracle.space.initial_theta(), drawn(oracle, 1), drawn(oracle, 2)):
        oracle.write(theta)
        assert oracle.losses().tolist() == pytest.approx(expected(by_hand, oracle, theta, EXAMPLES), abs=NOISE)


@pytest.mark.parametrize("n_targets", [1, 3, 99])
def test_losses_of_the_first_target_tokens_are_those_of_examples_that_end_there(oracle: LlamaOracle, by_hand: TinyLlama, n_targets: int) -> None:
    oracle.load(EXAMPLES)
    theta = drawn(oracle, 1)
    oracle.write(theta)
    whole = oracle.losses()
    cut = [replace(e, target=e.target[:n_targets]) for e in EXAMPLES]
    assert oracle.losses(n_targets=n_targets).tolist() == pytest.approx(expected(by_hand, oracle, theta, cut), abs=NOISE)
    assert oracle.losses().tolist() == pytest.approx(whole.tolist(), abs=NOISE)


def test_of_first_target_tokens_no_more_is_decoded_than_predicts_them(model: Model) -> None:
    with make(model, "answer") as oracle:
        oracle.load(EXAMPLES)
        before = oracle.context.n_decoded
        oracle.losses([1], n_targets=1)
        assert oracle.context.n_decoded - before == len(INVOCATION)


def test_the_two_scopes_are_different_models_unless_there_is_no_prompt(model: Model) -> None:
    losses = []
    for scope in SCOPES:
        with make(model, scope) as oracle:
            oracle.load(EXAMPLES)
            oracle.write(drawn(oracle, 1))
            losses.append(oracle.losses())
    apart = np.abs(losses[0] - losses[1])
    assert apart[:-1].min() > 100 * NOISE
    assert apart[-1] < NOISE


def test_in_scope_answer_a_prompts_cells_are_the_bases_whatever_was_written_before_it_was_loaded(model: Model) -> None:
    with make(model, "answer") as oracle:
        oracle.load(EXAMPLES)
        oracle.write(drawn(oracle, 1))
        losses = oracle.losses()
        oracle.write(drawn(oracle, 2))
        oracle.losses()
        oracle.load(EXAMPLES[::-1])  # decoded while theta is another
        oracle.write(drawn(oracle, 1))
        assert oracle.losses()[::-1].tolist() == pytest.approx(losses.tolist(), abs=NOISE)


@pytest.mark.parametrize(("scope", "n_decoded"), [("answer", len(INVOCATION) + 2 - 1), ("all", EXAMPLES[4].n_tokens)])
def test_a_loss_decodes_its_own_rows_only_and_in_scope_answer_without_their_prompts(
    model: Model, scope: Scope, n_decoded: int
) -> None:
    with make(model, scope) as oracle:
        oracle.load(EXAMPLES)
        before = oracle.context.n_decoded
        for _ in range(3):
            oracle.losses([4])
        assert oracle.context.n_decoded - before == 3 * n_decoded


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_repeated_losses_are_bit_equal_and_writing_theta_back_restores_them(
    tmp_path: Path, oracle: LlamaOracle, type_name: str
) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", type=type_name)  # type: ignore[arg-type]
    with Model(path) as model, make(model, oracle.scope, flash=True, kv_type="f16") as own:
        own.load(EXAMPLES)
        base = own.losses()
        own.write(drawn(own, 1))
        moved = own.losses()
        assert np.array_equal(own.losses(), moved)
        own.write(own.space.initial_theta())
        assert np.array_equal(own.losses(), base)
        assert np.abs(moved - base).min() > 1e-3


@pytest.mark.parametrize(("type_name", "noise"), [("F32", NOISE), ("Q8_0", 5e-3)])
def test_padding_and_batching_do_not_change_a_loss_beyond_noise(
    tmp_path: Path, oracle: LlamaOracle, type_name: str, noise: float
) -> None:
    path = write_tiny_llama(tmp_path / "tiny.gguf", type=type_name)  # type: ignore[arg-type]
    with Model(path) as model, make(model, oracle.scope) as own:
        own.write(drawn(own, 1))
        own.load(EXAMPLES)
        together = own.losses()
        subset = own.losses([3, 1])
        alone = []
        for e in EXAMPLES:
            own.load([e])
            alone.append(float(own.losses()[0]))
    assert alone == pytest.approx(together.tolist(), abs=noise)
    assert subset.tolist() == pytest.approx(together[[3, 1]].tolist(), abs=noise)


def test_a_loss_is_bit_equal_whatever_the_rest_of_the_batch_is(oracle: LlamaOracle) -> None:
    oracle.load(EXAMPLES)
    oracle.write(drawn(oracle, 1))
    first = oracle.losses([3])
    oracle.load([EXAMPLES[3], *EXAMPLES[:3]])
    assert np.array_equal(oracle.losses([0]), first)


def test_a_units_common_beginning_is_decoded_once_and_only_new_units_are_decoded(model: Model) -> None:
    with make(model, "answer") as oracle:
        oracle.load(EXAMPLES)
        assert oracle.n_decoded == 49 + 17 + 4 + 31 + 8 + 20
        for changed, n_decoded in (
            ([*EXAMPLES[:3], None, *EXAMPLES[4:]], 8),  # e is a unit by itself now
            ([*EXAMPLES[:4], *EXAMPLES[5:]], 31 + 20),  # f has moved, and its row is its unit's name
            ([*EXAMPLES[:4], EXAMPLES[5], replace(EXAMPLES[5], id="g")], 20),
            (EXAMPLES[1:3], 57 + 4),
        ):
            before = oracle.n_decoded
            oracle.load(changed)
            assert oracle.n_decoded - before == n_decoded


@pytest.mark.parametrize("scope", ["answer", "all"])
def test_rows_that_have_moved_have_the_losses_that_they_had(model: Model, scope: Scope) -> None:
    def at(number: int, letter: str) -> Encoded:
        return replace(EXAMPLES[number], id=letter, unit=number)

    with make(model, scope) as oracle:
        oracle.write(drawn(oracle, 1))
        first = [at(0, "a"), at(3, "b"), at(5, "c"), at(1, "d")]
        oracle.load(first)
        losses = dict(zip("abcd", oracle.losses(), strict=True))
        for order in ("dcba", "bacd", "cadb", "adcb"):  # circles of two, of three and of four
            rows = [next(e for e in first if e.id == letter) for letter in order]
            before = oracle.n_decoded
            oracle.load(rows)
            assert scope == "all" or oracle.n_decoded == before
            assert oracle.losses().tolist() == [losses[letter] for letter in order]
        oracle.load([at(2, "e"), first[3], first[0]])
        assert oracle.losses().tolist()[1:] == [losses["d"], losses["a"]]


def test_a_batch_that_does_not_fit_one_decode_is_split(oracle: LlamaOracle, by_hand: TinyLlama) -> None:
    theta = drawn(oracle, 1)
    reference = expected(by_hand, oracle, theta, EXAMPLES)
    for sizes in ({"n_batch": 16}, {"n_outputs": 10}, {"n_batch": 24, "n_outputs": 12}):
        with make(oracle.model, oracle.scope, **sizes) as own:
            own.load(EXAMPLES)
            own.write(theta)
            assert own.losses().tolist() == pytest.approx(reference, abs=NOISE), sizes


def test_an_answer_longer_than_one_decode_is_refused(oracle: LlamaOracle) -> None:
    with make(oracle.model, oracle.scope, n_batch=8) as own, pytest.raises(DataError, match=r"^example b .*\b8\b"):
        own.load(EXAMPLES)


def test_rows_are_answered_in_the_order_asked_and_may_repeat(oracle: LlamaOracle) -> None:
    oracle.load(EXAMPLES)
    every = oracle.losses()
    assert oracle.losses([4, 0, 2]).tolist() == pytest.approx(every[[4, 0, 2]].tolist(), abs=NOISE)
    assert oracle.losses([1, 3, 1]).tolist() == pytest.approx(every[[1, 3, 1]].tolist(), abs=NOISE)
    assert len(oracle.losses([])) == 0


def test_a_row_left_empty_has_no_loss_and_the_others_have_theirs(oracle: LlamaOracle, by_hand: TinyLlama) -> None:
    oracle.load(EXAMPLES)
    oracle.load([EXAMPLES[0], None, EXAMPLES[2], None, EXAMPLES[4]])
    theta = drawn(oracle, 1)
    oracle.write(theta)
    reference = expected(by_hand, oracle, theta, EXAMPLES[::2][:3])
    assert oracle.losses().tolist() == pytest.approx(reference, abs=NOISE)
    assert oracle.losses([4, 0]).tolist() == pytest.approx([reference[2], reference[0]], abs=NOISE)
    with pytest.raises(DataError, match=r"^row 3 of the batch is empty\.$"):
        oracle.losses([2, 3])


def test_a_choice_is_scored_among_the_first_tokens_of_the_labels_only(oracle: LlamaOracle) -> None:
    labels = (70, 71, 90)
    batch = [replace(EXAMPLES[5], id=str(t), target=(t,)) for t in labels] + [replace(EXAMPLES[5], choices=())]
    oracle.load(batch)
    oracle.write(drawn(oracle, 1))
    losses = oracle.losses()
    assert float(np.exp(-losses[:3]).sum()) == pytest.approx(1.0, abs=1e-4)
    assert losses[3] > losses[0]


@pytest.mark.parametrize("writing", get_args(Writing))
def test_the_three_ways_of_rewriting_adapters_give_bit_identical_losses(oracle: LlamaOracle, writing: Writing) -> None:
    with make(oracle.model, oracle.scope, writing=writing) as other:
        for one in (oracle, other):
            one.load(EXAMPLES)
        for seed in (1, 2):
            for one in (oracle, other):
                one.write(drawn(one, seed))
            assert np.array_equal(oracle.losses(), other.losses())


def test_training_a_as_well_writes_both_halves(model: Model, by_hand: TinyLlama) -> None:
    with make(model, "answer", train="ab", layers=(1, 2)) as oracle:
        oracle.load(EXAMPLES)
        theta = drawn(oracle, 1)
        oracle.write(theta)
        assert oracle.losses().tolist() == pytest.approx(expected(by_hand, oracle, theta, EXAMPLES), abs=NOISE)


def test_an_example_fits_if_all_of_it_but_the_last_token_does(oracle: LlamaOracle, by_hand: TinyLlama) -> None:
    long = example("long", prompt(120, 1), 6)
    assert long.n_tokens == 128
    assert oracle.fits(long)
    assert not oracle.fits(replace(long, prompt=(*long.prompt, 5)))
    batch = [example("wide", prompt(5, 2), 9), long, example("wide", prompt(6, 2), 9)]  # padded to 9, it would not
    oracle.load(batch)
    theta = drawn(oracle, 1)
    oracle.write(theta)
    assert oracle.losses().tolist() == pytest.approx(expected(by_hand, oracle, theta, batch), abs=NOISE)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ([EXAMPLES[0]] * 9, r"a batch of 9 examples exceeds the context's 8 sequences\."),
        ([], r"a batch is empty"),
        ([None, None], r"a batch is empty"),
        ([example("long", prompt(121, 1), 6)], r"example long needs 129 tokens, but the context holds 128\."),
        ([example("wide", prompt(5, 2), 65)], r"example wide has 67 tokens .* 65 to predict; .* 256 and 64\."),
        ([replace(EXAMPLES[0], invocation=())], r"example a has no invocation"),
        ([replace(EXAMPLES[0], target=())], r"example a has no .*answer"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_in_words_and_leaves_the_one_before(
    oracle: LlamaOracle, batch: list[Encoded | None], sentence: str
) -> None:
    oracle.load(EXAMPLES)
    before = oracle.losses()
    with pytest.raises(DataError, match=f"^{sentence}"):
        oracle.load(batch)
    assert np.array_equal(oracle.losses(), before)


def test_an_oracle_may_be_closed_twice_and_before_its_model(model: Model) -> None:
    own = Model(model.info.path)
    oracle = make(own, "answer")
    oracle.load(EXAMPLES)
    oracle.losses()
    for opened in (oracle, oracle, own, own):
        opened.close()
    assert not oracle.adapter.handle
    assert oracle.context.handle is None
