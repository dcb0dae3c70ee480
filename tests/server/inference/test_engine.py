"""Answers are those of the model alone, whoever else asks, and each is computed with one edition of the adapter."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from fwdllama_server.inference.engine import MAX_WAITING, Engine, open_engine
from fwdllama_server.inference.exchange import Asked
from fwdllama_server.inference.sampling import Sampling

from fwdllama.llama.context import Context
from fwdllama.llama.generate import generate
from fwdllama.types import Encoded
from gguf_tools.adapter import write_adapter
from tests.server.inference.conftest import INVOCATION, SEED_PROMPT, Asking, EditionOf, answer, put_on, wait_for

GREEDY = Sampling(temperature=0)
LONG = 120  # tokens, so that a request is still running when the next event is looked at


def asked(seed: int = 0, n_prompt: int = 20, *, n: int = 24, invoked: bool = True, sampling: Sampling = GREEDY) -> Asked:
    prompt = tuple(np.random.default_rng(seed).integers(70, 300, n_prompt).tolist())
    return Asked((*prompt, *INVOCATION) if invoked else prompt, n, sampling)


def test_greedy_answers_are_those_of_fwdllama_answer(base: Path, tmp_path: Path, engine: Engine, edition_of: EditionOf) -> None:
    from fwdllama.answering import ask, choose_template, open_engine
    from fwdllama.encode import Encoder, invocation_tokens
    from fwdllama.tasks import Kind
    from fwdllama.tasks.template import seed_template
    from fwdllama.types import Example

    n_different = 0
    cases: tuple[tuple[Kind, dict[str, str]], ...] = (
        ("pairs", {"prompt": "what is\n\nthis:\nwell"}),
        ("squad", {"context": "the cat sat", "question": "who Answer:\nsat?"}),
        ("pairs", {"prompt": "hm"}),
    )
    for number, (kind, fields) in enumerate(cases, 1):
        edition = edition_of(number, invocation=invocation_tokens(engine.model, seed_template(kind)))
        write_adapter(tmp_path / "a.gguf", edition.adapter)
        put_on(engine, edition)
        with open_engine(base, adapter_path=tmp_path / "a.gguf", batch=1, n_threads=1) as reference:
            template = choose_template(reference, "seed", kind)
            example = Example("q", fields, ())
            encoded = Encoder(reference.model, template).question(example)
            prompt = "".join(segment.text for segment in (*template.render(example), *template.invocation))
            tokens = tuple(engine.model.tokenize(prompt, special=True))
            assert tokens == encoded.prompt + encoded.invocation
            said = []
            for tuned in (False, True):
                reference.set_adapter(tuned)
                expected = ask(reference, template, example, max_new_tokens=16)
                outcome = answer(engine, Asked(tokens, 16, GREEDY), tuned=tuned)
                assert template.parse(outcome.text.replace("\ufffd", ""), example) == expected
                said.append(expected)
            n_different += said[0] != said[1]
    assert n_different, "the adapter must change an answer for this test to mean anything"


@pytest.mark.parametrize("scope", ["answer", "all"])
def test_the_adapter_is_on_from_its_scope_on(engine: Engine, edition_of: EditionOf, scope: str) -> None:
    edition = edition_of(2, scope=scope)
    put_on(engine, edition)
    question = asked(3, 40)
    n_prompt = 40 if scope == "answer" else 0
    assert edition.first_on(question.tokens) == n_prompt
    got = answer(engine, question, tuned=True)
    from fwdllama.llama.adapter import LoadedAdapter
    from fwdllama.memory import engine_options

    loaded = LoadedAdapter(engine.model, edition.adapter)
    with Context(engine.model, engine_options(batch=1, n_ctx=512, n_threads=1)) as context:
        example = Encoded("q", question.tokens[:-2], INVOCATION, (2,))
        [expected] = generate(context, loaded, edition.scope, [example], max_new_tokens=24, stop_at_newline=False)
        loaded.close()
    assert got.text.encode() == b"".join(map(engine.model.piece, expected)).decode(errors="replace").encode()


@pytest.mark.parametrize("together", [2, 100])
@pytest.mark.parametrize("parallel", [2, 5])
def test_answers_do_not_depend_on_who_else_asks(base: Path, edition_of: EditionOf, together: int, parallel: int) -> None:
    lots = [(asked(seed, 5 + 37 * seed, n=5 + 3 * seed), bool(seed % 3)) for seed in range(7)]
    with open_engine(base, n_ctx=512, n_parallel=parallel, n_threads=1, together=together) as engine:
        put_on(engine, edition_of(1))
        alone = [answer(engine, question, tuned=tuned).texts for question, tuned in lots]
        asking = [Asking([question], tuned=tuned) for question, tuned in lots]
        for each in asking:
            assert engine.submit(each.request)
        assert [each.outcome().texts for each in asking] == alone
    assert len({text for [text] in alone}) == len(lots)


def test_without_an_invocation_the_adapter_stays_off_and_the_start_says_so(engine: Engine, edition_of: EditionOf) -> None:
    put_on(engine, edition_of(1))
    plain, invoked = asked(5, invoked=False), asked(5)
    both = answer(engine, plain, invoked, tuned=True)
    assert both.started is not None
    assert both.started.on == (False, True)
    assert both.texts[0] == answer(engine, plain).text
    assert both.texts[1] != answer(engine, invoked).text


def test_only_the_last_invocation_of_a_prompt_counts(edition_of: EditionOf) -> None:
    assert edition_of(1).first_on([*INVOCATION, 70, *INVOCATION, 71, 61]) == 3
    assert edition_of(1).first_on([61, 70, 13]) is None


def test_a_swap_during_an_answer_changes_only_later_requests(base: Path, edition_of: EditionOf) -> None:
    first, second = edition_of(1), edition_of(2)
    question = asked(1, n=LONG)
    with open_engine(base, n_ctx=512, n_threads=1) as engine:
        expected = {}
        for edition in (second, first):
            put_on(engine, edition)
            expected[edition] = answer(engine, question, tuned=True)
        base_text = answer(engine, question).text
        assert expected[first].ends[0].n_new == LONG, "the answer must be long enough to be swapped under"

        later = [Asking([question], tuned=True), Asking([question], tuned=False)]

        def swap() -> None:
            engine.offer(second)
            for each in later:
                engine.submit(each.request)

        running = Asking([question], tuned=True, on_piece=swap)
        engine.submit(running.request)
        outcomes = [running.outcome(), *(each.outcome() for each in later)]
        assert [outcome.text for outcome in outcomes] == [expected[first].text, expected[second].text, base_text]
        starts = [outcome.started.edition if outcome.started else None for outcome in outcomes]
        assert starts == [first, second, None]


def test_all_answers_of_a_request_are_of_one_edition_though_they_run_one_after_the_other(base: Path, edition_of: EditionOf) -> None:
    first, second = edition_of(1), edition_of(2)
    lot = [asked(seed, n=30) for seed in range(4)]
    with open_engine(base, n_ctx=512, n_parallel=1, n_threads=1) as engine:
        put_on(engine, first)
        expected = answer(engine, *lot, tuned=True).texts
        running = Asking(lot, tuned=True, on_piece=lambda: engine.offer(second))
        engine.submit(running.request)
        assert running.outcome().texts == expected
        wait_for(lambda: engine.current and engine.current[0] is second)
        assert answer(engine, *lot, tuned=True).texts != expected


def test_a_third_edition_waits_while_two_are_in_use_and_the_newest_wins(base: Path, edition_of: EditionOf) -> None:
    editions = [edition_of(seed) for seed in range(1, 6)]
    question = asked(1, n=LONG)
    with open_engine(base, n_ctx=512, n_threads=1) as engine:
        put_on(engine, editions[0])
        last = Asking([question], tuned=True)

        def offer_more() -> None:  # now the first two are in use
            for edition in editions[2:]:
                engine.offer(edition)
            engine.submit(last.request)

        second = Asking([question], tuned=True, on_piece=offer_more)

        def offer_second() -> None:
            engine.offer(editions[1])
            engine.submit(second.request)

        first = Asking([question], tuned=True, on_piece=offer_second)
        engine.submit(first.request)
        starts = [asking.outcome().started for asking in (first, second, last)]
        assert [start.edition.version for start in starts if start and start.edition] == [1, 2, 2]
        wait_for(lambda: engine.current and engine.current[0] is editions[4])
        assert answer(engine, question, tuned=True).started.edition is editions[4]  # type: ignore[union-attr]


def test_an_edition_of_another_layout_and_scope_is_swapped_in_too(base: Path, edition_of: EditionOf) -> None:
    narrow, wide = edition_of(1), edition_of(2, rank=9, scope="all")
    question = asked(1, invoked=False)
    with open_engine(base, n_ctx=512, n_threads=1) as engine:
        texts = []
        for edition in (wide, narrow, wide, narrow, wide):
            put_on(engine, edition)
            texts.append(answer(engine, question, tuned=True).text)
        assert texts == [texts[0], texts[1]] * 2 + [texts[0]]
        assert texts[1] == answer(engine, question).text != texts[0]


def test_memory_does_not_grow_with_swaps(base: Path, edition_of: EditionOf) -> None:
    with open_engine(base, n_ctx=512, n_threads=1) as engine:
        adapters = engine._adapters
        put_on(engine, edition_of(1))
        held = adapters.current
        for seed in range(2, 6):
            put_on(engine, edition_of(seed))
            assert adapters.current is held, "an idle adapter is written over"


def test_before_the_first_edition_the_adapter_cannot_be_asked_but_the_base_can(base: Path) -> None:
    with open_engine(base, n_ctx=512, n_threads=1) as engine:
        failed = answer(engine, asked(), tuned=True).failed
        assert failed is not None
        assert (failed.message, failed.missing) == ("no version of the adapter has arrived yet.", True)
        assert answer(engine, asked()).ends[0].n_new > 0


def test_a_cancelled_request_frees_its_place_at_once(base: Path) -> None:
    with open_engine(base, n_ctx=2048, n_parallel=1, n_threads=1) as engine:
        running = Asking([asked(seed, n=1900) for seed in range(4)], tuned=False, on_piece=lambda: running.cancel())
        engine.submit(running.request)
        assert answer(engine, asked(1)).ends[0].n_new > 0
        wait_for(lambda: engine._n_answers == 0)
        assert engine._slots.n_free == 1
        assert engine._held == {}


def test_a_full_queue_refuses_and_takes_again_later(base: Path) -> None:
    with open_engine(base, n_ctx=512, n_parallel=2, n_threads=1) as engine:
        lot = Asking([asked(seed, n=2) for seed in range(MAX_WAITING + 2)], tuned=False)
        more = Asking([asked(n=2)], tuned=False)
        refused = []
        first = Asking([asked(n=2)], tuned=False, on_piece=lambda: refused.append((engine.submit(lot.request), engine.submit(more.request))))
        engine.submit(first.request)
        first.outcome()
        assert refused == [(False, True)]
        more.outcome()
        wait_for(lambda: engine._n_answers == 0)
        assert engine.submit(lot.request)
        assert len(lot.outcome().ends) == MAX_WAITING + 2


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(engine: Engine) -> None:
    def drawn(seed: int | None) -> str:
        return answer(engine, asked(1, sampling=Sampling(1.0, 0.9, seed))).text

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


def test_stop_strings_end_an_answer_before_them(engine: Engine) -> None:
    question = asked(4, n=40)
    whole = answer(engine, question).text
    stop = whole[len(whole) // 2 :][:2]
    cut = answer(engine, Asked(question.tokens, 40, GREEDY, (stop,)))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.ends[0].reason == "stop"


def test_an_answer_may_fill_the_context_to_its_last_cell(base: Path) -> None:
    with open_engine(base, n_ctx=256, n_parallel=2, n_threads=1) as engine:
        question = asked(9, 250, invoked=False, n=6)
        outcome = answer(engine, question)
        assert (outcome.ends[0].reason, outcome.ends[0].n_new) == ("length", 6)


def test_one_token_is_an_answer(engine: Engine) -> None:
    outcome = answer(engine, asked(1, n=1), asked(2, n=1))
    assert [end.n_new for end in outcome.ends.values()] == [1, 1]


def test_closing_fails_what_runs_and_what_comes_later(base: Path) -> None:
    with open_engine(base, n_ctx=2048, n_threads=1) as engine:
        begun = threading.Event()
        running = Asking([asked(n=1900)], tuned=False, on_piece=begun.set)
        engine.submit(running.request)
        assert begun.wait(10)
        engine.close()
        assert not engine.alive
        late = Asking([asked()], tuned=False)
        assert engine.submit(late.request)
        for asking in (running, late):
            failed = asking.outcome().failed
            assert failed is not None
            assert failed.message == "the server is stopping."


def test_what_llama_cpp_refuses_fails_its_request_and_none_beside_it(base: Path) -> None:
    with open_engine(base, n_ctx=256, n_threads=1, together=100) as engine:
        short, long = Asking([asked(1, n=10)], tuned=False), Asking([asked(1, 250, n=100)], tuned=False)
        engine.submit(long.request)
        engine.submit(short.request)
        failed = long.outcome().failed
        assert failed is not None
        assert failed.message.startswith("llama_decode failed with 1 (no room in the KV cache)")
        assert short.outcome().ends[0].n_new == 10
        wait_for(lambda: engine._n_answers == 0)
        assert engine.alive


def test_seed_prompt_ends_with_the_invocation(engine: Engine) -> None:
    assert tuple(engine.model.tokenize(SEED_PROMPT)[-2:]) == INVOCATION
