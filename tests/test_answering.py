from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fwdllama.answering import answer_dataset, ask, choose_template, open_engine
from fwdllama.encode import encode_dataset
from fwdllama.engine import Engine
from fwdllama.errors import AdapterError, DataError, ResourceError, UsageError
from fwdllama.llama.generate import generate
from fwdllama.machine import available_bytes, check_memory, default_threads, total_bytes
from fwdllama.score import exact_match, f1, normalise
from fwdllama.tasks.load import load_dataset
from fwdllama.tasks.template import Template, seed_template
from fwdllama.types import Dataset, Example, Segment
from gguf_tools.adapter import BASE_KEY, Adapter, write_adapter
from gguf_tools.errors import FileError
from gguf_tools.model import file_sha256, read_model_info
from gguf_tools.plan import Item
from gguf_tools.synth import write_tiny_llama

MAX_NEW = 6
TEMPLATE = seed_template("squad")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FWDLLAMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with open_engine(path, n_threads=1, kv_type="f32") as engine:
        yield engine


def adapter_at(
    target: Path, model_path: Path, *, invocation: str | None = " Answer:", base_sha256: str | None = None
) -> Path:
    """An adapter that changes every answer, of scope "answer" where an invocation is given."""
    rng = np.random.default_rng(5)
    info = read_model_info(model_path)
    tensors = {
        name: (
            rng.standard_normal((4, shape[1])).astype(np.float32),
            rng.standard_normal((shape[0], 4)).astype(np.float32),
        )
        for name, (shape, _) in info.tensors.items()
        if name.endswith(("attn_q.weight", "attn_v.weight"))
    }
    tokens = tuple(259 if character == "?" else 3 + ord(character) for character in invocation or "")
    metadata = {} if base_sha256 is None else {BASE_KEY: base_sha256}
    write_adapter(target, Adapter("llama", 4.0, tensors, "answer" if tokens else "all", tokens, metadata))
    return target


def squad(n: int, *, words: int = 12) -> Dataset:
    rng = np.random.default_rng(n)

    def some(count: int) -> str:
        return " ".join("".join(map(chr, 97 + rng.integers(0, 26, 4))) for _ in range(count))

    paragraphs = [some(words) for _ in range(-(-n // 3))]
    examples = [
        Example(f"q{i}", {"context": paragraphs[i // 3], "question": some(3)}, (some(1), some(2))) for i in range(n)
    ]
    return Dataset("squad", tuple(examples), "made.json")


def test_every_question_is_answered_scored_and_counted(engine: Engine) -> None:
    dataset = squad(11)
    seen: list[tuple[int, int]] = []
    found = answer_dataset(
        engine, dataset, TEMPLATE, max_new_tokens=MAX_NEW, progress=lambda done, of: seen.append((done, of))
    )
    assert list(found.predictions) == [example.id for example in dataset.examples]
    assert seen == [(done, 11) for done in range(1, 12)]
    encoded = encode_dataset(engine.model, dataset, TEMPLATE, n_ctx_seq=None).examples
    assert found.n_prompt_tokens == sum(len(e.prompt) + len(e.invocation) for e in encoded)
    tokens = generate(engine.context_for(1), None, "answer", encoded, max_new_tokens=MAX_NEW)
    assert found.n_new_tokens == sum(map(len, tokens))
    for example, mine in zip(dataset.examples, tokens, strict=True):
        spelled = b"".join(map(engine.model.piece, mine)).decode(errors="ignore")
        assert found.predictions[example.id] == TEMPLATE.parse(spelled, example)
    pairs = [(found.predictions[e.id], e.answers) for e in dataset.examples]
    assert found.score["f1"] == pytest.approx(100 * np.mean([f1(*pair) for pair in pairs]))
    assert found.score["exact_match"] == pytest.approx(100 * np.mean([exact_match(*pair) for pair in pairs]))
    assert found.skipped == {}
    assert found.elapsed_s > 0
    # a random model is about as unsure as if all 320 tokens were equally likely
    assert found.losses.keys() == found.predictions.keys()
    assert np.mean(list(found.losses.values())) == pytest.approx(math.log(320), abs=0.6)


def test_a_right_answer_scores_in_full_and_its_loss_may_be_left_out(engine: Engine) -> None:
    dataset = squad(9)
    given = answer_dataset(engine, dataset, TEMPLATE, max_new_tokens=MAX_NEW, with_losses=False)
    assert given.losses == {}
    real = [example for example in dataset.examples if normalise(given.predictions[example.id])]
    assert real
    right = tuple(replace(example, answers=("no", given.predictions[example.id])) for example in real)
    again = answer_dataset(engine, replace(dataset, examples=right), TEMPLATE, max_new_tokens=MAX_NEW)
    assert again.score == {"exact_match": 100.0, "f1": 100.0}


def test_pairs_are_scored_as_answers_and_labels_by_accuracy(engine: Engine) -> None:
    pairs = Dataset("pairs", (Example("a", {"prompt": "hi"}, ("ho",)), Example("b", {"prompt": "x"}, ("y\nz",))), "p")
    assert answer_dataset(engine, pairs, seed_template("pairs"), max_new_tokens=2).score.keys() == {"exact_match", "f1"}
    words = ("World", "Sports", "Business")
    rows = tuple(Example(f"row-{i}", {"text": f"text {i}"}, (words[i % 3],), words) for i in range(12))
    found = answer_dataset(engine, Dataset("classification", rows, "c.csv"), seed_template("classification"))
    n_right = sum(found.predictions[row.id] == row.answers[0] for row in rows)
    assert found.score == {"accuracy": pytest.approx(100 * n_right / 12)}
    assert set(found.predictions.values()) <= set(words)
    assert found.n_new_tokens == 12
    assert np.mean(list(found.losses.values())) == pytest.approx(math.log(3), abs=0.3)


def test_one_question_is_answered_as_in_a_data_set(engine: Engine) -> None:
    dataset = squad(5)
    found = answer_dataset(engine, dataset, TEMPLATE, max_new_tokens=MAX_NEW)
    for example in dataset.examples:
        unanswered = replace(example, answers=())
        assert ask(engine, TEMPLATE, unanswered, max_new_tokens=MAX_NEW) == found.predictions[example.id]


def test_the_context_is_chosen_from_the_data_and_grows_with_it(path: Path) -> None:
    with open_engine(path, n_threads=1) as engine:
        answer_dataset(engine, squad(2), TEMPLATE, max_new_tokens=2)
        assert engine.context_for(1).options.n_ctx_seq == 256
        answer_dataset(engine, squad(2, words=80), TEMPLATE, max_new_tokens=2)
        assert engine.context_for(1).options.n_ctx_seq == 512
        with pytest.raises(DataError, match=r"fits the context of 2048 tokens; the shortest needs \d+ with its answer"):
            answer_dataset(engine, squad(2, words=900), TEMPLATE, max_new_tokens=2)


def test_questions_too_long_for_the_given_context_are_skipped_and_count_as_unanswered(path: Path) -> None:
    short, long = squad(2).examples, squad(1, words=60).examples
    dataset = Dataset("squad", (*short, replace(long[0], id="long"), Example("none", short[0].fields, ())), "made.json")
    seen: list[int] = []
    with open_engine(path, n_ctx=128, n_threads=1) as engine:
        found = answer_dataset(engine, dataset, TEMPLATE, max_new_tokens=2, progress=lambda done, of: seen.append(done))
    assert found.skipped == {"prompt longer than the context of 128 tokens": 1}
    assert found.predictions["long"] == ""
    assert "long" not in found.losses
    assert seen == [2, 3, 4]


def test_the_adapter_is_switched_on_and_off_in_one_load(path: Path, tmp_path: Path) -> None:
    dataset = squad(6)
    with open_engine(path, n_threads=1) as plain:
        base = answer_dataset(plain, dataset, TEMPLATE, max_new_tokens=MAX_NEW)
    file = adapter_at(tmp_path / "a.gguf", path)
    with open_engine(path, adapter_path=file, n_threads=1) as engine:
        assert engine.scope == "answer"
        tuned = answer_dataset(engine, dataset, TEMPLATE, max_new_tokens=MAX_NEW)
        engine.set_adapter(False)
        off = answer_dataset(engine, dataset, TEMPLATE, max_new_tokens=MAX_NEW)
        engine.set_adapter(True)
        on = answer_dataset(engine, dataset, TEMPLATE, max_new_tokens=MAX_NEW)
    assert off.predictions == base.predictions != tuned.predictions == on.predictions
    assert off.losses == base.losses != tuned.losses == on.losses


def test_an_engine_without_an_adapter_has_none_to_switch_on(engine: Engine) -> None:
    engine.set_adapter(False)
    with pytest.raises(UsageError, match=r"tiny\.gguf was opened without an adapter, so none can be switched on\.$"):
        engine.set_adapter(True)


def test_an_adapter_is_refused_in_another_scope_unless_forced(path: Path, tmp_path: Path) -> None:
    file = adapter_at(tmp_path / "a.gguf", path)
    with pytest.raises(AdapterError) as caught:
        open_engine(path, adapter_path=file, scope="all", n_threads=1)
    assert str(caught.value) == (
        f"{file}: was trained with scope 'answer' and gives wrong answers with scope 'all'; "
        "leave --scope out to use 'answer'."
    )
    dataset = squad(3)
    with open_engine(path, adapter_path=file, n_threads=1) as engine:
        right = answer_dataset(engine, dataset, TEMPLATE, max_new_tokens=MAX_NEW)
    with open_engine(path, adapter_path=file, scope="all", force_scope=True, n_threads=1) as engine:
        assert engine.scope == "all"
        assert answer_dataset(engine, dataset, TEMPLATE, max_new_tokens=MAX_NEW).losses != right.losses


def test_an_adapter_without_invocation_is_on_everywhere(path: Path, tmp_path: Path) -> None:
    with open_engine(path, adapter_path=adapter_at(tmp_path / "a.gguf", path, invocation=None), n_threads=1) as engine:
        assert engine.scope == "all"


def test_an_adapter_of_another_base_model_is_refused_unless_forced(path: Path, tmp_path: Path) -> None:
    wrong, right = "ab" * 32, file_sha256(path)
    file = adapter_at(tmp_path / "a.gguf", path, base_sha256=wrong)
    with pytest.raises(AdapterError) as caught:
        open_engine(path, adapter_path=file, n_threads=1)
    assert str(caught.value) == (
        f"{file}: was trained on the base model with SHA-256 abababababab, but {path} has {right[:12]}. "
        "Use the model that it was trained on."
    )
    open_engine(path, adapter_path=file, force_base=True, n_threads=1).close()
    for known in (right, f"sha256:{right}"):
        open_engine(path, adapter_path=adapter_at(file, path, base_sha256=known), n_threads=1).close()


def test_an_adapter_that_does_not_fit_is_refused_before_llama_cpp_sees_it(path: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other.gguf", n_embd=32)
    with pytest.raises(FileError, match="Was it trained on another model"):
        open_engine(other, adapter_path=adapter_at(tmp_path / "a.gguf", path), n_threads=1)


def test_an_adapter_is_on_from_its_own_invocation_where_that_ends_the_prompt(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = squad(6)
    late = replace(TEMPLATE, after=(Segment(" Answer"),), invocation=(Segment(":"),))
    found: dict[tuple[str, Template], object] = {}
    for invocation in (":", " Answer:"):
        file = adapter_at(tmp_path / "a.gguf", path, invocation=invocation)
        with open_engine(path, adapter_path=file, n_threads=1, kv_type="f32") as engine:
            for template in (TEMPLATE, late):
                answered = answer_dataset(engine, dataset, template, max_new_tokens=MAX_NEW)
                assert answered.predictions["q0"] == ask(engine, template, dataset.examples[0], max_new_tokens=MAX_NEW)
                found[invocation, template] = (answered.predictions, answered.losses)
    assert found[":", TEMPLATE] == found[":", late] != found[" Answer:", TEMPLATE] == found[" Answer:", late]
    assert not caplog.records


def test_another_template_than_the_adapters_is_warned_of(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_engine(path, adapter_path=adapter_at(tmp_path / "a.gguf", path, invocation="x"), n_threads=1) as engine:
        for name in ("seed", "chat"):
            caplog.clear()
            with caplog.at_level(logging.WARNING, "fwdllama.answering"):
                ask(engine, choose_template(engine, name, "squad"), squad(1).examples[0], max_new_tokens=1)
            assert "was trained with another template" in caplog.text


def test_too_little_memory_is_refused_before_loading_with_both_numbers(path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        open_engine(path, n_ctx=2048, batch=1_000_000, n_threads=1)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} needs about ")
    assert "KV cache of the model, 1000000 x 2048 tokens in f16 732 GiB" in sentence
    assert sentence.endswith("Use a smaller --batch or --ctx, or a smaller model; `fwdllama gguf plan` finds what fits.")


def test_a_context_that_grows_past_the_memory_is_refused_with_both_numbers(path: Path) -> None:
    items = [Item("weights", 2 << 30), Item("KV cache", 1 << 30)]
    check_memory(path, items, available=3 << 30)
    with pytest.raises(ResourceError, match=r"needs about 3\.0 GiB of memory \(weights 2\.0 GiB, KV cache 1\.0 GiB\), but 2\.9 GiB are available"):
        check_memory(path, items, available=int(2.9 * (1 << 30)))
    assert 0 < available_bytes() <= total_bytes() < 1 << 50
    assert default_threads() >= 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_type": "f8"}, "the KV cache type 'f8' is not one of f16, f32, q8_0, q5_1, q5_0, q4_1, q4_0."),
        ({"batch": 0}, "--batch is 0, but must be at least 1."),
        ({"n_ctx": -1}, "--ctx is -1, but must be at least 1."),
        ({"n_threads": 0}, "--threads is 0, but must be at least 1."),
    ],
)
def test_options_that_cannot_work_are_refused(path: Path, options: dict[str, int], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_engine(path, **options)  # type: ignore[arg-type]
    assert str(caught.value) == sentence


def test_an_engine_may_be_closed_twice(path: Path, tmp_path: Path) -> None:
    engine = open_engine(path, adapter_path=adapter_at(tmp_path / "a.gguf", path), n_threads=1)
    ask(engine, TEMPLATE, squad(1).examples[0], max_new_tokens=1)
    engine.close()
    engine.close()
    assert engine.model.handle is None


@pytest.mark.model
def test_a_real_model_answers_some_questions_partly_right(model_path: Path, data_dir: Path) -> None:
    dataset = load_dataset(data_dir / "squad-train-4000.json.gz", limit=12)
    with open_engine(model_path, n_threads=1) as engine:
        found = answer_dataset(engine, dataset, TEMPLATE)
        assert 2 < found.score["f1"] < 60
        assert 2 < np.mean(list(found.losses.values())) < 5
