from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwdllama.errors import DataError
from fwdllama.llama.adapter import LoadedAdapter
from fwdllama.llama.context import Context, ContextOptions
from fwdllama.llama.generate import answers, fillings, generate
from fwdllama.llama.model import Model
from fwdllama.loss import choice_nll, token_nll
from fwdllama.types import Encoded, Scope
from gguf_tools.adapter import Adapter
from gguf_tools.synth import write_tiny_llama

INVOCATION = (13, 40, 50)
MAX_NEW = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")) as model:
        yield model


@pytest.fixture(scope="module")
def adapter(model: Model) -> Iterator[LoadedAdapter]:
    rng = np.random.default_rng(5)
    tensors = {}
    for name, (shape, _) in model.info.tensors.items():
        if name.endswith(("attn_q.weight", "attn_v.weight", "ffn_up.weight")):
            a = rng.standard_normal((4, shape[1])).astype(np.float32)
            tensors[name] = (a / np.float32(8), rng.standard_normal((shape[0], 4)).astype(np.float32))
    loaded = LoadedAdapter(model, Adapter(model.info.architecture, 4.0, tensors))
    yield loaded
    loaded.close()


def context_of(model: Model, n_seq: int, *, n_ctx: int = 128, n_batch: int = 512, n_outputs: int = 64) -> Context:
    return Context(
        model,
        ContextOptions(
            n_ctx_seq=n_ctx, n_seq=n_seq, n_outputs=n_outputs, n_batch=n_batch, n_threads=1, kv_type="f32", flash=False
        ),
    )


def questions(n: int, seed: int = 1) -> list[Encoded]:
    """Of paragraphs with one to five questions each, in random order, every length different."""
    rng = np.random.default_rng(seed)
    examples: list[Encoded] = []
    while len(examples) < n:
        paragraph = rng.integers(3, 300, rng.integers(2, 60)).tolist()
        for _ in range(rng.integers(1, 6)):
            prompt = (*paragraph, *rng.integers(3, 300, rng.integers(1, 25)).tolist())
            target = (*rng.integers(3, 300, rng.integers(1, 9)).tolist(), 2)
            examples.append(Encoded(f"q{len(examples)}", prompt, INVOCATION, target))
    rng.shuffle(examples)  # type: ignore[arg-type]
    return examples[:n]


def logits_afresh(
    context: Context, adapter: LoadedAdapter | None, scope: Scope, example: Encoded, more: list[int]
) -> np.ndarray:
    """Logits behind prompt, invocation and `more`, everything computed again without any cache, (n_vocab,)."""
    context.clear()
    whole = [*example.prompt, *example.invocation, *more]
    n_prompt = len(example.prompt)
    parts = [(0, n_prompt, scope == "all"), (n_prompt, len(whole), True)]
    logits = None
    for begin, end, on in parts:
        if adapter is not None:
            adapter.attach(context, on)
        wants = np.zeros(end - begin, np.int8)
        wants[-1] = 1
        positions = np.arange(begin, end, dtype=np.int32)
        logits = context.decode(np.array(whole[begin:end], np.int32), positions, positions * 0, wants)
    assert logits is not None
    return logits[0].copy()


def naive(context: Context, adapter: LoadedAdapter | None, scope: Scope, example: Encoded) -> list[int]:
    found: list[int] = []
    text = b""
    while len(found) < MAX_NEW:
        token = int(logits_afresh(context, adapter, scope, example, found).argmax())
        if context.model.is_end(token):
            break
        found.append(token)
        text += context.model.piece(token)
        if b"\n" in text.lstrip():
            break
    return found


@pytest.mark.parametrize("scope", ["answer", "all", None])
def test_batched_answers_equal_those_computed_one_token_at_a_time_without_a_cache(
    model: Model, adapter: LoadedAdapter, scope: Scope | None
) -> None:
    examples = questions(24)  # three lots; each is computed anew for each of its tokens
    used = None if scope is None else adapter
    with context_of(model, 8) as context:
        batched = generate(context, used, scope or "answer", examples, max_new_tokens=MAX_NEW)
        if used is not None:
            used.attach(context, False)
    with context_of(model, 1) as context:
        assert batched == [naive(context, used, scope or "answer", example) for example in examples]
        if used is not None:
            used.attach(context, False)
    lengths = {len(tokens) for tokens in batched}
    assert MAX_NEW in lengths
    assert min(lengths) < MAX_NEW, "some answer must end early for this test to mean anything"


def test_answers_do_not_depend_on_how_many_are_computed_together(model: Model, adapter: LoadedAdapter) -> None:
    examples = questions(30, seed=2)
    found = []
    for n_seq, n_batch, n_outputs in ((1, 512, 64), (8, 512, 64), (8, 32, 8), (3, 16, 3)):
        with context_of(model, n_seq, n_batch=n_batch, n_outputs=n_outputs) as context:
            found.append(generate(context, adapter, "answer", examples, max_new_tokens=MAX_NEW))
            adapter.attach(context, False)
    assert found[1:] == found[:1] * 3


def test_the_adapter_and_its_scope_change_answers(model: Model, adapter: LoadedAdapter) -> None:
    examples = questions(10)
    with context_of(model, 4) as context:
        base = generate(context, None, "answer", examples, max_new_tokens=MAX_NEW)
        answer = generate(context, adapter, "answer", examples, max_new_tokens=MAX_NEW)
        whole = generate(context, adapter, "all", examples, max_new_tokens=MAX_NEW)
        adapter.attach(context, False)
        assert generate(context, None, "answer", examples, max_new_tokens=MAX_NEW) == base
    assert base != answer != whole != base


@pytest.mark.parametrize("scope", ["answer", "all"])
def test_losses_equal_those_of_each_target_token_computed_alone(model: Model, adapter: LoadedAdapter, scope: Scope) -> None:
    examples = questions(12, seed=3)
    with context_of(model, 1) as context:
        alone = [
            np.mean([
                token_nll(logits_afresh(context, adapter, scope, example, list(example.target[:k]))[None], np.array([token], np.int32))[0]
                for k, token in enumerate(example.target)
            ])
            for example in examples
        ]  # fmt: skip
        adapter.attach(context, False)
    for n_seq, n_batch, n_outputs in ((1, 512, 64), (8, 512, 64), (4, 16, 4)):
        with context_of(model, n_seq, n_batch=n_batch, n_outputs=n_outputs) as context:
            both = dict(answers(context, adapter, scope, examples, max_new_tokens=2, with_losses=True))
            without = generate(context, adapter, scope, examples, max_new_tokens=2)
            adapter.attach(context, False)
        assert [both[i].tokens for i in range(len(examples))] == without
        assert [both[i].loss for i in range(len(examples))] == pytest.approx(alone, abs=1e-5)


def test_a_classified_example_gets_its_likeliest_label_and_the_loss_among_the_labels(model: Model) -> None:
    choices = (70, 80, 90, 100)
    plain = questions(20, seed=4)
    examples = [Encoded(e.id, e.prompt, e.invocation, (80,), choices) for e in plain]
    with context_of(model, 8) as context:
        found = dict(answers(context, None, "answer", examples, max_new_tokens=MAX_NEW, with_losses=True))
    with context_of(model, 1) as context:
        for i, example in enumerate(examples):
            logits = logits_afresh(context, None, "answer", example, [])
            assert found[i].tokens == [choices[int(logits[list(choices)].argmax())]]
            expected = choice_nll(logits, np.array(choices, np.int32), 80)
            assert found[i].loss == pytest.approx(expected, abs=1e-5)
    assert len({found[i].tokens[0] for i in found}) > 1


def test_an_answer_ends_where_its_sequence_is_full(model: Model) -> None:
    rng = np.random.default_rng(8)
    lengths = (251, 252, 253, 100)  # with the invocation 2, 1 and 0 cells are left of 256
    examples = [Encoded(f"q{n}", tuple(rng.integers(3, 300, n).tolist()), INVOCATION, (2,)) for n in lengths]
    with context_of(model, 4, n_ctx=256) as context:
        found = generate(context, None, "answer", examples, max_new_tokens=MAX_NEW, stop_at_newline=False)
    assert [len(tokens) for tokens in found] == [3, 2, 1, MAX_NEW]


def test_a_newline_ends_an_answer_only_where_asked_and_only_behind_text(tmp_path: Path) -> None:
    examples = questions(40, seed=6)
    with Model(write_tiny_llama(tmp_path / "untied.gguf", tied=False)) as model:
        [newline] = model.tokenize("\n")
        a = np.random.default_rng(7).standard_normal((1, model.n_embd)).astype(np.float32)
        b = np.zeros((model.n_vocab, 1), np.float32)
        b[newline] = 0.2  # a newline is the likeliest token of about every second one
        often = LoadedAdapter(model, Adapter("llama", 1.0, {"output.weight": (a, b)}))
        with context_of(model, 8) as context:
            stopping = generate(context, often, "all", examples, max_new_tokens=MAX_NEW)
            going_on = generate(context, often, "all", examples, max_new_tokens=MAX_NEW, stop_at_newline=False)
        often.close()
        spelled = {tokens: b"".join(map(model.piece, tokens)) for tokens in map(tuple, [*stopping, *going_on])}
        before = {tokens: b"".join(map(model.piece, tokens[:-1])) for tokens in map(tuple, stopping)}
    cut = [(tuple(short), tuple(long)) for short, long in zip(stopping, going_on, strict=True) if short != long]
    assert cut
    assert any(spelled[short].startswith(b"\n") for short, _ in cut), "an answer may begin with newlines"
    for short, long in cut:
        assert long[: len(short)] == short
        assert b"\n" in spelled[short].lstrip()
        assert b"\n" not in before[short].lstrip()


def test_an_example_longer_than_the_context_is_named(model: Model) -> None:
    example = Encoded("Q7", (5,) * 126, INVOCATION, (2,))
    with context_of(model, 2) as context, pytest.raises(DataError) as caught:
        generate(context, None, "answer", [example], max_new_tokens=1)
    assert str(caught.value) == "example Q7 needs 129 tokens, but the context has 128 a sequence."


def test_no_examples_have_no_answers(model: Model) -> None:
    with context_of(model, 2) as context:
        assert generate(context, None, "answer", [], max_new_tokens=1) == []


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=40),
    st.integers(1, 8),
)
def test_fillings_hold_every_example_once_and_no_lot_is_too_large(pairs: list[tuple[int, int]], n_seq: int) -> None:
    examples = [Encoded(str(i), (p,) * 20 + (i,) * q, INVOCATION, (2,)) for i, (p, q) in enumerate(pairs)]
    lots = fillings(examples, n_seq)
    assert sorted(i for lot in lots for i in lot) == list(range(len(examples)))
    assert all(1 <= len(lot) <= n_seq for lot in lots)


def test_fillings_keep_a_paragraphs_questions_together_and_fill_the_lots() -> None:
    sizes = [5, 3, 4, 4, 6, 2]  # of paragraphs; in lots of 8 they fill three
    pairs = [(p, q) for p, size in enumerate(sizes) for q in range(size)]
    examples = [Encoded(f"{p}-{q}", (10 + p,) * 30 + (q,), INVOCATION, (2,)) for p, q in pairs]
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    shuffled = [examples[i] for i in order]
    lots = [[shuffled[i].id[0] for i in lot] for lot in fillings(shuffled, 8)]
    assert sorted("".join(sorted(lot)) for lot in lots) == ["00000111", "22223333", "44444455"]
    for lot in lots:
        n_paragraphs = 1 + sum(a != b for a, b in pairwise(lot))
        assert n_paragraphs == 2, "questions on one paragraph must be neighbours"
