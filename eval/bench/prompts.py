"""What keeping prompts on disk saves on a small data set: the same batches loaded with a pool and without, in turns, and their probes.

Step by step in one process, because this machine's speed changes more from minute to minute than what is to be measured.
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .child import in_child
from .measure import Bar, Bench, BenchError, Figures, Item, Measured

if TYPE_CHECKING:
    from fwdllama.types import Example

N_QUESTIONS, N_STEPS = 100, 16  # about three passes over the questions that are not held out
EPS = 0.01  # of a probe; any that is not zero costs the same


def questions(source: Path, target: Path, n: int, title: str) -> Path:
    """The first n questions of a SQuAD file as a file of their own; `title` makes its digest, and so its pool, another one."""
    from fwdllama.tasks.load import load_dataset

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


def timed_steps(model: str, data: Path, n_steps: int) -> dict[str, Any]:
    """Seconds of loading every step's batch with a pool and without, and of its probes; whether losses agree to the bit.

    Units that the pool has not seen are decoded and written by the one, those that it has are read.
    """
    from fwdllama.batches import grouped
    from fwdllama.config import make_config
    from fwdllama.direction import direction
    from fwdllama.estimator import evaluate
    from fwdllama.hooks import Hooks
    from fwdllama.llama.oracle import LlamaOracle
    from fwdllama.material import Source
    from fwdllama.models import resolve
    from fwdllama.session import opened

    config = make_config({"budget": {"steps": n_steps}, "step": {"warmup": False}})
    found: dict[str, Any] = {"without_s": [], "with_s": [], "probes_s": [], "n_found": [], "n_loaded": [], "same": True}
    with opened(config, resolve(model), Source(data), Hooks()) as session:
        own, pool = session.oracle, session.oracle.pool
        if pool is None:
            raise BenchError(f"no prompt returns within {n_steps} steps.")
        with LlamaOracle(own.model, own.space, own.scope, own.context.options, trunk=own.trunk, shortlist=own.shortlist) as plain:
            for step in range(n_steps + 1):
                rows = [*session.held_out, *session.batches.batch(step)[0]]
                before, theta = (pool.n_found, pool.n_found + pool.n_kept), EPS * direction(step, own.space.n_params)
                seconds = {}
                for oracle in (own, plain) if step % 2 else (plain, own):
                    begun = time.perf_counter()
                    oracle.load(rows)
                    seconds[oracle is own] = time.perf_counter() - begun
                    oracle.write(theta)
                groups = grouped([*[None] * len(session.held_out), *rows[len(session.held_out) :]], config.estimator.examples_per_probe, step)
                begun = time.perf_counter()
                losses, members = np.full(len(rows), np.nan), sorted(row for group in groups for row in group)
                losses[members] = own.losses(members)
                plan = [(i, i % len(groups)) for i in range(config.estimator.rounds * len(groups))]
                for _ in evaluate(own, theta, plan, groups, losses if config.estimator.sided == "one" else None, EPS, np.inf):
                    pass
                found["probes_s"].append(time.perf_counter() - begun)
                own.write(theta)
                found["same"] = bool(found["same"] and np.array_equal(own.losses(), plain.losses()))
                found["without_s"].append(seconds[False])
                found["with_s"].append(seconds[True])
                found["n_found"].append(pool.n_found - before[0])
                found["n_loaded"].append(pool.n_found + pool.n_kept - before[1])
        files = list(pool.folder.iterdir())
        found |= {"pool_bytes": sum(file.stat().st_size for file in files), "units": len(files), "n_ctx": session.units.n_ctx}
        shutil.rmtree(pool.folder)
    return found


def prompt_pool(bench: Bench) -> Measured:
    """Steps on few questions."""
    folder = bench.fresh("prompt-pool")
    data = questions(bench.train_data, folder / "questions.json", N_QUESTIONS, f"bench at {time.time()}")  # so the pool is new
    n_steps = max(4, round(bench.scale * N_STEPS))
    return Measured(figures_of(in_child(timed_steps, bench.model, data, n_steps)), "fwdllama bench prompt-pool")


def figures_of(found: dict[str, Any]) -> Figures:
    """What `timed_steps` found, of the steps after the first, which loads what is held out and the whole first batch."""
    without, with_pool, probes, n_found, n_loaded = (
        np.array(found[key][1:], np.float64) for key in ("without_s", "with_s", "probes_s", "n_found", "n_loaded")
    )
    read, computed = n_found == n_loaded, n_found == 0
    return {
        "without_steps_a_minute": 60 * len(probes) / (without + probes).sum(),
        "with_steps_a_minute": 60 * len(probes) / (with_pool + probes).sum(),
        "prompt_share": without.sum() / (without + probes).sum(),
        "computed_s_a_unit": without.sum() / n_loaded.sum(),
        "read_s_a_unit": with_pool[read].sum() / n_loaded[read].sum() if read.any() else None,
        "read_ratio": float(with_pool[read].sum() / without[read].sum()) if read.any() else None,
        "written_ratio": float(with_pool[computed].sum() / without[computed].sum()) if computed.any() else None,
        "units_read": int(n_found.sum()),
        "units_loaded": int(n_loaded.sum()),
        "same_losses": found["same"],
        **{key: found[key] for key in ("pool_bytes", "units", "n_ctx")},
    }


ITEM = Item(
    "prompt-pool",
    "steps on 100 questions with prompts kept on disk, against decoding them whenever they return",
    (Bar("same_losses", "is", True), Bar("read_ratio", "<=", 0.1)),
    ("without_steps_a_minute", "with_steps_a_minute", "prompt_share", "read_ratio", "written_ratio", "pool_bytes", "same_losses"),
    ("data",),
    2,
    prompt_pool,
)
