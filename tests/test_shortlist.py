"""A shortlist has every token that a loss may ask for and that the data are written in; of label words nothing else counts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fwdllama.encode import Encoder
from fwdllama.llama.model import Model
from fwdllama.shortlist import BLOCK, FEWEST, TEXTS, shortlisted
from fwdllama.tasks.template import seed_template
from fwdllama.types import Example
from gguf_tools.synth import write_tiny_llama

N_VOCAB = 12_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Its vocabulary is large; what texts are made of stands at its beginning."""
    with Model(write_tiny_llama(tmp_path_factory.mktemp("model") / "large.gguf", n_vocab=N_VOCAB)) as model:
        yield model


def question(number: int, context: str = "The cat sat.", answer: str = "the cat") -> Example:
    return Example(str(number), {"context": context, "question": "who sat?"}, (answer,))


def test_it_has_all_tokens_of_texts_and_answers_and_the_vocabularys_first(model: Model) -> None:
    encoder = Encoder(model, seed_template("squad"))
    found = shortlisted(encoder, [question(1)], N_VOCAB)
    assert found is not None
    assert len(found) == FEWEST
    assert found.dtype == np.int32
    assert (np.diff(found) > 0).all()
    assert found[:300].tolist() == list(range(300))
    example = encoder.example(question(1))
    assert {*example.prompt, *example.invocation, *example.target} <= set(found.tolist())


def test_answers_count_however_many_there_are_and_prompts_of_the_first_only(model: Model) -> None:
    class Far(Encoder):
        """Texts become tokens at the vocabulary's end."""

        def targets(self, example: Example) -> tuple[int, ...]:
            return (N_VOCAB - 1 - int(example.id) % 3000,)

    examples = [question(i) for i in range(TEXTS + 9)]
    found = shortlisted(Far(model, seed_template("squad")), examples, N_VOCAB)
    assert found is not None
    assert set(range(N_VOCAB - 3000, N_VOCAB)) <= set(found.tolist())
    assert len(found) == FEWEST


def test_there_is_none_where_it_would_be_nearly_the_whole_vocabulary(model: Model) -> None:
    encoder = Encoder(model, seed_template("squad"))
    assert shortlisted(encoder, [question(1)], FEWEST) is None
    assert shortlisted(encoder, [question(1)], 300) is None


def test_label_words_are_all_that_a_classification_needs(model: Model) -> None:
    encoder = Encoder(model, seed_template("classification"))
    examples = [Example(str(i), {"text": f"some text {i}"}, ("World",), ("World", "Sports", "Business")) for i in range(3)]
    found = shortlisted(encoder, examples, N_VOCAB)
    assert found is not None
    assert len(found) == BLOCK
    assert set(encoder.example(examples[0]).choices) <= set(found.tolist())
