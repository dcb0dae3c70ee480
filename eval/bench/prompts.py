"""What keeping prompts on disk saves on a small data set: the same training, with `--keep-prompts` and without, in turns.

The first run with it fills a pool of its own while it passes over the data, as a first run does; the second finds everything there, as a run with
other settings on the same data does, or one that is resumed.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

from fwdllama.models import default_cache_dir
from fwdllama.tasks.load import load_dataset
from fwdllama.types import Example

from .child import run
from .measure import Bar, Bench, Item, Measured
from .runs import train_words

N_QUESTIONS, N_STEPS, N_ROUNDS = 100, 20, 2
MANNERS = {"without": "no", "filling": "2GB", "filled": "2GB"}


def questions(source: Path, target: Path, n: int, title: str) -> Path:
    """The first n questions of a SQuAD file as a file of their own; `title` makes its digest, and so its pool, another one."""
    paragraphs: list[dict[str, Any]] = []
    examples = load_dataset(source, limit=n).examples
    for context, group in itertools.groupby(examples, key=_context):
        paragraphs.append({"context": context, "qas": [_asked(example, context) for example in group]})
    target.write_text(json.dumps({"version": "1.1", "data": [{"title": title, "paragraphs": paragraphs}]}))
    return target


def _context(example: Example) -> str:
    return example.fields["context"]


def _asked(example: Example, context: str) -> dict[str, Any]:
    answers = [{"text": text, "answer_start": context.index(text)} for text in example.answers]
    return {"id": example.id, "question": example.fields["question"], "answers": answers}


def prompt_pool(bench: Bench) -> Measured:
    """Train in all manners in turns; steps are the same to the bit, so only their time differs."""
    pools = default_cache_dir() / "prompts"
    before = set(pools.glob("*"))
    n_steps = max(2, round(bench.scale * N_STEPS))
    seconds: dict[str, list[float]] = {manner: [] for manner in MANNERS}
    same, line, n_bytes = True, "", 0
    try:
        for number in range(N_ROUNDS):
            folder = bench.fresh("prompt-pool")
            data = questions(bench.train_data, folder / "questions.json", N_QUESTIONS, f"round {number} at {time.time()}")
            ledgers = set()
            for manner, limit in MANNERS.items():
                ran = run(bench, *train_words(bench, folder / manner, "--steps", n_steps, "--keep-prompts", limit, data=data))
                line = ran.command if manner == "filling" else line
                seconds[manner].append(ran.json["elapsed_s"])
                ledgers.add((folder / manner / "run" / "ledger.bin").read_bytes())
            same = same and len(ledgers) == 1
            n_bytes = sum(file.stat().st_size for made in set(pools.glob("*")) - before for file in made.iterdir()) // (number + 1)
    finally:
        for made in set(pools.glob("*")) - before:
            shutil.rmtree(made)
    figures = {f"{manner}_steps_per_s": n_steps / median(times) for manner, times in seconds.items()}
    pairs = {manner: [a / b for a, b in zip(times, seconds["without"], strict=True)] for manner, times in seconds.items()}
    figures |= {"filling_time_ratio": median(pairs["filling"]), "prompt_share": 1 - median(pairs["filled"])}
    return Measured({**figures, "same_ledger": same, "pool_bytes": n_bytes, "steps": n_steps, "seconds": seconds}, line)


ITEM = Item(
    "prompt-pool",
    "training on 100 questions with prompts kept on disk, against decoding them whenever they return",
    (Bar("same_ledger", "is", True), Bar("filling_time_ratio", "<=", 1)),
    ("without_steps_per_s", "filling_steps_per_s", "filled_steps_per_s", "prompt_share", "pool_bytes", "same_ledger"),
    ("data",),
    8,
    prompt_pool,
)
