"""On a real quantised model the server gives the answers of `fwdllama answer`, on the base and with an adapter, at once or one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fwdllama_server.inference.edition import make_edition
from fwdllama_server.inference.engine import Engine, open_engine
from fwdllama_server.inference.exchange import Asked
from fwdllama_server.inference.prompt import chat_tokens, raw_tokens
from fwdllama_server.inference.sampling import Sampling

import fwdllama.answering as answering
from fwdllama.encode import Encoder, invocation_tokens
from fwdllama.tasks.conversation import Message
from fwdllama.types import Example
from gguf_tools.adapter import Adapter, write_adapter
from tests.server.inference.conftest import Asking, answer, put_on

pytestmark = pytest.mark.model

CONTEXT = (
    "The lighthouse of Kerrin was built in 1841 by Ada Moor. It stands on a rock of basalt, 40 metres above the sea, and was lit with "
    "rapeseed oil until 1902, when an electric lamp replaced it. Since 1987 nobody lives there."
)
QUESTIONS = ("Who built the lighthouse?", "When was the electric lamp put in?", "How high above the sea does it stand?", "What is the rock made of?")


@pytest.fixture(scope="module")
def adapter_path(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes answers but does not ruin them."""
    from fwdllama.llama.model import Model

    with Model(model_path) as model:
        invocation = invocation_tokens(model, answering.model_template(model, "seed", "squad"))
        rng = np.random.default_rng(3)
        tensors = {}
        for name, (shape, _) in model.info.tensors.items():
            if name.endswith(("attn_q.weight", "attn_v.weight")) and 8 <= int(name.split(".")[1]) < 18:
                a = (rng.standard_normal((8, shape[1])) * shape[1] ** -0.5).astype(np.float32)
                tensors[name] = (a, (0.15 * rng.standard_normal((shape[0], 8))).astype(np.float32))
        path = tmp_path_factory.mktemp("adapter") / "a.gguf"
        write_adapter(path, Adapter(model.info.architecture, 8.0, tensors, "answer", invocation))
    return path


@pytest.fixture(scope="module")
def engine(model_path: Path, adapter_path: Path) -> Iterator[Engine]:
    with open_engine(model_path, n_ctx=512, n_threads=1, together=100) as opened:
        put_on(opened, make_edition(adapter_path.read_bytes(), "a", opened.model.info))
        yield opened


def test_served_answers_are_those_of_fwdllama_answer(model_path: Path, adapter_path: Path, engine: Engine) -> None:
    expected, asked = {}, {}
    with answering.open_engine(model_path, adapter_path=adapter_path, batch=1, n_ctx=512, n_threads=1) as reference:
        template = answering.choose_template(reference, "seed", "squad")
        for question in QUESTIONS:
            example = Example("q", {"context": CONTEXT, "question": question}, ())
            prompt = "".join(segment.text for segment in (*template.render(example), *template.invocation))
            tokens = raw_tokens(engine.model, prompt)
            encoded = Encoder(reference.model, template).question(example)
            assert tokens == encoded.prompt + encoded.invocation
            for tuned in (False, True):
                reference.set_adapter(tuned)
                expected[question, tuned] = answering.ask(reference, template, example, max_new_tokens=16)
                asked[question, tuned] = Asked(tokens, 16, Sampling(temperature=0))  # to the end: what is untrained may begin with newlines
    assert {key: template.parse(answer(engine, each, tuned=key[1]).text, example) for key, each in asked.items()} == expected
    at_once = {key: Asking([each], tuned=key[1]) for key, each in asked.items()}
    for asking in at_once.values():
        assert engine.submit(asking.request)
    assert {key: template.parse(asking.outcome().text, example) for key, asking in at_once.items()} == expected
    assert any(expected[question, True] != expected[question, False] for question in QUESTIONS), "the adapter must change an answer"


def test_a_chat_has_the_prompt_that_a_chat_template_is_trained_with(engine: Engine) -> None:
    template = answering.model_template(engine.model, "chat", "pairs")
    encoded = Encoder(engine.model, template).question(Example("q", {"prompt": "Who are you?"}, ()))
    assert chat_tokens(engine.model, [Message("user", "Who are you?")]) == encoded.prompt + encoded.invocation
