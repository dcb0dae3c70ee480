"""Memory predicted by `fwdllama gguf plan` against what the kernel counted, evaluating and training, in two settings each, and training staged.

Runs are as short as reaches their peak: one step of one round, a few questions. A large model gets few sequences, short questions and a
random A: prompts take minutes there, and choosing A by activations is a phase of its own, whose peak is not training's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .child import run
from .measure import Bar, Bench, Item, Measured
from .runs import train_words

LARGE_BYTES = 1 << 30  # of weights
POOL = 2000  # questions to choose from
CTX = 256  # to train; 256 holds most SQuAD questions
EVAL_CTX, QUESTIONS = 512, 24  # those with the longest answers, as the plan must be for: of 400 some decode asks for all the logits it may
SETTINGS: dict[str, tuple[str, ...]] = {"default": (), "small": ("--mmap", "--no-repack", "--kv-type", "q8_0")}
STAGED = ("--stage-layers", "4")  # training only, beside the options of the first setting


def models(name: str) -> list[str]:
    """All variants of a model that is known by name; a path is itself.

    >>> models("some/file.gguf")
    ['some/file.gguf']
    """
    from fwdllama.registry import REGISTRY

    entry = REGISTRY.get(name)
    return [name] if entry is None else [f"{name}:{variant}" for variant in entry.variants]


def plan(bench: Bench) -> Measured:
    """Plan, evaluate and train each variant in each setting, and train it staged."""
    from fwdllama.models import resolve

    figures: dict[str, Any] = {}
    errors = []
    for model in models(bench.model):
        large = resolve(model).stat().st_size > LARGE_BYTES
        pairs = {}
        for name, words in SETTINGS.items():
            pairs[f"eval {name}"] = _evaluating(bench, model, words, large)
            pairs[f"train {name}"] = _training(bench, model, words, large)
        pairs["train staged"] = _training(bench, model, STAGED, large)
        for name, (predicted, measured) in pairs.items():
            label = f"{model.rpartition('/')[2]} {name}"
            figures |= {f"{label} predicted_bytes": predicted, f"{label} peak_bytes": measured, f"{label} ratio": predicted / measured}
            errors.append(abs(predicted / measured - 1))
    return Measured({"worst_error": max(errors), **figures}, "fwdllama bench plan")


def _evaluating(bench: Bench, model: str, words: tuple[str, ...], large: bool) -> tuple[int, int]:
    """Predicted and measured bytes."""
    n_units, n_questions = (1, 2) if large else (8, QUESTIONS)
    data = _short_questions(bench) if large else _long_answers(bench)
    batch = ("--batch", n_units, "--ctx", EVAL_CTX, *words)
    planned = run(bench, "gguf", "plan", model, *batch, "--json").json
    answered = run(bench, "eval", "--model", model, "--data", data, "--limit", n_questions, *batch, "--json")
    return int(planned["eval"]["peak_bytes"]), answered.peak_bytes


def _training(bench: Bench, model: str, words: tuple[str, ...], large: bool) -> tuple[int, int]:
    """Predicted and measured bytes."""
    n_units, n_held_out = (1, 5) if large else (8, 32)
    data = _short_questions(bench) if large else bench.train_data
    shared = ("--held-out", n_held_out, "--ctx", CTX, *words)
    planned = run(bench, "gguf", "plan", model, "--batch", n_units, *shared, "--json").json
    steps = ("--units", n_units, "--fresh", min(3, n_units), "--rounds", 1, "--steps", 1)
    init = ("--init", "random") if large else ()
    trained = run(bench, *train_words(bench, bench.fresh("plan"), *steps, *shared, *init, model=model, data=data))
    phases = {phase["name"]: phase["total_bytes"] for phase in planned["train"]["phases"] if not (large and phase["name"] == "choosing A")}
    return max(phases.values()), trained.peak_bytes


def _long_answers(bench: Bench) -> Path:
    """A SQuAD file of the questions whose answers are longest."""
    from fwdllama.tasks.load import load_dataset

    examples = sorted(load_dataset(bench.train_data, limit=POOL).examples, key=lambda example: -len(example.answers[0]))
    return _squad(bench, "long", [(e.fields["context"], [(e.id, e.fields["question"], e.answers[0])]) for e in examples[:QUESTIONS]])


def _short_questions(bench: Bench) -> Path:
    """A SQuAD file of paragraphs of a few words, with as many questions on each as a batch takes."""
    words = ("one", "two", "three", "four", "five")
    firsts = ("six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen")
    paragraphs = [(f"{first} {' '.join(words)}", [(f"{first}-{word}", f"What follows {word}?", word) for word in words]) for first in firsts]
    return _squad(bench, "short", paragraphs)


def _squad(bench: Bench, name: str, paragraphs: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]) -> Path:
    """A file of contexts with (id, question, answer) on each."""
    nodes = [
        {"context": context, "qas": [{"id": id_, "question": question, "answers": [{"text": answer}]} for id_, question, answer in questions]}
        for context, questions in paragraphs
    ]
    path = bench.work / f"{name}.json"
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": name, "paragraphs": nodes}]}))
    return path


ITEMS = (
    Item(
        "plan",
        "peak memory as planned against measured, evaluating and training, every variant of the model",
        (Bar("worst_error", "<=", 0.07),),
        ("worst_error",),
        ("data",),
        8,
        plan,
    ),
)
