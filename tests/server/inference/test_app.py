"""The server as OpenAI's own client sees it, over a real socket."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fwdllama_server.inference.engine import open_engine
from fwdllama_server.inference.exchange import Asked
from fwdllama_server.inference.sampling import Sampling

from tests.server.inference.conftest import SEED_PROMPT, Asking, EditionOf, Served, answer, put_on, serving, wait_for

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def served(base: Path, edition_of: EditionOf) -> Iterator[Served]:
    with open_engine(base, n_ctx=2048, n_parallel=3, n_threads=1) as engine, serving(engine) as running:
        put_on(engine, edition_of(1))
        yield running


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def expected(served: Served, prompt: str, n: int, *, tuned: bool) -> str:
    return answer(served.engine, Asked(tuple(served.engine.model.tokenize(prompt, special=True)), n, GREEDY), tuned=tuned).text


def test_models_are_the_base_and_the_base_with_the_adapter(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:run"]
    assert client.models.retrieve("tiny:run").object == "model"


@pytest.mark.parametrize("model", ["tiny", "tiny:run"])
def test_a_completion_is_the_engines_answer_and_says_which_adapter_gave_it(client: openai.OpenAI, served: Served, model: str) -> None:
    raw = client.completions.with_raw_response.create(model=model, prompt=SEED_PROMPT, max_tokens=9, temperature=0)
    found = raw.parse()
    assert found.choices[0].text == expected(served, SEED_PROMPT, 9, tuned=model != "tiny")
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    n_prompt = len(served.engine.model.tokenize(SEED_PROMPT))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (n_prompt, 9, n_prompt + 9)
    assert (found.object, found.model, found.id[:5]) == ("text_completion", model, "cmpl-")
    assert raw.headers["x-fwdllama-adapter"] == ("off (base)" if model == "tiny" else "on (version 1)")
    assert found.system_fingerprint == ("base" if model == "tiny" else "version 1")


def test_a_prompt_without_the_invocation_is_answered_by_the_base_and_says_so(client: openai.OpenAI, served: Served) -> None:
    raw = client.completions.with_raw_response.create(model="tiny:run", prompt="no marker", max_tokens=9, temperature=0)
    assert raw.headers["x-fwdllama-adapter"] == "off (no invocation)"
    assert raw.parse().choices[0].text == expected(served, "no marker", 9, tuned=False)
    raw = client.completions.with_raw_response.create(model="tiny:run", prompt=["no marker", SEED_PROMPT], max_tokens=9)
    assert raw.headers["x-fwdllama-adapter"] == "on (version 1) for 1 of 2"


def test_a_completion_streams_to_the_same_text(client: openai.OpenAI, served: Served) -> None:
    stream = client.completions.create(model="tiny:run", prompt=SEED_PROMPT, max_tokens=20, temperature=0, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(served, SEED_PROMPT, 20, tuned=True)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 5


def test_several_prompts_several_answers_echo_token_ids_and_stop(client: openai.OpenAI, served: Served) -> None:
    prompts = ["hello", "there you"]
    several = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=6, temperature=0, echo=True)
    texts = [prompt + expected(served, prompt, 6, tuned=False) for prompt in prompts for _ in range(2)]
    assert [choice.text for choice in several.choices] == texts
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    tokens = served.engine.model.tokenize("hello")
    for prompt in (tokens, [tokens]):
        assert client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0).choices[0].text == texts[0][5:]
    stop = texts[0][8:10]
    stopped = client.completions.create(model="tiny", prompt="hello", max_tokens=6, temperature=0, stop=[stop, "nowhere"]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (texts[0][5 : texts[0].index(stop, 5)], "stop")


def test_a_seed_repeats_an_answer_and_n_answers_differ(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        return [c.text for c in client.completions.create(model="tiny", prompt="a", max_tokens=12, seed=seed, top_p=0.9, n=2).choices]

    assert texts(1) == texts(1) != texts(2)
    assert len(set(texts(1))) == 2


def test_a_chat_is_answered_through_the_models_template(client: openai.OpenAI, served: Served) -> None:
    messages: Any = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
    ]
    found = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=9, temperature=0)
    prompt = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    text = expected(served, prompt, 9, tuned=False)
    assert (found.choices[0].message.content, found.choices[0].message.role) == (text, "assistant")
    assert (found.object, found.id[:9]) == ("chat.completion", "chatcmpl-")
    with client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=9, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_dump(exclude_none=True) == found.usage.model_dump(exclude_none=True)  # type: ignore[union-attr]


def test_events_are_those_of_openai_to_the_byte(served: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0, "stream": True}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first, last = json.loads(events[0].removeprefix("data: ")), json.loads(events[-3].removeprefix("data: "))
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    assert first["choices"] == [choice]
    assert first["object"] == "chat.completion.chunk"
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert "usage" not in last


def test_a_swap_during_a_stream_changes_no_word_of_it(base: Path, edition_of: EditionOf) -> None:
    with open_engine(base, n_ctx=2048, n_threads=1) as engine, serving(engine) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        put_on(engine, edition_of(1))
        old = expected(served, SEED_PROMPT, 200, tuned=True)
        asked: Any = {"model": "tiny:run", "prompt": SEED_PROMPT, "max_tokens": 200, "temperature": 0}
        stream = client.completions.create(**asked, stream=True)
        first = next(iter(stream))
        put_on(engine, edition_of(2))
        new = client.completions.create(**asked)
        rest = list(stream)
        assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in rest) == old
        assert {chunk.system_fingerprint for chunk in [first, *rest]} == {"version 1"}
        assert (new.choices[0].text, new.system_fingerprint) == (expected(served, SEED_PROMPT, 200, tuned=True), "version 2")
        assert new.choices[0].text != old
        assert httpx.get(f"{served.url}/v1/adapter").json()["version"] == 2
        client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(base: Path, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fwdllama.inference")
    with open_engine(base, n_ctx=2048, n_parallel=1, n_threads=1) as engine, serving(engine) as served:
        body = {"model": "tiny", "prompt": "a", "n": 16, "max_tokens": 2000, "stream": stream}
        with httpx.Client(timeout=0.1) as client:
            request = client.build_request("POST", f"{served.url}/v1/completions", json=body)
            if stream:
                next(client.send(request, stream=True).iter_bytes())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.send(request)
        wait_for(lambda: engine._n_answers == 0)
    assert not [record for record in caplog.records if "answered" in record.message]


def test_state_is_told(served: Served, client: openai.OpenAI) -> None:
    told = httpx.get(f"{served.url}/v1/adapter").json()
    edition, since = served.engine.current or (None, 0)
    assert edition is not None
    assert told == {"model": "tiny:run", "version": 1, "digest": f"{1:064x}", "sha256": edition.sha256, "scope": "answer", "since": since}
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/ready").json() == {"status": "ready"}


def test_until_an_adapter_has_come_only_the_base_is_ready(base: Path) -> None:
    with open_engine(base, n_ctx=256, n_threads=1) as engine, serving(engine) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="tiny:run", prompt="a", stream=stream)
            assert (caught.value.status_code, caught.value.code) == (503, "no_adapter")
        assert client.completions.create(model="tiny", prompt="a").choices
        ready = httpx.get(f"{served.url}/ready")
        assert (ready.status_code, ready.json()["error"]["message"]) == (503, "no version of the adapter has arrived yet.")
        assert httpx.get(f"{served.url}/v1/adapter").json()["version"] is None
        engine.close()
        assert httpx.get(f"{served.url}/health").status_code == 503
        client.close()


def test_a_wrong_key_opens_nothing_but_the_probes(base: Path) -> None:
    key = "s" * 32
    with open_engine(base, n_ctx=256, n_threads=1) as engine, serving(engine, key=key, origins=("http://page",)) as served:
        for given in ("none", key + "s", key[:-1]):
            client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=given, max_retries=0)
            with pytest.raises(openai.AuthenticationError) as caught:
                client.models.list()
            assert caught.value.body == {"message": "the API key is wrong.", "type": "authentication_error", "param": None, "code": "invalid_api_key"}
            client.close()
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        client.close()
        bare = httpx.get(f"{served.url}/v1/models")
        assert (bare.status_code, bare.headers["www-authenticate"]) == (401, "Bearer")
        assert bare.json()["error"]["message"] == "the API key is missing: send it as `Authorization: Bearer KEY`."
        assert httpx.get(f"{served.url}/health").status_code == 200
        asked = {"Origin": "http://page", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        assert httpx.options(f"{served.url}/v1/completions", headers=asked).headers["access-control-allow-origin"] == "http://page"
        other = httpx.options(f"{served.url}/v1/completions", headers={**asked, "Origin": "http://other"})
        assert "access-control-allow-origin" not in other.headers


BAD: list[tuple[str, dict[str, Any], int, str, str | None]] = [
    ("completions", {"model": "gpt"}, 404, "the model 'gpt' does not exist; there is tiny and tiny:run.", "model"),
    ("completions", {"prompt": None}, 400, "prompt: field required.", "prompt"),
    ("completions", {"prompt": ""}, 400, "the prompt is empty.", "prompt"),
    ("completions", {"prompt": [1, 999]}, 400, "the prompt has token 999, but the model's are 0 to 319.", "prompt"),
    ("completions", {"prompt": "a" * 4000}, 400, "2000 tokens of prompt and 2000 of answer are 4000, but the context has 2048.", "prompt"),
    ("completions", {"prompt": ["a"] * 9, "n": 2}, 400, "9 prompts with n = 2 ask for 18 answers, but a request may ask for 1 to 16.", "prompt"),
    ("completions", {"prompt": "a\ud800"}, 400, "the prompt cannot be written as UTF-8: '\\ud800' at character 1 is no character.", "prompt"),
    ("completions", {"max_tokens": 0}, 400, "max_tokens: input should be greater than or equal to 1, but is 0.", "max_tokens"),
    ("completions", {"temperature": 3}, 400, "temperature: input should be less than or equal to 2, but is 3.", "temperature"),
    ("completions", {"logprobs": 0}, 400, "logprobs is not supported by this server; leave it out.", "logprobs"),
    ("completions", {"stop": ""}, 400, "stop has an empty string, which occurs everywhere; leave it out.", "stop"),
    ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools is not supported by this server; leave it out.", "tools"),
    ("chat/completions", {"messages": []}, 400, "messages: list should have at least 1 item after validation, not 0, but is [].", "messages"),
    (
        "chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400,
        "messages.0.role: input should be 'system', 'developer', 'user' or 'assistant', but is 'tool'.", "messages",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("path", "changes", "status", "sentence", "param"), BAD)
def test_bad_requests_are_refused_with_a_sentence(
    served: Served, path: str, changes: dict[str, Any], status: int, sentence: str, param: str | None
) -> None:
    good = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
    body = json.dumps({"model": "tiny", "max_tokens": 2000, **good, **changes})
    response = httpx.post(f"{served.url}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["message"], error["param"]) == (status, sentence, param)


@pytest.mark.parametrize(
    ("content", "kind", "status", "sentence"),
    [
        (b"{", "application/json", 400, "the body is not JSON: expecting property name enclosed in double quotes."),
        (b"[]", "application/json", 400, "the body must be a JSON object."),
        (b'{"model":"tiny","prompt":"a"}', "text/plain", 400, "the body must be a JSON object."),
        (b"[" * 100_000, "application/json", 400, "there was an error parsing the body."),
        (b"x" * 2_100_000, "application/json", 413, "the body has 2100000 bytes or more, but at most 2097152 are accepted."),
    ],
)
def test_bodies_that_are_no_request_are_refused(served: Served, content: bytes, kind: str, status: int, sentence: str) -> None:
    response = httpx.post(f"{served.url}/v1/completions", content=content, headers={"Content-Type": kind})
    assert (response.status_code, response.json()["error"]["message"]) == (status, sentence)


def test_a_body_without_a_length_is_counted_as_it_comes(served: Served) -> None:
    response = httpx.post(f"{served.url}/v1/completions", content=(b"x" * 100_000 for _ in range(30)), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


def test_unknown_paths_and_methods_have_the_same_form(served: Served) -> None:
    assert httpx.get(f"{served.url}/v2").json()["error"]["message"] == "there is nothing at /v2."
    wrong = httpx.delete(f"{served.url}/v1/models")
    assert (wrong.status_code, wrong.json()["error"]["message"]) == (405, "DELETE is not possible at /v1/models.")


def test_a_full_queue_is_429_with_a_time_to_come_back(base: Path) -> None:
    with open_engine(base, n_ctx=2048, n_parallel=1, n_threads=1) as engine, serving(engine) as served:
        lot = Asking([Asked((70,), 2000, GREEDY)] * 65, tuned=False)
        assert engine.submit(lot.request)
        response = httpx.post(f"{served.url}/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "2")
        assert response.json()["error"]["message"] == "64 answers are waiting already; try again in a few seconds."
        lot.cancel()
